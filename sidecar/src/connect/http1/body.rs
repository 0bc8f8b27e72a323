//! Bodies: where they end (RFC 9112 section 6) and what is in them. Pure. Chunks are read by the letter of the grammar:
//! whatever is written otherwise is refused, because another reader might take it for something else.

use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};

use crate::config::limits::Limits;

/// How the end of a body is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Length {
    Exact(u64),
    Chunked,
    /// By the end of the connection; answers only.
    UntilEnd,
}

/// RFC 9112 section 6.3 for requests; both framings together, and whatever is no plain number, are refused.
pub(super) fn request_length(headers: &HeaderMap, old: bool) -> Result<Length, &'static str> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        if old {
            return Err("Transfer-Encoding in HTTP/1.0");
        }
        if headers.contains_key(header::CONTENT_LENGTH) {
            return Err("Transfer-Encoding and Content-Length");
        }
        if codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
            return Err("a Transfer-Encoding that is not chunked alone");
        }
        return Ok(Length::Chunked);
    }
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let one = plain_length(value.as_bytes()).ok_or("a Content-Length that not every server reads alike")?;
        if length.replace(one).is_some_and(|before| before != one) {
            return Err("Content-Lengths that differ");
        }
    }
    Ok(Length::Exact(length.unwrap_or(0)))
}

/// The same for answers. What contradicts itself is refused later, by its fields; here it must only not be believed.
pub(super) fn response_length(method: &Method, status: StatusCode, headers: &HeaderMap) -> Length {
    let bodyless = status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
        || *method == Method::HEAD;
    if bodyless {
        return Length::Exact(0);
    }
    let (mut coding, mut length) = (None, None);
    // One walk costs less than a search for each.
    for (name, value) in headers {
        match *name {
            header::TRANSFER_ENCODING if coding.is_none() => coding = Some(value),
            header::CONTENT_LENGTH if length.is_none() => length = Some(value),
            _ => {}
        }
    }
    if let Some(coding) = coding {
        let chunked = coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
        return if chunked { Length::Chunked } else { Length::UntilEnd };
    }
    match length {
        None => Length::UntilEnd,
        Some(value) => {
            // A list of equal numbers is one number; `check_answer` sees to it that they are equal.
            let first = value.as_bytes().split(|byte| *byte == b',').next().unwrap_or_default();
            number(first.trim_ascii()).map_or(Length::UntilEnd, Length::Exact)
        }
    }
}

/// A length that every reader takes for the same number: without leading zeros, which some read as octal.
pub fn plain_length(digits: &[u8]) -> Option<u64> {
    number(digits).filter(|_| digits.len() == 1 || digits[0] != b'0')
}

/// Digits alone, and few enough for a signed 64-bit number.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse::<i64>().ok()?.try_into().ok()
}

/// Reads a body out of what was received.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// Bytes of chunk extensions and of trailers that this message may still have.
    extensions_left: usize,
    trailers_left: usize,
    most_trailers: usize,
    /// Blanks behind the name of a trailer are removed, instead of refused.
    of_answer: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Exact(u64),
    UntilEnd,
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    Ended,
}

/// What one look at the received bytes gave.
#[derive(Debug)]
pub enum Decoded {
    Data(Bytes),
    Trailers(HeaderMap),
    /// Nothing more can be said without more bytes.
    Incomplete,
    Ended,
}

/// The digits of a chunk's size: more than 2^60 bytes is nobody's chunk.
const MOST_DIGITS: usize = 15;
const MOST_FIELDS: usize = 128;

impl Decoder {
    pub fn new(length: Length, limits: &Limits) -> Decoder {
        let state = match length {
            Length::Exact(0) => State::Ended,
            Length::Exact(length) => State::Exact(length),
            Length::Chunked => State::ChunkSize,
            Length::UntilEnd => State::UntilEnd,
        };
        Decoder {
            state,
            extensions_left: limits.chunk_extension_bytes,
            trailers_left: limits.trailer_bytes,
            most_trailers: limits.header_count,
            of_answer: false,
        }
    }

