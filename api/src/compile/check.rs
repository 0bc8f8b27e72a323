//! What objects say together, which no single one shows: contradictions, policies that select nothing. Warnings for
//! `validate` and `status`.

use std::collections::BTreeMap;

use super::{RouteTable, mtls_modes};
use crate::identity::ROOT_NAMESPACE;
use crate::resource::{
    Attached, Labels, ObjectName, Parsed, PeerAuthentication, Remark, Resource, Resources, SourceFile, parse_and_check,
};

/// Reads a set of files as one configuration, with warnings about what its objects say together.
pub fn load(files: &[SourceFile]) -> Parsed {
    parse_and_check(files, remarks)
}

fn remarks(resources: &Resources) -> Vec<Remark> {
    let mut remarks = mtls_contradictions(resources);
    remarks.extend(resources.attached().filter_map(|policy| without_service(resources, policy)));
    remarks.extend(RouteTable::new(resources).remarks);
    remarks.extend(super::rules::remarks(resources));
    remarks
}

fn named(kind: &'static str, full_name: &str) -> Option<ObjectName> {
    let (namespace, name) = full_name.split_once('/')?;
    Some(ObjectName { kind, namespace: namespace.to_owned(), name: name.to_owned() })
}

/// Two PeerAuthentications for the same workloads that say different things: the stricter is in force, and the user
/// should know.
fn mtls_contradictions(resources: &Resources) -> Vec<Remark> {
    type Scope<'r> = (&'r str, Option<&'r Labels>);
    let mut scopes: BTreeMap<Scope<'_>, Vec<&Resource<PeerAuthentication>>> = BTreeMap::new();
    for policy in resources.peer_authentications.values() {
        let labels = policy.spec.selector.as_ref().map(|selector| &selector.match_labels);
        scopes.entry((policy.metadata.namespace.as_str(), labels)).or_default().push(policy);
    }
    let none = Labels::new();
    let mut found = Vec::new();
    for ((namespace, labels), policies) in scopes {
        let policies = policies.iter().map(|policy| (&policy.metadata, &policy.spec));
        for (first, second) in mtls_modes(policies, namespace, labels.unwrap_or(&none)).contradictions {
            let Some(object) = named("PeerAuthentication", &second) else { continue };
            let message = format!(
                "PeerAuthentication {second} contradicts {first} in {} for the same workloads: the stricter mode is in \
                 force; merge them",
                Remark::PLACE
            );
            found.push(Remark { object, other: named("PeerAuthentication", &first), message });
        }
    }
    found
}

/// A targetRef to a Service that is not there protects nothing.
fn without_service(resources: &Resources, policy: Attached<'_>) -> Option<Remark> {
    let namespace = &policy.metadata.namespace;
    let missing = |name: &&String| !resources.services.contains_key(&(namespace.clone(), (*name).clone()));
    let service = policy.attachment.services.iter().find(missing)?;
    let object = policy.object();
    let hint = if namespace == ROOT_NAMESPACE { "; targetRefs reach only their own namespace" } else { "" };
    let message = format!("{object} names the Service {namespace}/{service}, which does not exist{hint}");
    Some(Remark { object, other: None, message })
}
