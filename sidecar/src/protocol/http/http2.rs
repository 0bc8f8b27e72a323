//! Serves one downstream connection that speaks HTTP/2, with every limit that the library would not set by itself. The
//! connection's task reads and writes frames; each stream has a task of its own, which runs the walk, sends interim
//! answers and then the answer, and ends when the client resets the stream.
//!
//! A task per stream costs one allocation and a turn of the run queue. `FuturesUnordered` on the connection's task would
//! cost as much: it wakes its task once more whenever all its futures have been polled, and each wake polls the whole
//! connection. A stream that nobody reads can be ended alone this way, too (`StreamTask`).

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::{Builder, Handshake, SendResponse};
use http::{HeaderMap, Method, Request, Response, header};
use http_body::Body;

use super::body::ResponseBody;
use super::downstream_io::DownstreamIo;
use super::exchange::Session;
use super::flood::Flood;
use super::interim;
use super::serve::{Connection, OnRefusal};
use crate::connect::http2::heads::{Heads, Marks, Sender};
use crate::connect::http2::{Batched, Change, Incoming, KeepAlive, Meter, Sending, Stop, leaving};
use crate::connect::interim::{Head, MOST_WAITING, size};
use crate::connect::request_body::Received;
use crate::connect::streams::StreamTask;
use crate::net::Stream;
use crate::outcome::Reason;

/// Whose requests come on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client {
    /// One application's.
    One,
    /// Those of all applications behind a sidecar: what one of them does must not end the connection for the others, so the
    /// sidecar holds them to their limits, and here is room for all of them.
    Sidecar,
}

/// Serves until the connection ends. `respond` is the direction's walk for one request.
pub(super) fn serve<R, F>(
    session: &Rc<Session>,
    stream: Stream,
    client: Client,
    on_refusal: OnRefusal,
    respond: R,
) -> Serving<R>
where
    R: Fn(Request<Received>) -> F + Unpin,
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    let limits = &session.worker.limits;
    let meter = Meter::new(session.worker.streams.ledger(), true);
    let (streams, early_resets, pending_resets, local_resets, window) = match client {
        Client::One => {
            let streams = limits.h2_streams_application;
            (
                streams,
                limits.h2_early_resets,
                limits.h2_pending_resets,
                limits.h2_local_resets,
                limits.h2_connection_window,
            )
        }
        Client::Sidecar => {
            let streams = limits.h2_streams_mesh;
            (streams, streams, streams as usize, limits.h2_local_resets_mesh, limits.h2_shared_window(streams, 0))
        }
    };
    let marks = Marks::new(limits.h2_header_list);
    let heads = Heads::new(Sender::Client, limits.h2_header_list_taken as usize, marks.clone());
    let flood = Flood::new(limits, streams, early_resets);
    let below = DownstreamIo::new(stream, session.entry.clone(), meter.clone(), flood, heads, marks.clone());
    let io = Batched::new(below, limits.h2_header_list);
    let handshake = Builder::new()
        .data_frame_budget(limits.h2_data_frames)
        .max_concurrent_streams(streams)
        .initial_window_size(limits.h2_stream_window)
        .initial_connection_window_size(window)
        .max_header_list_size(limits.h2_header_list_taken)
        .max_send_buffer_size(limits.h2_send_buffer)
        .max_pending_accept_reset_streams(pending_resets)
        .max_local_error_reset_streams(Some(local_resets))
        .max_concurrent_reset_streams(streams as usize)
        .reset_stream_duration(limits.h2_reset_memory)
        .handshake(io.clone());
    Serving {
        state: State::Opening { handshake, finish: false },
        io,
        marks,
        streams: streams as usize,
        session: session.clone(),
        client,
        meter,
        on_refusal,
        respond,
    }
}

/// A connection that is being served.
pub(super) struct Serving<R> {
    state: State,
    io: Batched<DownstreamIo>,
    marks: Rc<Marks>,
    /// How many may run at once.
    streams: usize,
    session: Rc<Session>,
    on_refusal: OnRefusal,
    client: Client,
    meter: Rc<Meter>,
    respond: R,
}

