//! The byte stream below a downstream HTTP connection. It tells the connection table what the connection is doing
//! (the first byte of a head starts its 10 s), writes interim answers ahead of the final one, and replaces the
//! HTTP/1 parser's own bare refusals by the sidecar's.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::answer;
use super::flood::{self, Flood};
use crate::connection::{Command, Entry, State};
use crate::net::Stream;
use crate::outcome::Reason;

/// Told when a head is refused before it became a request.
pub type OnRefusal = Box<dyn Fn(Reason) + Send>;

pub struct DownstreamIo {
    stream: Stream,
    entry: Arc<Entry>,
    /// HTTP/1: `None` on HTTP/2, whose frames have no such states.
    http1: Option<Http1>,
    /// HTTP/2: what the peer may send.
    flood: Option<Box<Http2>>,
}

struct Http2 {
    flood: Flood,
    /// Once the peer sent too much: what the library reads instead, until it ends the connection.
    instead: Option<VecDeque<u8>>,
}

struct Http1 {
    proxy: Arc<str>,
    on_refusal: OnRefusal,
    /// Bytes of ours that go out before the library's.
    queue: VecDeque<u8>,
    /// The library's own refusal was replaced; nothing of it may follow.
    refused: bool,
    /// Requests whose answers are written and flushed to the end.
    answered: u64,
}

impl DownstreamIo {
    pub fn http1(stream: Stream, entry: Arc<Entry>, proxy: Arc<str>, on_refusal: OnRefusal) -> DownstreamIo {
        let state = if stream.ahead().is_empty() { State::Idle } else { State::Head };
        entry.enter(state);
        let http1 = Some(Http1 { proxy, on_refusal, queue: VecDeque::new(), refused: false, answered: 0 });
        DownstreamIo { stream, entry, http1, flood: None }
    }

    pub fn http2(stream: Stream, entry: Arc<Entry>, flood: Flood) -> DownstreamIo {
        entry.enter(State::Idle);
        DownstreamIo { stream, entry, http1: None, flood: Some(Box::new(Http2 { flood, instead: None })) }
    }

    /// The stream itself, once HTTP is over.
    pub fn into_stream(self) -> Stream {
        self.stream
    }

    /// Writes what is queued. Ready when the queue is empty.
    fn poll_queue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(http1) = &mut self.http1 else { return Poll::Ready(Ok(())) };
        loop {
            while !http1.queue.is_empty() {
                let (bytes, _) = http1.queue.as_slices();
                let count = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                http1.queue.drain(..count);
            }
            // Only now: for a client that reads nothing, interim answers must not pile up here.
            match self.entry.take_interim() {
                Some(interim) => http1.queue.extend(interim),
                None => return Poll::Ready(Ok(())),
            }
        }
    }

    /// A write while no request runs and every answer is flushed is the parser refusing a head: `HTTP/1.1 4xx ...`.
    /// Says the status.
    fn parser_refusal(&self, bytes: &[u8]) -> Option<u16> {
        let http1 = self.http1.as_ref()?;
        if http1.answered != self.entry.requests() || !matches!(self.entry.state(), State::Idle | State::Head) {
            return None;
        }
        let status = bytes.strip_prefix(b"HTTP/1.1 ").or_else(|| bytes.strip_prefix(b"HTTP/1.0 "))?.get(..3)?;
        std::str::from_utf8(status).ok()?.parse().ok().filter(|status| (400..500).contains(status))
    }

    fn refuse(&mut self, reason: Reason, status: u16) {
        if let Some(http1) = &mut self.http1 {
            http1.queue.extend(answer::refuse_raw(reason, status, &http1.proxy));
            http1.refused = true;
            (http1.on_refusal)(reason);
        }
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
        if this.entry.command() == Command::HeadTimeout && this.entry.state() == State::Head {
            let http1 = this.http1.as_ref().is_some_and(|http1| !http1.refused);
            if http1 {
                this.refuse(Reason::RequestHeadTimeout, 408);
            }
            ready!(this.poll_queue(cx))?;
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if let Some(http2) = &mut this.flood
            && let Some(instead) = &mut http2.instead
        {
            return instead_of_a_flood(instead, buffer);
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        if let Some(http2) = &mut this.flood
            && let Some(enough) = http2.flood.heard(&buffer.filled()[before..])
        {
            tracing::debug!(client = %this.entry.client, "too many resets or control frames: closing");
            buffer.set_filled(before + enough);
            let instead = http2.instead.insert(flood::make_it_calm().into());
            return if enough == 0 { instead_of_a_flood(instead, buffer) } else { Poll::Ready(Ok(())) };
        }
        if buffer.filled().len() > before {
            match this.entry.state() {
                // HTTP/1: the first byte of the next head. The time of a head runs from here, not from each byte.
                State::Idle if this.http1.is_some() => this.entry.enter(State::Head),
                State::Head => {}
                State::Opening | State::Idle | State::Busy | State::Tunnel => this.entry.touch(),
            }
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
        ready!(this.poll_queue(cx))?;
        let refused = this.http1.as_ref().is_some_and(|http1| http1.refused);
        let length = || slices.iter().map(|slice| slice.len()).sum();
        if refused {
            return Poll::Ready(Ok(length()));
        }
        let refusal = slices.iter().find(|slice| !slice.is_empty()).and_then(|slice| this.parser_refusal(slice));
        if let Some(status) = refusal {
            let reason = match status {
                408 => Reason::RequestHeadTimeout,
                414 => Reason::RequestTargetTooLong,
                431 => Reason::RequestHeadTooLarge,
                _ => Reason::BadRequest,
            };
            this.refuse(reason, status);
            return Poll::Ready(Ok(length()));
        }
        let count = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, slices))?;
        if let Some(http2) = &mut this.flood {
            http2.flood.sent(count);
        }
        if this.entry.state() != State::Head {
            this.entry.touch();
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_queue(cx))?;
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        let this = &mut *self;
        if let Some(http1) = &mut this.http1
            && matches!(this.entry.state(), State::Idle | State::Head)
        {
            http1.answered = this.entry.requests();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_queue(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
