//! `bench load`: one thread that asks and measures, in a process of its own so that its cost is nobody else's. It
//! connects, warms up, says `ready`, waits for a line on stdin, measures, says the outcome as one line of JSON, and
//! keeps its connections open until stdin ends.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use outrigger_runtime::stdout;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::histogram::{Histogram, Sparse};
use super::{bulk, open, serve, streams};

#[derive(Parser, Clone, Debug)]
pub struct Settings {
    #[arg(long)]
    pub target: SocketAddr,
    #[arg(long, value_enum)]
    pub mode: Mode,
    #[arg(long)]
    pub connections: u16,
    #[arg(long, default_value_t = 0)]
    pub requests: u64,
    #[arg(long, default_value_t = 1)]
    pub rate: u32,
    #[arg(long, default_value_t = 0)]
    pub seconds: u64,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Each connection asks again when it was answered.
    Closed,
    /// Requests begin when the clock says so, whether or not the earlier ones were answered.
    Open,
    /// The closed loop over HTTP/2.
    Streams,
    /// Connections that were used once and stay.
    Idle,
    /// A download of opaque bytes; requests are MiB.
    Bulk,
}

/// What one run of the load saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    pub answered: u64,
    pub failed: u64,
    pub seconds: f64,
    pub latencies: Sparse,
}

/// No run takes longer, whatever the target does.
pub const LONGEST: Duration = Duration::from_secs(120);
/// A mesh that has just started may need this long to know its endpoints.
const PATIENCE: Duration = Duration::from_secs(20);
const WARM_UP: u64 = 20;

pub const REQUEST: &[u8] =
    b"GET /bench HTTP/1.1\r\nHost: app.bench\r\nUser-Agent: outrigger-bench\r\nAccept: */*\r\n\r\n";

pub fn run(settings: &Settings) -> anyhow::Result<()> {
    if settings.mode == Mode::Open {
        return open::run(settings);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    runtime.block_on(async {
        match settings.mode {
            Mode::Streams => streams::run(settings).await,
            Mode::Bulk => bulk::run(settings).await,
            Mode::Closed | Mode::Open | Mode::Idle => connections(settings).await,
        }
    })
}

async fn connections(settings: &Settings) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for _ in 0..settings.connections {
        all.push(Connection::working(settings.target).await?);
    }
    let load = Rc::new(Load::default());
    if settings.mode == Mode::Closed {
        load.left.set(u64::from(settings.connections) * WARM_UP);
        all = drive(&load, all).await?;
    }
    load.begin(settings.requests);
    wait_for_word()?;
    let begun = Instant::now();
    let all = tokio::time::timeout(LONGEST, drive(&load, all)).await.context("the load did not end in time")??;
    load.tell(begun.elapsed())?;
    wait_for_end();
    drop(all);
    Ok(())
}

async fn drive(load: &Rc<Load>, all: Vec<Connection>) -> anyhow::Result<Vec<Connection>> {
    let running: Vec<_> = all
        .into_iter()
        .map(|mut connection| {
            let load = load.clone();
            tokio::task::spawn_local(async move {
                while load.take() {
                    let begun = Instant::now();
                    match connection.exchange().await {
                        Ok(()) => load.answered(begun.elapsed()),
                        Err(_) => {
                            load.failed();
                            connection = Connection::working(connection.target).await?;
                        }
                    }
                }
                anyhow::Ok(connection)
            })
        })
        .collect();
    let mut back = Vec::with_capacity(running.len());
    for one in running {
        back.push(one.await??);
    }
    Ok(back)
}

/// What is left to do, and what was seen.
#[derive(Default)]
pub struct Load {
    left: Cell<u64>,
    answered: Cell<u64>,
    failed: Cell<u64>,
    latencies: RefCell<Histogram>,
}

impl Load {
    /// Forgets the warm-up.
    pub fn begin(&self, requests: u64) {
        self.left.set(requests);
        self.answered.set(0);
        self.failed.set(0);
        *self.latencies.borrow_mut() = Histogram::default();
    }

    pub fn take(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left > 0
    }

    pub fn answered(&self, after: Duration) {
        self.answered.set(self.answered.get() + 1);
        self.latencies.borrow_mut().record(nanos(after));
    }

    pub fn failed(&self) {
        self.failed.set(self.failed.get() + 1);
    }

    pub fn tell(&self, took: Duration) -> anyhow::Result<()> {
        Seen {
            answered: self.answered.get(),
            failed: self.failed.get(),
            seconds: took.as_secs_f64(),
            latencies: self.latencies.borrow().sparse(),
        }
        .tell()
    }
}

impl Seen {
    pub fn tell(&self) -> anyhow::Result<()> {
        stdout::say(&serde_json::to_string(self)?);
        Ok(())
    }
}

pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Says that the warm-up is over and blocks until the parent has read its clocks.
pub fn wait_for_word() -> anyhow::Result<()> {
    stdout::ready();
    if io::stdin().read_line(&mut String::new())? == 0 {
        bail!("whoever started the load is gone");
    }
    Ok(())
}

pub fn wait_for_end() {
    // Whatever it is that comes, it is the end.
    let _ = io::stdin().read_line(&mut String::new());
}

/// One HTTP/1.1 connection.
struct Connection {
    target: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens one and asks once; again, for a while, when that fails.
    async fn working(target: SocketAddr) -> anyhow::Result<Connection> {
        let until = Instant::now() + PATIENCE;
        loop {
            let tried = async {
                let stream = TcpStream::connect(target).await?;
                stream.set_nodelay(true)?;
                let mut connection = Connection { target, stream, buffer: Vec::with_capacity(4096) };
                connection.exchange().await?;
                io::Result::Ok(connection)
            };
            match tried.await {
                Ok(connection) => return Ok(connection),
                Err(error) if Instant::now() > until => bail!("{target} does not answer: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn exchange(&mut self) -> io::Result<()> {
        self.stream.write_all(REQUEST).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(length) = whole_answer(&self.buffer)?
                && self.buffer.len() >= length
            {
                return Ok(());
            }
        }
    }
}

/// The length of an answer, once its head is there. Anything but 200 with a length is an error.
pub fn whole_answer(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(end) = serve::end_of_head(bytes) else { return Ok(None) };
    let head = &bytes[..end];
    let wrong = || io::Error::other(String::from_utf8_lossy(head).into_owned());
    if !head.starts_with(b"HTTP/1.1 200 ") {
        return Err(wrong());
    }
    const NAME: &[u8] = b"content-length:";
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME))
        .ok_or_else(wrong)?;
    let length = std::str::from_utf8(&line[NAME.len()..]).ok().and_then(|text| text.trim().parse::<usize>().ok());
    length.map(|length| Some(end + length)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        assert_eq!(whole_answer(b"HTTP/1.1 200 OK\r\n").unwrap(), None);
        let head = b"HTTP/1.1 200 OK\r\nA: b\r\ncontent-LENGTH: 7\r\n\r\n";
        assert_eq!(whole_answer(head).unwrap(), Some(head.len() + 7));
        assert!(whole_answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").is_err());
        assert!(whole_answer(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n").is_err());
        assert!(whole_answer(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
