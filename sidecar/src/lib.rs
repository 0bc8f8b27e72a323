//! The data plane: one process beside a service. See ARCHITECTURE.md for the walk and the arrows between modules.

pub mod balance;
pub mod discovery;
pub mod identity;
pub mod outcome;
pub mod tls;
