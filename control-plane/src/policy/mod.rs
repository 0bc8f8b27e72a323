//! What the operator's policies say about one workload, as the index asks for it. The decisions themselves are pure
//! functions of `outrigger_api::policy`, which `explain` and offline tests call too.

use outrigger_api::compile::ModeSet;
use outrigger_api::resource::{Labels, Resources};
use outrigger_api::snapshot::MtlsMode;

/// The modes in force for a workload with these labels.
pub fn mtls_modes(resources: &Resources, namespace: &str, labels: &Labels) -> ModeSet {
    let policies = resources.peer_authentications.values().map(|policy| (&policy.metadata, &policy.spec));
    outrigger_api::compile::mtls_modes(policies, namespace, labels)
}

/// The mode of one application port.
pub fn mode_of(modes: &ModeSet, port: u16) -> MtlsMode {
    modes.ports.get(&port).copied().unwrap_or(modes.default)
}

/// True when every wanted label is there.
pub fn contains(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
