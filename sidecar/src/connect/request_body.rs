//! The body of a request on its way to the upstream: counts what passes and drops trailers that nobody may send.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::http1::{self, Fault, Spelling};
use super::streams::Progress;
use crate::connection::Entry;
use crate::telemetry::{GrpcFrames, HttpRecord};

/// Removes what a trailer section must not carry on this hop.
pub type TrailerFilter = fn(&mut http::HeaderMap);

/// A request's body as it comes from the downstream.
pub enum Received {
    Http1(http1::Incoming),
    Http2(hyper::body::Incoming),
}

/// A request's body as it goes to the upstream, with what an HTTP/1.1 upstream needs to know of the request besides.
pub struct RequestBody {
    /// None: no body; such a request can be sent again.
    streaming: Option<Streaming>,
    /// How the head of an HTTP/1 request was spelled.
    spelling: Option<Spelling>,
    /// The connection of a client that takes interim answers.
    interim: Option<Arc<Entry>>,
}

struct Streaming {
    received: Received,
    record: Rc<HttpRecord>,
    grpc: Option<GrpcFrames>,
    trailers: TrailerFilter,
    progress: Progress,
}

/// Why a request's body ended early; the request's own fault.
#[derive(Debug, thiserror::Error)]
pub enum RequestBroke {
    #[error(transparent)]
    Http1(#[from] Fault),
    #[error(transparent)]
    Http2(#[from] hyper::Error),
}

impl Received {
    fn is_end_stream(&self) -> bool {
        match self {
            Received::Http1(incoming) => incoming.is_end_stream(),
            Received::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroke>>> {
        match self {
            Received::Http1(incoming) => incoming.poll_frame(cx).map_err(RequestBroke::Http1),
            Received::Http2(incoming) => Pin::new(incoming).poll_frame(cx).map_err(RequestBroke::Http2),
        }
    }
}

impl RequestBody {
    /// `interim`: the client takes interim (1xx) answers.
    pub fn new(
        received: Received,
        record: &Rc<HttpRecord>,
        grpc: bool,
        trailers: TrailerFilter,
        progress: impl FnOnce() -> Progress,
        interim: bool,
    ) -> RequestBody {
        let (spelling, interim) = match &received {
            Received::Http1(incoming) => (Some(incoming.spelling.clone()), interim.then(|| incoming.entry().clone())),
            Received::Http2(_) => (None, None),
        };
        let streaming = (!received.is_end_stream()).then(|| {
            let grpc = grpc.then(GrpcFrames::default);
            Streaming { received, record: record.clone(), grpc, trailers, progress: progress() }
        });
        RequestBody { streaming, spelling, interim }
    }

    pub fn empty() -> RequestBody {
        RequestBody { streaming: None, spelling: None, interim: None }
    }

    pub fn is_empty(&self) -> bool {
        self.streaming.is_none()
    }

    pub fn spelling(&self) -> Option<&Spelling> {
        self.spelling.as_ref()
    }

    /// Where interim answers go.
    pub fn interim(&self) -> Option<&Arc<Entry>> {
        self.interim.as_ref()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBroke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroke>>> {
        let Some(body) = &mut self.streaming else { return Poll::Ready(None) };
        let Some(frame) = ready!(body.received.poll_frame(cx)) else { return Poll::Ready(None) };
        let mut frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                body.progress.broke_off();
                return Poll::Ready(Some(Err(error)));
            }
        };
        body.progress.moved();
        if let Some(data) = frame.data_ref() {
            body.record.add_request_bytes(data.len() as u64);
            if let Some(grpc) = &mut body.grpc {
                body.record.add_grpc_messages(grpc.feed(data));
            }
        } else if let Some(trailers) = frame.trailers_mut() {
            (body.trailers)(trailers);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.streaming.as_ref().is_none_or(|body| body.received.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.streaming {
            None => SizeHint::with_exact(0),
            Some(Streaming { received: Received::Http1(incoming), .. }) => incoming.size_hint(),
            Some(Streaming { received: Received::Http2(incoming), .. }) => incoming.size_hint(),
        }
    }
}