    /// For the body of an answer, in which blanks behind a trailer's name are removed (RFC 9112 section 5.1).
    pub fn of_answer(self) -> Decoder {
        Decoder { of_answer: true, ..self }
    }

    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// What is left of a body of known length.
    pub fn exact(&self) -> Option<u64> {
        match self.state {
            State::Exact(left) => Some(left),
            State::Ended => Some(0),
            _ => None,
        }
    }

    /// The connection ended: true when that is how this body ends.
    pub fn end_of_stream(&mut self) -> bool {
        if self.state == State::UntilEnd {
            self.state = State::Ended;
        }
        self.has_ended()
    }

    /// Takes the next piece out of `received`.
    pub fn decode(&mut self, received: &mut BytesMut) -> Result<Decoded, &'static str> {
        loop {
            match self.state {
                State::Ended => return Ok(Decoded::Ended),
                State::UntilEnd if received.is_empty() => return Ok(Decoded::Incomplete),
                State::UntilEnd => return Ok(Decoded::Data(received.split().freeze())),
                State::Exact(_) | State::Chunk(_) if received.is_empty() => return Ok(Decoded::Incomplete),
                State::Exact(left) => {
                    let (data, left) = split(received, left);
                    self.state = if left == 0 { State::Ended } else { State::Exact(left) };
                    return Ok(Decoded::Data(data));
                }
                State::Chunk(left) => {
                    let (data, left) = split(received, left);
                    self.state = if left == 0 { State::ChunkEnd } else { State::Chunk(left) };
                    return Ok(Decoded::Data(data));
                }
                State::ChunkEnd => match received.as_ref() {
                    [b'\r', b'\n', ..] => {
                        received.advance(2);
                        self.state = State::ChunkSize;
                    }
                    [] | [b'\r'] => return Ok(Decoded::Incomplete),
                    _ => return Err("a chunk that is longer or shorter than it says"),
                },
                State::ChunkSize => match self.chunk_size(received)? {
                    None => return Ok(Decoded::Incomplete),
                    Some(0) => self.state = State::Trailers,
                    Some(size) => self.state = State::Chunk(size),
                },
                State::Trailers => return self.trailers(received),
            }
        }
    }

    /// `1*HEXDIG [ chunk-ext ] CRLF`; `None` when its end has not come.
    fn chunk_size(&mut self, received: &mut BytesMut) -> Result<Option<u64>, &'static str> {
        let Some(end) = memchr::memchr(b'\n', received) else {
            return if received.len() > self.extensions_left + MOST_DIGITS + 1 {
                Err("endless chunk extensions")
            } else if received.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) {
                Err("a chunk size that is no hexadecimal number")
            } else {
                Ok(None)
            };
        };
        let line = received[..end].strip_suffix(b"\r").ok_or("a chunk size that ends in LF without CR")?;
        let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
        if digits == 0 || digits > MOST_DIGITS {
            return Err("a chunk size that is no hexadecimal number");
        }
        let (digits, extension) = line.split_at(digits);
        let size = std::str::from_utf8(digits).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
        let size = size.ok_or("a chunk size that is no hexadecimal number")?;
        if !is_extension(extension) {
            return Err("a chunk extension that is none");
        }
        self.extensions_left = self.extensions_left.checked_sub(extension.len()).ok_or("endless chunk extensions")?;
        received.advance(end + 1);
        Ok(Some(size))
    }

    fn trailers(&mut self, received: &mut BytesMut) -> Result<Decoded, &'static str> {
        match received.as_ref() {
            [b'\r', b'\n', ..] => {
                received.advance(2);
                self.state = State::Ended;
                return Ok(Decoded::Ended);
            }
            [] | [b'\r'] => return Ok(Decoded::Incomplete),
            _ => {}
        }
        let mut from = 0;
        while let Some(at) = memchr::memchr(b'\n', &received[from..]) {
            let end = from + at;
            if end == 0 || received[end - 1] != b'\r' {
                return Err("a trailer line that ends in LF without CR");
            }
            if received[end + 1..].starts_with(b"\r\n") {
                self.trailers_left = self.trailers_left.checked_sub(end).ok_or("trailers without end")?;
                let mut section = received.split_to(end + 3).freeze();
                if self.of_answer && has_blank_before_colon(&section) {
                    section = without_blanks_before_colons(&section);
                }
                self.state = State::Ended;
                return parse_trailers(&section, self.most_trailers).map(Decoded::Trailers);
            }
            from = end + 1;
        }
        // Less the line end that may be there already.
        if received.len().saturating_sub(2) > self.trailers_left {
            Err("trailers without end")
        } else {
            Ok(Decoded::Incomplete)
        }
    }
}

