//! The control plane through its own doors: gRPC over TLS, the admin port, and the process.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where something unexpected happens"
)]

mod mesh;
mod process;
mod strangers;
mod support;
