//! HTTP/1.1 on a lane: one request at a time on each connection, which then waits last-in-first-out for the next. A
//! request that meets one at the very moment when the peer closes it is sent once more on a fresh one, when that is safe.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::{Answered, Held, Http1Parts, Lane, Unsent, replayable, usable};
use crate::connect::request_body::RequestBody;
use crate::connect::upstream_io::{Probe, UpstreamIo};
use crate::outcome::{Error, Retry};
use crate::tls::MeshAlpn;

pub(super) struct Http1 {
    pub(super) sender: http1::SendRequest<RequestBody>,
    pub(super) probe: Arc<Probe>,
    pub(super) retire_at: Option<SystemTime>,
    pub(super) generation: u64,
}

pub(super) struct Idle {
    pub(super) connection: Http1,
    pub(super) since: Instant,
}

impl Lane {
    pub(super) async fn send_http1(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
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

    pub(super) fn put_back(&self, connection: Http1) {
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
            // Not max_header_size: that would be the bound of trailers, too, whose own is the library's 16 KiB.
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
}
