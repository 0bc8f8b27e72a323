//! One request and its answer, the part of the walk that both directions share: the head is checked and cleaned, the
//! record opened; the answer is cleaned and gets the body that ends the record. Between the two stands what the
//! direction does: policy, route, balance, connect.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Version, header};
use outrigger_api::policy::jwt::Authentication;

use super::answer::Told;
use super::body::{Ending, Measured, ResponseBody, Switched, Upstream, note_grpc_status};
use super::headers::{self, Message, Strip};
use super::{answer, date, head, tunnel};
use crate::connect::bound::{self, Bound};
use crate::connect::interim::Interim;
use crate::connect::lane::{self, Answered, UpstreamBody};
use crate::connect::request_body::{Client, Received, RequestBody};
use crate::connect::streams::{Busy, Judge, Part, Stream};
use crate::connect::worker::Worker;
use crate::connection::{Entry, Registered};
use crate::outcome::{Error, Reason, Retry, Side, Stage};
use crate::telemetry::{AnsweredWith, Edge, GrpcFrames, HttpRecord, WireProtocol};

/// Of an answer that is not sent: its client has ended its direction and the upstream closed.
pub const CLIENT_CLOSED: StatusCode = match StatusCode::from_u16(Reason::ClientClosed.row().status) {
    Ok(status) => status,
    Err(_) => StatusCode::BAD_REQUEST,
};

/// What stays the same for all requests of one downstream connection.
pub struct Session {
    pub worker: Rc<Worker>,
    pub entry: Arc<Entry>,
    /// Keeps the place in the table, also after the connection has left HTTP.
    pub registered: Rc<Registered>,
    /// HTTP/2 below.
    pub http2: bool,
    pub strip: Strip,
    /// Interim answers on their way to the client.
    pub interim: Rc<Interim>,
    /// The upstream connections that belong to this downstream connection.
    pub bound: Rc<Bound>,
    /// The client has ended its direction behind the request that runs.
    pub ended: Rc<Cell<bool>>,
    running: Rc<Cell<usize>>,
}

impl Session {
    /// How many requests run.
    pub fn running(&self) -> usize {
        self.running.get()
    }

    pub fn new(worker: &Rc<Worker>, registered: &Rc<Registered>, http2: bool, strip: Strip) -> Rc<Session> {
        Rc::new(Session {
            worker: worker.clone(),
            entry: Arc::clone(registered),
            registered: registered.clone(),
            http2,
            strip,
            interim: Rc::default(),
            bound: Rc::default(),
            ended: Rc::default(),
            running: Rc::default(),
        })
    }
}

/// One request under way.
pub struct Exchange {
    pub session: Rc<Session>,
    pub record: Rc<HttpRecord>,
    pub protocol: WireProtocol,
    begun: Instant,
    version: Version,
    stream: Stream,
    busy: Busy,
    /// The client asked to switch protocols.
    upgrade: bool,
    /// Its Max-Forwards leaves no hop beyond this one.
    last_hop: bool,
    /// The rules of tokens by which its head was put right, where there are any.
    pub told: Option<Arc<Authentication>>,
}

/// The head on its way, and the body that follows it.
pub struct Outgoing {
    pub parts: Parts,
    body: Received,
}

impl Exchange {
    /// Opens the record. Nothing of the request has been believed yet.
    pub fn begin(session: &Rc<Session>, request: Request<Received>) -> (Exchange, Outgoing) {
        let begun = Instant::now();
        let worker = &session.worker;
        let protocol = protocol(session.http2, request.headers());
        let record = Rc::new(HttpRecord::begin(&worker.telemetry, None, request.method(), begun));
        record.describe(request.method(), request.uri(), request.headers(), Some(session.entry.client));
        let (parts, mut body) = request.into_parts();
        let stream = worker.streams.begin(&session.entry, session.http2);
        if let Received::Http2(incoming) = &mut body
            && !incoming.is_end_stream()
        {
            incoming.watch(&stream.progress(), Part::Request);
        }
        let busy = Busy::begin(&session.entry, &record, &session.running, &worker.drain);
        let exchange = Exchange {
            session: session.clone(),
            record,
            protocol,
            begun,
            version: parts.version,
            stream,
            busy,
            upgrade: false,
            last_hop: false,
            told: None,
        };
        (exchange, Outgoing { parts, body })
    }

