//! The sending of a body on an HTTP/2 stream: a frame is taken out of the body, waits for the peer's window and for room
//! in the send buffer, and goes out in pieces that fit. At most one frame is held here.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body;

use super::meter::Meter;

pub struct Sending {
    stream: SendStream<Bytes>,
    /// Of the connection.
    meter: Rc<Meter>,
    /// Taken out of the body; waits for room.
    waiting: Bytes,
    /// Nothing comes behind `waiting`.
    last: bool,
}

/// Why a body was not sent to its end.
pub enum Stop<E> {
    /// The body broke; the stream is to be reset.
    Body(E),
    /// The peer reset the stream.
    Reset(Reason),
    /// The connection is gone.
    Peer(h2::Error),
}

impl<E> From<h2::Error> for Stop<E> {
    fn from(error: h2::Error) -> Stop<E> {
        Stop::Peer(error)
    }
}

impl Sending {
    pub fn new(stream: SendStream<Bytes>, meter: Rc<Meter>) -> Sending {
        Sending { stream, meter, waiting: Bytes::new(), last: false }
    }

    /// Whether it waits for the peer and not for the body.
    pub fn is_blocked(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub fn reset(&mut self, code: Reason) {
        self.stream.send_reset(code);
    }

    /// Ready when all of the body is the library's to write.
    pub fn poll<B>(&mut self, cx: &mut Context<'_>, body: &mut B) -> Poll<Result<(), Stop<B::Error>>>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        loop {
            while !self.waiting.is_empty() {
                let room = ready!(self.poll_room(cx))?;
                if !self.meter.may_queue(cx) {
                    // Nothing else would tell that the peer wants no more.
                    return self.stream.poll_reset(cx).map(|code| Err(code?.into())).map_err(Stop::Peer);
                }
                let piece = self.waiting.split_to(room.min(self.waiting.len()));
                let last = self.last && self.waiting.is_empty();
                self.meter.queue(piece.len());
                self.stream.send_data(piece, last)?;
                if last {
                    return Poll::Ready(Ok(()));
                }
            }
            let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) else {
                // Nothing else would tell that the peer wants no more.
                return self.stream.poll_reset(cx).map(|code| Err(Stop::Reset(code?)));
            };
            let Some(frame) = frame else {
                self.stream.send_data(Bytes::new(), true)?;
                return Poll::Ready(Ok(()));
            };
            match frame.map_err(Stop::Body)?.into_data() {
                Ok(data) if data.is_empty() && !body.is_end_stream() => {}
                Ok(data) if data.is_empty() => {
                    self.stream.send_data(data, true)?;
                    return Poll::Ready(Ok(()));
                }
                // Room is asked for when there is something to send: what is reserved, other streams cannot use.
                Ok(data) => {
                    self.last = body.is_end_stream();
                    self.stream.reserve_capacity(data.len());
                    self.waiting = data;
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    if trailers.is_empty() {
                        self.stream.send_data(Bytes::new(), true)?;
                    } else {
                        self.stream.send_trailers(trailers)?;
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    /// How many bytes may be sent now, at least one.
    fn poll_room<E>(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Stop<E>>> {
        loop {
            let room = self.stream.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                // The stream has ended under us; its code says how.
                None => {
                    let code = match self.stream.poll_reset(cx) {
                        Poll::Ready(code) => code?,
                        Poll::Pending => Reason::STREAM_CLOSED,
                    };
                    return Poll::Ready(Err(Stop::Reset(code)));
                }
            }
        }
    }
}
