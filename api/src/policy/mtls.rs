//! Which mTLS mode each port of a workload has, from the PeerAuthentications that concern it.

use std::collections::BTreeMap;

use crate::identity::ROOT_NAMESPACE;
use crate::resource::{Labels, Metadata, PeerAuthentication};
use crate::snapshot::MtlsMode;

/// What is in force for one workload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModeSet {
    /// For every port that is not in `ports`.
    pub default: MtlsMode,
    /// By the application's port.
    pub ports: BTreeMap<u16, MtlsMode>,
    /// Pairs of objects (`namespace/name`) of one level that say different things; the stricter is in force.
    pub contradictions: Vec<(String, String)>,
}

/// Decides with Istio's precedence: a policy that selects the workload, else the namespace's, else the mesh's
/// (no selector, in `outrigger-system`), else PERMISSIVE. A policy without a mode (UNSET) says nothing and the wider
/// one counts. Ports come from selecting policies only.
///
/// As in Istio a selector never reaches beyond its own namespace, not even from `outrigger-system`: it would turn an
/// exception that somebody made for one workload of the mesh's own into one for every namespace that uses the same labels.
pub fn mtls_modes<'a>(
    policies: impl IntoIterator<Item = (&'a Metadata, &'a PeerAuthentication)>,
    namespace: &str,
    labels: &Labels,
) -> ModeSet {
    let mut levels: [Vec<Opinion<'a>>; 3] = Default::default();
    for (metadata, policy) in policies {
        let level = match &policy.selector {
            Some(selector) if !selector.match_labels.is_empty() => {
                let selects = metadata.namespace == namespace
                    && selector.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value));
                if !selects {
                    continue;
                }
                Level::Workload
            }
            _ if metadata.namespace == ROOT_NAMESPACE => Level::Mesh,
            _ if metadata.namespace == namespace => Level::Namespace,
            _ => continue,
        };
        levels[level as usize].push(Opinion { metadata, policy });
    }

    let mut contradictions = Vec::new();
    let [mesh, namespace, workload] = &levels;
    let mut default = MtlsMode::Permissive;
    for level in [mesh, namespace, workload] {
        if let Some(mode) = strictest(level, |policy| policy.mode, &mut contradictions) {
            default = mode;
        }
    }
    let mut ports = BTreeMap::new();
    for port in workload.iter().flat_map(|opinion| opinion.policy.port_level.keys().copied()) {
        let says = |policy: &PeerAuthentication| policy.port_level.get(&port).copied().or(policy.mode);
        if let Some(mode) = strictest(workload, says, &mut contradictions) {
            ports.insert(port, mode);
        }
    }
    contradictions.sort();
    contradictions.dedup();
    ModeSet { default, ports, contradictions }
}

#[derive(Clone, Copy)]
enum Level {
    Mesh,
    Namespace,
    Workload,
}

struct Opinion<'a> {
    metadata: &'a Metadata,
    policy: &'a PeerAuthentication,
}

/// The strictest of what the policies of one level say; None when they say nothing.
fn strictest(
    opinions: &[Opinion<'_>],
    says: impl Fn(&PeerAuthentication) -> Option<MtlsMode>,
    contradictions: &mut Vec<(String, String)>,
) -> Option<MtlsMode> {
    let mut winner: Option<(MtlsMode, &Metadata)> = None;
    for opinion in opinions {
        let Some(mode) = says(opinion.policy) else { continue };
        let Some((best, holder)) = winner else {
            winner = Some((mode, opinion.metadata));
            continue;
        };
        if mode != best {
            let mut pair = [full_name(holder), full_name(opinion.metadata)];
            pair.sort();
            let [first, second] = pair;
            contradictions.push((first, second));
        }
        if strictness(mode) > strictness(best) {
            winner = Some((mode, opinion.metadata));
        }
    }
    winner.map(|(mode, _)| mode)
}

fn strictness(mode: MtlsMode) -> u8 {
    match mode {
        MtlsMode::Disable => 0,
        MtlsMode::Permissive => 1,
        MtlsMode::Strict => 2,
    }
}

fn full_name(metadata: &Metadata) -> String {
    format!("{}/{}", metadata.namespace, metadata.name)
}
