//! The two handshakes and the checks behind them. rustls verifies a chain once and not again when a session is
//! resumed, so the peer's certificate is looked at after every handshake, before a byte of the application passes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::SpiffeId;
use rustls::server::Accepted;
use rustls::{CommonState, HandshakeKind};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::server::StartHandshake;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::MeshAlpn;
use super::error::{PeerFault, TlsError};
use super::leaf::{Leaf, Purpose, verify};
use super::material::Material;
use crate::connection::Proof;

/// A handshake that takes longer is given up; connects have a shorter budget of their own.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Who is at the other end, proved.
#[derive(Clone, Debug)]
pub struct Peer {
    pub identity: SpiffeId,
    /// The subject's CN: the workload's name for metrics. `unknown` when absent.
    pub workload: Arc<str>,
    /// When its certificate ends: pooled connections retire then.
    pub not_after: SystemTime,
    pub alpn: MeshAlpn,
    /// Of the bundle that it was checked against.
    pub generation: u64,
    /// The number of the Material that made the handshake: a pooled connection of an earlier one carries nothing new.
    pub material: u64,
    /// What it is judged by again when the bundle changes.
    pub proof: Proof,
    pub resumed: bool,
}

/// Serves the handshake of a sidecar that connected. `io` gives the bytes of the hello again.
pub async fn accept<IO>(material: &Arc<Material>, io: IO) -> Result<(server::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    admit(material, TlsAcceptor::from(Arc::clone(material.server())).accept(io)).await
}

/// The same with a hello that [`super::read_hello`] has read: `io` goes on behind the bytes that it was given.
pub async fn accept_hello<IO>(
    material: &Arc<Material>,
    hello: Accepted,
    io: IO,
) -> Result<(server::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    admit(material, StartHandshake::from_parts(hello, io).into_stream(Arc::clone(material.server()))).await
}

async fn admit<IO>(
    material: &Material,
    handshake: tokio_rustls::Accept<IO>,
) -> Result<(server::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    refuse_when_expired(material)?;
    let stream =
        timeout(HANDSHAKE, handshake).await.map_err(|_| TlsError::Timeout(HANDSHAKE))?.map_err(TlsError::from_io)?;
    let peer = check(material, stream.get_ref().1, Purpose::Client)?;
    Ok((stream, peer))
}

/// Opens mutual TLS to an endpoint that must prove to be `expected`. `endpoint` is where `io` leads; sessions are
/// kept by it.
pub async fn connect<IO>(
    material: &Arc<Material>,
    io: IO,
    alpn: MeshAlpn,
    sni: ServerName<'static>,
    expected: &SpiffeId,
    endpoint: SocketAddr,
) -> Result<(client::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    refuse_when_expired(material)?;
    let connector = TlsConnector::from(material.client(endpoint, alpn, expected));
    let stream = timeout(HANDSHAKE, connector.connect(sni, io))
        .await
        .map_err(|_| TlsError::Timeout(HANDSHAKE))?
        .map_err(TlsError::from_io)?;
    let peer = check(material, stream.get_ref().1, Purpose::Server)?;
    if peer.identity != *expected {
        return Err(PeerFault::Unexpected { found: peer.identity, expected: expected.clone() }.into());
    }
    if peer.alpn != alpn {
        return Err(TlsError::NotMesh);
    }
    Ok((stream, peer))
}

fn refuse_when_expired(material: &Material) -> Result<(), TlsError> {
    let not_after = material.credential().not_after();
    if material.now() > not_after { Err(TlsError::OwnExpired(not_after)) } else { Ok(()) }
}

/// What holds of every peer, resumed or not: it has a mesh protocol and a certificate that is valid now, by the
/// bundle that is in force now.
fn check(material: &Material, connection: &CommonState, purpose: Purpose) -> Result<Peer, TlsError> {
    let alpn = connection.alpn_protocol().and_then(MeshAlpn::from_id).ok_or(TlsError::NotMesh)?;
    let chain = connection.peer_certificates().unwrap_or_default();
    let [leaf, intermediates @ ..] = chain else {
        return Err(TlsError::NoCertificate);
    };
    let now = material.now();
    let bundle = material.credential().bundle();
    // Read before the bundle is: a change in between is seen as one that this connection was not judged by.
    let in_force = material.in_force();
    let bundles = in_force.bundles.load(Ordering::Acquire);
    let (facts, generation) = match material.later_bundle() {
        Some(later) => (verify(leaf, intermediates, &later, purpose, now)?, later.generation()),
        None => (Leaf::read(leaf, bundle.trust_domain())?, bundle.generation()),
    };
    facts.check_time(now)?;
    Ok(Peer {
        identity: facts.identity,
        workload: facts.workload,
        not_after: facts.not_after,
        alpn,
        generation,
        material: material.number(),
        proof: Proof { chain: in_force.chains.share(chain), verified: now, bundle: bundles },
        resumed: connection.handshake_kind() == Some(HandshakeKind::Resumed),
    })
}
