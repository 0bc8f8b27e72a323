//! HTTP/2 on a lane: connections are shared by requests, and one is opened by one while the others wait for it. A request
//! is sent and its answer received on the task of the downstream, without a task or a channel of its own; a task drives
//! each connection.

use std::cell::{Cell, RefCell, RefMut};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::{ResponseFuture, SendRequest};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;

use super::{Answered, Lane, Unprocessed, Unsent, UpstreamBody, fault, usable};
use crate::config::limits::Limits;
use crate::connect::http2::heads::{Heads, Marks, PSEUDO_IN_TRAILERS, Sender};
use crate::connect::http2::{
    Allowance, Batched, Broke, Change, Incoming, KeepAlive, Meter, Sending, Stop, UpstreamIo, check_fields, leaving,
};
use crate::connect::interim::{self, Interim};
use crate::connect::request_body::{RequestBody, RequestBroke};
use crate::connect::streams::{Part, Progress};
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::tls::MeshAlpn;

/// A connection that requests share. Its streams live on when it leaves the pool.
pub(super) struct Shared {
    sender: SendRequest<Bytes>,
    streams: Rc<Streams>,
    marks: Rc<Marks>,
    meter: Rc<Meter>,
    retire_at: Option<SystemTime>,
    material: u64,
    /// When it was first seen without a stream.
    idle_since: Option<Instant>,
}

/// The streams of one connection: how many there are and may be.
struct Streams {
    open: Cell<usize>,
    /// At most so many, because the peer refused one more.
    most: Cell<usize>,
    /// The peer has said how many it allows.
    told: Cell<bool>,
    /// Woken when it has, or when the connection has ended.
    news: Notify,
    /// The resets that the peer lets us have. A sidecar counts them over all the clients behind us, and ends the connection
    /// for all when there are too many: so a connection has room only while all that runs on it may be reset.
    resets: RefCell<Allowance>,
}

/// What the library believes of the peer's limit before the peer has said anything.
const UNTOLD: usize = usize::MAX - 1;
/// How often the upstream may refuse one request before that is the answer.
const REFUSALS: u32 = 4;

/// Somebody opens a connection; the others wait for its end.
#[derive(Default)]
pub(super) struct Opening {
    done: Notify,
    failure: RefCell<Option<(Reason, Retry, String)>>,
    ended: Cell<bool>,
}

/// The answer's body, and what is left of the request to be sent.
pub struct Answer {
    incoming: Incoming,
    request: Rest,
    place: StreamPlace,
    /// How long the rest of a request may take that was answered before its end.
    patience: Duration,
}

/// The sending half of a stream, with what of the request is not sent yet.
struct Rest {
    sending: Sending,
    /// None for a request without one, and when it is needed no more.
    body: Option<Box<RequestBody>>,
    /// All of it is sent: what is left is what may have to be sent again.
    sent: bool,
}

impl Drop for Rest {
    fn drop(&mut self) {
        // A client that reset its stream resets this one with the same code. It does nothing to a stream that has ended.
        if let Some(code) = leaving::code() {
            self.sending.reset(code);
        }
    }
}

/// One stream on a shared connection; its drop frees the place.
struct StreamPlace {
    streams: Rc<Streams>,
    marks: Rc<Marks>,
    stream: u32,
    /// Both sides have ended it, or the peer has reset it: dropping it resets nothing.
    ended: bool,
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.streams.open.set(self.streams.open.get().saturating_sub(1));
        if !self.ended {
            self.streams.resets.borrow_mut().owe(1);
        }
        self.marks.take(self.stream);
    }
}

