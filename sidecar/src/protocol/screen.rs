//! Watches the bytes of a client that were taken for opaque on an undeclared port, in case the server reads HTTP in them
//! after all. Pure; `protocol/opaque.rs` asks it before each piece goes on.
//!
//! Detection must let a client's bytes go before the first line has ended: a client that says `ruok` waits for its answer.
//! What follows may still make a request of them, and servers differ in what they read as one. So three things end the
//! connection before the server gets them: a first line that is a request line, a later line near the beginning that says
//! `HTTP/` (some servers expect a line of something else before), and a line that claims an identity, of whatever
//! protocol. The watch ends when the server's first bytes are not those of an HTTP server.

use super::detect::{is_blank, is_method, is_request_line};

/// Lines behind the first one are looked at for request lines within so many bytes. No server is known that skips lines
/// but the PROXY protocol's, which is shorter.
const LATER_LINES: usize = 8 * 1024;
/// A first line with a known method that is longer is a request line, however it ends.
const LONGEST_LINE: usize = 16 * 1024;
/// What a word is known by.
const WORD: usize = 8;

/// What the mesh tells an application about its caller, and no caller may: lower case, `-` for `_`.
const CLAIMS: [&[u8]; 2] = [b"x-outrigger-", b"x-forwarded-client-cert"];

/// Why the bytes may not go on.
pub type Found = &'static str;

#[derive(Debug)]
pub struct Screen {
    server: Server,
    /// Which line the client is in.
    place: Place,
    line: Line,
    /// Within a line, how much of a claim was seen.
    claim: Claim,
    /// Bytes of later lines that are still looked at for request lines.
    left: usize,
}

/// What the server said first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Server {
    /// So many bytes of [`Screen::HTTP`].
    Silent(usize),
    Http,
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Nothing but blanks and empty lines so far, or the first line that is not empty.
    First,
    /// Behind a first line with a target: a field here would make it the head of a request.
    Second,
    Later,
}

/// The words of one line, as far as they matter.
#[derive(Default, Debug)]
struct Line {
    words: usize,
    within: bool,
    /// The current or last word: its beginning, and its length up to there.
    word: [u8; WORD],
    length: usize,
    /// The whole line, as long as its first word is a known method.
    whole: Option<Vec<u8>>,
    /// The second word is a path or an HTTP URI.
    target: bool,
}

#[derive(Clone, Copy, Debug)]
struct Claim {
    /// Bytes of the name so far; `None` when this is none.
    matched: Option<usize>,
    alive: [bool; CLAIMS.len()],
}

const NO_CLAIM: Claim = Claim { matched: None, alive: [false; CLAIMS.len()] };
const MAYBE_CLAIM: Claim = Claim { matched: Some(0), alive: [true; CLAIMS.len()] };

impl Default for Screen {
    fn default() -> Screen {
        Screen {
            server: Server::Silent(0),
            place: Place::First,
            line: Line::default(),
            claim: NO_CLAIM,
            left: LATER_LINES,
        }
    }
}

impl Screen {
    const HTTP: &[u8] = b"HTTP/";

    /// For a connection on which the server has spoken already: none where that was not HTTP.
    pub fn behind(server: &[u8]) -> Option<Box<Screen>> {
        let mut screen = Screen::default();
        screen.server(server);
        // Else the copy shows it these bytes again.
        (!screen.is_lifted()).then(|| Box::new(Screen::default()))
    }

    /// The watch is over: the server speaks something else.
    pub fn is_lifted(&self) -> bool {
        self.server == Server::Other
    }

