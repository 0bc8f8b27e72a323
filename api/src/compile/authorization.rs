//! Which AuthorizationPolicies are in force for one workload.

use crate::identity::{ROOT_NAMESPACE, TrustDomain};
use crate::policy::authorization::{Authorization, DefaultAction, Lists, Policy, Values};
use crate::policy::pattern::Pattern;
use crate::resource::{AuthorizationPolicy, Labels, Metadata, Resources};

/// Istio's name for the mesh's own trust domain in principals, whatever that is called.
const OWN_TRUST_DOMAIN: &str = "cluster.local/";

/// The policies that select a workload: those of its namespace and, as in Istio, those of the root namespace for the
/// whole mesh, in the order of namespace and name. targetRefs are decided per port, by the Service that it belongs to.
pub fn authorization(
    resources: &Resources,
    trust_domain: &TrustDomain,
    namespace: &str,
    labels: &Labels,
) -> Authorization {
    let mut policies = Vec::new();
    for policy in resources.authorization_policies.values() {
        let (metadata, spec) = (&policy.metadata, &policy.spec);
        if !selects(metadata, spec, namespace, labels) {
            continue;
        }
        let mut rules = spec.rules.clone();
        for rule in &mut rules {
            rule.from.iter_mut().for_each(|source| in_own_trust_domain(&mut source.principals, trust_domain));
            for condition in &mut rule.when {
                if let (crate::policy::authorization::Attribute::SourcePrincipal, Values::Texts(lists)) =
                    (&condition.key, &mut condition.values)
                {
                    in_own_trust_domain(lists, trust_domain);
                }
            }
        }
        policies.push(Policy {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            action: spec.action,
            shadow: spec.shadow,
            services: spec.services.iter().map(|name| format!("{name}.{}", metadata.namespace)).collect(),
            rules,
        });
    }
    let default_action = if resources.mesh.deny_by_default { DefaultAction::Deny } else { DefaultAction::Allow };
    Authorization { policies, default_action }
}

/// Whether a policy is about a workload with these labels.
pub fn selects(metadata: &Metadata, policy: &AuthorizationPolicy, namespace: &str, labels: &Labels) -> bool {
    let selector = policy.selector.as_ref();
    let mut wanted = selector.into_iter().flat_map(|selector| &selector.match_labels);
    (metadata.namespace == namespace || metadata.namespace == ROOT_NAMESPACE)
        && wanted.all(|(key, value)| labels.get(key) == Some(value))
}

fn in_own_trust_domain(principals: &mut Lists<Pattern>, trust_domain: &TrustDomain) {
    for pattern in principals.any_of.iter_mut().chain(&mut principals.none_of) {
        if let Pattern::Exact(text) | Pattern::Prefix(text) = pattern
            && let Some(rest) = text.strip_prefix(OWN_TRUST_DOMAIN)
        {
            *text = format!("{trust_domain}/{rest}");
        }
    }
}

#[cfg(test)]
#[path = "authorization_tests.rs"]
mod tests;
