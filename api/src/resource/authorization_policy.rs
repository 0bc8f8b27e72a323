//! `AuthorizationPolicy`: who may call a workload, and what. Ours and Istio's (`security.istio.io`) are one kind; ours
//! adds `mode`. What is checked here is in the form that decides, [`crate::policy::authorization`].

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, Visitor};

use super::Metadata;
use super::findings::Findings;
use super::nearest::suggestion;
use super::path::{Path, Shortened};
use super::peer_authentication::{RawSelector, Selector};
use super::syntax::check_labels;
use crate::facts::Moment;
use crate::name::is_label;
use crate::path::NormalPath;
use crate::policy::authorization::{Account, Action, Attribute, Condition, Lists, Operation, Rule, Source, Values};
use crate::policy::pattern::Pattern;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuthorizationPolicy {
    /// None: every workload of the namespace; in the root namespace of the mesh, with a selector as without.
    pub selector: Option<Selector>,
    /// Names of Services of the policy's namespace; empty: every port of the workload.
    pub services: Vec<String>,
    pub action: Action,
    pub shadow: bool,
    pub rules: Vec<Rule>,
}

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawAuthorizationPolicy {
    selector: Option<RawSelector>,
    target_ref: Option<RawTargetRef>,
    target_refs: Option<Vec<RawTargetRef>>,
    action: RawAction,
    mode: Option<RawMode>,
    provider: Option<IgnoredAny>,
    rules: Vec<RawRule>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawTargetRef {
    group: String,
    kind: String,
    name: String,
    namespace: Option<String>,
    section_name: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Deserialize, Default, PartialEq, Eq)]
