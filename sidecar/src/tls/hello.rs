//! Reads a ClientHello out of bytes that a worker has peeked: is this a sidecar, somebody else's TLS, or no TLS at
//! all? Pure; the bytes stay with the caller, who replays them to whoever serves the connection.

use rustls::server::{Accepted, Acceptor};

use super::MeshAlpn;

/// More than any hello of a sidecar (a post-quantum one has about 1.8 KiB) and enough for anybody else's.
pub const MAX_HELLO: usize = 16 * 1024;

const MAX_RECORD: usize = 16 * 1024;

/// What the first bytes of a connection are.
pub enum Hello {
    /// A ClientHello that offers a protocol of the mesh. All the bytes given are inside: see
    /// [`super::accept_hello`].
    Mesh(Box<Accepted>),
    /// A ClientHello without one: an application's own TLS.
    Foreign { sni: Option<String> },
    /// The beginning of one; read on.
    Incomplete,
    /// No ClientHello, or one that breaks the rules or exceeds [`MAX_HELLO`].
    Invalid,
}

/// Looks at everything that was read so far. A hello may span TCP segments and TLS records: [`Hello::Incomplete`]
/// until it is whole. Offering a mesh protocol proves nothing; the handshake does.
pub fn read_hello(bytes: &[u8]) -> Hello {
    match first_record(bytes) {
        First::Whole => {}
        First::Part if bytes.len() < MAX_HELLO => return Hello::Incomplete,
        First::Part | First::Other => return Hello::Invalid,
    }
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Hello::Invalid;
        }
    }
    match acceptor.accept() {
        Ok(None) if bytes.len() >= MAX_HELLO => Hello::Invalid,
        Ok(None) => Hello::Incomplete,
        Ok(Some(accepted)) if offers_mesh(&accepted) => Hello::Mesh(Box::new(accepted)),
        Ok(Some(accepted)) => Hello::Foreign { sni: accepted.client_hello().server_name().map(str::to_owned) },
        Err(_) => Hello::Invalid,
    }
}

enum First {
    Whole,
    Part,
    Other,
}

/// Looks at the header alone, so that a hello which comes byte by byte is parsed once: a record of type handshake,
/// version 3.x, no longer than a plaintext may be, that begins with a ClientHello (RFC 8446 sections 4 and 5.1).
fn first_record(bytes: &[u8]) -> First {
    let header = [0x16, 0x03];
    if !bytes.iter().zip(header).all(|(found, expected)| *found == expected) {
        return First::Other;
    }
    let &[_, _, _, high, low, ref body @ ..] = bytes else { return First::Part };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length == 0 || length > MAX_RECORD || body.first().is_some_and(|kind| *kind != 1) {
        return First::Other;
    }
    if body.len() < length { First::Part } else { First::Whole }
}

fn offers_mesh(accepted: &Accepted) -> bool {
    accepted.client_hello().alpn().is_some_and(|mut ids| ids.any(|id| MeshAlpn::from_id(id).is_some()))
}

/// What a TLS client without a mesh protocol is sent before the close: a plaintext record with the fatal alert
/// no_application_protocol (RFC 7301 section 3.2, RFC 8446 section 6).
pub fn no_application_protocol_alert() -> &'static [u8] {
    &[0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 120]
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Hello::Mesh(_) => f.write_str("Mesh"),
            Hello::Foreign { sni } => write!(f, "Foreign({sni:?})"),
            Hello::Incomplete => f.write_str("Incomplete"),
            Hello::Invalid => f.write_str("Invalid"),
        }
    }
}
