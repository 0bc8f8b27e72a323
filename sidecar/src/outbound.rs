//! The outbound walk: what the application sends to others. Lookup, detect, policy, route, balance, connect, forward.
//! What is over when bytes flow is boxed: a connection's task is as large as its largest part for as long as it lives.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::{Method, Request, Response};
use outrigger_api::name::{Protocol, ServicePort};
use outrigger_api::snapshot::Key;
use outrigger_runtime::drain::Hold;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::balance::{Kind, Outcome};
use crate::connect::backend::{Backend, Slot, View, lost_edge};
use crate::connect::dial::Dialled;
use crate::connect::lane::{Answered, Framing, Unsent};
use crate::connect::request_body::Received;
use crate::connect::worker::Worker;
use crate::connection::{Registered, State};
use crate::net::{OriginalDst, Stream};
use crate::outcome::{Error, Reason, Retry, Side, Stage};
use crate::policy::{self, Permit};
use crate::protocol::detect::Detected;
use crate::protocol::http::body::{Measured, ResponseBody};
use crate::protocol::http::exchange::{Exchange, Outgoing, Session};
use crate::protocol::http::headers::Strip;
use crate::protocol::http::serve;
use crate::protocol::opaque::{self, CopyError};
use crate::protocol::peek::{self, Peeked};
use crate::protocol::silence::{self, First, Moment};
use crate::protocol::sni::{self, Sniffed};
use crate::redirect;
use crate::telemetry::{self, Edge, TcpRecord, WireProtocol};
use crate::tls::MeshAlpn;

/// Serves one connection of the application to one destination.
pub async fn serve(worker: Rc<Worker>, key: Key, stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.destination = key.to_string());
    let backend = worker.backend(&key);
    walk(&worker, &backend, stream, &registered).await;
}

/// Serves one redirected connection, to where the application meant it to go. What nobody registered passes through with
/// its bytes untouched.
pub async fn serve_redirected(worker: Rc<Worker>, stream: TcpStream, registered: Rc<Registered>) {
    let original = match OriginalDst::of(&stream) {
        Ok(original) => original.address(),
        Err(error) => return turn_away(&worker, stream, &registered, &error),
    };
    if redirect::is_probe(original) {
        return answer_probe(&worker, stream, original).await;
    }
    if redirect::is_exempt_target(original) {
        return;
    }
    registered.describe(|about| about.destination = original.to_string());
    let backend = worker.backend(&Key::Address(original));
    let view = backend.view(&worker).await;
    if worker.dialer.has_opened(registered.client, original) {
        let detail = format!(
            "this sidecar's own connection to {original} came back: the redirect rules do not exempt it. Run it as the user \
             of `redirect apply --uid` (1337), or with the same --mark for `run` and `redirect apply`"
        );
        let error = Error::own(Stage::Accept, Reason::OwnPort, detail);
        return turn_away(&worker, stream, &registered, &error);
    }
    match view {
        Ok(view) if view.service.is_none() => {
            pass(&worker, &view, stream.into(), &registered, policy::admit_outbound()).await;
        }
        Ok(_) | Err(_) => walk(&worker, &backend, stream.into(), &registered).await,
    }
}

/// Closes a connection that is nobody's to carry.
fn turn_away(worker: &Worker, stream: TcpStream, registered: &Registered, error: &Error) {
    let record = TcpRecord::begin(&worker.telemetry, &lost_edge(worker, WireProtocol::Tcp), Instant::now());
    record.downstream(registered.client);
    record.failed(error.reason, || error.to_string());
    Stream::from(stream).reset_on_close();
}

