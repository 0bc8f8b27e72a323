//! Serves one downstream connection: HTTP/1 by `http1`, HTTP/2 with hyper and every limit that the library would not
//! set by itself. The connection's task obeys the watchdog and the drain.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::FutureExt;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_runtime::drain::Hold;
use tokio::io::AsyncWriteExt;

use super::answer;
use super::body::ResponseBody;
use super::downstream_io::DownstreamIo;
use super::exchange::Session;
use super::flood::Flood;
use crate::connect::Local;
use crate::connect::request_body::Received;
use crate::connection::{Command, State};
use crate::net::Stream;
use crate::outcome::Reason;
use crate::telemetry::{Edge, HttpRecord, Telemetry};

/// Told when a head is refused before it became a request.
pub type OnRefusal = Box<dyn Fn(Reason)>;

/// Serves HTTP/1 until the connection ends. `respond` is the direction's walk for one request. Boxed: the task of a
/// connection that turns out to carry opaque bytes is not as large as one that serves requests.
pub fn http1<'a, F>(
    session: &'a Rc<Session>,
    stream: Stream,
    on_refusal: OnRefusal,
    respond: impl Fn(Request<Received>) -> F + 'a,
) -> Pin<Box<impl Future<Output = ()> + 'a>>
where
    F: Future<Output = Response<ResponseBody>> + 'a,
{
    let connection = Plain { serving: super::http1::serve(session, stream, on_refusal, respond) };
    Box::pin(Driven { connection, session, finishing: false, hold: None })
}

/// Serves HTTP/2 until the connection ends.
pub async fn http2<F>(
    session: &Rc<Session>,
    stream: Stream,
    streams: u32,
    respond: impl Fn(Request<Received>) -> F + 'static,
) where
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    let limits = &session.worker.limits;
    let io = DownstreamIo::new(stream, session.entry.clone(), Flood::new(limits, streams));
    // A mesh connection carries requests of all of the peer's clients.
    let shared = streams > limits.h2_streams_application;
    let window = if shared { limits.h2_shared_window(streams) } else { limits.h2_connection_window };
    let respond = Rc::new(respond);
    let service =
        service_fn(move |request: Request<Incoming>| respond(request.map(Received::Http2)).map(Ok::<_, Infallible>));
    let connection = http2::Builder::new(Local)
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(limits.h2_stream_window)
        .initial_connection_window_size(window)
        .max_header_list_size(limits.h2_header_list)
        .max_send_buf_size(limits.h2_send_buffer)
        .max_pending_accept_reset_streams(limits.h2_pending_resets)
        .max_local_error_reset_streams(limits.h2_local_resets)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.user_timeout)
        .serve_connection(TokioIo::new(io), service);
    Driven { connection, session, finishing: false, hold: None }.await;
}

/// A head that was refused before it became a request has a record all the same, with the method `other`.
pub fn count_refused_head(telemetry: &Arc<Telemetry>, edge: &Arc<Edge>, reason: Reason) {
    let unknown = Method::from_bytes(b"REFUSED").unwrap_or_default();
    let record = HttpRecord::begin(telemetry, Some(edge), &unknown, Instant::now());
    record.failed(reason, || "the head was refused".to_owned());
    record.answered(reason.row().status);
    record.response_ended();
}

/// Answers a connection whose first line never ended, before anything parsed it.
pub async fn refuse_head(stream: &mut Stream, reason: Reason, proxy: &str) {
    // The client may be gone; there is nobody else to tell.
    let _ = stream.write_all(&answer::refuse_raw(reason, reason.row().status, proxy)).await;
    let _ = stream.shutdown().await;
}

/// What both kinds of connection can do.
trait Connection: Future {
    fn finish(self: Pin<&mut Self>);
}

pin_project_lite::pin_project! {
    /// HTTP/1 reads its entry's commands itself.
    struct Plain<F> {
        #[pin]
        serving: F,
    }
}

impl<F: Future> Future for Plain<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().serving.poll(cx)
    }
}

impl<F: Future> Connection for Plain<F> {
    fn finish(self: Pin<&mut Self>) {}
}

impl<I, B, S> Connection for http2::Connection<I, S, Local>
where
    S: hyper::service::HttpService<Incoming, ResBody = B>,
    S::Future: 'static,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

pin_project_lite::pin_project! {
    /// A connection that listens to its entry's commands.
    struct Driven<'a, C> {
        #[pin]
        connection: C,
        session: &'a Session,
        finishing: bool,
        // The drain waits until what is buffered has gone out, too.
        hold: Option<Hold>,
    }
}

impl<C: Connection> Future for Driven<'_, C> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let entry = &this.session.entry;
        entry.listen(cx.waker());
        match entry.command() {
            Command::Close => return Poll::Ready(()),
            Command::Finish if !*this.finishing => {
                *this.finishing = true;
                // An idle HTTP/1 connection closes at once; an HTTP/2 peer may leave the farewell unanswered for long.
                if !this.session.http2 || entry.state() == State::Busy {
                    *this.hold = Some(this.session.worker.drain.hold());
                }
                this.connection.as_mut().finish();
            }
            Command::Run | Command::Finish | Command::HeadTimeout => {}
        }
        // How it ended is in the records of its requests.
        this.connection.poll(cx).map(|_| ())
    }
}
