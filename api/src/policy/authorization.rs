//! Who may: AuthorizationPolicies in the form in which they are in force for one workload, and the decision. The control
//! plane makes the form (`compile`), sends it, and the sidecar decides with it; `explain` and `test` do both.
//!
//! Semantics are Istio's. A value that is absent matches no positive list and every negative one. Opaque bytes have no
//! HTTP attributes: a condition on one holds in DENY and does not in ALLOW, so that what cannot be looked at is refused.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::pattern::Pattern;
use super::trace::{Step, Trace};
use crate::facts::{Connection, Moment, Request, normal_host};
use crate::path::NormalPath;

/// Everything that decides about one workload's inbound side.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Authorization {
    pub policies: Vec<Policy>,
    /// What holds where no ALLOW policy applies.
    pub default_action: DefaultAction,
}

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
    fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }

    /// Whether one value, or its absence, satisfies both lists.
    fn hold<V: Copy>(&self, value: Option<V>, matches: impl Fn(&T, V) -> bool) -> bool {
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
    DestinationIp,
    DestinationPort,
    DestinationLabel(String),
    Method,
    Path,
    Host,
    GrpcService,
    GrpcMethod,
    Hour,
    Weekday,
}

impl Attribute {
    /// True for what only a request has.
    fn is_http(&self) -> bool {
        match self {
            Attribute::Header(_)
            | Attribute::Method
            | Attribute::Path
            | Attribute::Host
            | Attribute::GrpcService
            | Attribute::GrpcMethod => true,
            Attribute::SourceIp
            | Attribute::SourceNamespace
            | Attribute::SourcePrincipal
            | Attribute::SourceServiceAccount
            | Attribute::DestinationIp
            | Attribute::DestinationPort
            | Attribute::DestinationLabel(_)
            | Attribute::Hour
            | Attribute::Weekday => false,
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
            Attribute::Hour => f.write_str("time.hour"),
            Attribute::Weekday => f.write_str("time.weekday"),
        }
    }
}

/// Which object decided, and by which of its rules (from 0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By<'p> {
    Policy {
        policy: &'p Policy,
        rule: Option<usize>,
    },
    /// `MeshConfig` `default`, by its defaultAction.
    Default,
}

/// `KIND/NAMESPACE/NAME`, as answers, logs and metrics name an object.
impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            By::Policy { policy, .. } => write!(f, "AuthorizationPolicy/{}/{}", policy.namespace, policy.name),
            By::Default => write!(f, "MeshConfig/{}/default", crate::identity::ROOT_NAMESPACE),
        }
    }
}

impl By<'_> {
    pub fn rule(&self) -> Option<usize> {
        match self {
            By::Policy { rule, .. } => *rule,
            By::Default => None,
        }
    }
}

/// Why not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denial {
    Policy,
    /// A rule looks at paths, and this path can be read in two ways.
    PathAmbiguous,
}

/// What was decided.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict<'p> {
    pub denied: Option<Denial>,
    /// What denied it, or the ALLOW that let it in.
    pub by: Option<By<'p>>,
    /// Policies in Shadow mode that would have denied it.
    pub shadow: Vec<By<'p>>,
    /// AUDIT policies that matched.
    pub audit: Vec<By<'p>>,
}

