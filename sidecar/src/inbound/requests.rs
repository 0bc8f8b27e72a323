//! HTTP from others: a connection of requests, and one request from its head to the answer's head.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::request::Parts;
use http::{Request, Response};
use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::Workload;

use crate::connect::lane::{Framing, Lane, Unsent};
use crate::connect::request_body::Received;
use crate::connect::streams::Judge;
use crate::connect::unprocessed;
use crate::connection::Entry;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Retry};
use crate::policy::{self, Call, Permit, Rejected};
use crate::protocol::http::body::ResponseBody;
use crate::protocol::http::exchange::{Exchange, Session};
use crate::protocol::http::headers::Strip;
use crate::protocol::http::serve;
use crate::telemetry::{self, Edge, WireProtocol};

use super::caller::{self, Claims};
use super::{Refused, Walk};

impl Walk {
    pub(super) async fn http1(&self, stream: Stream, permit: Permit) -> Result<(), Refused> {
        self.registered.describe(|about| about.protocol = "http1");
        let session = Session::new(&self.worker, &self.registered, false, Strip::Identity);
        let service = self.service(Framing::Http1, permit);
        let edge = service.edge(WireProtocol::Http1);
        let telemetry = self.worker.telemetry.clone();
        let on_refusal = Box::new(move |reason| serve::count_refused_head(&telemetry, &edge, reason));
        serve::http1(&session, stream, on_refusal, |request| respond(session.clone(), service.clone(), request)).await;
        Ok(())
    }

    pub(super) async fn http2(&self, stream: Stream, permit: Permit) -> Result<(), Refused> {
        self.registered.describe(|about| about.protocol = "http2");
        self.registered.speaks_http2();
        let session = Session::new(&self.worker, &self.registered, true, Strip::Identity);
        let service = self.service(Framing::Http2, permit);
        let client = if self.caller.peer.is_some() { serve::Client::Sidecar } else { serve::Client::One };
        let inner = session.clone();
        let (edge, telemetry) = (service.edge(WireProtocol::Http2), self.worker.telemetry.clone());
        let on_refusal = Box::new(move |reason| serve::count_refused_stream(&telemetry, &edge, reason));
        let respond = move |request| respond(inner.clone(), service.clone(), request);
        serve::http2(&session, stream, client, on_refusal, respond).await;
        Ok(())
    }

    fn service(&self, framing: Framing, permit: Permit) -> Rc<Service> {
        let identity = self.caller.peer.as_ref().map(|peer| &peer.identity);
        Rc::new(Service {
            lane: self.worker.application_lane(self.application, self.source(), framing, identity),
            claims: identity.and_then(|identity| Claims::new(&self.worker.own.principal, identity)),
            edges: [WireProtocol::Http1, WireProtocol::Http2, WireProtocol::Grpc]
                .map(|protocol| self.caller.edge(&self.worker, protocol)),
            application: self.application,
            identity: identity.cloned(),
            in_process: self.caller.peer.as_ref().is_some_and(|peer| !peer.mtls),
            _permit: permit,
        })
    }
}

/// The application, as one caller's HTTP connection reaches it.
struct Service {
    lane: Rc<Lane>,
    claims: Option<Claims>,
    edges: [Arc<Edge>; 3],
    application: SocketAddr,
    identity: Option<SpiffeId>,
    /// The caller is the workload itself.
    in_process: bool,
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

