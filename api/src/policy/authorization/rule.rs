//! One rule against one set of facts: what the data path decides by, and what of a rule did not hold.

use std::net::IpAddr;

use ipnet::IpNet;

use super::form::{Account, Attribute, Condition, Lists, Operation, Rule, Source, Values};
use super::token;
use crate::facts::{Connection, Moment, Request, lower_host, normal_host};
use crate::path::NormalPath;
use crate::policy::pattern::Pattern;

/// Which side errs: towards refusing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Deny,
    Allow,
}

/// The first thing that does not hold. Of several sources or operations the last one's.
#[derive(Clone, Copy)]
pub(super) enum Mismatch {
    Source(usize, SourceField),
    Operation(usize, OperationField),
    Condition(usize),
}

#[derive(Clone, Copy)]
pub(super) enum SourceField {
    Principals,
    Namespaces,
    ServiceAccounts,
    IpBlocks,
    RequestPrincipals,
}

#[derive(Clone, Copy)]
pub(super) enum OperationField {
    Hosts,
    Ports,
    Methods,
    Paths,
}

/// One rule looked at with one set of facts.
#[derive(Clone, Copy)]
pub(super) struct Look<'l, 'f> {
    pub(super) connection: &'l Connection<'f>,
    pub(super) request: Option<&'l Request<'f>>,
    pub(super) reading: Reading,
}

impl Look<'_, '_> {
    pub(super) fn first_mismatch(&self, rule: &Rule) -> Option<Mismatch> {
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
        if !source.request_principals.is_empty() {
            let holds = match self.request {
                Some(request) => token::principal_holds(&source.request_principals, request.claims),
                // Opaque bytes: no token can be looked at.
                None => self.reading == Reading::Deny,
            };
            return (!holds).then_some(SourceField::RequestPrincipals);
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
        if condition.is_http() && self.request.is_none() {
            return self.reading == Reading::Deny;
        }
        let connection = self.connection;
        match (&condition.values, &condition.key) {
            (Values::Addresses(lists), Attribute::SourceIp) => ip_holds(lists, connection.source_ip),
            (Values::Addresses(lists), Attribute::DestinationIp) => ip_holds(lists, connection.destination_ip),
            (Values::Ports(lists), _) => lists.hold(Some(connection.destination_port), |port, value| *port == value),
            (Values::Accounts(lists), _) => self.account_holds(lists),
            (Values::Labelled { lists, accounts }, _) => lists.hold(self.label(accounts), Pattern::matches),
            (Values::Expression { expression, accounts }, _) => {
                self.evaluate(expression, accounts).unwrap_or(self.reading == Reading::Deny)
            }
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
            Attribute::Claim(_) | Attribute::RequestPrincipal | Attribute::Audiences | Attribute::Presenter => {
                token::holds(lists, key, self.request.and_then(|request| request.claims))
            }
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
            Attribute::Sni => lists.hold(connection.sni, Pattern::matches),
            Attribute::Header(_)
            | Attribute::SourceLabel(_)
            | Attribute::Expression
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
    pub(super) fn grpc(&self) -> Option<(&str, &str)> {
        let request = self.request?;
        let mut is_grpc = false;
        request.headers.each_value("content-type", &mut |value| {
            is_grpc |= value.starts_with(b"application/grpc");
            !is_grpc
        });
        let (service, method) = request.path.text.strip_prefix('/')?.split_once('/')?;
        is_grpc.then_some((service, method))
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
    let mut place = [0; 256];
    match lower_host(host, &mut place) {
        Some(host) => lists.hold(Some(host), Pattern::matches),
        None => lists.hold(Some(normal_host(host).as_str()), Pattern::matches),
    }
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
