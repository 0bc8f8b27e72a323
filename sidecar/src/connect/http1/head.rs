//! Heads: found, parsed and written. Pure. A request's head is refused wherever readers could disagree on it; an
//! answer's lines may end in a bare LF, as old servers write them, and go on in the one plain form.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, Version};

use super::body::{self, Length};
use crate::config::limits::Limits;
use crate::connect::bound;
use crate::outcome::Reason;

/// How the fields of a head were spelled: names go on with the letters that they came with.
#[derive(Clone, Debug)]
pub struct Spelling {
    head: Bytes,
    /// Lines with a field.
    lines: usize,
}

/// A request's head with what it says of its connection.
pub struct RequestHead {
    pub request: Request<()>,
    pub spelling: Spelling,
    pub length: Length,
    /// The client wants to send more on this connection.
    pub keep_alive: bool,
    /// It belongs to a login that authenticates its connection.
    pub binds: bool,
}

/// An answer's head with what it says of its connection.
pub struct ResponseHead {
    pub response: Response<()>,
    pub spelling: Spelling,
    pub length: Length,
    pub keep_alive: bool,
    /// It belongs to a login that authenticates its connection.
    pub binds: bool,
}

/// More fields than any limit lets through.
const MOST_FIELDS: usize = 128;
/// Empty lines before a request that are forgiven (RFC 9112 section 2.2).
const MOST_EMPTY_LINES: usize = 8;

type Fields<'b> = [MaybeUninit<httparse::Header<'b>>; MOST_FIELDS];

/// Takes one request head out of what was received; `None` when its end has not come. `seen` is how far the search for
/// it got, and is 0 for a new head.
pub fn parse_request(
    received: &mut BytesMut,
    seen: &mut usize,
    limits: &Limits,
) -> Result<Option<RequestHead>, (Reason, &'static str)> {
    let Some(head) = take_head(received, seen, limits, Lines::Strict)? else { return Ok(None) };
    let mut fields: Fields<'_> = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(&head, &mut fields) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err((Reason::BadRequest, "an empty line within the head")),
        Err(httparse::Error::TooManyHeaders) => return Err((Reason::RequestHeadTooLarge, "too many fields")),
        Err(_) => return Err((Reason::BadRequest, "the head does not parse")),
    }
    if parsed.headers.len() > limits.header_count {
        return Err((Reason::RequestHeadTooLarge, "too many fields"));
    }
    let target = parsed.path.unwrap_or_default();
    if target.len() > limits.target_bytes {
        return Err((Reason::RequestTargetTooLong, "the target"));
    }
    if memchr::memchr(b'#', target.as_bytes()).is_some() {
        // The library would drop it in silence (RFC 9112 section 3.2 has no fragment).
        return Err((Reason::BadRequest, "a fragment in the target"));
    }
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(parsed.method.unwrap_or_default().as_bytes())
        .map_err(|_| (Reason::BadRequest, "the method"))?;
    *request.uri_mut() = Uri::from_maybe_shared(head.slice_ref(target.as_bytes()))
        .map_err(|_| (Reason::BadRequest, "the target is no URI"))?;
    if *request.method() == Method::OPTIONS && has_no_path(target) {
        // The last proxy makes an asterisk of it (RFC 9112 section 3.2.4), and the library a slash.
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.path_and_query = Some(http::uri::PathAndQuery::from_static("*"));
        *request.uri_mut() = Uri::from_parts(uri).map_err(|_| (Reason::BadRequest, "the target is no URI"))?;
    }
    let old = parsed.version == Some(0);
    *request.version_mut() = if old { Version::HTTP_10 } else { Version::HTTP_11 };
    let lines = parsed.headers.len();
    let fields = fields_of(&head, parsed.headers, ADDED).ok_or((Reason::BadRequest, "a field"))?;
    *request.headers_mut() = fields.headers;
    let headers = request.headers_mut();
    let length = match fields.framing {
        0 => Length::Exact(0),
        _ => body::request_length(headers, old).map_err(|wrong| (Reason::BadRequest, wrong))?,
    };
    if fields.framing > 1
        && let Some(first) = headers.get(header::CONTENT_LENGTH).cloned()
    {
        // Lines that agree go on as one.
        headers.insert(header::CONTENT_LENGTH, first);
    }
    let keep_alive = if fields.connection { keeps_alive(headers, old) } else { !old };
    let binds = fields.binds;
    Ok(Some(RequestHead { request, spelling: Spelling { head, lines }, length, keep_alive, binds }))
}

