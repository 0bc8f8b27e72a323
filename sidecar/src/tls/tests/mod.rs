//! Handshakes over an in-memory pipe: who gets in, who does not, and what resumption carries over. What several of these
//! files need stands here: identities, one connection between two sidecars, and a peer that believes any certificate.

mod attacks;
mod credentials;
mod first_bytes;
mod mutual;
mod sessions;

use std::net::SocketAddr;
use std::time::Duration;

use outrigger_api::identity::SpiffeId;
use outrigger_api::name::ServiceName;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::test_authority::{Authority, LeafSpec};
use super::*;
use crate::outcome::Reason;

const ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15006);

fn tls(credential: Credential) -> Tls {
    let tls = Tls::new(Clock::system());
    tls.install(credential).unwrap();
    tls
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://outrigger.local/ns/shop/sa/{account}")).unwrap()
}

fn name() -> ServerName<'static> {
    sni(&ServicePort { service: ServiceName::new("cart", "shop").unwrap(), port: 80 })
}

/// Both sides of one connection; the client writes a byte so that the server's verdict on it is seen.
async fn pair(
    server: &Tls,
    client: &Tls,
    alpn: MeshAlpn,
    expected: &SpiffeId,
) -> (Result<Peer, TlsError>, Result<Peer, TlsError>) {
    let (near, far) = duplex(64 * 1024);
    let (server, client) = (server.current().unwrap(), client.current().unwrap());
    let serving = async {
        let (mut stream, peer) = accept(&server, far).await?;
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte).await;
        let _ = stream.write_all(b"!").await;
        Ok(peer)
    };
    let connecting = async {
        let (mut stream, peer) = connect(&client, near, alpn, name(), expected, ENDPOINT).await?;
        let mut byte = [0];
        stream.write_all(b"?").await.map_err(TlsError::from_io)?;
        stream.read_exact(&mut byte).await.map_err(TlsError::from_io)?;
        Ok(peer)
    };
    tokio::join!(serving, connecting)
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
