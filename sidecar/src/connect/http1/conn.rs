//! A connection that carries HTTP/1.1: the stream, what was received and not parsed yet, what waits to be sent. An idle
//! one holds no buffer: the thread lends one for what is received and one for what is sent, as long as there is
//! something in them.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head;
use crate::net::Stream;

/// What one read takes at most.
const CHUNK: usize = 64 * 1024;
/// Body data up to this size is copied behind the head, so that one plain write carries both.
const COPY_BELOW: usize = 8 * 1024;
/// Queued bytes from which on they are sent before more is taken.
const ENOUGH: usize = 16 * 1024;
/// What a lent vector may have grown to and still be kept.
const KEEP: usize = 64 * 1024;
/// Buffers of each kind that one thread keeps to lend.
const SPARES: usize = 32;
/// What a buffer for received bytes holds at first: a head, and with it most answers.
const RECEIVE: usize = 4 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static SPARE_READ: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
pub struct Conn {
    stream: Stream,
    read: BytesMut,
    out: Vec<u8>,
    written: usize,
    /// Goes out behind `out`; nothing is queued behind it before it is gone.
    data: Bytes,
    /// The line end that closes the chunk in `data`.
    owes_line_end: bool,
    /// Something was written since the last flush of the stream.
    unflushed: bool,
    /// Bytes ever written to the stream.
    sent: u64,
}

impl Conn {
    pub fn new(mut stream: Stream) -> Conn {
        let read = stream.take_ahead();
        Conn {
            stream,
            read,
            out: Vec::new(),
            written: 0,
            data: Bytes::new(),
            owes_line_end: false,
            unflushed: false,
            sent: 0,
        }
    }

    /// What was received and not parsed yet.
    pub fn received(&mut self) -> &mut BytesMut {
        &mut self.read
    }

    pub fn has_received(&self) -> bool {
        !self.read.is_empty()
    }

    /// Whether a peer may send more ahead of time.
    pub fn has_room_to_receive(&self) -> bool {
        self.read.len() < CHUNK
    }

    /// Bytes written to the stream so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The stream itself, once HTTP is over, with what was read too far.
    pub fn into_stream(mut self) -> Stream {
        if !self.read.is_empty() {
            self.stream.unread(&self.read);
        }
        self.stream
    }

    /// Receives once more. 0 is the end of the stream.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            let bytes = buffer.filled();
            if self.read.is_empty() {
                if self.read.capacity() == 0 {
                    self.read = SPARE_READ.with_borrow_mut(Vec::pop).unwrap_or_default();
                }
                // What was parsed out of a buffer shares it: it is used again when all of that is gone.
                if !self.read.try_reclaim(bytes.len()) {
                    self.read = BytesMut::with_capacity(bytes.len().max(RECEIVE));
                }
            }
            self.read.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        })
    }

    /// Nothing is expected for now: gives the buffer back, if nothing is in it.
    pub fn rest(&mut self) {
        if !self.read.is_empty() {
            return;
        }
        let read = std::mem::take(&mut self.read);
        SPARE_READ.with_borrow_mut(|spare| {
            if spare.len() < SPARES {
                spare.push(read);
            }
        });
    }

    /// Whether an idle connection can be used: not when its peer has closed it or said something unasked. If it is, the
    /// task is woken when there is something to receive.
    pub fn is_silent(&mut self, cx: &mut Context<'_>) -> bool {
        let mut nothing = [0; 64];
        let mut buffer = ReadBuf::new(&mut nothing);
        self.read.is_empty() && Pin::new(&mut self.stream).poll_read(cx, &mut buffer).is_pending()
    }

    /// Where heads and framing are written to.
    pub fn queue(&mut self) -> &mut Vec<u8> {
        if self.out.capacity() == 0 {
            self.out = SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(2048));
        }
        &mut self.out
    }

    /// Queues a piece of a body. To be called only when [`Conn::has_room`].
    pub fn queue_data(&mut self, data: Bytes, chunked: bool) {
        if data.is_empty() {
            return;
        }
        let owes = std::mem::take(&mut self.owes_line_end);
        let out = self.queue();
        if owes {
            out.extend_from_slice(b"\r\n");
        }
        if chunked {
            head::write_hex(out, data.len());
        }
        if data.len() <= COPY_BELOW {
            out.extend_from_slice(&data);
            if chunked {
                out.extend_from_slice(b"\r\n");
            }
        } else {
            self.data = data;
            self.owes_line_end = chunked;
        }
    }

    /// Queues the end of a chunked body.
    pub fn queue_last_chunk(&mut self, trailers: Option<&HeaderMap>) {
        let owes = std::mem::take(&mut self.owes_line_end);
        let out = self.queue();
        if owes {
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"0\r\n");
        if let Some(trailers) = trailers {
            head::write_fields(out, trailers, None);
        }
        out.extend_from_slice(b"\r\n");
    }

    /// Whether more of a body can be queued before what is queued has gone out.
    pub fn has_room(&self) -> bool {
        self.data.is_empty() && self.out.len() - self.written < ENOUGH
    }

    pub fn is_flushed(&self) -> bool {
        self.written == self.out.len() && self.data.is_empty() && !self.unflushed
    }

    /// Sends what is queued.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let head = &self.out[self.written..];
            let count = match (head.is_empty(), self.data.is_empty()) {
                (true, true) => break,
                (false, true) => ready!(Pin::new(&mut self.stream).poll_write(cx, head))?,
                (true, false) => ready!(Pin::new(&mut self.stream).poll_write(cx, &self.data))?,
                (false, false) => {
                    let both = [io::IoSlice::new(head), io::IoSlice::new(&self.data)];
                    ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &both))?
                }
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.sent += count as u64;
            let of_head = count.min(self.out.len() - self.written);
            self.written += of_head;
            bytes::Buf::advance(&mut self.data, count - of_head);
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        self.give_back();
        Poll::Ready(Ok(()))
    }

    /// Says to the peer that nothing more will come.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn give_back(&mut self) {
        self.written = 0;
        self.data = Bytes::new();
        let mut out = std::mem::take(&mut self.out);
        if out.capacity() == 0 || out.capacity() > KEEP {
            return;
        }
        out.clear();
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARES {
                spare.push(out);
            }
        });
    }
}
