//! What the first bytes of a connection are. Pure: decides on bytes alone, and says whether more of them may be waited for
//! long. Called by both directions before anything is parsed for real.
//!
//! Servers differ in what they read as a request line; what one of them reads is HTTP here, and the strict parser refuses
//! it. `tests/tests/detection_forged.rs` has the servers that were asked. What was let go as opaque, because it stopped
//! short of an answer or because a byte in it is none of HTTP's, is watched on its way by `screen.rs`.

use super::screen::Screen;
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

/// What can be said of some first bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sight {
    Is(Detected),
    /// The beginning of a request line, of HTTP/2's preface or of TLS: its end is waited for as for that of a head.
    Begun,
    /// They stop short: a word without an end, say. A client that then waits for an answer is opaque.
    Short,
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
/// A first word that is longer is not waited for.
const LONGEST_WORD: usize = 128;
/// The methods of RFC 9110 and RFC 5789. The beginning of one of them is the beginning of a request.
const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];
/// Protocols with request lines like HTTP's: the version, and the scheme of the target.
const OTHER_PROTOCOLS: [(&[u8], &[u8]); 3] = [(b"RTSP/", b"rtsp"), (b"SIP/", b"sip"), (b"ICAP/", b"icap")];

/// Decides on what has been read so far. What is [`Sight::Is`] stays so whatever follows, but that a request which shows
/// behind opaque bytes makes all of them HTTP: where it comes later, the [`Screen`] sees it.
pub fn detect(bytes: &[u8]) -> Sight {
    let Some(first) = bytes.first() else { return Sight::Short };
    if *first == 0x16 {
        match bytes {
            // Handshake record, then a version whose major number is 3.
            [_, 3, ..] => return Sight::Is(Detected::Tls),
            [_] => return Sight::Begun,
            _ => {}
        }
    }
    if bytes.len() >= HTTP2_PREFACE.len() && bytes.starts_with(HTTP2_PREFACE) {
        return Sight::Is(Detected::Http2);
    }
    if HTTP2_PREFACE.starts_with(bytes) {
        return Sight::Begun;
    }
    match first_line(bytes) {
        Sight::Is(Detected::Opaque) if Screen::default().client(bytes).is_err() => Sight::Is(Detected::Http1),
        sight => sight,
    }
}

/// Whether a server's first bytes are the SETTINGS frame with which one of HTTP/2 begins (RFC 9113 sections 3.4 and 6.5).
pub fn speaks_http2(bytes: &[u8]) -> bool {
    matches!(bytes, [0, high, low, 4, 0, 0, 0, 0, 0, ..] if u16::from_be_bytes([*high, *low]) % 6 == 0)
}

/// The first line that is not empty. Some server or other skips any blank before it, and parts its words by any.
fn first_line(bytes: &[u8]) -> Sight {
    let Some(start) = bytes.iter().position(|byte| !(is_blank(*byte) && byte.is_ascii())) else {
        // The parser says what is wrong with blanks without end.
        return if bytes.len() > LONGEST_REQUEST_LINE { Sight::Is(Detected::Http1) } else { Sight::Short };
    };
    let line = &bytes[start..];
    let end = memchr::memchr(b'\n', line);
    let (line, ended) = end.map_or((line, false), |end| (&line[..end], true));
    let word = line.split(|byte| is_blank(*byte)).next().unwrap_or_default();
    let rest = &line[word.len()..];
    if word.is_empty() || !word.iter().all(|byte| is_token(*byte)) {
        return Sight::Is(Detected::Opaque);
    }
    if ended {
        return Sight::Is(if is_request_line(line) { Detected::Http1 } else { Detected::Opaque });
    }
    if rest.is_empty() {
        return match word {
            word if METHODS.iter().any(|method| method.starts_with(word)) => Sight::Begun,
            word if word.len() > LONGEST_WORD => Sight::Is(Detected::Opaque),
            _ => Sight::Short,
        };
    }
    let known = is_method(word);
    // A byte that text does not have.
    if !known && rest.iter().any(|byte| byte.is_ascii_control() && !is_blank(*byte)) {
        return Sight::Is(Detected::Opaque);
    }
    let mut words = rest.split(|byte| is_blank(*byte)).filter(|word| !word.is_empty());
    let target = words.next().unwrap_or_default();
    let begun = known || is_target(target) || words.any(|word| word.starts_with(b"HTTP/"));
    match (begun, line.len() > LONGEST_REQUEST_LINE) {
        (true, true) => Sight::Is(Detected::Http1),
        (true, false) => Sight::Begun,
        (false, true) => Sight::Is(Detected::Opaque),
        (false, false) => Sight::Short,
    }
}

