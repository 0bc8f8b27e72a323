//! Decisions: pure functions from what is in force and the facts of a connection or request to a verdict, with a trace
//! of why. The data path calls them, and so do `explain`, offline tests and Shadow: nobody has a second opinion. Nothing
//! here knows a clock, a socket or a lock, or how the objects looked that the user wrote (`resource`).

pub mod authorization;
pub mod jwt;
pub mod mtls;
pub mod pattern;
pub mod rate_limit;
pub mod request_match;
pub mod trace;
