//! The pooled HTTP connections of one worker to one endpoint. HTTP/1.1 connections carry one request at a time and
//! wait last-in-first-out for the next; HTTP/2 connections are shared. A request that meets a pooled connection at
//! the very moment when the peer closes it is sent once more on a fresh one, when that is safe.

mod fault;
mod http1;
mod http2;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::{Frame, SizeHint};

pub use fault::request_broke;

use http1::Idle;
use http2::{Opening, Shared};

use super::dial::{Dialer, Target};
use super::http1::{Fault, Spelling};
use super::http2::Broke;
use super::request_body::RequestBody;
use super::streams::Progress;
use super::unprocessed;
use crate::config::limits::Limits;
use crate::net::Stream;
use crate::outcome::{Error, Reason};

/// How requests are framed on this lane.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Framing {
    Http1,
    Http2,
}

pub struct Lane {
    target: Target,
    framing: Framing,
    dialer: Rc<Dialer>,
    limits: Rc<Limits>,
    /// How long an HTTP/1.1 connection may wait; follows what the peer was heard to keep.
    idle_limit: Cell<Duration>,
    /// It serves one downstream connection ([`bound`](super::bound)).
    unshared: bool,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Shared>>,
    /// Set while somebody opens an HTTP/2 connection: the others wait for it.
    opening: RefCell<Option<Rc<Opening>>>,
}

/// The head of an answer with its body, when it came, and how long it took from when the request was sent, connecting
/// not included.
pub struct Answered {
    pub response: Response<UpstreamBody>,
    pub at: Instant,
    pub latency: Duration,
    pub unprocessed: Option<Box<Unprocessed>>,
}

/// The answer is a sidecar's own, and no application has seen the request.
pub struct Unprocessed {
    pub reason: Reason,
    /// The request, when all of it can be sent elsewhere: the answer then comes without the rest of it.
    pub request: Option<Request<RequestBody>>,
}

/// Why a request was not answered; the request itself when it may be sent elsewhere.
pub struct Unsent {
    pub error: Error,
    pub request: Option<Request<RequestBody>>,
}

/// The body of an answer. It holds the connection that it comes on: [`UpstreamBody::release`] gives it back, dropping
/// the body does not.
#[expect(clippy::large_enum_variant, reason = "a box would be one more allocation for each answer over HTTP/2")]
pub enum UpstreamBody {
    Http1(Box<http1::Answer>),
    Http2(http2::Answer),
}

/// Why an answer's body ended early.
#[derive(Debug, thiserror::Error)]
pub enum AnswerBroke {
    #[error(transparent)]
    Http1(#[from] Fault),
    #[error(transparent)]
    Http2(#[from] Broke),
}

impl AnswerBroke {
    /// What it is called.
    pub fn reason(&self) -> Reason {
        match self {
            AnswerBroke::Http2(broke) => fault::broke(broke).unwrap_or(Reason::UpstreamTruncated),
            AnswerBroke::Http1(_) => Reason::UpstreamTruncated,
        }
    }

    /// Whether the upstream itself ended the stream, and alone that.
    pub fn is_reset(&self) -> bool {
        matches!(self, AnswerBroke::Http2(Broke::Library(error)) if error.is_reset() && error.is_remote())
    }

    /// How the stream of an HTTP/2 client is reset.
    pub fn reset_code(&self) -> h2::Reason {
        match self {
            AnswerBroke::Http1(_) => h2::Reason::INTERNAL_ERROR,
            AnswerBroke::Http2(broke) => broke.reset_code(),
        }
    }
}

impl UpstreamBody {
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerBroke>>> {
        match self {
            UpstreamBody::Http1(answer) => answer.poll_frame(cx).map_err(AnswerBroke::Http1),
            UpstreamBody::Http2(answer) => answer.poll_frame(cx).map_err(AnswerBroke::Http2),
        }
    }

    pub fn is_end_stream(&self) -> bool {
        match self {
            UpstreamBody::Http1(answer) => answer.is_end_stream(),
            UpstreamBody::Http2(answer) => answer.is_end_stream(),
        }
    }

    pub fn size_hint(&self) -> SizeHint {
        match self {
            UpstreamBody::Http1(answer) => answer.size_hint(),
            UpstreamBody::Http2(answer) => answer.size_hint(),
        }
    }

    /// From now on the watchdog knows how much waits here.
    pub fn watch(&mut self, progress: &Progress) {
        match self {
            UpstreamBody::Http1(_) => {}
            UpstreamBody::Http2(answer) => answer.watch(progress),
        }
    }

    /// Sends more of the request while the answer waits for its reader: it may read only when all is sent.
    pub fn send_on(&mut self, cx: &mut Context<'_>) {
        match self {
            UpstreamBody::Http1(answer) => answer.send_on(cx),
            UpstreamBody::Http2(answer) => answer.send_on(cx),
        }
    }

    /// The client has ended its direction behind its request. On HTTP/2 the end of the request said so.
    pub fn end_direction(&mut self, cx: &mut Context<'_>) {
        match self {
            UpstreamBody::Http1(answer) => answer.end_direction(cx),
            UpstreamBody::Http2(..) => {}
        }
    }

    /// The answer is whole and some of the request is still to be sent, by [`UpstreamBody::poll_upload`]. On HTTP/2
    /// [`UpstreamBody::release`] sees to it.
    pub fn is_uploading(&self) -> bool {
        match self {
            UpstreamBody::Http1(answer) => answer.is_uploading(),
            UpstreamBody::Http2(..) => false,
        }
    }

    /// Sends the rest of the request. Ready when nothing more can be sent.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            UpstreamBody::Http1(answer) => answer.poll_upload(cx),
            UpstreamBody::Http2(..) => Poll::Ready(()),
        }
    }