impl Lane {
    pub(super) async fn send_http2(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
        let mut refusals = 0;
        loop {
            let (head, empty) = copy(&mut request, &self.limits);
            let progress = request.body().progress().clone();
            let begun = loop {
                if let Some(mut shared) = self.find_shared() {
                    break shared.begin(request);
                }
                if let Err(error) = self.open_or_wait().await {
                    return Err(Unsent { error, request: Some(request) });
                }
            };
            let sent = Instant::now();
            let mut attempt = match begun {
                Ok(attempt) => attempt,
                Err(error) => {
                    let error = Error::own(Stage::Forward, Reason::Internal, format!("the head of a request: {error}"));
                    return Err(Unsent { error, request: None });
                }
            };
            let answering = std::future::poll_fn(|cx| {
                if progress.wants_head() {
                    progress.take_head(head.clone());
                }
                attempt.poll(cx)
            });
            let failure = match answering.await {
                Ok(response) => {
                    let at = Instant::now();
                    let mut head = Some(head);
                    let reason = self.unprocessed(&response, response.body().is_end_stream());
                    let unprocessed = reason.map(|reason| {
                        let request = attempt.request.take_body(empty).zip(head.take());
                        let request = request.map(|(body, head)| Request::from_parts(head, body));
                        Box::new(Unprocessed { reason, request })
                    });
                    if let Some(head) = head {
                        progress.take_head(head);
                    }
                    let response = attempt.answered(response, self);
                    return Ok(Answered { response, at, latency: at - sent, unprocessed });
                }
                Err(failure) => failure,
            };
            let refused = matches!(&failure, Failure::Upstream(error) if fault::is_refused_stream(error));
            let streams = attempt.place.streams.clone();
            attempt.place.ended = matches!(failure, Failure::Upstream(_));
            let body = if refused { attempt.request.take_body(empty) } else { None };
            // Its place is free again.
            drop(attempt);
            let unsent = match body {
                Some(body) => Some(Request::from_parts(head, body)),
                None => {
                    progress.leave_head(head);
                    None
                }
            };
            match unsent {
                Some(unsent) if refusals < REFUSALS => {
                    request = unsent;
                    refusals += 1;
                    // Once it may have been a race; then there are fewer places than the peer said.
                    if refusals > 1 {
                        streams.most.set(streams.open.get().max(1));
                    }
                }
                request => {
                    let retry = if request.is_some() { Retry::Safe } else { Retry::Never };
                    return Err(Unsent { error: self.failed(failure, retry), request });
                }
            }
        }
    }

    pub(super) async fn warm_http2(self: &Rc<Lane>) -> Result<(), Error> {
        while self.find_shared().is_none() {
            self.open_or_wait().await?;
        }
        Ok(())
    }

