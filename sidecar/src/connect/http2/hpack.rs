//! As much of HPACK (RFC 7541) as it takes to see what the library drops without a word: the pseudo-header fields of a
//! trailer section, a fragment in `:path`, a scheme without an authority. Values of regular fields are measured and never
//! kept. Pure; called by `heads` with whole header blocks. Where it cannot follow a block, the connection must end: the
//! dynamic table is then no longer the library's.

use std::collections::VecDeque;

/// The pseudo-header fields of a block, as a set.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pseudo(u8);

impl Pseudo {
    pub const NONE: Pseudo = Pseudo(0);
    pub const AUTHORITY: Pseudo = Pseudo(1);
    pub const METHOD: Pseudo = Pseudo(1 << 1);
    pub const PATH: Pseudo = Pseudo(1 << 2);
    pub const SCHEME: Pseudo = Pseudo(1 << 3);
    pub const STATUS: Pseudo = Pseudo(1 << 4);
    /// `:protocol`, or one that nobody knows.
    pub const OTHER: Pseudo = Pseudo(1 << 5);

    fn of(name: &[u8]) -> Pseudo {
        match name {
            b":authority" => Pseudo::AUTHORITY,
            b":method" => Pseudo::METHOD,
            b":path" => Pseudo::PATH,
            b":scheme" => Pseudo::SCHEME,
            b":status" => Pseudo::STATUS,
            [b':', ..] => Pseudo::OTHER,
            _ => Pseudo::NONE,
        }
    }

    fn with(self, other: Pseudo) -> Pseudo {
        Pseudo(self.0 | other.0)
    }
}

/// What one header block has.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Block {
    pub pseudo: Pseudo,
    /// What is wrong with the value of a pseudo-header field, where the library would not say so.
    pub wrong: Option<&'static str>,
}

/// Reads the blocks of one direction of a connection, in their order.
#[derive(Default)]
pub struct Reader {
    /// The newest first.
    entries: VecDeque<Entry>,
    size: usize,
    /// What the peer reduced the table to, if it did.
    reduced: Option<usize>,
    text: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Entry {
    name: Name,
    wrong: Option<&'static str>,
    size: usize,
}

#[derive(Clone, Copy)]
struct Name {
    pseudo: Pseudo,
    length: usize,
}

/// SETTINGS_HEADER_TABLE_SIZE where nobody says otherwise; we never do.
const TABLE: usize = 4096;
/// What an entry takes beside its name and value (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;

impl Reader {
    /// None for a block that is not HPACK.
    pub fn read(&mut self, mut rest: &[u8]) -> Option<Block> {
        let mut block = Block::default();
        while let Some(first) = rest.first() {
            let (pseudo, wrong) = match first {
                0x80.. => self.indexed(integer(&mut rest, 7)?)?,
                0x40.. => self.literal(&mut rest, 6, true)?,
                0x20.. => {
                    self.reduce(integer(&mut rest, 5)?)?;
                    continue;
                }
                _ => self.literal(&mut rest, 4, false)?,
            };
            block.pseudo = block.pseudo.with(pseudo);
            block.wrong = block.wrong.or(wrong);
        }
        Some(block)
    }

    fn indexed(&self, index: usize) -> Option<(Pseudo, Option<&'static str>)> {
        if let Some(entry) = index.checked_sub(STATIC.len()).and_then(|index| self.entries.get(index)) {
            return Some((entry.name.pseudo, entry.wrong));
        }
        self.name(index).map(|name| (name.pseudo, None))
    }

    fn name(&self, index: usize) -> Option<Name> {
        match index {
            0 => None,
            1..STATICS => {
                let pseudo = match index {
                    1 => Pseudo::AUTHORITY,
                    2 | 3 => Pseudo::METHOD,
                    4 | 5 => Pseudo::PATH,
                    6 | 7 => Pseudo::SCHEME,
                    8..=14 => Pseudo::STATUS,
                    _ => Pseudo::NONE,
                };
                Some(Name { pseudo, length: STATIC[index].into() })
            }
            _ => self.entries.get(index - STATICS).map(|entry| entry.name),
        }
    }

