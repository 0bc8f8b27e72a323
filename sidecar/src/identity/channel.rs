//! A gRPC channel to the control plane: TCP, TLS with the control plane's one identity expected, HTTP/2 with
//! keepalive. One channel is one connection; whoever holds it dials anew when it is gone, so that each connection
//! uses the certificate and the addresses of its day.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use outrigger_api::identity::SpiffeId;
use outrigger_api::peer_text::PeerText;
use outrigger_api::wire::{CONTROL_PLANE_ALPN, LATE_RENEWAL_LABEL};
use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::net;
use crate::tls::{Bundle, Clock, Credential, ExpectedServer, TlsError, provider};

const CONNECT: Duration = Duration::from_secs(5);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A control plane that vanished without a word is noticed after both: 20 s.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(10);

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("{address} cannot be resolved: {error}")]
    Resolve { address: String, error: io::Error },
    #[error("no connection to {address}: {error}")]
    Connect { address: String, error: io::Error },
    #[error("no TLS with {address}: {error}")]
    Tls { address: String, error: TlsError },
    #[error("{address} does not speak HTTP/2: {message}")]
    Http2 { address: String, message: String },
}

/// What the control plane answered, for people. A status that has a cause was made on this side: the connection broke, and
/// what HTTP/2 calls that says nothing to anybody.
pub fn answered(status: &tonic::Status) -> String {
    if std::error::Error::source(status).is_some() {
        return "the control plane closed the connection".to_owned();
    }
    format!("the control plane refused: {:?}: {}", status.code(), PeerText(status.message()))
}

/// A channel and what its connection died of.
pub struct Dialled {
    pub channel: Channel,
    /// The address of this end: where peers reach this workload, unless it was told otherwise.
    pub local: Option<IpAddr>,
    /// What both ends of the connection export for the proof of a late renewal.
    pub exported: [u8; 32],
    alert: Arc<OnceLock<AlertDescription>>,
}

impl Dialled {
    /// The TLS alert with which the control plane ended the connection: it does not take our certificate.
    pub fn alert(&self) -> Option<AlertDescription> {
        self.alert.get().copied()
    }
}

/// Dials `host:port`. `roots` decide whether the control plane is believed; with a credential the channel is mutual
/// TLS, without one the server alone is proved. `mark` keeps the connection out of the sidecar's own redirect rules.
pub async fn dial(
    address: &str,
    mark: Option<u32>,
    roots: &Bundle,
    credential: Option<&Credential>,
    clock: &Clock,
) -> Result<Dialled, DialError> {
    let tcp = connect(address, mark).await?;
    let local = tcp.local_addr().ok().map(|local| local.ip());
    let tls = handshake(address, tcp, roots, credential, clock).await?;
    let exported = tls.get_ref().1.export_keying_material([0; 32], LATE_RENEWAL_LABEL, Some(&[]));
    let exported =
        exported.map_err(|error| DialError::Tls { address: address.to_owned(), error: TlsError::Material(error) })?;
    let failed = |error: tonic::transport::Error| {
        let message = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        DialError::Http2 { address: address.to_owned(), message }
    };
    // The authority only fills a header: the connector hands over the connection that is there already, once.
    let endpoint = Endpoint::from_static("http://control-plane")
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .keep_alive_while_idle(true)
        .connect_timeout(HANDSHAKE);
    let alert = Arc::default();
    let mut connection = Some(TokioIo::new(Alerted { stream: tls, alert: Arc::clone(&alert) }));
    let connector = service_fn(move |_| {
        let connection = connection.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { connection }
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(failed)?;
    Ok(Dialled { channel, local, exported, alert })
}

async fn connect(address: &str, mark: Option<u32>) -> Result<TcpStream, DialError> {
    let owned = || address.to_owned();
    let late = || io::Error::new(io::ErrorKind::TimedOut, "it did not answer in time");
    let addresses: Vec<_> = match timeout(CONNECT, lookup_host(address)).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => return Err(DialError::Resolve { address: owned(), error }),
        Err(_) => return Err(DialError::Resolve { address: owned(), error: late() }),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for each in addresses {
        match timeout(CONNECT, net::connect_marked(each, mark)).await {
            Ok(Ok(stream)) => {
                // Without it each small message may wait for an acknowledgement.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = late(),
        }
    }
    Err(DialError::Connect { address: owned(), error: last })
}

async fn handshake(
    address: &str,
    tcp: TcpStream,
    roots: &Bundle,
    credential: Option<&Credential>,
    clock: &Clock,
) -> Result<TlsStream<TcpStream>, DialError> {
    let failed = |error| DialError::Tls { address: address.to_owned(), error };
    let config = client_config(roots, credential, clock).map_err(failed)?;
    let connecting = TlsConnector::from(Arc::new(config)).connect(server_name(address), tcp);
    let stream = match timeout(HANDSHAKE, connecting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failed(TlsError::from_io(error))),
        Err(_) => return Err(failed(TlsError::Timeout(HANDSHAKE))),
    };
    if stream.get_ref().1.alpn_protocol() != Some(CONTROL_PLANE_ALPN) {
        let message = "it did not agree on the protocol h2".to_owned();
        return Err(DialError::Http2 { address: address.to_owned(), message });
    }
    Ok(stream)
}

fn client_config(roots: &Bundle, credential: Option<&Credential>, clock: &Clock) -> Result<ClientConfig, TlsError> {
    let control_plane = SpiffeId::control_plane(roots.trust_domain());
    let config = ClientConfig::builder_with_details(Arc::clone(provider()), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Material)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedServer::new(roots.clone(), control_plane)));
    let mut config = match credential {
        Some(own) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own.certified())))),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![CONTROL_PLANE_ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The host part as SNI, for a load balancer in between. It plays no part in whom we believe.
fn server_name(address: &str) -> ServerName<'static> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let nameless = ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into());
    ServerName::try_from(host.to_owned()).unwrap_or(nameless)
}

/// The connection under a channel, which remembers the alert with which the control plane ended it. A server that
/// refuses our certificate says so only after our handshake is done, and HTTP/2 keeps no more of that than "broken".
struct Alerted {
    stream: TlsStream<TcpStream>,
    alert: Arc<OnceLock<AlertDescription>>,
}

impl AsyncRead for Alerted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &read
            && let Some(rustls::Error::AlertReceived(alert)) = error.get_ref().and_then(|inner| inner.downcast_ref())
        {
            let _ = self.alert.set(*alert);
        }
        read
    }
}

impl AsyncWrite for Alerted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
