//! `outrigger-sidecar redirect`: the packet filter's rules that bring an application's connections to the sidecar, and
//! the check that they do. Texts are made by pure functions; nothing here is on the walk but [`is_probe`].

mod probe;

pub use probe::{PROBE_PORT, PROBE_V4, PROBE_V6, answer, is_probe};