    /// Another answer is to be had: reads what has come of this one, so that its connection may carry the next request.
    pub fn let_go(mut self) {
        let cx = &mut Context::from_waker(Waker::noop());
        loop {
            match self.poll_frame(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.release(),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    /// How the head of an HTTP/1 answer was spelled.
    pub fn spelling(&self) -> Option<&Spelling> {
        match self {
            UpstreamBody::Http1(answer) => Some(answer.spelling()),
            UpstreamBody::Http2(..) => None,
        }
    }

    /// The answer was read to its end: the connection may carry the next request.
    pub fn release(self) {
        match self {
            UpstreamBody::Http1(answer) => answer.release(),
            UpstreamBody::Http2(answer) => answer.release(),
        }
    }

    /// A login ends with this answer, because its connection does: the client must not think that it lasts.
    pub fn ends_login(&self) -> bool {
        match self {
            UpstreamBody::Http1(answer) => answer.ends_login(),
            UpstreamBody::Http2(..) => false,
        }
    }

    /// After 101: the stream below, which is no longer HTTP's.
    pub fn into_stream(self) -> Option<Stream> {
        match self {
            UpstreamBody::Http1(answer) => Some(answer.into_stream()),
            UpstreamBody::Http2(..) => None,
        }
    }
}

impl Lane {
    /// `idle_limit` is for HTTP/1.1 connections: shorter than the peer keeps them.
    pub fn new(
        target: Target,
        framing: Framing,
        dialer: Rc<Dialer>,
        limits: Rc<Limits>,
        idle_limit: Duration,
    ) -> Rc<Lane> {
        Rc::new(Lane {
            target,
            framing,
            dialer,
            limits,
            idle_limit: Cell::new(idle_limit),
            unshared: false,
            idle: RefCell::default(),
            shared: RefCell::default(),
            opening: RefCell::default(),
        })
    }

    /// An empty lane to the same target for one downstream connection. Its connections wait as long as their client does.
    pub fn unshared(&self) -> Rc<Lane> {
        Rc::new(Lane {
            target: self.target.clone(),
            framing: self.framing,
            dialer: self.dialer.clone(),
            limits: self.limits.clone(),
            idle_limit: Cell::new(self.limits.client_idle),
            unshared: true,
            idle: RefCell::default(),
            shared: RefCell::default(),
            opening: RefCell::default(),
        })
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Sends one request and waits for the head of its answer.
    pub async fn send(self: &Rc<Lane>, request: Request<RequestBody>) -> Result<Answered, Unsent> {
        let own = request.body().own_lane(self);
        let lane = own.as_ref().unwrap_or(self);
        match lane.framing {
            Framing::Http1 => lane.send_http1(request).await,
            Framing::Http2 => lane.send_http2(request).await,
        }
    }

    /// Whether a request with this body need not wait for a connection.
    pub fn is_warm(self: &Rc<Lane>, body: &RequestBody, cx: &mut Context<'_>) -> bool {
        let own = body.own_lane(self);
        let lane = own.as_ref().unwrap_or(self);
        match lane.framing {
            Framing::Http1 => lane.has_idle(cx),
            Framing::Http2 => lane.find_shared().is_some(),
        }
    }

    /// Sees to it that a request with this body need not. Its connection is for whoever sends next.
    pub async fn warm(self: &Rc<Lane>, body: &RequestBody) -> Result<(), Error> {
        let own = body.own_lane(self);
        let lane = own.as_ref().unwrap_or(self);
        match lane.framing {
            Framing::Http1 => lane.warm_http1().await,
            Framing::Http2 => lane.warm_http2().await,
        }
    }

    /// Whether a sidecar is at the other end.
    fn is_mesh(&self) -> bool {
        self.target.is_mesh()
    }

    /// Whether this head is that of a sidecar whose application has not seen the request, and why. Only a head that tells of
    /// a failure is looked at.
    fn unprocessed<T>(&self, head: &Response<T>, trailers_only: bool) -> Option<Reason> {
        let failed = head.status().is_server_error() || trailers_only;
        if failed && self.is_mesh() { unprocessed::read(head.headers()) } else { None }
    }

    /// True when nothing is pooled and nothing is being opened.
    pub fn is_idle(&self) -> bool {
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty() && self.opening.borrow().is_none()
    }

    /// The watchdog's tick: connections that waited too long, are closed, or whose peer's certificate ended, go.
    pub fn sweep(&self, now: Instant, wall: SystemTime) {
        let material = self.dialer.material();
        let limit = self.idle_limit.get();
        self.idle.borrow_mut().retain_mut(|idle| {
            now.duration_since(idle.since) < limit
                && usable(idle.connection.retire_at, idle.connection.material, wall, material)
                && idle.connection.conn.is_silent(&mut Context::from_waker(Waker::noop()))
        });
        // Dropping the sender of a shared connection lets its streams end first.
        let mut others = false;
        self.shared.borrow_mut().retain_mut(|shared| {
            let keep =
                shared.is_usable(wall, material) && (shared.is_wanted(now, self.limits.mesh_pool_idle) || !others);
            others |= keep;
            keep
        });
    }
}

/// The head of a request without what the library hangs on it.
pub fn copy_head<T>(request: &Request<T>) -> Parts {
    let mut copy = Request::new(());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy.into_parts().0
}

fn usable(retire_at: Option<SystemTime>, material: u64, wall: SystemTime, current: u64) -> bool {
    retire_at.is_none_or(|end| wall < end && material == current)
}

/// Whether a request may be sent twice: idempotent (RFC 9110 section 9.2.2), without a body, no upgrade.
fn is_replayable(request: &Request<RequestBody>) -> bool {
    request.method().is_idempotent()
        && request.body().is_empty()
        && !request.headers().contains_key(http::header::UPGRADE)
}
