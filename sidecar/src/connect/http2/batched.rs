//! The byte stream below an HTTP/2 connection, on both sides: what the library writes is held until the end of the turn in
//! which this thread handles what came (`connect/http1/turn.rs` says why), so that the frames of all streams that are ready
//! leave in one write. The library alone would write each DATA frame by itself. Where nothing else is ready the turn ends at
//! once. Larger pieces are written through, behind what is held.
//!
//! The connection's task calls [`Batched::end_turn`] after it has polled the connection.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is held at most. TLS has records of this size.
const MOST: usize = 16 * 1024;

/// Slices that the library writes at once: the head of a frame and its payload.
const SLICES: usize = 8;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;
const SETTINGS: u8 = 4;
const MAX_HEADER_LIST_SIZE: [u8; 2] = [0, 6];

/// The stream, shared by the library and by the task that drives the connection.
pub struct Batched<S>(Rc<RefCell<Inner<S>>>);

impl<S> Clone for Batched<S> {
    fn clone(&self) -> Batched<S> {
        Batched(self.0.clone())
    }
}

thread_local! {
    /// Buffers to lend: what is held rarely outlives a turn.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Buffers that one thread keeps to lend.
const SPARES: usize = 16;

struct Inner<S> {
    below: S,
    held: Vec<u8>,
    /// Bytes of `held` that are written.
    written: usize,
    /// The header list that is announced; the library would announce what it takes. None: it has been.
    announced: Option<u32>,
    turn: Turn,
    /// Nothing can be written any more.
    failed: Option<io::ErrorKind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing to write.
    Rest,
    /// The task is woken behind those that are ready now.
    Ending,
    /// The peer takes no more for now.
    Blocked,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Batched<S> {
    /// `header_list` is what SETTINGS tell the peer: the library takes more, so that the sidecar can say what is wrong.
    pub fn new(below: S, header_list: u32) -> Batched<S> {
        let inner =
            Inner { below, held: Vec::new(), written: 0, announced: Some(header_list), turn: Turn::Rest, failed: None };
        Batched(Rc::new(RefCell::new(inner)))
    }

    /// To be called when the connection was polled: writes what is held once the tasks that are ready have run. The library
    /// sees an error when it is polled next, which is then.
    pub fn end_turn(&self, cx: &mut Context<'_>) {
        self.0.borrow_mut().end_turn(cx);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    fn end_turn(&mut self, cx: &mut Context<'_>) {
        match self.turn {
            Turn::Rest if self.held.is_empty() => {}
            Turn::Rest => {
                self.turn = Turn::Ending;
                cx.waker().wake_by_ref();
            }
            Turn::Ending | Turn::Blocked => {
                self.turn = match self.poll_out(cx) {
                    Poll::Pending => Turn::Blocked,
                    Poll::Ready(Ok(())) => Turn::Rest,
                    Poll::Ready(Err(error)) => {
                        self.clear();
                        self.failed = Some(error.kind());
                        cx.waker().wake_by_ref();
                        Turn::Rest
                    }
                };
            }
        }
    }

    /// Writes what is held, all the way to the socket.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let count = ready!(Pin::new(&mut self.below).poll_write(cx, &self.held[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.clear();
        Pin::new(&mut self.below).poll_flush(cx)
    }

    /// Gives the buffer back: an idle connection holds none.
    fn clear(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        self.written = 0;
        if held.capacity() == 0 || held.capacity() > 2 * MOST {
            return;
        }
        held.clear();
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARES {
                spare.push(held);
            }
        });
    }

    fn check(&self) -> io::Result<()> {
        self.failed.map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.check()?;
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if self.held.len() + total <= MOST {
            if self.held.capacity() == 0 {
                self.held = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
            }
            for slice in slices {
                self.held.extend_from_slice(slice);
            }
            self.announce();
            return Poll::Ready(Ok(total));
        }
        // Nothing larger comes before the settings.
        loop {
            let mut all = [io::IoSlice::new(&[]); SLICES];
            all[0] = io::IoSlice::new(&self.held[self.written..]);
            for (one, slice) in all[1..].iter_mut().zip(slices) {
                *one = io::IoSlice::new(slice);
            }
            let before = all[0].len();
            let count = ready!(Pin::new(&mut self.below).poll_write_vectored(cx, &all))?;
            if count < before {
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.written += count;
                continue;
            }
            self.clear();
            if count > before || total == 0 {
                return Poll::Ready(Ok(count - before));
            }
        }
    }

    /// Puts the announced value into the library's first SETTINGS (RFC 9113 section 6.5.2), which are still held.
    fn announce(&mut self) {
        let Some(announced) = self.announced else { return };
        let begin = if self.held.starts_with(PREFACE) { PREFACE.len() } else { 0 };
        let Some(frame) = self.held.get_mut(begin..).filter(|rest| rest.len() >= HEAD && rest[3] == SETTINGS) else {
            return;
        };
        self.announced = None;
        for setting in frame[HEAD..].chunks_exact_mut(6).filter(|setting| setting[..2] == MAX_HEADER_LIST_SIZE) {
            setting[2..].copy_from_slice(&announced.to_be_bytes());
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Batched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().below).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: the end of the turn flushes.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow().check())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_out(cx))?;
        Pin::new(&mut inner.below).poll_shutdown(cx)
    }
}