/// Which side errs: towards refusing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    Deny,
    Allow,
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
                || rule.when.iter().any(|condition| condition.key.is_http())
        })
    }

    /// True when a rule looks at the clock.
    pub fn looks_at_time(&self) -> bool {
        let mut conditions = self.rules().flat_map(|rule| &rule.when);
        conditions.any(|condition| matches!(condition.key, Attribute::Hour | Attribute::Weekday))
    }

    fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.policies.iter().flat_map(|policy| &policy.rules)
    }

    /// Decides about a request, or with `request` None about a connection of opaque bytes.
    pub fn decide<'p>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut impl Trace,
    ) -> Verdict<'p> {
        let mut verdict = Verdict::default();
        if self.is_empty() {
            return verdict;
        }
        let here: fn(&Policy, &Connection<'_>) -> bool = Policy::applies;
        let enforced = |policy: &&Policy| !policy.shadow && here(policy, connection);
        let shadowed = |policy: &&Policy| policy.shadow && here(policy, connection);
        if let Some(ambiguous) = request.and_then(|request| request.path.ambiguous) {
            let mut looking = self.policies.iter().filter(|policy| policy.looks_at_paths());
            if let Some(policy) = looking.clone().find(enforced) {
                trace.step(|| Step::new("path", policy.full_name(), "refused", ambiguous.as_str().to_owned()));
                verdict.denied = Some(Denial::PathAmbiguous);
                verdict.by = Some(By::Policy { policy, rule: None });
                return verdict;
            }
            if let Some(policy) = looking.find(shadowed) {
                verdict.shadow.push(By::Policy { policy, rule: None });
            }
        }
        for policy in self.policies.iter().filter(|policy| policy.action == Action::Audit) {
            if here(policy, connection)
                && let Some(rule) = policy.first_match(connection, request, Reading::Allow, trace)
            {
                verdict.audit.push(By::Policy { policy, rule: Some(rule) });
            }
        }
        for policy in self.policies.iter().filter(|policy| policy.action == Action::Deny) {
            if !here(policy, connection) {
                continue;
            }
            let Some(rule) = policy.first_match(connection, request, Reading::Deny, trace) else { continue };
            let by = By::Policy { policy, rule: Some(rule) };
            if policy.shadow {
                verdict.shadow.push(by);
            } else {
                verdict.denied = Some(Denial::Policy);
                verdict.by = Some(by);
                return verdict;
            }
        }
        self.allow(connection, request, trace, &mut verdict);
        verdict
    }

    fn allow<'p>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut impl Trace,
        verdict: &mut Verdict<'p>,
    ) {
        let allows = || {
            let policies = self.policies.iter();
            policies.filter(|policy| policy.action == Action::Allow && policy.applies(connection))
        };
        let mut enforced = 0_usize;
        for policy in allows().filter(|policy| !policy.shadow) {
            enforced += 1;
            if let Some(rule) = policy.first_match(connection, request, Reading::Allow, trace) {
                verdict.by = Some(By::Policy { policy, rule: Some(rule) });
                return;
            }
        }
        if enforced > 0 {
            verdict.denied = Some(Denial::Policy);
            let mut all = allows().filter(|policy| !policy.shadow);
            verdict.by = all.next().filter(|_| enforced == 1).map(|policy| By::Policy { policy, rule: None });
            return;
        }
        if self.default_action == DefaultAction::Deny {
            trace.step(|| {
                let why = "no ALLOW policy applies to this workload and port".to_owned();
                Step::new("default", By::Default.to_string(), "refused", why)
            });
            verdict.denied = Some(Denial::Policy);
            verdict.by = Some(By::Default);
            return;
        }
        // Nothing is enforced: with its shadows in force a request would need one of them to match.
        let mut shadows = Vec::new();
        for policy in allows().filter(|policy| policy.shadow) {
            if policy.first_match(connection, request, Reading::Allow, trace).is_some() {
                return;
            }
            shadows.push(By::Policy { policy, rule: None });
        }
        verdict.shadow.append(&mut shadows);
    }
}

impl Policy {
    fn full_name(&self) -> String {
        format!("AuthorizationPolicy/{}/{}", self.namespace, self.name)
    }

    /// Whether it is about the Service of this connection's port.
    fn applies(&self, connection: &Connection<'_>) -> bool {
        self.services.is_empty()
            || connection.service.is_some_and(|called| {
                let is_called = |service: &String| {
                    let parts = service.split_once('.');
                    parts.is_some_and(|(name, namespace)| *called.name == *name && *called.namespace == *namespace)
                };
                self.services.iter().any(is_called)
            })
    }

