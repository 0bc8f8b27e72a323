//! `ReferenceGrant`: who may name objects of its namespace as backends.

use serde::Deserialize;

use super::super::findings::Findings;
use super::super::path::Path;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReferenceGrant {
    pub from: Vec<GrantFrom>,
    pub to: Vec<GrantTo>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrantFrom {
    pub group: String,
    pub kind: String,
    pub namespace: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrantTo {
    pub group: String,
    pub kind: String,
    /// None: all of that kind.
    pub name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(in super::super) struct RawReferenceGrant {
    from: Vec<RawFrom>,
    to: Vec<RawTo>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawFrom {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTo {
    group: Option<String>,
    kind: Option<String>,
    name: Option<String>,
}

impl RawReferenceGrant {
    /// `path` is that of `spec`.
    pub(in super::super) fn check(self, path: &Path, findings: &mut Findings) -> ReferenceGrant {
        for (field, empty) in [("from", self.from.is_empty()), ("to", self.to.is_empty())] {
            if empty {
                findings.error(path, format!("`{field}` is missing or empty: it grants nothing"));
            }
        }
        let at = path.key("from");
        let mut from = Vec::new();
        for (index, raw) in self.from.into_iter().enumerate() {
            match (raw.kind, raw.namespace) {
                (Some(kind), Some(namespace)) => {
                    from.push(GrantFrom { group: raw.group.unwrap_or_default(), kind, namespace });
                }
                _ => findings.error(&at.index(index), "`kind` and `namespace` say who may".to_owned()),
            }
        }
        let at = path.key("to");
        let mut to = Vec::new();
        for (index, raw) in self.to.into_iter().enumerate() {
            match raw.kind {
                Some(kind) => to.push(GrantTo { group: raw.group.unwrap_or_default(), kind, name: raw.name }),
                None => findings.error(&at.index(index), "`kind` is missing".to_owned()),
            }
        }
        ReferenceGrant { from, to }
    }
}
