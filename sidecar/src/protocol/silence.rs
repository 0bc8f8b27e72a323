//! A client that says nothing on a port whose protocol nobody declared: it may be idle, or wait for the server to speak
//! first. It is waited for a moment; then an upstream is opened on suspicion, within the bounds that
//! `connect/speculation.rs` keeps, and either side may speak. Time never decides what the client's bytes are: whatever it
//! says at last is looked at as if it had come at once. Both directions call it.

use std::io;
use std::task::Poll;

use futures_util::FutureExt;
use outrigger_api::snapshot::Key;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::detect::{Sight, detect, speaks_http2};
use super::peek::{self, Peeked};
use crate::connect::speculation::{Beside, News, Place, SpeaksFirst, Suspect, Undecided};
use crate::connect::worker::Worker;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Retry, Stage};

/// Who spoke first.
pub enum First<U> {
    /// The client: its bytes are read ahead. With the upstream that was open by then, if one was.
    Client(Option<U>),
    /// The server: its bytes are read ahead.
    Server(U),
    /// Somebody left in order and without a byte.
    Nobody,
}

/// How long a silent client is waited for before an upstream is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Not at all where the server is known to speak first.
    AsRemembered,
    /// Always: what comes may be a sidecar's ClientHello, which the server's greeting would run into.
    Always,
}

/// Waits until somebody speaks on an undeclared port. `key` is the destination, `age` the connection's (its id), `open` opens
/// an upstream to it.
pub async fn first<U: AsMut<Stream>>(
    worker: &Worker,
    key: &Key,
    age: u64,
    stream: &mut Stream,
    moment: Moment,
    open: impl AsyncFn() -> Result<U, Error>,
) -> Result<First<U>, Error> {
    if !stream.ahead().is_empty() {
        return Ok(First::Client(None));
    }
    let suspect = worker.speculation.suspect(key);
    let server_first = worker.speculation.speaks_first(&suspect) == Some(SpeaksFirst::Server);
    if (moment == Moment::Always || !server_first)
        && let Ok(read) = timeout(worker.limits.detect_wait, stream.read_ahead()).await
    {
        return client_spoke(read, None);
    }
    let undecided = worker.speculation.enter(age);
    tokio::select! {
        // First in order: who speaks in the moment in which it is told to go may stay.
        biased;
        first = speculate(worker, &suspect, &undecided, stream, &open) => first,
        () = undecided.must_go() => Err(crowded()),
        () = sleep(worker.limits.client_idle) => {
            Err(Error::downstream(Stage::Detect, Reason::IdleTimeout, "neither side ever spoke"))
        }
    }
}

/// The same where the protocol is declared and only a sidecar's ClientHello may come before the server's bytes.
pub async fn first_of_opaque<U: AsMut<Stream>>(
    worker: &Worker,
    stream: &mut Stream,
    open: impl AsyncFn() -> Result<U, Error>,
) -> Result<First<U>, Error> {
    if let Ok(read) = timeout(worker.limits.detect_wait, stream.read_ahead()).await {
        return client_spoke(read, None);
    }
    let mut upstream = open().await?;
    let spoken = timeout(worker.limits.tunnel_idle, either(stream, upstream.as_mut())).await;
    match spoken.unwrap_or(Spoken::Client(Ok(0))) {
        Spoken::Client(read) => client_spoke(read, Some(upstream)),
        Spoken::Server(read) => server_spoke(read, upstream),
    }
}

/// What the client speaks, which has begun to.
pub async fn decide(worker: &Worker, age: u64, stream: &mut Stream) -> Result<Peeked, Error> {
    let limits = &worker.limits;
    match detect(stream.ahead()) {
        Sight::Is(detected) => Ok(Peeked::Speaks(detected)),
        Sight::Begun | Sight::Short => {
            undecided(worker, age, peek::settles(stream, limits.detect_short, limits.head_timeout)).await
        }
    }
}

/// Waits for what is to tell what a connection is: for a moment as everybody may, for longer as one of the undecided.
pub async fn undecided<T>(
    worker: &Worker,
    age: u64,
    waiting: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut waiting = std::pin::pin!(waiting);
    if let Ok(done) = timeout(worker.limits.detect_wait, &mut waiting).await {
        return done;
    }
    let undecided = worker.speculation.enter(age);
    tokio::select! {
        biased;
        done = waiting => done,
        () = undecided.must_go() => Err(crowded()),
    }
}

/// Goes ahead, or waits for what others find out, as often as it takes.
async fn speculate<U: AsMut<Stream>>(
    worker: &Worker,
    suspect: &Suspect,
    undecided: &Undecided<'_>,
    stream: &mut Stream,
    open: &impl AsyncFn() -> Result<U, Error>,
) -> Result<First<U>, Error> {
    let speculation = &worker.speculation;
    let mut news = suspect.listen();
    let _waiting = speculation.wait(suspect);
    loop {
        let right = match speculation.speaks_first(suspect) {
            Some(SpeaksFirst::Server) => Right::Known,
            Some(SpeaksFirst::Client) => tokio::select! {
                biased;
                read = stream.read_ahead() => return client_spoke(read, None),
                () = heard(&mut news) => { told(&news)?; continue }
            },
            None => tokio::select! {
                biased;
                read = stream.read_ahead() => return client_spoke(read, None),
                () = heard(&mut news) => { told(&news)?; continue }
                place = speculation.place(suspect) => place.map_or(Right::Known, Right::Ahead),
                beside = speculation.beside(suspect) => beside.map_or(Right::Known, Right::Beside),
            },
        };
        // Meanwhile somebody may have found out.
        if right.is_suspicion() && speculation.speaks_first(suspect).is_some() {
            continue;
        }
        if matches!(right, Right::Ahead(_)) {
            undecided.stay();
        }
        if let Some(first) = ahead(worker, suspect, stream, open, right).await? {
            return Ok(first);
        }
        undecided.join();
    }
}

