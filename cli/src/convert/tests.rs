//! What each kind becomes, and what is told. What this version's parser does not act on is not printed, so routes and traffic
//! policies are looked at before it is asked.

use super::*;

fn read(text: &str) -> Vec<Document> {
    let (documents, broken) = documents(&[SourceFile { name: "mesh.yaml".to_owned(), text: text.to_owned() }]);
    assert!(broken.is_empty(), "{broken:?}");
    documents
}

/// Of one document of Istio's: what it becomes, as YAML, and what is told.
fn istio(kind: &str, spec: &str) -> (String, Vec<String>) {
    let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    let text = format!(
        "apiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: reviews, namespace: books}}\nspec:\n{indented}"
    );
    let document = read(&text).remove(0);
    let mut left = Left::default();
    let becomes = match kind {
        "VirtualService" => virtual_service::route(&document, &mut left),
        "DestinationRule" => destination_rule::policy(&document, &mut left),
        _ => service_entry::entry(&document, &mut left),
    };
    let spec = becomes.map(|becomes| serde_yaml::to_string(&becomes["spec"]).unwrap()).unwrap_or_default();
    (spec, left.into_lines())
}

/// The YAML in the order in which it is printed.
fn yaml(text: &str) -> String {
    serde_yaml::to_string(&serde_yaml::from_str::<Value>(text).unwrap()).unwrap()
}

#[test]
fn a_virtual_service_becomes_a_route() {
    let (spec, told) = istio(
        "VirtualService",
        "hosts: [reviews, ratings.other.svc.cluster.local]\n\
         http:\n\
         - name: beta\n\
         \x20 match: [{uri: {exact: /v2}, method: {exact: GET}, headers: {x-beta: {exact: 'yes'}}}]\n\
         \x20 route:\n\
         \x20 - {destination: {host: reviews-v2, port: {number: 80}}, weight: 90}\n\
         \x20 - {destination: {host: reviews.old, port: {number: 81}}, weight: 10}\n\
         \x20 timeout: 0.5s\n\
         \x20 retries: {attempts: 3, perTryTimeout: 2s, retryOn: 'gateway-error,connect-failure,409'}\n\
         - redirect: {uri: /gone, authority: books.example}\n",
    );
    assert_eq!(told, Vec::<String>::new());
    let expected = yaml(
        "parentRefs:\n\
         - {group: '', kind: Service, name: reviews}\n\
         - {group: '', kind: Service, name: ratings, namespace: other}\n\
         rules:\n\
         - matches: [{path: {type: Exact, value: /v2}, method: GET, headers: [{name: x-beta, type: Exact, value: 'yes'}]}]\n\
         \x20 backendRefs: [{name: reviews-v2, port: 80, weight: 90}, {name: reviews, namespace: old, port: 81, weight: 10}]\n\
         \x20 timeouts: {request: 500ms, backendRequest: 2s}\n\
         \x20 retry: {attempts: 3, codes: [409, 502, 503, 504]}\n\
         - filters:\n\
         \x20 - type: RequestRedirect\n\
         \x20   requestRedirect: {hostname: books.example, path: {type: ReplaceFullPath, replaceFullPath: /gone}, statusCode: 301}\n",
    );
    assert_eq!(spec, expected);
}

