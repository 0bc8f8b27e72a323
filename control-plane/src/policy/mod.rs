//! Which mutual-TLS mode is in force for a workload: the narrowest PeerAuthentication that says something decides.
//! Pure; called by the index for the workload itself and for each of its endpoints.

use std::collections::BTreeMap;

use outrigger_api::identity::ROOT_NAMESPACE;
use outrigger_api::resource::{Labels, PeerAuthentication, Resources};
use outrigger_api::snapshot::MtlsMode;

/// The modes of one workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModeSet {
    pub default: MtlsMode,
    /// By the application's port, where it differs.
    pub ports: BTreeMap<u16, MtlsMode>,
}

impl ModeSet {
    pub fn port(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// The modes in force for a workload with these labels.
pub fn mtls_modes(resources: &Resources, namespace: &str, labels: &Labels) -> ModeSet {
    let policies = || resources.peer_authentications.values();
    let of = |wanted: &str| {
        let wanted = wanted.to_owned();
        policies().filter(move |policy| policy.metadata.namespace == wanted).map(|policy| &policy.spec)
    };
    let whole = |policy: &&PeerAuthentication| policy.selector.is_none();
    let mesh = of(ROOT_NAMESPACE).filter(whole).find_map(|policy| policy.mode);
    let in_namespace = of(namespace).filter(whole).find_map(|policy| policy.mode);
    let selected: Vec<&PeerAuthentication> = of(namespace)
        .filter(|policy| policy.selector.as_ref().is_some_and(|selector| contains(labels, &selector.match_labels)))
        .collect();
    let own = selected.iter().find_map(|policy| policy.mode);
    let default = own.or(in_namespace).or(mesh).unwrap_or(MtlsMode::Permissive);
    let mut ports = BTreeMap::new();
    for policy in selected {
        for (port, mode) in &policy.port_level {
            ports.entry(*port).or_insert(*mode);
        }
    }
    ModeSet { default, ports }
}

/// True when every wanted label is there.
pub fn contains(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
