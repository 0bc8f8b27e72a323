//! Serves one downstream connection that speaks HTTP/1.1: a head, its answer, the next head, on one task. While an
//! answer is awaited interim ones go out, and a client that leaves ends its request. The answer's body goes out as the
//! upstream brings it, the request's comes in beside it.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, header};
use http_body::{Body, Frame};
use tokio::io::AsyncReadExt;

use super::answer;
use super::body::{BodyError, ResponseBody};
use super::exchange::{CLIENT_CLOSED, Session};
use super::interim;
use super::serve::OnRefusal;
use crate::connect::http1::head::{self, RequestHead};
use crate::connect::http1::{Conn, Downstream, Incoming, Presence, turn};
use crate::connect::request_body::Received;
use crate::connection::{Command, State};
use crate::net::Stream;

/// How long and how much a connection that is closed is still listened to, so that a client which is sending gets to
/// read its answer before the close of a socket with unread bytes resets it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

/// Serves until the connection ends. `respond` is the direction's walk for one request.
pub(super) async fn serve<F>(
    session: &Rc<Session>,
    stream: Stream,
    on_refusal: OnRefusal,
    respond: impl Fn(Request<Received>) -> F,
) where
    F: Future<Output = Response<ResponseBody>>,
{
    let limits = &session.worker.limits;
    let downstream = Downstream::new(stream, &session.entry, limits);
    session.entry.enter(State::Idle);
    loop {
        let mut seen = 0;
        let head = match std::future::poll_fn(|cx| downstream.poll_head(cx, &mut seen, limits)).await {
            Ok(Some(head)) => head,
            Ok(None) => return close(downstream).await,
            Err((reason, _)) => {
                on_refusal(reason);
                let proxy = &session.worker.own.instance;
                let raw = answer::refuse_raw(reason, reason.row().status, proxy);
                downstream.conn().queue().extend_from_slice(&raw);
                return linger(downstream).await;
            }
        };
        let RequestHead { request, spelling, keep_alive, binds, .. } = head;
        let asked = Asked {
            old: request.version() == Version::HTTP_10,
            head_only: *request.method() == Method::HEAD,
            keep_alive,
        };
        let request = request.map(|()| Received::Http1(Incoming::new(&downstream, spelling, binds)));
        // Boxed: the walk's state is 4 KiB, which an idle connection would keep.
        let answering = Answering { answer: Box::pin(respond(request)), session, downstream: &downstream };
        let Some(response) = answering.await else { return };
        if session.ended.get() && response.body().is_local() && response.status() == CLIENT_CLOSED {
            return;
        }
        match answer_with(session, &downstream, response, asked).await {
            Ok(Next::Request) => {}
            Ok(Next::Close) if downstream.request_has_ended() => return close(downstream).await,
            Ok(Next::Close) => return linger(downstream).await,
            Ok(Next::Switch(then)) => return hand_over(downstream, then).await,
            Err(_) => return,
        }
    }
}

/// What a request said about its answer.
#[derive(Clone, Copy)]
struct Asked {
    /// HTTP/1.0.
    old: bool,
    head_only: bool,
    keep_alive: bool,
}

/// What follows an answer.
enum Next {
    Request,
    Close,
    /// The connection leaves HTTP.
    Switch(super::body::Switched),
}

pin_project_lite::pin_project! {
    /// Waits for the answer; `None` when the client left. By hand, because an async block would hold the walk twice.
    struct Answering<'a, F> {
        #[pin]
        answer: F,
        session: &'a Session,
        downstream: &'a Downstream,
    }
}

impl<F: Future> Future for Answering<'_, F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        let mut this = self.project();
        let answer = this.answer.as_mut().poll(cx);
        interim::queue(this.session, this.downstream);
        if let Poll::Ready(response) = answer {
            return Poll::Ready(Some(response));
        }
        this.downstream.flush(cx);
        match this.downstream.presence(cx) {
            Presence::Here => Poll::Pending,
            Presence::Gone => Poll::Ready(None),
            Presence::Ended if this.session.ended.replace(true) => Poll::Pending,
            // The upstream is to hear of it now.
            Presence::Ended => this.answer.poll(cx).map(Some),
        }
    }
}

