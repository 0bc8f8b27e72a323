//! The body of an answer on its way to the downstream. It carries what must live as long as the answer flows: the
//! upstream connection, the record, the load. When the body ends, the connection goes back to its lane; when the
//! downstream leaves first, everything is dropped and the upstream is cancelled.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::answer::grpc_trailers;
use super::headers::clean_trailers;
use crate::balance::{InFlight, Nanos, Outcome};
use crate::connect::http1::Spelling;
use crate::connect::lane::{AnswerBroke, UpstreamBody};
use crate::connect::streams::{Busy, Stream};
use crate::net::Stream as ByteStream;
use crate::outcome::Reason;
use crate::telemetry::{GrpcFrames, HttpRecord};

pub struct ResponseBody(Kind);

enum Kind {
    Local(Option<Bytes>),
    /// An answer of our own whose record ends with it.
    Recorded(Option<Bytes>, Ending),
    Upstream(Box<Upstream>),
    /// No answer: the stream is reset with the upstream's code.
    Reset(h2::Reason),
    /// No body: the connection leaves HTTP behind this head.
    Switched(Option<Switched>, Option<Spelling>),
}

/// What becomes of a connection that leaves HTTP/1.1.
pub type Switched = Box<dyn FnOnce(ByteStream) -> Pin<Box<dyn Future<Output = ()>>>>;

/// What ends when an answer made here has been written.
pub struct Ending {
    pub record: Rc<HttpRecord>,
    pub busy: Option<Busy>,
}

/// What an upstream's answer holds.
pub struct Upstream {
    /// Taken when the answer is whole.
    pub incoming: Option<UpstreamBody>,
    /// The same, when the answer is whole and the request is not.
    pub uploading: Option<UpstreamBody>,
    pub record: Rc<HttpRecord>,
    pub grpc: Option<GrpcFrames>,
    /// How its head was spelled.
    pub spelling: Option<Spelling>,
    pub load: Option<Measured>,
    pub stream: Stream,
    pub busy: Option<Busy>,
    /// When all of it has to be there, where a route says so.
    pub until: Option<Box<Until>>,
}

/// The end of the time that an answer may take.
pub struct Until {
    sleep: Pin<Box<tokio::time::Sleep>>,
    reason: Reason,
}

/// The endpoint's load guard, with what was measured when the head came.
pub struct Measured {
    pub guard: InFlight,
    pub at: Nanos,
    pub latency: Duration,
    pub outcome: Outcome,
}

