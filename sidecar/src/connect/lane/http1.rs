//! HTTP/1.1 on a lane: one request at a time on each connection, which then waits last-in-first-out for the next. A
//! request that meets one at the very moment when the peer closes it is sent once more on a fresh one, when that is
//! safe. The request's body goes out while the answer comes in, on the task of the downstream.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};

use super::{Answered, Lane, Unprocessed, Unsent, UpstreamBody, fault, is_replayable};
use crate::connect::http1::body::Decoded;
use crate::connect::http1::head::{self, ResponseHead};
use crate::connect::http1::{Conn, Decoder, Fault, Spelling, turn};
use crate::connect::interim;
use crate::connect::request_body::{RequestBody, RequestBroke};
use crate::net::Stream;
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::tls::MeshAlpn;

pub(super) struct Http1 {
    pub(super) conn: Conn,
    pub(super) retire_at: Option<SystemTime>,
    pub(super) material: u64,
}

pub(super) struct Idle {
    pub(super) connection: Box<Http1>,
    pub(super) since: Instant,
}

/// The answer's body, the connection that it comes on, and what is left of the request to be sent.
pub struct Answer {
    connection: Box<Http1>,
    lane: Rc<Lane>,
    sending: Sending,
    /// What of the request is not sent yet.
    request: Option<RequestBody>,
    decoder: Decoder,
    keep_alive: bool,
    /// Bytes came behind the answer.
    unasked: bool,
    spelling: Spelling,
    /// When the upstream was heard last, if that was just now: nobody waited since.
    heard: Option<Instant>,
    /// How many more times the body may be waited for with an ACK at once.
    hurry: u8,
}

/// A server that writes a head and a body apart without TCP_NODELAY has the body held back by its kernel until the head is
/// acknowledged, 40 ms later on a connection that has carried requests before. A fresh connection acknowledges its first
/// packets at once; here each answer has as many, and a stream that goes on for long costs no more.
const HURRY: u8 = 16;

impl Lane {
    pub(super) async fn send_http1(self: &Rc<Lane>, mut request: Request<RequestBody>) -> Result<Answered, Unsent> {
        let mut may_reuse = true;
        loop {
            let mut began = Instant::now();
            let taking = poll_fn(|cx| Poll::Ready(self.take_idle(began, cx)));
            let reused = if may_reuse { taking.await } else { None };
            let is_reused = reused.is_some();
            let mut connection = match reused {
                Some(connection) => connection,
                // Boxed: a handshake's state is 11 KiB, and every request's future would be as large to be moved and kept.
                None => match Box::pin(self.open_http1()).await {
                    Ok(connection) => {
                        began = Instant::now();
                        connection
                    }
                    Err(error) => return Err(Unsent { error, request: Some(request) }),
                },
            };
            let sent_before = connection.conn.sent();
            let mut attempt = Attempt::new(&mut connection.conn, &mut request, self, is_reused);
            if attempt.sending.done && attempt.conn.stream().is_plain() {
                turn::end().await;
            }
            let outcome = poll_fn(|cx| attempt.poll(cx)).await;
            let Attempt { sending, received, .. } = attempt;
            match outcome {
                Ok(head) if is_reused && is_unasked(&head) && !sending.ended && is_replayable(&request) => {
                    may_reuse = false;
                }
                Ok(head) => return Ok(self.answered(connection, request, sending, head, began)),
                Err(failure) => {
                    let untouched = connection.conn.sent() == sent_before && request.body().is_empty();
                    // An upstream that was told of the client's end may close because of that.
                    let again = untouched || (!received && !sending.ended && is_replayable(&request));
                    if is_reused && again {
                        // Closed under us before the first byte of an answer, and the request is safe to send twice.
                        may_reuse = false;
                        continue;
                    }
                    let retry = if untouched { Retry::Safe } else { Retry::Never };
                    let request = if untouched {
                        Some(request)
                    } else {
                        let (head, body) = request.into_parts();
                        body.progress().leave_head(head);
                        None
                    };
                    return Err(Unsent { error: self.told(failure, retry), request });
                }
            }
        }
    }

