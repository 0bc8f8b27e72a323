//! HTTP/2 written byte by byte, so that a test can send what no library would: frames, HPACK literals without
//! indexing, and a client that hears what comes back while it sends.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_tests::{Connection, eventually};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::task::JoinHandle;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

pub const ENHANCE_YOUR_CALM: u32 = 11;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [id.to_be_bytes().as_slice(), &value.to_be_bytes()].concat()
}

/// A field, as a literal without indexing and without Huffman (RFC 7541 section 6.2.2).
pub fn literal(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        integer(&mut field, 0, 7, text.len());
        field.extend_from_slice(text);
    }
    field
}

/// An integer with a prefix of so many bits (RFC 7541 section 5.1).
pub fn integer(into: &mut Vec<u8>, first: u8, bits: u8, value: usize) {
    let most = (1 << bits) - 1;
    if value < most {
        into.push(first | u8::try_from(value).unwrap());
        return;
    }
    into.push(first | u8::try_from(most).unwrap());
    let mut rest = value - most;
    while rest >= 128 {
        into.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    into.push(u8::try_from(rest).unwrap());
}

pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| literal(name.as_bytes(), value.as_bytes())).collect()
}

/// The pseudo-header fields of a request that nothing is wrong with.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    block(&[(":method", method), (":scheme", "http"), (":authority", "catalog.shop"), (":path", path)])
}

/// HEADERS of a whole request without a body.
pub fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, request("GET", path))
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub goaway: Option<u32>,
    /// Stream and code.
    pub resets: Vec<(u32, u32)>,
    /// Stream and the first byte of its head, which is the whole status for the common ones.
    pub heads: Vec<(u32, u8)>,
    /// Stream and length.
    pub data: Vec<(u32, usize)>,
    /// Streams that ended with END_STREAM.
    pub whole: Vec<u32>,
    pub pongs: usize,
    pub settings_acks: usize,
    /// The connection was closed.
    pub ended: bool,
}

impl Heard {
    pub fn reset(&self, stream: u32) -> Option<u32> {
        self.resets.iter().find(|(id, _)| *id == stream).map(|(_, code)| *code)
    }

    /// The static-table index of `:status 200`.
    pub fn answered_200(&self, stream: u32) -> bool {
        self.heads.contains(&(stream, 0x88))
    }

    /// It has ended, in one way or the other.
    pub fn is_over(&self, stream: u32) -> bool {
        self.ended || self.goaway.is_some() || self.reset(stream).is_some() || self.whole.contains(&stream)
    }

    /// Answered from the head to the end.
    pub fn answered_whole(&self, stream: u32) -> bool {
        self.answered_200(stream) && self.whole.contains(&stream) && self.reset(stream).is_none()
    }

    pub fn head(&self, stream: u32) -> Option<u8> {
        self.heads.iter().find(|(id, _)| *id == stream).map(|(_, first)| *first)
    }

    /// The peer has dealt with this stream or with the connection.
    pub fn is_settled(&self, stream: u32) -> bool {
        self.ended || self.goaway.is_some() || self.reset(stream).is_some() || self.head(stream).is_some()
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A client that sends what it is told and hears all the while.
pub struct Client {
    writer: WriteHalf<Box<dyn Io>>,
    heard: Arc<Mutex<Heard>>,
    reader: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Client {
    /// Preface, these settings, and the acknowledgement of the other side's.
    pub async fn open(connection: Connection, settings: &[u8]) -> Client {
        let mut client = Client::raw(connection, true);
        client.send(PREFACE).await;
        client.send(frame(SETTINGS, 0, 0, settings)).await;
        client.send(frame(SETTINGS, ACK, 0, [])).await;
        client
    }

    /// Nothing was sent yet. Without `hears` nothing is ever read.
    pub fn raw(connection: Connection, hears: bool) -> Client {
        let (io, _) = connection.into_parts();
        let io: Box<dyn Io> = match io {
            Ok(tcp) => Box::new(tcp),
            Err(tls) => tls,
        };
        let (reader, writer) = tokio::io::split(io);
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let reader = tokio::spawn({
            let heard = heard.clone();
            async move {
                if !hears {
                    let _keep = reader;
                    return std::future::pending().await;
                }
                hear(reader, heard).await;
            }
        });
        Client { writer, heard, reader }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await;
    }

    /// False when the other side is gone, or takes nothing for a second.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        let sending = async {
            self.writer.write_all(bytes.as_ref()).await?;
            self.writer.flush().await
        };
        matches!(tokio::time::timeout(Duration::from_secs(1), sending).await, Ok(Ok(())))
    }

    /// Looks at what came back so far, without a copy.
    pub fn has(&self, look: impl FnOnce(&Heard) -> bool) -> bool {
        look(&self.heard.lock().unwrap())
    }

    pub fn heard(&self) -> Heard {
        self.heard.lock().unwrap().clone()
    }

    /// Waits until what came back is so.
    pub async fn until(&self, what: &str, mut check: impl FnMut(&Heard) -> bool) -> Heard {
        let found = eventually(what, async || {
            let heard = self.heard();
            check(&heard).then_some(heard)
        });
        found.await
    }
}

async fn hear(mut reader: impl AsyncRead + Unpin, heard: Arc<Mutex<Heard>>) {
    loop {
        let mut head = [0; 9];
        let whole = async {
            reader.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            reader.read_exact(&mut payload).await?;
            Ok::<_, std::io::Error>(payload)
        };
        let Ok(payload) = whole.await else {
            heard.lock().unwrap().ended = true;
            return;
        };
        let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
        let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        let mut heard = heard.lock().unwrap();
        if matches!(head[3], DATA | HEADERS) && head[4] & END_STREAM != 0 {
            heard.whole.push(stream);
        }
        match head[3] {
            DATA => heard.data.push((stream, payload.len())),
            HEADERS => heard.heads.push((stream, payload[0])),
            RST_STREAM => heard.resets.push((stream, code(0))),
            SETTINGS if head[4] & ACK != 0 => heard.settings_acks += 1,
            PING if head[4] & ACK != 0 => heard.pongs += 1,
            // The last one counts: a graceful end begins with another.
            GOAWAY => heard.goaway = Some(code(4)),
            _ => {}
        }
    }
}
