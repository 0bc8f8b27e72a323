//! One data thread: its runtime, its accept loops, its watchdog. Every listener is open on every worker
//! (SO_REUSEPORT); a connection that lands on a worker clearly busier than another is handed over before it is read.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_api::snapshot::Key;
use outrigger_runtime::drain::State as DrainState;
use outrigger_runtime::heartbeat::Heart;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::connect::dial::{Dialer, OwnListeners};
use crate::connect::http2::Ledger;
use crate::connect::worker::{Shared, Worker};
use crate::connection::{Command, Direction, Entry, Registered, Table};
use crate::net::SocketOptions;
use crate::outcome::{Error, Reason, Stage};
use crate::{inbound, outbound};

/// What a listener is for. Direction is data: one accept loop serves all.
#[derive(Clone, Debug)]
pub enum Purpose {
    Inbound {
        application: SocketAddr,
    },
    Outbound {
        destination: Key,
    },
    Proxy {
        allow: Arc<[ipnet::IpNet]>,
    },
    /// Connections that redirect rules lead here; each has its own original destination.
    Redirected(Direction),
}

impl Purpose {
    fn direction(&self) -> Direction {
        match self {
            Purpose::Inbound { .. } => Direction::Inbound,
            Purpose::Outbound { .. } | Purpose::Proxy { .. } => Direction::Outbound,
            Purpose::Redirected(direction) => *direction,
        }
    }
}

/// A connection on its way to another worker.
pub struct HandedOver {
    stream: std::net::TcpStream,
    client: SocketAddr,
    purpose: Purpose,
}

/// The other workers, as an accept loop sees them.
#[derive(Clone)]
pub struct Crew {
    pub own: usize,
    pub tables: Arc<[Arc<Table>]>,
    pub inboxes: Arc<[mpsc::UnboundedSender<HandedOver>]>,
}

/// What a worker thread is started with.
pub struct Start {
    pub shared: Shared,
    pub crew: Crew,
    pub inbox: mpsc::UnboundedReceiver<HandedOver>,
    pub listeners: Vec<(std::net::TcpListener, Purpose)>,
    pub own_listeners: OwnListeners,
    pub socket: SocketOptions,
    pub heart: Heart,
}

/// Runs until the drain is done.
pub fn run(start: Start) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    runtime.block_on(serve(start))
}

async fn serve(start: Start) -> io::Result<()> {
    let Start { shared, crew, mut inbox, listeners, own_listeners, socket, heart } = start;
    let ledger = Ledger::new(shared.memory.clone());
    let (own_dials, way_back) = (shared.own_dials.clone(), shared.way_back.clone());
    let dialer = Dialer::new(shared.tls.clone(), socket, &shared.limits, own_listeners, own_dials, way_back, ledger);
    let worker = Worker::new(&shared, crew.tables[crew.own].clone(), dialer);
    let itself = Rc::downgrade(&worker);
    worker.dialer.set_door(Box::new(move |application, alpn, stream| {
        let worker = itself.upgrade().ok_or_else(ended)?;
        let caller = SocketAddr::new(application.ip(), 0);
        let registered = worker.table.enter_own(caller);
        tokio::task::spawn_local(inbound::serve_own(worker, application, alpn, stream, Rc::new(registered)));
        Ok(())
    }));
    // A panic of a connection's task ends that connection. One of these ends the worker: without its watchdog or its
    // listeners it would only look alive.
    let mut vital = tokio::task::JoinSet::new();
    for (listener, purpose) in listeners {
        let listener = TcpListener::from_std(listener)?;
        vital.spawn_local(accept(worker.clone(), crew.clone(), listener, purpose));
    }
    let receiving = worker.clone();
    vital.spawn_local(async move {
        while let Some(handed) = inbox.recv().await {
            if let Ok(stream) = TcpStream::from_std(handed.stream) {
                begin(&receiving, stream, handed.client, &handed.purpose);
            }
        }
    });
    let relieving = worker.clone();
    vital.spawn_local(async move { relieving.relieve().await });
    let watching = worker.clone();
    vital.spawn_local(watch(watching, heart));
    let broken = async {
        while let Some(ended) = vital.join_next().await {
            if ended.is_err_and(|error| error.is_panic()) {
                return;
            }
        }
        std::future::pending().await
    };
    let drain = worker.drain.clone();
    let to_the_end = async {
        drain.reached(DrainState::Draining).await;
        // Told early, these move their streams elsewhere and lose none.
        worker.table.ask_all(Command::Finish, Entry::is_http2);
        drain.reached(DrainState::Closing).await;
        worker.table.ask_all(Command::Finish, |_| true);
        drain.reached(DrainState::Done).await;
    };
    tokio::select! {
        () = to_the_end => Ok(()),
        () = broken => Err(io::Error::other("a part of this worker panicked")),
    }
}