/// The answer broke off; it is passed on as a reset or an abrupt close.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the upstream's answer ended before it was complete")]
    Truncated(#[source] AnswerBroke),
    #[error("the downstream takes nothing more")]
    Downstream(#[source] io::Error),
    #[error("nothing moved on the stream for too long")]
    Idle,
    #[error("policy has turned against the request")]
    Refused,
    #[error("the answer took longer than its route allows")]
    Late,
}

impl BodyError {
    /// How the stream of an HTTP/2 client is reset.
    pub fn reset_code(&self) -> h2::Reason {
        match self {
            BodyError::Truncated(broke) => broke.reset_code(),
            BodyError::Downstream(_) | BodyError::Idle | BodyError::Late => h2::Reason::INTERNAL_ERROR,
            BodyError::Refused => h2::Reason::CANCEL,
        }
    }
}

impl ResponseBody {
    pub fn empty() -> ResponseBody {
        ResponseBody(Kind::Local(None))
    }

    pub fn local(bytes: Bytes) -> ResponseBody {
        ResponseBody(Kind::Local(Some(bytes)))
    }

    /// An answer of our own, with the record of the request that it answers.
    pub fn recorded(self, ending: Ending) -> ResponseBody {
        match self.0 {
            Kind::Local(bytes) => {
                if let Some(bytes) = &bytes {
                    ending.record.add_response_bytes(bytes.len() as u64);
                }
                ending.record.response_ended();
                ResponseBody(Kind::Recorded(bytes, ending))
            }
            kind => ResponseBody(kind),
        }
    }

    pub fn upstream(mut upstream: Box<Upstream>) -> ResponseBody {
        if upstream.incoming.as_ref().is_none_or(UpstreamBody::is_end_stream) {
            // The downstream connection stays busy until it has taken the head.
            upstream.end();
        }
        ResponseBody(Kind::Upstream(upstream))
    }

    /// All of an upstream's answer has to be there by then.
    pub fn end_by(&mut self, at: Instant, reason: Reason) {
        if let Kind::Upstream(upstream) = &mut self.0 {
            let sleep = Box::pin(tokio::time::sleep_until(at.into()));
            upstream.until = upstream.incoming.is_some().then(|| Box::new(Until { sleep, reason }));
        }
    }

    /// `spelling` is the head's.
    pub fn switched(then: Switched, spelling: Option<Spelling>) -> ResponseBody {
        ResponseBody(Kind::Switched(Some(then), spelling))
    }

    /// For an HTTP/2 client whose request the upstream reset before it answered.
    pub fn reset(code: h2::Reason) -> ResponseBody {
        ResponseBody(Kind::Reset(code))
    }

    /// How the client's stream is reset instead of answered.
    pub fn reset_code(&self) -> Option<h2::Reason> {
        match self.0 {
            Kind::Reset(code) => Some(code),
            Kind::Local(_) | Kind::Recorded(..) | Kind::Upstream(_) | Kind::Switched(..) => None,
        }
    }

    /// What becomes of the connection, if it leaves HTTP behind this answer's head.
    pub fn take_switched(&mut self) -> Option<Switched> {
        match &mut self.0 {
            Kind::Switched(then, _) => then.take(),
            Kind::Local(_) | Kind::Recorded(..) | Kind::Upstream(_) | Kind::Reset(_) => None,
        }
    }

    /// Made here: nobody reads what is left of the request.
    pub fn is_local(&self) -> bool {
        matches!(self.0, Kind::Local(_) | Kind::Recorded(..))
    }

    /// How an HTTP/1 upstream spelled the head.
    pub fn spelling(&self) -> Option<&Spelling> {
        match &self.0 {
            Kind::Upstream(upstream) => upstream.spelling.as_ref(),
            Kind::Switched(_, spelling) => spelling.as_ref(),
            Kind::Local(_) | Kind::Recorded(..) | Kind::Reset(_) => None,
        }
    }

    /// Whether bytes of the answer wait for a client that takes none.
    pub fn stalled(&self, stalled: bool) {
        if let Kind::Upstream(upstream) = &self.0 {
            upstream.stream.stalled(stalled);
        }
    }

    /// Sends more of the request while the client does not take the answer: it may do so only when all is sent.
    pub fn send_on(&mut self, cx: &mut Context<'_>) {
        if let Kind::Upstream(upstream) = &mut self.0
            && let Some(incoming) = &mut upstream.incoming
        {
            incoming.send_on(cx);
        }
    }

    /// The client has ended its direction behind its request.
    pub fn end_direction(&mut self, cx: &mut Context<'_>) {
        if let Kind::Upstream(upstream) = &mut self.0
            && let Some(incoming) = &mut upstream.incoming
        {
            incoming.end_direction(cx);
        }
    }

    /// The answer is whole and the request is not, which the upstream may still want to read.
    pub fn is_uploading(&self) -> bool {
        matches!(&self.0, Kind::Upstream(upstream) if upstream.uploading.is_some())
    }

    /// Sends the rest of the request. Ready when all is sent or nothing more can be.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Kind::Upstream(upstream) => upstream.poll_upload(cx),
            Kind::Local(_) | Kind::Recorded(..) | Kind::Reset(_) | Kind::Switched(..) => Poll::Ready(()),
        }
    }

    /// Ends the record; what keeps the downstream connection busy is left.
    pub fn into_busy(self) -> Option<Busy> {
        match self.0 {
            Kind::Local(_) | Kind::Switched(..) | Kind::Reset(_) => None,
            Kind::Recorded(_, Ending { busy, .. }) => busy.map(Busy::recorded),
            Kind::Upstream(mut upstream) => upstream.busy.take().map(Busy::recorded),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // Its task was ended because the downstream took nothing.
        if let Some(reason) = self.stream.expired().filter(|_| self.incoming.is_some()) {
            self.record.failed(reason, String::new);
        }
    }
}

