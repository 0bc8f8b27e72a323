//! The data plane: one process beside a service. See ARCHITECTURE.md for the walk and the arrows between modules.

pub mod outcome;
pub mod telemetry;