    /// Checks the head, takes out what stays on this hop, and fixes the form in which it goes on.
    pub fn clean(&mut self, outgoing: &mut Outgoing, authority: impl FnOnce() -> String) -> Result<(), Error> {
        let parts = &mut outgoing.parts;
        let refuse = |(reason, detail): head::Refusal| Error::downstream(Stage::Detect, reason, detail);
        if parts.method == Method::CONNECT {
            return Err(refuse((Reason::MethodNotAllowed, "CONNECT is for the forward proxy")));
        }
        let longest = self.session.worker.limits.target_bytes;
        if self.session.http2 {
            outgoing.body.check_head(&parts.headers).map_err(|broke| lane::request_broke(&broke))?;
            head::check_http2(parts, longest, authority).map_err(refuse)?;
        } else {
            head::check_http1(parts, longest, authority).map_err(refuse)?;
        }
        if parts.headers.len() > self.session.worker.limits.header_count {
            return Err(refuse((Reason::RequestHeadTooLarge, "too many fields")));
        }
        self.upgrade = !self.session.http2 && self.version == Version::HTTP_11 && headers::asks_upgrade(&parts.headers);
        let http2 = self.session.http2;
        headers::clean(&mut parts.headers, self.session.strip, Message::Request { http2, upgrade: self.upgrade });
        self.last_hop = !head::count_hop(parts).map_err(refuse)?;
        parts.version = if self.session.http2 { Version::HTTP_2 } else { Version::HTTP_11 };
        Ok(())
    }

    /// The request goes no further: its Max-Forwards has counted down.
    pub fn is_last_hop(&self) -> bool {
        self.last_hop
    }

    /// Answers as the final recipient of such a request.
    pub fn answer_last_hop(self, outgoing: Outgoing) -> Response<ResponseBody> {
        let Outgoing { parts, body } = outgoing;
        let spelling = match &body {
            Received::Http1(incoming) => Some(&incoming.spelling),
            Received::Http2(_) => None,
        };
        let mut response = answer::last_hop(parts, spelling, &self.session.worker.own.instance);
        self.record.answered(response.status().as_u16());
        self.close_when_draining(response.headers_mut());
        response.map(|body| body.recorded(Ending { record: self.record, busy: Some(self.busy) }))
    }

    /// Answers in the name of a route: with these fields and without a body.
    pub fn answer_here(self, status: u16, fields: http::HeaderMap) -> Response<ResponseBody> {
        let mut response = answer::of_route(status, fields);
        self.record.answered(response.status().as_u16());
        self.close_when_draining(response.headers_mut());
        response.map(|body| body.recorded(Ending { record: self.record, busy: Some(self.busy) }))
    }

    /// The request as it goes to an upstream. To be called once; a second try uses what the lane gave back.
    pub fn request(&self, outgoing: Outgoing) -> Request<RequestBody> {
        let grpc = self.protocol == WireProtocol::Grpc;
        // A client of HTTP/1.0 knows no interim answers (RFC 9110 section 15.2).
        let interim = (self.version != Version::HTTP_10).then(|| self.session.interim.clone());
        let progress = self.stream.progress();
        let binds = match &outgoing.body {
            Received::Http1(incoming) => incoming.binds,
            Received::Http2(_) => binds(&outgoing.parts.headers),
        };
        let Session { bound, ended, .. } = &*self.session;
        let told = self.told.clone();
        let client = Client { interim, bound: bound.clone(), binds, ended: ended.clone(), progress, told };
        let body = RequestBody::new(outgoing.body, &self.record, grpc, headers::clean_trailers, client);
        Request::from_parts(outgoing.parts, body)
    }

