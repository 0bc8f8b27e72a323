//! The gRPC listener: accepts, does the TLS handshake within bounds, and gives each connection to tonic with its peer.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use outrigger_api::wire::discovery_server::DiscoveryServer;
use outrigger_api::wire::identity_server::IdentityServer;
use outrigger_api::wire::registry_server::RegistryServer;
use outrigger_api::wire::telemetry_server::TelemetryServer;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::metrics::Metrics;
use super::publisher::Publisher;
use super::reports::Reports;
use super::tls::{self, Peer};
use crate::ca::token::TokenKey;
use crate::ca::{Authority, Redemptions, ServingCertificate};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once: what a stranger can make us hold.
const HANDSHAKES: usize = 2_000;
/// Who showed no certificate can ask for one and nothing else, which does not take long.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(30);
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
const MAX_REQUEST: usize = 1024 * 1024;
/// A report of some hundred edges has a tenth of it.
const MAX_REPORT: usize = 256 * 1024;
const MAX_RESPONSE: usize = 16 * 1024 * 1024;
const MAX_STREAMS: u32 = 100;
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
    pub metrics: Arc<Metrics>,
    /// The number of the next stream, of whatever service.
    pub streams: AtomicU64,
    /// True: every stream ends.
    pub stop: watch::Receiver<bool>,
}

impl Control {
    pub fn next_stream(&self) -> u64 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }

    /// Resolves when a stream must end: the control plane stops, or the certificate with which the peer connected
    /// is over (it comes back with its new one).
    pub async fn until_end(&self, not_after: SystemTime) -> tonic::Status {
        let left = not_after.duration_since(SystemTime::now()).unwrap_or_default();
        let mut stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep(left) => {
                tonic::Status::unauthenticated("the client certificate expired; connect again with the renewed one")
            }
            _ = stop.wait_for(|stop| *stop) => tonic::Status::unavailable("the control plane is stopping"),
        }
    }
}

/// A listener that serves until `stop` says so.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    control: Arc<Control>,
}

impl Server {
    pub fn new(
        listener: TcpListener,
        serving: Arc<ServingCertificate>,
        control: Arc<Control>,
    ) -> Result<Server, rustls::Error> {
        let config = tls::server_config(control.authority.clone(), serving)?;
        Ok(Server { listener, acceptor: TlsAcceptor::from(Arc::new(config)), control })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Ends when the control plane stops and every stream has ended.
    pub async fn serve(self) -> Result<(), tonic::transport::Error> {
        let (ready, connections) = mpsc::channel(16);
        let control = self.control.clone();
        let accepting = tokio::spawn(accept(self.listener, self.acceptor, control.clone(), ready));
        let mut stop = control.stop.clone();
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
            let _ = accepting.await;
        };
        let shared = || control.clone();
        tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_max_pending_accept_reset_streams(Some(20))
            .http2_max_local_error_reset_streams(Some(100))
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .add_service(IdentityServer::new(Shared(shared())).max_decoding_message_size(MAX_REQUEST))
            .add_service(
                DiscoveryServer::new(Shared(shared()))
                    .max_decoding_message_size(MAX_REQUEST)
                    .max_encoding_message_size(MAX_RESPONSE),
            )
            .add_service(RegistryServer::new(Shared(shared())).max_decoding_message_size(MAX_REQUEST))
            .add_service(TelemetryServer::new(Shared(shared())).max_decoding_message_size(MAX_REPORT))
            .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopped)
            .await
    }
}

/// The services' hold on what they share.
#[derive(Clone)]
pub(super) struct Shared(pub(super) Arc<Control>);

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    control: Arc<Control>,
    ready: mpsc::Sender<io::Result<Connection>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let mut stop = control.stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = next(&listener, &handshakes) => accepted,
            // Also when whoever could say so is gone.
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let (stream, address, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would only burn the CPU.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (acceptor, control, ready) = (acceptor.clone(), control.clone(), ready.clone());
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE_TIMEOUT, handshake(stream, address, &acceptor, &control)).await;
            drop(permit);
            match handshake {
                Ok(Ok(connection)) => {
                    let _ = ready.send(Ok(connection)).await;
                }
                Ok(Err(error)) => {
                    control.metrics.handshakes_failed.inc();
                    tracing::debug!(%address, "TLS handshake failed: {error}");
                }
                Err(_) => {
                    control.metrics.handshakes_failed.inc();
                    tracing::debug!(%address, "TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}");
                }
            }
        });
    }
}

/// The next connection, once there is room for its handshake.
async fn next(
    listener: &TcpListener,
    handshakes: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = handshakes.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((stream, address, permit))
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: &TlsAcceptor,
    control: &Control,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
    let certificate = leaf
        .map(|leaf| tls::read_certificate(leaf, control.authority.trust_domain()))
        .transpose()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let deadline = certificate.is_none().then(|| Box::pin(sleep(STRANGER_TIMEOUT)));
    Ok(Connection { stream, peer: Peer { address, certificate }, deadline })
}

/// A connection after its handshake.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When the connection of somebody without a certificate ends.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
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
