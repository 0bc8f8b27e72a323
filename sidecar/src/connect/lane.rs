//! The pooled HTTP connections of one worker to one endpoint. HTTP/1.1 connections carry one request at a time and
//! wait last-in-first-out for the next; HTTP/2 connections are shared. A request that meets a pooled connection at
//! the very moment when the peer closes it is sent once more on a fresh one, when that is safe.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use super::dial::{Dialer, Target};
use super::local::Local;
use super::request_body::RequestBody;
use super::upstream_io::{Probe, UpstreamIo};
use crate::config::limits::Limits;
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::tls::MeshAlpn;

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
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Shared>>,
    /// Set while somebody opens an HTTP/2 connection: the others wait for it.
    opening: RefCell<Option<Rc<Opening>>>,
}

struct Idle {
    connection: Http1,
    since: Instant,
}

struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    probe: Arc<Probe>,
    retire_at: Option<SystemTime>,
    generation: u64,
}

struct Shared {
    sender: http2::SendRequest<RequestBody>,
    streams: Rc<Cell<usize>>,
    retire_at: Option<SystemTime>,
    generation: u64,
}

#[derive(Default)]
struct Opening {
    done: Notify,
    failure: RefCell<Option<(Reason, Retry, String)>>,
    ended: Cell<bool>,
}

/// The head of an answer, the connection that its body comes on, and how long the head took from when the request was
/// sent, connecting not included.
pub struct Answered {
    pub response: Response<Incoming>,
    pub held: Held,
    pub latency: Duration,
}

/// Why a request was not answered; the request itself when it may be sent elsewhere.
pub struct Unsent {
    pub error: Error,
    pub request: Option<Request<RequestBody>>,
}

/// Holds the connection until the answer has ended. [`Held::release`] gives it back; dropping it does not.
pub enum Held {
    Http1(Box<(Http1Parts, Rc<Lane>)>),
    Http2(StreamPlace),
}

/// The connection that [`Held`] returns to its lane.
pub struct Http1Parts(Http1);

