//! A sidecar's word to the control plane, said by hand: Lease and Watch streams with whatever a test wants to claim.

use std::net::SocketAddr;

use outrigger_api::snapshot::Key;
use outrigger_api::wire::discovery_client::DiscoveryClient;
use outrigger_api::wire::registry_client::RegistryClient;
use outrigger_api::wire::{
    Hello, LeaseRequest, LeaseResponse, RegisteredPort, Registration, WatchRequest, WatchResponse, Withdraw,
    lease_request, watch_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::eventually::soon;
use crate::peer::Peer;

/// A registration at `ip`, for ports `(application, mesh)`.
pub fn registration(instance: &str, ip: &str, ports: &[(u16, u16)]) -> Registration {
    let port = |(application, mesh): &(u16, u16)| RegisteredPort {
        application_port: u32::from(*application),
        mesh_port: u32::from(*mesh),
        protocol: 0,
    };
    Registration {
        instance: instance.to_owned(),
        ip: ip.to_owned(),
        ports: ports.iter().map(port).collect(),
        ..Registration::default()
    }
}

/// A Lease stream.
pub struct Lease {
    requests: mpsc::Sender<LeaseRequest>,
    answers: Streaming<LeaseResponse>,
}

impl Lease {
    pub async fn open(control_plane: SocketAddr, peer: &Peer) -> Result<Lease, Status> {
        let mut client = RegistryClient::new(peer.channel(control_plane).await?);
        let (requests, stream) = mpsc::channel(4);
        let answers = soon("a lease stream", client.lease(ReceiverStream::new(stream))).await?.into_inner();
        Ok(Lease { requests, answers })
    }

    /// The refusal; empty when it was taken.
    pub async fn register(&mut self, registration: Registration) -> String {
        self.say(lease_request::Kind::Register(registration)).await.refusal
    }

    pub async fn withdraw(&mut self) {
        self.say(lease_request::Kind::Withdraw(Withdraw {})).await;
    }

    /// Whether it still answers; what was registered is withdrawn.
    pub async fn is_alive(&mut self) -> bool {
        self.ask(lease_request::Kind::Withdraw(Withdraw {})).await.is_some()
    }

    async fn say(&mut self, kind: lease_request::Kind) -> LeaseResponse {
        self.ask(kind).await.expect("an answer")
    }

    /// Nothing when the stream has ended.
    async fn ask(&mut self, kind: lease_request::Kind) -> Option<LeaseResponse> {
        self.requests.send(LeaseRequest { kind: Some(kind) }).await.ok()?;
        soon("an answer or the end", self.answers.message()).await.ok()?
    }
}

/// A Watch stream.
pub struct Watch {
    requests: mpsc::Sender<WatchRequest>,
    updates: Streaming<WatchResponse>,
}

impl Watch {
    pub async fn open(control_plane: SocketAddr, peer: &Peer, instance: &str) -> Result<Watch, Status> {
        let mut client = DiscoveryClient::new(peer.channel(control_plane).await?);
        let (requests, stream) = mpsc::channel(64);
        let hello = Hello { version: "test".into(), workload: instance.to_owned(), process: String::new() };
        let _ = requests.send(WatchRequest { kind: Some(watch_request::Kind::Hello(hello)) }).await;
        let updates = soon("a watch stream", client.watch(ReceiverStream::new(stream))).await?.into_inner();
        Ok(Watch { requests, updates })
    }

    /// False when the stream is over.
    pub async fn subscribe(&self, key: &Key) -> bool {
        self.requests.send(WatchRequest { kind: Some(watch_request::Kind::Subscribe(key.into())) }).await.is_ok()
    }

    /// The next update; None when the stream ended in order.
    pub async fn next(&mut self) -> Result<Option<WatchResponse>, Status> {
        soon("an update", self.updates.message()).await
    }
}
