//! Asks policy. What comes back is a [`Permit`], and forwarding demands one: bytes cannot reach an application or an
//! endpoint on a path that forgot to ask. The decisions themselves are pure functions of `outrigger_api::policy`, which
//! `explain` and offline tests call too; here they get the facts of what is on the wire.

mod buckets;
mod limits;
mod token;

use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::HOST;
use http::request::Parts;
use outrigger_api::facts::{Connection, Headers, Moment, Request};
use outrigger_api::identity::SpiffeId;
use outrigger_api::path::NormalPath;
use outrigger_api::policy::authorization::{By, Denial, Verdict};
use outrigger_api::policy::mtls;
use outrigger_api::snapshot::{MtlsMode, Workload};

use crate::connection::Arrival;
use crate::outcome::{Error, Reason, Refuser, Side, Stage};
pub use buckets::{Buckets, Followed};
use limits::Limited;
pub use token::{Memory, Rejected, authenticate, claims, remove_told, tell};

/// The proof that policy was asked and agreed. Only this module makes one.
#[derive(Clone, Copy, Debug)]
#[must_use = "forwarding needs it"]
pub struct Permit(());

/// May this connection come in?
pub fn admit(mode: MtlsMode, arrival: Arrival) -> Result<Permit, Error> {
    mtls::admit(mode, arrival)
        .map(|()| Permit(()))
        .map_err(|detail| Error::downstream(Stage::Policy, Reason::MtlsRequired, detail))
}

/// What the application itself sends out is not restricted in this version.
pub fn admit_outbound() -> Permit {
    Permit(())
}

/// Who calls which port of the workload.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    pub identity: Option<&'a SpiffeId>,
    pub client: IpAddr,
    pub application: SocketAddr,
    /// The server name that the application's own TLS asks for.
    pub sni: Option<&'a str>,
}

/// What policy said of a request or a connection of opaque bytes, as far as somebody has to do something about it.
#[derive(Default)]
pub struct Judgement {
    pub refused: Option<Error>,
    /// Policies in Shadow mode that would have refused it: `KIND/NAMESPACE/NAME` and the rule.
    pub shadow: Vec<Noted>,
    /// Rate limits in Shadow mode that are used up.
    pub limited: Vec<Noted>,
    /// AUDIT policies that matched.
    pub audit: Vec<Noted>,
}

/// An object that did not decide but wants to be counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Noted {
    pub object: String,
    pub rule: Option<usize>,
}

/// May this request come in? `parts`: the head as it goes on, cleaned, with what its token says; `limits`: where it is
/// counted, and when; None where it was counted before. Costs one look where no policy is in force.
pub fn judge_request(own: &Workload, call: &Call<'_>, parts: &Parts, limits: Option<(&Followed, u64)>) -> Judgement {
    if own.authorization.is_empty() && limits.is_none() {
        return Judgement::default();
    }
    let target = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let path = NormalPath::of(target);
    let fields = Fields(&parts.headers);
    let host = parts.headers.get(HOST).and_then(|value| value.to_str().ok());
    let request = Request {
        method: parts.method.as_str(),
        path: &path,
        query: parts.uri.query(),
        host: parts.uri.authority().map(http::uri::Authority::as_str).or(host).unwrap_or_default(),
        headers: &fields,
        claims: token::claims(parts),
    };
    judge(own, call, Some(&request), |connection| {
        let (buckets, now) = limits?;
        Some(limits::limit(own, connection, &request, parts.uri.query(), buckets, now))
    })
}

/// May this request, which runs, stay?
pub fn judge_running(own: &Workload, call: &Call<'_>, parts: &Parts) -> Judgement {
    if !own.authentication.is_empty()
        && let Some(error) = token::judge_running(own, call, parts)
    {
        return Judgement { refused: Some(error), ..Judgement::default() };
    }
    judge_request(own, call, parts, None)
}

/// May this connection of opaque bytes come in?
pub fn judge_opaque(own: &Workload, call: &Call<'_>) -> Judgement {
    if own.authorization.is_empty() && own.authentication.is_empty() {
        return Judgement::default();
    }
    if let Err(refused) = own.authentication.judge_opaque(&connection(own, call), &mut ()) {
        let refused = Some(token::refusal(&refused, call.identity.is_some()));
        return Judgement { refused, ..Judgement::default() };
    }
    judge(own, call, None, |_| None)
}

fn judge(
    own: &Workload,
    call: &Call<'_>,
    request: Option<&Request<'_>>,
    limit: impl FnOnce(&Connection<'_>) -> Option<Limited>,
) -> Judgement {
    let connection = connection(own, call);
    let verdict = own.authorization.decide(&connection, request, &mut ());
    let noted = |by: &[By<'_>]| by.iter().map(|by| Noted { object: by.to_string(), rule: by.rule() }).collect();
    let (shadow, audit) = (noted(&verdict.shadow), noted(&verdict.audit));
    let refused = refusal(&verdict, call.identity.is_some());
    if refused.is_some() {
        // What is refused anyway is counted by no limit.
        return Judgement { refused, shadow, audit, limited: Vec::new() };
    }
    let Limited { refused, shadow: limited } = limit(&connection).unwrap_or_default();
    Judgement { refused, shadow, audit, limited }
}

fn connection<'c>(own: &'c Workload, call: &Call<'c>) -> Connection<'c> {
    let now = match own.authorization.looks_at_time() {
        true => Moment::of_unix_time(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()),
        false => Moment::default(),
    };
    Connection {
        identity: call.identity,
        source_ip: Some(call.client),
        destination_ip: Some(call.application.ip()),
        destination_port: call.application.port(),
        service: own.ports.get(&call.application.port()).and_then(|port| port.service.as_ref()),
        labels: &own.labels,
        now,
        sni: call.sni,
    }
}

fn refusal(verdict: &Verdict<'_>, told: bool) -> Option<Error> {
    let (reason, detail) = match verdict.denied? {
        Denial::Policy => (Reason::PolicyDenied, "a policy does not allow it"),
        Denial::PathAmbiguous => (Reason::PathAmbiguous, "the path can be read in two ways"),
    };
    let by = verdict.by.map(|by| Refuser { object: by.to_string(), rule: by.rule(), told });
    // Nothing is wrong with how the request was written: its connection goes on.
    let error = Error::own(Stage::Policy, reason, detail).by(by);
    Some(Error { side: Side::Own, ..error })
}

/// A head's fields as decisions look at them.
pub struct Fields<'a>(pub &'a http::HeaderMap);

impl Headers for Fields<'_> {
    fn each_value(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        // Of a request that is judged again, these are ours.
        if name == "x-forwarded-client-cert" || name == "x-outrigger-identity" {
            return;
        }
        for value in self.0.get_all(name) {
            if !each(value.as_bytes()) {
                return;
            }
        }
    }
}
