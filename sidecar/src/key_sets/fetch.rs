//! One fetch of one key set. The server is not believed: the address that is dialled is the one that was checked, no
//! redirect is followed, and time and size are bounded. Nothing of it comes from a token.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use outrigger_api::policy::jwt::{KeySet, KeySetUrl};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::net;

/// Where systems keep the roots that they trust.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Why there is no new key set, for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("no answer within {0:?}")]
    Slow(Duration),
    #[error("the host's name cannot be resolved: {0}")]
    Name(io::Error),
    #[error("the host resolves to {0}, which is {1}")]
    Forbidden(IpAddr, &'static str),
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("the roots in {0} cannot be read; name a PEM file with --jwks-roots")]
    Roots(String),
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the server redirects ({0}), which is not followed: write the address of the key set itself")]
    Redirect(StatusCode),
    #[error("the server answers {0}")]
    Status(StatusCode),
    #[error("the answer is larger than {0} bytes")]
    Large(usize),
    #[error("the answer broke off: {0}")]
    Body(String),
    #[error("{0}")]
    Content(String),
}

pub(super) struct Fetcher {
    mark: Option<u32>,
    roots: Option<PathBuf>,
    most_bytes: usize,
}

impl Fetcher {
    pub(super) fn new(mark: Option<u32>, roots: Option<PathBuf>, most_bytes: usize) -> Fetcher {
        Fetcher { mark, roots, most_bytes }
    }

    pub(super) async fn fetch(&self, url: &KeySetUrl, timeout: Duration) -> Result<KeySet, Failure> {
        let bytes = tokio::time::timeout(timeout, self.get(url)).await.map_err(|_| Failure::Slow(timeout))??;
        let text = String::from_utf8(bytes).map_err(|_| Failure::Content("the key set is no UTF-8".to_owned()))?;
        let set = KeySet::parse(&text).map_err(Failure::Content)?;
        if !set.unusable().is_empty() {
            tracing::info!(%url, keys = set.unusable().join("; "), "keys of the set are not used");
        }
        Ok(set)
    }

    async fn get(&self, url: &KeySetUrl) -> Result<Vec<u8>, Failure> {
        let stream = self.connect(url).await?;
        if !url.https {
            return self.ask(url, stream).await;
        }
        let name = ServerName::try_from(url.host.clone()).map_err(|error| Failure::Tls(io::Error::other(error)))?;
        // Read anew each time, which is seldom: roots are renewed too.
        let config = self.tls().await?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(Failure::Tls)?;
        self.ask(url, stream).await
    }

    async fn connect(&self, url: &KeySetUrl) -> Result<TcpStream, Failure> {
        let addresses = tokio::net::lookup_host((url.host.as_str(), url.port)).await.map_err(Failure::Name)?;
        let mut failure = Failure::Name(io::Error::from(io::ErrorKind::NotFound));
        for address in addresses {
            if let Some(why) = url.forbids(address.ip()) {
                failure = Failure::Forbidden(address.ip(), why);
                continue;
            }
            match net::connect_marked(address, self.mark).await {
                Ok(stream) => return checked(url, stream),
                Err(error) => failure = Failure::Connect(error),
            }
        }
        Err(failure)
    }

    async fn ask<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        url: &KeySetUrl,
        stream: S,
    ) -> Result<Vec<u8>, Failure> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get(url.path.as_str())
            .header(header::HOST, url.authority())
            .header(header::ACCEPT, "application/jwk-set+json, application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| Failure::Content(error.to_string()))?;
        let answer = async {
            let answer = sender.send_request(request).await?;
            match answer.status() {
                StatusCode::OK => {}
                status if status.is_redirection() => return Err(Failure::Redirect(status)),
                status => return Err(Failure::Status(status)),
            }
            let body = Limited::new(answer.into_body(), self.most_bytes).collect().await;
            match body {
                Ok(body) => Ok(body.to_bytes().to_vec()),
                Err(error) if error.is::<LengthLimitError>() => Err(Failure::Large(self.most_bytes)),
                Err(error) => Err(Failure::Body(error.to_string())),
            }
        };
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            // It drives the connection, and may end before what it has read is taken.
            _ = connection => answer.await,
        }
    }

    async fn tls(&self) -> Result<ClientConfig, Failure> {
        let paths: Vec<PathBuf> = match &self.roots {
            Some(path) => vec![path.clone()],
            None => SYSTEM_ROOTS.iter().map(PathBuf::from).collect(),
        };
        let shown = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let read = tokio::task::spawn_blocking({
            let paths = paths.clone();
            move || paths.iter().find_map(|path| std::fs::read(path).ok())
        });
        let pem = read.await.ok().flatten().ok_or_else(|| Failure::Roots(shown()))?;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
        if roots.is_empty() {
            return Err(Failure::Roots(shown()));
        }
        // Servers outside of the mesh may not have its key exchanges.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        let config = config.map_err(|error| Failure::Tls(io::Error::other(error)))?;
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Once more by what the kernel says.
fn checked(url: &KeySetUrl, stream: TcpStream) -> Result<TcpStream, Failure> {
    let peer: SocketAddr = stream.peer_addr().map_err(Failure::Connect)?;
    match url.forbids(peer.ip()) {
        Some(why) => Err(Failure::Forbidden(peer.ip(), why)),
        None => Ok(stream),
    }
}
