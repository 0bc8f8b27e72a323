//! What surrounds both binaries: settings, stdout, signals, drain, logging, admin HTTP and facts of the process.
//! Nothing here knows what a sidecar or a control plane is for.

pub mod logging;
pub mod settings;
pub mod stdout;