fn parse_trailers(section: &Bytes, most: usize) -> Result<HeaderMap, &'static str> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(section, &mut fields) else {
        return Err("trailers that do not parse");
    };
    if fields.len() > most {
        return Err("too many trailers");
    }
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| "the name of a trailer")?;
        let value = HeaderValue::from_maybe_shared(section.slice_ref(field.value)).map_err(|_| "a trailer")?;
        trailers.append(name, value);
    }
    Ok(trailers)
}

fn has_blank_before_colon(section: &[u8]) -> bool {
    section.windows(2).any(|pair| matches!(pair, b" :" | b"\t:"))
}

fn without_blanks_before_colons(section: &[u8]) -> Bytes {
    let mut clean = Vec::with_capacity(section.len());
    for line in section.split_inclusive(|byte| *byte == b'\n') {
        let (name, rest) = line.split_at(memchr::memchr(b':', line).unwrap_or(0));
        // A line that begins with a blank is a fold, which is refused.
        let blanks = name.iter().rev().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        clean.extend_from_slice(&name[..if blanks == name.len() { blanks } else { name.len() - blanks }]);
        clean.extend_from_slice(rest);
    }
    Bytes::from(clean)
}

/// `*( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )` (RFC 9112 section 7.1.1); a blank is SP or HTAB.
fn is_extension(mut rest: &[u8]) -> bool {
    while !rest.is_empty() {
        let Some(name) = skip_blanks(rest).strip_prefix(b";").map(skip_blanks) else { return false };
        let Some(behind) = skip_token(name) else { return false };
        rest = behind;
        if let Some(value) = skip_blanks(behind).strip_prefix(b"=").map(skip_blanks) {
            let Some(behind) = skip_token(value).or_else(|| skip_quoted(value)) else { return false };
            rest = behind;
        }
    }
    true
}

fn skip_blanks(bytes: &[u8]) -> &[u8] {
    let count = bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    &bytes[count..]
}

fn skip_token(bytes: &[u8]) -> Option<&[u8]> {
    let count = bytes.iter().take_while(|byte| is_token(**byte)).count();
    (count > 0).then(|| &bytes[count..])
}

/// RFC 9110 section 5.6.4.
fn skip_quoted(bytes: &[u8]) -> Option<&[u8]> {
    let mut rest = bytes.strip_prefix(b"\"")?;
    loop {
        rest = match rest {
            [b'"', behind @ ..] => return Some(behind),
            [b'\\', b'\t' | b' '..=b'~' | 0x80.., behind @ ..] => behind,
            [b'\t' | b' '..=b'[' | b']'..=b'~' | 0x80.., behind @ ..] => behind,
            _ => return None,
        };
    }
}

/// A character of a token (RFC 9110 section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn split(received: &mut BytesMut, left: u64) -> (Bytes, u64) {
    let count = usize::try_from(left).unwrap_or(usize::MAX).min(received.len());
    (received.split_to(count).freeze(), left - count as u64)
}

#[cfg(test)]
#[path = "body_tests.rs"]
mod tests;
