//! The body of a request on its way to the upstream: counts what passes and drops trailers that nobody may send.

use std::cell::Cell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use outrigger_api::policy::jwt::Authentication;

use super::bound::Bound;
use super::http1::{self, Fault, Spelling};
use super::http2::{self, Meter};
use super::interim::Interim;
use super::lane::Lane;
use super::streams::Progress;
use super::tap::{Tap, Tapped};
use crate::config::limits::Limits;
use crate::policy;
use crate::telemetry::{GrpcFrames, HttpRecord};

/// Removes what a trailer section must not carry on this hop.
pub type TrailerFilter = fn(&mut http::HeaderMap);

/// A request's body as it comes from the downstream.
pub enum Received {
    Http1(http1::Incoming),
    Http2(http2::Incoming),
}

/// A request's body as it goes to the upstream, with what a lane needs to know of the request besides.
pub struct RequestBody {
    /// None: no body; such a request can be sent again. Boxed, because most requests have none, and what carries a request
    /// is moved from hand to hand on the walk.
    streaming: Option<Box<Streaming>>,
    /// How the head of an HTTP/1 request was spelled.
    spelling: Option<Spelling>,
    /// Where interim answers go, if the client takes any.
    interim: Option<Rc<Interim>>,
    /// The upstream connections of the downstream connection that this request came on.
    bound: Rc<Bound>,
    /// The request belongs to a login that authenticates its connection.
    binds: bool,
    ended: Rc<Cell<bool>>,
    /// Where its head is left.
    progress: Progress,
    /// The body of a copy that a route makes of a request.
    whole: Option<Box<Whole>>,
}

/// A body that is there already. It is one also when all of it was given: its request cannot be sent twice.
struct Whole {
    frames: VecDeque<Bytes>,
}

/// The beginning of a body, for a peer that refuses its stream or cannot reach its application. The first frame is apart
/// because most requests have one.
struct Replay {
    account: Account,
    first: Option<Bytes>,
    more: Vec<Bytes>,
    bytes: usize,
    most: usize,
    /// Of these frames, those that were given since it began anew.
    given: usize,
    /// Frames that are to be given again.
    again: usize,
}

/// On what the bytes that are kept are counted.
enum Account {
    /// The connection that they came on, which holds them.
    Http2(Rc<Meter>),
    /// All that came over HTTP/1 on this thread, with the most that these may keep.
    Http1(usize),
}

thread_local! {
    static KEPT_OF_HTTP1: Cell<usize> = const { Cell::new(0) };
}

/// Frames that are kept of one body: each costs memory of its own, however small it is.
const MOST_FRAMES: usize = 1_024;

struct Streaming {
    received: Received,
    /// What was taken of it, while it can be given again.
    replay: Option<Replay>,
    record: Rc<HttpRecord>,
    grpc: Option<GrpcFrames>,
    trailers: TrailerFilter,
    /// No trailer may be one that tells of a token.
    told: Option<Arc<Authentication>>,
    progress: Progress,
    /// A second reader, for a copy of the request.
    tapped: Option<Tapped>,
}

/// What a request has of its downstream connection.
pub struct Client {
    /// Where interim (1xx) answers go, if the client takes any.
    pub interim: Option<Rc<Interim>>,
    pub bound: Rc<Bound>,
    /// The request belongs to a login that authenticates its connection.
    pub binds: bool,
    /// The client has ended its direction behind this request.
    pub ended: Rc<Cell<bool>>,
    pub progress: Progress,
    /// The rules of tokens in force, where there are any.
    pub told: Option<Arc<Authentication>>,
}