    fn literal(&mut self, rest: &mut &[u8], prefix: u8, kept: bool) -> Option<(Pseudo, Option<&'static str>)> {
        let name = match integer(rest, prefix)? {
            0 => {
                let name = Text::read(rest)?;
                if name.begins_with_colon() {
                    let name = name.decode(&mut self.text)?;
                    Name { pseudo: Pseudo::of(name), length: name.len() }
                } else {
                    Name { pseudo: Pseudo::NONE, length: if kept { name.length()? } else { 0 } }
                }
            }
            index => self.name(index)?,
        };
        let value = Text::read(rest)?;
        let wrong = match name.pseudo {
            Pseudo::PATH => value.decode(&mut self.text)?.contains(&b'#').then_some("a fragment in :path"),
            Pseudo::SCHEME => {
                let scheme = value.decode(&mut self.text)?;
                let known = scheme.eq_ignore_ascii_case(b"http") || scheme.eq_ignore_ascii_case(b"https");
                (!known).then_some("a scheme that is neither http nor https")
            }
            _ => None,
        };
        if kept {
            self.keep(Entry { name, wrong, size: OVERHEAD + name.length + value.length()? });
        }
        Some((name.pseudo, wrong))
    }

    fn most(&self) -> usize {
        self.reduced.unwrap_or(TABLE)
    }

    fn keep(&mut self, entry: Entry) {
        self.evict(entry.size);
        // One that is larger than the table leaves it empty (RFC 7541 section 4.4).
        if entry.size <= self.most() {
            self.size += entry.size;
            self.entries.push_front(entry);
        }
    }

    /// Makes room for so many bytes.
    fn evict(&mut self, room: usize) {
        while self.size + room > self.most() {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.size;
        }
    }

    fn reduce(&mut self, size: usize) -> Option<()> {
        if size > TABLE {
            return None;
        }
        self.reduced = Some(size);
        self.evict(0);
        Some(())
    }
}

/// An integer behind a prefix of so many bits (RFC 7541 section 5.1), of five bytes at most, as the library has it.
fn integer(rest: &mut &[u8], prefix: u8) -> Option<usize> {
    const LONGEST: usize = 4;
    let (first, mut tail) = rest.split_first()?;
    let most = (1 << prefix) - 1;
    let mut value = usize::from(*first) & most;
    if value == most {
        for index in 0.. {
            let (byte, behind) = tail.split_first()?;
            tail = behind;
            value += usize::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                break;
            }
            if index + 1 == LONGEST {
                return None;
            }
        }
    }
    *rest = tail;
    Some(value)
}

/// A string as it is written.
#[derive(Clone, Copy)]
struct Text<'a> {
    bytes: &'a [u8],
    huffman: bool,
}

impl<'a> Text<'a> {
    fn read(rest: &mut &'a [u8]) -> Option<Text<'a>> {
        let huffman = rest.first()? & 0x80 != 0;
        let length = integer(rest, 7)?;
        let (bytes, behind) = rest.split_at_checked(length)?;
        *rest = behind;
        Some(Text { bytes, huffman })
    }

    fn begins_with_colon(self) -> bool {
        /// The code of `:` has seven bits.
        const COLON: u8 = 0b101_1100;
        let first = self.bytes.first();
        first.is_some_and(|first| if self.huffman { first >> 1 == COLON } else { *first == b':' })
    }

    fn length(self) -> Option<usize> {
        if self.huffman { decode(self.bytes, |_| {}) } else { Some(self.bytes.len()) }
    }

    fn decode<'b>(self, into: &'b mut Vec<u8>) -> Option<&'b [u8]>
    where
        'a: 'b,
    {
        if !self.huffman {
            return Some(self.bytes);
        }
        into.clear();
        decode(self.bytes, |symbol| into.push(symbol))?;
        Some(into)
    }
}