/// The watchdog. Where nothing has moved for some ticks it looks seldom, so that an idle sidecar does not wake a machine; it
/// beats for the whole worker, whose runtime turns when this does.
async fn watch(worker: Rc<Worker>, heart: Heart) {
    /// Ticks without anything that moves, after which it rests ...
    const QUIET: u32 = 5;
    /// ... for so many ticks, while there are connections that may have to be ended, or pooled ones, or none.
    const RESTING: u32 = 4;
    const EMPTY: u32 = 10;
    let tick = worker.tick();
    let (mut own, mut material) = (worker.directory.own(), worker.tls.subscribe());
    let mut quiet = 0;
    loop {
        heart.beat();
        quiet = if worker.sweep() { quiet + 1 } else { 0 };
        if quiet < QUIET {
            tokio::time::sleep(tick).await;
            continue;
        }
        let longest = tick * if worker.is_empty() { EMPTY } else { RESTING };
        tokio::select! {
            () = worker.table.rest() => quiet = 0,
            // What was let in by the one before is judged again.
            Ok(()) = own.changed() => {}
            Ok(()) = material.changed() => {}
            () = tokio::time::sleep(longest) => {}
        }
    }
}

fn ended() -> Error {
    Error::own(Stage::Connect, Reason::Draining, "this worker has ended")
}

async fn accept(worker: Rc<Worker>, crew: Crew, listener: TcpListener, purpose: Purpose) {
    // Inbound closes when peers have learnt that it goes; the application may call others to the end.
    let until = match purpose.direction() {
        Direction::Inbound => DrainState::Closing,
        Direction::Outbound => DrainState::Done,
    };
    let mut closing = std::pin::pin!(worker.drain.when(until));
    let mut trouble = Trouble::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closing => return,
        };
        match accepted {
            Ok((stream, client)) => {
                worker.table.places().starve(false);
                match crew.less_busy() {
                    Some(other) => hand_over(&worker, &crew, other, stream, client, &purpose),
                    None => begin(&worker, stream, client, &purpose),
                }
            }
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                worker.telemetry.accept_failed();
                worker.table.places().starve(true);
                trouble.tell(&error);
                tokio::time::sleep(worker.limits.accept_pause).await;
            }
        }
    }
}

/// Whether an accept failed for the connection that it would have been, which is gone: the next may be there already.
/// Whatever else fails, want of descriptors or of memory (EMFILE, ENFILE, ENOBUFS, ENOMEM) above all, would fail again at
/// once and is waited for.
fn is_of_the_connection(error: &io::Error) -> bool {
    let Some(code) = error.raw_os_error() else { return false };
    // accept(2): what the network did to a connection before it was taken is told as an error of the call.
    matches!(
        code,
        libc::ECONNABORTED
            | libc::ECONNRESET
            | libc::EPROTO
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
            | libc::ENOPROTOOPT
    )
}

/// What one listener could not accept: told at once, and then every so often, since it fails many times a second.
#[derive(Default)]
struct Trouble {
    told: Option<Instant>,
    untold: u64,
}

impl Trouble {
    const AGAIN: Duration = Duration::from_secs(10);

