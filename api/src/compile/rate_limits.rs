//! Which RateLimitPolicies are in force for one workload.

use crate::policy::rate_limit::{Policy, RateLimits};
use crate::resource::{Labels, Resources};

/// Those of its namespace that select it and those of the root namespace for the whole mesh, in the order of namespace and
/// name. targetRefs are decided per port, by the Service that it belongs to.
pub fn rate_limits(resources: &Resources, namespace: &str, labels: &Labels) -> RateLimits {
    let mut policies = Vec::new();
    for policy in resources.rate_limit_policies.values() {
        let (metadata, spec) = (&policy.metadata, &policy.spec);
        if !spec.attachment.selects(metadata, namespace, labels) {
            continue;
        }
        policies.push(Policy {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            services: spec.attachment.service_names(metadata),
            shadow: spec.shadow,
            limits: spec.limits.clone(),
            overrides: spec.overrides.clone(),
        });
    }
    RateLimits { policies }
}