enum RawAction {
    #[default]
    #[serde(rename = "ALLOW")]
    Allow,
    #[serde(rename = "DENY")]
    Deny,
    #[serde(rename = "AUDIT")]
    Audit,
    #[serde(rename = "CUSTOM")]
    Custom,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum RawMode {
    Enforce,
    Shadow,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRule {
    from: Option<Vec<RawFrom>>,
    to: Option<Vec<RawTo>>,
    when: Option<Vec<RawCondition>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawFrom {
    source: RawSource,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTo {
    operation: RawOperation,
}

type Written = Option<Vec<String>>;

#[derive(Deserialize, Default, PartialEq)]
#[serde(default, rename_all = "camelCase")]
struct RawSource {
    principals: Written,
    not_principals: Written,
    request_principals: Written,
    not_request_principals: Written,
    namespaces: Written,
    not_namespaces: Written,
    service_accounts: Written,
    not_service_accounts: Written,
    ip_blocks: Written,
    not_ip_blocks: Written,
    remote_ip_blocks: Written,
    not_remote_ip_blocks: Written,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawOperation {
    hosts: Written,
    not_hosts: Written,
    ports: Option<Vec<PortText>>,
    not_ports: Option<Vec<PortText>>,
    methods: Written,
    not_methods: Written,
    paths: Written,
    not_paths: Written,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawCondition {
    key: Option<String>,
    values: Written,
    not_values: Written,
    expression: Option<IgnoredAny>,
}

/// A port as Istio writes it, in quotes, or as a number.
struct PortText(String);

impl<'de> Deserialize<'de> for PortText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortText, D::Error> {
        deserializer.deserialize_any(PortTextVisitor)
    }
}

struct PortTextVisitor;

impl Visitor<'_> for PortTextVisitor {
    type Value = PortText;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<PortText, E> {
        Ok(PortText(number.to_string()))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<PortText, E> {
        Ok(PortText(text.to_owned()))
    }
}

impl RawAuthorizationPolicy {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> AuthorizationPolicy {
        let labels = self.selector.map(|selector| selector.match_labels).unwrap_or_default();
        check_labels(&labels, &path.key("selector").key("matchLabels"), findings);
        let selector = (!labels.is_empty()).then_some(Selector { match_labels: labels });
        let mut services = Vec::new();
        if let Some(target) = self.target_ref {
            services.extend(target.check(metadata, &path.key("targetRef"), findings));
        }
        for (index, target) in self.target_refs.into_iter().flatten().enumerate() {
            services.extend(target.check(metadata, &path.key("targetRefs").index(index), findings));
        }
        if selector.is_some() && !services.is_empty() {
            let message = "stands beside `selector`: write one of the two".to_owned();
            findings.error_at_key(&path.key("targetRefs"), message);
        }
        if self.provider.is_some() || self.action == RawAction::Custom {
            let message =
                "CUSTOM and `provider` (an authorizer outside of the mesh) are not supported: write the rules \
                           as ALLOW and DENY"
                    .to_owned();
            let key = if self.action == RawAction::Custom { "action" } else { "provider" };
            findings.error(&path.key(key), message);
        }
        let action = match self.action {
            RawAction::Allow | RawAction::Custom => Action::Allow,
            RawAction::Deny => Action::Deny,
            RawAction::Audit => Action::Audit,
        };
        if self.rules.is_empty() && action != Action::Allow {
            findings.warning(path, "without `rules` it matches nothing".to_owned());
        }
        let at_rules = path.key("rules");
        let rules = self.rules.into_iter().enumerate();
        let rules = rules.map(|(index, rule)| rule.check(metadata, action, &at_rules.index(index), findings)).collect();
        AuthorizationPolicy { selector, services, action, shadow: self.mode == Some(RawMode::Shadow), rules }
    }
}

impl RawTargetRef {
    fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<String> {
        if self.section_name.is_some() {
            findings.error_at_key(&path.key("sectionName"), "not supported here: use `to.operation.ports`".to_owned());
        }
        if let Some(namespace) = self.namespace.filter(|namespace| *namespace != metadata.namespace) {
            let message = format!("{} is another namespace than the policy's", Shortened(&namespace));
            findings.error(&path.key("namespace"), message);
        }
        if !matches!((self.group.as_str(), self.kind.as_str()), ("" | "core", "Service")) {
            let message = format!("{} is not supported: write kind Service, or `selector`", Shortened(&self.kind));
            findings.error(&path.key("kind"), message);
            return None;
        }
        if !is_label(&self.name) {
            findings.error(&path.key("name"), super::metadata::not_a_label(&self.name));
            return None;
        }
        Some(self.name)
    }
}

impl RawRule {
    fn check(self, metadata: &Metadata, action: Action, path: &Path, findings: &mut Findings) -> Rule {
        let mut rule = Rule::default();
        not_empty(self.from.as_ref(), &path.key("from"), "every caller", findings);
        not_empty(self.to.as_ref(), &path.key("to"), "every operation", findings);
        not_empty(self.when.as_ref(), &path.key("when"), "unconditionally", findings);
        for (index, from) in self.from.into_iter().flatten().enumerate() {
            let path = path.key("from").index(index).key("source");
            rule.from.push(from.source.check(metadata, action, &path, findings));
        }
        for (index, to) in self.to.into_iter().flatten().enumerate() {
            let path = path.key("to").index(index).key("operation");
            rule.to.push(to.operation.check(&path, findings));
        }
        for (index, condition) in self.when.into_iter().flatten().enumerate() {
            let path = path.key("when").index(index);
            rule.when.extend(condition.check(metadata, &path, findings));
        }
        rule
    }
}

fn not_empty<T>(list: Option<&Vec<T>>, path: &Path, meaning: &str, findings: &mut Findings) {
    if list.is_some_and(Vec::is_empty) {
        findings.error_at_key(path, format!("is empty and would match nothing: leave it out to match {meaning}"));
    }
}

impl RawSource {
    fn check(self, metadata: &Metadata, action: Action, path: &Path, findings: &mut Findings) -> Source {
        let empty = self == RawSource::default();
        let unsupported = [
            ("requestPrincipals", self.request_principals.is_some()),
            ("notRequestPrincipals", self.not_request_principals.is_some()),
        ];
        for (field, _) in unsupported.into_iter().filter(|(_, there)| *there) {
            let message = "needs RequestAuthentication, which this version does not have: use `principals`".to_owned();
            findings.error_at_key(&path.key(field), message);
        }
        let remote = [
            ("remoteIpBlocks", self.remote_ip_blocks.is_some()),
            ("notRemoteIpBlocks", self.not_remote_ip_blocks.is_some()),
        ];
        for (field, _) in remote.into_iter().filter(|(_, there)| *there) {
            let message = "would believe x-forwarded-for, which callers write: use `ipBlocks`".to_owned();
            findings.error_at_key(&path.key(field), message);
        }
        let source = Source {
            principals: lists(
                (self.principals, self.not_principals),
                path,
                ["principals", "notPrincipals"],
                findings,
                |text| principal(&text),
            ),
            namespaces: lists(
                (self.namespaces, self.not_namespaces),
                path,
                ["namespaces", "notNamespaces"],
                findings,
                |text| Ok(Pattern::new(&text)),
            ),
            service_accounts: lists(
                (self.service_accounts, self.not_service_accounts),
                path,
                ["serviceAccounts", "notServiceAccounts"],
                findings,
                |text| account(&text, metadata),
            ),
            ip_blocks: lists(
                (self.ip_blocks, self.not_ip_blocks),
                path,
                ["ipBlocks", "notIpBlocks"],
                findings,
                |text| block(&text),
            ),
        };
        let positive = !(source.principals.any_of.is_empty()
            && source.namespaces.any_of.is_empty()
            && source.service_accounts.any_of.is_empty()
            && source.ip_blocks.any_of.is_empty());
        if empty {
            findings.error(path, "is empty: leave `from` out to match every caller".to_owned());
        } else if action == Action::Allow && source != Source::default() && !positive {
            let message =
                "allows every caller but those listed, also callers that prove no identity: add `principals: \
                           [\"*\"]` to ask for one"
                    .to_owned();
            findings.warning(path, message);
        }
        source
    }
}

impl RawOperation {
    fn check(self, path: &Path, findings: &mut Findings) -> Operation {
        let written = [&self.hosts, &self.not_hosts, &self.methods, &self.not_methods, &self.paths, &self.not_paths];
        if written.iter().all(|list| list.is_none()) && self.ports.is_none() && self.not_ports.is_none() {
            findings.error(path, "is empty: leave `to` out to match every operation".to_owned());
        }
        let texts = |ports: Option<Vec<PortText>>| ports.map(|ports| ports.into_iter().map(|port| port.0).collect());
        Operation {
            hosts: lists((self.hosts, self.not_hosts), path, ["hosts", "notHosts"], findings, |text| host(&text)),
            ports: lists((texts(self.ports), texts(self.not_ports)), path, ["ports", "notPorts"], findings, |text| {
                port(&text)
            }),
            methods: lists((self.methods, self.not_methods), path, ["methods", "notMethods"], findings, |text| {
                method(&text)
            }),
            paths: lists((self.paths, self.not_paths), path, ["paths", "notPaths"], findings, |text| {
                path_pattern(&text)
            }),
        }
    }
}

const KEYS: &[&str] = &[
    "request.headers[NAME]",
    "request.method",
    "request.path",
    "request.host",
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "destination.ip",
    "destination.port",
    "destination.labels[NAME]",
    "grpc.service",
    "grpc.method",
    "time.hour",
    "time.weekday",
];

impl RawCondition {
    fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Condition> {
        if self.expression.is_some() {
            let message = "expressions are not in this version: write `key` and `values`".to_owned();
            findings.error_at_key(&path.key("expression"), message);
            return None;
        }
        let Some(written) = self.key else {
            findings.error(path, "`key` is missing: what the condition looks at".to_owned());
            return None;
        };
        let key = match attribute(&written) {
            Ok(key) => key,
            Err(message) => {
                findings.error(&path.key("key"), message);
                return None;
            }
        };
        if self.values.is_none() && self.not_values.is_none() {
            findings.error(path, "neither `values` nor `notValues`: one of them says what is expected".to_owned());
            return None;
        }
        let written = (self.values, self.not_values);
        let names = ["values", "notValues"];
        let values = match &key {
            Attribute::SourceIp | Attribute::DestinationIp => {
                Values::Addresses(lists(written, path, names, findings, |text| block(&text)))
            }
            Attribute::DestinationPort => Values::Ports(lists(written, path, names, findings, |text| port(&text))),
            Attribute::SourceServiceAccount => {
                Values::Accounts(lists(written, path, names, findings, |text| account(&text, metadata)))
            }
            key => Values::Texts(lists(written, path, names, findings, |text| match key {
                Attribute::SourcePrincipal => principal(&text),
                Attribute::Path => path_pattern(&text),
                Attribute::Host => host(&text),
                Attribute::Method => method(&text),
                Attribute::Hour => hour(&text),
                Attribute::Weekday => weekday(&text),
                _ => Ok(Pattern::new(&text)),
            })),
        };
        Some(Condition { key, values })
    }
}

fn attribute(text: &str) -> Result<Attribute, String> {
    let named = |prefix: &str| text.strip_prefix(prefix)?.strip_suffix(']').filter(|name| !name.is_empty());
    if let Some(name) = named("request.headers[") {
        return Ok(Attribute::Header(name.to_ascii_lowercase()));
    }
    if let Some(name) = named("destination.labels[") {
        return Ok(Attribute::DestinationLabel(name.to_owned()));
    }
    if text.starts_with("request.auth.") {
        return Err("needs RequestAuthentication, which this version does not have".to_owned());
    }
    if text.starts_with("source.labels[") {
        return Err("not in this version: use source.serviceAccount".to_owned());
    }
    if text == "connection.sni" {
        return Err("not in this version: use destination.port".to_owned());
    }
    if text == "remote.ip" {
        return Err("would believe x-forwarded-for, which callers write: use source.ip".to_owned());
    }
    Ok(match text {
        "source.ip" => Attribute::SourceIp,
        "source.namespace" => Attribute::SourceNamespace,
        "source.principal" => Attribute::SourcePrincipal,
        "source.serviceAccount" => Attribute::SourceServiceAccount,
        "destination.ip" => Attribute::DestinationIp,
        "destination.port" => Attribute::DestinationPort,
        "request.method" => Attribute::Method,
        "request.path" => Attribute::Path,
        "request.host" => Attribute::Host,
        "grpc.service" => Attribute::GrpcService,
        "grpc.method" => Attribute::GrpcMethod,
        "time.hour" => Attribute::Hour,
        "time.weekday" => Attribute::Weekday,
        _ => return Err(format!("unknown key {}{}", Shortened(text), suggestion(text, KEYS))),
    })
}

/// Reads a list and its negation, each value by `read`.
fn lists<T>(
    (any_of, none_of): (Written, Written),
    path: &Path,
    [any_name, none_name]: [&str; 2],
    findings: &mut Findings,
    read: impl Fn(String) -> Result<T, String>,
) -> Lists<T> {
    let mut list = |written: Written, name: &str| {
        let path = path.key(name);
        if written.as_ref().is_some_and(Vec::is_empty) {
            findings.error_at_key(&path, "is empty and would match nothing: leave it out, or list values".to_owned());
        }
        let mut values = Vec::new();
        for (index, text) in written.into_iter().flatten().enumerate() {
            if text.is_empty() {
                findings.error(&path.index(index), "an empty text matches nothing".to_owned());
                continue;
            }
            match read(text) {
                Ok(value) => values.push(value),
                Err(message) => findings.error(&path.index(index), message),
            }
        }
        values
    };
    Lists { any_of: list(any_of, any_name), none_of: list(none_of, none_name) }
}

fn principal(text: &str) -> Result<Pattern, String> {
    let bare = text.strip_prefix("spiffe://").unwrap_or(text);
    let pattern = Pattern::new(bare);
    match &pattern {
        Pattern::Exact(whole) if !whole.contains("/ns/") || !whole.contains("/sa/") => Err(format!(
            "{} can be nobody's: principals are TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT; for NAMESPACE/ACCOUNT there is \
             `serviceAccounts`",
            Shortened(text)
        )),
        _ => Ok(pattern),
    }
}

fn account(text: &str, metadata: &Metadata) -> Result<Account, String> {
    let (namespace, name) = text.split_once('/').unwrap_or((metadata.namespace.as_str(), text));
    if text.contains('*') {
        return Err(format!("{}: no patterns here; use `namespaces` or `principals`", Shortened(text)));
    }
    if is_label(namespace) && crate::identity::is_account(name) {
        Ok(Account { namespace: namespace.to_owned(), name: name.to_owned() })
    } else {
        Err(format!("{} is not a service account: NAMESPACE/ACCOUNT, or ACCOUNT of this namespace", Shortened(text)))
    }
}

fn block(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    parsed.map(|block| block.trunc()).ok_or_else(|| format!("{} is neither an IP address nor a CIDR", Shortened(text)))
}

fn port(text: &str) -> Result<u16, String> {
    let port = text.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == text);
    port.ok_or_else(|| format!("{} is not a port: expected 1 to 65535", Shortened(text)))
}

fn host(text: &str) -> Result<Pattern, String> {
    if text.contains([':', '/']) && !text.starts_with('[') {
        return Err(format!("{}: a host without port and path; for ports there is `ports`", Shortened(text)));
    }
    Ok(Pattern::new(text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase().as_str()))
}

fn method(text: &str) -> Result<Pattern, String> {
    if text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err(format!("{}: methods are case-sensitive; write {}", Shortened(text), text.to_ascii_uppercase()));
    }
    Ok(Pattern::new(text))
}

fn path_pattern(text: &str) -> Result<Pattern, String> {
    if !text.starts_with(['/', '*']) {
        return Err(format!("{}: a path begins with `/` (or is a pattern that begins with `*`)", Shortened(text)));
    }
    if text.contains(['?', '#']) {
        return Err(format!("{}: policy sees paths without query and fragment", Shortened(text)));
    }
    let pattern = Pattern::for_path(text)?;
    if let Pattern::Exact(path) = &pattern {
        let normal = NormalPath::of(path);
        if normal.text != *path || normal.ambiguous.is_some() {
            return Err(format!(
                "{} is never seen: paths are compared in their normal form, here {}",
                Shortened(text),
                Shortened(&normal.text)
            ));
        }
    }
    Ok(pattern)
}

fn hour(text: &str) -> Result<Pattern, String> {
    let hour = text.parse::<u8>().ok().filter(|hour| *hour < 24 && hour.to_string() == text);
    hour.map(|_| Pattern::Exact(text.to_owned()))
        .ok_or_else(|| format!("{} is not an hour: 0 to 23, in UTC", Shortened(text)))
}

fn weekday(text: &str) -> Result<Pattern, String> {
    if Moment::WEEKDAYS.contains(&text) {
        return Ok(Pattern::Exact(text.to_owned()));
    }
    Err(format!("{} is not a day: {}", Shortened(text), Moment::WEEKDAYS.join(", ")))
}
