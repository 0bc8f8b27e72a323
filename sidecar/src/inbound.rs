//! The inbound walk: what others send to the application. The mTLS accept, detect, policy, connect, forward. The
//! upstream is always the application's own address, never loopback in its place. What is over when bytes flow is
//! boxed: a connection's task is as large as its largest part for as long as it lives.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::Either;
use http::{HeaderValue, Request, Response};
use outrigger_api::identity::SpiffeId;
use outrigger_api::name::Protocol;
use outrigger_api::snapshot::{Key, MtlsMode, Workload};
use rustls::server::Accepted;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::connect::dial::Target;
use crate::connect::lane::{Framing, Lane, Unsent};
use crate::connect::request_body::Received;
use crate::connect::worker::Worker;
use crate::connection::{Registered, State};
use crate::net::{OriginalDst, Stream};
use crate::outcome::{Error, Reason, Stage};
use crate::policy::{self, Arrival, Permit};
use crate::protocol::detect::Detected;
use crate::protocol::http::body::ResponseBody;
use crate::protocol::http::exchange::{Exchange, Session};
use crate::protocol::http::headers::{CLIENT_CERTIFICATE, IDENTITY, Strip};
use crate::protocol::http::serve;
use crate::protocol::opaque::{self, CopyError};
use crate::protocol::peek::{self, Peeked};
use crate::protocol::silence::{self, First, Moment};
use crate::protocol::sni::{self, Sniffed};
use crate::telemetry::{self, Direction, Edge, EdgeLabels, TcpRecord, UNKNOWN, Unproved, WireProtocol};
use crate::tls::{self, Hello, MeshAlpn};

/// How long after the end of the caller's certificate its connection is told to finish.
const RETIRE_GRACE: Duration = Duration::from_secs(5);

/// Serves one connection of a peer to the application at `application`.
pub async fn serve(worker: Rc<Worker>, application: SocketAddr, stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.destination = application.to_string());
    let Some(own) = worker.own_workload() else {
        // Nobody has said yet who may come in: nobody may.
        return stream.reset_on_close();
    };
    let mut walk = Walk::new(&worker, &own, application, &registered);
    if let Err((error, stream)) = walk.arrive(stream).await {
        walk.refuse(stream, &error).await;
    }
}

/// Serves one redirected connection: to the application where the peer meant it to go. Not an async fn, which would keep
/// what it was called with for as long as the connection lives.
pub fn serve_redirected(
    worker: Rc<Worker>,
    stream: TcpStream,
    registered: Rc<Registered>,
) -> impl Future<Output = ()> + 'static {
    match application(&worker, &stream) {
        Ok(application) => Either::Left(serve(worker, application, stream.into(), registered)),
        Err(error) => {
            let caller = Caller { peer: None, destination_service: String::new() };
            caller.refused(&worker, &registered, &error);
            Stream::from(stream).reset_on_close();
            Either::Right(std::future::ready(()))
        }
    }
}

/// The application that a redirected connection is for. Nothing but this workload's own addresses is reached through its
/// sidecar, and no port of the sidecar itself.
fn application(worker: &Worker, stream: &TcpStream) -> Result<SocketAddr, Error> {
    let original = OriginalDst::of(stream)?.address();
    if let Some(application) = worker.own.application_behind(original) {
        return Ok(application);
    }
    let refuse = |reason, detail| Err(Error::downstream(Stage::Accept, reason, detail));
    if worker.dialer.is_own_port(original.port()) {
        return refuse(Reason::OwnPort, format!("{original}: port {} is this sidecar's own", original.port()));
    }
    if !worker.is_reached_at(original.ip()) {
        return refuse(Reason::ForeignAddress, format!("{original} is no address of this network namespace"));
    }
    Ok(original)
}