    /// Waits for an upstream, but no longer than a stream may stand still.
    pub fn patiently<F: Future>(&self, waiting: F) -> Patiently<'_, F> {
        Patiently { waiting, stream: &self.stream }
    }

    /// What a failed exchange with an upstream was: one that failed because the client broke off its request, or because
    /// the upstream closed when it heard that the client had ended its direction, says nothing about the upstream.
    pub fn fault(&self, error: Error) -> Error {
        let closed = matches!(error.reason, Reason::UpstreamClosed | Reason::UpstreamReset) && self.session.ended.get();
        if error.side == Side::Downstream || !(closed || self.stream.is_broken_off()) {
            return error;
        }
        Error::downstream(Stage::Forward, Reason::ClientClosed, "the client ended its direction or broke off")
    }

    /// Who decides about the request, and is asked again when policy moves.
    pub fn judged_by(&self, judge: Rc<dyn Judge>) {
        self.stream.judged_by(judge);
    }

    /// When the request began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Since the request began.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub fn set_edge(&self, edge: &Arc<Edge>) {
        self.record.set_edge(edge);
    }

    /// Passes an upstream's answer on.
    pub fn answer(self, answered: Answered, load: Option<Measured>) -> Response<ResponseBody> {
        let Answered { mut response, .. } = answered;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Raw bytes flow only after a 101 that was asked for.
            return if self.upgrade {
                self.switch(response)
            } else {
                self.refuse(&upstream_protocol("101 without a request to switch protocols"))
            };
        }
        let status = response.status();
        let dated = match head::check_answer(status, response.headers_mut()) {
            Ok(dated) => dated,
            // Its connection is not given back: nobody knows where the next answer begins.
            Err(wrong) => return self.refuse(&upstream_protocol(wrong)),
        };
        // A 426 says what it demands (RFC 9110 section 15.5.22).
        let upgrade = status == StatusCode::UPGRADE_REQUIRED && !self.session.http2;
        headers::clean(response.headers_mut(), Strip::HopByHop, Message::Answer { upgrade });
        if !dated {
            response.headers_mut().insert(header::DATE, date::now());
        }
        self.record.answered(response.status().as_u16());
        let grpc = (self.protocol == WireProtocol::Grpc).then(|| {
            note_grpc_status(&self.record, response.headers());
            GrpcFrames::default()
        });
        self.close_when_draining(response.headers_mut());
        if !self.session.http2 && response.body().ends_login() {
            close(response.headers_mut());
        }
        self.stream.moved();
        let (mut parts, incoming) = response.into_parts();
        parts.version = Version::HTTP_11;
        let mut incoming = incoming;
        incoming.watch(&self.stream.progress());
        let spelling = incoming.spelling().cloned();
        let body = ResponseBody::upstream(Box::new(Upstream {
            incoming: Some(incoming),
            uploading: None,
            record: self.record,
            grpc,
            spelling,
            load,
            stream: self.stream,
            busy: Some(self.busy),
            until: None,
        }));
        Response::from_parts(parts, body)
    }

    /// Answers by itself, before the request went anywhere.
    pub fn refuse_head(self, outgoing: Outgoing, error: &Error) -> Response<ResponseBody> {
        self.stream.progress().leave_head(outgoing.parts);
        self.refuse(error)
    }

    /// Keeps what is known of a request that this error ended, for a person who asks.
    fn remember(&self, error: &Error, answered: AnsweredWith) {
        let Some((head, call)) = self.stream.lost() else { return };
        let worker = &self.session.worker;
        let own = worker.own_workload();
        let inbound = call.zip(own.as_ref()).map(|((identity, application), own)| (identity, application, own));
        worker.telemetry.lately().note(&head, self.session.entry.client, error, answered, inbound);
    }

    /// Answers by itself.
    pub fn refuse(self, error: &Error) -> Response<ResponseBody> {
        let grpc = self.protocol == WireProtocol::Grpc;
        self.record.failed(error.reason, || error.to_string());
        if self.session.http2
            && let Some(code) = error.reset
        {
            // The client sees what it would see without the mesh; no answer of ours says as much as the code.
            return Response::new(ResponseBody::reset(code.into()));
        }
        if self.session.ended.get() && error.reason == Reason::ClientClosed {
            // The upstream closed because the client did: the client sees what it would see without the mesh.
            let mut nothing = Response::new(ResponseBody::empty());
            *nothing.status_mut() = CLIENT_CLOSED;
            return nothing;
        }
        if let Some(by) = &error.by {
            self.record.set_policy(&by.object, by.rule);
        }
        let told = Told {
            by: error.by.as_deref().filter(|by| by.told),
            quota: error.quota.as_deref(),
            // What an endpoint or a name has to do with it is the own application's to know, and nobody else's.
            detail: (self.session.strip == Strip::HopByHop
                && matches!(error.stage, Stage::Lookup | Stage::Route | Stage::Balance | Stage::Connect))
            .then_some(&*error.detail),
        };
        let mut response = answer::refuse(error.reason, grpc, &self.session.worker.own.instance, told);
        self.record.answered(response.status().as_u16());
        let grpc_status = grpc.then_some(error.reason.row().grpc);
        grpc_status.into_iter().for_each(|status| self.record.grpc_status(status));
        self.remember(error, AnsweredWith { status: response.status().as_u16(), grpc_status });
        self.close_when_draining(response.headers_mut());
        if !self.session.http2 && error.side == Side::Downstream {
            // Who sends what is refused may not agree with us on where it ends.
            close(response.headers_mut());
        }
        response.map(|body| body.recorded(Ending { record: self.record, busy: Some(self.busy) }))
    }

    /// Agrees to a CONNECT: what follows is bytes. Its own record ends here; what runs inside has records of its own.
    pub fn connected(self, then: Switched) -> Response<ResponseBody> {
        self.record.discard();
        Response::new(ResponseBody::switched(then, None))
    }

    fn close_when_draining(&self, headers: &mut http::HeaderMap) {
        if !self.session.http2 && self.session.worker.drain.is_draining() {
            close(headers);
        }
    }

    /// The client's bytes and the upstream's are copied as they are from here on.
    fn switch(self, mut response: Response<UpstreamBody>) -> Response<ResponseBody> {
        headers::clean(response.headers_mut(), Strip::HopByHop, Message::Answer { upgrade: true });
        self.record.answered(StatusCode::SWITCHING_PROTOCOLS.as_u16());
        let (parts, upstream) = response.into_parts();
        let spelling = upstream.spelling().cloned();
        let Some(upstream) = upstream.into_stream() else {
            return self.refuse(&upstream_protocol("101 on HTTP/2"));
        };
        let Exchange { session, record, stream, .. } = self;
        if let Some(head) = stream.into_head() {
            session.entry.leaves_http(head);
        }
        let then: Switched =
            Box::new(move |downstream| Box::pin(tunnel::switched(session, record, downstream, upstream)));
        Response::from_parts(parts, ResponseBody::switched(then, spelling))
    }
}

