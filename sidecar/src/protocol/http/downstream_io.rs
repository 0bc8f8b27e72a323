//! The byte stream below a downstream HTTP/2 connection: tells the connection table that bytes move, and counts what a
//! peer makes the library do.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::flood::{self, Flood};
use crate::connect::http2::Meter;
use crate::connect::http2::heads::{Heads, Marks};
use crate::connection::{Entry, State};
use crate::net::Stream;

pub struct DownstreamIo {
    stream: Stream,
    entry: Arc<Entry>,
    /// What comes and goes.
    meter: Rc<Meter>,
    /// What the peer may send.
    flood: Flood,
    heads: Heads,
    marks: Rc<Marks>,
    /// A head could not be followed, which has to be the end for the library as well.
    lost: bool,
    /// Once the peer sent too much: what the library reads instead, until it ends the connection.
    instead: Option<VecDeque<u8>>,
}

impl DownstreamIo {
    pub fn new(
        stream: Stream,
        entry: Arc<Entry>,
        meter: Rc<Meter>,
        flood: Flood,
        heads: Heads,
        marks: Rc<Marks>,
    ) -> DownstreamIo {
        entry.enter(State::Idle);
        DownstreamIo { stream, entry, meter, flood, heads, marks, lost: false, instead: None }
    }
}

impl Drop for DownstreamIo {
    fn drop(&mut self) {
        self.meter.wake_writers();
    }
}

/// The end of it is an end of the stream; the library has closed before.
fn instead_of_a_flood(instead: &mut VecDeque<u8>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    let (bytes, _) = instead.as_slices();
    let count = bytes.len().min(buffer.remaining());
    buffer.put_slice(&bytes[..count]);
    instead.drain(..count);
    Poll::Ready(Ok(()))
}

impl AsyncRead for DownstreamIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(instead) = &mut this.instead {
            return instead_of_a_flood(instead, buffer);
        }
        if this.lost {
            return instead_of_a_flood(this.instead.insert(flood::make_it_calm().into()), buffer);
        }
        if this.meter.must_rest(cx) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        this.marks.set_drained(read.is_pending());
        ready!(read)?;
        if let Some(enough) = this.flood.heard(&buffer.filled()[before..], this.entry.clock()) {
            tracing::debug!(client = %this.entry.client, "too many resets or control frames: closing");
            buffer.set_filled(before + enough);
            let instead = this.instead.insert(flood::make_it_calm().into());
            return if enough == 0 { instead_of_a_flood(instead, buffer) } else { Poll::Ready(Ok(())) };
        }
        if buffer.filled().len() > before {
            this.lost = !this.heads.heard(&buffer.filled()[before..]);
            this.meter.read(&buffer.filled()[before..]);
            this.entry.touch();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for DownstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Poll::Ready(written) = Pin::new(&mut this.stream).poll_write_vectored(cx, slices) else {
            this.meter.is_blocked();
            return Poll::Pending;
        };
        let count = written?;
        this.meter.wrote(count);
        this.flood.sent(count);
        this.entry.touch();
        Poll::Ready(Ok(count))
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
