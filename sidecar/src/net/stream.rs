//! [`Stream`], the one byte-stream type of the walk: plain or TLS, with bytes that were read ahead and are read again
//! first.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;

use super::cut::{Cut, Handle};
use super::liveness::{Liveness, heard_ago, unacknowledged};
use super::receive::receive;

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
    Tcp(Tcp),
    /// The server end of mutual TLS; below it a stream that replays the ClientHello.
    Accepted(Box<tokio_rustls::server::TlsStream<Stream>>),
    /// The client end.
    Dialled(Box<Dialled>),
    /// One end of a connection within this process.
    Pipe(Pipe),
}

#[derive(Debug)]
struct Dialled {
    /// First, so that it goes before the socket is closed.
    handle: Option<Rc<Handle>>,
    tls: tokio_rustls::client::TlsStream<Stream>,
}

#[derive(Debug)]
struct Tcp {
    /// First, so that it goes before the socket is closed.
    liveness: Arc<Liveness>,
    socket: TcpStream,
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
        let io = Io::Tcp(Tcp { liveness: Liveness::of(&tcp), socket: tcp });
        Stream { ahead: BytesMut::new(), io, below: Below::Nothing }
    }
}

impl From<tokio_rustls::server::TlsStream<Stream>> for Stream {
    fn from(tls: tokio_rustls::server::TlsStream<Stream>) -> Stream {
        Stream { ahead: BytesMut::new(), io: Io::Accepted(Box::new(tls)), below: Below::Nothing }
    }
}

impl From<tokio_rustls::client::TlsStream<Stream>> for Stream {
    fn from(tls: tokio_rustls::client::TlsStream<Stream>) -> Stream {
        Stream {
            ahead: BytesMut::new(),
            io: Io::Dialled(Box::new(Dialled { handle: None, tls })),
            below: Below::Nothing,
        }
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

    /// Whether it is TCP without TLS, as it is towards the application of this sidecar.
    pub fn is_plain(&self) -> bool {
        matches!(self.io, Io::Tcp(_))
    }

    /// Acknowledges at once what has come on plain TCP, and does not wait for an answer that could carry the ACK: the peer's
    /// kernel may hold back the next bytes until then (Nagle, RFC 896, against the delayed ACK of RFC 1122 4.2.3.2).
    pub fn acknowledge(&self) {
        if let Io::Tcp(tcp) = &self.io {
            // Failing leaves the ACK to the kernel's timer.
            let _ = SockRef::from(&tcp.socket).set_tcp_quickack(true);
        }
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
            Io::Tcp(tcp) => Some(&tcp.socket),
            Io::Accepted(tls) => tls.get_ref().0.tcp(),
            Io::Dialled(dialled) => dialled.tls.get_ref().0.tcp(),
            Io::Pipe(_) => None,
        }
    }

    /// A handle with which a connection that was dialled with TLS can be cut, wherever the stream goes.
    pub fn cut(&mut self) -> Option<Cut> {
        let Io::Dialled(dialled) = &mut self.io else { return None };
        let handle = Handle::of(dialled.tls.get_ref().0.tcp()?);
        let cut = Handle::cut(&handle);
        dialled.handle = Some(handle);
        Some(cut)
    }

    /// Whether the peer's kernel acknowledged anything within this time, a keep-alive probe among it. The other end of a pipe
    /// lives as long as this process.
    pub fn was_heard_within(&self, time: Duration) -> bool {
        self.tcp().is_none_or(|tcp| heard_ago(tcp.as_raw_fd()).is_some_and(|ago| ago < time))
    }

    /// Waits until the peer's kernel has everything that was written; the caller bounds the time.
    pub async fn delivered(&self) {
        let mut pause = Duration::from_millis(1);
        while self.tcp().is_some_and(|tcp| unacknowledged(tcp.as_raw_fd()) > 0) {
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }

    /// The peer's reset, for somebody who has read its end and reads no more; it is told once.
    pub fn take_reset(&self) -> Option<io::Error> {
        match &self.io {
            Io::Pipe(pipe) => pipe.reset.load(Ordering::Relaxed).then(|| io::ErrorKind::ConnectionReset.into()),
            Io::Tcp(_) | Io::Accepted(_) | Io::Dialled(_) => self.tcp()?.take_error().ok()?,
        }
    }

    /// Whether the kernel has bytes or an end for us that the thread has not looked at yet: what readiness reports is as
    /// old as the thread's last look. Asked of plain TCP; TLS has records of its own that say nothing.
    pub fn has_unseen(&self) -> bool {
        let Io::Tcp(tcp) = &self.io else { return false };
        !matches!(SockRef::from(&tcp.socket).peek(&mut [std::mem::MaybeUninit::uninit()]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether the drop of this socket is a reset, behind an end that was sent already. A pipe's other end would take it for
    /// a reset at once, and notices the drop by itself.
    pub fn reset_when_dropped(&self, reset: bool) {
        if let Some(tcp) = self.tcp() {
            // Failing leaves an orderly close, which only tells the peer less.
            let _ = SockRef::from(tcp).set_linger(reset.then_some(Duration::ZERO));
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

impl AsyncRead for Tcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            std::task::ready!(self.socket.poll_read_ready(cx))?;
            match receive(&self.socket, buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map_err(|error| self.told(error))),
            }
        }
    }
}

impl Tcp {
    /// What an error means when it is ours.
    fn told(&self, error: io::Error) -> io::Error {
        if self.liveness.is_given_up() {
            return io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer acknowledged nothing for too long, not even a probe",
            );
        }
        error
    }
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
            Io::Dialled(dialled) => {
                let (stream, session) = dialled.tls.get_mut();
                if session.wants_read() && stream.poll_read_ready(cx)?.is_pending() {
                    return Poll::Pending;
                }
                Pin::new(&mut dialled.tls).poll_read(cx, buffer)
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
            Io::Tcp(tcp) => {
                tcp.liveness.wrote();
                Pin::new(&mut tcp.socket).poll_write(cx, bytes).map_err(|error| tcp.told(error))
            }
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_write(cx, bytes),
            Io::Dialled(dialled) => Pin::new(&mut dialled.tls).poll_write(cx, bytes),
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(tcp) => {
                tcp.liveness.wrote();
                Pin::new(&mut tcp.socket).poll_write_vectored(cx, slices).map_err(|error| tcp.told(error))
            }
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_write_vectored(cx, slices),
            Io::Dialled(dialled) => Pin::new(&mut dialled.tls).poll_write_vectored(cx, slices),
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(&mut tcp.socket).poll_flush(cx),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
            Io::Dialled(dialled) => Pin::new(&mut dialled.tls).poll_flush(cx),
            Io::Pipe(pipe) => Pin::new(&mut pipe.io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(&mut tcp.socket).poll_shutdown(cx),
            Io::Accepted(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Io::Dialled(dialled) => Pin::new(&mut dialled.tls).poll_shutdown(cx),
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
        assert!(one.take_reset().is_none() && other.take_reset().is_none());
        other.write_all(b"ans").await.unwrap();
        other.reset_on_close();
        drop(other);
        let mut first = [0; 3];
        one.read_exact(&mut first).await.unwrap();
        let error = one.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "a truncation is no end");
        assert!(one.take_reset().is_some());
    }
}
