//! The gRPC listener: accepts, does the TLS handshake within bounds, and gives each connection to tonic with its peer.
//! Those without a client certificate are strangers. Only `Identity.Issue` has an answer for them, and until then they get
//! little: few connections, few streams, 64 KiB in all.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use outrigger_api::wire::LATE_RENEWAL_LABEL;
use outrigger_api::wire::discovery_server::DiscoveryServer;
use outrigger_api::wire::identity_server::IdentityServer;
use outrigger_api::wire::registry_server::RegistryServer;
use outrigger_api::wire::telemetry_server::TelemetryServer;
use outrigger_runtime::logging::{Admitted, Throttle};
use outrigger_runtime::places::{Bounds, Eviction, Place, Places};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::members::Members;
use super::metrics::Metrics;
use super::publisher::Publisher;
use super::recent::Recent;
use super::reports::Reports;
use super::shadows::Shadows;
use super::streams::Streams;
use super::tls::{self, Peer, PeerCertificate, Standing, WorkloadVerifier};
use crate::ca::token::TokenKey;
use crate::ca::{Authority, Certified, Grant, Redemptions, ServingCertificate};
use crate::registry::Holder;

/// From accept to the first byte of the ClientHello.
const FIRST_BYTE: Duration = Duration::from_secs(3);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once: what a stranger can make us hold. With all places taken the oldest goes, so that no number of
/// half-open ones keeps an honest one waiting.
const HANDSHAKES: Bounds = Bounds { total: 2_000, per_source: 1_000 };
/// Connections without a client certificate at once.
const STRANGERS: Bounds = Bounds { total: 256, per_source: 128 };
/// Who showed no certificate can ask for one and nothing else, which does not take long.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(30);
/// A request for a certificate with its token: each at most 16 KiB, and HTTP/2 around them.
const STRANGER_BYTES: usize = 64 * 1024;
const STRANGER_STREAMS: u32 = 4;
/// A connection whose certificate has ended may finish what it does.
const ENDED_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the certificate of an open stream is judged again.
const JUDGED_EVERY: Duration = Duration::from_secs(2);
/// Of what a process calls itself.
const MAX_PROCESS: usize = 64;
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// The largest that is honest is a registration of a thousand ports, or a certificate request with its token.
const MAX_REQUEST: usize = 64 * 1024;
/// A report of some hundred edges has a tenth of it.
const MAX_REPORT: usize = 256 * 1024;
const MAX_RESPONSE: usize = 16 * 1024 * 1024;
/// A sidecar has a Watch, a lease, a report and now and then a renewal.
const MAX_STREAMS: u32 = 16;
const MAX_HEADER_LIST: u32 = 64 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// With the interval it bounds how long a peer that vanished still counts as connected.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the four services share.
pub struct Control {
    pub authority: Arc<Authority>,
    pub tokens: TokenKey,
    pub redemptions: Redemptions,
    pub publisher: Arc<Publisher>,
    pub reports: Reports,
    pub shadows: Shadows,
    pub metrics: Arc<Metrics>,
    /// For log lines that a peer can cause as often as it likes.
    pub lines: Lines,
    pub recent: Recent,
    pub open_streams: Arc<Streams>,
    /// The number of the next stream, of whatever service.
    pub streams: AtomicU64,
    /// True: every stream ends.
    pub stop: watch::Receiver<bool>,
}