    fn looks_at_paths(&self) -> bool {
        self.action != Action::Audit
            && self.rules.iter().any(|rule| {
                rule.to.iter().any(|to| !to.paths.is_empty())
                    || rule.when.iter().any(|condition| condition.key == Attribute::Path)
            })
    }

    fn first_match(
        &self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        reading: Reading,
        trace: &mut impl Trace,
    ) -> Option<usize> {
        for (index, rule) in self.rules.iter().enumerate() {
            let looked = Look { connection, request, reading };
            match looked.first_mismatch(rule) {
                None => {
                    trace.step(|| {
                        let result = match (self.shadow, self.action) {
                            (true, _) => "would match",
                            (false, Action::Deny) => "refused",
                            (false, Action::Allow) => "allowed",
                            (false, Action::Audit) => "audited",
                        };
                        let object = format!("{} rule {index}", self.full_name());
                        Step::new(self.stage(), object, result, "every condition holds".to_owned())
                    });
                    return Some(index);
                }
                Some(mismatch) => trace.step(|| {
                    let object = format!("{} rule {index}", self.full_name());
                    Step::new(self.stage(), object, "no match", looked.why(rule, mismatch))
                }),
            }
        }
        if self.rules.is_empty() {
            trace.step(|| Step::new(self.stage(), self.full_name(), "no match", "it has no rules".to_owned()));
        }
        None
    }

    fn stage(&self) -> &'static str {
        match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
            Action::Audit => "audit",
        }
    }
}

/// The first thing that does not hold. Of several sources or operations the last one's.
#[derive(Clone, Copy)]
enum Mismatch {
    Source(usize, SourceField),
    Operation(usize, OperationField),
    Condition(usize),
}

#[derive(Clone, Copy)]
enum SourceField {
    Principals,
    Namespaces,
    ServiceAccounts,
    IpBlocks,
}

#[derive(Clone, Copy)]
enum OperationField {
    Hosts,
    Ports,
    Methods,
    Paths,
}

/// One rule looked at with one set of facts.
#[derive(Clone, Copy)]
struct Look<'l, 'f> {
    connection: &'l Connection<'f>,
    request: Option<&'l Request<'f>>,
    reading: Reading,
}

impl Look<'_, '_> {
    fn first_mismatch(&self, rule: &Rule) -> Option<Mismatch> {
        let mut failed = None;
        let mut holds = rule.from.is_empty();
        for (index, source) in rule.from.iter().enumerate() {
            match self.source(source) {
                None => {
                    holds = true;
                    break;
                }
                Some(field) => failed = Some(Mismatch::Source(index, field)),
            }
        }
        if !holds {
            return failed;
        }
        holds = rule.to.is_empty();
        for (index, operation) in rule.to.iter().enumerate() {
            match self.operation(operation) {
                None => {
                    holds = true;
                    break;
                }
                Some(field) => failed = Some(Mismatch::Operation(index, field)),
            }
        }
        if !holds {
            return failed;
        }
        rule.when.iter().position(|condition| !self.condition(condition)).map(Mismatch::Condition)
    }

    fn source(&self, source: &Source) -> Option<SourceField> {
        let identity = self.connection.identity;
        if !source.ip_blocks.is_empty() && !ip_holds(&source.ip_blocks, self.connection.source_ip) {
            return Some(SourceField::IpBlocks);
        }
        if !source.namespaces.is_empty() && !source.namespaces.hold(identity.map(|id| id.namespace()), Pattern::matches)
        {
            return Some(SourceField::Namespaces);
        }
        if !source.service_accounts.is_empty() && !self.account_holds(&source.service_accounts) {
            return Some(SourceField::ServiceAccounts);
        }
        if !source.principals.is_empty() && !self.principal_holds(&source.principals) {
            return Some(SourceField::Principals);
        }
        None
    }

    fn account_holds(&self, accounts: &Lists<Account>) -> bool {
        accounts.hold(self.connection.identity, |account, identity| {
            account.name == identity.account() && account.namespace == identity.namespace()
        })
    }

