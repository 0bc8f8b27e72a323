//! The body of a request on its way to the upstream: counts what passes and drops trailers that nobody may send.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::streams::Progress;
use crate::connection::{Command, Entry};
use crate::telemetry::{GrpcFrames, HttpRecord};

/// Removes what a trailer section must not carry on this hop.
pub type TrailerFilter = fn(&mut http::HeaderMap);

pub enum RequestBody {
    /// No body: such a request can be sent again.
    Empty,
    Streaming(Streaming),
}

pub struct Streaming {
    incoming: Incoming,
    record: Rc<HttpRecord>,
    grpc: Option<GrpcFrames>,
    trailers: TrailerFilter,
    progress: Progress,
    /// The connection that it comes on, when that speaks HTTP/1.
    http1: Option<Arc<Entry>>,
}

/// Why a request's body ended early; the request's own fault.
#[derive(Debug, thiserror::Error)]
pub enum RequestBroke {
    #[error(transparent)]
    Incoming(#[from] hyper::Error),
    #[error("the trailer section begins with a bare line feed")]
    BareLineFeed,
}

impl RequestBody {
    pub fn new(
        incoming: Incoming,
        record: &Rc<HttpRecord>,
        grpc: bool,
        trailers: TrailerFilter,
        progress: Progress,
        http1: Option<Arc<Entry>>,
    ) -> RequestBody {
        if incoming.is_end_stream() {
            return RequestBody::Empty;
        }
        let grpc = grpc.then(GrpcFrames::default);
        RequestBody::Streaming(Streaming { incoming, record: record.clone(), grpc, trailers, progress, http1 })
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, RequestBody::Empty)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBroke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroke>>> {
        let RequestBody::Streaming(body) = &mut *self else { return Poll::Ready(None) };
        let Some(frame) = ready!(Pin::new(&mut body.incoming).poll_frame(cx)) else { return Poll::Ready(None) };
        let mut frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                body.progress.broke_off();
                return Poll::Ready(Some(Err(error.into())));
            }
        };
        body.progress.moved();
        if let Some(data) = frame.data_ref() {
            body.record.add_request_bytes(data.len() as u64);
            if let Some(grpc) = &mut body.grpc {
                body.record.add_grpc_messages(grpc.feed(data));
            }
        } else if let Some(trailers) = frame.trailers_mut() {
            if let Some(entry) = &body.http1 {
                // The library forgives a bare LF here and swallows what follows it up to the next empty line, which
                // a peer may have meant as a request: nothing after trailers is believed.
                entry.ask(Command::Finish);
                if trailers.is_empty() {
                    return Poll::Ready(Some(Err(RequestBroke::BareLineFeed)));
                }
            }
            (body.trailers)(trailers);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Empty => true,
            RequestBody::Streaming(body) => body.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            RequestBody::Empty => SizeHint::with_exact(0),
            RequestBody::Streaming(body) => body.incoming.size_hint(),
        }
    }
}