    /// The next bytes of the server.
    pub fn server(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let Server::Silent(matched) = self.server else { return };
            self.server = match matched + 1 {
                _ if Screen::HTTP[matched] != *byte => Server::Other,
                count if count == Screen::HTTP.len() => Server::Http,
                count => Server::Silent(count),
            };
        }
    }

    /// The next bytes of the client: an error when they may not go on.
    pub fn client(&mut self, mut bytes: &[u8]) -> Result<(), Found> {
        if self.is_lifted() {
            return Ok(());
        }
        while let Some((first, rest)) = bytes.split_first() {
            if self.place == Place::Later
                && self.left == 0
                && self.server != Server::Http
                && self.claim.matched.is_none()
            {
                // The rest of this line says nothing.
                let Some(end) = memchr::memchr2(b'\r', b'\n', bytes) else { return Ok(()) };
                self.claim = MAYBE_CLAIM;
                bytes = &bytes[end + 1..];
                continue;
            }
            self.byte(*first)?;
            bytes = rest;
        }
        Ok(())
    }

    fn byte(&mut self, byte: u8) -> Result<(), Found> {
        if self.place != Place::First {
            self.left = self.left.saturating_sub(1);
        }
        match byte {
            b'\n' => {
                self.end_of_line()?;
                if self.place != Place::First {
                    self.claim = MAYBE_CLAIM;
                }
            }
            // For some servers it ends a line by itself.
            b'\r' => {
                self.line.end_word();
                if self.line.says_http() {
                    return Err("a request line");
                }
                if self.line.words > 0 || self.place != Place::First {
                    self.claim = MAYBE_CLAIM;
                }
                self.line.keep(byte);
            }
            byte => {
                self.claim.byte(byte)?;
                if is_blank(byte) {
                    self.line.end_word();
                } else {
                    if self.place == Place::Second && self.line.words == 1 && self.line.within && byte == b':' {
                        return Err("a field behind a target");
                    }
                    self.line.byte(byte, self.place == Place::First);
                }
                self.line.keep(byte);
                if self.line.whole.as_ref().is_some_and(|whole| whole.len() > LONGEST_LINE) {
                    return Err("a request line that does not end");
                }
            }
        }
        Ok(())
    }

    fn end_of_line(&mut self) -> Result<(), Found> {
        self.line.end_word();
        let line = std::mem::take(&mut self.line);
        if line.words == 0 {
            return Ok(());
        }
        let whole = line.whole.as_deref().is_some_and(is_request_line);
        if whole || line.says_http() {
            return Err("a request line");
        }
        self.place = match self.place {
            Place::First if line.target && !line.word.starts_with(b"ICE/") => Place::Second,
            Place::First | Place::Second | Place::Later => Place::Later,
        };
        Ok(())
    }
}

impl Line {
    fn byte(&mut self, byte: u8, first_line: bool) {
        if !self.within {
            self.within = true;
            self.words += 1;
            self.length = 0;
            self.word = [0; WORD];
        }
        if let Some(place) = self.word.get_mut(self.length) {
            *place = byte;
        }
        self.length += 1;
        if self.words == 2 && self.length <= WORD {
            let word = &self.word[..self.length];
            self.target |= word[0] == b'/' || word.eq_ignore_ascii_case(b"http:");
        }
        // The beginning of a first line, for when its first word turns out to be a method.
        if first_line && self.words == 1 {
            if self.length > WORD {
                self.whole = None;
            } else {
                self.whole.get_or_insert_default();
            }
        }
    }

    fn keep(&mut self, byte: u8) {
        if let Some(whole) = &mut self.whole {
            whole.push(byte);
        }
    }

    fn end_word(&mut self) {
        if !std::mem::take(&mut self.within) || self.words != 1 {
            return;
        }
        if self.length > WORD || !is_method(&self.word[..self.length]) {
            self.whole = None;
        }
    }

    /// Whether the line is `... HTTP/x` so far, without a word in front of that being an answer.
    fn says_http(&self) -> bool {
        self.words > 1 && self.word.starts_with(Screen::HTTP)
    }
}