/// Sends one answer.
async fn answer_with(
    session: &Session,
    downstream: &Downstream,
    response: Response<ResponseBody>,
    asked: Asked,
) -> Result<Next, BodyError> {
    let (parts, mut body) = response.into_parts();
    let switched = body.take_switched();
    let framing = framing(parts.status, &body, asked);
    let mut close = !asked.keep_alive
        || framing == Framing::UntilEnd
        || downstream.entry.command() != Command::Run
        || says_close(&parts.headers)
        // Nobody reads the rest of the request any more: where the next one begins is not known.
        || (body.is_local() && !downstream.request_has_ended() && !downstream.skip_request());
    close &= switched.is_none();
    {
        let mut conn = downstream.conn();
        let out = conn.queue();
        head::write_response(out, asked.old, parts.status, &parts.headers, body.spelling());
        write_framing(out, framing, &parts.headers, close, asked, switched.is_some());
    }
    let mut writing = Writing { session, downstream, framing, ended: framing == Framing::None };
    std::future::poll_fn(|cx| writing.poll(cx, &mut body)).await?;
    if body.is_uploading() {
        finish_upload(downstream, &mut body, framing).await?;
    }
    // The record ends with the last byte that was taken over; the connection stays busy until all have gone out.
    let busy = body.into_busy();
    if !close && downstream.may_wait() {
        turn::end().await;
    }
    let flushing = std::future::poll_fn(|cx| {
        let flushed = downstream.conn().poll_flush(cx);
        downstream.entry.stall(flushed.is_pending());
        flushed
    });
    flushing.await.map_err(BodyError::Downstream)?;
    drop(busy);
    if let Some(then) = switched {
        return Ok(Next::Switch(then));
    }
    let whole = downstream.request_has_ended() || downstream.skip_request();
    Ok(if close || !whole || downstream.entry.command() != Command::Run { Next::Close } else { Next::Request })
}

/// The answer came before the request's end. That ends the answer alone: the application may want the rest, and gets it
/// until it closes (RFC 9112 section 9.6).
async fn finish_upload(downstream: &Downstream, body: &mut ResponseBody, framing: Framing) -> Result<(), BodyError> {
    let told = |cx: &mut Context<'_>| match framing {
        Framing::UntilEnd => downstream.conn().poll_shutdown(cx),
        Framing::None | Framing::Exact(_) | Framing::Chunked => downstream.conn().poll_flush(cx),
    };
    let mut answered = false;
    std::future::poll_fn(|cx| {
        if !answered {
            answered = told(cx).map_err(BodyError::Downstream)?.is_ready();
        }
        body.poll_upload(cx).map(Ok)
    })
    .await
}

/// How an answer's end is told to the client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// There is no body to send.
    None,
    Exact(u64),
    Chunked,
    UntilEnd,
}

fn framing(status: StatusCode, body: &ResponseBody, asked: Asked) -> Framing {
    let bodyless = asked.head_only
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    match body.size_hint().exact() {
        _ if bodyless => Framing::None,
        Some(length) => Framing::Exact(length),
        None if asked.old => Framing::UntilEnd,
        None => Framing::Chunked,
    }
}