    fn answered(
        self: &Rc<Lane>,
        connection: Box<Http1>,
        request: Request<RequestBody>,
        sending: Sending,
        head: ResponseHead,
        began: Instant,
    ) -> Answered {
        let at = Instant::now();
        let ResponseHead { response, spelling, length, keep_alive, binds } = head;
        self.heed_keep_alive(&response);
        let lane = if binds { request.body().bound().bind(self) } else { self.clone() };
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let mut request = Some(request);
        let unprocessed = self.unprocessed(&response, false).map(|reason| {
            let request = request.take_if(|request| request.body_mut().rewind());
            Box::new(Unprocessed { reason, request })
        });
        let request = request.map(|request| {
            let (head, mut body) = request.into_parts();
            body.progress().take_head(head);
            body.forget();
            body
        });
        let request = request.filter(|_| !sending.done);
        let answer = Box::new(Answer {
            connection,
            lane,
            sending,
            request,
            decoder: Decoder::new(length, &self.limits).of_answer(),
            keep_alive: keep_alive && !switches,
            unasked: false,
            spelling,
            heard: Some(at),
            hurry: HURRY,
        });
        let response = response.map(|()| UpstreamBody::Http1(answer));
        Answered { response, at, latency: at - began, unprocessed }
    }

    /// What ended by the wall clock the watchdog takes out.
    fn take_idle(&self, now: Instant, cx: &mut Context<'_>) -> Option<Box<Http1>> {
        let material = self.dialer.material();
        let limit = self.idle_limit.get();
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { mut connection, since }) = idle.pop() {
            let rested = now.saturating_duration_since(since);
            if rested < limit
                && (connection.retire_at.is_none() || connection.material == material)
                && connection.conn.is_silent(cx)
                && (rested < FRESH || !connection.conn.stream().has_unseen())
            {
                return Some(connection);
            }
        }
        None
    }

    /// Whether [`Lane::take_idle`] would find one.
    pub(super) fn has_idle(&self, cx: &mut Context<'_>) -> bool {
        let now = Instant::now();
        let Some(connection) = self.take_idle(now, cx) else { return false };
        self.idle.borrow_mut().push(Idle { connection, since: now });
        true
    }

    pub(super) async fn warm_http1(&self) -> Result<(), Error> {
        if poll_fn(|cx| Poll::Ready(self.has_idle(cx))).await {
            return Ok(());
        }
        let connection = Box::pin(self.open_http1()).await?;
        self.idle.borrow_mut().push(Idle { connection, since: Instant::now() });
        Ok(())
    }

    fn put_back(&self, connection: Box<Http1>, since: Instant) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.limits.pool_idle_per_endpoint {
            idle.push(Idle { connection, since });
        }
    }

    async fn open_http1(&self) -> Result<Box<Http1>, Error> {
        let dialled = self.dialer.dial(&self.target, MeshAlpn::H1).await?;
        let retire_at = dialled.retire_at();
        let material = dialled.material();
        Ok(Box::new(Http1 { conn: Conn::new(dialled.stream), retire_at, material }))
    }

    /// `Keep-Alive: timeout=N` says when the peer will close: stay below it.
    fn heed_keep_alive(&self, response: &Response<()>) {
        if self.target.tls.is_some() || self.unshared {
            return;
        }
        let mut fields = response.headers().iter();
        let Some((_, value)) = fields.find(|(name, _)| name.as_str() == "keep-alive") else { return };
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

    /// What a failed exchange means.
    fn told(&self, failure: Failure, retry: Retry) -> Error {
        let fault = match failure {
            Failure::Request(broke) => return fault::request_broke(&broke),
            Failure::Upstream(fault) => fault,
        };
        let reason = match &fault {
            Fault::Malformed(_) => Reason::UpstreamProtocol,
            Fault::Io(error) if error.kind() == io::ErrorKind::ConnectionReset => Reason::UpstreamReset,
            Fault::Io(_) | Fault::Truncated => Reason::UpstreamClosed,
        };
        Error::upstream(Stage::Forward, reason, retry, format!("{}: {fault}", self.target.address))
    }
}

/// For how long no server closes an idle connection, or says that it will: so long the word of the thread's last look at
/// its sockets is enough.
const FRESH: Duration = Duration::from_millis(10);

enum Failure {
    Request(RequestBroke),
    Upstream(Fault),
}

/// One try to get the head of an answer.
struct Attempt<'a> {
    conn: &'a mut Conn,
    request: &'a mut Request<RequestBody>,
    lane: &'a Lane,
    sending: Sending,
    /// A moment ago there was nothing to receive, and the task is woken when there is.
    silent: bool,
    /// How far the search for the end of the head got.
    seen: usize,
    received: bool,
    /// How many more times the rest of the head may be waited for with an ACK at once.
    hurry: u8,
    interim: interim::Count,
}

