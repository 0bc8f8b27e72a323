//! What was decided about one inbound connection, and on which facts: policy and the trust bundle are asked again with
//! these whenever one of them changes. Typed, so that nothing is read back out of text that is made for people.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;

/// How the downstream of an inbound connection came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// Mutual TLS with a proved identity.
    Mutual,
    Plaintext,
    /// TLS of the application's own, which passes unparsed.
    ForeignTls,
    /// On a port that takes plaintext, before the client has sent enough to tell.
    Undecided,
    /// The workload itself, from within this process.
    Own,
}

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
}
