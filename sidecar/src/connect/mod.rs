//! From a destination to a connection: what one worker knows of each destination, its pools, and dialling.

pub mod backend;
pub mod dial;
pub mod lane;
mod local;
pub mod own_dials;
pub mod request_body;
pub mod speculation;
pub mod streams;
mod upstream_io;
pub mod worker;

pub use local::Local;
pub use upstream_io::UpstreamIo;
