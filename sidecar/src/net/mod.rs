//! Sockets: listeners and dials with the options that every socket of the mesh has, where a redirected connection was
//! meant to go, and [`Stream`], the one byte-stream type of the walk.

mod cut;
mod kept_source;
mod liveness;
mod original_dst;
mod receive;
mod socket;
mod stream;

pub use cut::Cut;
pub use kept_source::{KEPT_SOURCE_MARK, answers_come_back, check_kept_source, connect_from};
pub use liveness::give_up_silent_peers;
pub use original_dst::OriginalDst;
pub use socket::{
    SocketOptions, bind_udp, check_mark, connect, connect_marked, is_absent, is_local, is_taken, listen, source_towards,
};
pub use stream::Stream;
