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
use super::attachment::{Attachment, RawAttachment, RawTargetRef};
use super::findings::Findings;
use super::path::Path;
use super::peer_authentication::RawSelector;
use crate::policy::authorization::{Action, Rule};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuthorizationPolicy {
    pub attachment: Attachment,
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
        let target_refs = self.target_refs.unwrap_or_default();
        let attachment = RawAttachment { selector: self.selector, target_ref: self.target_ref, target_refs };
        let attachment = attachment.check(metadata, path, findings);
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
        AuthorizationPolicy { attachment, action, shadow: self.mode == Some(RawMode::Shadow), rules }
    }
}
