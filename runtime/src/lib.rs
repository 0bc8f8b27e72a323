//! What surrounds both binaries: settings, stdout, signals, drain, logging, admin HTTP and facts of the process.
//! Nothing here knows what a sidecar or a control plane is for.

pub mod admin;
pub mod config_dir;
pub mod drain;
pub mod heartbeat;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod open_files;
pub mod ownership;
pub mod places;
pub mod process_metrics;
pub mod settings;
pub mod signals;
pub mod stdout;
