//! What the operator says: flags, the YAML directory, and the state directory in which everything durable lives.
//! Read by every other module; reads no network and decides nothing.

mod directory;
mod journal;
mod state;

pub use directory::{Configuration, Directory, Parse};
pub use journal::{Journal, JournalError};
pub use state::{State, StateError, StateLock, TRUST_DOMAIN};

use std::net::SocketAddr;
use std::path::PathBuf;

use outrigger_api::identity::TrustDomain;

/// The flags of `outrigger-control-plane`; `outrigger_runtime::settings` takes each from a variable and a file too.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Directory of YAML resources; watched while the control plane runs.
    #[arg(long, value_name = "DIR")]
    pub config: PathBuf,
    /// Directory for the certificate authority, burnt tokens and leases; made when it is absent.
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Where sidecars connect (gRPC over TLS).
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15012")]
    pub listen: SocketAddr,
    /// Metrics, health and status.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15014")]
    pub admin_listen: SocketAddr,
    /// The trust domain of every identity; MeshConfig must agree. [default: MeshConfig's, else outrigger.local]
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<TrustDomain>,
}