#[test]
fn a_rule_that_cannot_be_said_whole_is_left_out_and_told() {
    for (rule, lines) in [
        (
            "match: [{sourceLabels: {app: web}}]\n  route: [{destination: {host: a, port: {number: 80}}}]",
            &["spec.http[0].match[0].sourceLabels has no counterpart here", "spec.http[0] is left out"][..],
        ),
        (
            "match: [{headers: {x-a: {prefix: b}}}]\n  route: [{destination: {host: a, port: {number: 80}}}]",
            &["spec.http[0].match[0].headers.x-a: only `exact` and `regex` can be said here"],
        ),
        (
            "route: [{destination: {host: a, subset: v1, port: {number: 80}}}]",
            &["spec.http[0].route[0].destination.subset v1: make it a Service", "spec.http[0] is left out"],
        ),
        ("route: [{destination: {host: a}}]", &["destination.port.number is missing", "spec.http[0] is left out"]),
        (
            "route: [{destination: {host: api.example.com, port: {number: 80}}}]",
            &["host \"api.example.com\" is no Service"],
        ),
        (
            "directResponse: {status: 503}",
            &["spec.http[0].directResponse has no counterpart", "spec.http[0] is left out"],
        ),
    ] {
        let (spec, told) = istio("VirtualService", &format!("hosts: [reviews]\nhttp:\n- {rule}\n"));
        assert_eq!(spec, "", "{rule}");
        for line in lines {
            assert!(told.iter().any(|told| told.contains(line)), "{rule}: {line} in {told:?}");
        }
    }
    // What only adds something is told, and the rule stays.
    let (spec, told) = istio(
        "VirtualService",
        "hosts: [reviews, '*.example.com']\ngateways: [mesh, edge]\nhttp:\n- match: [{uri: {prefix: /a}}]\n  fault: {abort: {httpStatus: \
         500}}\n  route: [{destination: {host: a, port: {number: 80}}}]\ntcp: []\n",
    );
    assert!(spec.contains("PathPrefix") && spec.contains("name: a\n"), "{spec}");
    for line in [
        "spec.hosts: *.example.com is no Service",
        "spec.gateways: edge",
        "spec.http[0].match[0].uri.prefix /a: a PathPrefix ends at a `/`",
        "spec.http[0].fault has no counterpart here",
        "spec.tcp has no counterpart here",
    ] {
        assert!(told.iter().any(|told| told.contains(line)), "{line} in {told:?}");
    }
}

#[test]
fn a_destination_rule_and_a_service_entry() {
    let (spec, told) = istio(
        "DestinationRule",
        "host: reviews.books.svc.cluster.local\n\
         trafficPolicy:\n\
         \x20 loadBalancer: {consistentHash: {httpHeaderName: x-user}}\n\
         \x20 connectionPool: {tcp: {maxConnections: 100, connectTimeout: 1s}, http: {http1MaxPendingRequests: 7, idleTimeout: 1h}}\n\
         \x20 outlierDetection: {consecutive5xxErrors: 7, interval: 5s}\n\
         \x20 tls: {mode: ISTIO_MUTUAL}\n\
         subsets: [{name: v1, labels: {version: v1}}]\n",
    );
    let expected = yaml(
        "targetRefs: [{group: '', kind: Service, name: reviews}]\n\
         loadBalancer: {type: ConsistentHash, consistentHash: {httpHeaderName: x-user}}\n\
         connectionPool: {maxConnections: 100, maxPending: 7}\n\
         timeouts: {connect: 1s}\n\
         outlierDetection: {consecutive5xxErrors: 7, interval: 5s}\n",
    );
    assert_eq!(spec, expected);
    let path = "spec.trafficPolicy.connectionPool.http.idleTimeout has no counterpart here";
    assert_eq!(told, [path, "spec.subsets has no counterpart here"]);
    let (spec, told) =
        istio("DestinationRule", "host: reviews.other\ntrafficPolicy: {loadBalancer: {simple: RANDOM}}\n");
    assert_eq!((&*spec, told.len()), ("", 1), "{told:?}");
    let entry = "hosts: [api.example.com]\nports: [{number: 443, name: tls, protocol: TLS}]\nresolution: DNS\nexportTo: ['.']\n";
    let (spec, told) = istio("ServiceEntry", entry);
    assert_eq!(spec, yaml(&entry.replace("exportTo: ['.']\n", "")));
    assert_eq!(told, ["spec.exportTo has no counterpart here"]);
}

const LINKERD: &str = "\
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: stock-http, namespace: shop}
spec: {podSelector: {matchLabels: {app: stock}}, port: 8080, proxyProtocol: HTTP/2}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web-reads, namespace: shop}
spec:
  targetRef: {group: policy.linkerd.io, kind: Server, name: stock-http}
  requiredAuthenticationRefs:
  - {group: policy.linkerd.io, kind: MeshTLSAuthentication, name: web}
  - {group: policy.linkerd.io, kind: NetworkAuthentication, name: inside}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: web, namespace: shop}
spec: {identities: [web.shop.serviceaccount.identity.linkerd.cluster.local, '*.tools.serviceaccount.identity.linkerd.cluster.local']}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: NetworkAuthentication
metadata: {name: inside, namespace: shop}
spec: {networks: [{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}]}
";

