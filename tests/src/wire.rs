//! A connection that a test drives byte by byte, from either end: through an outbound or inbound port, inside mutual
//! TLS, or as the application. Reads HTTP/1 answers without forgiving anything, so that a test sees what was really
//! sent: header case, interim answers, trailers, truncation.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::eventually::{PATIENCE, soon};

/// How the other side ended its direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// FIN; inside TLS with close_notify or without.
    Closed,
    /// RST, or another error.
    Reset,
}

/// One end of a connection.
pub struct Connection {
    io: Io,
    /// Read and not yet taken.
    buffer: Vec<u8>,
}

enum Io {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Connection {
        Connection { io: Io::Tcp(stream), buffer: Vec::new() }
    }
}

impl From<TlsStream<TcpStream>> for Connection {
    fn from(stream: TlsStream<TcpStream>) -> Connection {
        Connection { io: Io::Tls(Box::new(stream)), buffer: Vec::new() }
    }
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Connection {
        let stream = soon("connect", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.into()
    }

    /// How a connection ends that is ended at once: a reset may come before the client has looked at what it opened.
    pub async fn ended_by(address: SocketAddr) -> End {
        match soon("connect", TcpStream::connect(address)).await {
            Ok(stream) => Connection::from(stream).expect_end().await,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => End::Reset,
            Err(error) => panic!("{address}: {error}"),
        }
    }

    /// Sends these bytes as they are. Panics when the other side is gone.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.unwrap();
    }

    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let bytes = bytes.as_ref();
        match &mut self.io {
            Io::Tcp(tcp) => tcp.write_all(bytes).await,
            Io::Tls(tls) => {
                tls.write_all(bytes).await?;
                tls.flush().await
            }
        }
    }

    /// Ends this side's direction; the other goes on.
    pub async fn finish(&mut self) {
        match &mut self.io {
            Io::Tcp(tcp) => tcp.shutdown().await.unwrap(),
            Io::Tls(tls) => tls.shutdown().await.unwrap(),
        }
    }

    /// Ends the connection with a RST.
    pub fn reset(self) {
        let tcp = self.into_tcp();
        tcp.set_zero_linger().unwrap();
    }

    pub fn into_tcp(self) -> TcpStream {
        match self.io {
            Io::Tcp(tcp) => tcp,
            Io::Tls(tls) => match *tls {
                TlsStream::Client(tls) => tls.into_inner().0,
                TlsStream::Server(tls) => tls.into_inner().0,
            },
        }
    }

    pub fn tcp(&self) -> &TcpStream {
        match &self.io {
            Io::Tcp(tcp) => tcp,
            Io::Tls(tls) => match &**tls {
                TlsStream::Client(tls) => tls.get_ref().0,
                TlsStream::Server(tls) => tls.get_ref().0,
            },
        }
    }

    /// What the other side of TLS showed; nothing without TLS.
    pub fn peer_certificates(&self) -> Vec<rustls::pki_types::CertificateDer<'static>> {
        let certificates = match &self.io {
            Io::Tcp(_) => None,
            Io::Tls(tls) => tls.get_ref().1.peer_certificates(),
        };
        certificates.unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect()
    }

    /// The stream itself, for a library to speak on; what was read ahead must have been taken.
    pub fn into_parts(self) -> (Result<TcpStream, Box<TlsStream<TcpStream>>>, Vec<u8>) {
        match self.io {
            Io::Tcp(tcp) => (Ok(tcp), self.buffer),
            Io::Tls(tls) => (Err(tls), self.buffer),
        }
    }

    /// Reads once. `None` at the end of the stream.
    pub async fn read_some(&mut self) -> io::Result<Option<usize>> {
        let mut chunk = [0; 16 * 1024];
        let count = match &mut self.io {
            Io::Tcp(tcp) => tcp.read(&mut chunk).await?,
            Io::Tls(tls) => match tls.read(&mut chunk).await {
                // TLS that ends without close_notify is an end for most tests; the bytes say what is missing.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                read => read?,
            },
        };
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok((count > 0).then_some(count))
    }

    async fn fill(&mut self, what: &str) -> Result<(), End> {
        match tokio::time::timeout(PATIENCE, self.read_some()).await {
            Ok(Ok(Some(_))) => Ok(()),
            Ok(Ok(None)) => Err(End::Closed),
            Ok(Err(_)) => Err(End::Reset),
            Err(_) => panic!("nothing came within {PATIENCE:?}: {what}; so far {:?}", text(&self.buffer)),
        }
    }

    /// What was read and not taken.
    pub fn ahead(&self) -> &[u8] {
        &self.buffer
    }

    /// Takes exactly so many bytes. Panics when the stream ends before.
    pub async fn take(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            let so_far = self.buffer.len();
            if let Err(end) = self.fill("bytes").await {
                panic!("{end:?} after {so_far} of {count} bytes");
            }
        }
        let rest = self.buffer.split_off(count);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Takes exactly so many bytes into `taken`, in place of what was there.
    pub async fn try_take(&mut self, count: usize, taken: &mut Vec<u8>) -> Result<(), End> {
        while self.buffer.len() < count {
            self.fill("bytes").await?;
        }
        taken.clear();
        taken.extend(self.buffer.drain(..count));
        Ok(())
    }

    /// Takes up to and with `mark`. Panics when the stream ends before.
    pub async fn take_until(&mut self, mark: &[u8]) -> Vec<u8> {
        match self.try_take_until(mark).await {
            Ok(taken) => taken,
            Err(end) => panic!("{end:?} before {:?}: {:?}", text(mark), text(&self.buffer)),
        }
    }

    pub async fn try_take_until(&mut self, mark: &[u8]) -> Result<Vec<u8>, End> {
        loop {
            if let Some(at) = find(&self.buffer, mark) {
                let rest = self.buffer.split_off(at + mark.len());
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            self.fill(&format!("{:?}", text(mark))).await?;
        }
    }

    /// Everything up to the end, and what kind of end it was.
    pub async fn take_to_end(&mut self) -> (Vec<u8>, End) {
        loop {
            if let Err(end) = self.fill("the end of the stream").await {
                return (std::mem::take(&mut self.buffer), end);
            }
        }
    }

    /// Panics unless the other side ends the stream without another byte.
    pub async fn expect_end(&mut self) -> End {
        let (rest, end) = self.take_to_end().await;
        assert!(rest.is_empty(), "more before the end: {:?}", text(&rest));
        end
    }

    /// True when nothing comes and nothing ends for this long. For what must not happen; nothing waits on it.
    pub async fn stays_silent(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && tokio::time::timeout(time, self.read_some()).await.is_err()
    }

    /// Sends a request and reads its answer.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> Response {
        let request = request.as_ref();
        self.send(request).await;
        self.response(request.starts_with(b"HEAD ")).await
    }

    /// Reads one answer. `head` says that it answers a HEAD and has no body. Panics when not even a head came.
    pub async fn response(&mut self, head: bool) -> Response {
        match self.try_response(head).await {
            Ok(response) => response,
            Err(end) => panic!("{end:?} instead of an answer; so far {:?}", text(&self.buffer)),
        }
    }

    /// As [`Connection::response`]; the end of the stream when no whole head came.
    pub async fn try_response(&mut self, head: bool) -> Result<Response, End> {
        let mut interim = Vec::new();
        loop {
            let raw = self.try_take_until(b"\r\n\r\n").await?;
            let mut response = Response::parse_head(&raw);
            if response.status == 101 || response.status >= 200 {
                response.interim = interim;
                self.read_body(&mut response, head).await;
                return Ok(response);
            }
            interim.push(response);
        }
    }

    async fn read_body(&mut self, response: &mut Response, head: bool) {
        let none = head || matches!(response.status, 101 | 204 | 304);
        let chunked = response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let result = if none {
            Ok(())
        } else if chunked {
            self.read_chunks(response).await
        } else if let Some(length) = response.header("content-length") {
            let length: usize = length.parse().expect("content-length");
            self.read_length(length, &mut response.body).await
        } else {
            let (body, end) = self.take_to_end().await;
            response.body = body;
            if end == End::Closed { Ok(()) } else { Err(end) }
        };
        response.cut = result.err();
    }

    async fn read_length(&mut self, length: usize, body: &mut Vec<u8>) -> Result<(), End> {
        let end = body.len() + length;
        loop {
            let count = self.buffer.len().min(end - body.len());
            body.extend(self.buffer.drain(..count));
            if body.len() == end {
                return Ok(());
            }
            self.fill("the body").await?;
        }
    }

    async fn read_chunks(&mut self, response: &mut Response) -> Result<(), End> {
        loop {
            let line = self.try_take_until(b"\r\n").await?;
            let size = std::str::from_utf8(&line).expect("chunk size").trim();
            let size = usize::from_str_radix(size.split(';').next().unwrap_or(size), 16)
                .unwrap_or_else(|_| panic!("not a chunk size: {size:?}"));
            if size == 0 {
                loop {
                    let line = self.try_take_until(b"\r\n").await?;
                    if line == b"\r\n" {
                        return Ok(());
                    }
                    response.trailers.push(field(&String::from_utf8_lossy(&line)));
                }
            }
            self.read_length(size, &mut response.body).await?;
            assert_eq!(self.try_take_until(b"\r\n").await?, b"\r\n", "a chunk longer than it says");
        }
    }
}