/// An absolute-form target of an authority alone.
fn has_no_path(target: &str) -> bool {
    !target.starts_with('/') && target.split_once("://").is_some_and(|(_, rest)| !rest.contains(['/', '?']))
}

/// Takes the head of an answer to a `method` request out of what was received; `None` when its end has not come.
pub fn parse_response(
    received: &mut BytesMut,
    seen: &mut usize,
    method: &Method,
    limits: &Limits,
) -> Result<Option<ResponseHead>, &'static str> {
    // What is no HTTP at all may never have the end of a head.
    if !received.iter().zip(b"HTTP/1.").all(|(got, expected)| got == expected) {
        return Err("the answer is no HTTP/1");
    }
    let head = take_head(received, seen, limits, Lines::Lenient).map_err(|(_, wrong)| wrong)?;
    let Some(head) = head else { return Ok(None) };
    let mut fields: Fields<'_> = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let mut config = httparse::ParserConfig::default();
    // They do not go on (RFC 9112 section 5.1).
    config.allow_spaces_after_header_name_in_responses(true);
    match config.parse_response_with_uninit_headers(&mut parsed, &head, &mut fields) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) | Err(_) => return Err("the head of the answer does not parse"),
    }
    if parsed.headers.len() > limits.header_count {
        return Err("the answer has too many fields");
    }
    let mut response = Response::new(());
    let status = StatusCode::from_u16(parsed.code.unwrap_or_default()).map_err(|_| "the status code")?;
    *response.status_mut() = status;
    let old = parsed.version == Some(0);
    *response.version_mut() = if old { Version::HTTP_10 } else { Version::HTTP_11 };
    let lines = parsed.headers.len();
    let fields = fields_of(&head, parsed.headers, ADDED_TO_ANSWERS).ok_or("a field of the answer")?;
    *response.headers_mut() = fields.headers;
    if old && response.headers().contains_key(header::TRANSFER_ENCODING) {
        return Err("Transfer-Encoding in an HTTP/1.0 answer");
    }
    let length = body::response_length(method, status, response.headers());
    let keep_alive = if fields.connection { keeps_alive(response.headers(), old) } else { !old };
    let binds = fields.binds;
    Ok(Some(ResponseHead { response, spelling: Spelling { head, lines }, length, keep_alive, binds }))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// CR LF, nothing else.
    Strict,
    Lenient,
}

/// Splits off everything up to the empty line, that included.
fn take_head(
    received: &mut BytesMut,
    seen: &mut usize,
    limits: &Limits,
    lines: Lines,
) -> Result<Option<Bytes>, (Reason, &'static str)> {
    if *seen == 0 && !skip_empty_lines(received)? {
        return Ok(None);
    }
    let mut from = *seen;
    while let Some(at) = memchr::memchr(b'\n', &received[from..]) {
        let end = from + at;
        if lines == Lines::Strict && (end == 0 || received[end - 1] != b'\r') {
            return Err((Reason::BadRequest, "a line that ends in LF without CR"));
        }
        let length = match &received[end + 1..] {
            [b'\r', b'\n', ..] => end + 3,
            [b'\n', ..] if lines == Lines::Lenient => end + 2,
            // What decides may still come: look at this line's end again.
            [] | [b'\r'] => {
                *seen = end;
                return bounded(received, limits);
            }
            _ => {
                from = end + 1;
                continue;
            }
        };
        if length > limits.head_bytes {
            return Err((Reason::RequestHeadTooLarge, "the head"));
        }
        *seen = 0;
        return Ok(Some(received.split_to(length).freeze()));
    }
    *seen = received.len();
    bounded(received, limits)
}

