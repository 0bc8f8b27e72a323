//! Sockets: listeners and dials with the options that every socket of the mesh has, and [`Stream`], the one
//! byte-stream type of the walk: plain or TLS, with bytes that were read ahead and are read again first.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

use crate::outcome::{Error, Reason, Stage};

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

/// Opens a UDP socket that nobody shares.
pub fn bind_udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Whether this process may set a mark: else every socket that needs one would fail, later and one by one.
pub fn check_mark(mark: u32) -> io::Result<()> {
    let set = |domain| Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?.set_mark(mark);
    // Either family will do: a network namespace may lack one.
    set(Domain::IPV4).or_else(|error| if is_absent(&error) { set(Domain::IPV6) } else { Err(error) })
}

/// Whether the error of a bind says that this network namespace does not have the address, or its family at all.
pub fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Where the client of a redirected connection wanted to go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDst(SocketAddr);

impl OriginalDst {
    /// Asks the kernel (SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST). A connection that was not redirected has none and is
    /// refused: its client dialled the listener itself. Where connections are tracked the kernel then answers with the
    /// listener's own address; where they are not it knows of none (ENOENT), and without any rules not even of the
    /// question (ENOPROTOOPT).
    pub fn of(stream: &TcpStream) -> Result<OriginalDst, Error> {
        let failed = |error: io::Error| {
            Error::own(Stage::Accept, Reason::Internal, format!("the original destination cannot be read: {error}"))
        };
        let own = plain(stream.local_addr().map_err(failed)?);
        let socket = SockRef::from(stream);
        let asked = if own.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
        let original = match asked {
            Ok(original) => original.as_socket().map_or(own, plain),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => own,
            Err(error) => return Err(failed(error)),
        };
        if original == own {
            let detail = format!(
                "not redirected: the client connected to {own} itself, which takes redirected \
                                  connections only"
            );
            return Err(Error::downstream(Stage::Accept, Reason::OwnPort, detail));
        }
        Ok(OriginalDst(original))
    }

    pub fn address(self) -> SocketAddr {
        self.0
    }
}

/// One spelling for one destination: without what a socket address of IPv6 may carry besides.
fn plain(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(v6) => SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
    }
}

/// Whether some socket of this machine already listens on `address`: SO_REUSEPORT would share it silently.
pub fn is_taken(address: SocketAddr) -> bool {
    if address.port() == 0 {
        return false;
    }
    let probe = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    probe().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}

/// Whether an address belongs to this machine (or network namespace): who sends to its own address sends from it. That it
/// could be bound says less, where `net.ipv4.ip_nonlocal_bind` lets anything be bound.
pub fn is_local(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = || {
        let socket = std::net::UdpSocket::bind((any, 0))?;
        // Sends nothing.
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    ip.is_loopback() || (!ip.is_unspecified() && source().is_ok_and(|source| source.ip() == ip))
}

/// Connects; the caller bounds the time.
pub async fn connect(address: SocketAddr, options: &SocketOptions) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    options.apply(&SockRef::from(&socket))?;
    socket.connect(address).await
}

/// Connects to what is no part of the traffic, as the control plane; only the mark is set.
pub async fn connect_marked(address: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
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
    /// One end of a connection within this process.
    Pipe(Pipe),
}

/// Bytes that one end of a pipe may be ahead of the other, in each direction.
const PIPE: usize = 64 * 1024;

#[derive(Debug)]
struct Pipe {
    io: DuplexStream,
    /// Either end was reset: what the other reads as an end is none.
    reset: Arc<AtomicBool>,
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
    /// A connection within this process, by its two ends.
    pub fn pipe() -> (Stream, Stream) {
        let reset = Arc::new(AtomicBool::new(false));
        let end = |io| Stream {
            ahead: BytesMut::new(),
            io: Io::Pipe(Pipe { io, reset: reset.clone() }),
            below: Below::Nothing,
        };
        let (one, other) = tokio::io::duplex(PIPE);
        (end(one), end(other))
    }

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
        let Some(tcp) = self.tcp() else { return Poll::Ready(Ok(())) };
        let ready = tcp.poll_read_ready(cx);
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

    /// The socket below, if there is one.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match &self.io {
            Io::Tcp(tcp) => Some(tcp),
            Io::Accepted(tls) => tls.get_ref().0.tcp(),
            Io::Dialled(tls) => tls.get_ref().0.tcp(),
            Io::Pipe(_) => None,
        }
    }

    /// Waits until the peer's kernel has everything that was written; the caller bounds the time.
    pub async fn delivered(&self) {
        let mut pause = Duration::from_millis(1);
        while self.tcp().is_some_and(|tcp| unacknowledged(tcp) > 0) {
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }

    /// Makes the close of this socket a reset, so that a truncation cannot be taken for an end.
    pub fn reset_on_close(&self) {
        if let Some(tcp) = self.tcp() {
            // Failing leaves an orderly close, which only tells the peer less.
            let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
        }
        if let Io::Pipe(pipe) = &self.io {
            pipe.reset.store(true, Ordering::Relaxed);
        }
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
            Io::Pipe(pipe) => {
                let before = buffer.filled().len();
                std::task::ready!(Pin::new(&mut pipe.io).poll_read(cx, buffer))?;
                let ended = buffer.filled().len() == before && buffer.remaining() > 0;
                if ended && pipe.reset.load(Ordering::Relaxed) {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Poll::Ready(Ok(()))
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
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_write(cx, bytes),
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
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_write_vectored(cx, slices),
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
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Io::Dialled(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_pipe_is_a_connection_with_half_close_and_resets() {
        let (mut one, mut other) = Stream::pipe();
        one.write_all(b"question").await.unwrap();
        one.shutdown().await.unwrap();
        let mut heard = Vec::new();
        other.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"question");
        other.write_all(b"ans").await.unwrap();
        other.reset_on_close();
        drop(other);
        let mut first = [0; 3];
        one.read_exact(&mut first).await.unwrap();
        let error = one.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "a truncation is no end");
    }

    #[tokio::test]
    async fn a_connection_that_was_not_redirected_has_no_original_destination() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let own = listener.local_addr().unwrap();
            let (_client, accepted) = tokio::join!(TcpStream::connect(own), listener.accept());
            let error = OriginalDst::of(&accepted.unwrap().0).unwrap_err();
            assert_eq!(error.reason, Reason::OwnPort, "{error}");
            assert!(error.to_string().contains(&own.to_string()), "{error}");
        }
    }

    #[test]
    fn what_is_local() {
        for (ip, local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("192.0.2.1", false),
            ("2001:db8::1", false),
            ("255.255.255.255", false),
            ("224.0.0.1", false),
        ] {
            assert_eq!(is_local(ip.parse().unwrap()), local, "{ip}");
        }
    }
}
