//! `Discovery.Watch`: one stream per sidecar. Reads subscriptions and acknowledgements, writes what changed; the
//! sidecar's own pace decides how much is sent, and only the newest version of each key ever is.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use outrigger_api::peer_text::PeerText;
use outrigger_api::resource::Labels;
use outrigger_api::snapshot::Key;
use outrigger_api::wire::discovery_server::Discovery;
use outrigger_api::wire::{Ack, Hello, ResourceKey, WatchRequest, WatchResponse, watch_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::publisher::{ConnectError, Subscriber, Topic};
use super::recent::Event;
use super::server::{Control, Shared};
use super::streams::Place;
use super::tls::{Peer, PeerCertificate};
use crate::registry::InstanceId;

/// Keys to which all streams of one redemption may be subscribed. More than the 10,000 destinations and the own workload
/// that a sidecar knows at once: whoever exceeds it loses the stream, and would lose it again after each reconnect. A key
/// is two DNS labels at most and a subscription about 1 KiB, so 16 MiB are the end.
const MAX_SUBSCRIPTIONS: usize = 16_384;
/// How long a stream may say nothing at its beginning.
const HELLO: Duration = Duration::from_secs(10);
/// A stream whose place a newer one took ends this much later: its sidecar drops it by itself meanwhile, and takes its end
/// for no loss of the connection.
const REPLACED: Duration = Duration::from_secs(2);
/// Updates that wait for a sidecar's window; the rest waits as marks.
const IN_FLIGHT: usize = 16;

#[tonic::async_trait]
impl Discovery for Shared {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (peer, certificate) = client_certificate(&request)?;
        let place = place(&self.0, &peer, &certificate)?;
        let (updates, stream) = mpsc::channel(IN_FLIGHT);
        tokio::spawn(watch(self.0.clone(), peer, certificate, place, request.into_inner(), updates));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The verified certificate without which this service says nothing, and who it is from. It is judged anew: the
/// connection may be older than the end of the certificate, or than the bundle.
pub(super) fn client_certificate<T>(request: &Request<T>) -> Result<(Peer, PeerCertificate), Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    let certificate = peer.as_ref().and_then(|peer| peer.certificate.clone());
    let (peer, certificate) = peer.zip(certificate).ok_or_else(|| {
        Status::unauthenticated("certificate_required: connect with the certificate that Identity.Issue gave")
    })?;
    peer.check(SystemTime::now())?;
    Ok((peer, certificate))
}

/// The place of one more stream of a sidecar.
pub(super) fn place(control: &Control, peer: &Peer, certificate: &PeerCertificate) -> Result<Place, Status> {
    let (holder, _) = control.holder(certificate, "");
    let mut place = control.open_streams.open(&holder.lineage).ok_or_else(|| {
        Status::resource_exhausted(
            "too_many_streams: this sidecar has too many streams open; close those it does not use",
        )
    })?;
    place.in_use = peer.member.as_ref().map(|member| member.in_use());
    Ok(place)
}

/// The instance that a caller stands for. The certificate proves namespace and account; its subject names the workload,
/// of which there may be several instances, each with the name that it gives itself.
pub(super) fn instance_of(certificate: &PeerCertificate, claimed: &str) -> Result<InstanceId, Status> {
    if let Err(error) = outrigger_api::name::label(claimed) {
        return Err(Status::invalid_argument(format!("workload_name: {error}")));
    }
    Ok(InstanceId {
        namespace: certificate.identity.namespace().to_owned(),
        service_account: certificate.identity.account().to_owned(),
        name: claimed.to_owned(),
    })
}

async fn watch(
    control: Arc<Control>,
    peer: Peer,
    certificate: PeerCertificate,
    place: Place,
    mut requests: Streaming<WatchRequest>,
    updates: mpsc::Sender<Result<WatchResponse, Status>>,
) {
    let end = control.until_end(&peer);
    let mut end = std::pin::pin!(end);
    let first = tokio::select! {
        first = requests.message() => first,
        status = &mut end => Err(status),
        () = tokio::time::sleep(HELLO) => Err(Status::deadline_exceeded("a Watch begins with hello, at once")),
    };
    let subscriber = match first {
        Ok(Some(WatchRequest { kind: Some(watch_request::Kind::Hello(hello)) })) => {
            greet(&control, &certificate, &place, hello)
        }
        Ok(Some(_)) => Err(Status::invalid_argument("the first message of a Watch must be hello")),
        Ok(None) => return,
        Err(status) => Err(status),
    };
    let subscriber = match subscriber {
        Ok(subscriber) => subscriber,
        Err(status) => {
            let _ = updates.send(Err(status)).await;
            return;
        }
    };
    if let Err(error) = control.publisher.connect(&subscriber) {
        control.recent.note(Event::RegistrationRefused, format!("{}: {error}", subscriber.id), SystemTime::now());
        if let Some(line) = control.line("stream_refused") {
            tracing::warn!(instance = %subscriber.id, suppressed = line.suppressed, "stream refused: {error}");
        }
        let status = match error {
            ConnectError::Instance(error) => Status::already_exists(error.to_string()),
            ConnectError::Account(error) => Status::resource_exhausted(error.to_string()),
        };
        let _ = updates.send(Err(status)).await;
        return;
    }
    control.recent.forget(Event::SidecarGone, &subscriber.id.to_string());
    let account = || Some(certificate.identity.to_string());
    if let Some(line) = control.lines.admit(("connected", account()), Instant::now()) {
        tracing::info!(instance = %subscriber.id, suppressed = line.suppressed, "sidecar connected");
    }
    let ended = tokio::select! {
        status = talk(&control, &certificate, &subscriber, &mut requests, &updates) => status,
        status = end => Some(status),
        status = replaced(&subscriber) => Some(status),
    };
    control.publisher.disconnect(&subscriber);
    // A stream that another one has replaced is nobody who went.
    if !control.publisher.is_connected(&subscriber.id) {
        control.recent.note(Event::SidecarGone, subscriber.id.to_string(), SystemTime::now());
    }
    if let Some(line) = control.lines.admit(("disconnected", account()), Instant::now()) {
        tracing::info!(instance = %subscriber.id, suppressed = line.suppressed, "sidecar disconnected");
    }
    if let Some(status) = ended {
        let _ = updates.try_send(Err(status));
    }
}

fn greet(
    control: &Control,
    certificate: &PeerCertificate,
    place: &Place,
    hello: Hello,
) -> Result<Arc<Subscriber>, Status> {
    let id = instance_of(certificate, &hello.workload)?;
    let (holder, _) = control.holder(certificate, &hello.process);
    let version = PeerText(&hello.version).to_string();
    let (number, subscribed, now) = (control.next_stream(), place.subscriptions.clone(), SystemTime::now());
    Ok(Arc::new(Subscriber::new(number, id, holder, subscribed, version, now, certificate.not_after)))
}

async fn replaced(subscriber: &Subscriber) -> Status {
    subscriber.replaced.notified().await;
    tokio::time::sleep(REPLACED).await;
    Status::aborted("a newer stream of this sidecar has taken the place of this one")
}

/// Both directions until one ends. None: the sidecar left.
async fn talk(
    control: &Control,
    certificate: &PeerCertificate,
    subscriber: &Arc<Subscriber>,
    requests: &mut Streaming<WatchRequest>,
    updates: &mpsc::Sender<Result<WatchResponse, Status>>,
) -> Option<Status> {
    loop {
        let room = async {
            while !subscriber.has_waiting() {
                subscriber.wake.notified().await;
            }
            updates.reserve().await
        };
        tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    if let Err(status) = take(control, certificate, subscriber, request) {
                        return Some(status);
                    }
                }
                Ok(None) | Err(_) => return None,
            },
            room = room => {
                let Ok(room) = room else { return None };
                let message = subscriber.take().and_then(|topic| control.publisher.message(&topic, &subscriber.id.namespace));
                if let Some(message) = message {
                    room.send(Ok(WatchResponse::clone(&message)));
                }
            }
        }
    }
}

