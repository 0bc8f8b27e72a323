//! HTTP/2 on a lane: connections are shared by requests, and one is opened by one while the others wait for it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use http::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use super::{Answered, Lane, StreamPlace, Unsent, UpstreamBody, fault, replayable, usable};
use crate::connect::local::Local;
use crate::connect::request_body::RequestBody;
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::tls::MeshAlpn;

pub(super) struct Shared {
    pub(super) sender: http2::SendRequest<RequestBody>,
    pub(super) streams: Rc<Cell<usize>>,
    pub(super) retire_at: Option<SystemTime>,
    pub(super) generation: u64,
}

/// Somebody opens a connection; the others wait for its end.
#[derive(Default)]
pub(super) struct Opening {
    done: Notify,
    failure: RefCell<Option<(Reason, Retry, String)>>,
    ended: Cell<bool>,
}

impl Lane {
    pub(super) async fn send_http2(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
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
                    let response = response.map(|incoming| UpstreamBody::Http2(incoming, place));
                    let at = Instant::now();
                    return Ok(Answered { response, at, latency: at - sent });
                }
                Err(failed) => failed,
            };
            let refused = fault::is_refused_stream(failed.error());
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
            .handshake::<_, RequestBody>(TokioIo::new(dialled.stream))
            .await
            .map_err(|error| self.closed(&error, Retry::Safe))?;
        tokio::task::spawn_local(async move {
            let _ = connection.await;
        });
        Ok(Shared { sender, streams: Rc::default(), retire_at, generation })
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
