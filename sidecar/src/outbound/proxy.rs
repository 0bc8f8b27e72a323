//! The forward proxy: each request says where it wants to go, and CONNECT leads back into the walk.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use http::{Method, Request, Response};
use outrigger_api::name::ServicePort;
use outrigger_api::snapshot::Key;

use crate::connect::backend::{Backend, lost_edge};
use crate::connect::request_body::Received;
use crate::connect::worker::Worker;
use crate::connection::{Registered, State};
use crate::discovery::Known;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};
use crate::policy::{self, Permit};
use crate::protocol::http::body::ResponseBody;
use crate::protocol::http::exchange::{Exchange, Session};
use crate::protocol::http::headers::Strip;
use crate::protocol::http::serve;
use crate::protocol::peek;

use super::addresses;
use super::refusal::head_refusals;
use super::requests::respond_to;
use super::walk;

/// Serves one connection to the forward proxy: each request says where it wants to go.
pub async fn serve_proxy(worker: Rc<Worker>, mut stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.protocol = "http-proxy");
    // Who says nothing is closed without a word, and who resets has nothing to be told.
    let Ok(None) = peek::begins(&mut stream, worker.limits.first_byte_timeout).await else { return };
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
            exchange.record.unattempted(&mut outgoing.parts.headers);
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
        let key = Key::Service(ServicePort { service, port });
        let backend = worker.backend(&key);
        match backend.view(worker).await {
            Ok(_) => return Ok(backend),
            // A known Service without this port is no name of the outside.
            Err(error) if matches!(worker.directory.remembered(&key), Some(Known::Registered(_))) => return Err(error),
            Err(error) if error.reason != Reason::NotRegistered || worker.registry_only() => return Err(error),
            Err(_) => {}
        }
    } else if worker.registry_only() {
        let detail = format!("{host} is not registered and outbound.mode is RegistryOnly");
        return Err(Error::own(Stage::Lookup, Reason::NotRegistered, detail));
    }
    addresses::resolve(worker, host, port).await
}
