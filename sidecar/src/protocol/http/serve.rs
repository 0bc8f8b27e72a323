//! Serves one downstream connection: HTTP/1 by `http1`, HTTP/2 by `http2`. The connection's task obeys the watchdog and
//! the drain.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Method, Request, Response};
use outrigger_runtime::drain::Hold;
use tokio::io::AsyncWriteExt;

use super::answer;
use super::body::ResponseBody;
use super::exchange::Session;
pub use super::http2::Client;
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
    client: Client,
    on_refusal: OnRefusal,
    respond: impl Fn(Request<Received>) -> F + Unpin,
) where
    F: Future<Output = Response<ResponseBody>> + 'static,
{
    let connection = super::http2::serve(session, stream, client, on_refusal, respond);
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

/// The same for a stream that the HTTP/2 library reset before it became a request: no status was sent.
pub fn count_refused_stream(telemetry: &Arc<Telemetry>, edge: &Arc<Edge>, reason: Reason) {
    let unknown = Method::from_bytes(b"REFUSED").unwrap_or_default();
    let record = HttpRecord::begin(telemetry, Some(edge), &unknown, Instant::now());
    record.failed(reason, || "the stream was reset because of its head".to_owned());
}

/// Answers a connection whose first line never ended, before anything parsed it.
pub async fn refuse_head(stream: &mut Stream, reason: Reason, proxy: &str) {
    // The client may be gone; there is nobody else to tell.
    let _ = stream.write_all(&answer::refuse_raw(reason, reason.row().status, proxy)).await;
    let _ = stream.shutdown().await;
}

/// What both kinds of connection can do.
pub(super) trait Connection: Future {
    /// Finish what runs, take nothing new.
    fn finish(self: Pin<&mut Self>);

    /// Take nothing new, whether the peer has acknowledged that or not, and end with the last stream.
    fn refuse(self: Pin<&mut Self>);
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

    fn refuse(self: Pin<&mut Self>) {}
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
            Command::Finish | Command::Refuse if !*this.finishing => {
                *this.finishing = true;
                // An idle HTTP/1 connection closes at once; an HTTP/2 peer may leave the farewell unanswered for long.
                if !this.session.http2 || entry.state() == State::Busy {
                    *this.hold = Some(this.session.worker.drain.hold());
                }
                this.connection.as_mut().finish();
            }
            Command::Run | Command::Finish | Command::Refuse | Command::HeadTimeout => {}
        }
        if entry.command() == Command::Refuse {
            this.connection.as_mut().refuse();
        }
        // How it ended is in the records of its requests.
        this.connection.poll(cx).map(|_| ())
    }
}
