//! A body that is received on an HTTP/2 stream.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{HeaderMap, header};
use http_body::{Frame, SizeHint};

use super::heads::Marks;
use super::meter::Meter;
use super::reset_code;
use crate::connect::streams::{Part, Progress, Watch};

pub struct Incoming {
    /// Before the stream, which counts who refers to it.
    watch: Option<Watch>,
    stream: RecvStream,
    marks: Rc<Marks>,
    meter: Rc<Meter>,
    /// What is still to come of a length that was announced. The library holds the peer to it.
    left: Option<u64>,
    /// Bytes of the frame that was handed out last: their window is not given back yet.
    held: usize,
    data_ended: bool,
    /// What is wrong with the head.
    malformed: Option<&'static str>,
}

/// Why a message ended early.
#[derive(Debug, thiserror::Error)]
pub enum Broke {
    /// The library says so: a reset, a connection that is gone, a frame that is none.
    #[error(transparent)]
    Library(#[from] h2::Error),
    /// The library took it, and RFC 9113 does not.
    #[error("{0}")]
    Malformed(&'static str),
    #[error("a header list of more than {0} bytes")]
    TooLarge(usize),
}

impl Broke {
    /// With which code the other side's stream is reset.
    pub fn reset_code(&self) -> Reason {
        match self {
            Broke::Library(error) => reset_code(error),
            Broke::Malformed(_) => Reason::PROTOCOL_ERROR,
            Broke::TooLarge(_) => Reason::INTERNAL_ERROR,
        }
    }
}

/// The rules for fields that the library leaves to us (RFC 9113 sections 8.2.1 and 6.5.2): no value begins or ends with a
/// blank, and all of them together are not larger than what we announced.
pub fn check_fields(fields: &HeaderMap, most: usize) -> Result<(), Broke> {
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let mut size = 0;
    for (name, value) in fields {
        let bytes = value.as_bytes();
        if blank(bytes.first()) || blank(bytes.last()) {
            return Err(Broke::Malformed("a field value that begins or ends with a blank"));
        }
        size += name.as_str().len() + bytes.len() + 32;
    }
    if size > most { Err(Broke::TooLarge(most)) } else { Ok(()) }
}

impl Incoming {
    /// The body behind a head with these fields, on the connection of this meter.
    pub fn new(stream: RecvStream, headers: &HeaderMap, marks: Rc<Marks>, meter: &Rc<Meter>) -> Incoming {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let meter = meter.clone();
        meter.begin_body();
        Incoming { watch: None, stream, marks, meter, left: length, held: 0, data_ended: false, malformed: None }
    }

    /// The same, behind a head with which something is wrong.
    pub fn malformed(mut self, wrong: Option<&'static str>) -> Incoming {
        self.malformed = wrong;
        self
    }

    /// Checks the head by the rules that the library leaves to us.
    pub fn check_head(&self, headers: &HeaderMap) -> Result<(), Broke> {
        self.malformed.map_or(Ok(()), |wrong| Err(Broke::Malformed(wrong)))?;
        check_fields(headers, self.marks.header_list())
    }

    /// From now on the watchdog knows how much waits here.
    pub fn watch(&mut self, progress: &Progress, part: Part) {
        let flow = self.stream.flow_control().clone();
        self.watch = Some(progress.watch(part, flow, self.meter.clone()));
    }

    /// Of its connection.
    pub fn meter(&self) -> &Rc<Meter> {
        &self.meter
    }

    /// A reset is an error whatever its code, unless the end of the body came before.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        self.release();
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.held = data.len();
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_ended = true,
            }
        }
        let Some(trailers) = ready!(self.stream.poll_trailers(cx))? else { return Poll::Ready(None) };
        Poll::Ready(Some(self.check(&trailers).map(|()| Frame::trailers(trailers))))
    }

    fn check(&self, trailers: &HeaderMap) -> Result<(), Broke> {
        if let Some(wrong) = self.marks.take(self.stream.stream_id().into()) {
            return Err(Broke::Malformed(wrong));
        }
        check_fields(trailers, self.marks.header_list())
    }

    pub fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    fn release(&mut self) {
        if self.held > 0 {
            let held = std::mem::take(&mut self.held);
            self.meter.went(held);
            // It fails for a stream that has ended, whose bytes count no more.
            let _ = self.stream.flow_control().release_capacity(held);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.meter.end_body();
        // The other half of the stream may live on, and with it what the library has not got back.
        self.release();
        self.marks.take(self.stream.stream_id().into());
        if self.meter.holds() {
            self.meter.give_up(self.stream.flow_control().used_capacity());
        }
    }
}
