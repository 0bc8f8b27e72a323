//! Bytes that are not parsed: copied both ways until both sides have ended. Half-close is passed on in each
//! direction. When one side breaks, by a reset or by TLS that ends without saying so, the other gets what was said before
//! and then a reset: a truncation never looks like an end. The scratch buffer belongs to the worker, so that an idle
//! connection holds none; a connection keeps bytes of its own only while its peer does not take them.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::screen::{Found, Screen};
use crate::connection::Entry;
use crate::net::Stream;
use crate::outcome::Reason;

/// What one read takes at most, and so what one direction may hold back.
const CHUNK: usize = 64 * 1024;
/// What one TLS record holds at most.
const RECORD: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// One direction of a copy.
#[derive(Default)]
struct Half {
    /// Read, not yet written.
    held: Vec<u8>,
    written: usize,
    state: HalfState,
    /// Whether something was written since the last flush.
    unflushed: bool,
    /// What the reader said behind the bytes of its last read.
    behind: Option<io::Result<()>>,
    /// The reader broke: its end, if one still comes, is none.
    broken: bool,
    /// The writer failed while it had bytes to take.
    lost: bool,
}

#[derive(Default, PartialEq, Eq)]
enum HalfState {
    #[default]
    Open,
    /// The reader is at its end; the writer is told when everything is written.
    Ended,
    Closed,
}

/// Which side an error of the copy came from.
#[derive(Debug)]
pub enum CopyError {
    Downstream(io::Error),
    Upstream(io::Error),
    /// The client's bytes turned out to be HTTP, and the server has got none of what makes them so.
    Http(Found),
    /// This sidecar closed the connection.
    Closed(Reason),
}

impl CopyError {
    /// The reason and the detail that the record of the connection gets.
    pub fn tell(self) -> (Reason, String) {
        match self {
            CopyError::Downstream(error) => (Reason::ClientClosed, error.to_string()),
            CopyError::Upstream(error) => (Reason::UpstreamReset, error.to_string()),
            CopyError::Http(found) => (Reason::ProtocolMismatch, found.to_owned()),
            CopyError::Closed(reason) => (reason, "this sidecar closed the connection".to_owned()),
        }
    }
}

/// Whether an error says no more than that a side closed its connection: by a reset, or with the other's end still to be
/// passed on.
pub fn is_close(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | NotConnected | UnexpectedEof)
}

/// What is known of a connection whose bytes are copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Declared {
    /// It is to be opaque, whatever its bytes are.
    Opaque,
    /// Its first bytes were taken for opaque.
    Nothing,
}

impl Declared {
    /// What looks at the client's bytes; `server` is what the server has said already.
    pub fn screen(self, server: &[u8]) -> Option<Box<Screen>> {
        match self {
            Declared::Opaque => None,
            Declared::Nothing => Screen::behind(server),
        }
    }
}

/// How long the last words of a side that broke may take to reach the other.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Both streams. Unless both directions have ended, closing them is a reset, whoever drops them.
struct Both {
    downstream: Stream,
    upstream: Stream,
    whole: bool,
}

impl Drop for Both {
    fn drop(&mut self) {
        if !self.whole {
            self.downstream.reset_on_close();
            self.upstream.reset_on_close();
        }
    }
}