/// Beside another Connection, which says something else.
fn close(headers: &mut http::HeaderMap) {
    if !headers.get_all(header::CONNECTION).iter().any(|value| value == "close") {
        headers.append(header::CONNECTION, http::HeaderValue::from_static("close"));
    }
}

/// Whether a request belongs to a login that authenticates its connection.
fn binds(headers: &http::HeaderMap) -> bool {
    headers.iter().any(|(name, value)| match *name {
        header::AUTHORIZATION | header::PROXY_AUTHORIZATION => bound::names_scheme(value.as_bytes()),
        _ => false,
    })
}

fn upstream_protocol(detail: &'static str) -> Error {
    Error::upstream(Stage::Forward, Reason::UpstreamProtocol, Retry::Never, detail)
}

pin_project_lite::pin_project! {
    /// [`Exchange::patiently`]; by hand, because an async fn would hold what it waits for twice.
    pub struct Patiently<'a, F> {
        #[pin]
        waiting: F,
        stream: &'a Stream,
    }
}

impl<F: Future> Future for Patiently<'_, F> {
    type Output = Result<F::Output, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<F::Output, Error>> {
        let this = self.project();
        match this.waiting.poll(cx) {
            Poll::Ready(done) => Poll::Ready(Ok(done)),
            Poll::Pending => match this.stream.poll_expired(cx) {
                Some(reason @ (Reason::PolicyDenied | Reason::PathAmbiguous)) => {
                    let detail = "policy has turned against it while it ran";
                    Poll::Ready(Err(Error::own(Stage::Policy, reason, detail)))
                }
                Some(Reason::Overloaded) => {
                    let detail = "memory is short, and this stream stood still with bytes waiting";
                    Poll::Ready(Err(Error::own(Stage::Forward, Reason::Overloaded, detail)))
                }
                Some(reason) => Poll::Ready(Err(Error::upstream(Stage::Forward, reason, Retry::Never, "no answer"))),
                None => Poll::Pending,
            },
        }
    }
}

fn protocol(http2: bool, headers: &http::HeaderMap) -> WireProtocol {
    if !http2 {
        return WireProtocol::Http1;
    }
    let grpc = headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if grpc { WireProtocol::Grpc } else { WireProtocol::Http2 }
}
