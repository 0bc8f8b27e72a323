//! What both sides of HTTP/2 share, on top of the `h2` crate: a body that is received, the sending of one, and keeping a
//! connection alive. Who serves is `protocol/http/http2.rs`, who dials `lane/http2.rs`. A received frame's window is given
//! back when the next frame is asked for, that is when it has gone on; nothing is sent before the peer has room for it.

mod allowance;
mod batched;
pub mod heads;
mod hpack;
mod incoming;
mod keep_alive;
pub mod leaving;
mod meter;
mod sending;
mod upstream_io;
mod windows;

pub use allowance::Allowance;
pub use batched::Batched;
pub use incoming::{Broke, Incoming, check_fields};
pub use keep_alive::{Change, KeepAlive};
pub use meter::{Ledger, Meter};
pub use sending::{Sending, Stop};
pub use upstream_io::UpstreamIo;

/// How a stream is reset because of what went wrong on the other side: with that side's code, where it had one. A message
/// that breaks off is never told as NO_ERROR, which would look like an end.
pub fn reset_code(error: &h2::Error) -> h2::Reason {
    error.reason().filter(|code| *code != h2::Reason::NO_ERROR).unwrap_or(h2::Reason::INTERNAL_ERROR)
}