/// One HTTP/1 answer, as it was sent.
#[derive(Clone, Debug, Default)]
pub struct Response {
    pub version: String,
    pub status: u16,
    /// Names in the case in which they came.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// 1xx answers that came before.
    pub interim: Vec<Response>,
    /// The stream ended before the body did.
    pub cut: Option<End>,
}

impl Response {
    fn parse_head(raw: &[u8]) -> Response {
        let head = String::from_utf8_lossy(raw);
        let mut lines = head.trim_end_matches("\r\n").split("\r\n");
        let first = lines.next().unwrap_or_default();
        let mut words = first.splitn(3, ' ');
        let version = words.next().unwrap_or_default().to_owned();
        assert!(version.starts_with("HTTP/1."), "not an answer: {head:?}");
        let status = words.next().and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no status: {head:?}"));
        Response { version, status, headers: lines.map(field).collect(), ..Response::default() }
    }

    /// The first field of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The word of a problem+json answer; the empty string when it is none.
    pub fn reason(&self) -> String {
        if self.header("content-type") != Some("application/problem+json") {
            return String::new();
        }
        let body: serde_json::Value = serde_json::from_slice(&self.body).expect("problem+json");
        assert_eq!(body["status"], self.status, "status of the body and of the head");
        body["reason"].as_str().unwrap_or_default().to_owned()
    }

    pub fn is_whole(&self) -> bool {
        self.cut.is_none()
    }
}

fn field(line: &str) -> (String, String) {
    let (name, value) = line.trim_end().split_once(':').unwrap_or_else(|| panic!("not a field: {line:?}"));
    (name.to_owned(), value.trim().to_owned())
}

pub fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

pub fn text(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(2000)];
    String::from_utf8_lossy(shown).into_owned()
}

/// One request on a connection of its own, closed afterwards.
pub async fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Response {
    Connection::open(address).await.ask(request).await
}

/// A GET on a connection of its own.
pub async fn get(address: SocketAddr, path: &str) -> Response {
    ask(address, format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")).await
}
