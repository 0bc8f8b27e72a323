//! The `outrigger` command line, and what it runs. See ARCHITECTURE.md.

pub mod bench;
pub mod demo;
pub mod validate;