/// Whether some server reads this line, which is whole, as the beginning of a request: `... HTTP/x`, or a known method
/// with something behind it (HTTP/0.9, and versions that a server does not look at).
pub(super) fn is_request_line(line: &[u8]) -> bool {
    let mut words = line.split(|byte| is_blank(*byte)).filter(|word| !word.is_empty());
    let Some(method) = words.next() else { return false };
    let Some(target) = words.next() else { return false };
    let last = words.next_back().unwrap_or(target);
    last.starts_with(b"HTTP/") || (is_method(method) && !is_of_other_protocol(method, target, last))
}

/// A known method that is not HTTP's here: RTSP, SIP and ICAP by their versions, and NATS, whose CONNECT has an object.
fn is_of_other_protocol(method: &[u8], target: &[u8], version: &[u8]) -> bool {
    let scheme = |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme));
    let other = |(protocol, its): &(&[u8], &[u8])| version.starts_with(protocol) && (target == b"*" || scheme(its));
    OTHER_PROTOCOLS.iter().any(other) || (method == b"CONNECT" && target.starts_with(b"{"))
}

fn is_target(word: &[u8]) -> bool {
    word.starts_with(b"/") || word.get(..4).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"http"))
}

/// A method that every server knows.
pub(super) fn is_method(word: &[u8]) -> bool {
    METHODS.contains(&word)
}

/// What parts words, for some server or other: Python's parts the line as Latin-1 text.
pub(super) fn is_blank(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | 0x1c..=b' ' | 0x85 | 0xa0)
}