/// Serves one connection of the workload to itself, which its own outbound side made within this process.
pub async fn serve_own(
    worker: Rc<Worker>,
    application: SocketAddr,
    alpn: MeshAlpn,
    stream: Stream,
    registered: Rc<Registered>,
) {
    registered.describe(|about| {
        about.destination = application.to_string();
        about.principal = Some(worker.own.principal.to_string());
    });
    let Some(own) = worker.own_workload() else { return stream.reset_on_close() };
    let mut walk = Walk::new(&worker, &own, application, &registered);
    let (identity, workload) = (worker.own.principal.clone(), worker.own.workload.as_str().into());
    walk.caller.peer = Some(Proved { identity, workload, mtls: false });
    let served = match policy::admit(walk.mode, Arrival::Own) {
        Ok(permit) => walk.framed(stream, alpn, permit).await,
        Err(error) => Err((error, Some(stream))),
    };
    if let Err((error, stream)) = served {
        walk.refuse(stream, &error).await;
    }
}

/// What is known of one inbound connection on its way.
struct Walk {
    worker: Rc<Worker>,
    registered: Rc<Registered>,
    application: SocketAddr,
    mode: MtlsMode,
    declared: Option<Protocol>,
    caller: Caller,
}

/// Who calls.
struct Caller {
    peer: Option<Proved>,
    destination_service: String,
}

/// A caller of whom it is known who it is.
struct Proved {
    identity: SpiffeId,
    workload: Arc<str>,
    /// By mutual TLS; else it is the workload itself.
    mtls: bool,
}

type Refused = (Error, Option<Stream>);

impl Walk {
    fn new(worker: &Rc<Worker>, own: &Workload, application: SocketAddr, registered: &Rc<Registered>) -> Walk {
        let port = own.ports.get(&application.port());
        let service = port.and_then(|port| port.service.as_ref()).map(ToString::to_string).unwrap_or_default();
        Walk {
            worker: worker.clone(),
            registered: registered.clone(),
            application,
            mode: own.mtls_mode(application.port()),
            declared: own.protocol(application.port()),
            caller: Caller { peer: None, destination_service: service },
        }
    }

    /// Who is there, and how do they come?
    async fn arrive(&mut self, mut stream: Stream) -> Result<(), Refused> {
        let opened = match self.mode {
            MtlsMode::Disable => return self.plaintext(stream, None).await,
            MtlsMode::Strict => None,
            MtlsMode::Permissive => match Box::pin(self.knock(&mut stream)).await {
                Ok(First::Client(opened)) => opened,
                Ok(First::Server(opened)) => {
                    self.note(Unproved::Plaintext);
                    return self.server_first(stream, opened).await;
                }
                Ok(First::Nobody) => return Ok(()),
                Err(error) => return Err((error, Some(stream))),
            },
        };
        // That may have taken long.
        if let Some(own) = self.worker.own_workload() {
            self.mode = own.mtls_mode(self.application.port());
        }
        let arrived = match Box::pin(silence::undecided(&self.worker, self.hello(&mut stream))).await {
            Ok(arrived) => arrived,
            Err(error) => return Err((error, Some(stream))),
        };
        match arrived {
            Arrived::Mesh(hello) => {
                opened.into_iter().for_each(silence::leave);
                self.mutual(stream, hello).await
            }
            Arrived::ForeignTls => {
                let permit = match self.admit(Arrival::ForeignTls, Unproved::ForeignTls) {
                    Ok(permit) => permit,
                    Err(error) => {
                        // The close is what counts; the alert tells a person what was missing.
                        let _ = stream.write_all(tls::no_application_protocol_alert()).await;
                        return Err((error, Some(stream)));
                    }
                };
                self.count_detected(telemetry::Detected::Tls);
                self.opaque(stream, opened, WireProtocol::Tls, permit).await
            }
            Arrived::Plaintext => self.plaintext(stream, opened).await,
            Arrived::Left => Ok(()),
        }
    }

    /// Asks policy about a caller that proves nothing, and notes who it is.
    fn admit(&self, arrival: Arrival, how: Unproved) -> Result<Permit, Error> {
        let admitted = policy::admit(self.mode, arrival);
        self.note(if admitted.is_ok() { how } else { Unproved::Refused });
        admitted
    }

    fn note(&self, how: Unproved) {
        let callers = self.worker.telemetry.plaintext_callers();
        callers.note(self.registered.client, self.application.port(), how, SystemTime::now());
    }

