//! Mutual TLS between sidecars: what a handshake needs ([`Material`]), who may come out of it ([`Peer`]) and the one
//! place where the current certificate lives ([`Tls`]). Workers accept and connect here; `identity` installs
//! credentials; nothing here dials, listens or reads a file. Names in certificates other than the SPIFFE id are
//! never consulted.

mod chains;
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
pub use leaf::{Leaf, Purpose};
pub use material::{Material, provider};
pub use verifier::ExpectedServer;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use outrigger_api::name::ServicePort;
use rustls_pki_types::ServerName;
use tokio::sync::watch;

use credential::newer_of;
use material::InForce;

use crate::connection::Proof;

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
    /// Shared with every Material made so far, so that a handshake which began under an older bundle is checked against
    /// the one in force before its first byte.
    in_force: Arc<InForce>,
    changed: watch::Sender<Option<Arc<Material>>>,
    /// Held while a new Material is built and swapped in: installs come from two tasks.
    install: Mutex<()>,
    clock: Clock,
}

impl Tls {
    pub fn new(clock: Clock) -> Tls {
        Tls(Arc::new(Shared {
            current: ArcSwapOption::empty(),
            in_force: Arc::default(),
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
        let material = Arc::new(Material::new(credential, Arc::clone(&self.0.in_force), self.0.clock.clone())?);
        let in_force = &self.0.in_force;
        let before = in_force.bundle.swap(Arc::new(Some(bundle.clone())));
        // Counted behind the swap: a connection that is noted as verified by a count was verified by its roots, or later
        // ones.
        if before.as_ref().as_ref().is_none_or(|before| before.roots() != bundle.roots()) {
            in_force.bundles.fetch_add(1, Ordering::Release);
        }
        self.0.current.store(Some(Arc::clone(&material)));
        self.0.changed.send_replace(Some(material));
        Ok(())
    }

    /// Counts the sets of roots that were in force: open connections are judged again when it moves.
    pub fn bundles(&self) -> u64 {
        self.0.in_force.bundles.load(Ordering::Acquire)
    }

    /// Whether the roots in force still verify the chain with which a peer proved its identity. `purpose` is what the
    /// peer uses it for. Only the roots are judged: when the leaf ends is another matter.
    pub fn believes(&self, proof: &Proof, purpose: Purpose) -> bool {
        let in_force = self.0.in_force.bundle.load();
        let (Some(bundle), [leaf, intermediates @ ..]) = (&**in_force, &*proof.chain) else { return false };
        leaf::verify(leaf, intermediates, bundle, purpose, proof.verified).is_ok()
    }

    /// When the current certificate ends; None while there is none.
    pub fn expiry(&self) -> Option<SystemTime> {
        self.current().map(|material| material.credential().not_after())
    }
}

#[cfg(test)]
mod tests;
