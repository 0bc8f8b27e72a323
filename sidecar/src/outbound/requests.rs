//! HTTP to others: a connection of requests, and one request from its head to the answer's head, tried at another endpoint
//! when the first provably did nothing with it.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use http::{Request, Response};

use crate::balance::{InFlight, Kind, Outcome};
use crate::connect::backend::{Backend, Slot, View, lost_edge};
use crate::connect::lane::{Answered, Framing, Unprocessed, Unsent};
use crate::connect::request_body::{Received, RequestBody};
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::Stream;
use crate::outcome::{Error, Retry, Stage};
use crate::policy::Permit;
use crate::protocol::http::body::{Measured, ResponseBody};
use crate::protocol::http::exchange::{Exchange, Outgoing, Session};
use crate::protocol::http::headers::Strip;
use crate::protocol::http::serve;

use super::race::{self, Connected, Counted, Lost};
use super::refusal::{head_refusals, stream_refusals};
use super::route;
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
            return exchange.refuse_head(outgoing, &error);
        }
    };
    exchange.record.set_called(view.service.as_ref());
    if let Err(error) = exchange.clean(&mut outgoing, || view.authority()) {
        exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
        exchange.record.unattempted(&mut outgoing.parts.headers);
        return exchange.refuse_head(outgoing, &error);
    }
    if exchange.is_last_hop() {
        exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
        return exchange.answer_last_hop(outgoing);
    }
    // Without routes this look is all that they cost.
    if let Some(routes) = &view.routes {
        let routes = routes.clone();
        return Box::pin(route::respond(exchange, outgoing, view, routes, permit)).await;
    }
    let request = exchange.request(outgoing);
    match forward(&exchange, &view, request, permit).await {
        Ok((answered, load)) => exchange.answer(answered, Some(load)),
        Err(error) => exchange.refuse(&error),
    }
}

/// Balance, connect, send; to another endpoint when the first provably did nothing with the request.
pub(super) async fn forward(
    exchange: &Exchange,
    view: &View,
    mut request: Request<RequestBody>,
    _permit: Permit,
) -> Result<(Answered, Measured), Error> {
    let worker = &exchange.session.worker;
    let framing = if exchange.session.http2 { Framing::Http2 } else { Framing::Http1 };
    let mut tried = Tried::new(worker, view, Instant::now());
    loop {
        let chosen = choose(exchange, view, framing, &mut request, &mut tried).await;
        let Chosen { slot, load, mut began } = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                leave_head(request);
                return Err(error);
            }
        };
        let edge = view.edge(worker, &slot, exchange.protocol);
        exchange.set_edge(&edge);
        exchange.record.set_in_process(slot.target.own.is_some());
        exchange.record.attempt(request.headers_mut(), slot.target.address, began);
        if slot.target.is_mesh() && tried.leaves_some(view) {
            request.body_mut().keep(&worker.limits);
        }
        let sent = exchange.patiently(slot.lane(framing).send(request)).await?;
        let (error, unsent) = match sent {
            Err(Unsent { error, request }) => (exchange.fault(error), request),
            Ok(mut answered) => {
                let Some((error, request)) = elsewhere(&mut answered, &slot, view, &tried) else {
                    let measured = measured(worker, &answered, load);
                    return Ok((answered, measured));
                };
                answered.response.into_body().let_go();
                (error, Some(request))
            }
        };
        began = Instant::now();
        load.finish(worker.nanos(began), exchange.elapsed(), blame(&error));
        exchange.record.attempt_failed(error.reason, began);
        if !tried.may_go_on(&error) {
            unsent.into_iter().for_each(leave_head);
            return Err(error);
        }
        request = tried.again(error, unsent)?;
    }
}

/// The request goes nowhere: its head tells who asks of it why.
fn leave_head(request: Request<RequestBody>) {
    let (head, body) = request.into_parts();
    body.progress().leave_head(head);
}

/// The request, when its answer is that of a sidecar whose application has not seen it and another endpoint may serve it.
fn elsewhere(
    answered: &mut Answered,
    slot: &Slot,
    view: &View,
    tried: &Tried,
) -> Option<(Error, Request<RequestBody>)> {
    let Unprocessed { reason, request } = answered.unprocessed.as_deref_mut()?;
    if !tried.leaves_some(view) || !tried.may_begin() {
        return None;
    }
    let request = request.take()?;
    let detail = format!("{}: its sidecar could not reach the application", slot.target.address);
    Some((Error::upstream(Stage::Connect, *reason, Retry::Safe, detail), request))
}

/// How an answer that is passed on counts for its endpoint.
fn measured(worker: &Worker, answered: &Answered, guard: InFlight) -> Measured {
    let outcome = match answered {
        Answered { unprocessed: Some(_), .. } => Outcome::ConnectError,
        Answered { response, .. } if response.status().is_server_error() => Outcome::Failure5xx,
        Answered { .. } => Outcome::Success,
    };
    Measured { guard, at: worker.nanos(answered.at), latency: answered.latency, outcome }
}

/// An endpoint with a connection for the next request.
struct Chosen {
    slot: Rc<Slot>,
    load: InFlight,
    began: Instant,
}

impl Counted for InFlight {
    fn begin(view: &View, index: usize) -> Option<InFlight> {
        view.endpoints.start(index)
    }

    fn failed(self, worker: &Worker, began: Instant, error: &Error) {
        self.finish(worker.now(), began.elapsed(), blame(error));
    }
}

/// The endpoint that is best, when it has a connection that waits or none is needed; else one that connects first.
async fn choose(
    exchange: &Exchange,
    view: &View,
    framing: Framing,
    request: &mut Request<RequestBody>,
    tried: &mut Tried,
) -> Result<Chosen, Error> {
    let worker = &exchange.session.worker;
    let began = Instant::now();
    // A login that holds for one connection goes on there: nothing else is dialled beside it.
    let bound = if tried.may_begin() { view.bound(&exchange.session.bound, tried.indices()) } else { None };
    let pinned = bound.is_some();
    let pick = || view.pick(worker, Kind::Http, worker.nanos(began), tried.indices());
    // Of a name's addresses one with a connection is as good as the first.
    let waiting = poll_fn(|cx| Poll::Ready(view.waiting(framing, request.body(), tried.indices(), cx))).await;
    let picked = if tried.may_begin() { bound.or(waiting).or_else(pick) } else { None };
    let Some((index, slot)) = picked else {
        if tried.indices().is_empty() {
            exchange.set_edge(&view.unpicked_edge(worker, exchange.protocol));
            exchange.record.unattempted(request.headers_mut());
        }
        return Err(tried.last_error(view));
    };
    let warm = pinned || poll_fn(|cx| Poll::Ready(slot.lane(framing).is_warm(request.body(), cx))).await;
    if warm {
        tried.begin(index);
        let load = view.endpoints.start(index).ok_or_else(|| unavailable(view))?;
        return Ok(Chosen { slot, load, began });
    }
    let mut lost = Vec::new();
    let body = request.body();
    let open = async |slot: Rc<Slot>| slot.lane(framing).warm(body).await;
    let first = Some((index, slot));
    let connecting = race::connect::<InFlight, ()>(worker, view, Kind::Http, first, tried, &mut lost, open);
    let connected = Box::pin(connecting).await;
    for Lost { slot, began, ended, reason } in lost {
        exchange.set_edge(&view.edge(worker, &slot, exchange.protocol));
        exchange.record.attempt(request.headers_mut(), slot.target.address, began);
        exchange.record.attempt_failed(reason, ended);
    }
    connected.map(|Connected { slot, guard, began, .. }| Chosen { slot, load: guard, began })
}
