//! Applications behind sidecars. [`Application`] speaks HTTP/1 and HTTP/2 (gRPC among it) on one port, written by hand
//! so that it records exactly what reached it and forgives nothing; its path says what it does (see [`http1`]).
//! [`Backend`] is a raw TCP server whose script is the test.

mod http1;
mod http2;

pub use http2::write;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::eventually::soon;
use crate::wire::Connection;

/// What reached the application, as one request.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Which of its connections, counted from 0.
    pub connection: usize,
    /// `HTTP/1.1`, `HTTP/2.0` ...
    pub version: String,
    pub method: String,
    /// HTTP/2: the whole URI.
    pub target: String,
    /// HTTP/1: names in the case in which they came.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// The body came to its end; false as long as it goes on.
    pub whole: bool,
    /// The client gave up: a reset stream or a connection that ended within the body or the answer.
    pub cancelled: bool,
}

impl Seen {
    /// The first field of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Every field of this name, in any case.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| &**value).collect()
    }
}

/// What an application has recorded so far.
#[derive(Default)]
struct Record {
    requests: Vec<Seen>,
    /// HTTP/1: every byte of each connection; HTTP/2: the preface only.
    raw: Vec<Vec<u8>>,
    /// Who connected, as the kernel tells the application.
    peers: Vec<SocketAddr>,
    open: usize,
}

/// What connections of one application share.
#[derive(Clone)]
struct Shared {
    name: String,
    record: Arc<Mutex<Record>>,
    /// Answers to `/hold` wait for true.
    released: watch::Receiver<bool>,
}

/// An HTTP application that answers by path and records all it gets. Ends when it is dropped.
pub struct Application {
    address: SocketAddr,
    shared: Shared,
    release: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Application {
    /// On 127.0.0.1. `name` is in each answer, as `x-app`.
    pub async fn start(name: &str) -> Application {
        Application::start_at(name, (Ipv4Addr::LOCALHOST, 0).into()).await
    }

    pub async fn start_at(name: &str, address: SocketAddr) -> Application {
        let listener = TcpListener::bind(address).await.unwrap();
        Application::serve(name, listener)
    }

    /// Several on one port of different loopback addresses: replicas of one service have one `targetPort`.
    pub async fn replicas<const N: usize>(name: &str) -> [Application; N] {
        let mut listeners = replica_listeners(N).await.into_iter();
        std::array::from_fn(|index| Application::serve(&format!("{name}-{}", index + 1), listeners.next().unwrap()))
    }

    /// On a listener of a network namespace, say.
    pub fn serve(name: &str, listener: TcpListener) -> Application {
        let address = listener.local_addr().unwrap();
        let (release, released) = watch::channel(false);
        let shared = Shared { name: name.to_owned(), record: Arc::default(), released };
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, shared.clone()));
        Application { address, shared, release, _tasks: tasks }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Every request so far, in the order of their heads.
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.record.lock().unwrap().requests.clone()
    }

    /// How many requests came so far.
    pub fn count(&self) -> usize {
        self.shared.record.lock().unwrap().requests.len()
    }

    /// How many of the requests so far are such. Asked often while many come, when a copy of all would cost more than they do.
    pub fn count_of(&self, which: impl Fn(&Seen) -> bool) -> usize {
        self.shared.record.lock().unwrap().requests.iter().filter(|seen| which(seen)).count()
    }

    /// The last request. Panics when none came.
    pub fn last(&self) -> Seen {
        self.shared.record.lock().unwrap().requests.last().expect("no request reached the application").clone()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.shared.record.lock().unwrap().requests.clear();
    }

    /// The bytes of each connection so far, exactly as they came (of HTTP/2 only the preface).
    pub fn raw(&self) -> Vec<Vec<u8>> {
        self.shared.record.lock().unwrap().raw.clone()
    }

    /// The address at the other end of each connection so far.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared.record.lock().unwrap().peers.clone()
    }

    /// How many connections were accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.record.lock().unwrap().raw.len()
    }

    /// How many of them are open.
    pub fn open(&self) -> usize {
        self.shared.record.lock().unwrap().open
    }

    /// Lets every `/hold` answer, those that come later, too.
    pub fn release(&self) {
        self.release.send_replace(true);
    }

    /// Lets `/hold` wait again.
    pub fn hold(&self) {
        self.release.send_replace(false);
    }
}

