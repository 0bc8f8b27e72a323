//! The routes of Gateway API (`gateway.networking.k8s.io`) that bind Services: HTTPRoute, GRPCRoute, TLSRoute and TCPRoute.
//! What Gateway API has and this mesh does not act on is an error; what it does not have a warning. The rules are in the
//! form that decides, [`crate::route`], but for what only other objects can say: whether backends exist and are granted.

mod backends;
mod filters;
mod grant;
mod matches;
mod parents;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::duration::WrittenDuration;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::syntax::is_subdomain;
use crate::route::{Filters, Kind, Match, PathMatch, Retry, Rule, Timeouts};

pub use grant::{GrantFrom, GrantTo, ReferenceGrant};
pub use parents::Parent;

pub(super) use grant::RawReferenceGrant;

use backends::RawBackendRef;
use filters::RawFilter;
use matches::{RawGrpcMatch, RawHttpMatch};
use parents::RawParentRef;

/// A route of any kind.
#[derive(Clone, PartialEq, Debug)]
pub struct Route {
    pub kind: Kind,
    /// The Services that it binds.
    pub parents: Vec<Parent>,
    /// Their backends are as written: nobody has looked whether they exist.
    pub rules: Vec<Rule>,
}

/// `spec` of an HTTPRoute as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawHttpRoute {
    parent_refs: Vec<RawParentRef>,
    use_default_gateways: Option<IgnoredAny>,
    hostnames: Vec<String>,
    rules: Option<Vec<RawHttpRule>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawHttpRule {
    name: Option<String>,
    matches: Option<Vec<RawHttpMatch>>,
    filters: Vec<RawFilter>,
    backend_refs: Vec<RawBackendRef>,
    timeouts: Option<RawTimeouts>,
    retry: Option<RawRetry>,
    session_persistence: Option<IgnoredAny>,
}

/// `spec` of a GRPCRoute as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawGrpcRoute {
    parent_refs: Vec<RawParentRef>,
    use_default_gateways: Option<IgnoredAny>,
    hostnames: Vec<String>,
    rules: Option<Vec<RawGrpcRule>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawGrpcRule {
    name: Option<String>,
    matches: Option<Vec<RawGrpcMatch>>,
    filters: Vec<RawFilter>,
    backend_refs: Vec<RawBackendRef>,
    session_persistence: Option<IgnoredAny>,
}