/// Why an upstream may be opened for a client that is silent.
enum Right<'a> {
    /// The server is known to speak first.
    Known,
    /// The others wait for what comes of it.
    Ahead(#[expect(dead_code, reason = "held until it is known")] Place<'a>),
    /// The one ahead takes long.
    Beside(#[expect(dead_code, reason = "held until it is known")] Beside<'a>),
}

impl Right<'_> {
    fn is_suspicion(&self) -> bool {
        matches!(self, Right::Ahead(_) | Right::Beside(_))
    }
}

/// Opens an upstream and waits for either side; `None` when the place was given up for somebody else.
async fn ahead<U: AsMut<Stream>>(
    worker: &Worker,
    suspect: &Suspect,
    stream: &mut Stream,
    open: &impl AsyncFn() -> Result<U, Error>,
    right: Right<'_>,
) -> Result<Option<First<U>>, Error> {
    let mut opening = std::pin::pin!(open());
    let opened = tokio::select! {
        biased;
        read = stream.read_ahead() => match read {
            // Where the server is known to speak first the upstream is most probably wanted: given up half way, the
            // application would see a connection on which nothing is ever said.
            Ok(1..) if !right.is_suspicion() => return client_spoke(read, Some(opening.await?)).map(Some),
            _ => return client_spoke(read, None).map(Some),
        },
        opened = &mut opening => opened,
    };
    let mut upstream = opened.inspect_err(|error| {
        if matches!(right, Right::Ahead(_)) {
            suspect.failed(error);
        }
    })?;
    if matches!(right, Right::Ahead(_)) {
        suspect.is_silent();
    }
    let since = Instant::now();
    let settles = worker.limits.speculation_settles;
    let give_up = async {
        if !matches!(right, Right::Ahead(_)) {
            return std::future::pending().await;
        }
        sleep(settles).await;
        worker.speculation.is_wanted().await;
    };
    let spoken = tokio::select! {
        biased;
        spoken = either(stream, upstream.as_mut()) => spoken,
        () = give_up => {
            worker.speculation.learn(suspect, SpeaksFirst::Client);
            leave(upstream);
            return Ok(None);
        }
    };
    match spoken {
        Spoken::Client(read) => {
            // A server that says nothing for so long waits for its client.
            if since.elapsed() >= settles && matches!(read, Ok(count) if count > 0) {
                worker.speculation.learn(suspect, SpeaksFirst::Client);
            }
            client_spoke(read, Some(upstream)).map(Some)
        }
        // A server of HTTP/2 says its settings at once and waits for the client's preface all the same, whoever was heard to
        // speak first there before: its client's bytes are never opaque.
        Spoken::Server(Ok(_)) if speaks_http2(upstream.as_mut().ahead()) => {
            worker.speculation.learn(suspect, SpeaksFirst::Client);
            leave(upstream);
            client_spoke(stream.read_ahead().await, None).map(Some)
        }
        Spoken::Server(read) => {
            // An HTTP server may say that it gives up waiting.
            if matches!(read, Ok(count) if count > 0) && !upstream.as_mut().ahead().starts_with(b"HTTP/") {
                worker.speculation.learn(suspect, SpeaksFirst::Server);
            }
            server_spoke(read, upstream).map(Some)
        }
    }
}

enum Spoken {
    Client(io::Result<usize>),
    Server(io::Result<usize>),
}

/// The first byte or the end of either side; the client's when both have come.
async fn either(downstream: &mut Stream, upstream: &mut Stream) -> Spoken {
    std::future::poll_fn(|cx| {
        if let Poll::Ready(read) = downstream.poll_read_ahead(cx) {
            return Poll::Ready(Spoken::Client(read));
        }
        upstream.poll_read_ahead(cx).map(Spoken::Server)
    })
    .await
}

fn client_spoke<U: AsMut<Stream>>(read: io::Result<usize>, upstream: Option<U>) -> Result<First<U>, Error> {
    match read {
        Ok(0) => {
            upstream.into_iter().for_each(leave);
            Ok(First::Nobody)
        }
        Ok(_) => Ok(First::Client(upstream)),
        Err(error) => Err(peek::left(&error)),
    }
}

fn server_spoke<U>(read: io::Result<usize>, upstream: U) -> Result<First<U>, Error> {
    match read {
        Ok(0) => Ok(First::Nobody),
        Ok(_) => Ok(First::Server(upstream)),
        Err(error) => Err(Error::upstream(Stage::Detect, Reason::UpstreamReset, Retry::Never, error.to_string())),
    }
}

/// Ends an upstream that is not needed, in order, so that its other end does not take it for a truncation.
pub fn leave<U: AsMut<Stream>>(mut upstream: U) {
    // Nothing was written to it: there is room for what TLS says at its end. If not, it ends without.
    let _ = upstream.as_mut().shutdown().now_or_never();
}

async fn heard(news: &mut watch::Receiver<News>) {
    // The sender lives as long as the one who waits.
    let _ = news.changed().await;
}

fn told(news: &watch::Receiver<News>) -> Result<(), Error> {
    match &*news.borrow() {
        News::Failed(error) => Err(error.clone()),
        News::Nothing | News::ServerSpoke => Ok(()),
    }
}

fn crowded() -> Error {
    let detail = "too many connections say nothing; the one that has been silent for longest makes room";
    Error::own(Stage::Detect, Reason::Overloaded, detail)
}