    /// On a port that takes plaintext too, a silent client may be a sidecar that is slow, or somebody who waits for the
    /// application: it is opened where it may speak first.
    async fn knock(&self, stream: &mut Stream) -> Result<First<Stream>, Error> {
        let open = async || self.dial(policy::admit(self.mode, Arrival::Plaintext)?).await;
        match self.declared {
            Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => {
                match tokio::time::timeout(self.worker.limits.client_idle, stream.read_ahead()).await {
                    Ok(Ok(0)) | Err(_) => Ok(First::Nobody),
                    Ok(Ok(_)) => Ok(First::Client(None)),
                    Ok(Err(error)) => Err(peek::left(&error)),
                }
            }
            Some(Protocol::Tcp | Protocol::Tls) => silence::first_of_opaque(&self.worker, stream, open).await,
            None => silence::first(&self.worker, &self.key(), stream, Moment::Always, open).await,
        }
    }

    /// Reads until it is known whether this is a sidecar's ClientHello.
    async fn hello(&self, stream: &mut Stream) -> Result<Arrived, Error> {
        let whole = async {
            loop {
                match tls::read_hello(stream.ahead()) {
                    Hello::Mesh(hello) => return Ok(Arrived::Mesh(hello)),
                    Hello::Foreign { .. } => return Ok(Arrived::ForeignTls),
                    Hello::Invalid => return Ok(Arrived::Plaintext),
                    Hello::Incomplete => match stream.read_ahead().await {
                        Ok(0) if stream.ahead().is_empty() => return Ok(Arrived::Left),
                        Ok(0) => return Ok(Arrived::Plaintext),
                        Ok(_) => {}
                        Err(error) => return Err(peek::left(&error)),
                    },
                }
            }
        };
        let done = tokio::time::timeout(self.worker.limits.handshake_timeout, whole).await;
        done.unwrap_or_else(|_| {
            if stream.ahead().is_empty() {
                Err(Error::downstream(Stage::Detect, Reason::MtlsRequired, "no ClientHello in time"))
            } else {
                Err(Error::downstream(Stage::Detect, Reason::TlsHandshake, "the ClientHello did not end in time"))
            }
        })
    }

    /// Under which it is remembered who speaks first.
    fn key(&self) -> Key {
        Key::Address(self.application)
    }

    /// A sidecar: prove who it is, then serve what its ALPN id says, as far as the port allows.
    async fn mutual(&mut self, mut stream: Stream, hello: Box<Accepted>) -> Result<(), Refused> {
        let permit = policy::admit(self.mode, Arrival::Mutual).map_err(|error| (error, None))?;
        let Some(material) = self.worker.tls.current() else {
            return Err((Error::own(Stage::Accept, Reason::NotReady, "no certificate yet"), Some(stream)));
        };
        drop(stream.take_ahead());
        let stream = stream.below_tls();
        let (stream, peer) = Box::pin(tls::accept_hello(&material, *hello, stream))
            .await
            .map_err(|error| (Error::downstream(Stage::Accept, error.reason(), error.to_string()), None))?;
        let stream = Stream::from(stream);
        self.registered.describe(|about| {
            about.principal = Some(peer.identity.to_string());
            about.mtls = true;
        });
        // The caller stops using the connection by itself when its certificate ends; this is for one that does not.
        let left = peer.not_after.duration_since(SystemTime::now()).unwrap_or_default();
        self.registered.retire_after(left + RETIRE_GRACE);
        let alpn = peer.alpn;
        self.caller.peer = Some(Proved { identity: peer.identity, workload: peer.workload, mtls: true });
        self.framed(stream, alpn, permit).await
    }

