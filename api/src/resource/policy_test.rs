//! `PolicyTest`: what is expected of the policies beside it. `outrigger test` runs it; a control plane passes it over.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::Deserialize;

use super::Metadata;
use super::duration::WrittenDuration;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::time::unix_time;
use crate::facts::Claims;
use crate::identity::{SpiffeId, is_account};
use crate::name::{ServiceName, is_label};

#[derive(Clone, PartialEq, Debug, Default)]
pub struct PolicyTest {
    pub cases: Vec<Case>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Case {
    pub name: String,
    pub from: From,
    pub from_ip: Option<IpAddr>,
    /// Those of a token, taken for verified.
    pub claims: Option<Claims>,
    /// A token, to be verified.
    pub token: Option<String>,
    /// When, in seconds since the Unix epoch; None: now.
    pub at: Option<u64>,
    pub to: ServiceName,
    pub port: Option<u16>,
    /// Of a connection: the server name that the application's own TLS asks for.
    pub sni: Option<String>,
    /// None: a connection.
    pub request: Option<CaseRequest>,
    pub expect: Expect,
}

#[derive(Clone, PartialEq, Debug)]
pub struct CaseRequest {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

#[derive(Clone, PartialEq, Debug)]
pub enum From {
    Plaintext,
    /// Namespace and service account, in the mesh's own trust domain.
    Account(String, String),
    Principal(SpiffeId),
}

/// What is not named is not checked.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Expect {
    pub verdict: Option<String>,
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    pub reason: Option<String>,
    pub by: Option<String>,
    pub rule: Option<usize>,
    pub backends: Option<BTreeMap<String, u32>>,
    /// `KIND/NAMESPACE/NAME`, with ` rule N` where the rule counts as well.
    pub route: Option<String>,
    /// How long the request may take.
    pub timeout: Option<Duration>,
}

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct RawPolicyTest {
    cases: Vec<RawCase>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawCase {
    name: Option<String>,
    from: RawFrom,
    to: RawTo,
    request: Option<RawRequest>,
    expect: RawExpect,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawFrom {
    service_account: Option<String>,
    principal: Option<String>,
    plaintext: Option<bool>,
    ip: Option<String>,
    claims: Option<serde_json::Map<String, serde_json::Value>>,
    token: Option<String>,
    at: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTo {
    service: Option<String>,
    port: Option<super::syntax::Port>,
    sni: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRequest {
    method: Option<String>,
    path: Option<String>,
    headers: BTreeMap<String, Header>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Header {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawExpect {
    verdict: Option<Verdict>,
    status: Option<u16>,
    grpc_status: Option<u8>,
    reason: Option<String>,
    by: Option<String>,
    rule: Option<usize>,
    route: Option<String>,
    backends: Option<BTreeMap<String, u32>>,
    timeout: Option<WrittenDuration>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Forwarded,
    Refused,
    Redirected,
    Failed,
}

impl RawPolicyTest {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> PolicyTest {
        let at_cases = path.key("cases");
        if self.cases.is_empty() {
            findings.error(path, "`cases` is missing or empty: it tests nothing".to_owned());
        }
        let cases = self.cases.into_iter().enumerate();
        let cases = cases.filter_map(|(index, case)| case.check(index, metadata, &at_cases.index(index), findings));
        PolicyTest { cases: cases.collect() }
    }
}

impl RawCase {
    fn check(self, index: usize, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Case> {
        let from = self.from.check(metadata, &path.key("from"), findings);
        let Some(service) = self.to.service else {
            findings.error(path, "`to.service` is missing: which Service is called".to_owned());
            return None;
        };
        let to = match ServiceName::parse(&service, &metadata.namespace) {
            Ok(to) => to,
            Err(error) => {
                findings.error(&path.key("to").key("service"), error.to_string());
                return None;
            }
        };
        let from_ip = self.from.ip.as_deref().and_then(|text| {
            let ip = text.parse();
            let message = format!("{:?} is not an IP address", Shortened(text));
            ip.map_err(|_| findings.error(&path.key("from").key("ip"), message)).ok()
        });
        let at = self.from.at.as_deref().and_then(|text| {
            let message = format!("{} is not a time: 2026-11-28T14:30:00Z", Shortened(text));
            unix_time(text).or_else(|| {
                findings.error(&path.key("from").key("at"), message);
                None
            })
        });
        let request = self.request.map(|request| {
            let target = request.path.unwrap_or_else(|| "/".to_owned());
            if !(target.starts_with('/') || target.starts_with("http") || target == "*") {
                let message = format!("{}: a path begins with `/`", Shortened(&target));
                findings.error(&path.key("request").key("path"), message);
            }
            let headers = request.headers.into_iter().flat_map(|(name, value)| match value {
                Header::One(value) => vec![(name, value)],
                Header::Several(values) => values.into_iter().map(|value| (name.clone(), value)).collect(),
            });
            let method = request.method.unwrap_or_else(|| "GET".to_owned());
            CaseRequest { method, target, headers: headers.collect() }
        });
        let expect = self.expect.check(&path.key("expect"), findings);
        Some(Case {
            name: self.name.unwrap_or_else(|| format!("case {index}")),
            from: from?,
            from_ip,
            claims: self.from.claims.map(Claims::new),
            token: self.from.token,
            at,
            to,
            port: self.to.port.map(|port| port.0),
            sni: self.to.sni,
            request,
            expect,
        })
    }
}

impl RawFrom {
    fn check(&self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<From> {
        if self.claims.is_some() && self.token.is_some() {
            findings.error_at_key(&path.key("token"), "stands beside `claims`: write one of the two".to_owned());
        }
        match (&self.service_account, &self.principal, self.plaintext) {
            (None, None, Some(true)) => Some(From::Plaintext),
            (Some(text), None, None | Some(false)) => {
                let (namespace, account) = text.split_once('/').unwrap_or((metadata.namespace.as_str(), text));
                if is_label(namespace) && is_account(account) {
                    return Some(From::Account(namespace.to_owned(), account.to_owned()));
                }
                let message = format!("{} is not NAMESPACE/ACCOUNT", Shortened(text));
                findings.error(&path.key("serviceAccount"), message);
                None
            }
            (None, Some(text), None | Some(false)) => match SpiffeId::parse(text) {
                Ok(id) => Some(From::Principal(id)),
                Err(error) => {
                    findings.error(&path.key("principal"), error.to_string());
                    None
                }
            },
            _ => {
                findings
                    .error(path, "one of `serviceAccount`, `principal` and `plaintext: true` says who calls".into());
                None
            }
        }
    }
}

impl RawExpect {
    fn check(self, path: &Path, findings: &mut Findings) -> Expect {
        let verdict = self.verdict.map(|verdict| match verdict {
            Verdict::Forwarded => "forwarded",
            Verdict::Refused => "refused",
            Verdict::Redirected => "redirected",
            Verdict::Failed => "failed",
        });
        let expect = Expect {
            verdict: verdict.map(str::to_owned),
            status: self.status,
            grpc_status: self.grpc_status,
            reason: self.reason,
            by: self.by,
            rule: self.rule,
            backends: self.backends,
            route: self.route,
            timeout: self.timeout.map(|written| written.0),
        };
        if expect == Expect::default() {
            let message =
                "says nothing: name one of verdict, status, grpcStatus, reason, by, rule, route, backends, timeout"
                    .to_owned();
            findings.error(path, message);
        }
        expect
    }
}
