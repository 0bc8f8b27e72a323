//! Reads the header blocks that a peer sends, below the library, and marks the streams whose blocks break a rule that the
//! library does not hold: RFC 9113 section 8.1 forbids pseudo-header fields in trailers, and section 8.3.1 says what `:path`
//! and `:scheme` are. It never changes a byte. Whoever takes the stream up looks at its mark ([`Marks::take`]).
//!
//! Blocks are read in the order of the connection and before the library has them, so a mark is there when the stream is.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use super::hpack::{Pseudo, Reader};

const PREFACE: usize = 24;
const HEAD: usize = 9;
/// Larger frames than the default end the connection; we advertise no other.
const LARGEST_FRAME: usize = 16 * 1024;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;

/// Marks that may be there at once; more streams than that do not run on a connection.
const MOST_MARKS: usize = 4_096;

pub const PSEUDO_IN_TRAILERS: &str = "pseudo-header fields in trailers";

/// Whose blocks they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sender {
    Client,
    Server,
}

/// What was found, for whoever takes the streams up.
pub struct Marks {
    /// Bytes of a header list that we announced.
    header_list: usize,
    malformed: RefCell<Vec<(u32, &'static str)>>,
    /// Requests whose heads came, in their order, until they are taken up.
    begun: RefCell<VecDeque<u32>>,
    /// The library has everything that came.
    drained: Cell<bool>,
    /// A block could not be followed: no stream is believed any more.
    lost: Cell<bool>,
}

impl Marks {
    /// For a connection on which a header list of so many bytes was announced.
    pub fn new(header_list: u32) -> Rc<Marks> {
        Rc::new(Marks {
            header_list: header_list as usize,
            malformed: RefCell::default(),
            begun: RefCell::default(),
            drained: Cell::default(),
            lost: Cell::default(),
        })
    }

    pub fn header_list(&self) -> usize {
        self.header_list
    }

    /// What is wrong with the stream's head or trailers. An answer whose head is all of it has a mark, too, which means
    /// nothing: a head that ends its stream and trailers look alike from here.
    pub fn take(&self, stream: u32) -> Option<&'static str> {
        if self.lost.get() {
            return Some("a head that cannot be followed came before");
        }
        let mut malformed = self.malformed.borrow_mut();
        if malformed.is_empty() {
            return None;
        }
        let at = malformed.iter().position(|(marked, _)| *marked == stream)?;
        Some(malformed.swap_remove(at).1)
    }

    /// The library gave this request out: how many before it it refused by itself.
    pub fn taken_up(&self, stream: u32) -> usize {
        let mut begun = self.begun.borrow_mut();
        let Some(at) = begun.iter().position(|begun| *begun == stream) else { return 0 };
        begun.drain(..=at);
        at
    }

    /// How many requests the library refused by itself, once it has read everything that came and waits for more.
    pub fn refused(&self) -> usize {
        if !self.drained.get() {
            return 0;
        }
        std::mem::take(&mut *self.begun.borrow_mut()).len()
    }

    /// Told by the byte stream below: whether there is more to read.
    pub fn set_drained(&self, drained: bool) {
        self.drained.set(drained);
    }
}

pub struct Heads {
    sender: Sender,
    /// The head of a frame, as far as it was read.
    head: [u8; HEAD],
    head_read: usize,
    /// Bytes of the preface or of the current frame that are still to come.
    left: usize,
    /// The current frame, if it has a block's bytes and did not come in one piece.
    frame: Vec<u8>,
    /// It has.
    blocks: bool,
    /// A block that has not ended yet.
    open: Option<Open>,
    newest: u32,
    reader: Reader,
    /// The longest block that the library takes.
    longest: usize,
    marks: Rc<Marks>,
    /// A block could not be followed.
    lost: bool,
}

struct Open {
    stream: u32,
    ends_stream: bool,
    block: Vec<u8>,
}