    /// Serves what the ALPN id of a caller says, as far as the port allows.
    async fn framed(&self, stream: Stream, alpn: MeshAlpn, permit: Permit) -> Result<(), Refused> {
        match alpn {
            MeshAlpn::H1 => self.count_detected(telemetry::Detected::Http1),
            MeshAlpn::H2 => self.count_detected(telemetry::Detected::Http2),
            MeshAlpn::Tcp => {}
        }
        match (alpn, self.declared) {
            (MeshAlpn::H1, _) => self.http1(stream, permit).await,
            (MeshAlpn::H2, _) => Box::pin(self.http2(stream, permit)).await,
            (MeshAlpn::Tcp, Some(Protocol::Tcp)) => self.opaque(stream, None, WireProtocol::Tcp, permit).await,
            (MeshAlpn::Tcp, Some(Protocol::Tls)) => self.opaque(stream, None, WireProtocol::Tls, permit).await,
            (MeshAlpn::Tcp, Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc)) => {
                Err((mismatch("opaque bytes for a port declared as HTTP"), Some(stream)))
            }
            (MeshAlpn::Tcp, None) => self.undeclared(stream, None, permit).await,
        }
    }

    async fn plaintext(&self, mut stream: Stream, opened: Option<Stream>) -> Result<(), Refused> {
        let permit = match self.admit(Arrival::Plaintext, Unproved::Plaintext) {
            Ok(permit) => permit,
            Err(error) => return Err((error, Some(stream))),
        };
        let limits = &self.worker.limits;
        let peeked = match self.declared {
            Some(Protocol::Tcp) => return self.opaque(stream, opened, WireProtocol::Tcp, permit).await,
            Some(Protocol::Tls) => return self.opaque(stream, opened, WireProtocol::Tls, permit).await,
            Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => {
                peek::speaks_or_waits(&mut stream, limits.client_idle, limits.head_timeout).await
            }
            None => return self.undeclared(stream, opened, permit).await,
        };
        match peeked {
            Ok(Peeked::Speaks(Detected::Http2)) => Box::pin(self.http2(stream, permit)).await,
            Ok(Peeked::Speaks(Detected::Tls)) => Err((mismatch("TLS on a port declared as HTTP"), Some(stream))),
            // What is not HTTP at all is told by the parser what is wrong with it.
            Ok(Peeked::Speaks(Detected::Http1 | Detected::Opaque)) => self.http1(stream, permit).await,
            Ok(Peeked::Silent | Peeked::Left) => Ok(()),
            Err(error) => Err((error, Some(stream))),
        }
    }

    /// A port whose protocol nobody declared, in plaintext or inside what was announced as opaque: whoever speaks first
    /// decides, the client's bytes in any case.
    async fn undeclared(&self, mut stream: Stream, opened: Option<Stream>, permit: Permit) -> Result<(), Refused> {
        let open = async || self.dial(permit).await;
        let key = self.key();
        let first = silence::first(&self.worker, &key, &mut stream, Moment::AsRemembered, open);
        let opened = match Box::pin(first).await {
            Ok(First::Client(later)) => opened.or(later),
            Ok(First::Server(opened)) => return self.server_first(stream, opened).await,
            Ok(First::Nobody) => return Ok(()),
            Err(error) => return Err((error, Some(stream))),
        };
        match self.counted(Box::pin(silence::decide(&self.worker, &mut stream)).await) {
            Ok(Peeked::Speaks(Detected::Http1 | Detected::Http2)) if self.caller.peer.is_some() => {
                Err((mismatch("HTTP inside what was announced as opaque"), Some(stream)))
            }
            Ok(Peeked::Speaks(Detected::Http1)) => {
                opened.into_iter().for_each(silence::leave);
                self.http1(stream, permit).await
            }
            Ok(Peeked::Speaks(Detected::Http2)) => {
                opened.into_iter().for_each(silence::leave);
                Box::pin(self.http2(stream, permit)).await
            }
            Ok(Peeked::Speaks(Detected::Tls)) => self.opaque(stream, opened, WireProtocol::Tls, permit).await,
            Ok(Peeked::Speaks(Detected::Opaque)) => self.opaque(stream, opened, WireProtocol::Tcp, permit).await,
            Ok(Peeked::Silent | Peeked::Left) => Ok(()),
            Err(error) => Err((error, Some(stream))),
        }
    }

    // --- HTTP -----------------------------------------------------------------------------------------------

    async fn http1(&self, stream: Stream, permit: Permit) -> Result<(), Refused> {
        self.registered.describe(|about| about.protocol = "http1");
        let session = Session::new(&self.worker, &self.registered, false, Strip::Identity);
        let service = self.service(Framing::Http1, permit);
        let edge = service.edge(WireProtocol::Http1);
        let telemetry = self.worker.telemetry.clone();
        let on_refusal = Box::new(move |reason| serve::count_refused_head(&telemetry, &edge, reason));
        serve::http1(&session, stream, on_refusal, |request| respond(session.clone(), service.clone(), request)).await;
        Ok(())
    }

    async fn http2(&self, stream: Stream, permit: Permit) -> Result<(), Refused> {
        self.registered.describe(|about| about.protocol = "http2");
        let session = Session::new(&self.worker, &self.registered, true, Strip::Identity);
        let service = self.service(Framing::Http2, permit);
        let limits = &self.worker.limits;
        let mesh = self.caller.peer.is_some();
        let streams = if mesh { limits.h2_streams_mesh } else { limits.h2_streams_application };
        let inner = session.clone();
        serve::http2(&session, stream, streams, move |request| respond(inner.clone(), service.clone(), request)).await;
        Ok(())
    }

    fn service(&self, framing: Framing, permit: Permit) -> Rc<Service> {
        let identity = self.caller.peer.as_ref().map(|peer| &peer.identity);
        Rc::new(Service {
            lane: self.worker.application_lane(self.application, framing, identity),
            claims: identity.and_then(|identity| Claims::new(&self.worker.own.principal, identity)),
            edges: [WireProtocol::Http1, WireProtocol::Http2, WireProtocol::Grpc]
                .map(|protocol| self.caller.edge(&self.worker, protocol)),
            application: self.application,
            _permit: permit,
        })
    }

    // --- bytes that are not parsed ----------------------------------------------------------------------------

    async fn opaque(
        &self,
        stream: Stream,
        opened: Option<Stream>,
        protocol: WireProtocol,
        permit: Permit,
    ) -> Result<(), Refused> {
        let upstream = match opened {
            Some(upstream) => Ok(upstream),
            None => self.dial(permit).await,
        };
        match upstream {
            Ok(upstream) => {
                self.copy(stream, upstream, protocol).await;
                Ok(())
            }
            Err(error) => Err((error, Some(stream))),
        }
    }

    async fn server_first(&self, stream: Stream, upstream: Stream) -> Result<(), Refused> {
        self.count_detected(telemetry::Detected::ServerFirst);
        let protocol = if self.declared == Some(Protocol::Tls) { WireProtocol::Tls } else { WireProtocol::Tcp };
        self.copy(stream, upstream, protocol).await;
        Ok(())
    }

    async fn dial(&self, _permit: Permit) -> Result<Stream, Error> {
        let target = Target::plain(self.application);
        Box::pin(self.worker.dialer.dial(&target, MeshAlpn::Tcp)).await.map(|dialled| dialled.stream)
    }

    async fn copy(&self, mut stream: Stream, upstream: Stream, protocol: WireProtocol) {
        let _hold = self.worker.drain.hold();
        self.registered.describe(|about| about.protocol = protocol.as_str());
        let edge = self.caller.edge(&self.worker, protocol);
        let record = TcpRecord::begin(&self.worker.telemetry, &edge, Instant::now());
        record.downstream(self.registered.client);
        record.upstream(self.application);
        self.registered.enter(State::Tunnel);
        if protocol == WireProtocol::Tls {
            match Box::pin(sni::sniff(&mut stream, self.worker.limits.detect_wait)).await {
                Ok(Sniffed::Tls(name)) => {
                    self.registered.describe(|about| about.sni = name.clone());
                    record.sni(name);
                }
                Ok(Sniffed::Other) => {}
                Err(error) => {
                    upstream.reset_on_close();
                    return record.failed(Reason::ClientClosed, || error.to_string());
                }
            }
        }
        let forth = |count| record.add_received(count);
        let back = |count| record.add_sent(count);
        match opaque::copy(stream, upstream, &self.registered, forth, back).await {
            Ok(()) => {}
            Err(CopyError::Downstream(error)) => record.failed(Reason::ClientClosed, || error.to_string()),
            Err(CopyError::Upstream(error)) => record.failed(Reason::UpstreamReset, || error.to_string()),
        }
    }

    /// On a port whose protocol is not declared, how it was found.
    fn count_detected(&self, detected: telemetry::Detected) {
        if self.declared.is_none() {
            self.worker.telemetry.detected(detected);
        }
    }

    fn counted(&self, peeked: Result<Peeked, Error>) -> Result<Peeked, Error> {
        if let Ok(Peeked::Speaks(detected)) = &peeked {
            self.count_detected((*detected).into());
        }
        peeked
    }

    /// Counts a connection that ends before a byte reached the application, and closes it.
    async fn refuse(&self, stream: Option<Stream>, error: &Error) {
        self.caller.refused(&self.worker, &self.registered, error);
        let Some(mut stream) = stream else { return };
        if error.reason == Reason::RequestHeadTimeout {
            serve::refuse_head(&mut stream, error.reason, &self.worker.own.instance).await;
        } else if error.reason != Reason::MtlsRequired {
            stream.reset_on_close();
        }
    }
}