/// `redirect check` asks whether its connection arrives here, and with the address that it dialled.
async fn answer_probe(worker: &Worker, mut stream: TcpStream, original: SocketAddr) {
    let comes_back = worker.dialer.comes_back(redirect::exempt_target(original)).await;
    let answer = if comes_back { redirect::complaint(original) } else { redirect::answer(original) };
    // Who asks sees an answer that is missing for himself.
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

async fn walk(worker: &Rc<Worker>, backend: &Rc<Backend>, mut stream: Stream, registered: &Rc<Registered>) {
    // A lookup that failed is told to an HTTP client in its own protocol, so detection goes on without it.
    let view = backend.view(worker).await;
    let declared = view.as_ref().ok().and_then(|view| view.declared(worker));
    let permit = policy::admit_outbound();
    let limits = &worker.limits;
    let peeked = match declared {
        Some(Protocol::Tcp) => return opaque(worker, view, stream, registered, WireProtocol::Tcp, permit).await,
        Some(Protocol::Tls) => return opaque(worker, view, stream, registered, WireProtocol::Tls, permit).await,
        // The client speaks first: it may take as long as it likes to begin.
        Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => {
            peek::speaks_or_waits(&mut stream, limits.client_idle, limits.head_timeout).await
        }
        None => return undeclared(worker, backend, view, stream, registered, permit).await,
    };
    let known = view.as_deref().ok();
    match peeked {
        Ok(Peeked::Speaks(Detected::Http2)) => Box::pin(http2(worker, backend, stream, registered, permit)).await,
        Ok(Peeked::Speaks(Detected::Tls)) => {
            let error = Error::downstream(Stage::Detect, Reason::ProtocolMismatch, "TLS on a port declared as HTTP");
            refuse_connection(worker, known, &stream, &error);
        }
        // What is not HTTP at all is told by the parser what is wrong with it.
        Ok(Peeked::Speaks(Detected::Http1 | Detected::Opaque)) => {
            http1(worker, backend, known, stream, registered, permit).await;
        }
        Ok(Peeked::Silent | Peeked::Left) => {}
        Err(error) => refuse_head(worker, known, stream, &error).await,
    }
}

/// A port whose protocol nobody declared: whoever speaks first decides, the client's bytes in any case.
async fn undeclared(
    worker: &Rc<Worker>,
    backend: &Rc<Backend>,
    view: Result<Rc<View>, Error>,
    mut stream: Stream,
    registered: &Rc<Registered>,
    permit: Permit,
) {
    let known = view.as_deref().ok();
    // It may be long before somebody speaks: what was known then is asked again.
    let open = async || dial(worker, &backend.view(worker).await?, permit).await;
    let key = known.and_then(|view| view.service.clone()).map_or_else(|| backend.key().clone(), Key::Service);
    let opened = match Box::pin(silence::first(worker, &key, &mut stream, Moment::AsRemembered, open)).await {
        Ok(First::Client(opened)) => opened,
        Ok(First::Server(opened)) => {
            worker.telemetry.detected(telemetry::Detected::ServerFirst);
            return copy(worker, stream, opened, registered, WireProtocol::Tcp).await;
        }
        Ok(First::Nobody) => return,
        Err(error) => return refuse_connection(worker, known, &stream, &error),
    };
    let protocol = match counted(worker, Box::pin(silence::decide(worker, &mut stream)).await) {
        Ok(Peeked::Speaks(Detected::Http1)) => {
            opened.into_iter().for_each(silence::leave);
            return http1(worker, backend, known, stream, registered, permit).await;
        }
        Ok(Peeked::Speaks(Detected::Http2)) => {
            opened.into_iter().for_each(silence::leave);
            return Box::pin(http2(worker, backend, stream, registered, permit)).await;
        }
        Ok(Peeked::Speaks(Detected::Tls)) => WireProtocol::Tls,
        Ok(Peeked::Speaks(Detected::Opaque)) => WireProtocol::Tcp,
        Ok(Peeked::Silent | Peeked::Left) => return,
        Err(error) => return refuse_head(worker, known, stream, &error).await,
    };
    match opened {
        Some(opened) => copy(worker, stream, opened, registered, protocol).await,
        None => opaque(worker, backend.view(worker).await, stream, registered, protocol, permit).await,
    }
}

/// Counts how the protocol of an undeclared port was found.
fn counted(worker: &Worker, peeked: Result<Peeked, Error>) -> Result<Peeked, Error> {
    if let Ok(Peeked::Speaks(detected)) = &peeked {
        worker.telemetry.detected((*detected).into());
    }
    peeked
}

// --- HTTP ---------------------------------------------------------------------------------------------------

async fn http1(
    worker: &Rc<Worker>,
    backend: &Rc<Backend>,
    known: Option<&View>,
    stream: Stream,
    registered: &Rc<Registered>,
    permit: Permit,
) {
    registered.describe(|about| about.protocol = "http1");
    let session = Session::new(worker, registered, false, Strip::HopByHop);
    let on_refusal = head_refusals(worker, known);
    let respond = |request| respond(session.clone(), backend.clone(), request, permit);
    serve::http1(&session, stream, on_refusal, respond).await;
}

async fn http2(
    worker: &Rc<Worker>,
    backend: &Rc<Backend>,
    stream: Stream,
    registered: &Rc<Registered>,
    permit: Permit,
) {
    registered.describe(|about| about.protocol = "http2");
    let session = Session::new(worker, registered, true, Strip::HopByHop);
    let streams = worker.limits.h2_streams_application;
    let (backend, inner) = (backend.clone(), session.clone());
    let respond = move |request| respond(inner.clone(), backend.clone(), request, permit);
    serve::http2(&session, stream, streams, respond).await;
}

/// One request, from its head to the answer's head.
async fn respond(
    session: Rc<Session>,
    backend: Rc<Backend>,
    request: Request<Received>,
    permit: Permit,
) -> Response<ResponseBody> {
    let (exchange, outgoing) = Exchange::begin(&session, request);
    respond_to(exchange, outgoing, &backend, permit).await
}

async fn respond_to(
    mut exchange: Exchange,
    mut outgoing: Outgoing,
    backend: &Backend,
    permit: Permit,
) -> Response<ResponseBody> {
    let session = exchange.session.clone();
    let worker = &session.worker;
    let view = match backend.view(worker).await {
        Ok(view) => view,
        Err(error) => {
            exchange.set_edge(&lost_edge(worker, exchange.protocol));
            return exchange.refuse(&error);
        }
    };
    if let Err(error) = exchange.clean(&mut outgoing, || view.authority()) {
        exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
        return exchange.refuse(&error);
    }
    match forward(&exchange, &view, outgoing, permit).await {
        Ok((answered, load)) => exchange.answer(answered, Some(load)),
        Err(error) => exchange.refuse(&error),
    }
}

/// Balance, connect, send; to another endpoint when the first provably did nothing with the request.
async fn forward(
    exchange: &Exchange,
    view: &View,
    outgoing: Outgoing,
    _permit: Permit,
) -> Result<(Answered, Measured), Error> {
    let worker = &exchange.session.worker;
    let framing = if exchange.session.http2 { Framing::Http2 } else { Framing::Http1 };
    let mut request = exchange.request(outgoing);
    let mut began = Instant::now();
    let mut tried = Tried::new(worker, began);
    loop {
        let Some((index, slot)) = view.pick(worker, Kind::Http, worker.nanos(began), tried.indices()) else {
            if tried.indices().is_empty() {
                exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
            }
            return Err(tried.last.take().unwrap_or_else(|| unavailable(view)));
        };
        let edge = view.edge(worker, &slot, exchange.protocol);
        exchange.set_edge(&edge);
        let Some(load) = view.endpoints.start(index) else { return Err(unavailable(view)) };
        exchange.record.attempt(request.headers_mut(), slot.target.address, began);
        match exchange.patiently(slot.lane(framing).send(request)).await? {
            Ok(answered) => {
                let failed = answered.response.status().is_server_error();
                let outcome = if failed { Outcome::Failure5xx } else { Outcome::Success };
                let at = worker.nanos(answered.at);
                let measured = Measured { guard: load, at, latency: answered.latency, outcome };
                return Ok((answered, measured));
            }
            Err(Unsent { error, request: unsent }) => {
                let error = exchange.fault(error);
                began = Instant::now();
                load.finish(worker.nanos(began), exchange.elapsed(), blame(&error));
                exchange.record.attempt_failed(error.reason, began);
                request = tried.again(index, error, unsent)?;
            }
        }
    }
}

/// Only what the endpoint did wrong counts against it.
fn blame(error: &Error) -> Outcome {
    match error.side {
        Side::Upstream => Outcome::ConnectError,
        Side::Downstream | Side::Own => Outcome::Cancelled,
    }
}

/// The endpoints that one request or connection has tried.
struct Tried {
    indices: [usize; Tried::MOST],
    count: usize,
    tries: usize,
    until: Instant,
    last: Option<Error>,
}

impl Tried {
    const MOST: usize = 8;

    fn new(worker: &Worker, began: Instant) -> Tried {
        let tries = (worker.limits.connect_tries as usize).clamp(1, Tried::MOST);
        let until = began + worker.limits.connect_budget;
        Tried { indices: [0; Tried::MOST], count: 0, tries, until, last: None }
    }

    fn indices(&self) -> &[usize] {
        &self.indices[..self.count]
    }

    /// Notes a failure; gives back what may be tried elsewhere.
    fn again<T>(&mut self, index: usize, error: Error, what: Option<T>) -> Result<T, Error> {
        match what {
            Some(what) if error.retry == Retry::Safe && self.count + 1 < self.tries && Instant::now() < self.until => {
                self.indices[self.count] = index;
                self.count += 1;
                self.last = Some(error);
                Ok(what)
            }
            _ => Err(error),
        }
    }
}

fn unavailable(view: &View) -> Error {
    let detail = match &view.service {
        Some(service) => format!("{service} has {} endpoints, none can be used", view.endpoints.len()),
        None => "no endpoint".to_owned(),
    };
    Error::upstream(Stage::Balance, Reason::DestinationUnavailable, Retry::Never, detail)
}

// --- bytes that are not parsed --------------------------------------------------------------------------------

async fn opaque(
    worker: &Rc<Worker>,
    view: Result<Rc<View>, Error>,
    stream: Stream,
    registered: &Rc<Registered>,
    protocol: WireProtocol,
    permit: Permit,
) {
    let view = match view {
        Ok(view) => view,
        Err(error) => return refuse_connection(worker, None, &stream, &error),
    };
    match dial(worker, &view, permit).await {
        Ok(opened) => copy(worker, stream, opened, registered, protocol).await,
        Err(error) => refuse_connection(worker, Some(&view), &stream, &error),
    }
}

/// What nobody registered: to where the application meant it to go, without a look at more than whether it is TLS. Either
/// side may speak first, or end first.
async fn pass(worker: &Rc<Worker>, view: &Rc<View>, mut stream: Stream, registered: &Rc<Registered>, permit: Permit) {
    let mut opened = match dial(worker, view, permit).await {
        Ok(opened) => opened,
        Err(error) => return refuse_connection(worker, Some(view), &stream, &error),
    };
    let spoken = sni::somebody_spoke(&mut stream, &mut opened.dialled.stream, worker.limits.tunnel_idle).await;
    let sniffed = match spoken {
        Ok(()) if stream.ahead().is_empty() => Ok(Sniffed::Other),
        Ok(()) => Box::pin(sni::sniff(&mut stream, worker.limits.detect_wait)).await.map_err(CopyError::Downstream),
        Err(error) => Err(error),
    };
    let protocol = match sniffed {
        Ok(Sniffed::Tls(_)) => WireProtocol::Tls,
        Ok(Sniffed::Other) => WireProtocol::Tcp,
        Err(error) => {
            opened.dialled.stream.reset_on_close();
            let error = match error {
                CopyError::Downstream(error) => peek::left(&error),
                CopyError::Upstream(error) => {
                    Error::upstream(Stage::Forward, Reason::UpstreamReset, Retry::Never, error.to_string())
                }
            };
            return refuse_connection(worker, Some(view), &stream, &error);
        }
    };
    copy(worker, stream, opened, registered, protocol).await;
}

/// An open upstream. It counts as an opaque connection only when it turns out to be one: see [`copy`].
struct Opened {
    dialled: Dialled,
    view: Rc<View>,
    slot: Rc<Slot>,
    _load: crate::balance::Open,
    _hold: Hold,
}

impl AsMut<Stream> for Opened {
    fn as_mut(&mut self) -> &mut Stream {
        &mut self.dialled.stream
    }
}

async fn dial(worker: &Rc<Worker>, view: &Rc<View>, _permit: Permit) -> Result<Opened, Error> {
    let mut tried = Tried::new(worker, Instant::now());
    loop {
        let Some((index, slot)) = view.pick(worker, Kind::Tcp, worker.now(), tried.indices()) else {
            return Err(tried.last.take().unwrap_or_else(|| unavailable(view)));
        };
        let Some(load) = view.endpoints.open(index) else { return Err(unavailable(view)) };
        match Box::pin(worker.dialer.dial(&slot.target, MeshAlpn::Tcp)).await {
            Ok(dialled) => {
                load.connected(worker.now(), Outcome::Success);
                let view = view.clone();
                return Ok(Opened { dialled, view, slot, _load: load, _hold: worker.drain.hold() });
            }
            Err(error) => {
                load.connected(worker.now(), blame(&error));
                tried.again(index, error, Some(()))?;
            }
        }
    }
}

async fn copy(
    worker: &Rc<Worker>,
    mut stream: Stream,
    opened: Opened,
    registered: &Registered,
    protocol: WireProtocol,
) {
    let sniffed = if protocol == WireProtocol::Tls {
        Box::pin(sni::sniff(&mut stream, worker.limits.detect_wait)).await
    } else {
        Ok(Sniffed::Other)
    };
    registered.describe(|about| {
        about.protocol = protocol.as_str();
        about.mtls = opened.dialled.peer.is_some();
    });
    registered.enter(State::Tunnel);
    let edge = opened.view.edge(worker, &opened.slot, protocol);
    let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
    record.upstream(opened.slot.target.address);
    record.downstream(registered.client);
    match sniffed {
        Ok(Sniffed::Tls(name)) => {
            registered.describe(|about| about.sni = name.clone());
            record.sni(name);
        }
        Ok(Sniffed::Other) => {}
        Err(error) => {
            opened.dialled.stream.reset_on_close();
            return record.failed(Reason::ClientClosed, || error.to_string());
        }
    }
    let forth = |count| record.add_received(count);
    let back = |count| record.add_sent(count);
    match opaque::copy(stream, opened.dialled.stream, registered, forth, back).await {
        Ok(()) => {}
        Err(CopyError::Downstream(error)) => record.failed(Reason::ClientClosed, || error.to_string()),
        Err(CopyError::Upstream(error)) => record.failed(Reason::UpstreamReset, || error.to_string()),
    }
}

// --- refusals that are no HTTP exchange -------------------------------------------------------------------------

/// Counts a connection that ends before anything was forwarded, and closes it so that it looks like an error.
fn refuse_connection(worker: &Worker, view: Option<&View>, stream: &Stream, error: &Error) {
    let protocol = WireProtocol::Tcp;
    let edge = unpicked(worker, view, protocol);
    let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
    record.failed(error.reason, || error.to_string());
    stream.reset_on_close();
}

/// A first line that never ended: 408 in the protocol that it was the beginning of.
async fn refuse_head(worker: &Worker, view: Option<&View>, mut stream: Stream, error: &Error) {
    if error.reason == Reason::RequestHeadTimeout {
        serve::refuse_head(&mut stream, error.reason, &worker.own.instance).await;
    }
    let protocol = WireProtocol::Http1;
    let edge = unpicked(worker, view, protocol);
    serve::count_refused_head(&worker.telemetry, &edge, error.reason);
}

/// Counts heads that the parser refused, for the service of the listener if it has one.
fn head_refusals(worker: &Rc<Worker>, view: Option<&View>) -> serve::OnRefusal {
    let edge = unpicked(worker, view, WireProtocol::Http1);
    let telemetry = worker.telemetry.clone();
    Box::new(move |reason| serve::count_refused_head(&telemetry, &edge, reason))
}

/// The edge of what ends before an endpoint is picked.
fn unpicked(worker: &Worker, view: Option<&View>, protocol: WireProtocol) -> Arc<Edge> {
    view.map_or_else(|| lost_edge(worker, protocol), |view| view.unpicked_edge(worker, protocol))
}

// --- the forward proxy --------------------------------------------------------------------------------------------

/// Serves one connection to the forward proxy: each request says where it wants to go.
pub async fn serve_proxy(worker: Rc<Worker>, stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.protocol = "http-proxy");
    let session = Session::new(&worker, &registered, false, Strip::HopByHop);
    let permit = policy::admit_outbound();
    let respond = |request| proxy(session.clone(), request, permit);
    serve::http1(&session, stream, head_refusals(&worker, None), respond).await;
}