/// Decodes a string (RFC 7541 section 5.2) and says how long it is. The code is canonical: the codes of one length follow
/// each other, so that a comparison per length finds the symbol.
fn decode(bytes: &[u8], mut each: impl FnMut(u8)) -> Option<usize> {
    let (mut bits, mut have, mut length) = (0_u64, 0_u32, 0);
    let mut rest = bytes.iter();
    loop {
        while have <= 32 {
            let Some(byte) = rest.next() else { break };
            bits |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        // What is not there counts as ones, of which the padding consists.
        let window = u32::try_from((bits | (u64::MAX >> have)) >> 32).unwrap_or(u32::MAX);
        if have < 8 && window == u32::MAX {
            return Some(length);
        }
        let row = ROWS.iter().find(|row| window <= row.last)?;
        if row.bits > have {
            return None;
        }
        let behind = (window - row.first) >> (32 - row.bits);
        each(*SYMBOLS.get(row.index + usize::try_from(behind).unwrap_or(usize::MAX))?);
        length += 1;
        bits <<= row.bits;
        have -= row.bits;
    }
}

/// The codes of one length, at the upper end of 32 bits.
#[derive(Clone, Copy)]
struct Row {
    bits: u32,
    first: u32,
    last: u32,
    /// Where its symbols begin.
    index: usize,
}

/// Lengths of codes and how many there are; the last one of 30 bits is the end of a string, which no string has.
const LENGTHS: [(u32, u32); 21] = [
    (5, 10),
    (6, 26),
    (7, 32),
    (8, 6),
    (10, 5),
    (11, 3),
    (12, 2),
    (13, 6),
    (14, 2),
    (15, 3),
    (19, 3),
    (20, 8),
    (21, 13),
    (22, 26),
    (23, 29),
    (24, 12),
    (25, 4),
    (26, 15),
    (27, 19),
    (28, 29),
    (30, 4),
];

const ROWS: [Row; LENGTHS.len()] = rows();

const fn rows() -> [Row; LENGTHS.len()] {
    let mut rows = [Row { bits: 0, first: 0, last: 0, index: 0 }; LENGTHS.len()];
    let (mut at, mut first, mut index) = (0, 0_u64, 0);
    while at < LENGTHS.len() {
        let (bits, count) = LENGTHS[at];
        let next = first + ((count as u64) << (32 - bits));
        rows[at] = Row { bits, first: low(first), last: low(next - 1), index };
        first = next;
        index += count as usize;
        at += 1;
    }
    rows
}

#[expect(clippy::cast_possible_truncation, reason = "codes are at the upper end of 32 bits")]
const fn low(code: u64) -> u32 {
    code as u32
}

/// Symbols in the order of their codes (RFC 7541 appendix B).
#[rustfmt::skip]
const SYMBOLS: [u8; 256] = [
    48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57, 61, 65, 95, 98, 100,
    102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81,
    82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119, 120, 121, 122, 38, 42, 44, 59, 88, 90, 33, 34, 40, 41, 63, 39,
    43, 124, 35, 62, 0, 36, 64, 91, 93, 126, 94, 125, 60, 96, 123, 92, 195, 208, 128, 130, 131, 162, 184, 194, 224,
    226, 153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154, 156, 160,
    163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1, 135, 137, 138, 139, 140,
    141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180, 182, 183, 188, 191, 197, 231, 239,
    9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237, 199, 207, 234, 235, 192, 193, 200, 201, 202, 205, 210,
    213, 218, 219, 238, 240, 242, 243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250,
    251, 252, 253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    127, 220, 249, 10, 13, 22,
];

const STATICS: usize = STATIC.len();

/// Lengths of the names of the static table (RFC 7541 appendix A), from index 1.
#[rustfmt::skip]
const STATIC: [u8; 62] = [
    0, 10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13, 12, 6, 4,
    4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn huffman(text: &[u8]) -> Vec<u8> {
        let (mut bits, mut have, mut out) = (0_u64, 0, Vec::new());
        for byte in text {
            let at = SYMBOLS.iter().position(|symbol| symbol == byte).unwrap();
            let row = ROWS.iter().rev().find(|row| row.index <= at).unwrap();
            let code = (row.first >> (32 - row.bits)) as u64 + (at - row.index) as u64;
            bits = bits << row.bits | code;
            have += row.bits;
            while have >= 8 {
                have -= 8;
                out.push((bits >> have) as u8);
            }
        }
        if have > 0 {
            out.push((bits << (8 - have)) as u8 | ((1 << (8 - have)) - 1));
        }
        out
    }

    fn text(text: &[u8], packed: bool) -> Vec<u8> {
        let (bytes, first) = if packed { (huffman(text), 0x80) } else { (text.to_vec(), 0) };
        assert!(bytes.len() < 127);
        [&[first | u8::try_from(bytes.len()).unwrap()][..], &bytes].concat()
    }

    #[test]
    fn huffman_is_the_one_of_the_rfc() {
        // RFC 7541 appendix C.4.1 and C.6.1.
        assert_eq!(
            huffman(b"www.example.com"),
            [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff]
        );
        assert_eq!(huffman(b"private"), [0xae, 0xc3, 0x77, 0x1a, 0x4b]);
        let all: Vec<u8> = (0..=255).collect();
        for count in 0..=256 {
            let mut decoded = Vec::new();
            assert_eq!(decode(&huffman(&all[..count]), |symbol| decoded.push(symbol)), Some(count));
            assert_eq!(decoded, all[..count]);
        }
        // The end of a string, padding of eight bits, padding with zeros.
        for wrong in [&[0xff, 0xff, 0xff, 0xff][..], &[0xff], &[0x00, 0x00]] {
            assert_eq!(decode(wrong, |_| {}), None, "{wrong:x?}");
        }
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // Appendix C.4: three requests, the second and third by the table that the ones before filled.
        let requests: [&[u8]; 3] = [
            &[0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff],
            &[0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf],
            &[
                0x82, 0x87, 0x85, 0xbf, 0x40, 0x88, 0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f, 0x89, 0x25, 0xa8,
                0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf,
            ],
        ];
        let mut reader = Reader::default();
        let all = Pseudo::AUTHORITY.with(Pseudo::METHOD).with(Pseudo::PATH).with(Pseudo::SCHEME);
        for (request, size) in requests.into_iter().zip([57, 110, 164]) {
            assert_eq!(reader.read(request), Some(Block { pseudo: all, wrong: None }));
            assert_eq!(reader.size, size);
        }
    }

    #[test]
    fn the_table_is_followed() {
        for packed in [false, true] {
            let mut reader = Reader::default();
            let literal = |first: u8, name: &[u8], value: &[u8]| {
                let name = if name.is_empty() { Vec::new() } else { text(name, packed) };
                [&[first][..], &name, &text(value, packed)].concat()
            };
            assert_eq!(reader.read(&literal(0x44, b"", b"/a#b")).unwrap().wrong, Some("a fragment in :path"));
            assert_eq!(reader.read(&[0xbe]).unwrap().wrong, Some("a fragment in :path"), "out of the table");
            assert_eq!(reader.read(&literal(0x7e, b"", b"/a")).unwrap(), Block { pseudo: Pseudo::PATH, wrong: None });
            assert_eq!(reader.read(&literal(0x40, b":scheme", b"file")).unwrap().pseudo, Pseudo::SCHEME);
            assert!(reader.read(&[0xbe]).unwrap().wrong.is_some());
            assert_eq!(reader.read(&literal(0x40, b"x-a", b"b")).unwrap(), Block::default());
            assert_eq!(reader.read(&[0xbe]).unwrap(), Block::default());
            assert_eq!(reader.read(&[0xbf]).unwrap().pseudo, Pseudo::SCHEME);
            assert_eq!(reader.read(&[0xc1]).unwrap().wrong, Some("a fragment in :path"), "the oldest");
            assert!(reader.read(&[0xc2]).is_none(), "beyond it");
            // Without room nothing stays; with it again, nothing comes back.
            assert!(reader.read(&[0x20]).is_some());
            assert!(reader.read(&[0xbe]).is_none());
            assert!(reader.read(&[0x3f, 0xe1, 0x1f]).is_some());
            assert!(reader.read(&[0x3f, 0xe2, 0x1f]).is_none(), "4097");
        }
    }

    #[test]
    fn what_is_no_block() {
        let cases: [&[u8]; 8] = [
            &[0x80],
            &[0xff],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0x00],
            &[0x00, 0x01],
            &[0x00, 0x01, b'a', 0x02, b'b'],
            &[0x40, 0x81, 0xff, 0x00],
            &[0x7f],
        ];
        for case in cases {
            assert_eq!(Reader::default().read(case), None, "{case:x?}");
        }
    }
}
