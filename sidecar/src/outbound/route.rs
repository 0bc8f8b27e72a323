//! Where a request goes when routes bind the port that it was sent to: the rule that it follows, what the rule does to its
//! head, the backend that gets it. Only called where there are routes. Which rule, is decided in `outrigger_api::route`,
//! as for `explain`.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{HOST, HeaderMap, LOCATION, ORIGIN};
use http::request::Parts;
use http::{HeaderValue, Request as HttpRequest, Response};
use outrigger_api::facts::Request;
use outrigger_api::path::NormalPath;
use outrigger_api::route::{
    Asked, Backend, Chosen, Kind, Match, Retry as RouteRetry, Routes, Rule, To, choose, location,
};
use outrigger_api::snapshot::Key;

use super::requests::forward;
use super::{cors, edits, mirror};
use crate::connect::backend::{View, lost_edge};
use crate::connect::lane::{Answered, copy_head};
use crate::connect::request_body::RequestBody;
use crate::connect::worker::Worker;
use crate::outcome::{Error, Reason, Refuser, Retry, Side, Stage};
use crate::policy::{Fields, Permit};
use crate::protocol::http::body::{Measured, ResponseBody};
use crate::protocol::http::exchange::{Exchange, Outgoing};
use crate::telemetry::WireProtocol;

/// Answers one request that was sent to `front`, whose head is clean.
pub(super) async fn respond(
    exchange: Exchange,
    mut outgoing: Outgoing,
    front: Rc<View>,
    routes: Arc<Routes>,
    permit: Permit,
) -> Response<ResponseBody> {
    let worker = exchange.session.worker.clone();
    let Some(Chosen { rule, by }) = decide(&routes, exchange.protocol, &outgoing.parts) else {
        let error = nowhere(&front, &routes, &outgoing.parts);
        return refuse_unpicked(exchange, outgoing, &front, &error);
    };
    exchange.record.set_route(rule, by);
    if let Some((status, fields)) = own_answer(rule, by, &front, &outgoing.parts) {
        exchange.set_edge(&front.unpicked_edge(&worker, exchange.protocol));
        exchange.record.unattempted(&mut outgoing.parts.headers);
        return exchange.answer_here(status, fields);
    }
    let origin = rule.filters.cors.as_ref().and_then(|_| outgoing.parts.headers.get(ORIGIN).cloned());
    let picked = choose(&rule.backends, |below| worker.rng.borrow_mut().u64(0..below));
    let (backend, to) = match picked.map(|(_, backend)| (backend, &backend.to, &backend.invalid)) {
        Some((backend, Some(to), None)) => (backend, to),
        other => {
            let error = invalid(rule, other.map(|(backend, _, _)| backend));
            return refuse_unpicked(exchange, outgoing, &front, &error);
        }
    };
    let view = match destination(&worker, &front, to).await {
        Ok(view) => view,
        Err(error) => {
            exchange.set_edge(&lost_edge(&worker, exchange.protocol));
            exchange.record.set_called(Some(&to.0));
            exchange.record.unattempted(&mut outgoing.parts.headers);
            return exchange.refuse_head(outgoing, &error);
        }
    };
    exchange.record.set_called(view.service.as_ref());
    if let Some(rewrite) = &rule.filters.rewrite {
        edits::rewrite(&mut outgoing.parts, rewrite, by);
    }
    edits::edit(&mut outgoing.parts.headers, &rule.filters.request_headers);
    edits::edit(&mut outgoing.parts.headers, &backend.filters.request_headers);
    let mut request = exchange.request(outgoing);
    for mirror in &rule.filters.mirrors {
        mirror::send(&exchange, &front, mirror, &mut request);
    }
    let (answered, deadline) = match &rule.retry {
        None => {
            let deadline = deadline(&exchange, rule);
            (within(deadline, rule, forward(&exchange, &view, request, permit)).await, deadline)
        }
        Some(retry) => Box::pin(attempts(&exchange, rule, retry, &view, request, permit)).await,
    };
    match answered {
        Ok((answered, load)) => {
            let mut response = exchange.answer(answered, Some(load));
            edits::edit(response.headers_mut(), &rule.filters.response_headers);
            edits::edit(response.headers_mut(), &backend.filters.response_headers);
            if let (Some(cors), Some(origin)) = (&rule.filters.cors, &origin) {
                cors::note(cors, origin, response.headers_mut());
            }
            if let Some((at, reason)) = deadline {
                response.body_mut().end_by(at, reason);
            }
            response
        }
        Err(error) => exchange.refuse(&error),
    }
}

