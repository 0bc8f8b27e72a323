//! `AuthorizationPolicy`: who may call a workload, and what. Ours and Istio's (`security.istio.io`) are one kind; ours
//! adds `mode`. What is checked here is in the form that decides, [`crate::policy::authorization`]. Beside this file: `rule`
//! reads what callers and operations a rule names, `condition` its `when`, `value` the texts in both.

mod condition;
mod rule;
mod value;

use serde::Deserialize;
use serde::de::IgnoredAny;

use self::rule::RawRule;
use super::Metadata;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::peer_authentication::{RawSelector, Selector};
use super::syntax::check_labels;
use crate::name::is_label;
use crate::policy::authorization::{Action, Rule};

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
pub(in crate::resource) struct RawAuthorizationPolicy {
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
pub(in crate::resource) struct RawTargetRef {
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

impl RawAuthorizationPolicy {
    /// `path` is that of `spec`.
    pub(in crate::resource) fn check(
        self,
        metadata: &Metadata,
        path: &Path,
        findings: &mut Findings,
    ) -> AuthorizationPolicy {
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
    pub(in crate::resource) fn check(
        self,
        metadata: &Metadata,
        path: &Path,
        findings: &mut Findings,
    ) -> Option<String> {
        if self.section_name.is_some() {
            findings.error_at_key(
                &path.key("sectionName"),
                "not supported here: a policy is for all ports of a Service".to_owned(),
            );
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
