//! A condition as written: what `when` looks at, and the values that it may have.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::nearest::suggestion;
use super::super::path::{Path, Shortened};
use super::value::{Written, account, block, host, hour, lists, method, path_pattern, port, principal, weekday};
use crate::expression::{Expression, Mistake};
use crate::policy::authorization::{Attribute, Condition, Values};
use crate::policy::pattern::Pattern;

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawCondition {
    key: Option<String>,
    values: Written,
    not_values: Written,
    expression: Option<String>,
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
    "source.labels[NAME]",
    "destination.ip",
    "destination.port",
    "destination.labels[NAME]",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[NAME]",
    "grpc.service",
    "grpc.method",
    "time.hour",
    "time.weekday",
    "connection.sni",
];

impl RawCondition {
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Condition> {
        if let Some(text) = &self.expression {
            let path = path.key("expression");
            if self.key.is_some() || self.values.is_some() || self.not_values.is_some() {
                findings.error_at_key(&path, "stands beside `key`: write it as a condition of its own".to_owned());
            }
            return match Expression::new(text) {
                Ok(expression) => {
                    let values = Values::Expression { expression, accounts: BTreeMap::new() };
                    Some(Condition { key: Attribute::Expression, values })
                }
                Err(Mistake { at, message }) => {
                    findings.error(&path, format!("at its character {at}: {message}"));
                    None
                }
            };
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
            Attribute::SourceLabel(_) => Values::Labelled {
                lists: lists(written, path, names, findings, |text| Ok(Pattern::new(&text))),
                accounts: BTreeMap::new(),
            },
            key => Values::Texts(lists(written, path, names, findings, |text| match key {
                Attribute::SourcePrincipal => principal(&text),
                Attribute::Path => path_pattern(&text),
                Attribute::Host | Attribute::Sni => host(&text),
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
    if let Some(path) = text.strip_prefix("request.auth.claims[") {
        let names: Option<Vec<&str>> = path.strip_suffix(']').map(|path| path.split("][").collect());
        let names = names.filter(|names| names.iter().all(|name| !name.is_empty() && !name.contains(['[', ']'])));
        let wrong =
            || format!("{} is no claim: request.auth.claims[NAME], or [NAME][NAME] for one inside", Shortened(text));
        return Ok(Attribute::Claim(names.ok_or_else(wrong)?.into_iter().map(str::to_owned).collect()));
    }
    if let Some(name) = named("source.labels[") {
        return Ok(Attribute::SourceLabel(name.to_owned()));
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
        "request.auth.principal" => Attribute::RequestPrincipal,
        "request.auth.audiences" => Attribute::Audiences,
        "request.auth.presenter" => Attribute::Presenter,
        "grpc.service" => Attribute::GrpcService,
        "grpc.method" => Attribute::GrpcMethod,
        "time.hour" => Attribute::Hour,
        "time.weekday" => Attribute::Weekday,
        "connection.sni" => Attribute::Sni,
        _ => return Err(format!("unknown key {}{}", Shortened(text), suggestion(text, KEYS))),
    })
}
