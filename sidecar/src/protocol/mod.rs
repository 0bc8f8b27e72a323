//! What connections speak: detection, HTTP, and bytes that are not parsed.

pub mod detect;
pub mod http;
pub mod opaque;
pub mod peek;
pub mod screen;
pub mod silence;
pub mod sni;