enum Arrived {
    Mesh(Box<Accepted>),
    ForeignTls,
    Plaintext,
    Left,
}

fn mismatch(detail: &'static str) -> Error {
    Error::downstream(Stage::Detect, Reason::ProtocolMismatch, detail)
}

// --- one request ------------------------------------------------------------------------------------------------

/// The application, as one caller's HTTP connection reaches it.
struct Service {
    lane: Rc<Lane>,
    claims: Option<Claims>,
    edges: [Arc<Edge>; 3],
    application: SocketAddr,
    _permit: Permit,
}

impl Service {
    fn edge(&self, protocol: WireProtocol) -> Arc<Edge> {
        let index = match protocol {
            WireProtocol::Http2 => 1,
            WireProtocol::Grpc => 2,
            WireProtocol::Http1 | WireProtocol::Tcp | WireProtocol::Tls => 0,
        };
        self.edges[index].clone()
    }
}

/// What the application is told about the caller; made once per connection.
struct Claims {
    client_certificate: HeaderValue,
    identity: HeaderValue,
}

impl Claims {
    fn new(own: &SpiffeId, caller: &SpiffeId) -> Option<Claims> {
        Some(Claims {
            client_certificate: HeaderValue::from_str(&format!("By={own};URI={caller}")).ok()?,
            identity: HeaderValue::from_str(caller.as_str()).ok()?,
        })
    }
}

