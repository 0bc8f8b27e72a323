//! A downstream connection that speaks HTTP/1.1, shared by the loop that serves it and by the body of the request that
//! is being read from it. Both run on the connection's one task.

use std::cell::{Cell, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::body::Decoded;
use super::head::{self, RequestHead};
use super::{Conn, Decoder, Fault, Length, Spelling};
use crate::config::limits::Limits;
use crate::connection::{Command, Entry, State};
use crate::net::Stream;
use crate::outcome::Reason;

/// What is known of a client that waits for its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    Here,
    /// It has ended its direction and sent nothing that waits to be read. It may still take an answer.
    Ended,
    /// Its connection is reset.
    Gone,
}

pub struct Downstream {
    conn: RefCell<Conn>,
    /// The client has ended its direction.
    ended: Cell<bool>,
    /// Of the request that is being served.
    decoder: RefCell<Decoder>,
    pub entry: Arc<Entry>,
}

impl Downstream {
    pub fn new(stream: Stream, entry: &Arc<Entry>, limits: &Limits) -> Rc<Downstream> {
        let decoder = RefCell::new(Decoder::new(Length::Exact(0), limits));
        let conn = RefCell::new(Conn::new(stream));
        Rc::new(Downstream { conn, ended: Cell::new(false), decoder, entry: entry.clone() })
    }

    /// The connection alone, once HTTP is over.
    pub fn into_conn(self) -> Conn {
        self.conn.into_inner()
    }

    /// Not to be held over a poll of anything else.
    pub fn conn(&self) -> RefMut<'_, Conn> {
        self.conn.borrow_mut()
    }

    /// Reads the next head. `None`: the client left, or was asked to while it was silent. `seen` begins as 0.
    pub fn poll_head(
        &self,
        cx: &mut Context<'_>,
        seen: &mut usize,
        limits: &Limits,
    ) -> Poll<Result<Option<RequestHead>, (Reason, &'static str)>> {
        let mut conn = self.conn();
        if self.entry.state() == State::Idle && conn.has_received() {
            self.entry.enter(State::Head);
        }
        loop {
            if let Some(head) = head::parse_request(conn.received(), seen, limits)? {
                self.decoder.replace(Decoder::new(head.length, limits));
                return Poll::Ready(Ok(Some(head)));
            }
            match (self.entry.command(), conn.has_received()) {
                (Command::HeadTimeout, true) => {
                    return Poll::Ready(Err((Reason::RequestHeadTimeout, "the head did not end in time")));
                }
                (Command::Finish | Command::Refuse | Command::HeadTimeout, false) | (Command::Close, _) => {
                    return Poll::Ready(Ok(None));
                }
                (Command::Run, _) | (Command::Finish | Command::Refuse, true) => {}
            }
            let Poll::Ready(received) = conn.poll_receive(cx) else {
                conn.rest();
                return Poll::Pending;
            };
            match received {
                Ok(0) | Err(_) => return Poll::Ready(Ok(None)),
                // The first byte of a head: its time runs from here, not from each byte.
                Ok(_) if self.entry.state() == State::Idle => self.entry.enter(State::Head),
                Ok(_) => {}
            }
        }
    }

    /// Whether the request was read to its end.
    pub fn request_has_ended(&self) -> bool {
        self.decoder.borrow().has_ended()
    }

    /// Whether what was received holds the rest of the request, which is thrown away then.
    pub fn skip_request(&self) -> bool {
        let (mut conn, mut decoder) = (self.conn(), self.decoder.borrow_mut());
        loop {
            match decoder.decode(conn.received()) {
                Ok(Decoded::Ended) => return true,
                Ok(Decoded::Data(_) | Decoded::Trailers(_)) => {}
                Ok(Decoded::Incomplete) | Err(_) => return false,
            }
        }
    }

    /// Looks whether the client still waits for its answer; what it sends early is kept, up to a bound. While its request
    /// is being read it is the reader who notices. The task is woken when this changes: for a reset behind an end, which
    /// no readiness reports, at the watchdog's ticks.
    pub fn presence(&self, cx: &mut Context<'_>) -> Presence {
        if !self.request_has_ended() {
            return Presence::Here;
        }
        let mut conn = self.conn();
        while !self.ended.get() {
            if !conn.has_room_to_receive() {
                return Presence::Here;
            }
            match conn.poll_receive(cx) {
                Poll::Pending => return Presence::Here,
                Poll::Ready(Ok(0)) => {
                    self.ended.set(true);
                    self.entry.tick();
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return Presence::Gone,
            }
        }
        if conn.stream().take_reset().is_some() {
            return Presence::Gone;
        }
        // Line ends behind a request are no next one (RFC 9112 section 2.2).
        let waits = conn.received().iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
        if waits { Presence::Here } else { Presence::Ended }
    }

    /// Whether what is queued may leave at the end of the [turn](super::turn).
    pub fn may_wait(&self) -> bool {
        self.conn().stream().is_plain()
    }

    /// Writes what is queued ahead of the answer.
    pub fn flush(&self, cx: &mut Context<'_>) {
        let mut conn = self.conn();
        if !conn.is_flushed() {
            // A client that is gone is noticed by who reads from it or writes the answer.
            let _ = conn.poll_flush(cx);
        }
    }
}

/// The body of the request that is being read, with the spelling of its head.
pub struct Incoming {
    downstream: Rc<Downstream>,
    pub spelling: Spelling,
    /// The request belongs to a login that authenticates its connection.
    pub binds: bool,
}

impl Incoming {
    pub fn new(downstream: &Rc<Downstream>, spelling: Spelling, binds: bool) -> Incoming {
        Incoming { downstream: downstream.clone(), spelling, binds }
    }

    pub fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        let (mut conn, mut decoder) = (self.downstream.conn(), self.downstream.decoder.borrow_mut());
        loop {
            match decoder.decode(conn.received()) {
                Ok(Decoded::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Decoded::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Decoded::Ended) => return Poll::Ready(None),
                Ok(Decoded::Incomplete) => {}
                Err(wrong) => return Poll::Ready(Some(Err(Fault::Malformed(wrong)))),
            }
            match ready!(conn.poll_receive(cx)) {
                Ok(0) => return Poll::Ready(Some(Err(Fault::Truncated))),
                Ok(_) => self.downstream.entry.touch(),
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    pub fn is_end_stream(&self) -> bool {
        self.downstream.request_has_ended()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.downstream.decoder.borrow().exact().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
