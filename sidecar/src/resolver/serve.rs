//! The resolver's thread: its sockets, one loop per socket, one task per question that has to wait. A datagram that is of no
//! use costs its parsing; a TCP client that is slow or silent costs its place for as long as limits say.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outrigger_runtime::drain::{DrainHandle, State};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinSet, spawn_local};

use super::forward::{read_message, within, write_message};
use super::message::Transport;
use super::{Resolver, Settings, Step};
use crate::config::Limits;
use crate::discovery::Directory;
use crate::telemetry::{Resolved, Telemetry};

/// One address of the resolver, for both transports.
#[derive(Debug)]
pub struct Listener {
    pub udp: std::net::UdpSocket,
    pub tcp: std::net::TcpListener,
}

/// What a client may say in one datagram. A question has no use for more.
const DATAGRAM: usize = 4096;
/// After an error of a socket, such as no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs until the drain is done.
pub fn run(
    settings: Settings,
    listeners: Vec<Listener>,
    directory: Directory,
    telemetry: Arc<Telemetry>,
    limits: Limits,
    drain: DrainHandle,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    for address in settings.own.iter().filter(|address| !address.ip().is_loopback()) {
        tracing::warn!(%address, "the resolver answers whoever reaches this address; on loopback it is for this machine alone");
    }
    let resolver = Rc::new(Resolver::new(settings, directory, telemetry, limits));
    runtime.block_on(async {
        let clients = Rc::new(Cell::new(0));
        let mut vital = JoinSet::new();
        for listener in listeners {
            let udp = Rc::new(UdpSocket::from_std(listener.udp)?);
            vital.spawn_local(datagrams(resolver.clone(), udp));
            let tcp = TcpListener::from_std(listener.tcp)?;
            vital.spawn_local(connections(resolver.clone(), tcp, clients.clone()));
        }
        tokio::select! {
            () = drain.reached(State::Done) => Ok(()),
            // They end by a panic alone; half a resolver would only look alive.
            Some(_) = vital.join_next() => Err(io::Error::other("a loop of the resolver ended")),
        }
    })
}

async fn datagrams(resolver: Rc<Resolver>, socket: Rc<UdpSocket>) {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let (count, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // Also what an earlier answer met on its way.
            Err(error) => {
                tracing::debug!(%error, "the resolver's UDP socket");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let bytes = &buffer[..count];
        match resolver.admit(bytes, client, Transport::Udp) {
            Step::Nothing => {}
            // A client who does not take it asks again.
            Step::Say(answer) => drop(socket.try_send_to(&answer, client)),
            Step::Wait(place) => {
                let (bytes, socket) = (bytes.to_vec(), socket.clone());
                spawn_local(async move {
                    let answer = place.0.resolve(&bytes, Transport::Udp).await;
                    let _ = socket.send_to(&answer, client).await;
                });
            }
        }
    }
}

async fn connections(resolver: Rc<Resolver>, listener: TcpListener, clients: Rc<Cell<usize>>) {
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "the resolver's TCP listener");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if clients.get() >= resolver.limits.dns_tcp_clients {
            resolver.telemetry.resolved(Resolved::Refused);
            continue;
        }
        let place = TcpPlace::take(&clients);
        let resolver = resolver.clone();
        spawn_local(async move {
            let _place = place;
            // How it ended is the client's business.
            let _ = connection(&resolver, stream, client).await;
        });
    }
}

/// One of the TCP clients.
struct TcpPlace(Rc<Cell<usize>>);

impl TcpPlace {
    fn take(clients: &Rc<Cell<usize>>) -> TcpPlace {
        clients.set(clients.get() + 1);
        TcpPlace(clients.clone())
    }
}

impl Drop for TcpPlace {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Answers one question after the other, until the client ends or takes too long over one.
async fn connection(resolver: &Rc<Resolver>, mut stream: TcpStream, client: SocketAddr) -> io::Result<()> {
    let idle = resolver.limits.dns_tcp_idle;
    loop {
        let bytes = within(idle, read_message(&mut stream)).await?;
        let answer = match resolver.admit(&bytes, client, Transport::Tcp) {
            // What is no question begins no conversation.
            Step::Nothing => return Ok(()),
            Step::Say(answer) => answer,
            Step::Wait(place) => place.0.resolve(&bytes, Transport::Tcp).await,
        };
        within(idle, write_message(&mut stream, &answer)).await?;
    }
}
