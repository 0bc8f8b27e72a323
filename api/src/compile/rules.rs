//! What rules of AuthorizationPolicies say that cannot be meant: one that can never hold, one that an earlier one makes
//! needless, two policies at odds; and, of every kind that is attached by labels, a policy whose labels no workload of a
//! document has.

use std::collections::{BTreeMap, HashMap};

use crate::identity::ROOT_NAMESPACE;
use crate::policy::authorization::{Action, Lists, Operation, Rule, Source, Values};
use crate::policy::pattern::Pattern;
use crate::resource::{Attached, AuthorizationPolicy, Labels, ObjectName, Remark, Resource, Resources};

/// Rules of one policy that are compared with each other.
const COMPARED: usize = 200;

pub(super) fn remarks(resources: &Resources) -> Vec<Remark> {
    let policies = || resources.authorization_policies.values().filter(|policy| !policy.metadata.name.starts_with('~'));
    let mut remarks: Vec<Remark> = policies().flat_map(within).collect();
    remarks.extend(at_odds(policies()));
    let attached = resources.attached().filter(Attached::is_written);
    remarks.extend(attached.filter_map(|policy| no_such_labels(resources, policy)));
    remarks
}

fn object(policy: &Resource<AuthorizationPolicy>) -> ObjectName {
    let (namespace, name) = (policy.metadata.namespace.clone(), policy.metadata.name.clone());
    ObjectName { kind: "AuthorizationPolicy", namespace, name }
}

/// Rules of one policy that never hold, or that an earlier one covers.
fn within(policy: &Resource<AuthorizationPolicy>) -> Vec<Remark> {
    let rules = &policy.spec.rules;
    let remark = |message: String| Remark { object: object(policy), other: None, message };
    let mut found = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        if let Some(why) = never(rule) {
            found.push(remark(format!("rule {index} can never match: {why}")));
        } else if index < COMPARED
            && let Some(before) = rules[..index].iter().position(|before| covers(before, rule))
        {
            found.push(remark(format!("rule {index} is never reached: rule {before} matches all that it would")));
        }
    }
    found
}

/// Why a rule cannot hold, whoever calls with whatever.
fn never(rule: &Rule) -> Option<String> {
    let sources: Vec<Option<String>> = rule.from.iter().map(no_caller).collect();
    let operations: Vec<Option<&str>> = rule.to.iter().map(no_operation).collect();
    if let Some(Some(why)) = sources.first().filter(|_| sources.iter().all(Option::is_some)) {
        return Some(why.clone());
    }
    if let Some(Some(field)) = operations.first().filter(|_| operations.iter().all(Option::is_some)) {
        return Some(format!("what `{field}` lists is also what `{}` lists", negated(field)));
    }
    rule.when.iter().find_map(|condition| {
        let excluded = match &condition.values {
            Values::Texts(lists) | Values::Labelled { lists, .. } => all_excluded(lists, is_within),
            Values::Addresses(lists) => all_excluded(lists, |block, other| other.contains(block)),
            Values::Ports(lists) => all_excluded(lists, u16::eq),
            Values::Accounts(lists) => all_excluded(lists, PartialEq::eq),
            Values::Expression { .. } => false,
        };
        excluded.then(|| format!("what `values` of {} lists is also what `notValues` lists", condition.key))
    })
}

fn negated(field: &str) -> String {
    let mut letters = field.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    first.into_iter().fold("not".to_owned(), |text, letter| text + &letter.to_string()) + letters.as_str()
}

fn no_caller(source: &Source) -> Option<String> {
    let fields = [
        ("principals", all_excluded(&source.principals, is_within)),
        ("namespaces", all_excluded(&source.namespaces, is_within)),
        ("serviceAccounts", all_excluded(&source.service_accounts, PartialEq::eq)),
        ("ipBlocks", all_excluded(&source.ip_blocks, |block, other| other.contains(block))),
    ];
    if let Some((field, _)) = fields.into_iter().find(|(_, excluded)| *excluded) {
        return Some(format!("what `{field}` lists is also what `{}` lists", negated(field)));
    }
    // An account is of its namespace.
    let (accounts, namespaces) = (&source.service_accounts.any_of, &source.namespaces.any_of);
    let apart = !accounts.is_empty()
        && !namespaces.is_empty()
        && accounts.iter().all(|account| !namespaces.iter().any(|namespace| namespace.matches(&account.namespace)));
    apart.then(|| "none of its `serviceAccounts` is of one of its `namespaces`".to_owned())
}

fn no_operation(operation: &Operation) -> Option<&'static str> {
    let fields = [
        ("hosts", all_excluded(&operation.hosts, is_within)),
        ("ports", all_excluded(&operation.ports, u16::eq)),
        ("methods", all_excluded(&operation.methods, is_within)),
        ("paths", all_excluded(&operation.paths, is_within)),
    ];
    fields.into_iter().find(|(_, excluded)| *excluded).map(|(field, _)| field)
}

