//! AuthorizationPolicies in the form in which they are in force for one workload, as they travel to its sidecar.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::index::Index;
use crate::expression::{Expression, LooksAt};
use crate::policy::pattern::Pattern;

/// Everything that decides about one workload's inbound side.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Authorization {
    pub policies: Vec<Policy>,
    /// What holds where no ALLOW policy applies.
    pub default_action: DefaultAction,
    #[serde(skip)]
    pub prepared: Prepared,
}

/// What makes decisions cheap, once it is made. It follows from the policies, so that two forms differ in them alone.
#[derive(Debug, Default)]
pub struct Prepared(pub(super) OnceLock<Box<Index>>);

impl Clone for Prepared {
    fn clone(&self) -> Prepared {
        Prepared::default()
    }
}

impl PartialEq for Prepared {
    fn eq(&self, _: &Prepared) -> bool {
        true
    }
}

impl Eq for Prepared {}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum DefaultAction {
    #[default]
    Allow,
    Deny,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Action {
    #[serde(rename = "ALLOW")]
    Allow,
    #[serde(rename = "DENY")]
    Deny,
    #[serde(rename = "AUDIT")]
    Audit,
}

/// One AuthorizationPolicy that selects the workload.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    pub action: Action,
    /// `mode: Shadow`: nothing is refused for it, what would have been is reported.
    pub shadow: bool,
    /// `name.namespace` of the Services that its targetRefs name; empty: all ports of the workload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    pub rules: Vec<Rule>,
}

/// Holds when a source, an operation and every condition do. An empty list is an absent one and holds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Source>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Operation>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<Condition>,
}

/// A value and its negation: the value must be among `any_of`, where there are any, and not among `none_of`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Lists<T> {
    pub any_of: Vec<T>,
    pub none_of: Vec<T>,
}

impl<T> Lists<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }

    /// Whether one value, or its absence, satisfies both lists.
    pub(super) fn hold<V: Copy>(&self, value: Option<V>, matches: impl Fn(&T, V) -> bool) -> bool {
        match value {
            Some(value) => {
                (self.any_of.is_empty() || self.any_of.iter().any(|one| matches(one, value)))
                    && !self.none_of.iter().any(|one| matches(one, value))
            }
            None => self.any_of.is_empty(),
        }
    }
}

impl<T> Default for Lists<T> {
    fn default() -> Lists<T> {
        Lists { any_of: Vec::new(), none_of: Vec::new() }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Source {
    /// Patterns of `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub principals: Lists<Pattern>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub namespaces: Lists<Pattern>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub service_accounts: Lists<Account>,
    /// Patterns of `ISSUER/SUBJECT` of a verified token.
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub request_principals: Lists<Pattern>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub ip_blocks: Lists<IpNet>,
}

/// `NAMESPACE/ACCOUNT`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    pub namespace: String,
    pub name: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Operation {
    /// In lower case, without port.
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub hosts: Lists<Pattern>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub ports: Lists<u16>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub methods: Lists<Pattern>,
    #[serde(skip_serializing_if = "Lists::is_empty")]
    pub paths: Lists<Pattern>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    pub key: Attribute,
    pub values: Values,
}

/// The values of a condition, of the type that its key has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Values {
    Texts(Lists<Pattern>),
    Addresses(Lists<IpNet>),
    Ports(Lists<u16>),
    Accounts(Lists<Account>),
    /// A label of the caller: of each account the value that all its workloads have.
    Labelled {
        lists: Lists<Pattern>,
        accounts: ByAccount<String>,
    },
    /// With the labels of callers that it looks at.
    Expression {
        expression: Expression,
        accounts: ByAccount<BTreeMap<String, String>>,
    },
}

/// Something of service accounts, by namespace and name.
pub type ByAccount<T> = BTreeMap<String, BTreeMap<String, T>>;

impl Condition {
    /// True when it looks at what only a request has.
    pub(super) fn is_http(&self) -> bool {
        match &self.values {
            Values::Expression { expression, .. } => expression.looks_at().request || expression.looks_at().claims,
            _ => self.key.is_http(),
        }
    }

    fn looks_at(&self) -> Option<&LooksAt> {
        match &self.values {
            Values::Expression { expression, .. } => Some(expression.looks_at()),
            _ => None,
        }
    }

    pub(super) fn looks_at_paths(&self) -> bool {
        self.key == Attribute::Path || self.looks_at().is_some_and(|looks_at| looks_at.path)
    }
}

/// What a condition looks at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Attribute {
    /// The name in lower case.
    Header(String),
    SourceIp,
    SourceNamespace,
    SourcePrincipal,
    SourceServiceAccount,
    SourceLabel(String),
    DestinationIp,
    DestinationPort,
    DestinationLabel(String),
    Method,
    Path,
    Host,
    GrpcService,
    GrpcMethod,
    /// A claim of a verified token, one name per level.
    Claim(Vec<String>),
    RequestPrincipal,
    Audiences,
    Presenter,
    Hour,
    Weekday,
    /// The server name of the application's own TLS.
    Sni,
    /// A whole expression, which says itself what it looks at.
    Expression,
}