/// What a log line says, and, where that is what it is about, which service account: one of each per second.
pub type Lines = Throttle<(&'static str, Option<String>)>;

impl Control {
    /// Whether a line about `what` may be written now.
    pub fn line(&self, what: &'static str) -> Option<Admitted> {
        self.lines.admit((what, None), Instant::now())
    }

    /// Which sidecar speaks with this certificate, and what it may register.
    pub(super) fn holder(&self, certificate: &PeerCertificate, process: &str) -> (Holder, Grant) {
        let subject = certificate.subject();
        self.redemptions.saw(&subject);
        // Of a certificate that is not on record the key alone is known.
        let known = self.redemptions.certified(&subject);
        let Certified { grant, lineage } =
            known.unwrap_or_else(|| Certified { grant: Grant::default(), lineage: subject.key });
        (Holder { lineage, process: process.chars().take(MAX_PROCESS).collect() }, grant)
    }

    /// What was redeemed for the sidecar that has this certificate.
    fn lineage(&self, certificate: &PeerCertificate) -> String {
        let subject = certificate.subject();
        self.redemptions.certified(&subject).map_or(subject.key, |known| known.lineage)
    }

    pub fn next_stream(&self) -> u64 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }

    /// Resolves when a stream must end: the control plane stops, or the certificate with which the peer connected is
    /// over or no longer believed (it comes back with its new one).
    pub(super) async fn until_end(&self, peer: &Peer) -> tonic::Status {
        let mut stop = self.stop.clone();
        let judged = async {
            loop {
                let now = SystemTime::now();
                if let Err(status) = peer.check(now) {
                    return status;
                }
                let end = peer.certificate.as_ref().map(|certificate| certificate.not_after);
                let left = end.map_or(JUDGED_EVERY, |end| end.duration_since(now).unwrap_or_default());
                // Cut up, because the clock may be set and the bundle may change.
                sleep(left.min(JUDGED_EVERY)).await;
            }
        };
        tokio::select! {
            status = judged => status,
            _ = stop.wait_for(|stop| *stop) => tonic::Status::unavailable("the control plane is stopping"),
        }
    }
}

/// A listener that serves until `stop` says so.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    verifier: Arc<WorkloadVerifier>,
    control: Arc<Control>,
}

impl Server {
    pub fn new(
        listener: TcpListener,
        serving: Arc<ServingCertificate>,
        control: Arc<Control>,
    ) -> Result<Server, rustls::Error> {
        let verifier = tls::verifier(control.authority.clone());
        let config = tls::server_config(verifier.clone(), serving)?;
        Ok(Server { listener, acceptor: TlsAcceptor::from(Arc::new(config)), verifier, control })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Ends when the control plane stops and every stream has ended.
    pub async fn serve(self) -> Result<(), tonic::transport::Error> {
        let (member, members) = mpsc::channel(16);
        let (stranger, strangers) = mpsc::channel(16);
        let control = self.control.clone();
        let handshakes = Handshakes {
            acceptor: self.acceptor,
            verifier: self.verifier,
            control: control.clone(),
            strangers: Places::new(STRANGERS),
            members: Arc::default(),
            member,
            stranger,
        };
        let accepting = accept(self.listener, handshakes);
        let (members, strangers, ()) =
            tokio::join!(serve(&control, MEMBER, members), serve(&control, STRANGER, strangers), accepting);
        members.and(strangers)
    }
}

/// What HTTP/2 grants a connection.
#[derive(Clone, Copy)]
struct Grants {
    streams: u32,
    header_list: u32,
    stream_window: u32,
    connection_window: u32,
}

const MEMBER: Grants = Grants {
    streams: MAX_STREAMS,
    header_list: MAX_HEADER_LIST,
    stream_window: 64 * 1024,
    connection_window: 256 * 1024,
};
const STRANGER: Grants = Grants {
    streams: STRANGER_STREAMS,
    header_list: 16 * 1024,
    // HTTP/2 begins with this and cannot take it back before the peer has read our settings.
    stream_window: 64 * 1024 - 1,
    connection_window: 64 * 1024 - 1,
};

async fn serve(
    control: &Arc<Control>,
    grants: Grants,
    connections: mpsc::Receiver<io::Result<Connection>>,
) -> Result<(), tonic::transport::Error> {
    let mut stop = control.stop.clone();
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let shared = || Shared(control.clone());
    tonic::transport::Server::builder()
        .max_concurrent_streams(grants.streams)
        .http2_max_header_list_size(grants.header_list)
        .http2_max_pending_accept_reset_streams(Some(20))
        .http2_max_local_error_reset_streams(Some(100))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(grants.stream_window)
        .initial_connection_window_size(grants.connection_window)
        .add_service(IdentityServer::new(shared()).max_decoding_message_size(MAX_REQUEST))
        .add_service(
            DiscoveryServer::new(shared())
                .max_decoding_message_size(MAX_REQUEST)
                .max_encoding_message_size(MAX_RESPONSE),
        )
        .add_service(RegistryServer::new(shared()).max_decoding_message_size(MAX_REQUEST))
        .add_service(TelemetryServer::new(shared()).max_decoding_message_size(MAX_REPORT))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopped)
        .await
}

/// The services' hold on what they share.
#[derive(Clone)]
pub(super) struct Shared(pub(super) Arc<Control>);