impl<'a> Attempt<'a> {
    fn new(conn: &'a mut Conn, request: &'a mut Request<RequestBody>, lane: &'a Lane, silent: bool) -> Attempt<'a> {
        // By the head and not by the body: one that is given again may be known to its end by now.
        let sized = || request.headers().keys().any(|name| *name == header::CONTENT_LENGTH);
        let chunked = !request.body().is_empty() && !sized();
        let out = conn.queue();
        head::write_request(out, request, request.body().spelling());
        if chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
        let sending = Sending { chunked, done: request.body().is_empty(), failed: None, ended: false };
        let interim = interim::Count::default();
        Attempt { conn, request, lane, sending, silent, seen: 0, received: false, hurry: HURRY, interim }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, Failure>> {
        self.sending.poll(cx, self.conn, Some(self.request.body_mut())).map_err(Failure::Request)?;
        if self.request.body().client_has_ended() {
            self.sending.end_direction(cx, self.conn);
        }
        self.request.body().stalled(!self.conn.is_flushed());
        if self.request.body().progress().wants_head() {
            self.request.body().progress().take_head(super::copy_head(self.request));
        }
        if std::mem::take(&mut self.silent) && self.sending.failed.is_none() {
            return Poll::Pending;
        }
        loop {
            let parsed =
                head::parse_response(self.conn.received(), &mut self.seen, self.request.method(), &self.lane.limits);
            match parsed.map_err(|wrong| Failure::Upstream(Fault::Malformed(wrong)))? {
                Some(head) if is_interim(&head) => {
                    if !self.interim.take(Instant::now()) {
                        return Poll::Ready(Err(Failure::Upstream(Fault::Malformed("endless interim answers"))));
                    }
                    if let Some(client) = self.request.body().interim() {
                        client.push(head.response, Some(head.spelling));
                    }
                    continue;
                }
                Some(head) => return Poll::Ready(Ok(head)),
                None => {}
            }
            let Poll::Ready(received) = self.conn.poll_receive(cx) else {
                if self.received && self.hurry > 0 {
                    self.hurry -= 1;
                    self.conn.stream().acknowledge();
                }
                return Poll::Pending;
            };
            match received {
                Ok(0) => {
                    // What broke the sending says more than the end that follows.
                    let fault = self.sending.failed.take().map_or(Fault::Truncated, Fault::Io);
                    return Poll::Ready(Err(Failure::Upstream(fault)));
                }
                Ok(_) => self.received = true,
                Err(error) => return Poll::Ready(Err(Failure::Upstream(error.into()))),
            }
        }
    }
}

/// A server that gives up an idle connection may say so (RFC 9110 section 15.5.9), at the very moment when a request is
/// on its way: then this is not its answer.
fn is_unasked(head: &ResponseHead) -> bool {
    head.response.status() == StatusCode::REQUEST_TIMEOUT && !head.keep_alive
}

fn is_interim(head: &ResponseHead) -> bool {
    head.response.status().is_informational() && head.response.status() != StatusCode::SWITCHING_PROTOCOLS
}

/// The sending of a request whose head is queued.
struct Sending {
    chunked: bool,
    /// All of it is queued.
    done: bool,
    /// Sending failed. The upstream may still have answered.
    failed: Option<io::Error>,
    /// The upstream was told that nothing follows on this connection.
    ended: bool,
}

impl Sending {
    /// Sends as much as the upstream takes and the client has brought.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        conn: &mut Conn,
        mut body: Option<&mut RequestBody>,
    ) -> Result<(), RequestBroke> {
        loop {
            if self.failed.is_some() {
                return Ok(());
            }
            let Some(body) = body.as_mut().filter(|_| !self.done && conn.has_room()) else {
                if conn.is_flushed() {
                    return Ok(());
                }
                match conn.poll_flush(cx) {
                    Poll::Ready(Ok(())) if self.done => return Ok(()),
                    Poll::Ready(Ok(())) => continue,
                    Poll::Ready(Err(error)) => self.failed = Some(error),
                    Poll::Pending => return Ok(()),
                }
                return Ok(());
            };
            match Pin::new(&mut **body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => self.queue(conn, frame, body.is_end_stream()),
                Poll::Ready(Some(Err(broke))) => return Err(broke),
                Poll::Ready(None) => self.end(conn, None),
                Poll::Pending => {
                    if let Poll::Ready(Err(error)) = conn.poll_flush(cx) {
                        self.failed = Some(error);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// The client has ended its direction behind this request: so does the upstream's see it end.
    fn end_direction(&mut self, cx: &mut Context<'_>, conn: &mut Conn) {
        if !self.done || self.ended || self.failed.is_some() {
            return;
        }
        match conn.poll_shutdown(cx) {
            Poll::Ready(Ok(())) => {
                self.ended = true;
                // If nobody waits for the answer any more, the upstream hears it without having to write.
                conn.stream().reset_when_dropped(true);
            }
            Poll::Ready(Err(error)) => self.failed = Some(error),
            Poll::Pending => {}
        }
    }

    fn queue(&mut self, conn: &mut Conn, frame: Frame<Bytes>, last: bool) {
        match frame.into_data() {
            Ok(data) => {
                conn.queue_data(data, self.chunked);
                // The last chunk waits until there is room: it must not overtake data.
                if last && !self.chunked {
                    self.end(conn, None);
                }
            }
            Err(frame) => self.end(conn, frame.into_trailers().ok().as_ref()),
        }
    }

    fn end(&mut self, conn: &mut Conn, trailers: Option<&http::HeaderMap>) {
        self.done = true;
        if self.chunked {
            conn.queue_last_chunk(trailers);
        }
    }
}

impl Answer {
    pub fn spelling(&self) -> &Spelling {
        &self.spelling
    }

    pub fn is_end_stream(&self) -> bool {
        self.decoder.has_ended()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.decoder.exact().map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        if self.request.is_some() || !self.connection.conn.is_flushed() {
            self.send_on(cx);
        }
        let conn = &mut self.connection.conn;
        loop {
            match self.decoder.decode(conn.received()) {
                Ok(Decoded::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Decoded::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Decoded::Ended) => return Poll::Ready(None),
                Ok(Decoded::Incomplete) => {}
                Err(wrong) => return Poll::Ready(Some(Err(Fault::Malformed(wrong)))),
            }
            let Poll::Ready(received) = conn.poll_receive(cx) else {
                self.heard = None;
                if self.hurry > 0 {
                    self.hurry -= 1;
                    conn.stream().acknowledge();
                }
                return Poll::Pending;
            };
            match received {
                Ok(0) if self.decoder.end_of_stream() => {
                    self.keep_alive = false;
                    return Poll::Ready(None);
                }
                Ok(0) => return Poll::Ready(Some(Err(Fault::Truncated))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    pub fn send_on(&mut self, cx: &mut Context<'_>) {
        let broke = self.sending.poll(cx, &mut self.connection.conn, self.request.as_mut()).is_err();
        if self.sending.done || broke {
            self.request = None;
        }
        if let Some(request) = &self.request {
            request.stalled(!self.connection.conn.is_flushed());
        }
        // The answer may be whole without the rest of the request; nothing may follow on this connection then.
        self.keep_alive &= !broke && self.sending.failed.is_none();
    }

    /// The client has ended its direction behind its request.
    pub fn end_direction(&mut self, cx: &mut Context<'_>) {
        self.sending.end_direction(cx, &mut self.connection.conn);
    }

    /// Some of the request is still to be sent.
    pub fn is_uploading(&self) -> bool {
        self.sending.failed.is_none() && (self.request.is_some() || !self.connection.conn.is_flushed())
    }

    /// Sends the rest of the request when the answer is whole: an application may answer early and still read. Ready
    /// when all is sent, or when the application ends the connection or the client breaks off.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.send_on(cx);
        if !self.is_uploading() {
            return Poll::Ready(());
        }
        if !self.unasked {
            match ready!(self.connection.conn.poll_receive(cx)) {
                Ok(0) | Err(_) => {
                    self.keep_alive = false;
                    return Poll::Ready(());
                }
                Ok(_) => self.unasked = true,
            }
        }
        Poll::Pending
    }

    /// The answer was read to its end: the connection may carry the next request, if both sides are done with this one.
    pub fn release(self) {
        let Answer { mut connection, lane, sending, keep_alive, heard, .. } = self;
        connection.conn.rest();
        if sending.ended {
            connection.conn.stream().reset_when_dropped(false);
        }
        if keep_alive
            && sending.done
            && !sending.ended
            && connection.conn.is_flushed()
            && !connection.conn.has_received()
        {
            lane.put_back(connection, heard.unwrap_or_else(Instant::now));
        }
    }

    pub fn ends_login(&self) -> bool {
        self.lane.unshared && !self.keep_alive
    }

    /// After 101: the stream, which is no longer HTTP's.
    pub fn into_stream(self) -> Stream {
        if self.sending.ended {
            self.connection.conn.stream().reset_when_dropped(false);
        }
        self.connection.conn.into_stream()
    }
}
