//! The open downstream connections of one worker: what each is doing and since when, and on which facts it was let in. A
//! connection enters itself when it is accepted and leaves when it is dropped. The watchdog reads the table once per tick
//! and tells a connection to finish or to stop; `/connections` reads it from the control thread. Nothing here does I/O.

mod clock;
mod entry;
mod facts;
mod holders;
mod places;
mod state;
mod table;

use serde::Serialize;

pub use entry::{About, Entry};
pub use facts::{Arrival, Facts, Proof};
pub use places::Places;
pub use state::{Command, State};
pub use table::{IdleLimits, Registered, Table, View};

/// Seen from the service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub const fn as_str(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
    }
}

#[cfg(test)]
mod tests;