/// Who gets a connection of opaque bytes that was opened to `front`, and which of its endpoints may be dialled. `name`: the
/// server name of the application's own TLS.
pub(super) async fn of_connection(worker: &Rc<Worker>, front: Rc<View>, name: Option<&str>) -> Result<Rc<View>, Error> {
    let Some(routes) = front.routes.as_ref().filter(|routes| !routes.kind.is_http()) else { return Ok(front) };
    let Some(Chosen { rule, .. }) = routes.decide_connection(name, &mut ()) else {
        let called = front.service.as_ref().map(ToString::to_string).unwrap_or_default();
        let (kind, name) = (routes.kind, name.unwrap_or("none"));
        let detail = format!("no rule of the {kind}s that bind {called} is for the server name {name}");
        return Err(Error::own(Stage::Route, Reason::RouteNotFound, detail));
    };
    match choose(&rule.backends, |below| worker.rng.borrow_mut().u64(0..below)) {
        Some((_, Backend { to: Some(to), invalid: None, .. })) => destination(worker, &front, to).await,
        other => Err(invalid(rule, other.map(|(_, backend)| backend))),
    }
}

/// Whether the server name has to be known before an endpoint is dialled.
pub(super) fn needs_name(view: &View) -> bool {
    view.routes.as_ref().is_some_and(|routes| routes.kind == Kind::Tls)
}

fn decide<'r>(routes: &'r Routes, protocol: WireProtocol, parts: &Parts) -> Option<Chosen<'r>> {
    if !routes.kind.is_http() {
        return routes.decide_connection(None, &mut ());
    }
    let target = target(parts);
    let path = NormalPath::of(target);
    let fields = Fields(&parts.headers);
    let request = Request {
        method: parts.method.as_str(),
        path: &path,
        query: parts.uri.query(),
        host: host(parts),
        headers: &fields,
        claims: None,
    };
    let query = target.split_once('?').map(|(_, query)| query);
    routes.decide(&Asked { request: &request, query, grpc: protocol == WireProtocol::Grpc }, &mut ())
}

/// Path and query.
fn target(parts: &Parts) -> &str {
    parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str)
}

fn host(parts: &Parts) -> &str {
    let field = || parts.headers.get(HOST).and_then(|value: &HeaderValue| value.to_str().ok());
    parts.uri.authority().map(http::uri::Authority::as_str).or_else(field).unwrap_or_default()
}

/// What a rule answers by itself: a redirect, or that to a preflight.
fn own_answer(rule: &Rule, by: &Match, front: &View, parts: &Parts) -> Option<(u16, HeaderMap)> {
    if let Some(fields) = rule.filters.cors.as_ref().and_then(|cors| cors::preflight(cors, parts)) {
        return Some((200, fields));
    }
    let redirect = rule.filters.redirect.as_ref()?;
    let port = front.service.as_ref().map_or(80, |service| service.port);
    let place = location(redirect, by, host(parts), port, target(parts));
    let mut fields = HeaderMap::new();
    fields.extend(HeaderValue::from_str(&place).ok().map(|place| (LOCATION, place)));
    edits::edit(&mut fields, &rule.filters.response_headers);
    Some((redirect.status, fields))
}

/// What a backend's name stands for now. The parent itself is the view that the request began with.
pub(super) async fn destination(worker: &Rc<Worker>, front: &Rc<View>, to: &To) -> Result<Rc<View>, Error> {
    if front.service.as_ref() == Some(&to.0) {
        return Ok(front.clone());
    }
    worker.backend(&Key::Service(to.0.clone())).view(worker).await
}

type Answer = Result<(Answered, Measured), Error>;