    fn principal_holds(&self, principals: &Lists<Pattern>) -> bool {
        principals.hold(self.connection.identity.map(|id| bare_principal(id.as_str())), Pattern::matches)
    }

    fn operation(&self, operation: &Operation) -> Option<OperationField> {
        if !operation.ports.hold(Some(self.connection.destination_port), |port, value| *port == value) {
            return Some(OperationField::Ports);
        }
        let Some(request) = self.request else {
            // Opaque bytes: the attributes cannot be looked at.
            let looks = [
                (OperationField::Methods, operation.methods.is_empty()),
                (OperationField::Paths, operation.paths.is_empty()),
                (OperationField::Hosts, operation.hosts.is_empty()),
            ];
            let first = looks.into_iter().find(|(_, empty)| !empty).map(|(field, _)| field);
            return if self.reading == Reading::Deny { None } else { first };
        };
        if !operation.methods.hold(Some(request.method), Pattern::matches) {
            return Some(OperationField::Methods);
        }
        if !operation.paths.is_empty() && !self.path_holds(&operation.paths, request.path) {
            return Some(OperationField::Paths);
        }
        if !operation.hosts.is_empty() && !host_holds(&operation.hosts, request.host) {
            return Some(OperationField::Hosts);
        }
        None
    }

    /// DENY looks at a path with and without its `;parameters`: servers differ in what they make of those.
    fn path_holds(&self, paths: &Lists<Pattern>, path: &NormalPath<'_>) -> bool {
        let holds = |text: &str| paths.hold(Some(text), Pattern::matches);
        holds(&path.text) || self.reading == Reading::Deny && path.without_parameters().is_some_and(|bare| holds(&bare))
    }

    fn condition(&self, condition: &Condition) -> bool {
        if condition.key.is_http() && self.request.is_none() {
            return self.reading == Reading::Deny;
        }
        let connection = self.connection;
        match (&condition.values, &condition.key) {
            (Values::Addresses(lists), Attribute::SourceIp) => ip_holds(lists, connection.source_ip),
            (Values::Addresses(lists), Attribute::DestinationIp) => ip_holds(lists, connection.destination_ip),
            (Values::Ports(lists), _) => lists.hold(Some(connection.destination_port), |port, value| *port == value),
            (Values::Accounts(lists), _) => self.account_holds(lists),
            (Values::Texts(lists), Attribute::SourcePrincipal) => self.principal_holds(lists),
            (Values::Texts(lists), Attribute::Header(name)) => match self.request {
                Some(request) => header_holds(lists, request, name, self.reading),
                None => self.reading == Reading::Deny,
            },
            (Values::Texts(lists), Attribute::Path) => match self.request {
                Some(request) => self.path_holds(lists, request.path),
                None => self.reading == Reading::Deny,
            },
            (Values::Texts(lists), Attribute::Host) => match self.request {
                Some(request) => host_holds(lists, request.host),
                None => self.reading == Reading::Deny,
            },
            (Values::Texts(lists), key) => self.text_holds(lists, key),
            // The compiler of policies gives addresses to no other key.
            (Values::Addresses(_), _) => self.reading == Reading::Deny,
        }
    }

