//! `RateLimitPolicy`: how many requests a workload takes, of all callers or of each. What is checked here is in the form
//! that decides, [`crate::policy::rate_limit`].

use std::time::Duration;

use serde::Deserialize;

use super::Metadata;
use super::attachment::{Attachment, RawAttachment, RawTargetRef};
use super::duration::WrittenDuration;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::peer_authentication::RawSelector;
use super::request_authentication::{claim_path, field_name};
use super::request_match::{self, RawMatch};
use super::syntax::is_subdomain;
use crate::identity::is_account;
use crate::name::is_label;
use crate::policy::authorization::Account;
use crate::policy::rate_limit::{By, Limit, Override, Rate};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RateLimitPolicy {
    pub attachment: Attachment,
    pub shadow: bool,
    pub limits: Vec<Limit>,
    pub overrides: Vec<Override>,
}

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawRateLimitPolicy {
    selector: Option<RawSelector>,
    target_refs: Vec<RawTargetRef>,
    mode: Option<RawMode>,
    limits: Vec<RawLimit>,
    overrides: Vec<RawOverride>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum RawMode {
    Enforce,
    Shadow,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawLimit {
    name: Option<String>,
    by: RawBy,
    header: Option<String>,
    claim: Option<String>,
    requests: Option<u32>,
    per: Option<WrittenDuration>,
    burst: Option<u32>,
    r#match: Vec<RawMatch>,
}

#[derive(Clone, Copy, Deserialize, Default)]
enum RawBy {
    #[default]
    Total,
    Identity,
    Header,
    Claim,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawOverride {
    identity: Option<String>,
    requests: Option<u32>,
    per: Option<WrittenDuration>,
    burst: Option<u32>,
}

const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

impl RawRateLimitPolicy {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> RateLimitPolicy {
        let attachment = RawAttachment { selector: self.selector, target_ref: None, target_refs: self.target_refs };
        let attachment = attachment.check(metadata, path, findings);
        if self.limits.is_empty() {
            findings.error(path, "`limits` is missing or empty: it limits nothing".to_owned());
        }
        let at = path.key("limits");
        let limits = self.limits.into_iter().enumerate();
        let limits: Vec<Limit> =
            limits.filter_map(|(index, limit)| limit.check(index, &at.index(index), findings)).collect();
        let at = path.key("overrides");
        if !self.overrides.is_empty() && !limits.iter().any(|limit| limit.by == By::Identity) {
            findings.warning(&at, "no limit is `by: Identity`, so none of them counts".to_owned());
        }
        let overrides = self.overrides.into_iter().enumerate();
        let overrides = overrides.filter_map(|(index, own)| own.check(metadata, &at.index(index), findings)).collect();
        RateLimitPolicy { attachment, shadow: self.mode == Some(RawMode::Shadow), limits, overrides }
    }
}

impl RawLimit {
    fn check(self, index: usize, path: &Path, findings: &mut Findings) -> Option<Limit> {
        let name = self.name.unwrap_or_else(|| format!("limit-{index}"));
        if !is_subdomain(&name) {
            findings.error(&path.key("name"), super::metadata::not_a_subdomain(&name));
        }
        let by = match (self.by, &self.header, &self.claim) {
            (RawBy::Total, None, None) => By::Total,
            (RawBy::Identity, None, None) => By::Identity,
            (RawBy::Header, Some(header), None) => match field_name(header) {
                Ok(name) => By::Header(name),
                Err(message) => {
                    findings.error(&path.key("header"), message);
                    By::Total
                }
            },
            (RawBy::Claim, None, Some(claim)) => match claim_path(claim) {
                Ok(path) => By::Claim(path),
                Err(message) => {
                    findings.error(&path.key("claim"), message);
                    By::Total
                }
            },
            _ => {
                let message = "`by` is Total, Identity, Header with `header`, or Claim with `claim`".to_owned();
                findings.error(path, message);
                By::Total
            }
        };
        let matches = request_match::check(self.r#match, &path.key("match"), findings);
        let rate = rate(self.requests, self.per, self.burst, path, findings)?;
        Some(Limit { name, by, rate, matches })
    }
}

impl RawOverride {
    fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Override> {
        let rate = rate(self.requests, self.per, self.burst, path, findings);
        let Some(text) = self.identity else {
            findings.error(path, "`identity` is missing: NAMESPACE/ACCOUNT, or ACCOUNT of this namespace".to_owned());
            return None;
        };
        let (namespace, name) = text.split_once('/').unwrap_or((metadata.namespace.as_str(), &text));
        if !is_label(namespace) || !is_account(name) {
            let message = format!(
                "{} is not a service account: NAMESPACE/ACCOUNT, or ACCOUNT of this namespace",
                Shortened(&text)
            );
            findings.error(&path.key("identity"), message);
            return None;
        }
        let identity = Account { namespace: namespace.to_owned(), name: name.to_owned() };
        Some(Override { identity, rate: rate? })
    }
}

/// `per` is a second unless said otherwise, `burst` as many as `requests`.
fn rate(
    requests: Option<u32>,
    per: Option<WrittenDuration>,
    burst: Option<u32>,
    path: &Path,
    findings: &mut Findings,
) -> Option<Rate> {
    let per = per.map_or(Duration::from_secs(1), |per| per.0);
    if per < Duration::from_millis(1) || per > LONGEST {
        findings.error(&path.key("per"), "a limit is for 1ms to 24h".to_owned());
    }
    if burst == Some(0) {
        findings.error(&path.key("burst"), "no request would ever fit: at least 1".to_owned());
    }
    match requests {
        Some(0) => {
            let message = "no request would ever fit: to refuse all there is AuthorizationPolicy with action DENY";
            findings.error(&path.key("requests"), message.to_owned());
            None
        }
        Some(requests) => {
            let per_ms = u64::try_from(per.as_millis()).unwrap_or(u64::MAX).max(1);
            Some(Rate { requests, per_ms, burst: burst.unwrap_or(requests).max(1) })
        }
        None => {
            findings.error(path, "`requests` is missing: how many".to_owned());
            None
        }
    }
}
