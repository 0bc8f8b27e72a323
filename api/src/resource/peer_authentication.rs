//! `PeerAuthentication`: whether the inbound side takes mutual TLS only, both, or plaintext only.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::findings::Findings;
use super::path::Path;
use super::syntax::{PortKey, check_labels};
use super::{Labels, Metadata};
use crate::identity::ROOT_NAMESPACE;
use crate::snapshot::MtlsMode;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerAuthentication {
    /// None: the whole namespace; in the root namespace the whole mesh.
    pub selector: Option<Selector>,
    /// `mtls.mode`; None (or UNSET): inherited from the wider scope.
    pub mode: Option<MtlsMode>,
    /// `portLevelMtls`, by the application's port. Needs a selector.
    pub port_level: BTreeMap<u16, MtlsMode>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector {
    pub match_labels: Labels,
}

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawPeerAuthentication {
    selector: RawSelector,
    target_refs: Option<IgnoredAny>,
    mtls: RawMtls,
    port_level_mtls: BTreeMap<PortKey, RawMtls>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawSelector {
    pub(super) match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawMtls {
    mode: Mode,
}

#[derive(Clone, Copy, Deserialize, Default)]
enum Mode {
    #[serde(rename = "STRICT")]
    Strict,
    #[serde(rename = "PERMISSIVE")]
    Permissive,
    #[serde(rename = "DISABLE")]
    Disable,
    #[default]
    #[serde(rename = "UNSET")]
    Unset,
}

impl Mode {
    fn set(self) -> Option<MtlsMode> {
        match self {
            Mode::Strict => Some(MtlsMode::Strict),
            Mode::Permissive => Some(MtlsMode::Permissive),
            Mode::Disable => Some(MtlsMode::Disable),
            Mode::Unset => None,
        }
    }
}

impl RawPeerAuthentication {
    /// `path` is that of `spec`. A selector without labels is none, as in Istio.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> PeerAuthentication {
        let selector_path = path.key("selector");
        check_labels(&self.selector.match_labels, &selector_path.key("matchLabels"), findings);
        if self.target_refs.is_some() {
            let path = path.key("targetRefs");
            findings.error_at_key(&path, "not in this version: use `selector.matchLabels`".to_owned());
        }
        let selector = Some(Selector { match_labels: self.selector.match_labels })
            .filter(|selector| !selector.match_labels.is_empty());
        if selector.is_some() && metadata.namespace == ROOT_NAMESPACE {
            let message =
                format!("reaches only workloads of {ROOT_NAMESPACE} itself; without it the whole mesh is meant");
            findings.warning(&selector_path, message);
        }
        if selector.is_none() && !self.port_level_mtls.is_empty() {
            let path = path.key("portLevelMtls");
            findings.error_at_key(&path, "needs `selector.matchLabels`: ports belong to workloads".to_owned());
        }
        let port_level = self.port_level_mtls.into_iter();
        PeerAuthentication {
            selector,
            mode: self.mtls.mode.set(),
            port_level: port_level.filter_map(|(PortKey(port), mtls)| Some((port, mtls.mode.set()?))).collect(),
        }
    }
}