fn take(
    control: &Control,
    certificate: &PeerCertificate,
    subscriber: &Arc<Subscriber>,
    request: WatchRequest,
) -> Result<(), Status> {
    match request.kind {
        None => Err(Status::invalid_argument("a message that this control plane does not know")),
        Some(watch_request::Kind::Hello(_)) => Err(Status::invalid_argument("hello comes once, first")),
        Some(watch_request::Kind::Subscribe(key)) => {
            let (topic, _) = topic(&key, &subscriber.id)?;
            if subscriber.subscribed() >= MAX_SUBSCRIPTIONS {
                let message = format!("more than {MAX_SUBSCRIPTIONS} subscriptions; unsubscribe what is not used");
                return Err(Status::resource_exhausted(message));
            }
            let granted = match topic {
                Topic::Own(_) => control.holder(certificate, "").1.labels,
                Topic::Destination(_) => Labels::new(),
            };
            let subscribed = control.publisher.subscribe(subscriber, &topic, &granted);
            subscribed.map_err(|error| Status::resource_exhausted(error.to_string()))
        }
        Some(watch_request::Kind::Unsubscribe(key)) => {
            let (topic, _) = topic(&key, &subscriber.id)?;
            control.publisher.unsubscribe(subscriber, &topic);
            Ok(())
        }
        Some(watch_request::Kind::Ack(Ack { key, version, refusal })) => {
            let (topic, text) = topic(&key.unwrap_or_default(), &subscriber.id)?;
            if subscriber.answered(&topic, text.clone(), version, &refusal) {
                control.metrics.refusals.inc();
                if let Some(line) = control.line("update_refused") {
                    let (refusal, suppressed) = (PeerText(&refusal), line.suppressed);
                    tracing::warn!(instance = %subscriber.id, key = text, version, suppressed, "update refused: {refusal}");
                }
            }
            Ok(())
        }
    }
}

fn topic(key: &ResourceKey, id: &InstanceId) -> Result<(Topic, String), Status> {
    let key = Key::try_from(key).map_err(|error| Status::invalid_argument(PeerText(&error.to_string()).to_string()))?;
    let text = key.to_string();
    let topic = if key == Key::Own { Topic::Own(id.clone()) } else { Topic::Destination(key) };
    Ok((topic, text))
}
