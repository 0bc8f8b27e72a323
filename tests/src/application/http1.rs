//! The HTTP/1 side of an application. It parses strictly: what is not plain HTTP/1 is answered with 400 and a close.
//! The path says what it does:
//!
//! `/echo` gives the body back as it comes · `/bytes/N`, `/chunked/N` answer N bytes · `/status/N` answers that status
//! without a body · `/trailers` ends with a trailer section · `/hints` sends 103 first · `/hold` waits for
//! `Application::release` · `/upgrade` switches protocols when asked and echoes raw bytes · `/close` closes after the
//! answer · `/truncate` promises more than it sends, `/chunked-truncate` likewise · `/reset` resets · everything else
//! reads the body and answers `METHOD TARGET` and the length of the body.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Seen, Shared};
use crate::wire::find;

/// One connection.
struct Http1<'a> {
    shared: &'a Shared,
    connection: usize,
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// How the connection goes on after one exchange.
#[derive(PartialEq)]
enum Next {
    Request,
    Close,
}

/// The other side is gone or speaks nonsense; nothing more is to be done.
struct Gone;

impl From<std::io::Error> for Gone {
    fn from(_: std::io::Error) -> Gone {
        Gone
    }
}

pub(super) async fn serve(shared: &Shared, connection: usize, stream: TcpStream, first: Vec<u8>) {
    let mut http1 = Http1 { shared, connection, stream, buffer: first };
    while let Ok(Next::Request) = http1.exchange().await {}
    let _ = http1.stream.shutdown().await;
}