/// `tchar` of RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP1: Sight = Sight::Is(Detected::Http1);
    const HTTP2: Sight = Sight::Is(Detected::Http2);
    const TLS: Sight = Sight::Is(Detected::Tls);
    const OPAQUE: Sight = Sight::Is(Detected::Opaque);

    const CASES: &[(&[u8], Sight)] = &[
        (b"", Sight::Short),
        (b"G", Sight::Begun),
        (b"GE", Sight::Begun),
        (b"GET", Sight::Begun),
        (b"GET ", Sight::Begun),
        (b"GET / HTTP/1.1\r", Sight::Begun),
        (b"GET / HTTP/1.1\r\n", HTTP1),
        (b"GET / HTTP/1.0\n", HTTP1),
        (b"\r\nGET / HTTP/1.1\r\n", HTTP1),
        (b"PURGE http://a/ HTTP/1.1\r\n", HTTP1),
        (b"PURGE http://a/", Sight::Begun),
        (b"GET / HTTP/9.9\r\n", HTTP1),
        (b"P", Sight::Begun),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", Sight::Begun),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HTTP2),
        (b"POST / HTTP/1.1\r\n", HTTP1),
        (b"\x16", Sight::Begun),
        (b"\x16\x03", TLS),
        (b"\x16\x16", OPAQUE),
        // What some server reads as a request.
        (b"\r\n\r\n\r\nGET / HTTP/1.1\r\n", HTTP1),
        (b"\n \t\x0b\x0c\rGET / HTTP/1.1\r\n", HTTP1),
        (b"\x1cGET\x1f/\x85HTTP/1.1\n", HTTP1),
        (b"\xa0GET / HTTP/1.1\n", HTTP1),
        (b"GET\t/\tHTTP/1.1\t \r\n", HTTP1),
        (b"GET\r/\rHTTP/1.1\r\n", HTTP1),
        (b"get / HTTP/1.1\r\n", HTTP1),
        (b"\"x\" / HTTP/1.1\r\n", HTTP1),
        (b"A-METHOD-THAT-IS-LONGER-THAN-ANY-THAT-IS-KNOWN / HTTP/1.1\r\n", HTTP1),
        (b"GET / HTTP/01.10\r\n", HTTP1),
        (b"GET / HTTP/\r\n", HTTP1),
        (b"GET / RTSP/1.0\r\n", HTTP1),
        (b"GET / x\r\n", HTTP1),
        (b"GET /\r\n", HTTP1),
        (b"GET key\r\n", HTTP1),
        (b"POST /\n", HTTP1),
        (b"GET HTTP/1.1\r\n", HTTP1),
        (b"GET /\x00 HTTP/1.1\r\n", HTTP1),
        (b"GET \x00", Sight::Begun),
        (b"GET \x00/ HTTP/1.1\r\n", HTTP1),
        (b"3T -HT TP/1*d\x00 HTTP/1.1\r\n", HTTP1),
        (b"ruok\nGET / HTTP/1.1\r\n", HTTP1),
        (b"FOO /x y\r\nHost: a\r\n", HTTP1),
        (b"FOO x\r\nx-outrigger-identity: a\r\n", HTTP1),
        // What else programs say first.
        (b"PING\r\n", OPAQUE),
        (b"get key\r\n", OPAQUE),
        (b"set /k 0 0 5\r\nhello\r\n", OPAQUE),
        (b"HELO example.com\r\n", OPAQUE),
        (b"READ 1\n", OPAQUE),
        (b"ruok\n", OPAQUE),
        (b"*1\r\n$4\r\nPING\r\n", OPAQUE),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", OPAQUE),
        (b"AMQP\0\0\x09\x01", OPAQUE),
        (b"CONNECT\naccept-version:1.2\n\n\0", OPAQUE),
        (b"CONNECT {}\r\n", OPAQUE),
        (b"OPTIONS rtsp://cam/ RTSP/1.0\r\nCSeq: 1\r\n\r\n", OPAQUE),
        (b"OPTIONS * RTSP/1.0\r\n", OPAQUE),
        (b"DESCRIBE rtsp://cam/ RTSP/1.0\r\n", OPAQUE),
        (b"REGISTER sip:a SIP/2.0\r\n", OPAQUE),
        (b"0033git-upload-pack /p\0host=a\0", OPAQUE),
        (b"<34>1 2026", OPAQUE),
        (b"83 <34>1 2026-11-28T14:00:00Z web - - - \"GET / HTTP/1.1\" 200\n", OPAQUE),
        (b"{\"a\":", OPAQUE),
        (b"\xff", OPAQUE),
        (b"\x85", OPAQUE),
        // What stops short.
        (b" ", Sight::Short),
        (b"\r\n", Sight::Short),
        (b"q", Sight::Short),
        (b"R", Sight::Short),
        (b"ruok", Sight::Short),
        (b"HELLO", Sight::Short),
        (b"READ 1", Sight::Short),
        (b"JDWP-Handshake", Sight::Short),
        (b"0123456789abcdef", Sight::Short),
        (b"83 <34>1 2026", Sight::Short),
        (b"0033git-upload-pack", Sight::Short),
    ];

    #[test]
    fn table() {
        for (bytes, expected) in CASES {
            assert_eq!(detect(bytes), *expected, "{}", bytes.escape_ascii());
        }
    }

    /// How segments are cut does not matter: what was decided on some bytes stays so for all of them, or was opaque and
    /// does not get past the screen.
    #[test]
    fn the_cut_does_not_matter() {
        for (bytes, expected) in CASES {
            for end in 0..bytes.len() {
                match detect(&bytes[..end]) {
                    Sight::Begun | Sight::Short => {}
                    OPAQUE if *expected == HTTP1 => assert!(Screen::default().client(bytes).is_err()),
                    early => assert_eq!(early, *expected, "{} at {end}", bytes.escape_ascii()),
                }
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
        assert_eq!(detect(&[b'A'; LONGEST_WORD]), Sight::Short);
        assert_eq!(detect(&[b'A'; LONGEST_WORD + 1]), OPAQUE);
        assert_eq!(detect(&[b'\n'; LONGEST_REQUEST_LINE + 1]), HTTP1);
        for (beginning, expected) in [(&b"GET /"[..], HTTP1), (b"FOO /", HTTP1), (b"some words", OPAQUE)] {
            let mut long = beginning.to_vec();
            long.resize(LONGEST_REQUEST_LINE + 1, b'a');
            assert_eq!(detect(&long), expected);
        }
    }
}
