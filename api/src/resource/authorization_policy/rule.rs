//! A rule as written: its `from` and `to`.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::path::Path;
use super::condition::RawCondition;
use super::value::{Written, account, block, host, lists, method, path_pattern, port, principal};
use crate::policy::authorization::{Action, Operation, Rule, Source};
use crate::policy::pattern::Pattern;

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct RawRule {
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

impl RawRule {
    pub(super) fn check(self, metadata: &Metadata, action: Action, path: &Path, findings: &mut Findings) -> Rule {
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
            request_principals: lists(
                (self.request_principals, self.not_request_principals),
                path,
                ["requestPrincipals", "notRequestPrincipals"],
                findings,
                |text| Ok(Pattern::new(&text)),
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
            && source.request_principals.any_of.is_empty()
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
