//! What was decided about one inbound connection, and on which facts: policy and the trust bundle are asked again with
//! these whenever one of them changes. Typed, so that nothing is read back out of text that is made for people.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use http::request::Parts;
use outrigger_api::identity::SpiffeId;
use rustls_pki_types::CertificateDer;

pub use outrigger_api::policy::mtls::Arrival;

/// The chain with which a peer proved its identity, and when it was verified.
#[derive(Clone, Debug)]
pub struct Proof {
    /// Leaf first. Shared by all connections of that peer.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// A moment at which the chain did verify: only the roots are judged again, and an opaque connection outlives the
    /// leaf.
    pub verified: SystemTime,
    /// Which of the trust bundles that were in force it was verified against last.
    pub bundle: u64,
}

/// What is known of an inbound connection that was let in.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Where it leads; the port decides which mTLS mode is asked.
    pub application: SocketAddr,
    pub arrival: Arrival,
    pub proof: Option<Proof>,
    /// Who proved to be the caller.
    pub caller: Option<SpiffeId>,
    pub client: IpAddr,
    /// Its bytes are not parsed, so that policy is asked about the connection as a whole.
    pub opaque: bool,
    /// The server name that the application's own TLS asks for, where a rule looks at it.
    pub sni: Option<String>,
    /// Of the request by which the connection left HTTP.
    pub head: Option<Box<Parts>>,
}