impl Heads {
    pub fn new(sender: Sender, longest: usize, marks: Rc<Marks>) -> Heads {
        Heads {
            sender,
            head: [0; HEAD],
            head_read: 0,
            left: if sender == Sender::Client { PREFACE } else { 0 },
            frame: Vec::new(),
            blocks: false,
            open: None,
            newest: 0,
            reader: Reader::default(),
            longest,
            marks,
            lost: false,
        }
    }

    /// Reads on. False when a block could not be followed: the connection has to end, and until then nothing behind it is
    /// believed. The library mostly ends it by itself; not where the first part of a block is malformed, which it
    /// resets at once, and then asks for no CONTINUATION.
    pub fn heard(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() && !self.lost {
            if self.left > 0 {
                let (piece, behind) = bytes.split_at(self.left.min(bytes.len()));
                bytes = behind;
                self.left -= piece.len();
                if !self.blocks {
                    continue;
                }
                if self.left == 0 && self.frame.is_empty() {
                    self.payload(piece);
                } else {
                    self.frame.extend_from_slice(piece);
                    if self.left == 0 {
                        let frame = std::mem::take(&mut self.frame);
                        self.payload(&frame);
                    }
                }
            } else {
                let (piece, behind) = bytes.split_at((HEAD - self.head_read).min(bytes.len()));
                bytes = behind;
                self.head[self.head_read..self.head_read + piece.len()].copy_from_slice(piece);
                self.head_read += piece.len();
                if self.head_read == HEAD {
                    self.head_read = 0;
                    let [a, b, c, kind, ..] = self.head;
                    self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                    self.blocks = matches!(kind, HEADERS | CONTINUATION);
                    // The library takes none of these.
                    self.lost |= self.blocks && self.left > LARGEST_FRAME;
                    if self.blocks && self.left == 0 {
                        self.payload(&[]);
                    }
                }
            }
        }
        self.marks.lost.set(self.lost);
        !self.lost
    }

    /// A whole frame of HEADERS or CONTINUATION.
    fn payload(&mut self, payload: &[u8]) {
        let [.., kind, flags, a, b, c, d] = self.head;
        let stream = u32::from_be_bytes([a & 0x7f, b, c, d]);
        if kind == HEADERS && depends_on_itself(payload, flags, stream) {
            // The library resets the stream and does not look at its block at all.
            self.lost |= self.open.is_some();
            return;
        }
        let fragment = if kind == HEADERS { fragment(payload, flags) } else { Some(payload) };
        // What is wrong here ends the connection: the library looks at it next.
        let Some(fragment) = fragment.filter(|_| self.open.is_some() == (kind == CONTINUATION)) else {
            self.lost = true;
            return;
        };
        let ended = flags & END_HEADERS != 0;
        let mut open = match self.open.take() {
            None if ended => return self.block(stream, flags & END_STREAM != 0, fragment),
            None => Open { stream, ends_stream: flags & END_STREAM != 0, block: Vec::new() },
            Some(open) => open,
        };
        if open.block.len() + fragment.len() > self.longest.max(LARGEST_FRAME) {
            self.lost = true;
            return;
        }
        open.block.extend_from_slice(fragment);
        if ended {
            self.block(open.stream, open.ends_stream, &open.block);
        } else {
            self.open = Some(open);
        }
    }

    fn block(&mut self, stream: u32, ends_stream: bool, block: &[u8]) {
        let Some(block) = self.reader.read(block) else {
            self.lost = true;
            return;
        };
        let wrong = match self.sender {
            Sender::Client if stream > self.newest => {
                self.newest = stream;
                self.marks.begun.borrow_mut().push_back(stream);
                block.wrong
            }
            Sender::Client => (block.pseudo != Pseudo::NONE).then_some(PSEUDO_IN_TRAILERS),
            Sender::Server if block.pseudo == Pseudo::NONE => None,
            Sender::Server if block.pseudo == Pseudo::STATUS => ends_stream.then_some(PSEUDO_IN_TRAILERS),
            Sender::Server => Some("a request's pseudo-header fields in an answer"),
        };
        if let Some(wrong) = wrong {
            let mut malformed = self.marks.malformed.borrow_mut();
            self.lost |= malformed.len() >= MOST_MARKS;
            malformed.push((stream, wrong));
        }
    }
}

