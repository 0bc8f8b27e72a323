//! The requests that this sidecar refused or could not forward lately, for `outrigger explain REQUEST-ID`: the facts on
//! which they were decided, and the policy that was in force. Workers write here only when a request ends that way; what is
//! kept is bounded in number and in bytes. No header is kept but those that the decision looks at, and never a credential.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, HeaderMap, HeaderName, PROXY_AUTHORIZATION};
use http::request::Parts;
use outrigger_api::facts::Claims;
use outrigger_api::identity::SpiffeId;
use outrigger_api::policy::jwt::Verified;
use outrigger_api::snapshot::Workload;

use super::context::Incoming;
use crate::outcome::Error;

/// Requests that are kept.
const MOST: usize = 1_000;
/// States of policy that are kept for them; of what was decided by an older one the verdict alone is known.
const VERSIONS: usize = 8;
/// Bytes of an id, of a target, of a value, of a detail.
const MAX_ID: usize = 128;
const MAX_TARGET: usize = 512;
const MAX_VALUE: usize = 256;
const MAX_DETAIL: usize = 400;
const MAX_VALUES: usize = 32;

/// Bytes of the claims of a token, as it came.
const MAX_CLAIMS: usize = 2 * 1024;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// One request that ended without an answer of an application.
#[derive(Clone, Debug)]
pub struct Ended {
    pub request_id: String,
    /// 0: none.
    pub trace_id: u128,
    pub at: SystemTime,
    pub method: String,
    /// The path; a query may hold secrets and decides nothing.
    pub target: String,
    /// Host, and what rules look at.
    pub headers: Vec<(String, String)>,
    /// What its verified token said, where rules look at requests.
    pub claims: Option<Claims>,
    pub client: SocketAddr,
    pub status: u16,
    pub grpc_status: Option<u8>,
    pub reason: &'static str,
    pub stage: String,
    pub detail: String,
    /// `KIND/NAMESPACE/NAME`, and the rule.
    pub by: Option<(String, Option<usize>)>,
    /// None on the way out.
    pub inbound: Option<Inbound>,
}

/// What is known of a request from others.
#[derive(Clone, Debug)]
pub struct Inbound {
    pub identity: Option<SpiffeId>,
    pub application: SocketAddr,
    version: u64,
}

/// How it was answered.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    pub status: u16,
    pub grpc_status: Option<u8>,
}

#[derive(Debug, Default)]
pub struct Lately(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    ended: VecDeque<Arc<Ended>>,
    versions: VecDeque<(u64, Arc<Workload>)>,
    next: u64,
}

/// What was found under an id.
#[derive(Clone, Debug)]
pub struct Found {
    pub ended: Arc<Ended>,
    /// The own workload by which it was decided, if that is still known.
    pub own: Option<Arc<Workload>>,
    /// Earlier requests of the same id.
    pub others: usize,
}

