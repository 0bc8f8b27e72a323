//! What binds what, by the words of objects: parents, kinds at odds, age, grants.

use super::*;
use crate::resource::SourceFile;

const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: pay, namespace: shop}
spec: {selector: {app: pay}, ports: [{name: http, port: 80}, {name: alt, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: elsewhere}
spec: {selector: {app: far}, ports: [{name: http, port: 80}]}
";

/// `KIND NAMESPACE/NAME AGE`, what it binds, and where its one rule leads.
fn route(written: &str, parent: &str, backend: &str) -> String {
    let mut words = written.split(' ');
    let (kind, name, age) = (words.next().unwrap(), words.next().unwrap(), words.next());
    let (namespace, name) = name.split_once('/').unwrap();
    let age = age.map(|year| format!(", creationTimestamp: \"{year}-01-01T00:00:00Z\"")).unwrap_or_default();
    let names = if kind == "TLSRoute" { "hostnames: [a.test], " } else { "" };
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}{age}}}\nspec: \
         {{{names}parentRefs: [{{group: '', kind: Service, {parent}}}], rules: [{{backendRefs: [{{{backend}}}]}}]}}\n"
    )
}

const PAY: &str = "name: pay, namespace: shop, port: 80";

fn table(routes: &[String]) -> RouteTable {
    let text = SERVICES.to_owned() + &routes.concat();
    let parsed = crate::compile::load(&[SourceFile { name: "a".into(), text }]);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    RouteTable::new(&parsed.resources)
}

/// The routes in force for callers of a namespace, in the order of their rules.
fn bound(table: &RouteTable, port: u16, namespace: &str) -> String {
    let port = ServicePort { service: ServiceName::new("pay", "shop").unwrap(), port };
    let rules = table.of(&port, namespace).map(|routes| routes.rules.iter().map(|rule| rule.object.to_string()));
    rules.map(|rules| rules.collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

#[test]
fn what_binds_a_port() {
    let http = |name: &str| format!("HTTPRoute/shop/{name}");
    let one = |parent: &str| vec![route("HTTPRoute shop/a", parent, PAY)];
    let two = |first: &str, second: &str| vec![route(first, PAY, PAY), route(second, PAY, PAY)];
    let ages = ["z 2020", "c", "b", "a 2021"].map(|name| route(&format!("HTTPRoute shop/{name}"), PAY, PAY));
    let cases: [(&str, Vec<String>, u16, &str, String); 11] = [
        ("nothing", vec![], 80, "shop", String::new()),
        ("one port", one(PAY), 80, "shop", http("a")),
        ("not the other", one(PAY), 81, "shop", String::new()),
        ("all ports", one("name: pay"), 81, "other", http("a")),
        ("by a port's name", one("name: pay, sectionName: alt"), 81, "shop", http("a")),
        ("a number and another name", one("name: pay, port: 80, sectionName: alt"), 80, "shop", String::new()),
        ("the oldest first, then by name", ages.into(), 80, "shop", ["z", "a", "b", "c"].map(http).join(" ")),
        ("gRPC first", two("HTTPRoute shop/a 2020", "GRPCRoute shop/b"), 80, "shop", "GRPCRoute/shop/b".to_owned()),
        ("TLS first", two("TCPRoute shop/a 2020", "TLSRoute shop/b"), 80, "shop", "TLSRoute/shop/b".to_owned()),
        ("a consumer's", two("GRPCRoute shop/a", "HTTPRoute mine/b"), 80, "mine", "HTTPRoute/mine/b".to_owned()),
        ("for nobody else", two("GRPCRoute shop/a", "HTTPRoute mine/b"), 80, "other", "GRPCRoute/shop/a".to_owned()),
    ];
    for (what, routes, port, namespace, expected) in cases {
        assert_eq!(bound(&table(&routes), port, namespace), expected, "{what}");
    }
}

#[test]
fn what_a_status_would_say_is_remarked() {
    let grant = |kind: &str, name: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {{name: g, namespace: \
             elsewhere}}\nspec: {{from: [{{group: gateway.networking.k8s.io, kind: {kind}, namespace: shop}}], to: [{{group: \
             '', kind: Service{name}}}]}}\n"
        )
    };
    let one = |parent: &str, backend: &str| route("HTTPRoute shop/a", parent, backend);
    let far = || one(PAY, "name: far, namespace: elsewhere, port: 80");
    let cases: [(&str, Vec<String>, &str); 11] = [
        ("all is well", vec![one(PAY, PAY)], ""),
        ("no Service", vec![one("name: gone", PAY)], "NoMatchingParent"),
        ("no port", vec![one("name: pay, port: 90", PAY)], "NoMatchingParent"),
        ("no backend", vec![one(PAY, "name: gone, port: 80")], "BackendNotFound"),
        ("no port of it", vec![one(PAY, "name: pay, port: 82")], "BackendNotFound"),
        ("another kind", vec![one(PAY, PAY), route("GRPCRoute shop/a", PAY, PAY)], "Conflicted"),
        ("not granted", vec![far()], "RefNotPermitted"),
        ("granted", vec![far(), grant("HTTPRoute", "")], ""),
        ("granted by name", vec![far(), grant("HTTPRoute", ", name: far")], ""),
        ("another granted", vec![far(), grant("HTTPRoute", ", name: other")], "RefNotPermitted"),
        ("granted to another kind", vec![far(), grant("GRPCRoute", "")], "RefNotPermitted"),
    ];
    for (what, routes, word) in cases {
        let remarks = table(&routes).remarks;
        match word {
            "" => assert!(remarks.is_empty(), "{what}: {remarks:?}"),
            word => assert!(remarks.len() == 1 && remarks[0].message.contains(word), "{what}: {remarks:?}"),
        }
    }
    // The parent's own namespace needs no grant.
    assert!(table(&[route("HTTPRoute mine/a", PAY, PAY)]).remarks.is_empty());
}