impl Claim {
    fn byte(&mut self, byte: u8) -> Result<(), Found> {
        let Some(matched) = self.matched else { return Ok(()) };
        if matched == 0 && is_blank(byte) {
            return Ok(());
        }
        let byte = if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
        for (alive, name) in self.alive.iter_mut().zip(CLAIMS) {
            *alive &= name.get(matched) == Some(&byte);
            if *alive && matched + 1 == name.len() {
                return Err("a claim of an identity");
            }
        }
        self.matched = self.alive.contains(&true).then_some(matched + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In pieces of every size, all that goes on is before what was found.
    fn found(bytes: &[u8]) -> Option<Found> {
        let whole = Screen::default().client(bytes).err();
        for size in [1, 2, 3, 7] {
            let mut screen = Screen::default();
            let pieces = bytes.chunks(size).map(|piece| screen.client(piece).err()).find(Option::is_some).flatten();
            assert_eq!(pieces, whole, "{} in pieces of {size}", bytes.escape_ascii());
        }
        whole
    }

    #[test]
    fn what_does_not_go_on() {
        const LINE: Option<Found> = Some("a request line");
        const CLAIM: Option<Found> = Some("a claim of an identity");
        let cases: &[(&[u8], Option<Found>)] = &[
            (b"READ / HTTP/1.1\r\n", LINE),
            (b"READ / HTTP/1.1", None),
            (b"READ / HTTP/1.1 \t\r", LINE),
            (b"\0 / HTTP/1.1\n", LINE),
            (b"\xa0GET\x1c/\x85HTTP/1.1\n", LINE),
            (b"GET\r/\rHTTP/1.1\r\n", LINE),
            (b"\n\n \tGET /\n", LINE),
            (b" GET key\r\n", LINE),
            (b"ruok\nGET / HTTP/1.1\r\n", LINE),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\nGET / HTTP/1.1\r\n", LINE),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x50\0\x50GET / HTTP/1.1\r\n", LINE),
            (b"FOO /x y\r\nHost: a\r\n", Some("a field behind a target")),
            (b"FOO /x y\r\nX-Outrigger-Identity : a\r\n", CLAIM),
            (b"FOO x y\rx_outrigger_identity", CLAIM),
            (b"foo\n\n  x-Forwarded_client-CERT", CLAIM),
            // What programs say.
            (b"set /k 0 0 5\r\nhello\r\n", None),
            (b"get /k\r\nget k\r\n", None),
            (b"OPTIONS rtsp://cam/ RTSP/1.0\r\nCSeq: 1\r\n\r\n", None),
            (b"OPTIONS sip:a@b SIP/2.0\r\nVia: SIP/2.0/TCP c\r\n\r\n", None),
            (b"SOURCE /live ICE/1.0\r\nContent-Type: audio/mpeg\r\n\r\n", None),
            (b"CONNECT\naccept-version:1.2\n\n\0", None),
            (b"CONNECT {\"verbose\":false}\r\nPUB a 1\r\nx\r\n", None),
            (b"0033git-upload-pack /p\0host=git.test\0", None),
            (b"83 <34>1 2026-11-28T14:00:00Z web - - - \"GET / HTTP/1.1\" 200\n", None),
            (b"HTTP/1.1 200 OK\r\n", None),
            (b"x-outrigger-identity: in the first line\r\n", None),
            (b"foo\r\nx-outrigge: a\r\nx-forwarded-for: b\r\n", None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(found(bytes), *expected, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn requests_far_behind_do_not_matter_and_claims_do() {
        let mut upload = b"upload\r\n".to_vec();
        upload.extend(b"a line of a file\n".repeat(LATER_LINES / 16));
        let (mut page, mut claim) = (upload.clone(), upload);
        page.extend_from_slice(b"GET / HTTP/1.1\r\nHost: a\r\n");
        claim.extend_from_slice(b"\nX-Outrigger-Identity: a\r\n");
        assert_eq!((found(&page), found(&claim)), (None, Some("a claim of an identity")));
        let mut answered = Screen::default();
        answered.server(b"HTTP/1.1 200 OK\r\n");
        assert!(answered.client(&page).is_err(), "the server speaks HTTP");
    }

    #[test]
    fn a_long_line_is_looked_at_to_its_end() {
        for (method, ends) in [(&b"FOO"[..], false), (b"GET", true)] {
            let mut line = method.to_vec();
            line.extend_from_slice(b" /");
            line.resize(1024 * 1024, b'a');
            assert_eq!(Screen::default().client(&line).is_err(), ends);
            line.extend_from_slice(b" HTTP/1.1\r\n");
            assert!(Screen::default().client(&line).is_err());
        }
        assert!(Screen::default().client(&[b'a'; 1024 * 1024]).is_ok());
    }

    #[test]
    fn the_server_ends_the_watch() {
        for (said, lifted) in
            [(&b""[..], false), (b"HT", false), (b"HTTP/", false), (b"imok", true), (b"HTTQ", true), (b"\0", true)]
        {
            for size in [1, 5] {
                let mut screen = Screen::default();
                said.chunks(size).for_each(|piece| screen.server(piece));
                assert_eq!(screen.is_lifted(), lifted, "{said:?}");
                assert_eq!(screen.client(b"\nGET / HTTP/1.1\r\n").is_ok(), lifted);
            }
        }
    }
}
