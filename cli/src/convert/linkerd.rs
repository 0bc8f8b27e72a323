//! Linkerd's Server with the policies that name it becomes an ALLOW policy for the Server's workloads. In Linkerd a Server closes
//! its own port, here an ALLOW policy closes all: a last rule opens the others, but those of other Servers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::fields::{Fields, Left};
use super::{Document, OURS};

pub(super) const GROUP: &str = "policy.linkerd.io";

type Name = (String, String);

/// Who may, of one policy: conditions that all have to hold. None: it could not be said.
type Who = Option<Vec<Map<String, Value>>>;

/// What each document becomes, and what could not be said.
pub(super) fn policies(documents: &[Document]) -> Vec<(&Document, Option<Value>, Left)> {
    let mut lefts: Vec<Left> = documents.iter().map(|_| Left::default()).collect();
    let mut known = BTreeMap::new();
    for (document, left) in documents.iter().zip(&mut lefts) {
        let source = match &*document.kind {
            "MeshTLSAuthentication" => identities(document, left),
            "NetworkAuthentication" => networks(document, left),
            _ => continue,
        };
        known.insert((document.kind.clone(), document.namespace.clone(), document.name.clone()), source);
    }
    let mut rules: BTreeMap<Name, Vec<Map<String, Value>>> = BTreeMap::new();
    for (document, left) in
        documents.iter().zip(&mut lefts).filter(|(document, _)| document.kind == "AuthorizationPolicy")
    {
        if let Some((server, who)) = authorization(document, &known, left) {
            rules.entry(server).or_default().extend(who);
        }
    }
    let mut ports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for document in documents.iter().filter(|document| document.kind == "Server") {
        if let Some(port) = port(document) {
            ports.entry(document.namespace.clone()).or_default().insert(port);
        }
    }
    let mut all = Vec::new();
    for (document, mut left) in documents.iter().zip(lefts) {
        let becomes = match &*document.kind {
            "Server" => {
                let rules = rules.remove(&(document.namespace.clone(), document.name.clone())).unwrap_or_default();
                let becomes = server(document, rules, ports.get(&document.namespace), &mut left);
                if becomes.is_none() {
                    left.tell("not converted: nothing protects its port here");
                }
                becomes
            }
            // They have become rules of the Servers' policies.
            "AuthorizationPolicy" | "MeshTLSAuthentication" | "NetworkAuthentication" => None,
            _ => {
                left.tell("not converted: only Server, AuthorizationPolicy and the authentications that it names are");
                None
            }
        };
        all.push((document, becomes, left));
    }
    all
}

/// The number of a Server's port.
fn port(document: &Document) -> Option<String> {
    document.value.pointer("/spec/port").and_then(Value::as_u64).map(|port| port.to_string())
}

fn server(
    document: &Document,
    mut rules: Vec<Map<String, Value>>,
    others: Option<&BTreeSet<String>>,
    left: &mut Left,
) -> Option<Value> {
    let mut spec = Fields::new("spec", document.spec(), left);
    let Some(port) = port(document) else {
        left.tell("spec.port is a name, and ports have none here: give its number");
        return None;
    };
    spec.take("port");
    if spec.take("proxyProtocol").is_some() {
        left.tell(format!("spec.proxyProtocol is the Service's to say: appProtocol of its port {port}"));
    }
    let mut selector = spec.map("podSelector", left)?;
    let labels = selector.take("matchLabels").unwrap_or_else(|| json!({}));
    // Without them it would be for other workloads.
    let mut narrower = Left::default();
    if !selector.end(&mut narrower) {
        narrower.into_lines().into_iter().for_each(|line| left.tell(line));
        return None;
    }
    match spec.text("accessPolicy", left).as_deref() {
        None | Some("deny") => {}
        Some("all-unauthenticated") => rules.push(Map::new()),
        Some("all-authenticated") => rules.push(from(json!({ "principals": ["*"] }))),
        Some(other) => left.tell(format!("spec.accessPolicy {other} has no counterpart here: nobody is let in by it")),
    }
    spec.end(left);
    let mut all: Vec<Value> = Vec::new();
    for mut rule in rules {
        rule.insert("to".to_owned(), json!([{ "operation": { "ports": [port] } }]));
        all.push(rule.into());
    }
    let closed: Vec<&String> = others.into_iter().flatten().collect();
    if closed.len() > 1 {
        left.tell(format!(
            "ports of all Servers of the namespace stay closed at these workloads but for what a policy allows: {}",
            closed.iter().map(|port| port.as_str()).collect::<Vec<_>>().join(", ")
        ));
    }
    all.push(json!({ "to": [{ "operation": { "notPorts": closed } }] }));
    let mut ours = Map::new();
    if labels.as_object().is_some_and(|labels| !labels.is_empty()) {
        ours.insert("selector".to_owned(), json!({ "matchLabels": labels }));
    }
    ours.insert("action".to_owned(), "ALLOW".into());
    ours.insert("rules".to_owned(), all.into());
    Some(document.becomes(OURS, "AuthorizationPolicy", ours))
}

