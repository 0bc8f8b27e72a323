//! The data plane: one process beside a service. See ARCHITECTURE.md for the walk and the arrows between modules.

pub mod admin;
pub mod app;
pub mod balance;
pub mod config;
pub mod connect;
pub mod connection;
pub mod discovery;
pub mod identity;
pub mod inbound;
pub mod key_sets;
pub mod net;
pub mod outbound;
pub mod outcome;
pub mod policy;
pub mod protocol;
pub mod redirect;
pub mod resolver;
pub mod telemetry;
pub mod tls;
