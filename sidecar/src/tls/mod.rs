//! Mutual TLS between sidecars: what a handshake needs ([`Material`]), who may come out of it ([`Peer`]) and the one
//! place where the current certificate lives ([`Tls`]). Workers accept and connect here; `identity` installs
//! credentials; nothing here dials, listens or reads a file. Names in certificates other than the SPIFFE id are
//! never consulted.

pub(crate) mod clock;
mod credential;
mod error;
mod handshake;
mod hello;
mod leaf;
mod material;
mod session;
mod ticket;
mod verifier;

#[cfg(test)]
pub(crate) mod test_authority;

pub use clock::Clock;
pub use credential::{Bundle, Credential, CredentialError};
pub use error::{PeerFault, TlsError};
pub use handshake::{Peer, accept, accept_hello, connect};
pub use hello::{Hello, no_application_protocol_alert, read_hello};
pub use leaf::Leaf;
pub use material::{Material, provider};
pub use verifier::ExpectedServer;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use outrigger_api::name::ServicePort;
use rustls_pki_types::ServerName;
use tokio::sync::watch;

use credential::newer_of;

/// What the two sidecars of a connection speak inside TLS. The id selects framing; it is never trusted for policy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MeshAlpn {
    H1,
    H2,
    Tcp,
}

impl MeshAlpn {
    pub const ALL: [MeshAlpn; 3] = [MeshAlpn::H2, MeshAlpn::H1, MeshAlpn::Tcp];

    pub fn id(self) -> &'static [u8] {
        match self {
            MeshAlpn::H1 => b"outrigger/h1",
            MeshAlpn::H2 => b"outrigger/h2",
            MeshAlpn::Tcp => b"outrigger/tcp",
        }
    }

    pub fn from_id(id: &[u8]) -> Option<MeshAlpn> {
        MeshAlpn::ALL.into_iter().find(|alpn| alpn.id() == id)
    }
}

/// The server name of a destination: `<port>.<service>.<namespace>.outrigger`. A hint for labels, never for policy.
pub fn sni(destination: &ServicePort) -> ServerName<'static> {
    let name = format!("{}.{}.{}.outrigger", destination.port, destination.service.name, destination.service.namespace);
    // Three labels of at most 63 bytes and a port always fit a DNS name; an address is what sends no SNI at all.
    ServerName::try_from(name).unwrap_or(ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into()))
}

/// The current certificate, shared by all threads. Cloning shares it.
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

struct Shared {
    /// What new handshakes use; absent until the first credential.
    current: ArcSwapOption<Material>,
    /// The bundle in force, shared with every Material made so far, so that a handshake which began under an older
    /// one is checked against this one before its first byte.
    bundle: Arc<ArcSwap<Option<Bundle>>>,
    changed: watch::Sender<Option<Arc<Material>>>,
    /// Held while a new Material is built and swapped in: installs come from two tasks.
    install: Mutex<()>,
    clock: Clock,
}

impl Tls {
    pub fn new(clock: Clock) -> Tls {
        Tls(Arc::new(Shared {
            current: ArcSwapOption::empty(),
            bundle: Arc::default(),
            changed: watch::Sender::new(None),
            install: Mutex::new(()),
            clock,
        }))
    }

    /// What new handshakes use. Wait free; hold the answer for one handshake, not longer.
    pub fn current(&self) -> Option<Arc<Material>> {
        self.0.current.load_full()
    }

    /// Sees every new credential and every new bundle.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Material>>> {
        self.0.changed.subscribe()
    }

    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Puts a credential into force for all new handshakes: new configs, new ticket key, no sessions. A bundle that is
    /// newer than the credential's and believes its chain stays in force.
    pub fn install(&self, credential: Credential) -> Result<(), TlsError> {
        let _one_at_a_time = self.0.install.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.0.clock.now();
        let credential = match self.current() {
            Some(current) => newer_of(current.credential().bundle(), credential, now),
            None => credential,
        };
        self.swap(credential)
    }

    /// Replaces the trust bundle and keeps the certificate. False when `bundle` is not newer than the one in force,
    /// or there is no credential yet; an error when it is not newer and has other roots, for then somebody went back.
    pub fn install_bundle(&self, bundle: Bundle) -> Result<bool, TlsError> {
        let _one_at_a_time = self.0.install.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = self.current() else { return Ok(false) };
        let in_force = current.credential().bundle();
        if bundle.generation() <= in_force.generation() {
            let (found, in_force_is) = (bundle.generation(), in_force.generation());
            let same = bundle.same_roots(in_force);
            return if same { Ok(false) } else { Err(TlsError::OlderBundle { found, in_force: in_force_is }) };
        }
        self.swap(current.credential().with_bundle(bundle)?)?;
        Ok(true)
    }

    fn swap(&self, credential: Credential) -> Result<(), TlsError> {
        let bundle = credential.bundle().clone();
        let material = Arc::new(Material::new(credential, Arc::clone(&self.0.bundle), self.0.clock.clone())?);
        self.0.bundle.store(Arc::new(Some(bundle)));
        self.0.current.store(Some(Arc::clone(&material)));
        self.0.changed.send_replace(Some(material));
        Ok(())
    }

    /// When the current certificate ends; None while there is none.
    pub fn expiry(&self) -> Option<SystemTime> {
        self.current().map(|material| material.credential().not_after())
    }
}

#[cfg(test)]
mod tests;
