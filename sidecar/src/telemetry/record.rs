//! The record of one HTTP request, filled on the way and finished exactly once: counted, logged, its spans ended. The
//! data path makes one per request on its worker and shares it as `Rc` between the head and both bodies; dropped
//! before the response ended, it says itself that the client left. It never touches a body.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::header::{HOST, HeaderMap, HeaderValue, USER_AGENT};
use http::{Method, Uri};
use outrigger_api::name::ServicePort;
use outrigger_api::route::{Match, PathMatch, Rule};

use crate::outcome::Reason;

use super::Telemetry;
use super::access_log::{Entry, PolicyFacts};
use super::context::{Ids, Incoming};
use super::edge::{Edge, Ended, Outcome};
use super::labels::{MethodLabel, WireProtocol};
use super::span::{Facts, Kind};
use super::text::ShortText;

pub struct HttpRecord {
    telemetry: Arc<Telemetry>,
    /// Set by the caller when it is known; the last one is counted on.
    edge: RefCell<Option<Arc<Edge>>>,
    method: MethodLabel,
    started: Instant,
    request_bytes: Cell<u64>,
    response_bytes: Cell<u64>,
    grpc_messages: Cell<u64>,
    status: Cell<Option<u16>>,
    grpc_status: Cell<Option<u8>>,
    reason: Cell<Option<Reason>>,
    response_ended: Cell<bool>,
    finished: Cell<bool>,
    downstream: Cell<Option<SocketAddr>>,
    upstream: Cell<Option<SocketAddr>>,
    /// The Service that is called, for spans.
    called: RefCell<Option<ServicePort>>,
    /// Nothing of it is on a wire: the workload calls itself.
    in_process: Cell<bool>,
    /// Log and spans only.
    words: RefCell<Words>,
    /// The trace that goes on; 0: none yet.
    trace_id: Cell<u128>,
    /// The trace that the caller named, for a log line about a request that got no further; 0: none.
    named_trace: Cell<u128>,
    /// Made when the trace is sampled.
    trace: RefCell<Option<Box<SampledTrace>>>,
}

/// What a person reads of the request; empty unless it may be logged or traced.
struct Words {
    method: Option<Method>,
    path: ShortText<96>,
    authority: ShortText<56>,
    /// For the span's name: few values, never a path.
    template: Option<Arc<str>>,
    /// The route and the rule, for the log.
    route: Option<(Arc<str>, usize)>,
    detail: Option<String>,
    policy: Option<Box<PolicyFacts>>,
}

struct SampledTrace {
    kind: Kind,
    incoming: Incoming,
    /// The span that is open.
    ids: Ids,
    opened: Instant,
    resend: u32,
    user_agent: Option<String>,
}

/// How a span ends.
struct SpanEnd {
    at: Instant,
    status: Option<u16>,
    grpc_status: Option<u8>,
    reason: Option<Reason>,
}

impl HttpRecord {
    /// Begins when the request's head is there. Without an edge the request is in flight nowhere until
    /// [`set_edge`](HttpRecord::set_edge).
    pub fn begin(telemetry: &Arc<Telemetry>, edge: Option<&Arc<Edge>>, method: &Method, now: Instant) -> HttpRecord {
        if let Some(edge) = edge {
            edge.enter();
        }
        HttpRecord {
            telemetry: telemetry.clone(),
            edge: RefCell::new(edge.cloned()),
            method: method.into(),
            started: now,
            request_bytes: Cell::new(0),
            response_bytes: Cell::new(0),
            grpc_messages: Cell::new(0),
            status: Cell::new(None),
            grpc_status: Cell::new(None),
            reason: Cell::new(None),
            response_ended: Cell::new(false),
            finished: Cell::new(false),
            downstream: Cell::new(None),
            upstream: Cell::new(None),
            called: RefCell::default(),
            in_process: Cell::new(false),
            words: RefCell::new(Words {
                method: None,
                path: ShortText::empty(),
                authority: ShortText::empty(),
                template: None,
                route: None,
                detail: None,
                policy: None,
            }),
            trace_id: Cell::new(0),
            named_trace: Cell::new(0),
            trace: RefCell::new(None),
        }
    }