impl Shared {
    fn connected(&self, peer: SocketAddr) -> usize {
        let mut record = self.record.lock().unwrap();
        record.raw.push(Vec::new());
        record.peers.push(peer);
        record.open += 1;
        record.raw.len() - 1
    }

    fn disconnected(&self) {
        self.record.lock().unwrap().open -= 1;
    }

    fn heard(&self, connection: usize, bytes: &[u8]) {
        self.record.lock().unwrap().raw[connection].extend_from_slice(bytes);
    }

    /// Records a request whose head is complete; gives its place.
    fn seen(&self, seen: Seen) -> usize {
        let mut record = self.record.lock().unwrap();
        record.requests.push(seen);
        record.requests.len() - 1
    }

    /// Adds to a request. One that was forgotten meanwhile stays so.
    fn change(&self, place: usize, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.record.lock().unwrap().requests.get_mut(place) {
            change(seen);
        }
    }

    async fn held(&self) {
        // A sender that is gone ends the test, and with it this task.
        let _ = self.released.clone().wait_for(|released| *released).await;
    }
}

async fn accept(listener: TcpListener, shared: Shared) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, peer)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let shared = shared.clone();
        connections.spawn(async move {
            let connection = shared.connected(peer);
            serve(&shared, connection, stream).await;
            shared.disconnected();
        });
        while connections.try_join_next().is_some() {}
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn serve(shared: &Shared, connection: usize, mut stream: TcpStream) {
    let mut first = Vec::new();
    while first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
        match stream.read_buf(&mut first).await {
            Ok(count) if count > 0 => {}
            _ => break,
        }
    }
    shared.heard(connection, &first);
    if first.starts_with(PREFACE) {
        http2::serve(shared, connection, stream, first).await;
    } else {
        http1::serve(shared, connection, stream, first).await;
    }
}

/// A raw TCP server: the test accepts, reads, writes and closes.
pub struct Backend {
    listener: TcpListener,
}

/// On a listener of a network namespace, say.
impl From<TcpListener> for Backend {
    fn from(listener: TcpListener) -> Backend {
        Backend { listener }
    }
}

impl Backend {
    pub async fn start() -> Backend {
        Backend::start_at((Ipv4Addr::LOCALHOST, 0).into()).await
    }

    pub async fn start_at(address: SocketAddr) -> Backend {
        Backend { listener: TcpListener::bind(address).await.unwrap() }
    }

    /// Several on one port of different loopback addresses.
    pub async fn replicas<const N: usize>() -> [Backend; N] {
        let mut listeners = replica_listeners(N).await.into_iter();
        std::array::from_fn(|_| Backend { listener: listeners.next().unwrap() })
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn port(&self) -> u16 {
        self.address().port()
    }

    pub async fn accept(&self) -> Connection {
        let (stream, _) = soon("a connection to the backend", self.listener.accept()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.into()
    }

    /// The next connection, whenever it comes.
    pub async fn wait(&self) -> Connection {
        let (stream, _) = self.listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.into()
    }

    /// A connection if one is waiting already.
    pub async fn accepted(&self) -> Option<Connection> {
        let waiting = std::future::poll_fn(|cx| match self.listener.poll_accept(cx) {
            std::task::Poll::Ready(accepted) => std::task::Poll::Ready(accepted.ok()),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        });
        waiting.await.map(|(stream, _)| stream.into())
    }

    /// Closes the listener; new connections are refused.
    pub fn stop(self) -> SocketAddr {
        self.address()
    }
}

/// An address on which nobody listens: taken and given back.
pub async fn nobody() -> SocketAddr {
    Backend::start().await.stop()
}

async fn replica_listeners(count: usize) -> Vec<TcpListener> {
    'port: for _ in 0..100 {
        let mut listeners: Vec<TcpListener> = Vec::new();
        for index in 0..count {
            let port = listeners.first().map_or(0, |first| first.local_addr().unwrap().port());
            let ip = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1 + u8::try_from(index).unwrap()));
            match TcpListener::bind((ip, port)).await {
                Ok(listener) => listeners.push(listener),
                Err(_) => continue 'port,
            }
        }
        return listeners;
    }
    panic!("no port that is free on {count} loopback addresses");
}