/// A head without an end so far.
fn bounded(received: &[u8], limits: &Limits) -> Result<Option<Bytes>, (Reason, &'static str)> {
    if received.len() <= limits.head_bytes {
        return Ok(None);
    }
    let within_first_line = memchr::memchr(b'\n', received).is_none();
    let reason = if within_first_line { Reason::RequestTargetTooLong } else { Reason::RequestHeadTooLarge };
    Err((reason, "the head does not end"))
}

/// False when nothing but the beginning of an empty line is there.
fn skip_empty_lines(received: &mut BytesMut) -> Result<bool, (Reason, &'static str)> {
    let mut skipped = 0;
    while received.starts_with(b"\r\n") {
        skipped += 1;
        if skipped > MOST_EMPTY_LINES {
            return Err((Reason::BadRequest, "empty lines without end"));
        }
        bytes::Buf::advance(received, 2);
    }
    Ok(!(received.is_empty() || **received == *b"\r"))
}

/// The fields of a head, and what is worth looking for in them.
struct Parsed {
    headers: HeaderMap,
    /// Lines that tell the length of the body.
    framing: usize,
    /// Some line is of Connection.
    connection: bool,
    /// Some line is of a login that authenticates its connection.
    binds: bool,
}

/// Fields that are mostly added to a request on its way: who calls, in two forms.
const ADDED: usize = 2;
/// And to an answer: when it came, where the application did not say.
const ADDED_TO_ANSWERS: usize = 1;

fn fields_of(head: &Bytes, lines: &[httparse::Header<'_>], added: usize) -> Option<Parsed> {
    let mut headers = HeaderMap::with_capacity(lines.len() + added);
    let (mut framing, mut connection, mut binds) = (0, false, false);
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes()).ok()?;
        let value = HeaderValue::from_maybe_shared(head.slice_ref(line.value)).ok()?;
        match name {
            header::CONTENT_LENGTH | header::TRANSFER_ENCODING => framing += 1,
            header::CONNECTION => connection = true,
            header::AUTHORIZATION
            | header::PROXY_AUTHORIZATION
            | header::WWW_AUTHENTICATE
            | header::PROXY_AUTHENTICATE => binds |= bound::names_scheme(line.value),
            _ => {}
        }
        headers.try_append(name, value).ok()?;
    }
    Some(Parsed { headers, framing, connection, binds })
}