enum State {
    Opening { handshake: Handshake<Batched<DownstreamIo>, Bytes>, finish: bool },
    Open { connection: h2::server::Connection<Batched<DownstreamIo>, Bytes>, alive: Box<KeepAlive>, refusing: Refusing },
}

/// The end of a connection whose peer does not acknowledge that it ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusing {
    No,
    /// New streams are refused; what runs goes on.
    NewStreams,
    /// The last stream has ended: a GOAWAY that waits for nothing was sent.
    Ended,
}

impl<R, F> Future for Serving<R>
where
    R: Fn(Request<Received>) -> F + Unpin,
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let ended = this.poll_requests(cx);
        this.io.end_turn(cx);
        ended
    }
}

impl<R, F> Serving<R>
where
    R: Fn(Request<Received>) -> F + Unpin,
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    fn poll_requests(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let State::Opening { handshake, finish } = &mut self.state {
            let Ok(mut connection) = ready!(Pin::new(handshake).poll(cx)) else { return Poll::Ready(()) };
            let alive = KeepAlive::new(connection.ping_pong(), self.meter.clone(), &self.session.worker.limits, true);
            let alive = Box::new(alive);
            if *finish {
                connection.graceful_shutdown();
            }
            self.state = State::Open { connection, alive, refusing: Refusing::No };
        }
        let State::Open { connection, alive, refusing } = &mut self.state else { return Poll::Ready(()) };
        if alive.poll(cx, true).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Poll::Ready(next) = connection.poll_accept(cx) else {
                if *refusing == Refusing::NewStreams && !connection.has_streams() {
                    *refusing = Refusing::Ended;
                    connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                    continue;
                }
                let refused = self.marks.refused();
                let (limits, client) = (&self.session.worker.limits, self.client);
                alive.follow(cx, |change| match (change, client) {
                    (Change::Window(window), _) if connection.set_initial_window_size(window).is_err() => false,
                    (Change::Window(window), Client::One) => {
                        connection.set_target_window_size(limits.h2_own_window(window));
                        true
                    }
                    (Change::Held(held), Client::Sidecar) => {
                        connection.set_target_window_size(limits.h2_shared_window(limits.h2_streams_mesh, held));
                        true
                    }
                    (Change::Window(_), Client::Sidecar) | (Change::Held(_), Client::One) => true,
                });
                self.count_refused(refused);
                return Poll::Pending;
            };
            // How the connection ends is in the records of its requests.
            let Some(Ok((request, mut reply))) = next else { return Poll::Ready(()) };
            let stream = reply.stream_id().into();
            let before = self.marks.taken_up(stream);
            let malformed = self.marks.take(stream);
            if *refusing != Refusing::No {
                // Not processed, so the peer may send it again elsewhere (RFC 9113 section 8.7).
                reply.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            let only_head = *request.method() == Method::HEAD;
            let (parts, stream) = request.into_parts();
            let incoming = Incoming::new(stream, &parts.headers, self.marks.clone(), &self.meter).malformed(malformed);
            let answer = (self.respond)(Request::from_parts(parts, Received::Http2(incoming)));
            let answering = Answering {
                session: self.session.clone(),
                reply,
                meter: self.meter.clone(),
                only_head,
                room: MOST_WAITING,
                stage: Stage::Awaited { answer },
            };
            // Boxed: a task is moved as a whole when it is made and when it ends.
            tokio::task::spawn_local(StreamTask::new(Box::pin(answering)));
            if before > 0 {
                Self::count(&self.session, &self.on_refusal, self.streams, before);
            }
        }
    }

    fn count_refused(&self, count: usize) {
        Self::count(&self.session, &self.on_refusal, self.streams, count);
    }

    /// Requests that the library refused by itself: malformed ones, and those beyond the limit.
    fn count(session: &Session, on_refusal: &OnRefusal, streams: usize, count: usize) {
        let reason = if session.running() >= streams { Reason::Overloaded } else { Reason::BadRequest };
        for _ in 0..count {
            on_refusal(reason);
        }
    }
}