impl Attribute {
    /// True for what only a request has.
    pub(super) fn is_http(&self) -> bool {
        match self {
            Attribute::Header(_)
            | Attribute::Method
            | Attribute::Path
            | Attribute::Host
            | Attribute::GrpcService
            | Attribute::GrpcMethod
            | Attribute::Claim(_)
            | Attribute::RequestPrincipal
            | Attribute::Audiences
            | Attribute::Presenter => true,
            Attribute::SourceIp
            | Attribute::SourceNamespace
            | Attribute::SourcePrincipal
            | Attribute::SourceServiceAccount
            | Attribute::SourceLabel(_)
            | Attribute::DestinationIp
            | Attribute::DestinationPort
            | Attribute::DestinationLabel(_)
            | Attribute::Hour
            | Attribute::Weekday
            | Attribute::Sni
            | Attribute::Expression => false,
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Header(name) => write!(f, "request.headers[{name}]"),
            Attribute::DestinationLabel(name) => write!(f, "destination.labels[{name}]"),
            Attribute::SourceIp => f.write_str("source.ip"),
            Attribute::SourceNamespace => f.write_str("source.namespace"),
            Attribute::SourcePrincipal => f.write_str("source.principal"),
            Attribute::SourceServiceAccount => f.write_str("source.serviceAccount"),
            Attribute::DestinationIp => f.write_str("destination.ip"),
            Attribute::DestinationPort => f.write_str("destination.port"),
            Attribute::Method => f.write_str("request.method"),
            Attribute::Path => f.write_str("request.path"),
            Attribute::Host => f.write_str("request.host"),
            Attribute::GrpcService => f.write_str("grpc.service"),
            Attribute::GrpcMethod => f.write_str("grpc.method"),
            Attribute::Claim(path) => {
                f.write_str("request.auth.claims")?;
                path.iter().try_for_each(|name| write!(f, "[{name}]"))
            }
            Attribute::RequestPrincipal => f.write_str("request.auth.principal"),
            Attribute::Audiences => f.write_str("request.auth.audiences"),
            Attribute::Presenter => f.write_str("request.auth.presenter"),
            Attribute::Hour => f.write_str("time.hour"),
            Attribute::Weekday => f.write_str("time.weekday"),
            Attribute::SourceLabel(name) => write!(f, "source.labels[{name}]"),
            Attribute::Sni => f.write_str("connection.sni"),
            Attribute::Expression => f.write_str("expression"),
        }
    }
}

impl Authorization {
    /// True when nothing can be refused, shadowed or audited.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty() && self.default_action == DefaultAction::Allow
    }

    /// True when a rule looks at what only a request has.
    pub fn looks_at_requests(&self) -> bool {
        self.rules().any(|rule| {
            rule.to.iter().any(|to| !(to.hosts.is_empty() && to.methods.is_empty() && to.paths.is_empty()))
                || rule.from.iter().any(|from| !from.request_principals.is_empty())
                || rule.when.iter().any(Condition::is_http)
        })
    }

    /// The headers that rules look at, in lower case; one may come several times.
    pub fn headers(&self) -> impl Iterator<Item = &str> {
        self.rules().flat_map(|rule| &rule.when).flat_map(|condition| {
            let named = match &condition.key {
                Attribute::Header(name) => Some(name),
                _ => None,
            };
            named
                .into_iter()
                .chain(condition.looks_at().into_iter().flat_map(|looks_at| &looks_at.headers))
                .map(String::as_str)
        })
    }

    /// True when a rule looks at the clock.
    pub fn looks_at_time(&self) -> bool {
        if let Some(index) = self.prepared.0.get() {
            return index.looks_at_time;
        }
        let mut conditions = self.rules().flat_map(|rule| &rule.when);
        conditions.any(|condition| {
            let now = || condition.looks_at().is_some_and(|looks_at| looks_at.now);
            matches!(condition.key, Attribute::Hour | Attribute::Weekday) || now()
        })
    }

    /// True when a rule looks at the server name that a client asks for.
    pub fn looks_at_sni(&self) -> bool {
        if let Some(index) = self.prepared.0.get() {
            return index.looks_at_sni;
        }
        self.rules().flat_map(|rule| &rule.when).any(|condition| condition.key == Attribute::Sni)
    }

    fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.policies.iter().flat_map(|policy| &policy.rules)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