    /// A connection that takes one more stream.
    pub(super) fn find_shared(&self) -> Option<RefMut<'_, Shared>> {
        let material = self.dialer.material();
        let (ours, percent) = (self.most_streams() as usize, self.limits.h2_streams_used_percent);
        let untold = self.untold_streams();
        let mut shared = self.shared.borrow_mut();
        // What ended by the wall clock the watchdog takes out.
        shared.retain_mut(|one| one.is_open() && (one.retire_at.is_none() || one.material == material));
        RefMut::filter_map(shared, |shared| shared.iter_mut().find(|one| one.has_room(ours, percent, untold))).ok()
    }

    /// Opens a connection, or waits for whoever is opening one.
    async fn open_or_wait(self: &Rc<Lane>) -> Result<(), Error> {
        let waiting = self.opening.borrow().clone();
        if let Some(opening) = waiting {
            let done = opening.done.notified();
            if !opening.ended.get() {
                done.await;
            }
            if let Some((reason, retry, detail)) = opening.failure.borrow().clone() {
                return Err(Error::upstream(Stage::Connect, reason, retry, detail));
            }
            return Ok(());
        }
        let untold = self.shared.borrow().iter().find(|one| !one.streams.told.get()).map(|one| one.streams.clone());
        if let Some(streams) = untold {
            // Bounded: a peer that never says it has no more than what it was sent.
            if tokio::time::timeout(self.limits.h2_settings_wait, streams.news.notified()).await.is_err() {
                streams.most.set(self.untold_streams());
                streams.told.set(true);
            }
            return Ok(());
        }
        let guard = OpeningGuard::new(self);
        let opened = Box::pin(self.open_http2()).await;
        guard.end(&opened);
        self.shared.borrow_mut().push(opened?);
        Ok(())
    }

    /// The streams that we have on one connection at most.
    fn most_streams(&self) -> u32 {
        if self.is_mesh() { self.limits.h2_streams_mesh } else { self.limits.h2_streams_application }
    }

    /// The streams that we have on a connection whose peer has not yet said how many it allows: a sidecar's limit is known,
    /// any other server's may be one.
    fn untold_streams(&self) -> usize {
        if self.is_mesh() { self.limits.h2_streams_mesh as usize } else { 1 }
    }

    async fn open_http2(&self) -> Result<Shared, Error> {
        let dialled = self.dialer.dial(&self.target, MeshAlpn::H2).await?;
        let retire_at = dialled.retire_at();
        let material = dialled.material();
        let limits = &self.limits;
        let meter = Meter::new(self.dialer.ledger(), false);
        let most = self.most_streams();
        let marks = Marks::new(limits.h2_header_list);
        let heads = Heads::new(Sender::Server, limits.h2_header_list_taken as usize, marks.clone());
        let io = Batched::new(UpstreamIo::new(dialled.stream, meter.clone(), heads), limits.h2_header_list);
        let (sender, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(limits.h2_stream_window)
            .initial_connection_window_size(limits.h2_shared_window(most, 0))
            .data_frame_budget(limits.h2_data_frames)
            .max_header_list_size(limits.h2_header_list_taken)
            .max_send_buffer_size(limits.h2_send_buffer)
            .max_concurrent_streams(0)
            .initial_max_send_streams(UNTOLD)
            // A stream is reset because its client left; frames of it that were under way must not end the connection.
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(self.most_streams() as usize)
            .reset_stream_duration(limits.h2_reset_memory)
            .handshake::<_, Bytes>(io.clone())
            .await
            .map_err(|error| self.closed(&error, Retry::Safe))?;
        let resets = i64::from(self.most_streams());
        let streams = Rc::new(Streams {
            open: Cell::new(0),
            most: Cell::new(usize::MAX),
            told: Cell::new(false),
            news: Notify::new(),
            resets: RefCell::new(Allowance::new(resets, (resets / 8).max(1))),
        });
        // Nobody but a sidecar is asked whether it is still there: a server may take it for an attack, as grpc-go does, and
        // the kernel asks as well.
        let mut alive = KeepAlive::new(connection.ping_pong(), meter.clone(), limits, self.is_mesh());
        let limits = limits.clone();
        let driven = streams.clone();
        tokio::task::spawn_local(std::future::poll_fn(move |cx| {
            let gone = alive.poll(cx, driven.open.get() > 0).is_ready();
            // How it ended, its streams tell.
            let ended = gone || Pin::new(&mut connection).poll(cx).is_ready();
            if !ended {
                alive.follow(cx, |change| match change {
                    Change::Window(window) => connection.set_initial_window_size(window).is_ok(),
                    Change::Held(held) => {
                        connection.set_target_window_size(limits.h2_shared_window(most, held));
                        true
                    }
                });
            }
            io.end_turn(cx);
            if !driven.told.get() && (ended || connection.max_concurrent_send_streams() != UNTOLD) {
                driven.told.set(true);
                driven.news.notify_waiters();
            }
            if ended { Poll::Ready(()) } else { Poll::Pending }
        }));
        Ok(Shared { sender, streams, marks, meter, retire_at, material, idle_since: None })
    }

    fn failed(&self, failure: Failure, retry: Retry) -> Error {
        match failure {
            Failure::Request(broke) => fault::request_broke(&broke),
            Failure::Upstream(error) => self.closed(&error, retry),
            Failure::Unacceptable(wrong) => self.unacceptable(&wrong, retry),
        }
    }
}

/// A copy of a request's head, for a peer that refuses the stream: the library takes the head away. What is taken of the
/// body is kept, as far as it can be; of an empty one there is a copy.
fn copy(request: &mut Request<RequestBody>, limits: &Limits) -> (Parts, Option<RequestBody>) {
    let head = super::copy_head(request);
    let empty = request.body().is_empty().then(|| request.body().clone_empty());
    request.body_mut().keep(limits);
    (head, empty)
}

impl Shared {
    pub(super) fn is_usable(&mut self, wall: SystemTime, material: u64) -> bool {
        self.is_open() && usable(self.retire_at, self.material, wall, material)
    }