/// What every handshake needs, and where its connection goes.
#[derive(Clone)]
struct Handshakes {
    acceptor: TlsAcceptor,
    verifier: Arc<WorkloadVerifier>,
    control: Arc<Control>,
    strangers: Places,
    members: Arc<Members>,
    member: mpsc::Sender<io::Result<Connection>>,
    stranger: mpsc::Sender<io::Result<Connection>>,
}

async fn accept(listener: TcpListener, handshakes: Handshakes) {
    let places = Places::new(HANDSHAKES);
    let mut stop = handshakes.control.stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Also when whoever could say so is gone.
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, address)) => {
                let place = places.take(address.ip());
                tokio::spawn(handshakes.clone().take(stream, address, place));
            }
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would only burn the CPU.
                if let Some(line) = handshakes.control.line("accept") {
                    tracing::warn!(suppressed = line.suppressed, "cannot accept a connection: {error}");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

impl Handshakes {
    /// The life of a connection until tonic has it.
    async fn take(self, stream: TcpStream, address: SocketAddr, place: Place) {
        let handshake = tokio::select! {
            handshake = timeout(HANDSHAKE_TIMEOUT, self.handshake(stream, address)) => handshake,
            () = place.eviction() => {
                self.control.metrics.handshakes_failed.inc();
                return tracing::debug!(%address, "TLS handshake ended: too many others began");
            }
        };
        drop(place);
        match handshake {
            Ok(Ok(connection)) => {
                let to = if connection.stranger.is_some() { &self.stranger } else { &self.member };
                let _ = to.send(Ok(connection)).await;
            }
            Ok(Err(error)) => {
                self.control.metrics.handshakes_failed.inc();
                tracing::debug!(%address, "TLS handshake failed: {error}");
            }
            Err(_) => {
                self.control.metrics.handshakes_failed.inc();
                tracing::debug!(%address, "TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}");
            }
        }
    }

    async fn handshake(&self, stream: TcpStream, address: SocketAddr) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        timeout(FIRST_BYTE, stream.readable()).await??;
        let stream = self.acceptor.accept(stream).await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificate = chain
            .first()
            .map(|leaf| tls::read_certificate(leaf, self.control.authority.trust_domain()))
            .transpose()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let standing = certificate.as_ref().map(|certificate| {
            let chain = chain.iter().map(|each| each.clone().into_owned()).collect();
            Arc::new(Standing::new(chain, certificate.not_after, self.verifier.clone()))
        });
        let life = match &certificate {
            Some(certificate) => {
                certificate.not_after.duration_since(SystemTime::now()).unwrap_or_default() + ENDED_TIMEOUT
            }
            None => STRANGER_TIMEOUT,
        };
        let (mut stranger, mut member) = (None, None);
        let eviction = match &certificate {
            Some(certificate) => {
                let place = self.members.enter(&self.control.lineage(certificate), address.ip());
                let eviction = place.eviction();
                member = Some(place);
                eviction
            }
            None => {
                let place = self.strangers.take(address.ip());
                let eviction = place.eviction();
                stranger = Some(Stranger { _place: place, left: STRANGER_BYTES });
                eviction
            }
        };
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let mut exported = None;
        if certificate.is_none() {
            let bytes = stream.get_ref().1.export_keying_material([0; 32], LATE_RENEWAL_LABEL, Some(&[]));
            exported = Some(bytes.map_err(io::Error::other)?);
        }
        let peer = Peer { address, certificate, standing, member, exported };
        Ok(Connection { stream, peer, deadline: Box::pin(sleep(life)), eviction, stranger })
    }
}

/// A connection after its handshake.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When it ends whatever happens on it.
    deadline: Pin<Box<Sleep>>,
    /// Another connection got its place.
    eviction: Eviction,
    /// Somebody without a certificate.
    stranger: Option<Stranger>,
}

struct Stranger {
    _place: Place,
    /// Bytes that it may still send.
    left: usize,
}

impl Stranger {
    /// Whether it may go on after it sent so many bytes more.
    fn may_send(&mut self, bytes: usize) -> bool {
        self.left = self.left.saturating_sub(bytes);
        self.left > 0
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.deadline.as_mut().poll(cx).is_ready() || Pin::new(&mut self.eviction).poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let bytes = buf.filled().len() - before;
        if self.stranger.as_mut().is_some_and(|stranger| !stranger.may_send(bytes)) {
            let message = "more than 64 KiB from a peer without a certificate";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::QuotaExceeded, message)));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
