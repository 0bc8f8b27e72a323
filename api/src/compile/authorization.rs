//! Which AuthorizationPolicies are in force for one workload.

use std::cell::LazyCell;
use std::collections::BTreeMap;

use crate::identity::TrustDomain;
use crate::policy::authorization::{
    Attribute, Authorization, ByAccount, Condition, DefaultAction, Lists, Policy, Prepared, Values,
};
use crate::policy::pattern::Pattern;
use crate::resource::{Labels, Resources};

/// Istio's name for the mesh's own trust domain in principals, whatever that is called.
const OWN_TRUST_DOMAIN: &str = "cluster.local/";

/// Labels by account: those that all workloads of an account have, with the same values.
pub type Callers = ByAccount<Labels>;

/// What all workloads of each account have in common; each is given by namespace, service account and labels.
pub fn callers<'w>(workloads: impl Iterator<Item = (&'w str, &'w str, &'w Labels)>) -> Callers {
    let mut callers = Callers::new();
    for (namespace, account, labels) in workloads {
        let of_namespace = callers.entry(namespace.to_owned()).or_default();
        match of_namespace.get_mut(account) {
            Some(common) => common.retain(|key, value| labels.get(key) == Some(value)),
            None => {
                of_namespace.insert(account.to_owned(), labels.clone());
            }
        }
    }
    callers
}

/// Whether what is in force follows from the labels of callers.
pub fn looks_at_callers(resources: &Resources) -> bool {
    let rules = resources.authorization_policies.values().flat_map(|policy| &policy.spec.rules);
    rules.flat_map(|rule| &rule.when).any(|condition| match &condition.values {
        Values::Labelled { .. } => true,
        Values::Expression { expression, .. } => {
            expression.looks_at().all_labels || !expression.looks_at().labels.is_empty()
        }
        _ => false,
    })
}

/// [`authorization_among`] the workloads that have documents.
pub fn authorization(
    resources: &Resources,
    trust_domain: &TrustDomain,
    namespace: &str,
    labels: &Labels,
) -> Authorization {
    let of_documents = || {
        let workloads = resources.workloads.values();
        callers(workloads.map(|workload| {
            (workload.metadata.namespace.as_str(), workload.spec.service_account.as_str(), &workload.spec.labels)
        }))
    };
    authorization_among(resources, trust_domain, namespace, labels, &of_documents)
}

/// The policies that select a workload: those of its namespace and, as in Istio, those of the root namespace for the
/// whole mesh, in the order of namespace and name. targetRefs are decided per port, by the Service that it belongs to.
/// `callers` is asked only where a rule looks at labels of callers.
pub fn authorization_among(
    resources: &Resources,
    trust_domain: &TrustDomain,
    namespace: &str,
    labels: &Labels,
    callers: &dyn Fn() -> Callers,
) -> Authorization {
    let mut policies = Vec::new();
    let known = LazyCell::new(callers);
    for policy in resources.authorization_policies.values() {
        let (metadata, spec) = (&policy.metadata, &policy.spec);
        if !spec.attachment.selects(metadata, namespace, labels) {
            continue;
        }
        let mut rules = spec.rules.clone();
        for rule in &mut rules {
            rule.from.iter_mut().for_each(|source| in_own_trust_domain(&mut source.principals, trust_domain));
            for condition in &mut rule.when {
                fill(condition, || &known);
                if let (Attribute::SourcePrincipal, Values::Texts(lists)) = (&condition.key, &mut condition.values) {
                    in_own_trust_domain(lists, trust_domain);
                }
            }
        }
        policies.push(Policy {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            action: spec.action,
            shadow: spec.shadow,
            services: spec.attachment.service_names(metadata),
            rules,
        });
    }
    let default_action = if resources.mesh.deny_by_default { DefaultAction::Deny } else { DefaultAction::Allow };
    Authorization { policies, default_action, prepared: Prepared::default() }
}

/// Gives a condition about labels of callers their values.
fn fill<'k>(condition: &mut Condition, known: impl Fn() -> &'k Callers) {
    match (&condition.key, &mut condition.values) {
        (Attribute::SourceLabel(name), Values::Labelled { accounts, .. }) => {
            *accounts = with_entries(known(), |labels| labels.get(name).cloned());
        }
        (_, Values::Expression { expression, accounts }) => {
            let looks_at = expression.looks_at();
            if looks_at.all_labels {
                *accounts = known().clone();
            } else if !looks_at.labels.is_empty() {
                *accounts = with_entries(known(), |labels| {
                    let wanted = labels.iter().filter(|(key, _)| looks_at.labels.contains(key));
                    let wanted: Labels = wanted.map(|(key, value)| (key.clone(), value.clone())).collect();
                    (!wanted.is_empty()).then_some(wanted)
                });
            }
        }
        _ => {}
    }
}

/// What `entry` makes of each account's labels, without accounts and namespaces of which it makes nothing.
fn with_entries<T>(callers: &Callers, entry: impl Fn(&Labels) -> Option<T>) -> ByAccount<T> {
    let of_namespace = |accounts: &BTreeMap<String, Labels>| {
        let made = accounts.iter().filter_map(|(account, labels)| Some((account.clone(), entry(labels)?)));
        made.collect::<BTreeMap<String, T>>()
    };
    let all = callers.iter().map(|(namespace, accounts)| (namespace.clone(), of_namespace(accounts)));
    all.filter(|(_, accounts)| !accounts.is_empty()).collect()
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
