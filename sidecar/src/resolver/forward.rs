//! Passes a question on, byte for byte but for its id, and brings back what the upstream said in the same way: time to
//! live, denials, truncation and EDNS are the upstream's. Each question has a socket of its own, and so a port that nobody
//! can guess (RFC 5452), and an answer counts only from where it was asked, with the id and the question that were sent.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout, timeout_at};

use super::message::{self, Answered, Query, Transport};
use super::upstreams::{RESOLV_CONF, Upstreams};
use crate::config::Limits;
use crate::net;

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    /// There is nobody to ask.
    NoUpstream,
    /// Nobody answered in time.
    Silence,
    /// The last one could not be talked to.
    Network,
}

pub(super) struct Forwarder {
    upstreams: Upstreams,
    mark: Option<u32>,
    server_timeout: Duration,
    budget: Duration,
    /// Port and id of each question that is out.
    out: RefCell<HashSet<(u16, u16)>>,
    /// Where answers are read: none has a buffer before it is there.
    buffer: RefCell<Box<[u8]>>,
    /// What the log says of upstreams now.
    told: Cell<Option<Failure>>,
    told_of_loop: Cell<bool>,
}

/// Takes the question out of those that are out.
struct Out<'a> {
    forwarder: &'a Forwarder,
    question: (u16, u16),
}

impl Drop for Out<'_> {
    fn drop(&mut self) {
        self.forwarder.out.borrow_mut().remove(&self.question);
    }
}

impl Forwarder {
    pub(super) fn new(
        upstreams: Vec<SocketAddr>,
        own: Vec<SocketAddr>,
        mark: Option<u32>,
        limits: &Limits,
    ) -> Forwarder {
        Forwarder {
            upstreams: Upstreams::new(upstreams, RESOLV_CONF.into(), own),
            mark,
            server_timeout: limits.dns_server_timeout,
            budget: limits.dns_budget,
            out: RefCell::default(),
            buffer: RefCell::new(vec![0; usize::from(u16::MAX)].into()),
            told: Cell::default(),
            told_of_loop: Cell::default(),
        }
    }

    /// The first answer of an upstream that is willing; where none is, what the first of them said.
    pub(super) async fn ask(&self, query: &Query<'_>, transport: Transport) -> Result<Vec<u8>, Failure> {
        let deadline = Instant::now() + self.budget;
        let mut failure = Failure::NoUpstream;
        let mut unwilling = None;
        for server in self.upstreams.now().iter() {
            let until = deadline.min(Instant::now() + self.server_timeout);
            let asked = timeout_at(until, async {
                match transport {
                    Transport::Udp => self.by_udp(*server, query).await,
                    Transport::Tcp => self.by_tcp(*server, query).await,
                }
            });
            match asked.await {
                Ok(Ok((answer, Answered::Yes))) => {
                    self.tell(None);
                    return Ok(message::with_id(answer, query.id()));
                }
                Ok(Ok((answer, _))) => {
                    unwilling.get_or_insert(answer);
                }
                Ok(Err(error)) => {
                    tracing::debug!(%server, %error, "a name server cannot be asked");
                    failure = Failure::Network;
                }
                Err(_) => {
                    tracing::debug!(%server, "a name server does not answer");
                    failure = Failure::Silence;
                }
            }
        }
        if let Some(answer) = unwilling {
            return Ok(message::with_id(answer, query.id()));
        }
        self.tell(Some(failure));
        Err(failure)
    }

    async fn by_udp(&self, server: SocketAddr, query: &Query<'_>) -> io::Result<(Vec<u8>, Answered)> {
        let socket = Socket::new(Domain::for_address(server), Type::DGRAM, Some(Protocol::UDP))?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        socket.set_nonblocking(true)?;
        // Takes from there alone, and tells when nobody is there.
        socket.connect(&server.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        let id = random_id()?;
        let _out = self.out(socket.local_addr()?.port(), id);
        socket.send(&message::with_id(query.bytes.to_vec(), id)).await?;
        loop {
            // That nobody is there is no bytes to read, only an error.
            if socket.ready(Interest::READABLE | Interest::ERROR).await?.is_error() {
                if let Some(error) = socket.take_error()? {
                    return Err(error);
                }
                // It is over; this forgets that it was.
                let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
            }
            let mut buffer = self.buffer.borrow_mut();
            let count = match socket.try_recv(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let answer = &buffer[..count];
            match message::answers(answer, id, query.question) {
                Answered::No => {}
                answered => return Ok((answer.to_vec(), answered)),
            }
        }
    }

    async fn by_tcp(&self, server: SocketAddr, query: &Query<'_>) -> io::Result<(Vec<u8>, Answered)> {
        let mut stream = net::connect_marked(server, self.mark).await?;
        let id = random_id()?;
        let _out = self.out(stream.local_addr()?.port(), id);
        write_message(&mut stream, &message::with_id(query.bytes.to_vec(), id)).await?;
        let answer = read_message(&mut stream).await?;
        match message::answers(&answer, id, query.question) {
            Answered::No => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is of another question")),
            answered => Ok((answer, answered)),
        }
    }

    fn out(&self, port: u16, id: u16) -> Out<'_> {
        self.out.borrow_mut().insert((port, id));
        Out { forwarder: self, question: (port, id) }
    }

    /// Whether a question that came in is one that went out.
    pub(super) fn is_own(&self, port: u16, id: u16) -> bool {
        self.out.borrow().contains(&(port, id))
    }

    #[cfg(test)]
    pub(super) fn nothing_is_out(&self) -> bool {
        self.out.borrow().is_empty()
    }

    /// Says once that questions come back.
    pub(super) fn complain_of_loop(&self) {
        if !self.told_of_loop.replace(true) {
            tracing::warn!(
                "the resolver's own questions come back to it: the redirect rules do not exempt them. Run the sidecar as \
                 the user of `redirect apply --uid` (1337), or with the same --mark for `run` and `redirect apply`"
            );
        }
    }

    /// Says once when names beyond the mesh stop to be answered, and once when they are again.
    fn tell(&self, now: Option<Failure>) {
        let before = self.told.replace(now);
        match now {
            _ if before == now => {}
            None => tracing::info!("names beyond the mesh are answered again"),
            Some(Failure::NoUpstream) => {
                tracing::warn!("names beyond the mesh are not answered: {}", self.upstreams.advice());
            }
            Some(Failure::Silence | Failure::Network) => tracing::warn!(
                servers = ?self.upstreams.now(),
                "names beyond the mesh are not answered: no name server of /etc/resolv.conf or --dns-upstream does"
            ),
        }
    }
}

/// Of the operating system's randomness: an id that can be guessed lets anybody answer.
fn random_id() -> io::Result<u16> {
    let mut id = [0; 2];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(u16::from_be_bytes(id))
}

/// Reads one message as TCP carries it, behind its length.
pub(super) async fn read_message(stream: &mut tokio::net::TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    // Grows with what comes, not with what was announced.
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < usize::from(length) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(message) }
}

pub(super) async fn write_message(stream: &mut tokio::net::TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::other("more than TCP carries in one message"))?;
    // In one piece: some peers take the length alone for all of it.
    let mut whole = length.to_be_bytes().to_vec();
    whole.extend_from_slice(message);
    stream.write_all(&whole).await
}

/// Bounds a step of a client's connection.
pub(super) async fn within<T>(limit: Duration, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(limit, step).await.map_err(|_| io::ErrorKind::TimedOut)?
}