fn write_framing(out: &mut Vec<u8>, framing: Framing, headers: &HeaderMap, close: bool, asked: Asked, switched: bool) {
    match framing {
        Framing::Exact(length) if !switched && !headers.keys().any(|name| *name == header::CONTENT_LENGTH) => {
            head::write_length(out, length);
        }
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::None | Framing::Exact(_) | Framing::UntilEnd => {}
    }
    if close && !says_close(headers) {
        out.extend_from_slice(b"connection: close\r\n");
    } else if !close && asked.old && !switched {
        out.extend_from_slice(b"connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

fn says_close(headers: &HeaderMap) -> bool {
    let mut connection = headers.iter().filter(|(name, _)| **name == header::CONNECTION);
    connection.any(|(_, value)| value.as_bytes().eq_ignore_ascii_case(b"close"))
}

/// The sending of an answer's body.
struct Writing<'a> {
    session: &'a Session,
    downstream: &'a Downstream,
    framing: Framing,
    /// All of it is queued.
    ended: bool,
}

impl Writing<'_> {
    /// Ready when all is queued; what is queued still has to be flushed.
    fn poll(&mut self, cx: &mut Context<'_>, body: &mut ResponseBody) -> Poll<Result<(), BodyError>> {
        while !self.ended {
            if !self.downstream.conn().has_room() {
                let flushed = self.flush(cx);
                self.stalled(flushed.is_pending(), body);
                if flushed.is_pending() {
                    body.send_on(cx);
                }
                ready!(flushed).map_err(BodyError::Downstream)?;
            }
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.downstream.entry.touch();
                    let last = body.is_end_stream();
                    self.queue(frame, last);
                }
                Poll::Ready(None) => self.end(None),
                Poll::Ready(Some(Err(error))) => {
                    self.truncate(cx);
                    return Poll::Ready(Err(error));
                }
                Poll::Pending => {
                    let flushed = self.flush(cx).map_err(BodyError::Downstream)?;
                    self.stalled(flushed.is_pending(), body);
                    if flushed.is_pending() {
                        return Poll::Pending;
                    }
                    match self.downstream.presence(cx) {
                        Presence::Here => {}
                        Presence::Ended => {
                            self.session.ended.set(true);
                            body.end_direction(cx);
                        }
                        Presence::Gone => {
                            return Poll::Ready(Err(BodyError::Downstream(io::ErrorKind::BrokenPipe.into())));
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut conn = self.downstream.conn();
        if conn.is_flushed() {
            return Poll::Ready(Ok(()));
        }
        ready!(conn.poll_flush(cx))?;
        self.downstream.entry.touch();
        Poll::Ready(Ok(()))
    }

    /// Whether what is queued waits for a client that takes none: also behind the end of the body, when its stream is gone.
    fn stalled(&self, stalled: bool, body: &ResponseBody) {
        self.downstream.entry.stall(stalled);
        body.stalled(stalled);
    }

    fn queue(&mut self, frame: Frame<Bytes>, last: bool) {
        match frame.into_data() {
            Ok(data) => {
                self.downstream.conn().queue_data(data, self.framing == Framing::Chunked);
                // The last chunk waits until there is room: it must not overtake data.
                if last && self.framing != Framing::Chunked {
                    self.end(None);
                }
            }
            Err(frame) => self.end(frame.into_trailers().ok().as_ref()),
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        self.ended = true;
        if self.framing == Framing::Chunked {
            self.downstream.conn().queue_last_chunk(trailers);
        }
    }

    /// What came is passed on; what follows must not look like an end.
    fn truncate(&self, cx: &mut Context<'_>) {
        let mut conn = self.downstream.conn();
        let flushed = conn.poll_flush(cx);
        if self.framing == Framing::UntilEnd || !matches!(flushed, Poll::Ready(Ok(()))) {
            conn.stream().reset_on_close();
        }
    }
}

async fn close(downstream: Rc<Downstream>) {
    // The client may be gone: nothing else can be said to it.
    let _ = std::future::poll_fn(|cx| downstream.conn().poll_shutdown(cx)).await;
}

/// Closes towards a client that may still be sending.
async fn linger(downstream: Rc<Downstream>) {
    close(downstream.clone()).await;
    let Some(conn) = Rc::into_inner(downstream).map(Downstream::into_conn) else { return };
    let mut stream = conn.into_stream();
    let listening = async {
        let mut nothing = [0; 4096];
        let mut left = LINGER_BYTES;
        while let Ok(count @ 1..) = stream.read(&mut nothing).await {
            left = match left.checked_sub(count) {
                Some(left) => left,
                None => return,
            };
        }
    };
    // When the time is up the close is abrupt, as it would have been at once.
    let _ = tokio::time::timeout(LINGER, Box::pin(listening)).await;
}

async fn hand_over(downstream: Rc<Downstream>, then: super::body::Switched) {
    if let Some(conn) = Rc::into_inner(downstream).map(Downstream::into_conn) {
        then(Conn::into_stream(conn)).await;
    }
}