    /// Neither ended, nor told by the peer to open no more streams.
    fn is_open(&mut self) -> bool {
        // It waits for nothing, because each stream is opened by a clone.
        !matches!(self.sender.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
    }

    fn has_room(&self, ours: usize, percent: u32, untold: usize) -> bool {
        let streams = &self.streams;
        let told = if streams.told.get() { self.sender.current_max_send_streams() } else { untold };
        let open = streams.open.get();
        let room = open < (told.min(ours) * percent as usize / 100).max(1).min(streams.most.get());
        room && streams.resets.borrow_mut().has(i64::try_from(open + 1).unwrap_or(i64::MAX))
    }

    /// Whether a connection beside others is kept: without a stream for `limit` it is not. The watchdog asks.
    pub(super) fn is_wanted(&mut self, now: Instant, limit: Duration) -> bool {
        if self.streams.open.get() > 0 {
            self.idle_since = None;
            return true;
        }
        now.duration_since(*self.idle_since.get_or_insert(now)) < limit
    }

    fn begin(&mut self, request: Request<RequestBody>) -> Result<Attempt, h2::Error> {
        let (mut parts, body) = request.into_parts();
        let ended = body.is_end_stream();
        if let Some(length) = body.size_hint().exact()
            && (length != 0 || may_have_body(&parts.method))
            && !parts.headers.contains_key(header::CONTENT_LENGTH)
        {
            parts.headers.insert(header::CONTENT_LENGTH, length.into());
        }
        let interim = body.interim().cloned();
        // A clone, because the library makes a sender wait that reached the peer's limit, and keeps the stream for that.
        let (answer, stream) = self.sender.clone().send_request(Request::from_parts(parts, ()), ended)?;
        let (streams, marks) = (self.streams.clone(), self.marks.clone());
        streams.open.set(streams.open.get() + 1);
        let place = StreamPlace { streams, marks, stream: stream.stream_id().into(), ended: false };
        let request = Rest {
            sending: Sending::new(stream, self.meter.clone()),
            body: (!ended).then(|| Box::new(body)),
            sent: ended,
        };
        Ok(Attempt { answer, request, interim, heard: interim::Count::default(), place, meter: self.meter.clone() })
    }
}

/// A request without a body says so where one might have been expected.
fn may_have_body(method: &Method) -> bool {
    matches!(*method, Method::POST | Method::PUT | Method::PATCH)
}

/// What ended a try to get the head of an answer.
enum Failure {
    Request(RequestBroke),
    Upstream(h2::Error),
    Unacceptable(Broke),
}

/// One try to get the head of an answer.
struct Attempt {
    answer: ResponseFuture,
    request: Rest,
    interim: Option<Rc<Interim>>,
    /// Interim answers so far.
    heard: interim::Count,
    place: StreamPlace,
    /// Of the connection.
    meter: Rc<Meter>,
}

impl Attempt {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<RecvStream>, Failure>> {
        if let Poll::Ready(sent) = self.request.poll(cx) {
            sent.map_err(Failure::Request)?;
        }
        while let Some(interim) = ready!(self.answer.poll_informational(cx)) {
            let interim = interim.map_err(Failure::Upstream)?;
            if interim.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Poll::Ready(Err(Failure::Unacceptable(Broke::Malformed("101 on HTTP/2"))));
            }
            if !self.heard.take(Instant::now()) {
                return Poll::Ready(Err(Failure::Unacceptable(Broke::Malformed("endless interim answers"))));
            }
            check_fields(interim.headers(), self.place.marks.header_list()).map_err(Failure::Unacceptable)?;
            if let Some(client) = &self.interim {
                client.push(interim, None);
            }
        }
        let response = ready!(Pin::new(&mut self.answer).poll(cx)).map_err(Failure::Upstream)?;
        self.check(&response).map_err(Failure::Unacceptable)?;
        Poll::Ready(Ok(response))
    }