/// `spec` of a TLSRoute or a TCPRoute as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawStreamRoute {
    parent_refs: Vec<RawParentRef>,
    use_default_gateways: Option<IgnoredAny>,
    hostnames: Option<Vec<String>>,
    rules: Vec<RawStreamRule>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawStreamRule {
    name: Option<String>,
    backend_refs: Vec<RawBackendRef>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawTimeouts {
    request: Option<WrittenDuration>,
    backend_request: Option<WrittenDuration>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawRetry {
    codes: Vec<u16>,
    attempts: Option<u32>,
    backoff: Option<WrittenDuration>,
}

/// A request may be tried this often beside the first time.
const MOST_ATTEMPTS: u32 = 10;

impl RawHttpRoute {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Route {
        let parents = parents::check(self.parent_refs, metadata, path, findings);
        no_default_gateways(self.use_default_gateways.as_ref(), path, findings);
        hostnames_mean_nothing(&self.hostnames, path, findings);
        let at = path.key("rules");
        let rules = self.rules.unwrap_or_else(|| vec![RawHttpRule::default()]).into_iter().enumerate();
        let rules = rules.map(|(index, rule)| rule.check(index, metadata, &at.index(index), findings)).collect();
        Route { kind: Kind::Http, parents, rules }
    }
}

impl RawHttpRule {
    fn check(self, index: usize, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Rule {
        let at = path.key("matches");
        let written = self.matches.filter(|matches| !matches.is_empty());
        let matches: Vec<Match> = match written {
            Some(matches) => {
                let matches = matches.into_iter().enumerate();
                matches.map(|(nth, one)| one.check(&at.index(nth), findings)).collect()
            }
            None => vec![Match { path: Some(PathMatch::Prefix("".into())), ..Match::default() }],
        };
        let filters = filters::check(self.filters, Kind::Http, metadata, &path.key("filters"), findings);
        filters::check_prefix(&filters, &matches, path, findings);
        let answers = filters.redirect.is_some();
        let backends = backends::check(self.backend_refs, Kind::Http, answers, metadata, path, findings);
        no_persistence(self.session_persistence.as_ref(), path, findings);
        let timeouts = self.timeouts.map(|timeouts| timeouts.check(&path.key("timeouts"), findings));
        let retry = self.retry.map(|retry| retry.check(&path.key("retry"), findings));
        Rule {
            name: self.name,
            matches,
            filters,
            backends,
            timeouts: timeouts.unwrap_or_default(),
            retry,
            ..rule(Kind::Http, index, metadata)
        }
    }
}

fn rule(kind: Kind, index: usize, metadata: &Metadata) -> Rule {
    Rule {
        object: format!("{kind}/{}/{}", metadata.namespace, metadata.name).into(),
        index,
        name: None,
        matches: vec![Match::default()],
        filters: Filters::default(),
        backends: Vec::new(),
        timeouts: Timeouts::default(),
        retry: None,
    }
}

impl RawGrpcRoute {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Route {
        let parents = parents::check(self.parent_refs, metadata, path, findings);
        no_default_gateways(self.use_default_gateways.as_ref(), path, findings);
        hostnames_mean_nothing(&self.hostnames, path, findings);
        let at = path.key("rules");
        let rules = self.rules.unwrap_or_else(|| vec![RawGrpcRule::default()]).into_iter().enumerate();
        let rules = rules.map(|(index, rule)| rule.check(index, metadata, &at.index(index), findings)).collect();
        Route { kind: Kind::Grpc, parents, rules }
    }
}

impl RawGrpcRule {
    fn check(self, index: usize, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Rule {
        let at = path.key("matches");
        let written = self.matches.filter(|matches| !matches.is_empty());
        let matches = match written {
            Some(matches) => {
                let matches = matches.into_iter().enumerate();
                matches.map(|(nth, one)| one.check(&at.index(nth), findings)).collect()
            }
            None => vec![Match { path: Some(PathMatch::Grpc { service: None, method: None }), ..Match::default() }],
        };
        let filters = filters::check(self.filters, Kind::Grpc, metadata, &path.key("filters"), findings);
        let backends = backends::check(self.backend_refs, Kind::Grpc, false, metadata, path, findings);
        no_persistence(self.session_persistence.as_ref(), path, findings);
        Rule { name: self.name, matches, filters, backends, ..rule(Kind::Grpc, index, metadata) }
    }
}

impl RawStreamRoute {
    /// `path` is that of `spec`.
    pub(super) fn check(self, kind: Kind, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Route {
        let parents = parents::check(self.parent_refs, metadata, path, findings);
        no_default_gateways(self.use_default_gateways.as_ref(), path, findings);
        let at = path.key("hostnames");
        let matches = match (kind, self.hostnames) {
            (Kind::Tls, Some(names)) if !names.is_empty() => {
                let names = names.into_iter().enumerate();
                names.filter_map(|(nth, name)| server_name(&name, &at.index(nth), findings)).collect()
            }
            (Kind::Tls, _) => {
                findings.error(path, "`hostnames` is missing: which server names are routed".to_owned());
                Vec::new()
            }
            (_, Some(_)) => {
                findings.warning(&at, format!("is no field of {kind}"));
                vec![Match::default()]
            }
            (_, None) => vec![Match::default()],
        };
        let at = path.key("rules");
        if self.rules.len() != 1 {
            let message = format!("a {kind} has one rule, and this has {}", self.rules.len());
            findings.error(if self.rules.is_empty() { path } else { &at }, message);
        }
        let rules = self.rules.into_iter().enumerate().map(|(index, raw)| {
            let backends = backends::check(raw.backend_refs, kind, false, metadata, &at.index(index), findings);
            Rule { name: raw.name, matches: matches.clone(), backends, ..rule(kind, index, metadata) }
        });
        Route { kind, parents, rules: rules.collect() }
    }
}

fn server_name(name: &str, path: &Path, findings: &mut Findings) -> Option<Match> {
    if !is_subdomain(name.strip_prefix("*.").unwrap_or(name)) {
        let shown = Shortened(name);
        findings.error(path, format!("{shown:?} is no server name: a DNS name in lower case, or `*.` and one"));
        return None;
    }
    Some(Match { server_name: Some(name.to_owned()), ..Match::default() })
}

fn no_default_gateways(written: Option<&IgnoredAny>, path: &Path, findings: &mut Findings) {
    if written.is_some() {
        let message = "Gateways are not in this version: name Services in `parentRefs`".to_owned();
        findings.error_at_key(&path.key("useDefaultGateways"), message);
    }
}

/// A Service is called by its address, whatever Host says.
fn hostnames_mean_nothing(hostnames: &[String], path: &Path, findings: &mut Findings) {
    if !hostnames.is_empty() {
        let message = "change nothing where a Service is the parent: match the header Host instead".to_owned();
        findings.warning(&path.key("hostnames"), message);
    }
}

fn no_persistence(written: Option<&IgnoredAny>, path: &Path, findings: &mut Findings) {
    if written.is_some() {
        findings.error_at_key(&path.key("sessionPersistence"), "is not in this version: leave it out".to_owned());
    }
}

impl RawTimeouts {
    fn check(self, path: &Path, findings: &mut Findings) -> Timeouts {
        // Zero is no limit (GEP-2257).
        let millis = |written: Option<WrittenDuration>| {
            let millis = u64::try_from(written?.0.as_millis()).unwrap_or(u64::MAX);
            (millis != 0).then_some(millis)
        };
        let timeouts = Timeouts { request: millis(self.request), backend_request: millis(self.backend_request) };
        if let (Some(request), Some(attempt)) = (timeouts.request, timeouts.backend_request)
            && attempt > request
        {
            let message = format!("{attempt}ms is longer than the whole request may take, {request}ms");
            findings.error(&path.key("backendRequest"), message);
        }
        timeouts
    }
}

impl RawRetry {
    fn check(self, path: &Path, findings: &mut Findings) -> Retry {
        for (nth, code) in self.codes.iter().enumerate().filter(|(_, code)| !(400..600).contains(*code)) {
            findings.error(&path.key("codes").index(nth), format!("{code} is no status that fails: 400 to 599"));
        }
        let attempts = self.attempts.unwrap_or(1);
        if attempts > MOST_ATTEMPTS {
            findings.error(&path.key("attempts"), format!("{attempts} is more than {MOST_ATTEMPTS}"));
        }
        let backoff = self.backoff.map(|written| u64::try_from(written.0.as_millis()).unwrap_or(u64::MAX));
        Retry { attempts, codes: self.codes, backoff }
    }
}
