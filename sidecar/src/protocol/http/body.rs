//! The body of an answer on its way to the downstream. It carries what must live as long as the answer flows: the
//! upstream connection, the record, the load. When the body ends, the connection goes back to its lane; when the
//! downstream leaves first, everything is dropped and the upstream is cancelled.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::headers::clean_trailers;
use crate::balance::{InFlight, Nanos, Outcome};
use crate::connect::lane::Held;
use crate::connect::streams::{Busy, Stream};
use crate::outcome::Reason;
use crate::telemetry::{GrpcFrames, HttpRecord};

pub struct ResponseBody(Kind);

enum Kind {
    Local(Option<Bytes>),
    /// An answer of our own whose record ends with it.
    Recorded(Option<Bytes>, #[expect(dead_code, reason = "ends when dropped")] Ending),
    Upstream(Box<Upstream>),
}

/// What ends when an answer made here has been written.
pub struct Ending {
    pub record: Rc<HttpRecord>,
    pub busy: Option<Busy>,
}

/// What an upstream's answer holds.
pub struct Upstream {
    pub incoming: Incoming,
    pub record: Rc<HttpRecord>,
    pub grpc: Option<GrpcFrames>,
    pub held: Option<Held>,
    pub load: Option<Measured>,
    pub stream: Stream,
    pub busy: Option<Busy>,
}

/// The endpoint's load guard, with what was measured when the head came.
pub struct Measured {
    pub guard: InFlight,
    pub at: Nanos,
    pub latency: Duration,
    pub outcome: Outcome,
}

/// The answer broke off; hyper passes it on as a reset or an abrupt close.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the upstream's answer ended before it was complete")]
    Truncated(#[source] hyper::Error),
    #[error("nothing moved on the stream for too long")]
    Idle,
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
        if upstream.incoming.is_end_stream() {
            upstream.end();
            // The downstream connection stays busy until it has taken the head.
            return ResponseBody(Kind::Recorded(
                None,
                Ending { record: upstream.record.clone(), busy: upstream.busy.take() },
            ));
        }
        ResponseBody(Kind::Upstream(upstream))
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // Its task was ended because the downstream took nothing.
        if self.held.is_some() && self.stream.has_expired() {
            self.record.failed(Reason::StreamIdleTimeout, String::new);
        }
    }
}

impl Upstream {
    /// The answer is whole.
    fn end(&mut self) {
        self.record.response_ended();
        if let Some(held) = self.held.take() {
            held.release();
        }
        if let Some(measured) = self.load.take() {
            measured.guard.finish(measured.at, measured.latency, measured.outcome);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Pending if self.stream.is_expired(cx) => {
                self.record.failed(Reason::StreamIdleTimeout, String::new);
                Poll::Ready(Some(Err(BodyError::Idle)))
            }
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => {
                self.end();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                self.record.failed(Reason::UpstreamTruncated, || error.to_string());
                Poll::Ready(Some(Err(BodyError::Truncated(error))))
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
                // Behind trailers hyper's HTTP/1 server asks for nothing more.
                if last || self.incoming.is_end_stream() {
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
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Local(bytes) | Kind::Recorded(bytes, _) => bytes.is_none(),
            Kind::Upstream(upstream) => upstream.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Local(bytes) | Kind::Recorded(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Upstream(upstream) => upstream.incoming.size_hint(),
        }
    }
}
