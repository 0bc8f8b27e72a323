//! The registration of this sidecar's workload: a stream that is the lease. Opened anew when it breaks or is refused,
//! on the connection of its session, and taken back once.

use std::future::pending;
use std::pin::Pin;
use std::time::Duration;

use outrigger_api::wire::{
    LeaseRequest, LeaseResponse, RegisteredPort, Registration, Withdraw, lease_request, protocol_to_wire,
    registry_client::RegistryClient,
};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::Lease;
use super::reconnect::reconnect_after;
use crate::identity::answered;

const ANSWER: Duration = Duration::from_secs(10);
/// How long the end of a withdrawn stream is waited for.
const WITHDRAWN: Duration = Duration::from_secs(2);
/// A refusal may pass by itself: the address may be another lease's that is about to lapse.
const AGAIN_AFTER_REFUSAL: Duration = Duration::from_secs(5);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum LeaseEvent {
    Accepted {
        services: Vec<String>,
    },
    Refused {
        reason: String,
    },
    /// The stream broke; it is opened again.
    Lost {
        reason: String,
    },
    Withdrawn,
}

pub(super) struct Leasing {
    channel: Channel,
    registration: Option<Registration>,
    /// The lease is to be taken back; by a stream of its own if there is none now, so that it does not stand until it
    /// lapses.
    withdraw: bool,
    stage: Stage,
    failures: u32,
}

enum Stage {
    Off,
    Waiting(Pin<Box<Sleep>>),
    Opening(Pin<Box<dyn Future<Output = Result<Open, Status>> + Send>>),
    Open(Open),
    /// Withdraw was sent and our half of the stream closed; the other half ends when it was read.
    Withdrawing(Streaming<LeaseResponse>, Pin<Box<Sleep>>),
}

struct Open {
    answers: Streaming<LeaseResponse>,
    requests: mpsc::Sender<LeaseRequest>,
}

impl Leasing {
    /// With `withdraw` the lease of an earlier connection is taken back.
    pub(super) fn new(channel: Channel, registration: Option<Registration>, withdraw: bool) -> Leasing {
        let mut leasing = Leasing { channel, registration, withdraw, stage: Stage::Off, failures: 0 };
        leasing.open();
        leasing
    }

    pub(super) fn withdraw(&mut self) {
        self.withdraw = true;
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::Open(open) => self.stage = open.withdraw(),
            Stage::Waiting(_) => self.open(),
            other @ (Stage::Off | Stage::Opening(_) | Stage::Withdrawing(..)) => self.stage = other,
        }
    }

    /// What happens to the lease next; never, when there is none. May be dropped at any await.
    pub(super) async fn next(&mut self) -> LeaseEvent {
        loop {
            match &mut self.stage {
                Stage::Off => pending().await,
                Stage::Waiting(sleep) => {
                    sleep.as_mut().await;
                    self.open();
                }
                Stage::Opening(opening) => match opening.as_mut().await {
                    Ok(open) if self.withdraw => self.stage = open.withdraw(),
                    Ok(open) => self.stage = Stage::Open(open),
                    Err(status) => return self.lost(answered(&status)),
                },
                Stage::Open(open) => match open.answers.message().await {
                    Ok(Some(LeaseResponse { refusal, services })) if refusal.is_empty() => {
                        self.failures = 0;
                        return LeaseEvent::Accepted { services };
                    }
                    Ok(Some(LeaseResponse { refusal, .. })) => {
                        self.stage = Stage::Waiting(Box::pin(sleep(AGAIN_AFTER_REFUSAL)));
                        return LeaseEvent::Refused { reason: refusal };
                    }
                    Ok(None) => return self.lost("the control plane ended the stream".to_owned()),
                    Err(status) => return self.lost(answered(&status)),
                },
                Stage::Withdrawing(answers, limit) => {
                    let more = tokio::select! {
                        answer = answers.message() => matches!(answer, Ok(Some(_))),
                        () = limit.as_mut() => false,
                    };
                    if !more {
                        self.stage = Stage::Off;
                        return LeaseEvent::Withdrawn;
                    }
                }
            }
        }
    }

    fn open(&mut self) {
        self.stage = match &self.registration {
            Some(registration) => Stage::opening(&self.channel, registration),
            None => Stage::Off,
        };
    }

    fn lost(&mut self, reason: String) -> LeaseEvent {
        self.failures = self.failures.saturating_add(1);
        self.stage = Stage::Waiting(Box::pin(sleep(reconnect_after(self.failures, fastrand::f64()))));
        LeaseEvent::Lost { reason }
    }
}

impl Open {
    fn withdraw(self) -> Stage {
        let withdraw = LeaseRequest { kind: Some(lease_request::Kind::Withdraw(Withdraw {})) };
        // A stream whose queue is full is dropped without it: its end ends the lease too, only later.
        let _ = self.requests.try_send(withdraw);
        Stage::Withdrawing(self.answers, Box::pin(sleep(WITHDRAWN)))
    }
}

impl Stage {
    fn opening(channel: &Channel, registration: &Registration) -> Stage {
        let mut client = RegistryClient::new(channel.clone());
        let register = LeaseRequest { kind: Some(lease_request::Kind::Register(registration.clone())) };
        Stage::Opening(Box::pin(async move {
            let (requests, outgoing) = mpsc::channel(4);
            let _ = requests.try_send(register);
            match timeout(ANSWER, client.lease(ReceiverStream::new(outgoing))).await {
                Ok(answer) => Ok(Open { answers: answer?.into_inner(), requests }),
                Err(_) => Err(Status::deadline_exceeded("the control plane did not answer in time")),
            }
        }))
    }
}

impl Lease {
    /// As the process of this name registers it.
    pub(super) fn registration(self, process: String) -> Registration {
        let mut ips = self.ips.iter().map(ToString::to_string);
        Registration {
            instance: self.instance,
            workload: self.workload,
            labels: self.labels.into_iter().collect(),
            ip: ips.next().unwrap_or_default(),
            other_ips: ips.collect(),
            ports: self
                .ports
                .into_iter()
                .map(|(application, mesh, protocol)| RegisteredPort {
                    application_port: u32::from(application),
                    mesh_port: u32::from(mesh),
                    protocol: protocol_to_wire(protocol).into(),
                })
                .collect(),
            transparent: self.transparent,
            process,
        }
    }
}