fn from(source: Value) -> Map<String, Value> {
    let mut rule = Map::new();
    rule.insert("from".to_owned(), json!([{ "source": source }]));
    rule
}

/// The Server that a policy is for and whom it lets in; None where it lets in nobody.
fn authorization(
    document: &Document,
    known: &BTreeMap<(String, String, String), Who>,
    left: &mut Left,
) -> Option<(Name, Vec<Map<String, Value>>)> {
    let mut spec = Fields::new("spec", document.spec(), left);
    let mut target = spec.map("targetRef", left)?;
    let (kind, name) = (target.text("kind", left).unwrap_or_default(), target.text("name", left).unwrap_or_default());
    target.take("group");
    target.end(left);
    // All of them have to hold: their conditions stand together in one source.
    let mut whole: Who = Some(vec![Map::new()]);
    for mut reference in spec.maps("requiredAuthenticationRefs", left).unwrap_or_default() {
        let (kind, name) =
            (reference.text("kind", left).unwrap_or_default(), reference.text("name", left).unwrap_or_default());
        let namespace = reference.text("namespace", left).unwrap_or_else(|| document.namespace.clone());
        let who = match &*kind {
            "ServiceAccount" => Some(vec![account(&namespace, &name)]),
            _ => known.get(&(kind.clone(), namespace, name.clone())).cloned().flatten(),
        };
        if who.is_none() {
            left.tell(format!("{kind} {name} is not here, or could not be converted: the policy lets in nobody"));
        }
        whole = both(whole, who);
    }
    spec.end(left);
    if whole.is_none() {
        left.tell("its authentications cannot be asked for together here: the policy lets in nobody");
    }
    if kind != "Server" {
        left.tell(format!("spec.targetRef: {kind} {name}: only Servers can be converted: the policy lets in nobody"));
        return None;
    }
    let rules = whole?.into_iter().map(|source| if source.is_empty() { Map::new() } else { from(source.into()) });
    Some(((document.namespace.clone(), name), rules.collect()))
}

/// Whoever fulfils one of `one` and one of `other`. None where two ask the same field for different values: an intersection
/// has no words here.
fn both(one: Who, other: Who) -> Who {
    let (one, other) = (one?, other?);
    let mut all = Vec::new();
    for one in &one {
        for other in &other {
            if other.keys().any(|field| one.contains_key(field)) {
                return None;
            }
            all.push(one.clone().into_iter().chain(other.clone()).collect());
        }
    }
    Some(all)
}

fn account(namespace: &str, name: &str) -> Map<String, Value> {
    let account = json!([format!("{namespace}/{name}")]);
    Map::from_iter([("serviceAccounts".to_owned(), account)])
}

/// Of a MeshTLSAuthentication: one source for each, of which one has to fit.
fn identities(document: &Document, left: &mut Left) -> Who {
    let mut spec = Fields::new("spec", document.spec(), left);
    let mut all = Vec::new();
    for identity in spec.texts("identities", left).unwrap_or_default() {
        let words: Vec<&str> = identity.split('.').collect();
        match words[..] {
            ["*"] => all.push(Map::from_iter([("principals".to_owned(), json!(["*"]))])),
            ["*", namespace, "serviceaccount", "identity", ..] => {
                all.push(Map::from_iter([("namespaces".to_owned(), json!([namespace]))]));
            }
            [name, namespace, "serviceaccount", "identity", ..] if !name.contains('*') => {
                all.push(account(namespace, name))
            }
            _ => left.tell(format!("spec.identities: {identity} is left out")),
        }
    }
    for mut reference in spec.maps("identityRefs", left).unwrap_or_default() {
        let (kind, name) =
            (reference.text("kind", left).unwrap_or_default(), reference.text("name", left).unwrap_or_default());
        let namespace = reference.text("namespace", left).unwrap_or_else(|| document.namespace.clone());
        match &*kind {
            "ServiceAccount" => all.push(account(&namespace, &name)),
            "Namespace" => all.push(Map::from_iter([("namespaces".to_owned(), json!([name]))])),
            _ => left.tell(format!("spec.identityRefs: {kind} {name} is left out")),
        }
    }
    spec.end(left);
    Some(all)
}

/// Of a NetworkAuthentication.
fn networks(document: &Document, left: &mut Left) -> Who {
    let mut spec = Fields::new("spec", document.spec(), left);
    let mut all = Vec::new();
    for mut network in spec.maps("networks", left).unwrap_or_default() {
        let Some(cidr) = network.text("cidr", left) else {
            left.tell(format!("{} is missing: the network is left out", network.path("cidr")));
            continue;
        };
        let mut source = Map::from_iter([("ipBlocks".to_owned(), json!([cidr]))]);
        if let Some(except) = network.take("except") {
            source.insert("notIpBlocks".to_owned(), except);
        }
        network.end(left);
        all.push(source);
    }
    spec.end(left);
    Some(all)
}
