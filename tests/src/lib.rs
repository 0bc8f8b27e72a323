//! The harness: a mesh in one process with real sockets, real certificates and a real control plane, and what tests
//! need around it. One promise per file stands in `tests/`. Everything listens on port 0; what a test waits for it polls
//! with a deadline.

pub mod application;
pub mod arrows;
pub mod claim;
pub mod collector;
pub mod counted;
pub mod dns;
pub mod eventually;
pub mod grpc;
pub mod issuer;
pub mod mesh;
pub mod metrics;
pub mod namespace;
pub mod pair;
pub mod peer;
pub mod pods;
pub mod process;
pub mod raw_tcp;
pub mod routes;
pub mod sidecar;
pub mod stand_in;
pub mod transparent;
pub mod wire;

pub use application::Application;
pub use collector::Collector;
pub use eventually::{PATIENCE, eventually};
pub use mesh::{Mesh, MeshOptions};
pub use namespace::{Namespace, Network};
pub use pair::Pair;
pub use peer::Peer;
pub use sidecar::Sidecar;
pub use wire::{Connection, End, Response};
