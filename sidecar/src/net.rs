//! Sockets: listeners and dials with the options that every socket of the mesh has, and [`Stream`], the one
//! byte-stream type of the walk: plain or TLS, with bytes that were read ahead and are read again first.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

/// Idle time and interval of TCP keep-alive probes, their count, and how long unacknowledged data may stay so.
#[derive(Clone, Copy, Debug)]
pub struct SocketOptions {
    pub keepalive: Duration,
    pub keepalive_probes: u32,
    pub user_timeout: Duration,
    /// SO_MARK, by which redirect rules know the sidecar's own traffic.
    pub mark: Option<u32>,
}

impl SocketOptions {
    /// On a listener these are inherited by what it accepts, so that accepting costs no further system call.
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(self.keepalive)
                .with_interval(self.keepalive)
                .with_retries(self.keepalive_probes),
        )?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))
    }
}

const BACKLOG: i32 = 4096;

/// Opens a listener that other workers can open too (SO_REUSEPORT). The error names the address.
pub fn listen(address: SocketAddr, options: &SocketOptions) -> io::Result<std::net::TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        options.apply(&SockRef::from(&socket))?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// Whether some socket of this machine already listens on `address`: SO_REUSEPORT would share it silently.
pub fn is_taken(address: SocketAddr) -> bool {
    if address.port() == 0 {
        return false;
    }
    let probe = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    probe().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}

/// Whether an address belongs to this machine (or network namespace): only then can it be bound.
pub fn is_local(ip: std::net::IpAddr) -> bool {
    ip.is_loopback() || std::net::UdpSocket::bind((ip, 0)).is_ok()
}

/// Connects; the caller bounds the time.
pub async fn connect(address: SocketAddr, options: &SocketOptions) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    options.apply(&SockRef::from(&socket))?;
    socket.connect(address).await
}

/// A byte stream of the walk.
#[derive(Debug)]
pub struct Stream {
    ahead: BytesMut,
    io: Io,
    below: Below,
}

/// TLS reads in pieces of 4 KiB. Below it, and while there is more than that, as much as there is comes in at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Below {
    Nothing,
    Tls,
    /// The last read took all that it was offered room for.
    TlsInBulk,
}

/// What is read at once then.
const BULK: usize = 64 * 1024;

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    /// The server end of mutual TLS; below it a stream that replays the ClientHello.
    Accepted(Box<tokio_rustls::server::TlsStream<Stream>>),
    /// The client end.
    Dialled(Box<tokio_rustls::client::TlsStream<Stream>>),
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Stream {
        Stream { ahead: BytesMut::new(), io: Io::Tcp(tcp), below: Below::Nothing }
    }
}

impl From<tokio_rustls::server::TlsStream<Stream>> for Stream {
    fn from(tls: tokio_rustls::server::TlsStream<Stream>) -> Stream {
        Stream { ahead: BytesMut::new(), io: Io::Accepted(Box::new(tls)), below: Below::Nothing }
    }
}

impl From<tokio_rustls::client::TlsStream<Stream>> for Stream {
    fn from(tls: tokio_rustls::client::TlsStream<Stream>) -> Stream {
        Stream { ahead: BytesMut::new(), io: Io::Dialled(Box::new(tls)), below: Below::Nothing }
    }
}

impl AsMut<Stream> for Stream {
    fn as_mut(&mut self) -> &mut Stream {
        self
    }
}

impl Stream {
    /// The same, for TLS to run on.
    pub fn below_tls(self) -> Stream {
        Stream { below: Below::Tls, ..self }
    }

    /// What was read ahead and not consumed yet.
    pub fn ahead(&self) -> &[u8] {
        &self.ahead
    }

    /// Puts bytes before everything that will be read: what a library had buffered when it gave the stream back.
    pub fn unread(&mut self, bytes: &[u8]) {
        let mut ahead = BytesMut::with_capacity(bytes.len() + self.ahead.len());
        ahead.extend_from_slice(bytes);
        ahead.extend_from_slice(&self.ahead);
        self.ahead = ahead;
    }

    /// Takes the read-ahead out: somebody else has its bytes now.
    pub fn take_ahead(&mut self) -> BytesMut {
        std::mem::take(&mut self.ahead)
    }

