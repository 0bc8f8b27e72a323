//! `parentRefs`: what a route binds. Services here; a Gateway's routes are somebody else's.

use serde::Deserialize;

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::metadata::not_a_label;
use super::super::path::{Path, Shortened};
use super::super::syntax::Port;
use crate::name::is_label;

/// A Service that a route binds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parent {
    pub namespace: String,
    pub name: String,
    /// None: all its ports.
    pub port: Option<u16>,
    /// The name of a port.
    pub section: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawParentRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    section_name: Option<String>,
    port: Option<Port>,
}

/// `path` is that of `spec`.
pub(super) fn check(
    written: Vec<RawParentRef>,
    metadata: &Metadata,
    path: &Path,
    findings: &mut Findings,
) -> Vec<Parent> {
    let at = path.key("parentRefs");
    if written.is_empty() {
        findings.warning(path, "without `parentRefs` it binds nothing".to_owned());
    }
    let mut parents: Vec<Parent> = Vec::new();
    for (index, parent) in written.into_iter().enumerate() {
        let at = at.index(index);
        let Some(parent) = parent.check(metadata, &at, findings) else { continue };
        if parents.contains(&parent) {
            findings.error(&at, "is the same parent as one before it".to_owned());
            continue;
        }
        parents.push(parent);
    }
    parents
}

impl RawParentRef {
    fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Parent> {
        let (group, kind) = (self.group.as_deref(), self.kind.as_deref());
        match (group.unwrap_or("gateway.networking.k8s.io"), kind.unwrap_or("Gateway")) {
            ("" | "core", "Service") => {}
            ("gateway.networking.k8s.io", "Gateway" | "ListenerSet") => {
                let message = "is a Gateway's affair, which this mesh is not: a parent of kind Service with group \"\" is \
                               bound";
                findings.warning(path, message.to_owned());
                return None;
            }
            (_, kind) => {
                let message =
                    format!("{} cannot be bound (InvalidKind): write group \"\", kind Service", Shortened(kind));
                findings.error(path, message);
                return None;
            }
        }
        let Some(name) = self.name else {
            findings.error(path, "`name` is missing: which Service is bound".to_owned());
            return None;
        };
        let namespace = self.namespace.unwrap_or_else(|| metadata.namespace.clone());
        for (field, text) in [("name", &name), ("namespace", &namespace)] {
            if !is_label(text) {
                findings.error(&path.key(field), not_a_label(text));
                return None;
            }
        }
        Some(Parent { namespace, name, port: self.port.map(|port| port.0), section: self.section_name })
    }
}