/// Tries again what got no answer, or one with a status that the rule lists, as long as it may be sent twice: without a body,
/// by an idempotent method or under a key that makes it so.
async fn attempts(
    exchange: &Exchange,
    rule: &Rule,
    retry: &RouteRetry,
    view: &View,
    request: HttpRequest<RequestBody>,
    permit: Permit,
) -> (Answer, Option<(Instant, Reason)>) {
    let may_repeat = request.body().is_empty()
        && (request.method().is_idempotent() || request.headers().contains_key("idempotency-key"));
    let mut left = if may_repeat { retry.attempts } else { 0 };
    let mut request = request;
    let mut pause = Duration::from_millis(retry.backoff.unwrap_or(25));
    loop {
        let again = (left > 0).then(|| {
            let (parts, body) = (copy_head(&request), request.body().clone_empty());
            HttpRequest::from_parts(parts, body)
        });
        let deadline = deadline(exchange, rule);
        let answered = within(deadline, rule, forward(exchange, view, request, permit)).await;
        let failed = match &answered {
            Ok((answered, _)) => retry.codes.contains(&answered.response.status().as_u16()),
            Err(error) => error.side == Side::Upstream && error.reason != Reason::RequestTimeout,
        };
        let (Some(next), true) = (again, failed) else { return (answered, deadline) };
        let ends = rule.timeouts.request.map(|millis| exchange.begun() + Duration::from_millis(millis));
        // Half of the pause at least, so that not all come back at once.
        let wait = pause.mul_f64(0.5 + exchange.session.worker.rng.borrow_mut().f64() / 2.0);
        if ends.is_some_and(|ends| Instant::now() + wait >= ends) {
            return (answered, deadline);
        }
        if let Ok((_, Measured { guard, at, latency, outcome })) = answered {
            guard.finish(at, latency, outcome);
        }
        tokio::time::sleep(wait).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        left -= 1;
        request = next;
    }
}

/// However often it was tried.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// When the answer has to be whole, and what it is called when it is not. Without a limit no clock is read.
fn deadline(exchange: &Exchange, rule: &Rule) -> Option<(Instant, Reason)> {
    let request = rule.timeouts.request.map(|millis| (exchange.begun(), millis, Reason::RequestTimeout));
    let attempt = rule.timeouts.backend_request.map(|millis| (Instant::now(), millis, Reason::AttemptTimeout));
    let ends = request.into_iter().chain(attempt);
    ends.map(|(from, millis, reason)| (from + Duration::from_millis(millis), reason)).min_by_key(|(at, _)| *at)
}

/// Waits for an answer's head as long as the rule allows. Without a limit there is no timer.
async fn within<F>(deadline: Option<(Instant, Reason)>, rule: &Rule, sending: F) -> Result<(Answered, Measured), Error>
where
    F: Future<Output = Result<(Answered, Measured), Error>>,
{
    let Some((at, reason)) = deadline else { return sending.await };
    tokio::time::timeout_at(at.into(), sending).await.unwrap_or_else(|_| {
        let detail = format!("no answer within the time that {rule} allows");
        Err(Error::upstream(Stage::Route, reason, Retry::Never, detail))
    })
}

fn nowhere(front: &View, routes: &Routes, parts: &Parts) -> Error {
    let called = front.service.as_ref().map(ToString::to_string).unwrap_or_default();
    let (kind, path) = (routes.kind, parts.uri.path());
    let detail = format!("no rule of the {kind}s that bind {called} matches {} {path}", parts.method);
    Error::own(Stage::Route, Reason::RouteNotFound, detail)
}

/// Why the share of a backend gets no answer.
fn invalid(rule: &Rule, backend: Option<&Backend>) -> Error {
    let why = match backend {
        Some(backend) => backend.invalid.clone().unwrap_or_else(|| "it is no Service".to_owned()),
        None => "none of its backendRefs has a weight".to_owned(),
    };
    let by = Refuser { object: rule.object.to_string(), rule: Some(rule.index), told: true };
    Error::own(Stage::Route, Reason::BackendInvalid, format!("{rule}: {why}")).by(Some(by))
}

fn refuse_unpicked(exchange: Exchange, mut outgoing: Outgoing, front: &View, error: &Error) -> Response<ResponseBody> {
    exchange.set_edge(&front.unpicked_edge(&exchange.session.worker, exchange.protocol));
    exchange.record.unattempted(&mut outgoing.parts.headers);
    exchange.refuse_head(outgoing, error)
}