/// Whether everything that is wanted is unwanted too.
fn all_excluded<T>(lists: &Lists<T>, within: impl Fn(&T, &T) -> bool) -> bool {
    !lists.any_of.is_empty() && lists.any_of.iter().all(|one| lists.none_of.iter().any(|other| within(one, other)))
}

/// Whether all that one pattern matches, the other does.
fn is_within(one: &Pattern, other: &Pattern) -> bool {
    match (one, other) {
        (_, Pattern::Any) => true,
        (Pattern::Exact(text), other) => other.matches(text),
        (Pattern::Prefix(text), Pattern::Prefix(shorter)) => text.starts_with(shorter.as_str()),
        (Pattern::Suffix(text), Pattern::Suffix(shorter)) => text.ends_with(shorter.as_str()),
        (one, other) => one == other,
    }
}

/// Whether `one` holds wherever `other` does, as far as that can be seen from how they are written.
fn covers(one: &Rule, other: &Rule) -> bool {
    (one.from.is_empty() || other.from.iter().all(|source| one.from.contains(source)) && !other.from.is_empty())
        && (one.to.is_empty() || other.to.iter().all(|to| one.to.contains(to)) && !other.to.is_empty())
        && one.when.iter().all(|condition| other.when.contains(condition))
}

/// An ALLOW whose rule a DENY for the same workloads repeats: the DENY is what counts.
fn at_odds<'r>(policies: impl Iterator<Item = &'r Resource<AuthorizationPolicy>>) -> Vec<Remark> {
    type Same<'r> = (&'r str, Option<&'r Labels>, &'r [String], String);
    let mut denied: HashMap<Same<'r>, (&Resource<AuthorizationPolicy>, usize)> = HashMap::new();
    let mut allowed = Vec::new();
    for policy in policies.filter(|policy| !policy.spec.shadow) {
        let spec = &policy.spec;
        for (index, rule) in spec.rules.iter().enumerate() {
            let labels = spec.attachment.selector.as_ref().map(|selector| &selector.match_labels);
            let text = serde_json::to_string(rule).unwrap_or_default();
            let key = (policy.metadata.namespace.as_str(), labels, spec.attachment.services.as_slice(), text);
            match spec.action {
                Action::Deny => {
                    denied.entry(key).or_insert((policy, index));
                }
                Action::Allow => allowed.push((key, policy, index)),
                Action::Audit => {}
            }
        }
    }
    let against = |(key, policy, index): (Same<'r>, &Resource<AuthorizationPolicy>, usize)| {
        let (deny, rule) = denied.get(&key)?;
        let message = format!(
            "rule {index} allows what rule {rule} of {} in {} denies for the same workloads: it is denied",
            object(deny),
            Remark::PLACE
        );
        Some(Remark { object: object(policy), other: Some(object(deny)), message })
    };
    allowed.into_iter().filter_map(against).collect()
}

/// A selector with a value that no Service and no Workload has, though their labels have that key.
fn no_such_labels(resources: &Resources, policy: Attached<'_>) -> Option<Remark> {
    let wanted = &policy.attachment.selector.as_ref()?.match_labels;
    let namespace = &policy.metadata.namespace;
    let reaches = |other: &String| other == namespace || namespace == ROOT_NAMESPACE;
    let services = resources.services.values().filter(|service| reaches(&service.metadata.namespace));
    let workloads = resources.workloads.values().filter(|workload| reaches(&workload.metadata.namespace));
    let labels = services.map(|service| &service.spec.selector).chain(workloads.map(|workload| &workload.spec.labels));
    let mut known: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    labels.flatten().for_each(|(key, value)| known.entry(key).or_default().push(value));
    wanted.iter().find_map(|(key, value)| {
        let values = known.get(key.as_str()).filter(|values| !values.contains(&value.as_str()))?;
        let near = crate::resource::nearest_word(value, values);
        let near = near.map(|near| format!("; did you mean {key}={near}?")).unwrap_or_default();
        let message =
            format!("selects nothing that a document tells of: no Service or Workload has {key}={value}{near}");
        Some(Remark { object: policy.object(), other: None, message })
    })
}

#[cfg(test)]
mod tests {
    use crate::compile::load;
    use crate::resource::SourceFile;

