//! `metadata`: what all kinds have in common.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Metadata;
use super::findings::Findings;
use super::kind::Kind;
use super::nearest::suggestion;
use super::path::{Path, Shortened};
use super::syntax::{check_annotations, check_labels, is_subdomain};
use crate::name::is_label;

/// Fields that Kubernetes puts into every object. They mean nothing here and are no mistake.
pub(super) const STANDARD_FIELDS: &[&str] = &[
    "metadata.deletionGracePeriodSeconds",
    "metadata.deletionTimestamp",
    "metadata.finalizers",
    "metadata.generateName",
    "metadata.generation",
    "metadata.managedFields",
    "metadata.ownerReferences",
    "metadata.resourceVersion",
    "metadata.selfLink",
    "metadata.uid",
    "status",
];

/// Annotations with this prefix are ours: one that is not known is a mistake.
const OWN_PREFIX: &str = "outrigger.dev/";

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawMetadata {
    name: Option<String>,
    namespace: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    creation_timestamp: Option<String>,
}

impl RawMetadata {
    /// Checks it for an object of `kind`; `path` is that of `metadata`.
    pub(super) fn check(self, kind: Kind, path: &Path, findings: &mut Findings) -> Option<Metadata> {
        check_labels(&self.labels, &path.key("labels"), findings);
        check_annotations(&self.annotations, &path.key("annotations"), findings);
        self.check_own_annotations(kind, path, findings);
        let namespace = self.namespace.unwrap_or_else(|| "default".to_owned());
        if !is_label(&namespace) {
            findings.error(&path.key("namespace"), not_a_label(&namespace));
        }
        let Some(name) = self.name else {
            findings.error(path, "`name` is missing: every object needs one".to_owned());
            return None;
        };
        let wrong = match kind.facts().label {
            true => (!is_label(&name)).then_some(not_a_label as fn(&str) -> String),
            false => (!is_subdomain(&name)).then_some(not_a_subdomain as fn(&str) -> String),
        };
        if let Some(wrong) = wrong {
            findings.error(&path.key("name"), wrong(&name));
        }
        let created = self.creation_timestamp.filter(|text| {
            if !is_time(text) {
                let message =
                    format!("{:?} is not a time as in 2026-11-28T14:30:00Z: it counts as none", Shortened(text));
                findings.warning(&path.key("creationTimestamp"), message);
            }
            is_time(text)
        });
        Some(Metadata { name, namespace, labels: self.labels, annotations: self.annotations, created })
    }

    fn check_own_annotations(&self, kind: Kind, path: &Path, findings: &mut Findings) {
        let known = kind.facts().annotations;
        for key in self.annotations.keys().filter(|key| key.starts_with(OWN_PREFIX)) {
            if !known.contains(&key.as_str()) {
                let hint = match known {
                    [] => format!("; {} has none", kind.name()),
                    _ => suggestion(key, known),
                };
                let at = path.key("annotations").key(key);
                findings.error_at_key(&at, format!("unknown annotation {}{hint}", Shortened(key)));
            }
        }
    }
}

/// `YYYY-MM-DDTHH:MM:SSZ`, the one form in which Kubernetes writes it.
fn is_time(text: &str) -> bool {
    let form = b"0000-00-00T00:00:00Z";
    let fits = |(byte, of): (u8, &u8)| if *of == b'0' { byte.is_ascii_digit() } else { byte == *of };
    text.len() == form.len() && text.bytes().zip(form).all(fits)
}

pub(super) fn not_a_label(text: &str) -> String {
    format!(
        "{:?} is not a DNS label: 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit",
        Shortened(text)
    )
}

pub(super) fn not_a_subdomain(text: &str) -> String {
    format!("{:?} is not a DNS name: labels of a-z, 0-9 and '-' with dots between, at most 253 bytes", Shortened(text))
}