    fn tell(&mut self, error: &io::Error) {
        self.untold += 1;
        if self.told.is_none_or(|told| told.elapsed() >= Trouble::AGAIN) {
            let times = std::mem::take(&mut self.untold);
            tracing::warn!(
                %error, times,
                "cannot accept a connection; raise the limit of open files (ulimit -n) or of memory. What is open goes on"
            );
            self.told = Some(Instant::now());
        }
    }
}

/// So many connections more than the least busy worker, and a quarter more, is clearly busier.
const CLEARLY: usize = 4;

impl Crew {
    fn less_busy(&self) -> Option<usize> {
        if self.tables.len() < 2 {
            return None;
        }
        let own = self.tables[self.own].len();
        let (least, count) = self.tables.iter().map(|table| table.len()).enumerate().min_by_key(|(_, count)| *count)?;
        (own >= count + count / 4 + CLEARLY).then_some(least)
    }
}

fn hand_over(worker: &Rc<Worker>, crew: &Crew, other: usize, stream: TcpStream, client: SocketAddr, purpose: &Purpose) {
    let Ok(stream) = stream.into_std() else { return };
    let handed = HandedOver { stream, client, purpose: purpose.clone() };
    // A worker that is gone has no connections and would look like the least busy one.
    if let Err(mpsc::error::SendError(handed)) = crew.inboxes[other].send(handed)
        && let Ok(stream) = TcpStream::from_std(handed.stream)
    {
        begin(worker, stream, client, purpose);
    }
}

fn begin(worker: &Rc<Worker>, stream: TcpStream, client: SocketAddr, purpose: &Purpose) {
    if let Purpose::Proxy { allow } = purpose
        && !may_use_proxy(client, allow)
    {
        if let Some(line) = worker.telemetry.line("http_proxy_allow") {
            let suppressed = line.suppressed;
            tracing::warn!(%client, suppressed, "refused at the forward proxy; --http-proxy-allow names who may use it");
        }
        return;
    }
    let Some(registered) = worker.table.enter(purpose.direction(), client) else {
        worker.telemetry.connection_refused();
        return;
    };
    let registered: Rc<Registered> = Rc::new(registered);
    let worker = worker.clone();
    match purpose.clone() {
        Purpose::Inbound { application } => {
            tokio::task::spawn_local(inbound::serve(worker, application, stream.into(), registered))
        }
        Purpose::Outbound { destination } => {
            tokio::task::spawn_local(outbound::serve(worker, destination, stream.into(), registered))
        }
        Purpose::Proxy { .. } => tokio::task::spawn_local(outbound::serve_proxy(worker, stream.into(), registered)),
        Purpose::Redirected(Direction::Inbound) => {
            tokio::task::spawn_local(inbound::serve_redirected(worker, stream, registered))
        }
        Purpose::Redirected(Direction::Outbound) => {
            tokio::task::spawn_local(outbound::serve_redirected(worker, stream, registered))
        }
    };
}

fn may_use_proxy(client: SocketAddr, allow: &[ipnet::IpNet]) -> bool {
    let ip = client.ip().to_canonical();
    ip.is_loopback() || allow.iter().any(|net| net.contains(&ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    fn size_redirected<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn want_of_memory_is_waited_for_and_a_connection_that_is_gone_is_not() {
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINVAL, libc::EBADF] {
            assert!(!is_of_the_connection(&io::Error::from_raw_os_error(code)), "{code}");
        }
        for code in [libc::ECONNABORTED, libc::EPROTO, libc::EHOSTUNREACH] {
            assert!(is_of_the_connection(&io::Error::from_raw_os_error(code)), "{code}");
        }
        assert!(!is_of_the_connection(&io::Error::other("no code")));
    }

    /// What every connection costs for as long as it lives, before any library's part.
    #[test]
    fn tasks_are_small() {
        let given = [size(inbound::serve), size(outbound::serve)];
        assert!(given.iter().all(|bytes| *bytes <= 3500), "inbound, outbound: {given:?} bytes");
        let redirected = [size_redirected(inbound::serve_redirected), size_redirected(outbound::serve_redirected)];
        assert!(redirected.iter().all(|bytes| *bytes <= 3500), "redirected inbound, outbound: {redirected:?} bytes");
    }
}
