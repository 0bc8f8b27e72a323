//! HTTP to others: a connection of requests, and one request from its head to the answer's head, tried at another endpoint
//! when the first provably did nothing with it.

use std::rc::Rc;
use std::time::Instant;

use http::{Request, Response};

use crate::balance::{Kind, Outcome};
use crate::connect::backend::{Backend, View, lost_edge};
use crate::connect::lane::{Answered, Framing, Unsent};
use crate::connect::request_body::Received;
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::Stream;
use crate::outcome::Error;
use crate::policy::Permit;
use crate::protocol::http::body::{Measured, ResponseBody};
use crate::protocol::http::exchange::{Exchange, Outgoing, Session};
use crate::protocol::http::headers::Strip;
use crate::protocol::http::serve;

use super::refusal::{head_refusals, stream_refusals};
use super::tried::{Tried, blame, unavailable};

pub(super) async fn http1(
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

pub(super) async fn http2(
    worker: &Rc<Worker>,
    backend: &Rc<Backend>,
    stream: Stream,
    registered: &Rc<Registered>,
    permit: Permit,
) {
    registered.describe(|about| about.protocol = "http2");
    registered.speaks_http2();
    let session = Session::new(worker, registered, true, Strip::HopByHop);
    let on_refusal = stream_refusals(worker, backend);
    let (backend, inner) = (backend.clone(), session.clone());
    let respond = move |request| respond(inner.clone(), backend.clone(), request, permit);
    serve::http2(&session, stream, serve::Client::One, on_refusal, respond).await;
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

pub(super) async fn respond_to(
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
            exchange.record.set_called(backend.service());
            exchange.record.unattempted(&mut outgoing.parts.headers);
            return exchange.refuse(&error);
        }
    };
    exchange.record.set_called(view.service.as_ref());
    if let Err(error) = exchange.clean(&mut outgoing, || view.authority()) {
        exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
        exchange.record.unattempted(&mut outgoing.parts.headers);
        return exchange.refuse(&error);
    }
    if exchange.is_last_hop() {
        exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
        return exchange.answer_last_hop(outgoing);
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
        let bound = view.bound(&exchange.session.bound, tried.indices());
        let pick = || view.pick(worker, Kind::Http, worker.nanos(began), tried.indices());
        let Some((index, slot)) = bound.or_else(pick) else {
            if tried.indices().is_empty() {
                exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
                exchange.record.unattempted(request.headers_mut());
            }
            return Err(tried.last_error(view));
        };
        let edge = view.edge(worker, &slot, exchange.protocol);
        exchange.set_edge(&edge);
        let Some(load) = view.endpoints.start(index) else { return Err(unavailable(view)) };
        exchange.record.set_in_process(slot.target.own.is_some());
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