/// Why a request's body ended early; the request's own fault.
#[derive(Debug, thiserror::Error)]
pub enum RequestBroke {
    #[error(transparent)]
    Http1(#[from] Fault),
    #[error(transparent)]
    Http2(#[from] http2::Broke),
}

impl RequestBroke {
    /// How the request's stream to an HTTP/2 upstream is reset.
    pub fn reset_code(&self) -> h2::Reason {
        match self {
            RequestBroke::Http1(_) => h2::Reason::INTERNAL_ERROR,
            RequestBroke::Http2(broke) => broke.reset_code(),
        }
    }
}

impl Received {
    fn is_end_stream(&self) -> bool {
        match self {
            Received::Http1(incoming) => incoming.is_end_stream(),
            Received::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    /// Checks the head that came before it, by the rules that the library below leaves to us.
    pub fn check_head(&self, headers: &HeaderMap) -> Result<(), RequestBroke> {
        match self {
            Received::Http1(_) => Ok(()),
            Received::Http2(incoming) => incoming.check_head(headers).map_err(RequestBroke::Http2),
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroke>>> {
        match self {
            Received::Http1(incoming) => incoming.poll_frame(cx).map_err(RequestBroke::Http1),
            Received::Http2(incoming) => incoming.poll_frame(cx).map_err(RequestBroke::Http2),
        }
    }
}

impl RequestBody {
    /// `of` is what the request shares with others of its downstream connection.
    pub fn new(
        received: Received,
        record: &Rc<HttpRecord>,
        grpc: bool,
        trailers: TrailerFilter,
        of: Client,
    ) -> RequestBody {
        let Client { interim, bound, binds, ended, progress, told } = of;
        let spelling = match &received {
            Received::Http1(incoming) => Some(incoming.spelling.clone()),
            Received::Http2(_) => None,
        };
        let streaming = (!received.is_end_stream()).then(|| {
            let grpc = grpc.then(GrpcFrames::default);
            let progress = progress.clone();
            let record = record.clone();
            Box::new(Streaming { received, replay: None, record, grpc, trailers, told, progress, tapped: None })
        });
        RequestBody { streaming, spelling, interim, bound, binds, ended, progress, whole: None }
    }

    /// An empty body for a copy of the request, which has nothing to do with its client.
    pub fn alone(&self, progress: Progress) -> RequestBody {
        RequestBody {
            streaming: None,
            spelling: self.spelling.clone(),
            interim: None,
            bound: Rc::default(),
            binds: false,
            ended: Rc::default(),
            progress,
            whole: None,
        }
    }

    /// What the body of a copy consists of.
    pub fn give(&mut self, frames: VecDeque<Bytes>) {
        self.whole = (!frames.is_empty()).then(|| Box::new(Whole { frames }));
    }

    /// Lets a second reader have all of the body when it has ended. None: it is empty.
    pub fn tap(&mut self) -> Option<Rc<Tap>> {
        let body = self.streaming.as_mut()?;
        let (tapped, tap) = Tapped::new();
        body.tapped = Some(tapped);
        Some(tap)
    }

    /// The body of the same request once more. Only to be asked of one that is empty.
    pub fn clone_empty(&self) -> RequestBody {
        RequestBody {
            streaming: None,
            spelling: self.spelling.clone(),
            interim: self.interim.clone(),
            bound: self.bound.clone(),
            binds: self.binds,
            ended: self.ended.clone(),
            progress: self.progress.clone(),
            whole: None,
        }
    }

    /// The request's stream, which may want to see its head.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// From now on what is taken is kept, up to a bound, so that [`RequestBody::rewind`] can give it again. To be called
    /// before anything is taken.
    pub fn keep(&mut self, limits: &Limits) {
        let Some(body) = &mut self.streaming else { return };
        if body.replay.is_some() {
            return;
        }
        let account = match &body.received {
            Received::Http1(_) => Account::Http1(limits.replays_http1),
            Received::Http2(incoming) => Account::Http2(incoming.meter().clone()),
        };
        let most = limits.replay;
        body.replay = Some(Replay { account, first: None, more: Vec::new(), bytes: 0, most, given: 0, again: 0 });
    }

    /// It is not going to begin anew.
    pub fn forget(&mut self) {
        let Some(body) = &mut self.streaming else { return };
        let given = |replay: &mut Replay| replay.again == replay.given;
        if body.replay.take_if(given).is_none()
            && let Some(replay) = &mut body.replay
        {
            replay.most = 0;
        }
        if body.replay.is_none() {
            body.progress.keeps(0);
        }
    }

    /// Begins anew; false when more was taken than is kept.
    pub fn rewind(&mut self) -> bool {
        let Some(body) = &mut self.streaming else { return true };
        let Some(replay) = &mut body.replay else { return false };
        replay.again = usize::from(replay.first.is_some()) + replay.more.len();
        replay.given = 0;
        true
    }

    pub fn is_empty(&self) -> bool {
        self.streaming.is_none() && self.whole.is_none()
    }

    /// Whether bytes of it wait for an upstream that takes none.
    pub fn stalled(&self, stalled: bool) {
        if let Some(streaming) = &self.streaming {
            streaming.progress.stalled(stalled);
        }
    }

    pub fn spelling(&self) -> Option<&Spelling> {
        self.spelling.as_ref()
    }

    /// The client has ended its direction behind this request.
    pub fn client_has_ended(&self) -> bool {
        self.ended.get()
    }

    /// The upstream connections that belong to this request's downstream connection.
    pub fn bound(&self) -> &Rc<Bound> {
        &self.bound
    }

    /// The lane to use instead of `shared`, which other clients use as well.
    pub fn own_lane(&self, shared: &Lane) -> Option<Rc<Lane>> {
        if self.binds { Some(self.bound.bind(shared)) } else { self.bound.find(shared) }
    }

    /// Where interim answers go.
    pub fn interim(&self) -> Option<&Rc<Interim>> {
        self.interim.as_ref()
    }
}

impl Replay {
    /// The next frame that is to be given again.
    fn give(&mut self) -> Option<Bytes> {
        if self.given == self.again {
            return None;
        }
        let frame = match self.given {
            0 => self.first.clone(),
            number => self.more.get(number - 1).cloned(),
        };
        self.given += 1;
        frame
    }

    /// Bytes that are to be given again.
    fn left(&self) -> u64 {
        let frames = self.first.iter().chain(&self.more).take(self.again).skip(self.given);
        frames.map(|frame| frame.len() as u64).sum()
    }

    /// False when there is no room for it.
    fn keep(&mut self, data: &Bytes) -> bool {
        let room = self.bytes + data.len() <= self.most && self.more.len() < MOST_FRAMES;
        if !room || !self.account.take(data.len()) {
            return false;
        }
        self.bytes += data.len();
        match &self.first {
            None => self.first = Some(data.clone()),
            Some(_) => self.more.push(data.clone()),
        }
        self.given += 1;
        self.again += 1;
        true
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        match &self.account {
            Account::Http2(meter) => meter.release(self.bytes),
            Account::Http1(_) => KEPT_OF_HTTP1.set(KEPT_OF_HTTP1.get().saturating_sub(self.bytes)),
        }
    }
}

impl Account {
    /// False when there is no room for so many bytes more.
    fn take(&self, bytes: usize) -> bool {
        match self {
            Account::Http2(meter) if meter.is_tight() => return false,
            Account::Http2(meter) => meter.hold(bytes),
            Account::Http1(most) => {
                let kept = KEPT_OF_HTTP1.get() + bytes;
                if kept > *most {
                    return false;
                }
                KEPT_OF_HTTP1.set(kept);
            }
        }
        true
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBroke;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroke>>> {
        let Some(body) = self.streaming.as_deref_mut() else {
            let frame = self.whole.as_mut().and_then(|whole| whole.frames.pop_front());
            return Poll::Ready(frame.map(|data| Ok(Frame::data(data))));
        };
        if let Some(frame) = body.replay.as_mut().and_then(Replay::give) {
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        let Some(frame) = ready!(body.received.poll_frame(cx)) else {
            body.tapped.iter().for_each(Tapped::ended);
            return Poll::Ready(None);
        };
        let mut frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                body.progress.broke_off();
                return Poll::Ready(Some(Err(error)));
            }
        };
        body.progress.moved();
        let kept = match (&mut body.replay, frame.data_ref()) {
            (Some(replay), Some(data)) => replay.keep(data),
            (Some(_), None) => false,
            (None, _) => true,
        };
        if !kept {
            body.replay = None;
        }
        if let Some(tapped) = &body.tapped {
            frame.data_ref().into_iter().for_each(|data| tapped.data(data));
            if frame.is_trailers() || body.received.is_end_stream() {
                tapped.ended();
            }
        }
        if frame.is_data() {
            body.progress.keeps(body.replay.as_ref().map_or(0, |replay| replay.bytes));
        }
        if let Some(data) = frame.data_ref() {
            body.record.add_request_bytes(data.len() as u64);
            if let Some(grpc) = &mut body.grpc {
                body.record.add_grpc_messages(grpc.feed(data));
            }
        } else if let Some(trailers) = frame.trailers_mut() {
            (body.trailers)(trailers);
            if let Some(told) = &body.told {
                policy::remove_told(told, trailers);
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        if let Some(whole) = &self.whole {
            return whole.frames.is_empty();
        }
        self.streaming.as_ref().is_none_or(|body| {
            body.replay.as_ref().is_none_or(|replay| replay.given == replay.again) && body.received.is_end_stream()
        })
    }

    fn size_hint(&self) -> SizeHint {
        let Some(body) = &self.streaming else {
            let whole = self.whole.iter().flat_map(|whole| &whole.frames);
            return SizeHint::with_exact(whole.map(|data| data.len() as u64).sum());
        };
        let left = match &body.received {
            Received::Http1(incoming) => incoming.size_hint(),
            Received::Http2(incoming) => incoming.size_hint(),
        };
        match (&body.replay, left.exact()) {
            (Some(replay), Some(exact)) if replay.given < replay.again => SizeHint::with_exact(exact + replay.left()),
            _ => left,
        }
    }
}