    fn check(&self, response: &Response<RecvStream>) -> Result<(), Broke> {
        let StreamPlace { marks, stream, .. } = &self.place;
        match marks.take(*stream) {
            // What ends the stream here is the head.
            Some(PSEUDO_IN_TRAILERS) if response.body().is_end_stream() => {}
            Some(wrong) => return Err(Broke::Malformed(wrong)),
            None => {}
        }
        check_fields(response.headers(), marks.header_list())
    }

    fn answered(self, response: Response<RecvStream>, lane: &Lane) -> Response<UpstreamBody> {
        let (parts, stream) = response.into_parts();
        let incoming = Incoming::new(stream, &parts.headers, self.place.marks.clone(), &self.meter);
        let mut request = self.request;
        if request.sent {
            request.body = None;
        } else if let Some(body) = &mut request.body {
            body.forget();
        }
        let answer = Answer { incoming, request, place: self.place, patience: lane.limits.stream_idle };
        Response::from_parts(parts, UpstreamBody::Http2(answer))
    }
}

impl Rest {
    /// The request's body from its beginning, if that can still be had; `empty` is that of a request without one.
    fn take_body(&mut self, empty: Option<RequestBody>) -> Option<RequestBody> {
        if self.body.is_none() {
            return empty;
        }
        self.body.take_if(|body| body.rewind()).map(|body| *body)
    }

    /// Sends as much as the upstream takes and the client has brought. Ready when there is no more to be done; it is an
    /// error only when the client broke off, because the upstream may have answered without wanting the rest.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestBroke>> {
        let Some(body) = self.body.as_mut().filter(|_| !self.sent) else { return Poll::Ready(Ok(())) };
        let sent = self.sending.poll(cx, &mut **body);
        body.stalled(sent.is_pending() && self.sending.is_blocked());
        let sent = ready!(sent);
        self.sent = true;
        match sent {
            Ok(()) | Err(Stop::Reset(_) | Stop::Peer(_)) => Poll::Ready(Ok(())),
            Err(Stop::Body(broke)) => {
                self.sending.reset(broke.reset_code());
                Poll::Ready(Err(broke))
            }
        }
    }
}

impl Answer {
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broke>>> {
        self.send_on(cx);
        let frame = self.incoming.poll_frame(cx);
        if let Poll::Ready(Some(Err(_))) = frame {
            self.place.ended = true;
        }
        frame
    }

    pub fn watch(&mut self, progress: &Progress) {
        if !self.incoming.is_end_stream() {
            self.incoming.watch(progress, Part::Answer);
        }
    }

    pub fn send_on(&mut self, cx: &mut Context<'_>) {
        // When the client broke off, the stream is reset, and the answer's end tells.
        if self.request.poll(cx).is_ready() {
            self.request.body = None;
        }
    }

    pub fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }

    /// The answer was read to its end. An upstream may answer before the end of a request and still want the rest.
    pub fn release(self) {
        let Answer { request: mut rest, mut place, patience, .. } = self;
        if let Poll::Ready(sent) = rest.poll(&mut Context::from_waker(Waker::noop())) {
            place.ended = sent.is_ok() && rest.sent;
            return;
        }
        tokio::task::spawn_local(async move {
            let mut place = place;
            // Cut off, both sides see that it is.
            let sent = tokio::time::timeout(patience, std::future::poll_fn(|cx| rest.poll(cx))).await;
            place.ended = matches!(sent, Ok(Ok(())));
        });
    }
}

/// Ends an attempt to open a shared connection, also when its future is dropped half way.
struct OpeningGuard<'a> {
    lane: &'a Lane,
    opening: Rc<Opening>,
}

impl<'a> OpeningGuard<'a> {
    fn new(lane: &'a Lane) -> OpeningGuard<'a> {
        let opening = Rc::new(Opening::default());
        *lane.opening.borrow_mut() = Some(opening.clone());
        OpeningGuard { lane, opening }
    }

    fn end(self, opened: &Result<Shared, Error>) {
        if let Err(error) = opened {
            *self.opening.failure.borrow_mut() = Some((error.reason, error.retry, error.detail.to_string()));
        }
    }
}

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        *self.lane.opening.borrow_mut() = None;
        self.opening.ended.set(true);
        self.opening.done.notify_waiters();
    }
}