impl Http1<'_> {
    async fn fill(&mut self) -> Result<(), Gone> {
        let before = self.buffer.len();
        let count = self.stream.read_buf(&mut self.buffer).await?;
        self.shared.heard(self.connection, &self.buffer[before..]);
        if count == 0 { Err(Gone) } else { Ok(()) }
    }

    async fn take_until(&mut self, mark: &[u8]) -> Result<Vec<u8>, Gone> {
        loop {
            if let Some(at) = find(&self.buffer, mark) {
                let rest = self.buffer.split_off(at + mark.len());
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            self.fill().await?;
        }
    }

    async fn exchange(&mut self) -> Result<Next, Gone> {
        let head = self.take_until(b"\r\n\r\n").await?;
        let Some(seen) = parse(self.connection, &head) else {
            self.stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await?;
            return Err(Gone);
        };
        let close = seen.version == "HTTP/1.0" || seen.header("connection").is_some_and(|value| value == "close");
        let place = self.shared.seen(seen.clone());
        let done = self.answer(&seen, place).await;
        if done.is_err() {
            self.shared.change(place, |seen| seen.cancelled = true);
        }
        match done? {
            Next::Request if !close => Ok(Next::Request),
            _ => Ok(Next::Close),
        }
    }

    async fn answer(&mut self, seen: &Seen, place: usize) -> Result<Next, Gone> {
        let name = self.shared.name.clone();
        let path = seen.target.split('?').next().unwrap_or_default();
        let (first, number) = match path[1.min(path.len())..].split_once('/') {
            Some((first, number)) => (first, number.parse::<usize>().unwrap_or_default()),
            None => (&path[1.min(path.len())..], 0),
        };
        let head = seen.method == "HEAD";
        if first == "upgrade" && seen.header("upgrade").is_some() {
            return self.upgrade(seen).await;
        }
        if seen.header("expect").is_some_and(|expect| expect.eq_ignore_ascii_case("100-continue")) {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        if first == "echo" {
            return self.echo(seen, place).await;
        }
        self.read_body(seen, place).await?;
        match first {
            "bytes" => {
                let length = format!("HTTP/1.1 200 OK\r\nX-App: {name}\r\nContent-Length: {number}\r\n\r\n");
                self.stream.write_all(length.as_bytes()).await?;
                if !head {
                    self.write_pattern(number).await?;
                }
            }
            "chunked" => {
                self.stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
                let chunk = [b'x'; 1000];
                for start in (0..number).step_by(1000) {
                    self.write_chunk(&chunk[..1000.min(number - start)]).await?;
                }
                self.stream.write_all(b"0\r\n\r\n").await?;
            }
            "status" => {
                let length = if number == 204 || number == 304 { "" } else { "Content-Length: 0\r\n" };
                let answer = format!("HTTP/1.1 {number} Whatever\r\nX-App: {name}\r\n{length}\r\n");
                self.stream.write_all(answer.as_bytes()).await?;
            }
            "trailers" => {
                self.stream
                    .write_all(b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
                    .await?;
                self.stream.write_all(b"0\r\nX-Sum: 5d41402a\r\n\r\n").await?;
            }
            "hints" => {
                self.stream.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n").await?;
                self.hold_or_leave().await?;
                self.stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone").await?;
            }
            "hold" => {
                self.hold_or_leave().await?;
                self.plain(seen, place, "").await?;
            }
            "close" => {
                self.plain(seen, place, "Connection: close\r\n").await?;
                return Ok(Next::Close);
            }
            "truncate" => {
                self.stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this").await?;
                return Ok(Next::Close);
            }
            "chunked-truncate" => {
                self.stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await?;
                return Ok(Next::Close);
            }
            "reset" => {
                self.stream.set_zero_linger()?;
                return Err(Gone);
            }
            _ => self.plain(seen, place, "").await?,
        }
        Ok(Next::Request)
    }

    async fn plain(&mut self, seen: &Seen, place: usize, field: &str) -> Result<(), Gone> {
        let mut length = 0;
        self.shared.change(place, |seen| length = seen.body.len());
        let body = format!("{} {} {length}\n", seen.method, seen.target);
        let answer = format!(
            "HTTP/1.1 200 OK\r\nX-App: {}\r\nContent-Type: text/plain\r\n{field}Content-Length: {}\r\n\r\n{}",
            self.shared.name,
            body.len(),
            if seen.method == "HEAD" { "" } else { &body }
        );
        Ok(self.stream.write_all(answer.as_bytes()).await?)
    }

    /// Waits for the test, unless the client leaves first.
    async fn hold_or_leave(&mut self) -> Result<(), Gone> {
        let shared = self.shared;
        tokio::select! {
            () = shared.held() => Ok(()),
            left = async {
                // A client may pipeline; only its end counts.
                loop {
                    if self.fill().await.is_err() {
                        return;
                    }
                }
            } => {
                let () = left;
                Err(Gone)
            }
        }
    }

    async fn write_pattern(&mut self, length: usize) -> Result<(), Gone> {
        let block: Vec<u8> = (0..64 * 1024).map(|at: u32| (at % 251) as u8).collect();
        let mut left = length;
        while left > 0 {
            let now = left.min(block.len());
            self.stream.write_all(&block[..now]).await?;
            left -= now;
        }
        Ok(())
    }

    async fn write_chunk(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        Ok(self.stream.write_all(&chunk).await?)
    }

    // --- bodies -------------------------------------------------------------------------------------------------

    async fn read_body(&mut self, seen: &Seen, place: usize) -> Result<(), Gone> {
        let mut body = Body::of(seen);
        while let Some(piece) = body.next(self, place).await? {
            self.shared.change(place, |seen| seen.body.extend_from_slice(&piece));
        }
        self.shared.change(place, |seen| seen.whole = true);
        Ok(())
    }

    /// Gives back each piece of the body as it comes, in the framing in which it came.
    async fn echo(&mut self, seen: &Seen, place: usize) -> Result<Next, Gone> {
        let mut body = Body::of(seen);
        let framing = match &body {
            Body::Length(length) => format!("Content-Length: {length}"),
            Body::Chunked => "Transfer-Encoding: chunked".to_owned(),
            Body::Done => "Content-Length: 0".to_owned(),
        };
        let chunked = matches!(body, Body::Chunked);
        let head = format!("HTTP/1.1 200 OK\r\nX-App: {}\r\n{framing}\r\n\r\n", self.shared.name);
        self.stream.write_all(head.as_bytes()).await?;
        while let Some(piece) = body.next(self, place).await? {
            if chunked {
                self.write_chunk(&piece).await?;
            } else {
                self.stream.write_all(&piece).await?;
            }
            self.shared.change(place, |seen| seen.body.extend_from_slice(&piece));
        }
        if chunked {
            self.stream.write_all(b"0\r\n\r\n").await?;
        }
        self.shared.change(place, |seen| seen.whole = true);
        Ok(Next::Request)
    }

    async fn upgrade(&mut self, seen: &Seen) -> Result<Next, Gone> {
        let protocol = seen.header("upgrade").unwrap_or_default();
        let answer = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n");
        self.stream.write_all(answer.as_bytes()).await?;
        loop {
            if !self.buffer.is_empty() {
                let bytes = std::mem::take(&mut self.buffer);
                self.stream.write_all(&bytes).await?;
            }
            self.fill().await?;
        }
    }
}

/// What is left of a body.
enum Body {
    Length(usize),
    Chunked,
    Done,
}

impl Body {
    fn of(seen: &Seen) -> Body {
        if seen.header("transfer-encoding").is_some() {
            return Body::Chunked;
        }
        match seen.header("content-length").and_then(|length| length.parse().ok()) {
            None | Some(0) => Body::Done,
            Some(length) => Body::Length(length),
        }
    }

    async fn next(&mut self, http1: &mut Http1<'_>, place: usize) -> Result<Option<Vec<u8>>, Gone> {
        match self {
            Body::Done => Ok(None),
            Body::Length(left) => {
                if http1.buffer.is_empty() {
                    http1.fill().await?;
                }
                let count = http1.buffer.len().min(*left);
                *left -= count;
                if *left == 0 {
                    *self = Body::Done;
                }
                Ok(Some(http1.buffer.drain(..count).collect()))
            }
            Body::Chunked => {
                let line = http1.take_until(b"\r\n").await?;
                let size =
                    std::str::from_utf8(&line).ok().and_then(|line| usize::from_str_radix(line.trim_end(), 16).ok());
                let size = size.ok_or(Gone)?;
                if size == 0 {
                    *self = Body::Done;
                    loop {
                        let line = http1.take_until(b"\r\n").await?;
                        let line = String::from_utf8_lossy(&line);
                        let Some((name, value)) = line.trim_end().split_once(':') else { return Ok(None) };
                        let field = (name.to_owned(), value.trim().to_owned());
                        http1.shared.change(place, |seen| seen.trailers.push(field));
                    }
                }
                while http1.buffer.len() < size + 2 {
                    http1.fill().await?;
                }
                let piece = http1.buffer.drain(..size).collect();
                let end: Vec<u8> = http1.buffer.drain(..2).collect();
                if end == b"\r\n" { Ok(Some(piece)) } else { Err(Gone) }
            }
        }
    }
}

fn parse(connection: usize, head: &[u8]) -> Option<Seen> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.trim_end_matches("\r\n").split("\r\n");
    let first: Vec<&str> = lines.next()?.split(' ').collect();
    let [method, target, version] = first[..] else { return None };
    let mut headers = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.is_empty() || name.contains([' ', '\t']) {
            return None;
        }
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    Some(Seen {
        connection,
        version: version.to_owned(),
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        ..Seen::default()
    })
}
