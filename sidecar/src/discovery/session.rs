//! One connection to the control plane with its Watch stream and its lease. It reports what arrives and knows when it
//! is over; deciding what to do about it is the caller's.

use std::collections::VecDeque;
use std::time::Duration;

use outrigger_api::snapshot::Key;
use outrigger_api::wire::discovery_client::DiscoveryClient;
use outrigger_api::wire::telemetry_client::TelemetryClient;
use outrigger_api::wire::{self, ResourceKey, WatchRequest, WatchResponse, watch_request};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::lease::{LeaseEvent, Leasing};
use super::{DiscoverySettings, Lease, Taken};
use crate::identity::{DialError, answered, dial};
use crate::tls::{Clock, Credential};

const ANSWER: Duration = Duration::from_secs(10);
const MAX_UPDATE: usize = 16 * 1024 * 1024;
/// Requests that wait for the control plane to read them: every key that may be known, and an answer for each.
const MAX_QUEUE: usize = 4 * super::MAX_DESTINATIONS;

/// Why there is no session, or why it ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the control plane did not answer within {0:?}")]
    Late(Duration),
    #[error("{}", answered(.0))]
    Refused(Box<tonic::Status>),
    #[error("the control plane does not take this sidecar's certificate (TLS alert {0:?})")]
    CertificateRefused(rustls::AlertDescription),
    #[error("the control plane ended the stream")]
    Ended,
    #[error("the control plane does not read: {0} requests wait for it")]
    Stuck(usize),
}

impl SessionError {
    /// What the control plane says when another sidecar has this one's name.
    pub(super) fn duplicate(&self) -> Option<&str> {
        match self {
            SessionError::Refused(status) if status.code() == tonic::Code::AlreadyExists => Some(status.message()),
            _ => None,
        }
    }
}

pub(super) enum Event {
    Update(Box<WatchResponse>),
    Lease(LeaseEvent),
    Over(SessionError),
}

pub(super) struct Session {
    updates: Streaming<WatchResponse>,
    requests: mpsc::Sender<WatchRequest>,
    /// What does not fit into `requests` yet. Filled without waiting and drained while updates are read: waiting here
    /// for a control plane that waits for us would be the end of both.
    queue: VecDeque<WatchRequest>,
    leasing: Leasing,
    channel: Channel,
}

impl Session {
    /// Dials with the credential, says hello and subscribes to the own workload. The lease is registered, or taken back
    /// when `withdraw` says so.
    pub(super) async fn open(
        settings: DiscoverySettings,
        credential: Credential,
        lease: Option<Lease>,
        withdraw: bool,
        clock: Clock,
    ) -> Result<Session, SessionError> {
        let dialled =
            dial(&settings.control_plane, settings.mark, credential.bundle(), Some(&credential), &clock).await?;
        let (requests, outgoing) = mpsc::channel(64);
        let process = settings.process;
        let hello = wire::Hello { version: settings.version, workload: settings.name, process: process.clone() };
        // There is room for these: the stream's body begins with them.
        for kind in [watch_request::Kind::Hello(hello), subscribe(&Key::Own)] {
            let _ = requests.try_send(WatchRequest { kind: Some(kind) });
        }
        let mut client = DiscoveryClient::new(dialled.channel.clone()).max_decoding_message_size(MAX_UPDATE);
        let answer = timeout(ANSWER, client.watch(ReceiverStream::new(outgoing)));
        let answer = answer.await.map_err(|_| SessionError::Late(ANSWER))?;
        let answer = answer.map_err(|status| match dialled.alert() {
            Some(alert) => SessionError::CertificateRefused(alert),
            None => SessionError::Refused(Box::new(status)),
        });
        let updates = answer?.into_inner();
        let registration = lease.map(|mut lease| {
            if lease.ips.is_empty() {
                lease.ips.extend(dialled.local);
            }
            lease.registration(process)
        });
        let leasing = Leasing::new(dialled.channel.clone(), registration, withdraw);
        Ok(Session { updates, requests, queue: VecDeque::new(), leasing, channel: dialled.channel })
    }

    pub(super) fn subscribe(&mut self, key: &Key) {
        self.send(subscribe(key));
    }

    pub(super) fn unsubscribe(&mut self, key: &Key) {
        self.send(watch_request::Kind::Unsubscribe(ResourceKey::from(key)));
    }

    pub(super) fn answer(&mut self, ack: wire::Ack) {
        self.send(watch_request::Kind::Ack(ack));
    }

    /// Takes the lease back; the answer comes as an event.
    pub(super) fn withdraw(&mut self) {
        self.leasing.withdraw();
    }

    /// Sends a summary beside everything else. One that is lost is lost, since the next covers another window; but what
    /// Shadow policies said is sent until it was `taken`.
    pub(super) fn report(&self, report: wire::ReportRequest, taken: &Taken) {
        let mut client = TelemetryClient::new(self.channel.clone());
        let (shadow, taken) = (report.shadow.clone(), taken.clone());
        tokio::spawn(async move {
            match timeout(ANSWER, client.report(report)).await {
                Ok(Ok(_)) => taken(&shadow),
                Ok(Err(status)) => tracing::debug!(%status, "the control plane did not take a report"),
                Err(_) => {}
            }
        });
    }

    fn send(&mut self, kind: watch_request::Kind) {
        self.queue.push_back(WatchRequest { kind: Some(kind) });
    }

    /// What happens next. May be dropped at any await without losing anything.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            if self.queue.len() > MAX_QUEUE {
                return Event::Over(SessionError::Stuck(self.queue.len()));
            }
            tokio::select! {
                permit = self.requests.reserve(), if !self.queue.is_empty() => match (permit, self.queue.pop_front()) {
                    (Ok(permit), Some(request)) => permit.send(request),
                    _ => return Event::Over(SessionError::Ended),
                },
                update = self.updates.message() => return match update {
                    Ok(Some(update)) => Event::Update(Box::new(update)),
                    Ok(None) => Event::Over(SessionError::Ended),
                    Err(status) => Event::Over(SessionError::Refused(Box::new(status))),
                },
                event = self.leasing.next() => return Event::Lease(event),
            }
        }
    }
}

fn subscribe(key: &Key) -> watch_request::Kind {
    watch_request::Kind::Subscribe(ResourceKey::from(key))
}
