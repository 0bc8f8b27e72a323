//! HTTP/1 and HTTP/2: heads are checked and cleaned, bodies stream through, trailers and interim answers pass.

mod answer;
pub mod body;
mod date;
mod downstream_io;
pub mod exchange;
pub mod flood;
pub mod head;
pub mod headers;
mod http1;
mod http2;
mod interim;
pub mod serve;
mod tunnel;