async fn proxy(session: Rc<Session>, request: Request<Received>, permit: Permit) -> Response<ResponseBody> {
    let (exchange, mut outgoing) = Exchange::begin(&session, request);
    let worker = &session.worker;
    outgoing.parts.headers.remove(http::header::PROXY_AUTHORIZATION);
    let backend = match destination(worker, &outgoing.parts).await {
        Ok(backend) => backend,
        Err(error) => {
            exchange.set_edge(&lost_edge(worker, exchange.protocol));
            return exchange.refuse(&error);
        }
    };
    if outgoing.parts.method != Method::CONNECT {
        return respond_to(exchange, outgoing, &backend, permit).await;
    }
    let (worker, registered) = (session.worker.clone(), session.registered.clone());
    exchange.connected(Box::new(move |stream| {
        Box::pin(async move {
            registered.enter(State::Opening);
            walk(&worker, &backend, stream, &registered).await;
        })
    }))
}

/// Who is meant by the authority of a request to the proxy.
async fn destination(worker: &Worker, parts: &http::request::Parts) -> Result<Rc<Backend>, Error> {
    let wrong = |detail| Error::downstream(Stage::Lookup, Reason::BadRequest, detail);
    let Some(authority) = parts.uri.authority() else {
        return Err(wrong("a forward proxy takes absolute-form targets and CONNECT"));
    };
    if parts.uri.scheme().is_some_and(|scheme| *scheme != http::uri::Scheme::HTTP) {
        return Err(wrong("the forward proxy takes http:// targets; use CONNECT for others"));
    }
    let port = match (authority.port_u16(), &parts.method) {
        (Some(0), _) => return Err(wrong("port 0")),
        (Some(port), _) => port,
        (None, &Method::CONNECT) => return Err(wrong("CONNECT needs a port")),
        (None, _) => 80,
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(worker.backend(&Key::Address(SocketAddr::new(ip, port))));
    }
    if let Ok(service) = outrigger_api::name::ServiceName::parse(host, &worker.own.namespace) {
        let backend = worker.backend(&Key::Service(ServicePort { service, port }));
        match backend.view(worker).await {
            Ok(_) => return Ok(backend),
            Err(error) if error.reason != Reason::NotRegistered || worker.registry_only() => return Err(error),
            Err(_) => {}
        }
    } else if worker.registry_only() {
        let detail = format!("{host} is not registered and outbound.mode is RegistryOnly");
        return Err(Error::own(Stage::Lookup, Reason::NotRegistered, detail));
    }
    let unknown = |detail: String| Error::own(Stage::Lookup, Reason::UnknownDestination, detail);
    let budget = worker.limits.connect_budget;
    let resolving = tokio::time::timeout(budget, tokio::net::lookup_host((host, port)));
    let resolved = resolving.await.map_err(|_| unknown(format!("{host}: no answer within {budget:?}")))?;
    let mut addresses = resolved.map_err(|error| unknown(format!("{host}: {error}")))?;
    let address = addresses.next().ok_or_else(|| unknown(format!("{host} has no address")))?;
    Ok(worker.backend(&Key::Address(address)))
}

#[cfg(test)]
mod tests {
    fn size<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// What every connection costs for as long as it lives, before any library's part.
    #[test]
    fn a_connections_task_is_small() {
        let bytes = size(super::serve);
        assert!(bytes <= 3500, "{bytes} bytes");
    }
}
