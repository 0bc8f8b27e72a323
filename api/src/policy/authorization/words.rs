//! What a step says of a rule that did not hold: the first condition that failed, and the value that it saw. For people
//! alone: nothing here decides.

use std::fmt;
use std::net::IpAddr;

use super::form::{Attribute, Condition, Lists, Rule, Values};
use super::rule::{Look, Mismatch, OperationField, SourceField};
use super::token;
use crate::facts::{Moment, normal_host};
use crate::peer_text::cut;

impl Look<'_, '_> {
    /// What did not hold and the value that was seen.
    pub(super) fn why(&self, rule: &Rule, mismatch: Mismatch) -> String {
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
                    SourceField::RequestPrincipals => {
                        let claims = self.request.and_then(|request| request.claims);
                        let seen = token::seen(&Attribute::RequestPrincipal, claims);
                        let seen =
                            seen.map_or_else(|| "without a token".to_owned(), |seen| format!("{seen} by its token"));
                        ("requestPrincipals", seen, wanted(&source.request_principals))
                    }
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
                if let Values::Expression { expression, accounts } = &condition.values {
                    let said = match self.evaluate(expression, accounts) {
                        _ if condition.is_http() && self.request.is_none() => {
                            "not to be seen in opaque bytes".to_owned()
                        }
                        Ok(_) => "it is false".to_owned(),
                        Err(why) => format!("it has no answer: {why}"),
                    };
                    return format!("when[{index}] expression {:?}: {said}", cut(expression.as_str()));
                }
                let wanted = match &condition.values {
                    Values::Texts(lists) => wanted(lists),
                    Values::Addresses(lists) => wanted(lists),
                    Values::Ports(lists) => wanted(lists),
                    Values::Accounts(lists) => wanted(lists),
                    Values::Labelled { lists, .. } => wanted(lists),
                    Values::Expression { .. } => String::new(),
                };
                format!("when[{index}] {}: it is {}, {wanted}", condition.key, self.seen(condition))
            }
        }
    }

    /// What a step adds for expressions that had no answer and were taken for matches all the same.
    pub(super) fn doubts(&self, rule: &Rule) -> String {
        let doubt = |condition: &Condition| match &condition.values {
            Values::Expression { expression, accounts } if self.request.is_some() || !condition.is_http() => {
                let why = self.evaluate(expression, accounts).err()?;
                Some(format!(
                    "; expression {:?} has no answer ({why}), which counts as a match",
                    cut(expression.as_str())
                ))
            }
            _ => None,
        };
        rule.when.iter().filter_map(doubt).collect()
    }

    fn seen(&self, condition: &Condition) -> String {
        let (connection, key) = (self.connection, &condition.key);
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
            Attribute::Claim(_) | Attribute::RequestPrincipal | Attribute::Audiences | Attribute::Presenter => {
                let claims = self.request.and_then(|request| request.claims);
                let nothing = || if claims.is_some() { NOTHING } else { "absent, there is no token" }.to_owned();
                token::seen(key, claims).unwrap_or_else(nothing)
            }
            Attribute::SourceLabel(_) => match &condition.values {
                Values::Labelled { accounts, .. } => quoted(self.label(accounts)),
                _ => NOTHING.to_owned(),
            },
            Attribute::Sni => quoted(connection.sni),
            Attribute::Expression => String::new(),
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
