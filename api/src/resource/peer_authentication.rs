//! `PeerAuthentication`: whether the inbound side takes mutual TLS only, both, or plaintext only.

use std::collections::BTreeMap;

use super::Labels;
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
