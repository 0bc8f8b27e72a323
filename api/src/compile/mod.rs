//! From the objects that a user wrote to what is in force for one workload: selectors, precedence, contradictions. The
//! control plane calls it for what it tells a sidecar, `explain` and `test` for what they decide with. Pure.

mod authentication;
mod authorization;
mod check;
mod mtls;
mod protocol;
mod rate_limits;
mod routes;
mod rules;

pub use authentication::authentication;
pub use authorization::{Callers, authorization, authorization_among, callers, looks_at_callers};
pub use check::load;
pub use mtls::{ModeSet, mtls_modes};
pub use protocol::{called_protocol, protocol, service_protocol};
pub use rate_limits::rate_limits;
pub use routes::RouteTable;
