//! Everything that handshakes share, built once per credential or bundle change and then only read: the crypto
//! provider, the server's config with its ticket key, the clients' configs with their sessions.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use outrigger_api::identity::SpiffeId;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite};

use super::MeshAlpn;
use super::chains::Chains;
use super::clock::Clock;
use super::credential::{Bundle, Credential};
use super::error::TlsError;
use super::session::EndpointConfigs;
use super::ticket::Ticketer;
use super::verifier::{AnyMember, ExpectedServer};

/// A ticket lives no longer than this, and no longer than a quarter of the leaf.
const MAX_TICKET_LIFE: Duration = Duration::from_secs(3600);

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        kx_groups: vec![kx_group::X25519MLKEM768 as &dyn SupportedKxGroup, kx_group::X25519],
        cipher_suites: cipher_suites(aes_in_hardware()),
        ..default_provider()
    })
});

/// The one provider of this process: TLS 1.3 suites, post-quantum key exchange first.
pub fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}

fn cipher_suites(aes_in_hardware: bool) -> Vec<SupportedCipherSuite> {
    let mut suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
    let chacha_at = if aes_in_hardware { suites.len() } else { 0 };
    suites.insert(chacha_at, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    suites
}

fn aes_in_hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// What one generation of handshakes uses. Never changes; [`super::Tls`] swaps the whole.
pub struct Material {
    credential: Credential,
    server: Arc<ServerConfig>,
    clients: EndpointConfigs,
    in_force: Arc<InForce>,
    number: u64,
    clock: Clock,
}

/// What is in force for every handshake and every open connection, whichever Material made it.
#[derive(Default)]
pub(super) struct InForce {
    /// May be later than that of a Material which is still in use.
    pub(super) bundle: ArcSwap<Option<Bundle>>,
    /// How many sets of roots there were so far.
    pub(super) bundles: AtomicU64,
    /// How many Materials there were so far.
    pub(super) materials: AtomicU64,
    pub(super) chains: Chains,
}

impl Material {
    pub(super) fn new(credential: Credential, in_force: Arc<InForce>, clock: Clock) -> Result<Material, TlsError> {
        let server = Arc::new(server_config(&credential, &clock)?);
        let clients = EndpointConfigs::new(client_template(&credential, &clock)?, credential.bundle().clone());
        let number = in_force.materials.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Material { credential, server, clients, in_force, number, clock })
    }

    /// Which one it is: each has a higher number than those before it.
    pub fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn in_force(&self) -> &InForce {
        &self.in_force
    }

    pub fn credential(&self) -> &Credential {
        &self.credential
    }

    pub(super) fn server(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    pub(super) fn client(&self, endpoint: SocketAddr, alpn: MeshAlpn, expected: &SpiffeId) -> Arc<ClientConfig> {
        self.clients.get(endpoint, alpn, expected)
    }

    /// The bundle in force, when it is not the one that this Material's handshakes verify with.
    pub(super) fn later_bundle(&self) -> Option<Bundle> {
        let in_force = self.in_force.bundle.load();
        (**in_force).clone().filter(|bundle| bundle.generation() != self.credential.bundle().generation())
    }

    pub(super) fn now(&self) -> SystemTime {
        self.clock.now()
    }
}

/// An hour at most; a leaf of 20 s gets tickets of 5 s.
pub(super) fn ticket_life(leaf: Duration) -> Duration {
    MAX_TICKET_LIFE.min(leaf / 4)
}

fn server_config(credential: &Credential, clock: &Clock) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_details(Arc::clone(provider()), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Material)?
        .with_client_cert_verifier(Arc::new(AnyMember::new(credential.bundle().clone())))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(credential.certified()))));
    config.alpn_protocols = MeshAlpn::ALL.map(|alpn| alpn.id().to_vec()).to_vec();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_half_rtt_data = false;
    config.max_early_data_size = 0;
    // One ticket replaces the one that a resuming client used up; more would be sealed and sent for nothing.
    config.send_tls13_tickets = 1;
    let life = ticket_life(credential.lifetime());
    match Ticketer::new(credential.bundle().generation(), life, clock.clone()) {
        Some(ticketer) if !life.is_zero() => config.ticketer = Arc::new(ticketer),
        _ => config.send_tls13_tickets = 0,
    }
    Ok(config)
}

/// Everything but the protocol, the expected identity and the sessions, which are each endpoint's own.
fn client_template(credential: &Credential, clock: &Clock) -> Result<ClientConfig, TlsError> {
    let nobody = ExpectedServer::new(credential.bundle().clone(), credential.identity().clone());
    let config = ClientConfig::builder_with_details(Arc::clone(provider()), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Material)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(nobody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(credential.certified()))));
    Ok(config)
}
