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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::Selector;
    use MtlsMode::{Disable, Permissive, Strict};

    /// What it is about, the policies, then what comes out: default, ports, contradictions.
    type Case = (
        &'static str,
        &'static [Written],
        MtlsMode,
        &'static [(u16, MtlsMode)],
        &'static [(&'static str, &'static str)],
    );
    /// `namespace/name`, the selector (`key=value`), the mode, the ports.
    type Written = (&'static str, &'static str, Option<MtlsMode>, &'static [(u16, MtlsMode)]);

    fn labels(text: &str) -> Labels {
        text.split(',').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    fn policies(written: &[Written]) -> Vec<(Metadata, PeerAuthentication)> {
        let policy = |(full_name, selector, mode, ports): &Written| {
            let (namespace, name) = full_name.split_once('/').unwrap();
            let metadata = Metadata { name: name.into(), namespace: namespace.into(), ..Metadata::default() };
            let selector = (!selector.is_empty()).then(|| Selector { match_labels: labels(selector) });
            (metadata, PeerAuthentication { selector, mode: *mode, port_level: ports.iter().copied().collect() })
        };
        written.iter().map(policy).collect()
    }

    #[test]
    fn the_narrowest_policy_counts() {
        let cases: [Case; 15] = [
            ("nothing said", &[], Permissive, &[], &[]),
            ("mesh", &[("outrigger-system/m", "", Some(Strict), &[])], Strict, &[], &[]),
            (
                "namespace over mesh",
                &[("outrigger-system/m", "", Some(Strict), &[]), ("shop/n", "", Some(Disable), &[])],
                Disable,
                &[],
                &[],
            ),
            (
                "workload over namespace",
                &[("shop/w", "app=a", Some(Permissive), &[]), ("shop/n", "", Some(Strict), &[])],
                Permissive,
                &[],
                &[],
            ),
            (
                "unset inherits",
                &[
                    ("outrigger-system/m", "", Some(Strict), &[]),
                    ("shop/n", "", None, &[]),
                    ("shop/w", "app=a", None, &[]),
                ],
                Strict,
                &[],
                &[],
            ),
            (
                "another namespace",
                &[("other/n", "", Some(Strict), &[]), ("other/w", "app=a", Some(Strict), &[])],
                Permissive,
                &[],
                &[],
            ),
            ("another workload", &[("shop/w", "app=b", Some(Strict), &[])], Permissive, &[], &[]),
            ("half a match", &[("shop/w", "app=a,tier=x", Some(Strict), &[])], Permissive, &[], &[]),
            ("a selector in the root", &[("outrigger-system/w", "app=a", Some(Disable), &[])], Permissive, &[], &[]),
            (
                "ports over the workload's own mode",
                &[("shop/w", "app=a", Some(Strict), &[(80, Disable), (81, Permissive)])],
                Strict,
                &[(80, Disable), (81, Permissive)],
                &[],
            ),
            (
                "ports alone, the rest inherited",
                &[("shop/w", "app=a", None, &[(80, Disable)]), ("shop/n", "", Some(Strict), &[])],
                Strict,
                &[(80, Disable)],
                &[],
            ),
            (
                "ports without a selector say nothing",
                &[("shop/n", "", Some(Strict), &[(80, Disable)])],
                Strict,
                &[],
                &[],
            ),
            (
                "two of one level",
                &[("shop/n2", "", Some(Permissive), &[]), ("shop/n1", "", Some(Strict), &[])],
                Strict,
                &[],
                &[("shop/n1", "shop/n2")],
            ),
            (
                "two of one level that agree",
                &[("shop/n2", "", Some(Strict), &[]), ("shop/n1", "", Some(Strict), &[]), ("shop/n3", "", None, &[])],
                Strict,
                &[],
                &[],
            ),
            (
                "a port against another policy's mode",
                &[("shop/a", "app=a", Some(Strict), &[]), ("shop/b", "tier=back", None, &[(80, Disable)])],
                Strict,
                &[(80, Strict)],
                &[("shop/a", "shop/b")],
            ),
        ];
        for (what, written, default, ports, contradictions) in cases {
            let policies = policies(written);
            // The order in which objects come must not matter.
            for reversed in [false, true] {
                let mut all: Vec<_> = policies.iter().map(|(metadata, policy)| (metadata, policy)).collect();
                if reversed {
                    all.reverse();
                }
                let modes = mtls_modes(all, "shop", &labels("app=a,tier=back"));
                assert_eq!(modes.default, default, "{what}");
                assert_eq!(modes.ports, ports.iter().copied().collect(), "{what}");
                let pairs: Vec<_> = modes.contradictions.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
                assert_eq!(pairs, contradictions, "{what}");
            }
        }
    }

    #[test]
    fn a_selector_without_labels_is_none() {
        let mut policies = policies(&[("shop/n", "", Some(Strict), &[(80, Disable)])]);
        policies[0].1.selector = Some(Selector::default());
        let modes = mtls_modes(policies.iter().map(|(metadata, policy)| (metadata, policy)), "shop", &labels("a=b"));
        assert_eq!((modes.default, modes.ports), (Strict, BTreeMap::new()));
    }

    #[test]
    fn the_root_namespace_has_workloads_too() {
        let policies = policies(&[
            ("outrigger-system/m", "", Some(Strict), &[]),
            ("outrigger-system/w", "app=a", Some(Disable), &[]),
        ]);
        let all = || policies.iter().map(|(metadata, policy)| (metadata, policy));
        assert_eq!(mtls_modes(all(), ROOT_NAMESPACE, &labels("app=a")).default, Disable);
        assert_eq!(mtls_modes(all(), ROOT_NAMESPACE, &labels("app=b")).default, Strict);
    }
}
