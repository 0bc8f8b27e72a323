//! The `outrigger` command line, and what it runs. See ARCHITECTURE.md.

pub mod bench;
pub mod command;
mod convert;
pub mod demo;
mod explain;
mod fetch;
mod policy_report;
mod policy_test;
mod stat;
mod status;
mod table;
mod token;
pub mod validate;