    fn caller(&self, entry: &Entry) -> Call<'_> {
        Call { identity: self.identity.as_ref(), client: entry.client.ip(), application: self.application, sni: None }
    }

    /// Asks whether the request's token counts, and puts the head into the form that goes on, with what was verified beside
    /// it. Waits only where a key set is to be fetched for it.
    async fn authenticate(&self, session: &Session, own: &Workload, head: &mut Parts) -> Result<(), Error> {
        let worker = &session.worker;
        let ask = |head: &Parts| {
            let mut memory = worker.tokens.borrow_mut();
            let version = worker.key_sets.version();
            policy::authenticate(own, &self.caller(&session.entry), head, &mut memory, &worker.key_sets, version)
        };
        let verified = match ask(head) {
            Ok(verified) => verified,
            Err(rejected) => {
                let Rejected { error, lacking } = *rejected;
                let Some(url) = lacking else { return Err(error) };
                let patience = 2 * worker.limits.key_set_fetch;
                let fetched = Box::pin(tokio::time::timeout(patience, worker.key_sets.refreshed(&url))).await;
                if fetched != Ok(true) {
                    return Err(error);
                }
                ask(head).map_err(|rejected| rejected.error)?
            }
        };
        policy::tell(&own.authentication, verified, head);
        Ok(())
    }

    /// Asks policy about one request; what speaks without deciding is noted.
    fn judge(&self, session: &Session, own: &Workload, head: &Parts) -> Result<(), Error> {
        let worker = &session.worker;
        let call = self.caller(&session.entry);
        let limits = (!own.rate_limits.is_empty()).then(|| worker.limits(own));
        let limits = limits.as_ref().map(|(buckets, now)| (&**buckets, *now));
        let judgement = policy::judge_request(own, &call, head, limits);
        caller::note_policies(&worker.telemetry, &judgement, call.identity, || {
            telemetry::shape(head.method.as_str(), head.uri.path())
        });
        judgement.refused.map_or(Ok(()), Err)
    }
}

impl Judge for Service {
    fn refuses(&self, own: &Workload, entry: &Entry, head: Option<&Parts>) -> Option<Reason> {
        let call = self.caller(entry);
        let judgement = match head {
            Some(head) => policy::judge_running(own, &call, head),
            None => policy::judge_opaque(own, &call),
        };
        judgement.refused.map(|error| error.reason)
    }

    fn call(&self) -> (Option<SpiffeId>, SocketAddr) {
        (self.identity.clone(), self.application)
    }
}

async fn respond(session: Rc<Session>, service: Rc<Service>, request: Request<Received>) -> Response<ResponseBody> {
    let (mut exchange, mut outgoing) = Exchange::begin(&session, request);
    exchange.set_edge(&service.edge(exchange.protocol));
    exchange.judged_by(service.clone());
    if let Err(error) = exchange.clean(&mut outgoing, || service.application.to_string()) {
        return exchange.refuse_head(outgoing, &error);
    }
    if let Some(own) = session.worker.own_workload() {
        if !own.authentication.is_empty() {
            exchange.told = Some(own.authentication.clone());
            let authenticated = Box::pin(service.authenticate(&session, &own, &mut outgoing.parts)).await;
            if let Err(error) = authenticated {
                return exchange.refuse_head(outgoing, &error);
            }
        }
        if let Err(error) = service.judge(&session, &own, &outgoing.parts) {
            return exchange.refuse_head(outgoing, &error);
        }
    }
    if exchange.is_last_hop() {
        return exchange.answer_last_hop(outgoing);
    }
    if let Some(claims) = &service.claims {
        claims.insert(&mut outgoing.parts.headers);
    }
    exchange.record.set_upstream(service.application);
    exchange.record.set_in_process(service.in_process);
    exchange.record.trace_server(&mut outgoing.parts.headers);
    let request = exchange.request(outgoing);
    match exchange.patiently(service.lane.send(request)).await {
        Ok(Ok(answered)) => exchange.answer(answered, None),
        Ok(Err(Unsent { error, request })) => {
            if let Some((head, body)) = request.map(Request::into_parts) {
                body.progress().leave_head(head);
            }
            let error = exchange.fault(error);
            let mut answer = exchange.refuse(&error);
            if service.identity.is_some() && error.retry == Retry::Safe {
                unprocessed::mark(answer.headers_mut(), error.reason);
            }
            answer
        }
        Err(error) => exchange.refuse(&error),
    }
}