/// One stream on a shared connection; its drop frees the place.
pub struct StreamPlace(Rc<Cell<usize>>);

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl Held {
    /// The answer was read to its end: the connection may carry the next request.
    pub fn release(self) {
        match self {
            Held::Http1(parts) => {
                let (Http1Parts(connection), lane) = *parts;
                lane.put_back(connection);
            }
            Held::Http2(_) => {}
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
        match self.framing {
            Framing::Http1 => self.send_http1(request).await,
            Framing::Http2 => self.send_http2(request).await,
        }
    }

    /// True when nothing is pooled and nothing is being opened.
    pub fn is_idle(&self) -> bool {
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty() && self.opening.borrow().is_none()
    }

    /// The watchdog's tick: connections that waited too long, are closed, or whose peer's certificate ended, go.
    pub fn sweep(&self, now: Instant, wall: SystemTime) {
        let generation = self.dialer.generation();
        let limit = self.idle_limit.get();
        self.idle.borrow_mut().retain(|idle| {
            !idle.connection.sender.is_closed()
                && now.duration_since(idle.since) < limit
                && usable(idle.connection.retire_at, idle.connection.generation, wall, generation)
        });
        // Dropping the sender of a shared connection lets its streams end first.
        self.shared.borrow_mut().retain(|shared| {
            !shared.sender.is_closed() && usable(shared.retire_at, shared.generation, wall, generation)
        });
    }

    // --- HTTP/1.1 -------------------------------------------------------------------------------------------

    async fn send_http1(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
        let mut may_reuse = true;
        loop {
            let reused = if may_reuse { self.take_idle() } else { None };
            let is_reused = reused.is_some();
            let mut connection = match reused {
                Some(connection) => connection,
                // Boxed: a handshake's state is 11 KiB, and every request's future would be as large to be moved and kept.
                None => match Box::pin(self.open_http1()).await {
                    Ok(connection) => connection,
                    Err(error) => return Err(Unsent { error, request: Some(request) }),
                },
            };
            let copy = if is_reused { replayable(&request) } else { None };
            let received = connection.probe.received();
            let sent = Instant::now();
            let mut failed = match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    self.heed_keep_alive(&response);
                    let held = Held::Http1(Box::new((Http1Parts(connection), self.clone())));
                    return Ok(Answered { response, held, latency: sent.elapsed() });
                }
                Err(failed) => failed,
            };
            if let Some(unsent) = failed.take_message() {
                // Not a byte was written: whatever the method, nobody has seen it.
                request = unsent;
                may_reuse = false;
                if is_reused {
                    continue;
                }
                let error = self.closed(failed.error(), Retry::Safe);
                return Err(Unsent { error, request: Some(request) });
            }
            if let Some(copy) = copy
                && connection.probe.received() == received
            {
                // Closed under us before the first byte of an answer, and the request is safe to send twice.
                request = copy;
                may_reuse = false;
                continue;
            }
            return Err(Unsent { error: self.closed(failed.error(), Retry::Never), request: None });
        }
    }

    fn take_idle(&self) -> Option<Http1> {
        let wall = SystemTime::now();
        let generation = self.dialer.generation();
        let limit = self.idle_limit.get();
        let mut idle = self.idle.borrow_mut();
        let mut index = idle.len();
        while index > 0 {
            index -= 1;
            let candidate = &idle[index];
            let gone = candidate.connection.sender.is_closed()
                || candidate.since.elapsed() >= limit
                || !usable(candidate.connection.retire_at, candidate.connection.generation, wall, generation);
            if gone {
                idle.remove(index);
            } else if candidate.connection.sender.is_ready() {
                return Some(idle.remove(index).connection);
            }
        }
        None
    }

    fn put_back(&self, connection: Http1) {
        if connection.sender.is_closed() {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.limits.pool_idle_per_endpoint {
            idle.push(Idle { connection, since: Instant::now() });
        }
    }

    async fn open_http1(&self) -> Result<Http1, Error> {
        let dialled = self.dialer.dial(&self.target, MeshAlpn::H1).await?;
        let retire_at = dialled.retire_at();
        let generation = dialled.peer.as_ref().map_or(0, |peer| peer.generation);
        let (io, probe) = UpstreamIo::new(dialled.stream);
        let mut builder = http1::Builder::new();
        builder
            .preserve_header_case(true)
            .max_header_size(self.limits.head_bytes)
            .max_buf_size(self.limits.head_bytes.max(8192));
        let (sender, connection) = builder
            .handshake::<_, RequestBody>(TokioIo::new(io))
            .await
            .map_err(|error| self.closed(&error, Retry::Safe))?;
        tokio::task::spawn_local(async move {
            // Its end is told to whoever waits for an answer.
            let _ = connection.with_upgrades().await;
        });
        Ok(Http1 { sender, probe, retire_at, generation })
    }

    /// `Keep-Alive: timeout=N` says when the peer will close: stay below it.
    fn heed_keep_alive(&self, response: &Response<Incoming>) {
        if self.target.tls.is_some() {
            return;
        }
        let Some(value) = response.headers().get("keep-alive") else { return };
        let seconds = value.to_str().ok().and_then(|text| {
            text.split(',').find_map(|part| part.trim().strip_prefix("timeout=")?.trim().parse::<u64>().ok())
        });
        if let Some(seconds) = seconds {
            let margin = self.limits.application_pool_idle;
            let kept = Duration::from_secs(seconds.min(3600));
            // Of a very short time keep half: the margin would leave nothing.
            self.idle_limit.set(kept.checked_sub(margin).filter(|left| !left.is_zero()).unwrap_or(kept / 2));
        }
    }

    // --- HTTP/2 ---------------------------------------------------------------------------------------------

    async fn send_http2(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
        let mut again = true;
        loop {
            let (mut sender, place) = match self.shared_connection().await {
                Ok(shared) => shared,
                Err(error) => return Err(Unsent { error, request: Some(request) }),
            };
            let copy = replayable(&request);
            let sent = Instant::now();
            let mut failed = match sender.try_send_request(request).await {
                Ok(response) => {
                    return Ok(Answered { response, held: Held::Http2(place), latency: sent.elapsed() });
                }
                Err(failed) => failed,
            };
            let refused = is_refused_stream(failed.error());
            match failed.take_message().or(if refused { copy } else { None }) {
                Some(unsent) if again => {
                    request = unsent;
                    again = false;
                }
                request => {
                    let retry = if request.is_some() { Retry::Safe } else { Retry::Never };
                    return Err(Unsent { error: self.closed(failed.error(), retry), request });
                }
            }
        }
    }

    async fn shared_connection(self: &Rc<Lane>) -> Result<(http2::SendRequest<RequestBody>, StreamPlace), Error> {
        loop {
            if let Some(found) = self.find_shared() {
                return Ok(found);
            }
            let waiting = self.opening.borrow().clone();
            if let Some(opening) = waiting {
                let done = opening.done.notified();
                if !opening.ended.get() {
                    done.await;
                }
                if let Some((reason, retry, detail)) = opening.failure.borrow().clone() {
                    return Err(Error::upstream(Stage::Connect, reason, retry, detail));
                }
                continue;
            }
            let guard = OpeningGuard::new(self);
            let opened = Box::pin(self.open_http2()).await;
            guard.end(&opened);
            let shared = opened?;
            self.shared.borrow_mut().push(shared);
        }
    }

    fn find_shared(&self) -> Option<(http2::SendRequest<RequestBody>, StreamPlace)> {
        let wall = SystemTime::now();
        let generation = self.dialer.generation();
        let most = (self.peer_streams() as usize * self.limits.h2_streams_used_percent as usize / 100).max(1);
        let mut shared = self.shared.borrow_mut();
        shared.retain(|one| !one.sender.is_closed() && usable(one.retire_at, one.generation, wall, generation));
        shared.iter().find(|one| one.streams.get() < most).map(|one| {
            one.streams.set(one.streams.get() + 1);
            (one.sender.clone(), StreamPlace(one.streams.clone()))
        })
    }

    /// The library does not tell what a peer advertised; sidecars and common servers are known.
    fn peer_streams(&self) -> u32 {
        if self.target.tls.is_some() { self.limits.h2_streams_mesh } else { self.limits.h2_streams_application }
    }

    async fn open_http2(&self) -> Result<Shared, Error> {
        let dialled = self.dialer.dial(&self.target, MeshAlpn::H2).await?;
        let retire_at = dialled.retire_at();
        let generation = dialled.peer.as_ref().map_or(0, |peer| peer.generation);
        let (io, _) = UpstreamIo::new(dialled.stream);
        let mut builder = http2::Builder::new(Local);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(self.limits.h2_stream_window)
            .initial_connection_window_size(self.limits.h2_shared_window(self.peer_streams()))
            .max_header_list_size(self.limits.h2_header_list)
            .max_send_buf_size(self.limits.h2_send_buffer)
            .max_concurrent_streams(0)
            .keep_alive_interval(self.limits.keepalive)
            .keep_alive_timeout(self.limits.user_timeout);
        let (sender, connection) = builder
            .handshake::<_, RequestBody>(TokioIo::new(io))
            .await
            .map_err(|error| self.closed(&error, Retry::Safe))?;
        tokio::task::spawn_local(async move {
            let _ = connection.await;
        });
        Ok(Shared { sender, streams: Rc::default(), retire_at, generation })
    }

    // --- errors ---------------------------------------------------------------------------------------------

    /// What a failed exchange means. The library's error is looked at once, here.
    fn closed(&self, error: &hyper::Error, retry: Retry) -> Error {
        let reason = if error.is_parse() || error.is_parse_too_large() {
            Reason::UpstreamProtocol
        } else if has_reset(error) {
            Reason::UpstreamReset
        } else {
            Reason::UpstreamClosed
        };
        Error::upstream(Stage::Forward, reason, retry, format!("{}: {}", self.target.address, Chain(error)))
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

fn usable(retire_at: Option<SystemTime>, generation: u64, wall: SystemTime, current: u64) -> bool {
    retire_at.is_none_or(|end| wall < end && generation == current)
}

/// A copy of a request that may be sent twice: idempotent (RFC 9110 section 9.2.2), without a body, no upgrade.
fn replayable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let safe = request.method().is_idempotent()
        && request.body().is_empty()
        && !request.headers().contains_key(http::header::UPGRADE);
    if !safe {
        return None;
    }
    let mut copy = Request::new(RequestBody::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    *copy.extensions_mut() = request.extensions().clone();
    Some(copy)
}

/// REFUSED_STREAM, or a GOAWAY that did not cover the stream: the peer promises that it did nothing (RFC 9113 8.7).
fn is_refused_stream(error: &hyper::Error) -> bool {
    source::<h2::Error>(error).is_some_and(|error| error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

fn has_reset(error: &hyper::Error) -> bool {
    source::<h2::Error>(error).is_some_and(h2::Error::is_reset)
        || source::<std::io::Error>(error).is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

fn source<T: std::error::Error + 'static>(error: &hyper::Error) -> Option<&T> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// An error with everything behind it, for a log line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}
