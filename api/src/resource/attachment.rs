//! What a policy is attached to: workloads by their labels, or ports by the Services that `targetRefs` name. Read and
//! decided in the same way for every kind that has both.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::findings::Findings;
use super::path::{Path, Shortened};
use super::peer_authentication::{RawSelector, Selector};
use super::syntax::check_labels;
use super::{Labels, Metadata};
use crate::identity::ROOT_NAMESPACE;
use crate::name::is_label;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Attachment {
    /// None: every workload of the namespace; in the root namespace of the mesh, with a selector as without.
    pub selector: Option<Selector>,
    /// Names of Services of the policy's namespace; empty: every port of the workload.
    pub services: Vec<String>,
}

impl Attachment {
    /// Whether a policy that is attached so is about a workload with these labels. `metadata` is the policy's.
    pub fn selects(&self, metadata: &Metadata, namespace: &str, labels: &Labels) -> bool {
        let mut wanted = self.selector.iter().flat_map(|selector| &selector.match_labels);
        (metadata.namespace == namespace || metadata.namespace == ROOT_NAMESPACE)
            && wanted.all(|(key, value)| labels.get(key) == Some(value))
    }

    /// `name.namespace` of the Services, by which the policy is asked for per port.
    pub fn service_names(&self, metadata: &Metadata) -> Vec<String> {
        self.services.iter().map(|name| format!("{name}.{}", metadata.namespace)).collect()
    }
}

/// The fields as written.
#[derive(Default)]
pub(super) struct RawAttachment {
    pub(super) selector: Option<RawSelector>,
    /// An older form of Istio's, for one.
    pub(super) target_ref: Option<RawTargetRef>,
    pub(super) target_refs: Vec<RawTargetRef>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawTargetRef {
    group: String,
    kind: String,
    name: String,
    namespace: Option<String>,
    section_name: Option<IgnoredAny>,
}

impl RawAttachment {
    /// `path` is that of `spec`. A selector without labels is none, as in Istio.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Attachment {
        let labels = self.selector.map(|selector| selector.match_labels).unwrap_or_default();
        check_labels(&labels, &path.key("selector").key("matchLabels"), findings);
        let selector = (!labels.is_empty()).then_some(Selector { match_labels: labels });
        let mut services = Vec::new();
        if let Some(target) = self.target_ref {
            services.extend(target.check(metadata, &path.key("targetRef"), findings));
        }
        for (index, target) in self.target_refs.into_iter().enumerate() {
            services.extend(target.check(metadata, &path.key("targetRefs").index(index), findings));
        }
        if selector.is_some() && !services.is_empty() {
            let message = "stands beside `selector`: write one of the two".to_owned();
            findings.error_at_key(&path.key("targetRefs"), message);
        }
        Attachment { selector, services }
    }
}

impl RawTargetRef {
    /// The name of the Service.
    fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<String> {
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
