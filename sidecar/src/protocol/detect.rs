//! What the first bytes of a connection are. Pure: decides on bytes alone, says when it needs more of them, and
//! never on time. Called by both directions before anything is parsed for real.

use crate::telemetry;

/// What a connection speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detected {
    Http1,
    Http2,
    /// A TLS ClientHello: bytes of the application's own TLS, or of a peer sidecar.
    Tls,
    Opaque,
}

impl From<Detected> for telemetry::Detected {
    fn from(detected: Detected) -> telemetry::Detected {
        match detected {
            Detected::Http1 => telemetry::Detected::Http1,
            Detected::Http2 => telemetry::Detected::Http2,
            Detected::Tls => telemetry::Detected::Tls,
            Detected::Opaque => telemetry::Detected::Tcp,
        }
    }
}

/// The client's connection preface (RFC 9113 section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A request line that is longer is HTTP all the same; the parser behind answers 414.
const LONGEST_REQUEST_LINE: usize = 16 * 1024 + 64;
const LONGEST_METHOD: usize = 32;

/// Decides on what has been read so far; `None` when more bytes could still change the answer.
pub fn detect(bytes: &[u8]) -> Option<Detected> {
    let first = *bytes.first()?;
    if first == 0x16 {
        return match bytes {
            // Handshake record, then a version whose major number is 3.
            [_, 3, ..] => Some(Detected::Tls),
            [_] => None,
            _ => Some(Detected::Opaque),
        };
    }
    if bytes.len() >= HTTP2_PREFACE.len() && bytes.starts_with(HTTP2_PREFACE) {
        return Some(Detected::Http2);
    }
    if HTTP2_PREFACE.starts_with(bytes) {
        return None;
    }
    detect_request_line(bytes)
}

/// Whether a server's first bytes are the SETTINGS frame with which one of HTTP/2 begins (RFC 9113 sections 3.4 and 6.5).
pub fn speaks_http2(bytes: &[u8]) -> bool {
    matches!(bytes, [0, high, low, 4, 0, 0, 0, 0, 0, ..] if u16::from_be_bytes([*high, *low]) % 6 == 0)
}

/// `METHOD SP target SP HTTP/1.x LF` (RFC 9112 section 3); a leading empty line is allowed, as section 2.2 asks.
fn detect_request_line(bytes: &[u8]) -> Option<Detected> {
    let line = match bytes {
        [b'\r', b'\n', rest @ ..] => rest,
        [b'\r'] => return None,
        bytes => bytes,
    };
    let method_end = line.iter().position(|byte| !is_token(*byte));
    let Some(method_end) = method_end else {
        return if line.len() > LONGEST_METHOD { Some(Detected::Opaque) } else { None };
    };
    if method_end == 0 || method_end > LONGEST_METHOD || line[method_end] != b' ' {
        return Some(Detected::Opaque);
    }
    // The first byte that text does not have decides, whatever comes behind it and wherever the bytes are cut.
    let end = line.iter().position(|byte| byte.is_ascii_control() && !matches!(byte, b'\r' | b'\t'));
    let Some(end) = end else {
        return if line.len() > LONGEST_REQUEST_LINE { Some(Detected::Http1) } else { None };
    };
    if end > LONGEST_REQUEST_LINE {
        return Some(Detected::Http1);
    }
    if line[end] != b'\n' {
        // A target that has begun makes it a request, if a wrong one: its parser refuses it.
        let target = &line[method_end + 1..end];
        let begun = target.starts_with(b"/") || target.starts_with(b"http");
        return Some(if begun { Detected::Http1 } else { Detected::Opaque });
    }
    let line = line[..end].strip_suffix(b"\r").unwrap_or(&line[..end]);
    let version = line.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    if version.starts_with(b"HTTP/") { Some(Detected::Http1) } else { Some(Detected::Opaque) }
}

/// `tchar` of RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASES: &[(&[u8], Option<Detected>)] = &[
        (b"", None),
        (b"G", None),
        (b"GE", None),
        (b"GET", None),
        (b"GET ", None),
        (b"GET / HTTP/1.1\r", None),
        (b"GET / HTTP/1.1\r\n", Some(Detected::Http1)),
        (b"GET / HTTP/1.0\n", Some(Detected::Http1)),
        (b"\r\nGET / HTTP/1.1\r\n", Some(Detected::Http1)),
        (b"PURGE http://a/ HTTP/1.1\r\n", Some(Detected::Http1)),
        (b"GET / HTTP/9.9\r\n", Some(Detected::Http1)),
        (b"P", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Detected::Http2)),
        (b"POST / HTTP/1.1\r\n", Some(Detected::Http1)),
        (b"\x16", None),
        (b"\x16\x03", Some(Detected::Tls)),
        (b"\x16\x16", Some(Detected::Opaque)),
        (b"PING\r\n", Some(Detected::Opaque)),
        (b"get key\r\n", Some(Detected::Opaque)),
        (b"GET /\r\n", Some(Detected::Opaque)),
        (b"HELO example.com\r\n", Some(Detected::Opaque)),
        (b"*1\r\n$4\r\nPING\r\n", Some(Detected::Opaque)),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", Some(Detected::Opaque)),
        (b"AMQP\0\0\x09\x01", Some(Detected::Opaque)),
        (b"GET \x00", Some(Detected::Opaque)),
        (b"GET \x00/ HTTP/1.1\r\n", Some(Detected::Opaque)),
        (b"3T -HT TP/1*d\x00 HTTP/1.1\r\n", Some(Detected::Opaque)),
        (b"GET /\x00 HTTP/1.1\r\n", Some(Detected::Http1)),
        (b"GET http://a/\x01", Some(Detected::Http1)),
        (b"\xff", Some(Detected::Opaque)),
        (b" ", Some(Detected::Opaque)),
    ];

    #[test]
    fn table() {
        for (bytes, expected) in CASES {
            assert_eq!(detect(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    /// A decision, once made, is that of every longer prefix: how segments are cut does not matter.
    #[test]
    fn the_cut_does_not_matter() {
        for (bytes, expected) in CASES.iter().filter(|(_, expected)| expected.is_some()) {
            for end in 0..=bytes.len() {
                let early = detect(&bytes[..end]);
                assert!(early.is_none() || early == *expected, "{:?} at {end}", String::from_utf8_lossy(bytes));
            }
        }
    }

    #[test]
    fn a_server_of_http2_is_known_by_its_settings() {
        for settings in [&b"\0\0\0\x04\0\0\0\0\0"[..], b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64"] {
            assert!(speaks_http2(settings));
            assert!(!speaks_http2(&settings[..8]));
        }
        // Of a wrong length, another frame, an acknowledgement; a greeting of MySQL, and of a mail server.
        let others: [&[u8]; 5] = [
            b"\0\0\x05\x04\0\0\0\0\0",
            b"\0\0\0\x08\0\0\0\0\0",
            b"\0\0\0\x04\x01\0\0\0\0",
            b"\x4a\0\0\0\x0a8.0",
            b"220 mail\r\n",
        ];
        assert!(others.iter().all(|bytes| !speaks_http2(bytes)));
    }

    #[test]
    fn bounded() {
        assert_eq!(detect(&[b'A'; 33]), Some(Detected::Opaque));
        let mut long = b"GET /".to_vec();
        long.resize(LONGEST_REQUEST_LINE + 1, b'a');
        assert_eq!(detect(&long), Some(Detected::Http1));
    }
}