    /// Reads once more from the peer into the read-ahead. 0 is the end of the stream.
    pub async fn read_ahead(&mut self) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_read_ahead(cx)).await
    }

    /// As [`Stream::read_ahead`], to be used beside other futures.
    pub fn poll_read_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut chunk = [0; 2048];
        let mut buffer = ReadBuf::new(&mut chunk);
        std::task::ready!(self.io.poll_read(cx, &mut buffer))?;
        self.ahead.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Whether something can be read, or the waker is told when it can.
    fn poll_read_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let ready = self.tcp().poll_read_ready(cx);
        if ready.is_pending() && self.below == Below::TlsInBulk {
            self.settle();
        }
        ready
    }

    /// Bulk is over for now: nothing is kept for what may come.
    fn settle(&mut self) {
        self.below = Below::Tls;
        self.ahead = BytesMut::new();
    }

    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        match &self.io {
            Io::Tcp(tcp) => tcp,
            Io::Accepted(tls) => tls.get_ref().0.tcp(),
            Io::Dialled(tls) => tls.get_ref().0.tcp(),
        }
    }

    /// Waits until the peer's kernel has everything that was written; the caller bounds the time.
    pub async fn delivered(&self) {
        let mut pause = Duration::from_millis(1);
        while unacknowledged(self.tcp()) > 0 {
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }

    /// Makes the close of this socket a reset, so that a truncation cannot be taken for an end.
    pub fn reset_on_close(&self) {
        // Failing leaves an orderly close, which only tells the peer less.
        let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
    }
}

/// Bytes that the peer's kernel has not acknowledged; 0 as well when that cannot be known.
#[expect(unsafe_code, reason = "ioctl(2) with SIOCOUTQ, which Linux calls TIOCOUTQ too, has no safe form")]
fn unacknowledged(tcp: &TcpStream) -> libc::c_int {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as `tcp` is borrowed, and the kernel writes one int.
    let done = unsafe { libc::ioctl(tcp.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    if done == 0 { bytes } else { 0 }
}

impl Io {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Io::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buffer),
            // HTTP looks for more several times per request; most times there is nothing, which the socket's readiness
            // tells for a fraction of what a round through TLS costs. What TLS holds already comes first.
            Io::Accepted(tls) => {
                let (stream, session) = tls.get_mut();
                if session.wants_read() && stream.poll_read_ready(cx)?.is_pending() {
                    return Poll::Pending;
                }
                Pin::new(tls.as_mut()).poll_read(cx, buffer)
            }
            Io::Dialled(tls) => {
                let (stream, session) = tls.get_mut();
                if session.wants_read() && stream.poll_read_ready(cx)?.is_pending() {
                    return Poll::Pending;
                }
                Pin::new(tls.as_mut()).poll_read(cx, buffer)
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() && std::task::ready!(self.poll_read_below(cx, buffer))? {
            return Poll::Ready(Ok(()));
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        if self.ahead.is_empty() && self.below != Below::TlsInBulk {
            self.ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Stream {
    /// Reads from below: true when `buffer` has what there is, false when the read-ahead does.
    fn poll_read_below(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buffer.filled().len();
        match (self.below, &mut self.io) {
            (Below::TlsInBulk, Io::Tcp(tcp)) => {
                self.ahead.clear();
                self.ahead.reserve(BULK);
                let count = {
                    let reading = std::pin::pin!(tcp.read_buf(&mut self.ahead));
                    reading.poll(cx)
                };
                match count {
                    Poll::Ready(Ok(count)) if count > 0 => {
                        if count <= buffer.remaining() {
                            self.below = Below::Tls;
                        }
                        Poll::Ready(Ok(false))
                    }
                    Poll::Ready(end) => {
                        self.settle();
                        Poll::Ready(end.map(|_| true))
                    }
                    Poll::Pending => {
                        self.settle();
                        Poll::Pending
                    }
                }
            }
            (below, io) => {
                std::task::ready!(io.poll_read(cx, buffer))?;
                if below == Below::Tls && buffer.remaining() == 0 && buffer.filled().len() > before {
                    self.below = Below::TlsInBulk;
                }
                Poll::Ready(Ok(true))
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_write(cx, bytes),
            Io::Dialled(tls) => Pin::new(tls.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, slices),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_write_vectored(cx, slices),
            Io::Dialled(tls) => Pin::new(tls.as_mut()).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
            Io::Dialled(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Io::Dialled(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
        }
    }
}