#[test]
fn a_server_of_linkerd_becomes_a_policy_that_this_version_reads() {
    let output = converted(read(LINKERD));
    assert_eq!(
        output.told,
        ["mesh.yaml: Server shop/stock-http: spec.proxyProtocol is the Service's to say: appProtocol of its port 8080"]
    );
    let expected = yaml(
        "apiVersion: outrigger.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {name: stock-http, namespace: shop}\n\
         spec:\n\
         \x20 selector: {matchLabels: {app: stock}}\n\
         \x20 action: ALLOW\n\
         \x20 rules:\n\
         \x20 - from: [{source: {serviceAccounts: [shop/web], ipBlocks: [10.0.0.0/8], notIpBlocks: [10.9.0.0/16]}}]\n\
         \x20   to: [{operation: {ports: ['8080']}}]\n\
         \x20 - from: [{source: {namespaces: [tools], ipBlocks: [10.0.0.0/8], notIpBlocks: [10.9.0.0/16]}}]\n\
         \x20   to: [{operation: {ports: ['8080']}}]\n\
         \x20 - to: [{operation: {notPorts: ['8080']}}]\n",
    );
    assert_eq!(output.documents, [expected]);
}

#[test]
fn what_is_not_understood_of_linkerd_lets_nobody_in() {
    let with = |old: &str, new: &str| {
        assert!(LINKERD.contains(old), "{old}");
        converted(read(&LINKERD.replace(old, new)))
    };
    let closed = "spec:\n  action: ALLOW\n  rules:\n  - to:\n    - operation:\n        notPorts:\n        - '8080'\n";
    for (old, new, line) in [
        ("name: web}\n  - {group", "name: gone}\n  - {group", "MeshTLSAuthentication gone is not here"),
        (
            "kind: NetworkAuthentication, name: inside}",
            "kind: MeshTLSAuthentication, name: web}",
            "cannot be asked for together",
        ),
        ("{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}", "{except: [10.9.0.0/16]}", "networks[0].cidr is missing"),
        ("kind: Server, name: stock-http}", "kind: HTTPRoute, name: stock-http}", "only Servers can be converted"),
        (
            "identities: [web.shop.serviceaccount.identity.linkerd.cluster.local, '*.",
            "identities: ['web.*', '*x.",
            "web.* is left out",
        ),
    ] {
        let output = with(old, new);
        assert_eq!(output.documents.len(), 1, "{new}: {output:?}");
        assert!(output.documents[0].contains(closed), "{new}: {}", output.documents[0]);
        assert!(output.told.iter().any(|told| told.contains(line)), "{new}: {:?}", output.told);
    }
    // Without its port, or for other workloads, it would protect something else.
    for (old, new, line) in [
        ("port: 8080", "port: http", "spec.port is a name"),
        (
            "{matchLabels: {app: stock}}",
            "{matchExpressions: [{key: app, operator: Exists}]}",
            "matchExpressions has no counterpart",
        ),
    ] {
        let output = with(old, new);
        assert_eq!(output.documents, Vec::<String>::new(), "{new}");
        for line in [line, "nothing protects its port here"] {
            assert!(output.told.iter().any(|told| told.contains(line)), "{new}: {line} in {:?}", output.told);
        }
    }
}

#[test]
fn others_pass_and_what_this_version_does_not_act_on_is_told() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}}\n---\napiVersion: \
                networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: s, namespace: shop}\nspec: {}\n";
    let output = converted(read(text));
    assert_eq!(output.documents, [yaml("{apiVersion: v1, kind: Service, metadata: {name: a}}")]);
    assert_eq!(
        output.told,
        ["mesh.yaml: Sidecar shop/s: there is no counterpart here", "mesh.yaml: Sidecar shop/s: not converted"]
    );
    let mut output = Output::default();
    let document = read(text).remove(0);
    output.check(&document, &made(OURS, "NoSuchPolicy", "shop", "s", Map::new()));
    assert!(output.documents.is_empty());
    assert!(output.told[0].contains("not converted: this version does not take the NoSuchPolicy"), "{:?}", output.told);
    let (_, broken) = documents(&[SourceFile { name: "x.yaml".to_owned(), text: "a: [".to_owned() }]);
    assert!(broken[0].starts_with("x.yaml: "), "{broken:?}");
}
