//! From a destination to a connection: what one worker knows of each destination, its pools, and dialling.

pub mod backend;
pub mod bound;
pub mod dial;
pub mod http1;
pub mod http2;
pub mod interim;
pub mod lane;
pub mod own_dials;
pub mod request_body;
pub mod speculation;
pub mod streams;
pub mod tap;
pub mod unprocessed;
pub mod worker;