    /// Keeps what log and spans will need of the head; does nothing when neither is on. Call it before the head is
    /// changed or moved.
    pub fn describe(&self, method: &Method, uri: &Uri, headers: &HeaderMap, downstream: Option<SocketAddr>) {
        self.downstream.set(downstream);
        let traced = self.telemetry.traces();
        if !traced && !self.telemetry.logs(true) {
            return;
        }
        self.named_trace.set(Incoming::trace_id(headers));
        let host = || {
            let (_, host) = headers.iter().find(|(name, _)| **name == HOST)?;
            host.to_str().ok()
        };
        let authority = uri.authority().map(http::uri::Authority::as_str).or_else(host).unwrap_or_default();
        let mut words = self.words.borrow_mut();
        words.method = Some(method.clone());
        words.path = ShortText::copy(uri.path());
        words.authority = ShortText::copy(authority);
    }

    /// The edge, known on the outbound side once an endpoint is picked. The last one set is counted on.
    pub fn set_edge(&self, edge: &Arc<Edge>) {
        let mut current = self.edge.borrow_mut();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, edge)) {
            return;
        }
        edge.enter();
        if let Some(old) = current.replace(edge.clone()) {
            old.leave();
        }
    }

    /// The rule that the request follows, and by which of its matches.
    pub fn set_route(&self, rule: &Rule, by: &Match) {
        if self.telemetry.traces() {
            self.words.borrow_mut().template = by.path.as_ref().map(PathMatch::template);
        }
        if self.telemetry.logs(true) {
            self.words.borrow_mut().route = Some((rule.object.clone(), rule.index));
        }
    }

    /// Which policy decided, and by which rule, for the log.
    pub fn set_policy(&self, policy: &str, rule: Option<usize>) {
        if self.telemetry.logs(true) {
            let rule = rule.map(|rule| rule.to_string()).unwrap_or_default();
            let facts = PolicyFacts { policy: policy.to_owned(), rule };
            self.words.borrow_mut().policy = Some(Box::new(facts));
        }
    }

    /// Where the request goes on the inbound side; outbound it is [`attempt`](HttpRecord::attempt) that says it.
    pub fn set_upstream(&self, address: SocketAddr) {
        self.upstream.set(Some(address));
    }

    /// The Service that is called, for spans: what the client says in Host may be the address of a listener.
    pub fn set_called(&self, service: Option<&ServicePort>) {
        if self.telemetry.traces() {
            self.called.replace(service.cloned());
        }
    }

    /// The workload calls itself: neither a peer's port nor TLS is there to be told of.
    pub fn set_in_process(&self, in_process: bool) {
        self.in_process.set(in_process);
    }

    /// Body bytes after framing.
    pub fn add_request_bytes(&self, n: u64) {
        self.request_bytes.set(self.request_bytes.get() + n);
    }

    /// Body bytes after framing.
    pub fn add_response_bytes(&self, n: u64) {
        self.response_bytes.set(self.response_bytes.get() + n);
    }

    /// Messages of either direction, as [`GrpcFrames`](super::GrpcFrames) counted them.
    pub fn add_grpc_messages(&self, n: u64) {
        self.grpc_messages.set(self.grpc_messages.get() + n);
    }

    /// The final response head went out, the upstream's or one that the mesh made. Not for 1xx but 101.
    pub fn answered(&self, status: u16) {
        self.status.set(Some(status));
    }

    /// `grpc-status` of the head or the trailers. A number that gRPC does not know counts as UNKNOWN.
    pub fn grpc_status(&self, status: u8) {
        self.grpc_status.set(Some(if status <= 16 { status } else { 2 }));
    }

    /// The mesh ended the request for this reason; the first one stays. An attempt that is retried is not this but
    /// [`attempt_failed`](HttpRecord::attempt_failed). `detail` is for the log and made for it alone.
    pub fn failed(&self, reason: Reason, detail: impl FnOnce() -> String) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
            if self.telemetry.logs(true) {
                self.words.borrow_mut().detail = Some(detail());
            }
        }
    }

    /// This sidecar closed the connection for this reason; a request that has ended, or failed before, has its own.
    pub fn cut(&self, reason: Reason) {
        if !self.response_ended.get() {
            self.failed(reason, || "this sidecar closed the connection".to_owned());
        }
    }

    /// The response reached its end: body and trailers went out, or there were none to send (HEAD, 204, 304). A record
    /// that ends without this and without a reason says `client_closed`.
    pub fn response_ended(&self) {
        self.response_ended.set(true);
    }

    /// Inbound: opens the SERVER span and makes the application's headers name it. Call once, on the headers that go
    /// to the application. Does nothing when tracing is off.
    pub fn trace_server(&self, headers: &mut HeaderMap) {
        if self.telemetry.traces() {
            self.open_span(Kind::Server, headers, self.started);
        }
    }

    /// Outbound: opens the CLIENT span of an attempt to reach `upstream` and makes the attempt's headers name it. Call
    /// before each attempt; the headers may be a fresh copy of the application's or those of the attempt before.
    pub fn attempt(&self, headers: &mut HeaderMap, upstream: SocketAddr, now: Instant) {
        if !self.telemetry.traces() {
            self.upstream.set(Some(upstream));
            return;
        }
        self.close_span(&SpanEnd { at: now, status: None, grpc_status: None, reason: None });
        self.upstream.set(Some(upstream));
        self.open_span(Kind::Client, headers, now);
    }

    /// Outbound: the request fails before there is an attempt. It has a CLIENT span all the same, in the trace that its
    /// headers name.
    pub fn unattempted(&self, headers: &mut HeaderMap) {
        if self.telemetry.traces() && self.trace.borrow().is_none() {
            self.open_span(Kind::Client, headers, self.started);
        }
    }

    /// Outbound: the attempt ended here and the request may be sent again.
    pub fn attempt_failed(&self, reason: Reason, now: Instant) {
        if self.telemetry.traces() {
            self.close_span(&SpanEnd { at: now, status: None, grpc_status: None, reason: Some(reason) });
        }
    }

    /// This was no request of its own after all: a CONNECT, whose tunnel has records of its own. Nothing is counted.
    pub fn discard(&self) {
        if !self.finished.replace(true)
            && let Some(edge) = self.edge.borrow().as_ref()
        {
            edge.leave();
        }
    }

    /// Ends the request at the caller's time; dropping does the same with its own.
    pub fn finish(&self, now: Instant) {
        if self.finished.replace(true) {
            return;
        }
        if self.reason.get().is_none() && !self.response_ended.get() {
            self.reason.set(Some(Reason::ClientClosed));
        }
        if let Some(edge) = self.edge.borrow().as_ref() {
            edge.leave();
        }
        let edge = self.edge_or_unresolved();
        let outcome = self.outcome(&edge);
        let ended = Ended {
            duration: now.saturating_duration_since(self.started),
            request_bytes: self.request_bytes.get(),
            response_bytes: self.response_bytes.get(),
            grpc_messages: self.grpc_messages.get(),
        };
        self.telemetry.edges().count(&edge, outcome, &ended);
        let Outcome { code: status, grpc_status, reason, .. } = outcome;
        self.close_span(&SpanEnd { at: now, status, grpc_status, reason });
        if self.telemetry.logs(outcome.failed() || reason.is_some()) {
            self.log(edge, outcome, &ended);
        }
    }

    fn edge_or_unresolved(&self) -> Arc<Edge> {
        self.edge.borrow().clone().unwrap_or_else(|| self.telemetry.unresolved_edge())
    }

    fn outcome(&self, edge: &Edge) -> Outcome {
        let (code, reason) = (self.status.get(), self.reason.get());
        let mut grpc_status = self.grpc_status.get();
        // A call that was cut behind its head ends for the client with the status of the reason, though none was sent.
        if edge.labels().protocol == WireProtocol::Grpc && code.is_some() && grpc_status.is_none() {
            grpc_status = reason.map(|reason| reason.row().grpc);
        }
        Outcome { method: self.method, code, grpc_status, reason }
    }

    fn log(&self, edge: Arc<Edge>, outcome: Outcome, ended: &Ended) {
        let mut words = self.words.borrow_mut();
        self.telemetry.log(Entry {
            method: words.method.clone(),
            path: words.path.as_str().to_owned(),
            authority: words.authority.as_str().to_owned(),
            status: outcome.code,
            grpc_status: outcome.grpc_status,
            reason: outcome.reason,
            policy: words.policy.take(),
            route: words.route.take(),
            duration: ended.duration,
            request_bytes: ended.request_bytes,
            response_bytes: ended.response_bytes,
            trace_id: if self.trace_id.get() == 0 { self.named_trace.get() } else { self.trace_id.get() },
            downstream: self.downstream.get(),
            upstream: self.upstream.get(),
            detail: words.detail.take(),
            ..Entry::of(edge)
        });
    }

    /// Opens a span in the trace that the headers name, or that an attempt before has named, or in a new one.
    fn open_span(&self, kind: Kind, headers: &mut HeaderMap, now: Instant) {
        let mut slot = self.trace.borrow_mut();
        if let Some(trace) = slot.as_mut() {
            trace.resend += 1;
            trace.ids.span = self.telemetry.new_span_id();
            trace.opened = now;
            trace.incoming.write_sampled(headers, trace.ids);
            return;
        }
        let incoming = Incoming::read(headers);
        // What was decided for the first attempt holds for the next ones.
        let decided = self.trace_id.get();
        let sampled = decided == 0 && incoming.sampled.unwrap_or_else(|| self.telemetry.samples());
        let trace = match incoming.ids {
            Some(ids) => ids.trace,
            None if decided != 0 => decided,
            None => self.telemetry.new_trace_id(),
        };
        self.trace_id.set(trace);
        if !sampled {
            if !incoming.traceparent {
                let span = incoming.ids.map_or_else(|| self.telemetry.new_span_id(), |ids| ids.span);
                incoming.write_unsampled(headers, Ids { trace, span });
            }
            return;
        }
        let ids = Ids { trace, span: self.telemetry.new_span_id() };
        incoming.write_sampled(headers, ids);
        let user_agent = headers.get(USER_AGENT).map(HeaderValue::as_bytes);
        let user_agent = user_agent.map(|agent| String::from_utf8_lossy(agent).into_owned());
        *slot = Some(Box::new(SampledTrace { kind, incoming, ids, opened: now, resend: 0, user_agent }));
    }

    /// Ends the span that is open, if one is, and hands it to the exporter.
    fn close_span(&self, end: &SpanEnd) {
        let mut slot = self.trace.borrow_mut();
        let Some(trace) = slot.as_mut().filter(|trace| trace.ids.span != 0) else { return };
        let edge = self.edge_or_unresolved();
        let words = self.words.borrow();
        let called = self.called.borrow();
        let facts = Facts {
            kind: trace.kind,
            ids: trace.ids,
            parent: trace.incoming.ids.map_or(0, |ids| ids.span),
            edge: &edge,
            method: words.method.as_ref().unwrap_or(&Method::GET),
            route: words.template.as_deref(),
            path: words.path.as_str(),
            authority: words.authority.as_str(),
            user_agent: trace.user_agent.as_deref(),
            resend: trace.resend,
            downstream: self.downstream.get(),
            upstream: self.upstream.get(),
            called: called.as_ref(),
            in_process: self.in_process.get(),
            status: end.status,
            grpc_status: end.grpc_status,
            reason: end.reason,
            duration: end.at.saturating_duration_since(trace.opened),
            // An attempt may be told of after its end.
            ended: SystemTime::now() - end.at.elapsed(),
        };
        self.telemetry.export(facts.span());
        trace.ids.span = 0;
    }
}

impl Drop for HttpRecord {
    fn drop(&mut self) {
        if !self.finished.get() {
            self.finish(Instant::now());
        }
    }
}
