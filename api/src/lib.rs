//! The words that both sides of the mesh share: names, identities, resource kinds, the snapshot of what is
//! known, and the wire. Everything here but [`wire`] is pure: no clock, no I/O, no async.

pub mod compile;
pub mod explain;
pub mod expression;
pub mod facts;
pub mod identity;
pub mod name;
pub mod path;
pub mod peer_text;
pub mod policy;
pub mod resource;
pub mod route;
pub mod snapshot;
pub mod virtual_address;
pub mod wire;
