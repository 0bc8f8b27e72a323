//! The byte stream below an upstream HTTP/2 connection: tells the connection's meter what comes and goes, and reads the heads
//! of answers.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::heads::Heads;
use super::meter::Meter;
use crate::net::Stream;

/// What the library is given before the streams' tasks run. It unpacks each head at once, and a few bytes may stand for a large
/// interim answer: only a stream's task can say that it has had too many.
const AT_ONCE: usize = 64 * 1024;

pub struct UpstreamIo {
    stream: Stream,
    meter: Rc<Meter>,
    heads: Heads,
    /// A head could not be followed: the library has to end the connection at it, and reads nothing behind it.
    lost: bool,
    /// Bytes given since the others have run.
    given: usize,
}

impl UpstreamIo {
    pub fn new(stream: Stream, meter: Rc<Meter>, heads: Heads) -> UpstreamIo {
        UpstreamIo { stream, meter, heads, lost: false, given: 0 }
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(Ok(count)) => self.meter.wrote(*count),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.meter.is_blocked(),
        }
        written
    }
}

impl Drop for UpstreamIo {
    fn drop(&mut self) {
        self.meter.wake_writers();
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.lost {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        if self.meter.must_rest(cx) {
            return Poll::Pending;
        }
        let given = std::mem::take(&mut self.given);
        if given >= AT_ONCE {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.given = given + buffer.filled().len() - before;
        self.meter.read(&buffer.filled()[before..]);
        self.lost = !self.heads.heard(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