    fn text_holds(&self, lists: &Lists<Pattern>, key: &Attribute) -> bool {
        let connection = self.connection;
        match key {
            Attribute::SourceNamespace => lists.hold(connection.identity.map(|id| id.namespace()), Pattern::matches),
            Attribute::DestinationLabel(name) => {
                lists.hold(connection.labels.get(name).map(String::as_str), Pattern::matches)
            }
            Attribute::Method => lists.hold(self.request.map(|request| request.method), Pattern::matches),
            Attribute::GrpcService => lists.hold(self.grpc().map(|(service, _)| service), Pattern::matches),
            Attribute::GrpcMethod => lists.hold(self.grpc().map(|(_, method)| method), Pattern::matches),
            Attribute::Hour => {
                let hour = connection.now.hour;
                let tens = [b'0' + hour / 10, b'0' + hour % 10];
                let text = std::str::from_utf8(if hour < 10 { &tens[1..] } else { &tens }).unwrap_or("");
                lists.hold(Some(text), Pattern::matches)
            }
            Attribute::Weekday => {
                let day = Moment::WEEKDAYS.get(usize::from(connection.now.weekday)).copied();
                lists.hold(day, Pattern::matches)
            }
            Attribute::Header(_)
            | Attribute::SourceIp
            | Attribute::SourcePrincipal
            | Attribute::SourceServiceAccount
            | Attribute::DestinationIp
            | Attribute::DestinationPort
            | Attribute::Path
            | Attribute::Host => self.reading == Reading::Deny,
        }
    }

    /// `package.Service` and `Method` of a gRPC call.
    fn grpc(&self) -> Option<(&str, &str)> {
        let request = self.request?;
        let mut is_grpc = false;
        request.headers.each_value("content-type", &mut |value| {
            is_grpc |= value.starts_with(b"application/grpc");
            !is_grpc
        });
        let (service, method) = request.path.text.strip_prefix('/')?.split_once('/')?;
        is_grpc.then_some((service, method))
    }

    /// What did not hold and the value that was seen.
    fn why(&self, rule: &Rule, mismatch: Mismatch) -> String {
        let connection = self.connection;
        let identity =
            || connection.identity.map_or_else(|| "without a proved identity".to_owned(), ToString::to_string);
        match mismatch {
            Mismatch::Source(index, field) => {
                let source = &rule.from[index];
                let (name, seen, wanted) = match field {
                    SourceField::Principals => ("principals", identity(), wanted(&source.principals)),
                    SourceField::Namespaces => ("namespaces", identity(), wanted(&source.namespaces)),
                    SourceField::ServiceAccounts => ("serviceAccounts", identity(), wanted(&source.service_accounts)),
                    SourceField::IpBlocks => ("ipBlocks", shown(connection.source_ip), wanted(&source.ip_blocks)),
                };
                format!("from[{index}].source.{name}: the caller is {seen}, {wanted}")
            }
            Mismatch::Operation(index, field) => {
                let operation = &rule.to[index];
                let request = self.request;
                let opaque = || "opaque bytes, in which this cannot be seen".to_owned();
                let (name, seen, wanted) = match field {
                    OperationField::Ports => {
                        ("ports", connection.destination_port.to_string(), wanted(&operation.ports))
                    }
                    OperationField::Hosts => {
                        ("hosts", request.map_or_else(opaque, |r| normal_host(r.host)), wanted(&operation.hosts))
                    }
                    OperationField::Methods => {
                        ("methods", request.map_or_else(opaque, |r| r.method.to_owned()), wanted(&operation.methods))
                    }
                    OperationField::Paths => {
                        ("paths", request.map_or_else(opaque, |r| r.path.text.to_string()), wanted(&operation.paths))
                    }
                };
                format!("to[{index}].operation.{name}: it is {seen:?}, {wanted}")
            }
            Mismatch::Condition(index) => {
                let condition = &rule.when[index];
                let wanted = match &condition.values {
                    Values::Texts(lists) => wanted(lists),
                    Values::Addresses(lists) => wanted(lists),
                    Values::Ports(lists) => wanted(lists),
                    Values::Accounts(lists) => wanted(lists),
                };
                format!("when[{index}] {}: it is {}, {wanted}", condition.key, self.seen(&condition.key))
            }
        }
    }

