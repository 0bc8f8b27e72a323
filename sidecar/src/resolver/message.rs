//! The wire format of DNS, as much of it as a resolver needs that forwards bytes as they are (RFC 1035 section 4, RFC 6891,
//! RFC 9619): a question is read, and an answer of our own is written, whose records are never compressed but for their
//! owner. Called for every message that comes in; pure, and nothing in it follows a pointer.

use std::net::IpAddr;

/// Bytes of a header.
pub const HEADER: usize = 12;
/// What a client takes over UDP that says nothing (RFC 1035 section 4.2.1).
const PLAIN_UDP: u16 = 512;
/// What we say that we take, and the most that we send over UDP: passes every network without fragments.
const OUR_UDP: u16 = 1232;

pub const A: u16 = 1;
const SOA: u16 = 6;
pub const AAAA: u16 = 28;
const OPT: u16 = 41;
const IXFR: u16 = 251;
const AXFR: u16 = 252;
pub const ANY: u16 = 255;
const IN: u16 = 1;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const RA: u8 = 0x80;
const CD: u8 = 0x10;
/// DNSSEC OK, in the flags of OPT: an answer repeats it (RFC 3225 section 3).
const DO: u16 = 0x8000;

/// Response codes; those above 15 need EDNS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// Why a question got no answer, for people who look at it with `dig` (RFC 8914).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extended {
    /// No upstream answered, or there is none.
    NoReachableAuthority = 22,
    /// An upstream could not be talked to.
    NetworkError = 23,
}

/// One question as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query<'a> {
    /// The whole message.
    pub bytes: &'a [u8],
    /// Name, type and class as they are spelled in it.
    pub question: &'a [u8],
    pub kind: u16,
    edns: Option<Edns>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Edns {
    udp: u16,
    version: u8,
    flags: u16,
}

/// What a message that came in is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry<'a> {
    Question(Query<'a>),
    /// Not for us to answer or forward; this is to be said.
    Refusal(Vec<u8>),
    /// Not even a header, or an answer: whoever answers answers is in a loop.
    Noise,
}

/// Reads a message.
pub fn read(bytes: &[u8]) -> Entry<'_> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Entry::Noise };
    if header[2] & QR != 0 {
        return Entry::Noise;
    }
    if header[2] & OPCODE != 0 {
        return Entry::Refusal(bare(header, Code::NotImp));
    }
    let Some(query) = parse(bytes, header, rest) else { return Entry::Refusal(bare(header, Code::FormErr)) };
    let class = query.question.last_chunk::<2>().map_or(0, |class| u16::from_be_bytes(*class));
    if query.edns.is_some_and(|edns| edns.version != 0) {
        Entry::Refusal(query.failure(Code::BadVers, None))
    } else if class != IN {
        Entry::Refusal(query.failure(Code::NotImp, None))
    } else if matches!(query.kind, AXFR | IXFR) {
        // A whole zone is no one message.
        Entry::Refusal(query.failure(Code::Refused, None))
    } else {
        Entry::Question(query)
    }
}

fn parse<'a>(bytes: &'a [u8], header: &[u8; HEADER], rest: &'a [u8]) -> Option<Query<'a>> {
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    // More than one is nothing that anybody agrees upon (RFC 9619).
    if count(4) != 1 {
        return None;
    }
    let name = question_name(rest)?;
    let (question, mut rest) = rest.split_at_checked(name + 4)?;
    let kind = u16::from_be_bytes([question[name], question[name + 1]]);
    let mut edns = None;
    for section in [6, 8, 10] {
        for _ in 0..count(section) {
            let (record, behind) = record(rest)?;
            if section == 10 && record.kind == OPT {
                // One at most, of the root (RFC 6891 section 6.1.1).
                if edns.is_some() || rest.first() != Some(&0) {
                    return None;
                }
                let [_, version, high, low] = record.ttl;
                edns = Some(Edns { udp: record.class, version, flags: u16::from_be_bytes([high, low]) });
            }
            rest = behind;
        }
    }
    rest.is_empty().then_some(Query { bytes, question, kind, edns })
}

/// The length of a name that begins a message's body: there is nothing before it that it could point to.
fn question_name(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        at += 1 + length;
        if length > 63 || at > 255 {
            return None;
        }
        if length == 0 {
            return Some(at);
        }
    }
}

struct Record {
    kind: u16,
    class: u16,
    ttl: [u8; 4],
}

/// The first record of these, and what is behind it. Its name is passed over, a pointer with it: pointers are not followed.
fn record(bytes: &[u8]) -> Option<(Record, &[u8])> {
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        match length {
            0 => at += 1,
            1..=63 => {
                at += 1 + length;
                continue;
            }
            0xC0.. => at += 2,
            _ => return None,
        }
        break;
    }
    let (fixed, rest) = bytes.get(at..)?.split_first_chunk::<10>()?;
    let [kind, more, class, less, ttl @ .., high, low] = *fixed;
    let (_, behind) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
    let [first, second, third, fourth] = ttl;
    let record = Record {
        kind: u16::from_be_bytes([kind, more]),
        class: u16::from_be_bytes([class, less]),
        ttl: [first, second, third, fourth],
    };
    Some((record, behind))
}

/// How many bytes an answer may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Udp,
    Tcp,
}