async fn respond(session: Rc<Session>, service: Rc<Service>, request: Request<Received>) -> Response<ResponseBody> {
    let (mut exchange, mut outgoing) = Exchange::begin(&session, request);
    exchange.set_edge(&service.edge(exchange.protocol));
    if let Err(error) = exchange.clean(&mut outgoing, || service.application.to_string()) {
        return exchange.refuse(&error);
    }
    if let Some(claims) = &service.claims {
        outgoing.parts.headers.insert(CLIENT_CERTIFICATE, claims.client_certificate.clone());
        outgoing.parts.headers.insert(IDENTITY, claims.identity.clone());
    }
    exchange.record.set_upstream(service.application);
    exchange.record.trace_server(&mut outgoing.parts.headers);
    let request = exchange.request(outgoing);
    match exchange.patiently(service.lane.send(request)).await {
        Ok(Ok(answered)) => exchange.answer(answered, None),
        Ok(Err(Unsent { error, .. })) => {
            let error = exchange.fault(error);
            exchange.refuse(&error)
        }
        Err(error) => exchange.refuse(&error),
    }
}

impl Caller {
    fn refused(&self, worker: &Worker, registered: &Registered, error: &Error) {
        let edge = self.edge(worker, WireProtocol::Tcp);
        let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
        record.downstream(registered.client);
        record.failed(error.reason, || error.to_string());
    }

    fn edge(&self, worker: &Worker, protocol: WireProtocol) -> Arc<Edge> {
        let (workload, namespace, principal) = match &self.peer {
            Some(peer) => (peer.workload.to_string(), peer.identity.namespace().to_owned(), peer.identity.to_string()),
            None => (UNKNOWN.to_owned(), UNKNOWN.to_owned(), String::new()),
        };
        worker.telemetry.edge(&EdgeLabels {
            direction: Direction::Inbound,
            source_workload: workload,
            source_namespace: namespace,
            source_principal: principal,
            destination_service: self.destination_service.clone(),
            destination_workload: worker.own.workload.clone(),
            destination_namespace: worker.own.namespace.clone(),
            protocol,
            mtls: self.peer.as_ref().is_some_and(|peer| peer.mtls),
            destination_principal: worker.own.principal.to_string(),
        })
    }
}