impl<R, F> Connection for Serving<R>
where
    R: Fn(Request<Received>) -> F + Unpin,
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    fn finish(self: Pin<&mut Self>) {
        match &mut self.get_mut().state {
            State::Opening { finish, .. } => *finish = true,
            State::Open { connection, .. } => connection.graceful_shutdown(),
        }
    }

    fn refuse(self: Pin<&mut Self>) {
        if let State::Open { refusing: refusing @ Refusing::No, .. } = &mut self.get_mut().state {
            *refusing = Refusing::NewStreams;
        }
    }
}

pin_project_lite::pin_project! {
    /// One stream. By hand, because an async block would hold the walk twice.
    struct Answering<F> {
        session: Rc<Session>,
        reply: SendResponse<Bytes>,
        meter: Rc<Meter>,
        only_head: bool,
        // Bytes of interim answers that this stream may still have: the library does not tell when they are written.
        room: usize,
        #[pin]
        stage: Stage<F>,
    }
}

pin_project_lite::pin_project! {
    #[project = StageProjected]
    enum Stage<F> {
        Awaited { #[pin] answer: F },
        Sent { sending: Sending, body: ResponseBody },
        Ended,
    }
}

impl<F: Future<Output = Response<ResponseBody>>> Future for Answering<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        if let StageProjected::Awaited { answer } = this.stage.as_mut().project() {
            // The client has left; what is dropped now resets the upstream's stream. Asked first: a request that breaks off
            // gets no answer.
            if let Poll::Ready(reset) = this.reply.poll_reset(cx) {
                leaving::with(reset.ok(), || this.stage.set(Stage::Ended));
                return Poll::Ready(());
            }
            let answer = answer.poll(cx);
            send_interim(this.session, this.reply, this.room);
            let Poll::Ready(response) = answer else { return Poll::Pending };
            if let Some(code) = response.body().reset_code() {
                this.reply.send_reset(code);
                return Poll::Ready(());
            }
            let Some((sending, body)) = send_head(this.reply, this.meter, response, *this.only_head) else {
                return Poll::Ready(());
            };
            this.stage.set(Stage::Sent { sending, body });
        }
        let StageProjected::Sent { sending, body } = this.stage.as_mut().project() else { return Poll::Ready(()) };
        match sending.poll(cx, body) {
            Poll::Ready(Err(Stop::Body(error))) => sending.reset(error.reset_code()),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(Stop::Reset(code))) => leaving::with(Some(code), || this.stage.set(Stage::Ended)),
            Poll::Ready(Err(Stop::Peer(_))) => {}
            Poll::Pending => {
                body.stalled(sending.is_blocked());
                if sending.is_blocked() {
                    body.send_on(cx);
                }
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }
}

fn send_interim(session: &Session, reply: &mut SendResponse<Bytes>, room: &mut usize) {
    for Head { status, headers, .. } in interim::take(session) {
        let Some(left) = room.checked_sub(size(&headers)) else { continue };
        *room = left;
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        // It fails for a stream that the client has reset.
        let _ = reply.send_informational(response);
    }
}

/// Sends the head of the answer; what is left to be sent of it, if there is a body.
fn send_head(
    reply: &mut SendResponse<Bytes>,
    meter: &Rc<Meter>,
    response: Response<ResponseBody>,
    only_head: bool,
) -> Option<(Sending, ResponseBody)> {
    let (mut parts, body) = response.into_parts();
    let ended = body.is_end_stream();
    if !ended {
        announce_length(&mut parts.headers, &body);
    }
    let ended = ended || (only_head && body.is_local());
    match reply.send_response(Response::from_parts(parts, ()), ended) {
        Ok(_) if ended => None,
        Ok(stream) => Some((Sending::new(stream, meter.clone()), body)),
        Err(_) => {
            // The client has left already, or would not understand the head.
            reply.send_reset(h2::Reason::INTERNAL_ERROR);
            None
        }
    }
}

fn announce_length(headers: &mut HeaderMap, body: &ResponseBody) {
    if let Some(length) = body.size_hint().exact()
        && !headers.contains_key(header::CONTENT_LENGTH)
    {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
}