/// Copies until both directions have ended. `forth` counts bytes from downstream to upstream, `back` the others. The
/// screen, where nobody declared that the bytes are opaque, looks at the client's first. How a side closes is its own
/// affair: it is an error only when bytes of the other side, or its own last words, are lost by it.
pub async fn copy(
    downstream: Stream,
    upstream: Stream,
    entry: &Entry,
    screen: Option<Box<Screen>>,
    forth_bytes: impl Fn(u64),
    back_bytes: impl Fn(u64),
) -> Result<(), CopyError> {
    let mut both = Both { downstream, upstream, whole: false };
    let Both { downstream, upstream, whole } = &mut both;
    let mut forth = Half::default();
    let mut back = Half::default();
    let screen = RefCell::new(screen);
    let from_client = |bytes: &[u8]| {
        if let Some(screen) = &mut *screen.borrow_mut() {
            screen.client(bytes)?;
        }
        entry.touch();
        forth_bytes(bytes.len() as u64);
        Ok(())
    };
    let from_server = |bytes: &[u8]| {
        screen.borrow_mut().take_if(|screen| {
            screen.server(bytes);
            screen.is_lifted()
        });
        entry.touch();
        back_bytes(bytes.len() as u64);
        Ok(())
    };
    let result = std::future::poll_fn(|cx| {
        entry.listen(cx.waker());
        if entry.command() == crate::connection::Command::Close {
            return Poll::Ready(entry.closed_for().map_or(Ok(false), |reason| Err(CopyError::Closed(reason))));
        }
        if let Some(idle) = entry.take_doubt() {
            if ![&*downstream, &*upstream].into_iter().all(|stream| stream.was_heard_within(idle)) {
                return Poll::Ready(Err(CopyError::Closed(Reason::IdleTimeout)));
            }
            entry.touch();
        }
        let forth_done = forth.poll(cx, downstream, upstream, from_client);
        let forth_done = match forth_done {
            Poll::Ready(Err(End::Read(error))) => return Poll::Ready(Err(CopyError::Downstream(error))),
            Poll::Ready(Err(End::Write(error))) => return Poll::Ready(Err(CopyError::Upstream(error))),
            Poll::Ready(Err(End::Found(what))) => return Poll::Ready(Err(CopyError::Http(what))),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let back_done = back.poll(cx, upstream, downstream, from_server);
        // Who has ended is not read any more, so nothing tells of its reset: it is asked for, once per tick.
        if forth_done || back_done.is_ready() {
            entry.tick();
        }
        if forth_done
            && back_done.is_pending()
            && let Some(error) = downstream.take_reset()
        {
            return Poll::Ready(Err(CopyError::Downstream(error)));
        }
        match back_done {
            Poll::Ready(Err(End::Read(error))) => Poll::Ready(Err(CopyError::Upstream(error))),
            Poll::Ready(Err(End::Write(error))) => Poll::Ready(Err(CopyError::Downstream(error))),
            Poll::Ready(Err(End::Found(what))) => Poll::Ready(Err(CopyError::Http(what))),
            Poll::Ready(Ok(())) if forth_done => Poll::Ready(Ok(true)),
            Poll::Ready(Ok(())) => match upstream.take_reset() {
                Some(error) => Poll::Ready(Err(CopyError::Upstream(error))),
                None => Poll::Pending,
            },
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    if let Ok(ended) = result {
        *whole = ended;
        return Ok(());
    }
    // Boxed: most connections end in order, and the task of one is as large as its largest part.
    let rest = Box::pin(async {
        match &result {
            Err(CopyError::Downstream(_)) => forth.last_words(downstream, upstream, from_client).await,
            Err(CopyError::Upstream(_)) => back.last_words(upstream, downstream, from_server).await,
            Ok(_) | Err(CopyError::Http(_) | CopyError::Closed(_)) => {}
        }
    });
    // A side that does not take them in time is cut off in the middle.
    let said = tokio::time::timeout(LAST_WORDS, rest).await.is_ok();
    match result {
        Err(CopyError::Downstream(error) | CopyError::Upstream(error))
            if is_close(&error) && said && !forth.has_lost() && !back.has_lost() =>
        {
            Ok(())
        }
        result => result.map(|_| ()),
    }
}

enum End {
    Read(io::Error),
    Write(io::Error),
    Found(Found),
}

impl Half {
    /// Bytes were read that the writer did not get.
    fn has_lost(&self) -> bool {
        self.lost || self.written < self.held.len()
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut Stream,
        writer: &mut Stream,
        seen: impl Fn(&[u8]) -> Result<(), Found>,
    ) -> Poll<Result<(), End>> {
        loop {
            ready!(self.poll_write_held(cx, writer)).map_err(End::Write)?;
            match self.state {
                HalfState::Open => {}
                HalfState::Ended if self.broken => return Poll::Ready(Ok(())),
                HalfState::Ended => {
                    ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(End::Write)?;
                    self.state = HalfState::Closed;
                    return Poll::Ready(Ok(()));
                }
                HalfState::Closed => return Poll::Ready(Ok(())),
            }
            let read = SCRATCH.with_borrow_mut(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                ready!(self.poll_fill(cx, reader, &mut buffer)).map_err(End::Read)?;
                let bytes = buffer.filled();
                if bytes.is_empty() {
                    self.state = HalfState::Ended;
                    return Poll::Ready(Ok(()));
                }
                seen(bytes).map_err(End::Found)?;
                self.unflushed = true;
                let mut written = 0;
                while written < bytes.len() {
                    let error = match Pin::new(&mut *writer).poll_write(cx, &bytes[written..]) {
                        Poll::Ready(Ok(0)) => io::ErrorKind::WriteZero.into(),
                        Poll::Ready(Ok(n)) => {
                            written += n;
                            continue;
                        }
                        Poll::Ready(Err(error)) => error,
                        Poll::Pending => break,
                    };
                    self.lost = true;
                    return Poll::Ready(Err(End::Write(error)));
                }
                self.held.extend_from_slice(&bytes[written..]);
                Poll::Ready(Ok(()))
            });
            match read {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    if self.unflushed {
                        let flushed = ready!(Pin::new(&mut *writer).poll_flush(cx));
                        self.lost |= flushed.is_err();
                        flushed.map_err(End::Write)?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Brings what the reader, which is broken, said before to the writer.
    async fn last_words(
        &mut self,
        reader: &mut Stream,
        writer: &mut Stream,
        seen: impl Fn(&[u8]) -> Result<(), Found>,
    ) {
        self.broken = true;
        let said = std::future::poll_fn(|cx| match self.poll(cx, reader, writer, &seen) {
            Poll::Ready(_) => Poll::Ready(()),
            // There is nothing more to read: a broken socket says nothing new.
            Poll::Pending if self.held.is_empty() && !self.unflushed => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        });
        said.await;
        if writer.flush().await.is_ok() {
            writer.delivered().await;
        }
    }

    /// Reads until nothing more is there or the buffer is nearly full: TLS gives a record at a time, and each write is a
    /// system call. Nothing read is the end.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut Stream,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(behind) = self.behind.take() {
            return Poll::Ready(behind);
        }
        ready!(Pin::new(&mut *reader).poll_read(cx, buffer))?;
        let mut filled = buffer.filled().len();
        while filled > 0 && buffer.remaining() >= RECORD {
            match Pin::new(&mut *reader).poll_read(cx, buffer) {
                Poll::Ready(Ok(())) if buffer.filled().len() > filled => filled = buffer.filled().len(),
                // An end, or an error that is told once: kept until these bytes are on their way.
                Poll::Ready(behind) => {
                    self.behind = Some(behind);
                    break;
                }
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_held(&mut self, cx: &mut Context<'_>, writer: &mut Stream) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let n = ready!(Pin::new(&mut *writer).poll_write(cx, &self.held[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        if !self.held.is_empty() {
            // Given back whole: most connections never hold anything again.
            self.held = Vec::new();
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }
}