impl Query<'_> {
    pub fn id(&self) -> u16 {
        id(self.bytes)
    }

    /// The name as text, without its last dot and in its own spelling; None of what has a character that no service's name
    /// has. The root is empty.
    pub fn name(&self) -> Option<String> {
        let mut labels = &self.question[..self.question.len() - 4];
        let mut text = String::new();
        while let Some((length, rest)) = labels.split_first().filter(|(length, _)| **length != 0) {
            let (label, behind) = rest.split_at_checked(usize::from(*length))?;
            if !label.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-') {
                return None;
            }
            if !text.is_empty() {
                text.push('.');
            }
            text.extend(label.iter().map(|byte| char::from(*byte)));
            labels = behind;
        }
        Some(text)
    }

    /// The answer with those of these addresses that were asked for, as many as `transport` holds; where there are fewer, it
    /// says so. None of the kind is a denial that may be remembered for `denial` seconds.
    pub fn answer(&self, ips: &[IpAddr], ttl: u32, denial: u32, transport: Transport) -> Vec<u8> {
        let most = match (transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => PLAIN_UDP.into(),
            (Transport::Udp, Some(edns)) => edns.udp.clamp(PLAIN_UDP, OUR_UDP).into(),
        };
        let reserved = self.edns.map_or(0, |_| 11);
        let mut message = self.begin(Code::NoError);
        message[2] |= AA;
        let (mut count, mut is_whole) = (0u16, true);
        for ip in ips {
            let (kind, address): (u16, &[u8]) = match ip {
                IpAddr::V4(ip) => (A, &ip.octets()),
                IpAddr::V6(ip) => (AAAA, &ip.octets()),
            };
            if self.kind != kind && self.kind != ANY {
                continue;
            }
            if message.len() + HEADER + address.len() + reserved > most {
                is_whole = false;
                break;
            }
            push_record(&mut message, kind, ttl, address);
            count += 1;
        }
        message[6..8].copy_from_slice(&count.to_be_bytes());
        if !is_whole && transport == Transport::Udp {
            message[2] |= TC;
        }
        if count == 0 && is_whole {
            // Its own name server (the owner, by a pointer), of nobody (the root): serial, refresh, retry, expire, minimum.
            let mut soa = vec![0xC0, HEADER as u8, 0];
            for number in [1, denial, denial, denial, denial] {
                soa.extend(number.to_be_bytes());
            }
            push_record(&mut message, SOA, denial, &soa);
            message[9] = 1;
        }
        self.end(message, Code::NoError, None)
    }

    /// An answer without records.
    pub fn failure(&self, code: Code, why: Option<Extended>) -> Vec<u8> {
        self.end(self.begin(code), code, why)
    }

    fn begin(&self, code: Code) -> Vec<u8> {
        let mut message = self.bytes[..HEADER].to_vec();
        message[2] = QR | (message[2] & RD);
        message[3] = RA | (message[3] & CD) | (code as u8 & 0x0F);
        message[4..HEADER].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(self.question);
        message
    }

    /// Who spoke EDNS is answered in it (RFC 6891 section 7).
    fn end(&self, mut message: Vec<u8>, code: Code, why: Option<Extended>) -> Vec<u8> {
        let Some(edns) = self.edns else { return message };
        message[11] = 1;
        message.push(0);
        message.extend(OPT.to_be_bytes());
        message.extend(OUR_UDP.to_be_bytes());
        message.extend([code as u8 >> 4, 0]);
        message.extend((edns.flags & DO).to_be_bytes());
        match why {
            None => message.extend([0, 0]),
            // Length of the options; option 15 with two bytes.
            Some(why) => message.extend([0, 6, 0, 15, 0, 2, 0, why as u8]),
        }
        message
    }
}

/// Owner is the question's name, by a pointer.
fn push_record(message: &mut Vec<u8>, kind: u16, ttl: u32, data: &[u8]) {
    message.extend([0xC0, HEADER as u8]);
    message.extend(kind.to_be_bytes());
    message.extend(IN.to_be_bytes());
    message.extend(ttl.to_be_bytes());
    message.extend((data.len() as u16).to_be_bytes());
    message.extend_from_slice(data);
}

/// An answer to what could not be read beyond its header.
fn bare(header: &[u8; HEADER], code: Code) -> Vec<u8> {
    let mut message = header.to_vec();
    message[2] = QR | (message[2] & (OPCODE | RD));
    message[3] = RA | (code as u8 & 0x0F);
    message[4..HEADER].fill(0);
    message
}

/// The id of a message; 0 of what is too short to have one.
pub fn id(bytes: &[u8]) -> u16 {
    bytes.first_chunk::<2>().map_or(0, |id| u16::from_be_bytes(*id))
}

/// The same message under another id.
pub fn with_id(mut bytes: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(place) = bytes.first_chunk_mut::<2>() {
        *place = id.to_be_bytes();
    }
    bytes
}

/// What an upstream's message is to the question that it was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answered {
    /// To be passed on.
    Yes,
    /// The server will not or cannot; another one may.
    Unwilling,
    /// Of another question, or of nobody who was asked.
    No,
}

/// Whether an upstream's message answers `question`, sent as `id`. Servers keep the question's spelling or do not.
pub fn answers(bytes: &[u8], sent: u16, question: &[u8]) -> Answered {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Answered::No };
    let code = header[3] & 0x0F;
    let unwilling = [Code::FormErr, Code::ServFail, Code::NotImp, Code::Refused].map(|code| code as u8).contains(&code);
    // Who could not read the question cannot repeat it.
    let repeats = match u16::from_be_bytes([header[4], header[5]]) {
        1 => rest.get(..question.len()).is_some_and(|own| own.eq_ignore_ascii_case(question)),
        0 => unwilling,
        _ => false,
    };
    if header[2] & QR == 0 || header[2] & OPCODE != 0 || id(bytes) != sent || !repeats {
        Answered::No
    } else if unwilling {
        Answered::Unwilling
    } else {
        Answered::Yes
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