impl Upstream {
    /// The answer is whole.
    fn end(&mut self) {
        self.record.response_ended();
        if let Some(incoming) = self.incoming.take() {
            if incoming.is_uploading() {
                self.uploading = Some(incoming);
            } else {
                incoming.release();
            }
        }
        if let Some(measured) = self.load.take() {
            measured.guard.finish(measured.at, measured.latency, measured.outcome);
        }
    }

    /// The answer ends early. A gRPC client learns why by trailers: it would take a reset for INTERNAL, which it does not try
    /// again.
    fn break_off(&mut self, reason: Reason, error: BodyError) -> Result<Frame<Bytes>, BodyError> {
        if self.grpc.is_none() {
            return Err(error);
        }
        self.incoming = None;
        self.record.grpc_status(reason.row().grpc);
        Ok(Frame::trailers(grpc_trailers(reason)))
    }

    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(uploading) = &mut self.uploading else { return Poll::Ready(()) };
        // A request on which nothing moves for too long is cut off, which both sides see.
        if uploading.poll_upload(cx).is_pending() && self.stream.poll_expired(cx).is_none() {
            return Poll::Pending;
        }
        if let Some(uploading) = self.uploading.take() {
            uploading.release();
        }
        Poll::Ready(())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        if let Some(reason) = self.stream.refused() {
            self.record.failed(reason, String::new);
            return Poll::Ready(Some(self.break_off(reason, BodyError::Refused)));
        }
        if let Some(until) = &mut self.until
            && until.sleep.as_mut().poll(cx).is_ready()
        {
            let reason = until.reason;
            self.record.failed(reason, String::new);
            return Poll::Ready(Some(self.break_off(reason, BodyError::Late)));
        }
        match incoming.poll_frame(cx) {
            Poll::Pending => match self.stream.poll_expired(cx) {
                Some(reason) => {
                    self.record.failed(reason, String::new);
                    let error = if self.stream.refused().is_some() { BodyError::Refused } else { BodyError::Idle };
                    Poll::Ready(Some(self.break_off(reason, error)))
                }
                None => Poll::Pending,
            },
            Poll::Ready(None) => {
                self.end();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                let reason = error.reason();
                self.record.failed(reason, || error.to_string());
                let reset = error.is_reset();
                let error = BodyError::Truncated(error);
                // What the application said with its own reset is not ours to say otherwise.
                Poll::Ready(Some(if reset { Err(error) } else { self.break_off(reason, error) }))
            }
            Poll::Ready(Some(Ok(mut frame))) => {
                self.stream.moved();
                if let Some(data) = frame.data_ref() {
                    self.record.add_response_bytes(data.len() as u64);
                    if let Some(grpc) = &mut self.grpc {
                        self.record.add_grpc_messages(grpc.feed(data));
                    }
                }
                let last = if let Some(trailers) = frame.trailers_mut() {
                    clean_trailers(trailers);
                    note_grpc_status(&self.record, trailers);
                    true
                } else {
                    false
                };
                // Behind trailers nobody asks for more.
                if last || incoming.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }
}

/// `grpc-status` of a head (trailers-only) or of trailers.
pub fn note_grpc_status(record: &HttpRecord, headers: &http::HeaderMap) {
    let status = headers.get("grpc-status").and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    if let Some(status) = status {
        record.grpc_status(status);
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Kind::Local(bytes) | Kind::Recorded(bytes, _) => {
                Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))))
            }
            Kind::Upstream(upstream) => upstream.poll(cx),
            Kind::Switched(..) | Kind::Reset(_) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Local(bytes) | Kind::Recorded(bytes, _) => bytes.is_none(),
            Kind::Upstream(upstream) => upstream.incoming.as_ref().is_none_or(UpstreamBody::is_end_stream),
            Kind::Switched(..) | Kind::Reset(_) => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Local(bytes) | Kind::Recorded(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Upstream(upstream) => {
                upstream.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), UpstreamBody::size_hint)
            }
            Kind::Switched(..) | Kind::Reset(_) => SizeHint::with_exact(0),
        }
    }
}