    fn warnings(specs: &[&str]) -> Vec<String> {
        let documents = specs.iter().enumerate().map(|(index, spec)| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p{index}, namespace: \
                 shop}}\nspec: {spec}\n---\n"
            )
        });
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: pay, namespace: shop}\nspec: {selector: {app: \
                       payments}, ports: [{port: 80}]}\n";
        let parsed = load(&[SourceFile { name: "t.yaml".into(), text: documents.collect::<String>() + service }]);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        parsed.warnings.into_iter().map(|warning| warning.message).collect()
    }

    #[test]
    fn labels_that_nobody_has_of_every_kind() {
        let selector = "selector: {matchLabels: {app: paymnets}}";
        let rules = "jwtRules: [{issuer: a, jwksUri: 'https://a.test'}]";
        for (kind, spec) in [
            ("AuthorizationPolicy", format!("{{{selector}, rules: [{{}}]}}")),
            ("RequestAuthentication", format!("{{{selector}, {rules}}}")),
            ("RateLimitPolicy", format!("{{{selector}, limits: [{{requests: 1}}]}}")),
        ] {
            let text = format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: \
                 {spec}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: pay, namespace: shop}}\nspec: \
                 {{selector: {{app: payments}}, ports: [{{port: 80}}]}}\n"
            );
            let parsed = load(&[SourceFile { name: "t.yaml".into(), text }]);
            assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
            let messages: Vec<&str> = parsed.warnings.iter().map(|warning| warning.message.as_str()).collect();
            let expected = "selects nothing that a document tells of: no Service or Workload has app=paymnets; did you \
                            mean app=payments?";
            assert_eq!(messages, [expected], "{kind}");
        }
    }

    #[test]
    fn what_cannot_be_meant() {
        let to = |operation: &str| format!("{{rules: [{{to: [{{operation: {operation}}}]}}]}}");
        let from = |source: &str| format!("{{rules: [{{from: [{{source: {source}}}]}}]}}");
        let when = |condition: &str| format!("{{rules: [{{when: [{condition}]}}]}}");
        let never = "can never match";
        let cases: &[(String, &str)] = &[
            (to("{methods: [GET], notMethods: [GET, PUT]}"), "what `methods` lists is also what `notMethods` lists"),
            (to("{methods: [GET, POST], notMethods: [GET]}"), ""),
            (to("{paths: ['/a/b', '/a/c*'], notPaths: ['/a*']}"), never),
            (to("{paths: ['/a*'], notPaths: ['/a/b']}"), ""),
            (to("{ports: [80], notPorts: [80]}"), never),
            (to("{hosts: ['a.test'], notHosts: ['*.test']}"), never),
            (from("{namespaces: [shop], notNamespaces: ['*']}"), never),
            (from("{serviceAccounts: [bank/pay], namespaces: [shop]}"), "is of one of its `namespaces`"),
            (from("{serviceAccounts: [shop/pay], namespaces: ['s*']}"), ""),
            (from("{ipBlocks: ['10.1.0.0/16'], notIpBlocks: ['10.0.0.0/8']}"), never),
            (when("{key: time.weekday, values: [Sat], notValues: [Sat, Sun]}"), "`values` of time.weekday"),
            (when("{key: destination.port, values: [\"80\"], notValues: [\"81\"]}"), ""),
            ("{rules: [{}, {to: [{operation: {methods: [GET]}}]}]}".into(), "rule 1 is never reached: rule 0 matches"),
            ("{rules: [{to: [{operation: {methods: [GET]}}]}, {}]}".into(), ""),
            (
                "{rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {methods: [GET]}}], when: [{key: \
                 time.hour, values: [\"1\"]}]}]}"
                    .into(),
                "rule 1 is never reached",
            ),
            (
                "{selector: {matchLabels: {app: paymets}}, rules: [{}]}".into(),
                "app=paymets; did you mean app=payments?",
            ),
            ("{selector: {matchLabels: {app: payments, version: v2}}, rules: [{}]}".into(), ""),
        ];
        for (spec, expected) in cases {
            let said = warnings(&[spec]);
            let right =
                if expected.is_empty() { said.is_empty() } else { said.len() == 1 && said[0].contains(expected) };
            assert!(right, "{spec}: {said:?}");
        }
    }

    #[test]
    fn two_policies_at_odds() {
        let (allow, deny) = (
            "{rules: [{from: [{source: {namespaces: [a]}}]}]}",
            "{action: DENY, rules: [{}, {from: [{source: {namespaces: [a]}}]}]}",
        );
        let said = warnings(&[allow, deny]);
        let odds = said.iter().find(|warning| warning.contains("it is denied")).unwrap();
        assert!(odds.contains("rule 0 allows what rule 1 of AuthorizationPolicy/shop/p1 in t.yaml:"), "{odds}");
        assert!(
            warnings(&[allow, "{mode: Shadow, action: DENY, rules: [{from: [{source: {namespaces: [a]}}]}]}"])
                .is_empty()
        );
        assert!(warnings(&[allow, "{action: DENY, rules: [{from: [{source: {namespaces: [b]}}]}]}"]).is_empty());
    }
}
