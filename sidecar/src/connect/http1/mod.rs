//! HTTP/1.1 as bytes (RFC 9112), for both sides of the proxy: heads, bodies, and the buffered connection below them.
//! Strict wherever two readers could disagree on where a message ends; what is refused is never passed on. The lanes
//! speak it to upstreams, `protocol::http` to downstreams. Policy and records are not known here.

pub mod body;
pub mod conn;
pub mod downstream;
pub mod head;
pub mod turn;

pub use body::{Decoder, Length};
pub use conn::Conn;
pub use downstream::{Downstream, Incoming, Presence};
pub use head::Spelling;

/// Why a message could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The peer closed in the middle.
    #[error("the message ended before it was complete")]
    Truncated,
    /// What the peer sent is no HTTP/1.1.
    #[error("{0}")]
    Malformed(&'static str),
}
