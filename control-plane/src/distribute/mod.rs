//! What sidecars talk to: certificates for proofs, what is known on demand, leases, and reports, over gRPC and TLS.
//! `app` starts it, `admin` reads its status. Nothing here believes a name that a certificate or a token does not prove.

mod catalog;
mod discovery;
mod identity;
mod late;
mod lease;
mod members;
mod metrics;
mod publisher;
mod recent;
mod reports;
mod server;
mod shadows;
mod streams;
mod telemetry;
mod tls;

pub use catalog::{Catalog, leaf_lifetime_seconds};
pub use metrics::Metrics;
pub use publisher::{Publisher, Refusal, SidecarStatus};
pub use recent::{Event, Noted, Recent};
pub use reports::{EdgeKey, EdgeStats, Reports, Totals};
pub use server::{Control, Lines, Server};
pub use shadows::{Caller, Seen, Shadows, Trial};