/// RFC 9112 section 9.3.
fn keeps_alive(headers: &HeaderMap, old: bool) -> bool {
    let mut keep = !old;
    for value in headers.get_all(header::CONNECTION) {
        for option in value.as_bytes().split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            if option.eq_ignore_ascii_case(b"close") {
                return false;
            }
            keep |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    keep
}

// --- writing --------------------------------------------------------------------------------------------------

/// Writes a request's head up to the end of its fields; framing and the empty line follow.
pub fn write_request(out: &mut Vec<u8>, request: &http::Request<impl Sized>, spelling: Option<&Spelling>) {
    out.extend_from_slice(request.method().as_str().as_bytes());
    out.push(b' ');
    let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    write_fields(out, request.headers(), spelling);
}

/// Writes the status line of an answer and its fields; framing and the empty line follow.
pub fn write_response(
    out: &mut Vec<u8>,
    old: bool,
    status: StatusCode,
    headers: &HeaderMap,
    spelling: Option<&Spelling>,
) {
    out.extend_from_slice(if old { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    let phrase = spelling.and_then(Spelling::phrase);
    let phrase = phrase.unwrap_or_else(|| status.canonical_reason().unwrap_or("Unknown").as_bytes());
    out.extend_from_slice(phrase);
    out.extend_from_slice(b"\r\n");
    write_fields(out, headers, spelling);
}

pub fn write_fields(out: &mut Vec<u8>, headers: &HeaderMap, spelling: Option<&Spelling>) {
    let mut spelled = spelling.map(Spelling::names);
    for (name, value) in headers {
        let name = name.as_str();
        let came = spelled.as_mut().and_then(|spelled| spelled.find(name));
        out.extend_from_slice(came.unwrap_or(name.as_bytes()));
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
}

pub fn write_length(out: &mut Vec<u8>, length: u64) {
    out.extend_from_slice(b"content-length: ");
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut left = length;
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
    out.extend_from_slice(b"\r\n");
}

/// The line that begins a chunk.
pub(super) fn write_hex(out: &mut Vec<u8>, size: usize) {
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        let nibble = (size >> (digit * 4)) & 0xf;
        out.push(b"0123456789abcdef"[nibble]);
    }
    out.extend_from_slice(b"\r\n");
}

impl Spelling {
    /// The reason phrase of an answer.
    fn phrase(&self) -> Option<&[u8]> {
        let line = &self.head[..memchr::memchr(b'\n', &self.head)?];
        let phrase = line.get(13..)?;
        let phrase = phrase.strip_suffix(b"\r").unwrap_or(phrase);
        // No text of a peer's goes on that the parser did not look at.
        phrase.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t')).then_some(phrase)
    }

    fn names(&self) -> Names<'_> {
        let start = memchr::memchr(b'\n', &self.head).map_or(self.head.len(), |end| end + 1);
        Names { head: &self.head, start, at: start, left: self.lines }
    }
}

/// Walks through the lines of a head beside its parsed fields, which are mostly in the same order.
struct Names<'a> {
    head: &'a [u8],
    start: usize,
    at: usize,
    /// Lines whose field was not asked for yet.
    left: usize,
}

impl<'a> Names<'a> {
    fn find(&mut self, name: &str) -> Option<&'a [u8]> {
        if self.left == 0 {
            // What was added here was not in the head.
            return None;
        }
        let from = self.at;
        let found = self.search(name, self.head.len()).or_else(|| {
            self.at = self.start;
            let found = self.search(name, from);
            if found.is_none() {
                self.at = from;
            }
            found
        })?;
        self.left -= 1;
        Some(found)
    }

    fn search(&mut self, name: &str, until: usize) -> Option<&'a [u8]> {
        while self.at < until {
            let line = &self.head[self.at..];
            let end = memchr::memchr(b'\n', line)? + 1;
            self.at += end;
            if ends_name(line, name.len()) && is_same(&line[..name.len()], name.as_bytes()) {
                return Some(&line[..name.len()]);
            }
        }
        None
    }
}

/// Whether a field's name in this line is so long. An answer may have blanks behind it.
fn ends_name(line: &[u8], length: usize) -> bool {
    match line.get(length) {
        Some(b':') => true,
        Some(b' ' | b'\t') => {
            let behind = line[length..].iter().find(|byte| !matches!(byte, b' ' | b'\t'));
            behind == Some(&b':')
        }
        _ => false,
    }
}

/// Whether `spelled` is `name`, which has no capitals, but for the case of letters; both are as long. Eight bytes at a
/// time: this is asked of every field that is passed on.
fn is_same(spelled: &[u8], name: &[u8]) -> bool {
    let (Some(spelled_end), Some(name_end)) = (spelled.last_chunk::<8>(), name.last_chunk::<8>()) else {
        return spelled.eq_ignore_ascii_case(name);
    };
    let (spelled_words, name_words) = (spelled.as_chunks::<8>().0, name.as_chunks::<8>().0);
    is_same_word(*spelled_end, *name_end)
        && spelled_words.iter().zip(name_words).all(|(spelled, name)| is_same_word(*spelled, *name))
}

fn is_same_word(spelled: [u8; 8], name: [u8; 8]) -> bool {
    const EACH: u64 = u64::MAX / 0xff;
    let (spelled, name) = (u64::from_ne_bytes(spelled), u64::from_ne_bytes(name));
    // No byte of a name is above 0x7f, so that no sum reaches the next byte.
    let from_a = name + EACH * u64::from(0x80 - b'a');
    let beyond_z = name + EACH * u64::from(0x7f - b'z');
    let letters = (from_a & !beyond_z & (EACH * 0x80)) >> 2;
    (spelled ^ name) & !letters == 0
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
