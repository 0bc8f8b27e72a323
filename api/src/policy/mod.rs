//! Policy decisions: pure functions from what is known to what is decided. The control plane calls them when it
//! builds a sidecar's snapshot; nothing here knows a clock, a socket or a lock.

mod mtls;

pub use mtls::{ModeSet, mtls_modes};