impl Lately {
    /// Keeps what is known of a request that `error` ended. `inbound`: who called, which port of the application, and the
    /// own workload that decided.
    pub fn note(
        &self,
        head: &Parts,
        client: SocketAddr,
        error: &Error,
        answered: Answered,
        inbound: Option<(Option<SpiffeId>, SocketAddr, &Arc<Workload>)>,
    ) {
        let text = |name: &HeaderName| head.headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = cut(text(&REQUEST_ID).unwrap_or_default(), MAX_ID);
        let trace_id = Incoming::read(&head.headers).ids.map_or(0, |ids| ids.trace);
        if request_id.is_empty() && trace_id == 0 {
            // Nobody could ask for it.
            return;
        }
        let authority = head.uri.authority().map(http::uri::Authority::as_str).or_else(|| text(&HOST));
        let mut headers = vec![("host".to_owned(), cut(authority.unwrap_or_default(), MAX_VALUE))];
        if let Some((_, _, own)) = &inbound {
            let looked_at = own.authorization.headers();
            looked_at.for_each(|name| values(&head.headers, name, &mut headers));
            values(&head.headers, CONTENT_TYPE.as_str(), &mut headers);
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let inbound = inbound.map(|(identity, application, own)| {
            let version = kept.version_of(own);
            Inbound { identity, application, version }
        });
        let ended = Ended {
            request_id,
            trace_id,
            at: SystemTime::now(),
            method: cut(head.method.as_str(), 32),
            target: cut(head.uri.path(), MAX_TARGET),
            headers,
            claims: claims(head),
            client,
            status: answered.status,
            grpc_status: answered.grpc_status,
            reason: error.reason.word(),
            stage: format!("{:?}", error.stage).to_ascii_lowercase(),
            detail: cut(&error.detail, MAX_DETAIL),
            by: error.by.as_ref().map(|by| (by.object.clone(), by.rule)),
            inbound,
        };
        if kept.ended.len() >= MOST {
            kept.ended.pop_front();
        }
        kept.ended.push_back(Arc::new(ended));
    }

    /// The last request with this x-request-id or trace id (32 hexadecimal digits).
    pub fn find(&self, id: &str) -> Option<Found> {
        let trace = (id.len() == 32).then(|| u128::from_str_radix(id, 16).ok()).flatten();
        let trace = trace.filter(|trace| *trace != 0);
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let named = |ended: &&Arc<Ended>| {
            !id.is_empty() && ended.request_id == id || trace.is_some_and(|t| t == ended.trace_id)
        };
        let mut found = kept.ended.iter().rev().filter(named);
        let ended = found.next()?.clone();
        let others = found.count();
        let version = ended.inbound.as_ref().map(|inbound| inbound.version);
        let own = kept.versions.iter().find(|(number, _)| Some(*number) == version);
        Some(Found { own: own.map(|(_, own)| own.clone()), ended, others })
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).ended.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Kept {
    fn version_of(&mut self, own: &Arc<Workload>) -> u64 {
        if let Some((number, _)) = self.versions.iter().find(|(_, known)| Arc::ptr_eq(known, own)) {
            return *number;
        }
        if self.versions.len() >= VERSIONS {
            self.versions.pop_front();
        }
        self.next += 1;
        self.versions.push_back((self.next, own.clone()));
        self.next
    }
}

/// The values of a field, but never a credential's.
fn values(from: &HeaderMap, name: &str, into: &mut Vec<(String, String)>) {
    if name == HOST || name == AUTHORIZATION || name == PROXY_AUTHORIZATION || name == COOKIE {
        return;
    }
    if into.iter().any(|(known, _)| known == name) {
        return;
    }
    for value in from.get_all(name) {
        if into.len() < MAX_VALUES {
            into.push((name.to_owned(), cut(&String::from_utf8_lossy(value.as_bytes()), MAX_VALUE)));
        }
    }
}

fn cut(text: &str, longest: usize) -> String {
    text[..text.floor_char_boundary(longest)].to_owned()
}

/// What was verified of its token, unless that is too long to be kept.
fn claims(head: &Parts) -> Option<Claims> {
    let verified = head.extensions.get::<Arc<Verified>>()?;
    (verified.payload.len() <= MAX_CLAIMS).then(|| verified.claims.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::Request;
    use outrigger_api::policy::authorization::Authorization;
    use outrigger_api::snapshot::{MeshSettings, MtlsMode};

    use super::*;
    use crate::outcome::{Reason, Stage};

    fn own(policies: &str) -> Arc<Workload> {
        let authorization: Authorization =
            serde_json::from_str(&format!(r#"{{"policies":[{policies}],"defaultAction":"Deny"}}"#)).unwrap();
        Arc::new(Workload {
            name: "pay-1".into(),
            namespace: "shop".into(),
            service_account: "pay".into(),
            ports: Default::default(),
            default_mtls_mode: MtlsMode::Strict,
            mesh: MeshSettings::default(),
            registered: true,
            labels: Default::default(),
            authentication: Arc::default(),
            rate_limits: Arc::default(),
            authorization: Arc::new(authorization),
        })
    }

    fn note(lately: &Lately, id: &str, own: &Arc<Workload>) {
        let request = Request::get("http://pay/v1/charges?token=secret")
            .header("x-request-id", id)
            .header("x-role", "reader")
            .header("x-other", "private")
            .header("authorization", "Bearer secret")
            .header("cookie", "secret")
            .body(())
            .unwrap();
        let head = request.into_parts().0;
        let error = Error::own(Stage::Policy, Reason::PolicyDenied, "no".repeat(1_000));
        let client: SocketAddr = ([127, 0, 0, 1], 1).into();
        let answered = Answered { status: 403, grpc_status: None };
        lately.note(&head, client, &error, answered, Some((None, client, own)));
    }

    #[test]
    fn what_is_kept_is_what_the_decision_looked_at() {
        let looked = ["x-role", "authorization", "cookie"].map(|name| {
            format!(r#"{{"key":{{"Header":"{name}"}},"values":{{"Texts":{{"anyOf":["a"],"noneOf":[]}}}}}}"#)
        });
        let policy = format!(
            r#"{{"namespace":"a","name":"b","action":"DENY","shadow":false,"rules":[{{"when":[{}]}}]}}"#,
            looked.join(",")
        );
        let lately = Lately::default();
        note(&lately, "one", &own(&policy));
        let found = lately.find("one").unwrap();
        let shown = format!("{:?}", found.ended);
        assert!(!shown.contains("secret") && !shown.contains("private"), "{shown}");
        let host_and_role = [("host".to_owned(), "pay".to_owned()), ("x-role".to_owned(), "reader".to_owned())];
        assert_eq!(found.ended.headers, host_and_role);
        assert_eq!((found.ended.detail.len(), found.ended.target.as_str()), (MAX_DETAIL, "/v1/charges"));
        assert!(found.own.is_some());
    }

    #[test]
    fn the_last_thousand_by_the_last_policies() {
        let lately = Lately::default();
        for n in 0..3 * MOST {
            note(&lately, &format!("{}", n % (2 * MOST)), &own(""));
        }
        assert_eq!(lately.len(), MOST);
        assert!(lately.find("1500").is_none());
        let found = lately.find("999").unwrap();
        assert!(found.own.is_some());
        assert!(lately.find("0").unwrap().own.is_none(), "many policies ago");
        let other = own("");
        note(&lately, "999", &other);
        assert_eq!(lately.find("999").unwrap().others, 1);
        assert!(lately.find("").is_none() && lately.find("00000000000000000000000000000000").is_none());
    }
}