    fn seen(&self, key: &Attribute) -> String {
        let connection = self.connection;
        if key.is_http() && self.request.is_none() {
            return "not to be seen in opaque bytes".to_owned();
        }
        let quoted = |text: Option<&str>| text.map_or_else(|| NOTHING.to_owned(), |text| format!("{text:?}"));
        match key {
            Attribute::Header(name) => {
                let mut values = Vec::new();
                if let Some(request) = self.request {
                    request.headers.each_value(name, &mut |value| {
                        values.push(format!("{:?}", String::from_utf8_lossy(value)));
                        values.len() < 8
                    });
                }
                if values.is_empty() { NOTHING.to_owned() } else { values.join(", ") }
            }
            Attribute::SourceIp => shown(connection.source_ip),
            Attribute::DestinationIp => shown(connection.destination_ip),
            Attribute::SourceNamespace => quoted(connection.identity.map(|id| id.namespace())),
            Attribute::SourcePrincipal | Attribute::SourceServiceAccount => {
                quoted(connection.identity.map(|id| id.as_str()))
            }
            Attribute::DestinationPort => connection.destination_port.to_string(),
            Attribute::DestinationLabel(name) => quoted(connection.labels.get(name).map(String::as_str)),
            Attribute::Method => quoted(self.request.map(|request| request.method)),
            Attribute::Path => quoted(self.request.map(|request| request.path.text.as_ref())),
            Attribute::Host => quoted(self.request.map(|request| request.host)),
            Attribute::GrpcService => quoted(self.grpc().map(|(service, _)| service)),
            Attribute::GrpcMethod => quoted(self.grpc().map(|(_, method)| method)),
            Attribute::Hour => connection.now.hour.to_string(),
            Attribute::Weekday => quoted(Moment::WEEKDAYS.get(usize::from(connection.now.weekday)).copied()),
        }
    }
}

const NOTHING: &str = "absent";

fn shown(ip: Option<IpAddr>) -> String {
    ip.map_or_else(|| NOTHING.to_owned(), |ip| ip.to_string())
}

fn wanted<T: fmt::Display>(lists: &Lists<T>) -> String {
    let listed = |list: &[T]| list.iter().take(8).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match (lists.any_of.is_empty(), lists.none_of.is_empty()) {
        (false, true) => format!("expected one of {}", listed(&lists.any_of)),
        (true, _) => format!("expected none of {}", listed(&lists.none_of)),
        (false, false) => {
            format!("expected one of {} and none of {}", listed(&lists.any_of), listed(&lists.none_of))
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `spiffe://` is left out in Istio's principals.
fn bare_principal(id: &str) -> &str {
    id.strip_prefix("spiffe://").unwrap_or(id)
}

fn ip_holds(lists: &Lists<IpNet>, ip: Option<IpAddr>) -> bool {
    // An IPv4 client of a dual-stack listener is an IPv4 client.
    lists.hold(ip.map(|ip| ip.to_canonical()), |block, ip| block.contains(&ip))
}

fn host_holds(lists: &Lists<Pattern>, host: &str) -> bool {
    lists.hold(Some(normal_host(host).as_str()), Pattern::matches)
}

/// A field may come several times, and as a list: DENY holds when any value does, ALLOW when all do. A line counts as a
/// whole and by its members.
fn header_holds(lists: &Lists<Pattern>, request: &Request<'_>, name: &str, reading: Reading) -> bool {
    let mut present = false;
    let mut any = false;
    let mut all = true;
    request.headers.each_value(name, &mut |line| {
        present = true;
        let members = || line.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        let among = |list: &[Pattern], value: &[u8]| list.iter().any(|pattern| pattern.matches_bytes(value));
        let one =
            |value: &[u8]| (lists.any_of.is_empty() || among(&lists.any_of, value)) && !among(&lists.none_of, value);
        any |= one(line) || members().any(one);
        let wanted = lists.any_of.is_empty()
            || among(&lists.any_of, line)
            || members().all(|member| among(&lists.any_of, member));
        let unwanted = among(&lists.none_of, line) || members().any(|member| among(&lists.none_of, member));
        all &= wanted && !unwanted;
        true
    });
    match (present, reading) {
        (false, _) => lists.any_of.is_empty(),
        (true, Reading::Deny) => any,
        (true, Reading::Allow) => all,
    }
}
