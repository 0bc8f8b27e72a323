//! `backendRefs`: where a rule sends what matches.

use serde::Deserialize;

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::metadata::not_a_label;
use super::super::path::{Path, Shortened};
use super::super::syntax::Port;
use super::filters::{self, RawFilter};
use crate::name::{ServiceName, ServicePort, is_label};
use crate::route::{Backend, Filters, Kind, To};

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawBackendRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    port: Option<Port>,
    weight: Option<u32>,
    filters: Vec<RawFilter>,
}

const MOST_WEIGHT: u32 = 1_000_000;

/// `path` is that of the rule; `answers`: the rule answers by itself.
pub(super) fn check(
    written: Vec<RawBackendRef>,
    kind: Kind,
    answers: bool,
    metadata: &Metadata,
    path: &Path,
    findings: &mut Findings,
) -> Vec<Backend> {
    if written.is_empty() && !answers {
        let message = match kind.is_http() {
            true => "without `backendRefs` every request that matches gets 500 (backend_invalid)",
            false => "without `backendRefs` every connection that matches is reset (backend_invalid)",
        };
        findings.warning(path, message.to_owned());
    }
    if answers && !written.is_empty() {
        findings
            .error(&path.key("backendRefs"), "is never used beside a RequestRedirect: write one of the two".to_owned());
    }
    let at = path.key("backendRefs");
    let written = written.into_iter().enumerate();
    written.filter_map(|(index, one)| one.check(kind, metadata, &at.index(index), findings)).collect()
}

impl RawBackendRef {
    pub(super) fn check(
        self,
        kind: Kind,
        metadata: &Metadata,
        path: &Path,
        findings: &mut Findings,
    ) -> Option<Backend> {
        let weight = self.weight.unwrap_or(1);
        if weight > MOST_WEIGHT {
            findings.error(&path.key("weight"), format!("{weight} is more than {MOST_WEIGHT}"));
        }
        let filters = match kind.is_http() {
            true => filters::check(self.filters, kind, metadata, &path.key("filters"), findings),
            false => {
                if !self.filters.is_empty() {
                    findings.warning(&path.key("filters"), format!("are no field of {kind}"));
                }
                Filters::default()
            }
        };
        for (there, what) in [
            (filters.redirect.is_some(), "RequestRedirect"),
            (filters.rewrite.is_some(), "URLRewrite"),
            (!filters.mirrors.is_empty(), "RequestMirror"),
            (filters.cors.is_some(), "CORS"),
        ] {
            if there {
                let message = format!("{what} is not supported for one backend: write it in the rule's `filters`");
                findings.error(&path.key("filters"), message);
            }
        }
        let named = self.name.as_deref().unwrap_or_default();
        match (self.group.as_deref().unwrap_or_default(), self.kind.as_deref().unwrap_or("Service")) {
            ("" | "core", "Service") => {}
            (group, kind) => {
                let group = if group.is_empty() { String::new() } else { format!("{}/", Shortened(group)) };
                let what = format!("{group}{} {}", Shortened(kind), Shortened(named));
                findings.warning(path, format!("InvalidKind: {what} is no Service, so its share gets 500"));
                return Some(Backend { to: None, invalid: Some(format!("InvalidKind: {what}")), weight, filters });
            }
        }
        let Some(name) = &self.name else {
            findings.error(path, "`name` is missing: which Service gets it".to_owned());
            return None;
        };
        let namespace = self.namespace.as_ref().unwrap_or(&metadata.namespace);
        for (field, text) in [("name", name), ("namespace", namespace)] {
            if !is_label(text) {
                findings.error(&path.key(field), not_a_label(text));
                return None;
            }
        }
        let Some(Port(port)) = self.port else {
            findings.error(path, "`port` is missing: a Service needs one here".to_owned());
            return None;
        };
        let service = ServiceName::new(name, namespace).ok()?;
        Some(Backend { to: Some(To(ServicePort { service, port })), invalid: None, weight, filters })
    }
}
