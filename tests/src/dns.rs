//! DNS for tests: a [`NameServer`] that says what a test wants, as upstream of a resolver, and a client that sends bytes and
//! reads answers apart. Knows nothing of the resolver's own reading and writing of messages.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::eventually::soon;

pub const A: u16 = 1;
pub const SOA: u16 = 6;
pub const MX: u16 = 15;
pub const AAAA: u16 = 28;
pub const OPT: u16 = 41;
pub const HTTPS: u16 = 65;

/// A question with this id, name (in its own spelling) and type; recursion is desired.
pub fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = [id.to_be_bytes(), [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]].concat();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend([kind.to_be_bytes(), [0, 1]].concat());
    bytes
}

/// The same from a client that takes so much over UDP.
pub fn with_edns(mut question: Vec<u8>, udp: u16) -> Vec<u8> {
    question[11] += 1;
    question.extend([0, 0, 41]);
    question.extend(udp.to_be_bytes());
    question.extend([0, 0, 0, 0, 0, 0]);
    question
}

/// A message read apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    pub id: u16,
    pub truncated: bool,
    pub code: u8,
    /// Name in its spelling, type.
    pub question: Option<(String, u16)>,
    pub answers: Vec<Record>,
    pub authority: Vec<Record>,
    pub additional: Vec<Record>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub kind: u16,
    pub class: u16,
    pub ttl: u32,
    pub data: Vec<u8>,
}

impl Message {
    /// Panics where it is no answer, or not one to its last byte.
    pub fn read(bytes: &[u8]) -> Message {
        let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        assert!(bytes[2] & 0x80 != 0, "no answer: {bytes:x?}");
        let mut at = 12;
        let question = match number(4) {
            0 => None,
            1 => {
                let name = name(bytes, &mut at);
                at += 4;
                Some((name, number(at - 4)))
            }
            more => panic!("{more} questions"),
        };
        let mut section = |count: u16| -> Vec<Record> {
            let mut record = |_| {
                name(bytes, &mut at);
                let length = usize::from(number(at + 8));
                let ttl = (u32::from(number(at + 4)) << 16) | u32::from(number(at + 6));
                let data = bytes[at + 10..at + 10 + length].to_vec();
                let record = Record { kind: number(at), class: number(at + 2), ttl, data };
                at += 10 + length;
                record
            };
            (0..count).map(&mut record).collect()
        };
        let (answers, authority, additional) = (section(number(6)), section(number(8)), section(number(10)));
        assert_eq!(at, bytes.len(), "bytes behind its end: {bytes:x?}");
        let (truncated, code) = (bytes[2] & 2 != 0, bytes[3] & 15);
        Message { id: number(0), truncated, code, question, answers, authority, additional }
    }

    /// The addresses among its answers.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let address = |record: &Record| match record.kind {
            A => IpAddr::from(<[u8; 4]>::try_from(record.data.as_slice()).unwrap()),
            AAAA => IpAddr::from(<[u8; 16]>::try_from(record.data.as_slice()).unwrap()),
            other => panic!("a record of type {other}"),
        };
        self.answers.iter().map(address).collect()
    }
}

/// Reads a name, which may end in one pointer backwards.
fn name(bytes: &[u8], at: &mut usize) -> String {
    let mut text = String::new();
    loop {
        let length = usize::from(bytes[*at]);
        *at += 1;
        match length {
            0 => return text,
            1..=63 => {
                if !text.is_empty() {
                    text.push('.');
                }
                text += &String::from_utf8_lossy(&bytes[*at..*at + length]);
                *at += length;
            }
            _ => {
                let mut to = (length & 0x3F) << 8 | usize::from(bytes[*at]);
                *at += 1;
                assert!(to < *at - 2, "a pointer forward");
                return text + &name(bytes, &mut to);
            }
        }
    }
}

/// Sends bytes by UDP from a socket of its own; the first datagram that comes back.
pub async fn udp(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let socket = udp_client(to).await;
    socket.send(bytes).await.unwrap();
    soon("an answer by UDP", receive(&socket)).await
}

pub async fn udp_client(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).await.unwrap();
    socket.connect(to).await.unwrap();
    socket
}

pub async fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    let count = socket.recv(&mut buffer).await.unwrap();
    buffer.truncate(count);
    buffer
}

/// Sends one message by TCP; the message that comes back.
pub async fn tcp(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(to).await.unwrap();
    send(&mut stream, bytes).await;
    soon("an answer by TCP", take(&mut stream)).await.expect("an answer")
}

pub async fn send(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(&[&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()).await.unwrap();
}

/// None when the stream ends.
pub async fn take(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let length = stream.read_u16().await.ok()?;
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(bytes)
}

/// How a question came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    Udp,
    Tcp,
}

/// One question as it came, and how.
pub type Asked = (By, Vec<u8>);

/// A name server. Ends when it is dropped.
pub struct NameServer {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    _tasks: JoinSet<()>,
}

impl NameServer {
    /// On loopback; `say` gets a question and gives the whole answer, or none.
    pub async fn start(say: impl Fn(By, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static) -> NameServer {
        loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            // UDP's ports are others than TCP's.
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                return NameServer::on(udp, tcp, say);
            }
        }
    }

    pub fn on(
        udp: UdpSocket,
        tcp: TcpListener,
        say: impl Fn(By, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> NameServer {
        let (asked, address) = (Arc::<Mutex<Vec<_>>>::default(), tcp.local_addr().unwrap());
        let noted = asked.clone();
        let say = Arc::new(move |by, bytes: &[u8]| {
            noted.lock().unwrap().push((by, bytes.to_vec()));
            say(by, bytes)
        });
        let mut tasks = JoinSet::new();
        let answer = say.clone();
        tasks.spawn(async move {
            let mut buffer = vec![0; 65_535];
            while let Ok((count, from)) = udp.recv_from(&mut buffer).await {
                if let Some(said) = answer(By::Udp, &buffer[..count]) {
                    udp.send_to(&said, from).await.unwrap();
                }
            }
        });
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                if let Some(bytes) = take(&mut stream).await
                    && let Some(said) = say(By::Tcp, &bytes)
                {
                    send(&mut stream, &said).await;
                }
            }
        });
        NameServer { address, asked, _tasks: tasks }
    }

    /// All questions so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The names of all questions so far.
    pub fn names(&self) -> Vec<String> {
        self.asked().iter().map(|(_, bytes)| name(bytes, &mut 12)).collect()
    }
}

/// An answer to that question with this code and these A or AAAA records; a denial has an SOA with this time to live.
pub fn answer(question: &[u8], code: u8, ips: &[IpAddr], ttl: u32) -> Vec<u8> {
    let mut end = 12;
    name(question, &mut end);
    let mut bytes = question[..end + 4].to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80 | code;
    bytes[6..12].fill(0);
    let mut record = |kind: u16, data: &[u8]| {
        bytes.extend([0xC0, 12]);
        bytes.extend([kind.to_be_bytes(), [0, 1]].concat());
        bytes.extend(ttl.to_be_bytes());
        bytes.extend((data.len() as u16).to_be_bytes());
        bytes.extend(data);
    };
    for ip in ips {
        match ip {
            IpAddr::V4(ip) => record(A, &ip.octets()),
            IpAddr::V6(ip) => record(AAAA, &ip.octets()),
        }
    }
    if ips.is_empty() {
        record(SOA, &[&[0, 0][..], &[0; 16], &ttl.to_be_bytes()].concat());
        bytes[9] = 1;
    }
    bytes[6..8].copy_from_slice(&(ips.len() as u16).to_be_bytes());
    bytes
}