/// A stream error of RFC 7540 (section 5.3.1), which for the library comes before all others of the frame.
fn depends_on_itself(payload: &[u8], flags: u8, stream: u32) -> bool {
    let rest = payload.get(usize::from(flags & PADDED != 0)..).unwrap_or_default();
    let dependency = rest.first_chunk::<5>().map(|[a, b, c, d, _]| u32::from_be_bytes([a & 0x7f, *b, *c, *d]));
    flags & PRIORITY != 0 && dependency == Some(stream) && stream != 0
}

/// The block's part of a HEADERS frame (RFC 9113 section 6.2).
fn fragment(payload: &[u8], flags: u8) -> Option<&[u8]> {
    let (padding, rest) = if flags & PADDED != 0 {
        payload.split_first().map(|(padding, rest)| (usize::from(*padding), rest))?
    } else {
        (0, payload)
    };
    let rest = if flags & PRIORITY != 0 { rest.get(5..)? } else { rest };
    rest.get(..rest.len().checked_sub(padding)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    const REQUEST: &[u8] = &[0x82, 0x86, 0x84];
    const ANSWER: &[u8] = &[0x88];
    const BOTH: u8 = END_HEADERS | END_STREAM;

    /// Reads it in pieces of every size; the streams that were marked, by their order.
    fn marked(sender: Sender, bytes: &[u8]) -> Option<Vec<u32>> {
        let preface = if sender == Sender::Client { PREFACE } else { 0 };
        let bytes = [&vec![b'P'; preface][..], bytes].concat();
        let mut found = Vec::new();
        for piece in [1, 2, 9, 10, 13, bytes.len()] {
            let marks = Marks::new(1 << 16);
            let mut heads = Heads::new(sender, 1 << 16, marks.clone());
            let followed = bytes.chunks(piece).all(|piece| heads.heard(piece));
            found.push(followed.then(|| marks.malformed.borrow().iter().map(|(stream, _)| *stream).collect()));
        }
        assert!(found.iter().all(|one| *one == found[0]), "{found:?}");
        found.swap_remove(0)
    }

    #[test]
    fn what_a_client_may_not_send() {
        let head = |stream| frame(HEADERS, END_HEADERS, stream, REQUEST);
        let field = [0x00, 1, b'a', 1, b'b'];
        let cases: Vec<(&str, Vec<u8>, Vec<u32>)> = vec![
            ("a request", frame(HEADERS, BOTH, 1, REQUEST), vec![]),
            ("trailers", [head(1), frame(HEADERS, BOTH, 1, &field)].concat(), vec![]),
            ("a pseudo-header in trailers", [head(1), frame(HEADERS, BOTH, 1, &[0x82])].concat(), vec![1]),
            ("behind a field", [head(1), frame(HEADERS, BOTH, 1, &[&field[..], &[0x88]].concat())].concat(), vec![1]),
            (
                "in a CONTINUATION",
                [head(1), frame(HEADERS, END_STREAM, 1, &field), frame(CONTINUATION, END_HEADERS, 1, &[0x84])].concat(),
                vec![1],
            ),
            (
                "between others",
                [head(1), head(3), frame(HEADERS, BOTH, 1, &[0x82]), head(5), frame(HEADERS, BOTH, 5, &field)].concat(),
                vec![1],
            ),
            // The library skips the block of the second, whose field must not be in the table.
            (
                "one that depends on itself",
                [
                    frame(HEADERS, BOTH, 1, &[&REQUEST[..2], &[0x44, 2, b'/', b'a']].concat()),
                    frame(HEADERS, BOTH | PRIORITY, 3, &[0, 0, 0, 3, 16, 0x44, 2, b'/', b'#']),
                    frame(HEADERS, BOTH | PRIORITY | PADDED, 5, &[9, 0x80, 0, 0, 5, 16, 0x80]),
                    frame(HEADERS, BOTH, 7, &[0x82, 0x86, 0xbe]),
                ]
                .concat(),
                vec![],
            ),
            ("padded", frame(HEADERS, BOTH | PADDED, 1, &[&[2][..], REQUEST, &[0x82, 0x82]].concat()), vec![]),
            ("a fragment", frame(HEADERS, BOTH, 1, &[0x82, 0x86, 0x04, 3, b'/', b'#', b'a']), vec![1]),
            ("another scheme", frame(HEADERS, BOTH, 1, &[0x82, 0x06, 4, b'f', b'i', b'l', b'e', 0x84]), vec![1]),
            ("with a priority", frame(HEADERS, BOTH | PRIORITY, 1, &[&[0, 0, 0, 0, 16][..], REQUEST].concat()), vec![]),
        ];
        for (name, bytes, expected) in cases {
            assert_eq!(marked(Sender::Client, &bytes), Some(expected), "{name}");
        }
    }

    #[test]
    fn what_a_server_may_not_send() {
        let head = frame(HEADERS, END_HEADERS, 1, ANSWER);
        let cases: Vec<(&str, Vec<u8>, Vec<u32>)> = vec![
            ("an answer", head.clone(), vec![]),
            ("trailers", [head.clone(), frame(HEADERS, BOTH, 1, &[0x00, 1, b'a', 1, b'b'])].concat(), vec![]),
            (":status in trailers", [head.clone(), frame(HEADERS, BOTH, 1, ANSWER)].concat(), vec![1]),
            (":path in trailers", [head, frame(HEADERS, BOTH, 1, &[0x84])].concat(), vec![1]),
            (":path in a head", frame(HEADERS, END_HEADERS, 1, &[0x88, 0x84]), vec![1]),
            // Nobody can tell it from trailers here.
            ("a head alone", frame(HEADERS, BOTH, 1, ANSWER), vec![1]),
        ];
        for (name, bytes, expected) in cases {
            assert_eq!(marked(Sender::Server, &bytes), Some(expected), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_followed() {
        let cases = [
            frame(HEADERS, BOTH, 1, &[0x80]),
            frame(CONTINUATION, END_HEADERS, 1, REQUEST),
            [frame(HEADERS, END_STREAM, 1, REQUEST), frame(HEADERS, BOTH, 3, REQUEST)].concat(),
            // The library resets stream 1 and takes the next.
            [frame(HEADERS, END_STREAM, 1, &[0x82, 0x82]), frame(HEADERS, BOTH, 3, REQUEST)].concat(),
            frame(HEADERS, BOTH | PADDED, 1, &[9, 0x82]),
            frame(HEADERS, BOTH | PADDED, 1, &[]),
            frame(HEADERS, BOTH | PRIORITY, 1, &[0; 4]),
        ];
        for case in cases {
            assert_eq!(marked(Sender::Client, &case), None, "{case:x?}");
            let marks = Marks::new(1 << 16);
            let mut heads = Heads::new(Sender::Client, 1 << 16, marks.clone());
            assert!(!heads.heard(&[&[b'P'; PREFACE][..], &case, &frame(HEADERS, BOTH, 5, REQUEST)].concat()));
            assert!(marks.take(3).is_some() && marks.take(5).is_some(), "nothing behind it is believed: {case:x?}");
        }
    }

    #[test]
    fn requests_that_the_library_refused_are_counted() {
        let marks = Marks::new(1 << 16);
        let mut heads = Heads::new(Sender::Client, 1 << 16, marks.clone());
        heads.heard(&[b'P'; PREFACE]);
        for stream in [1, 3, 5, 9] {
            heads.heard(&frame(HEADERS, BOTH, stream, REQUEST));
        }
        assert_eq!((marks.taken_up(1), marks.taken_up(5)), (0, 1));
        assert_eq!(marks.refused(), 0, "it may still come");
        marks.set_drained(true);
        assert_eq!((marks.refused(), marks.refused()), (1, 0));
    }
}
