//! Who may: a table of policies and requests, written from the published semantics.

use std::collections::BTreeMap;

use super::authorization;
use crate::compile::load;
use crate::facts::{Claims, Connection, Moment, Request};
use crate::identity::{SpiffeId, TrustDomain};
use crate::name::ServiceName;
use crate::path::NormalPath;
use crate::policy::authorization::{Authorization, By, Denial};
use crate::resource::SourceFile;

/// The server name of opaque bytes: `sni NAME`.
fn asked_sni(text: &str) -> Option<&str> {
    text.strip_prefix("sni ")
}

/// `METHOD TARGET; name: value; ...`, or empty for opaque bytes. A field `@claims` is what a verified token says.
struct Asked {
    method: String,
    target: String,
    fields: Vec<(String, String)>,
}

fn asked(text: &str) -> Option<Asked> {
    if text.starts_with("sni ") {
        return None;
    }
    let mut parts = text.split("; ");
    let (method, target) = parts.next()?.split_once(' ')?;
    let fields = parts.filter_map(|field| field.split_once(": ")).map(|(k, v)| (k.to_owned(), v.to_owned()));
    Some(Asked { method: method.to_owned(), target: target.to_owned(), fields: fields.collect() })
}

fn in_force(specs: &[&str]) -> Authorization {
    let documents = specs.iter().enumerate().map(|(index, spec)| match spec.strip_prefix("mesh ") {
        Some(mesh) => format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: \
             outrigger-system}}\nspec: {mesh}\n"
        ),
        None => format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p{index}, namespace: \
             shop}}\nspec: {spec}\n"
        ),
    });
    // Two workloads of one account that differ in a label, and one of another.
    let workloads = ["a checkout {tier: web, v: \"1\"}", "b checkout {tier: web, v: \"2\"}", "c batch {tier: jobs}"].map(|text| {
        let [name, account, labels] = std::array::from_fn(|part| text.splitn(3, ' ').nth(part).unwrap());
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
             {{address: 10.0.0.{}, serviceAccount: {account}, labels: {labels}, ports: {{http: 80}}}}\n",
            name.as_bytes()[0]
        )
    });
    let text = documents.chain(workloads).collect::<Vec<_>>().join("---\n");
    let parsed = load(&[SourceFile { name: "t.yaml".into(), text }]);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    let domain = TrustDomain::new("outrigger.local").unwrap();
    let labels = BTreeMap::from([("app".to_owned(), "pay".to_owned())]);
    let compiled = authorization(&parsed.resources, &domain, "shop", &labels);
    // What travels is what was compiled.
    let wire = serde_json::to_vec(&compiled).unwrap();
    assert_eq!(serde_json::from_slice::<Authorization>(&wire).unwrap(), compiled);
    compiled
}

/// `allowed`, `denied by NAME/RULE`, `denied`, `ambiguous`; then `+shadow NAME` and `+audit NAME`.
fn verdict(specs: &[&str], from: &str, request: &str) -> String {
    let compiled = in_force(specs);
    let (who, ip) = from.split_once('@').unwrap_or((from, "10.0.0.7"));
    let identity = (!who.is_empty()).then(|| {
        let (namespace, account) = who.split_once('/').unwrap();
        SpiffeId::new(&TrustDomain::new("outrigger.local").unwrap(), namespace, account).unwrap()
    });
    let labels = BTreeMap::from([("app".to_owned(), "pay".to_owned())]);
    let service = ServiceName::new("payments", "shop").unwrap();
    let connection = Connection {
        identity: identity.as_ref(),
        source_ip: Some(ip.parse().unwrap()),
        destination_ip: Some("10.0.0.1".parse().unwrap()),
        destination_port: 8080,
        service: Some(&service),
        labels: &labels,
        now: Moment::of_unix_time(1_795_876_200),
        sni: asked_sni(request),
    };
    let asked = asked(request);
    let path = asked.as_ref().map(|asked| NormalPath::of(&asked.target));
    let claims = asked.as_ref().and_then(|asked| asked.fields.iter().find(|(name, _)| name == "@claims"));
    let claims = claims.map(|(_, json)| Claims::new(serde_json::from_str(json).unwrap()));
    let request = asked.as_ref().zip(path.as_ref()).map(|(asked, path)| Request {
        method: &asked.method,
        path,
        host: asked.fields.iter().find(|(name, _)| name == "host").map_or("payments", |(_, value)| value),
        headers: &asked.fields,
        claims: claims.as_ref(),
        query: asked.target.split_once('?').map(|(_, query)| query),
    });
    let mut steps = Vec::new();
    let verdict = compiled.decide(&connection, request.as_ref(), &mut steps);
    assert_eq!(compiled.decide(&connection, request.as_ref(), &mut ()), verdict, "a trace changes nothing");
    let name = |by: &By<'_>| {
        let name = by.to_string().rsplit('/').next().unwrap_or("").to_owned();
        by.rule().map_or(name.clone(), |rule| format!("{name}/{rule}"))
    };
    let mut text = match (verdict.denied, &verdict.by) {
        (None, _) => "allowed".to_owned(),
        (Some(Denial::PathAmbiguous), _) => "ambiguous".to_owned(),
        (Some(Denial::Policy), Some(by)) => format!("denied by {}", name(by)),
        (Some(Denial::Policy), None) => "denied".to_owned(),
    };
    verdict.shadow.iter().for_each(|by| text += &format!(" +shadow {}", name(by)));
    verdict.audit.iter().for_each(|by| text += &format!(" +audit {}", name(by)));
    text
}

const GET: &str = "GET /v1/charges";

#[test]
fn actions_and_their_order() {
    let any = "{rules: [{}]}";
    let nothing = "{}";
    let deny_get = "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let allow_get = "{rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let cases: &[(&[&str], &str, &str)] = &[
        (&[], GET, "allowed"),
        (&[any], GET, "allowed"),
        (&[nothing], GET, "denied by p0"),
        (&["{rules: []}"], GET, "denied by p0"),
        (&[any, nothing], GET, "allowed"),
        (&[any, deny_get], GET, "denied by p1/0"),
        (&[any, deny_get], "POST /", "allowed"),
        (&[deny_get], GET, "denied by p0/0"),
        (&[deny_get], "POST /", "allowed"),
        (&[allow_get], GET, "allowed"),
        (&[allow_get], "POST /", "denied by p0"),
        (&[allow_get, nothing], "POST /", "denied"),
        (&["mesh {defaultAction: Deny}"], GET, "denied by default"),
        (&["mesh {defaultAction: Deny}", allow_get], GET, "allowed"),
        (&["mesh {defaultAction: Deny}", allow_get], "POST /", "denied by p1"),
        (&["mesh {defaultAction: Deny}", deny_get], "POST /", "denied by default"),
        (&["{action: DENY}"], GET, "allowed"),
        // AUDIT decides nothing.
        (&["{action: AUDIT, rules: [{}]}"], GET, "allowed +audit p0/0"),
        (&["{action: AUDIT, rules: [{}]}", nothing], GET, "denied by p1 +audit p0/0"),
        // Shadow refuses nothing and tells what would have been.
        (&["{mode: Shadow, action: DENY, rules: [{}]}"], GET, "allowed +shadow p0/0"),
        (&["{mode: Shadow}"], GET, "allowed +shadow p0"),
        (&["{mode: Shadow}", "{mode: Shadow, rules: [{}]}"], GET, "allowed"),
        (&["{mode: Shadow}", any], GET, "allowed"),
        (&["{mode: Shadow}", nothing], GET, "denied by p1"),
        (&["{mode: Enforce}"], GET, "denied by p0"),
        // Opaque bytes: HTTP conditions hold in DENY and never in ALLOW.
        (&[allow_get], "", "denied by p0"),
        (&[deny_get], "", "denied by p0/0"),
        (&["{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: [\"9090\"]}}]}]}"], "", "allowed"),
        (&["{rules: [{to: [{operation: {ports: [8080]}}]}]}"], "", "allowed"),
        (&[any], "", "allowed"),
        (&["{action: DENY, rules: [{when: [{key: 'request.headers[x]', notValues: [a]}]}]}"], "", "denied by p0/0"),
        (&["{rules: [{when: [{key: 'request.headers[x]', notValues: [a]}]}]}"], "", "denied by p0"),
    ];
    for (specs, request, expected) in cases {
        assert_eq!(verdict(specs, "shop/checkout", request), *expected, "{specs:?} {request}");
    }
}

#[test]
fn sources() {
    let allow = |source: &str| format!("{{rules: [{{from: [{{source: {source}}}]}}]}}");
    let deny = |source: &str| format!("{{action: DENY, rules: [{{from: [{{source: {source}}}]}}]}}");
    let cases: &[(String, &str, bool)] = &[
        (allow("{principals: ['outrigger.local/ns/shop/sa/checkout']}"), "shop/checkout", true),
        (allow("{principals: ['spiffe://outrigger.local/ns/shop/sa/checkout']}"), "shop/checkout", true),
        (allow("{principals: ['cluster.local/ns/shop/sa/checkout']}"), "shop/checkout", true),
        (allow("{principals: ['outrigger.local/ns/shop/sa/checkout']}"), "shop/check", false),
        (allow("{principals: ['outrigger.local/ns/shop/*']}"), "shop/any", true),
        (allow("{principals: ['*/sa/checkout']}"), "other/checkout", true),
        (allow("{principals: ['*']}"), "shop/any", true),
        (allow("{principals: ['*']}"), "", false),
        (allow("{notPrincipals: ['outrigger.local/ns/shop/sa/bad']}"), "shop/good", true),
        (allow("{notPrincipals: ['outrigger.local/ns/shop/sa/bad']}"), "", true),
        (allow("{notPrincipals: ['outrigger.local/ns/shop/sa/bad']}"), "shop/bad", false),
        (allow("{principals: ['*'], notPrincipals: ['outrigger.local/ns/shop/sa/bad']}"), "", false),
        (allow("{namespaces: [shop]}"), "shop/any", true),
        (allow("{namespaces: [shop]}"), "shops/any", false),
        (allow("{namespaces: ['shop*']}"), "shops/any", true),
        (allow("{namespaces: [shop]}"), "", false),
        (allow("{notNamespaces: [shop]}"), "", true),
        (allow("{serviceAccounts: [checkout]}"), "shop/checkout", true),
        (allow("{serviceAccounts: [checkout]}"), "other/checkout", false),
        (allow("{serviceAccounts: [other/checkout]}"), "other/checkout", true),
        (allow("{notServiceAccounts: [checkout]}"), "shop/checkout", false),
        (allow("{ipBlocks: ['10.0.0.0/24']}"), "@10.0.0.9", true),
        (allow("{ipBlocks: ['10.0.0.0/24']}"), "@::ffff:10.0.0.9", true),
        (allow("{ipBlocks: ['10.0.0.9']}"), "@10.0.0.9", true),
        (allow("{ipBlocks: ['10.0.0.9']}"), "@10.0.0.8", false),
        (allow("{ipBlocks: ['fd00::/8']}"), "@fd00::1", true),
        (allow("{notIpBlocks: ['10.0.0.0/8']}"), "@10.0.0.9", false),
        (allow("{namespaces: [shop], ipBlocks: ['10.0.0.0/24']}"), "shop/a@10.0.1.1", false),
        (deny("{notPrincipals: ['outrigger.local/ns/shop/sa/good']}"), "", false),
        (deny("{notPrincipals: ['outrigger.local/ns/shop/sa/good']}"), "shop/good", true),
        (deny("{principals: ['*']}"), "", true),
        // Two sources: either.
        ("{rules: [{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}]}]}".into(), "b/x", true),
        ("{rules: [{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}]}]}".into(), "c/x", false),
    ];
    for (spec, from, expected) in cases {
        let allowed = verdict(&[spec], from, GET) == "allowed";
        assert_eq!(allowed, *expected, "{spec} {from}");
    }
}

#[test]
fn operations_and_conditions() {
    let allow = |operation: &str| format!("{{rules: [{{to: [{{operation: {operation}}}]}}]}}");
    let when = |condition: &str| format!("{{rules: [{{when: [{condition}]}}]}}");
    let cases: &[(String, &str, bool)] = &[
        (allow("{paths: [/v1/charges]}"), GET, true),
        (allow("{paths: [/v1/charges]}"), "GET /v1/charges?x=1", true),
        (allow("{paths: [/v1/charges]}"), "GET //v1/./charges", true),
        (allow("{paths: [/v1/charges]}"), "GET /v1/charges/", false),
        (allow("{paths: ['/v1/*']}"), "GET /v1/../admin", false),
        (allow("{paths: ['*/charges']}"), GET, true),
        (allow("{paths: ['/v1/{*}']}"), GET, true),
        (allow("{notPaths: ['/admin*']}"), GET, true),
        (allow("{notPaths: ['/admin*']}"), "GET /x/../admin", false),
        (allow("{methods: [GET, HEAD]}"), "HEAD /", true),
        (allow("{methods: [GET]}"), "get /", false),
        (allow("{notMethods: [POST]}"), "POST /", false),
        (allow("{hosts: [a.test]}"), "GET /; host: A.TEST:80", true),
        (allow("{hosts: [a.test]}"), "GET /; host: a.test.", true),
        (allow("{hosts: ['*.test']}"), "GET /; host: b.a.test", true),
        (allow("{hosts: [a.test]}"), "GET /; host: aa.test", false),
        (allow("{ports: ['8080']}"), GET, true),
        (allow("{ports: [80]}"), GET, false),
        (allow("{notPorts: [8080]}"), GET, false),
        (when("{key: 'request.headers[X-Role]', values: [reader]}"), "GET /; x-role: reader", true),
        (when("{key: 'request.headers[x-role]', values: [reader]}"), "GET /; X-Role: reader", true),
        (when("{key: 'request.headers[x-role]', values: [reader]}"), GET, false),
        (when("{key: 'request.headers[x-role]', values: [reader]}"), "GET /; x-role: reader; x-role: admin", false),
        (when("{key: 'request.headers[x-role]', values: [reader]}"), "GET /; x-role: reader,admin", false),
        (when("{key: 'request.headers[x-role]', values: [reader, admin]}"), "GET /; x-role: reader, admin", true),
        (when("{key: 'request.headers[x-role]', notValues: [admin]}"), "GET /; x-role: user,admin", false),
        (when("{key: 'request.headers[x-role]', notValues: [admin]}"), "GET /; x-role: user", true),
        (when("{key: 'request.headers[x-role]', notValues: [admin]}"), GET, true),
        (when("{key: source.ip, values: ['10.0.0.0/8']}"), GET, true),
        (when("{key: source.namespace, values: [shop]}"), GET, true),
        (when("{key: source.namespace, notValues: [shop]}"), GET, false),
        (when("{key: source.principal, values: ['cluster.local/ns/shop/sa/checkout']}"), GET, true),
        (when("{key: source.serviceAccount, values: [checkout]}"), GET, true),
        (when("{key: destination.port, values: [\"8080\"]}"), GET, true),
        (when("{key: destination.ip, values: [10.0.0.1]}"), GET, true),
        (when("{key: 'destination.labels[app]', values: [pay]}"), GET, true),
        (when("{key: 'destination.labels[tier]', values: [x]}"), GET, false),
        (when("{key: request.method, values: [GET]}"), GET, true),
        (when("{key: request.path, values: ['/v1/*']}"), GET, true),
        (when("{key: request.host, values: [payments]}"), GET, true),
        (when("{key: grpc.method, values: [Get]}"), "POST /a.B/Get; content-type: application/grpc+proto", true),
        (when("{key: grpc.service, values: [a.B]}"), "POST /a.B/Get; content-type: application/grpc", true),
        (when("{key: grpc.service, values: [a.B]}"), "POST /a.B/Get", false),
        (when("{key: time.hour, values: [\"14\"]}"), GET, true),
        (when("{key: time.hour, values: [\"4\"]}"), GET, false),
        (when("{key: time.weekday, values: [Sat, Sun]}"), GET, true),
        // Labels of the caller: those that all workloads of its account have.
        (when("{key: 'source.labels[tier]', values: [web]}"), GET, true),
        (when("{key: 'source.labels[tier]', values: ['w*']}"), GET, true),
        (when("{key: 'source.labels[tier]', values: [jobs]}"), GET, false),
        (when("{key: 'source.labels[tier]', notValues: [web]}"), GET, false),
        (when("{key: 'source.labels[v]', values: [\"1\"]}"), GET, false),
        (when("{key: 'source.labels[v]', notValues: [\"1\"]}"), GET, true),
        (when("{expression: \"source.labels.tier == 'web' && !has(source.labels.v)\"}"), GET, true),
        (when("{expression: \"source.labels.exists(k, k == 'tier')\"}"), GET, true),
        (when("{key: connection.sni, values: [a.test]}"), "sni a.test", true),
        (when("{key: connection.sni, values: ['*.test']}"), "sni a.test", true),
        (when("{key: connection.sni, values: [a.test]}"), "sni b.test", false),
        (when("{key: connection.sni, values: [a.test]}"), "", false),
        (when("{key: connection.sni, values: [a.test]}"), GET, false),
        (when("{key: connection.sni, notValues: [a.test]}"), "", true),
        (when("{expression: \"request.method == 'GET' && source.namespace == 'shop'\"}"), GET, true),
        (when("{expression: \"request.query['x'] == 'a b'\"}"), "GET /?y=1&x=a%20b", true),
        (when("{expression: \"request.query['x'] == '1'\"}"), "GET /?x=1&x=2", false),
        (when("{expression: \"request.headers['x'] == '1'\"}"), "GET /; x: 1", true),
        (when("{expression: \"request.headers['x'] == '1'\"}"), "GET /; x: 1; x: 2", false),
        (when("{expression: \"request.headers['x'] != '1'\"}"), GET, false),
        (when("{expression: \"request.path == '/'\"}"), "", false),
        (when("{expression: \"destination.port == 8080 && destination.labels.app == 'pay'\"}"), "", true),
        (when("{expression: \"destination.service == 'payments.shop' && source.ip == '10.0.0.7'\"}"), GET, true),
        (when("{expression: \"now.getDayOfWeek() == 6\"}"), GET, true),
        (
            when("{expression: \"'ops' in claims.groups && claims.realm.level > 1\"}"),
            r#"GET /; @claims: {"groups":["dev","ops"],"realm":{"level":2}}"#,
            true,
        ),
        (when("{expression: \"has(claims.groups)\"}"), GET, false),
        (when("{expression: \"'ops' in claims.groups\"}"), "", false),
        (when("{key: time.weekday, values: [Sat]}, {key: 'request.headers[x]', values: [y]}"), "GET /; x: y", true),
        (when("{key: time.weekday, values: [Sat]}, {key: 'request.headers[x]', values: [y]}"), GET, false),
        ("{targetRefs: [{kind: Service, group: '', name: payments}], rules: [{}]}".into(), GET, true),
        ("{targetRefs: [{kind: Service, group: '', name: payments}]}".into(), GET, false),
        ("{targetRefs: [{kind: Service, group: '', name: other}]}".into(), GET, true),
        ("{selector: {matchLabels: {app: pay}}}".into(), GET, false),
        ("{selector: {matchLabels: {app: other}}}".into(), GET, true),
    ];
    for (spec, request, expected) in cases {
        let got = verdict(&[spec], "shop/checkout", request);
        assert_eq!(got == "allowed", *expected, "{spec} {request}: {got}");
    }
}

#[test]
fn what_a_token_says() {
    let allow = |source: &str| format!("{{rules: [{{from: [{{source: {source}}}]}}]}}");
    let when = |condition: &str| format!("{{rules: [{{when: [{condition}]}}]}}");
    let deny = |condition: &str| format!("{{action: DENY, rules: [{{when: [{condition}]}}]}}");
    let alice = r#"GET /; @claims: {"iss":"https://a","sub":"alice","aud":["x","pay"],"azp":"web","scope":"read write","groups":["dev","ops"],"level":5,"realm":{"roles":["r"]}}"#;
    let nobody = r#"GET /; @claims: {"iss":"https://a"}"#;
    let cases: &[(String, &str, bool)] = &[
        (allow("{requestPrincipals: ['https://a/alice']}"), alice, true),
        (allow("{requestPrincipals: ['https://a/*']}"), alice, true),
        (allow("{requestPrincipals: ['*/alice']}"), alice, true),
        (allow("{requestPrincipals: ['*']}"), alice, true),
        (allow("{requestPrincipals: ['*']}"), GET, false),
        (allow("{requestPrincipals: ['*']}"), nobody, false),
        (allow("{requestPrincipals: ['https://a/ali']}"), alice, false),
        (allow("{notRequestPrincipals: ['https://a/bob']}"), alice, true),
        (allow("{notRequestPrincipals: ['https://a/alice']}"), alice, false),
        (allow("{notRequestPrincipals: ['*']}"), GET, true),
        (allow("{principals: ['*'], requestPrincipals: ['https://b/*']}"), alice, false),
        (deny("{key: request.auth.principal, notValues: ['*']}"), GET, false),
        (deny("{key: request.auth.principal, notValues: ['*']}"), alice, true),
        (when("{key: request.auth.principal, values: ['https://a/alice']}"), alice, true),
        (when("{key: request.auth.audiences, values: [pay]}"), alice, true),
        (when("{key: request.auth.audiences, notValues: [pay]}"), alice, false),
        (when("{key: request.auth.presenter, values: [web]}"), alice, true),
        (when("{key: 'request.auth.claims[scope]', values: [read]}"), alice, true),
        (when("{key: 'request.auth.claims[scope]', values: [admin]}"), alice, false),
        (when("{key: 'request.auth.claims[groups]', values: [ops]}"), alice, true),
        (when("{key: 'request.auth.claims[groups]', values: [dev], notValues: [ops]}"), alice, false),
        (when("{key: 'request.auth.claims[level]', values: [\"5\"]}"), alice, true),
        (when("{key: 'request.auth.claims[realm][roles]', values: [r]}"), alice, true),
        (when("{key: 'request.auth.claims[realm]', values: ['*']}"), alice, false),
        (when("{key: 'request.auth.claims[x]', values: ['*']}"), alice, false),
        (when("{key: 'request.auth.claims[x]', notValues: [y]}"), alice, true),
        (when("{key: 'request.auth.claims[x]', notValues: [y]}"), GET, true),
        // Opaque bytes have no token.
        (when("{key: 'request.auth.claims[x]', notValues: [y]}"), "", false),
        (deny("{key: 'request.auth.claims[x]', values: [y]}"), "", false),
        (allow("{notRequestPrincipals: ['*']}"), "", false),
        ("{action: DENY, rules: [{from: [{source: {requestPrincipals: ['https://a/*']}}]}]}".into(), "", false),
        ("{action: DENY, rules: [{from: [{source: {requestPrincipals: ['*'], namespaces: [x]}}]}]}".into(), "", true),
    ];
    for (spec, request, expected) in cases {
        let got = verdict(&[spec], "shop/checkout", request);
        assert_eq!(got == "allowed", *expected, "{spec} {request}: {got}");
    }
}

/// DENY errs towards refusing: an expression without an answer matches, and the step says why.
#[test]
fn an_expression_without_an_answer_refuses() {
    let deny = |text: &str| format!("{{action: DENY, rules: [{{when: [{{expression: \"{text}\"}}]}}]}}");
    for (text, request, expected) in [
        ("request.headers['x'] == '1'", GET, "denied by p0/0"),
        ("'x' in request.headers && request.headers['x'] == '1'", GET, "allowed"),
        ("request.headers['x'] == '1'", "GET /; x: 2; x: 3", "denied by p0/0"),
        ("request.method == 'PUT'", "", "denied by p0/0"),
        ("destination.port == 1", "", "allowed"),
    ] {
        assert_eq!(verdict(&[&deny(text)], "shop/a", request), expected, "{text} {request}");
    }
    let compiled = in_force(&[&deny("request.headers['x'] == '1'")]);
    let labels = BTreeMap::new();
    let connection = Connection {
        identity: None,
        source_ip: None,
        destination_ip: None,
        destination_port: 80,
        service: None,
        labels: &labels,
        now: Moment::default(),
        sni: None,
    };
    let (path, headers) = (NormalPath::of("/"), Vec::new());
    let request = Request { method: "GET", path: &path, query: None, host: "h", headers: &headers, claims: None };
    let mut steps = Vec::new();
    compiled.decide(&connection, Some(&request), &mut steps);
    assert!(
        steps[0].why.contains("has no answer (request.headers has no \"x\"), which counts as a match"),
        "{steps:?}"
    );
    // Where a rule looks at paths in an expression, a path that can be read in two ways is refused.
    assert_eq!(verdict(&[&deny("request.path == '/admin'")], "shop/a", "GET /x%2fadmin"), "ambiguous");
}

/// DENY /admin: no spelling that a lenient server reads as /admin gets through.
#[test]
fn denied_paths_in_every_spelling() {
    let deny = ["{action: DENY, rules: [{to: [{operation: {paths: ['/admin', '/admin/*']}}]}]}"];
    for target in [
        "/admin",
        "/admin/",
        "/admin/x",
        "//admin",
        "/./admin",
        "/x/../admin",
        "/%61dmin",
        "/admin?x",
        "/admin;x",
        "/admin;x/y",
        "/;x/admin",
        "/admin/.",
        "/x/%2e%2e/admin",
        "/admin%3bx",
        "http://h/admin",
        "/admin#x",
        "/x/./../admin",
        "///admin",
    ] {
        assert_eq!(verdict(&deny, "shop/a", &format!("GET {target}")), "denied by p0/0", "{target}");
    }
    for target in [
        "/x%2f..%2fadmin",
        "/%2561dmin",
        "/x/..;/admin",
        "/\\admin",
        "/%5cadmin",
        "/admin%00",
        "/../admin",
        "/x//../admin",
        "/%zz",
        "/%",
        "/%c0%afadmin",
        "/x/.;y/admin",
        "/..%3b/admin",
    ] {
        assert_eq!(verdict(&deny, "shop/a", &format!("GET {target}")), "ambiguous", "{target}");
    }
    for target in ["/", "/adm", "/x/admin", "/administrator", "/admin2;admin"] {
        assert_eq!(verdict(&deny, "shop/a", &format!("GET {target}")), "allowed", "{target}");
    }
    // Where nothing looks at paths every path goes on.
    let other = ["{action: DENY, rules: [{to: [{operation: {methods: [PUT]}}]}]}"];
    assert_eq!(verdict(&other, "shop/a", "GET /a%2fb"), "allowed");
    // A shadow looks, and refuses nothing.
    let shadow = ["{mode: Shadow, action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}"];
    assert_eq!(verdict(&shadow, "shop/a", "GET /a%2fb"), "allowed +shadow p0");
}

#[test]
fn a_deny_rule_matches_any_value_of_a_field() {
    let deny = ["{action: DENY, rules: [{when: [{key: 'request.headers[x-role]', values: [admin]}]}]}"];
    for fields in ["x-role: admin", "x-role: user,admin", "x-role: admin, user", "x-role: user; x-role:  admin"] {
        assert_eq!(verdict(&deny, "shop/a", &format!("GET /; {fields}")), "denied by p0/0", "{fields}");
    }
    assert_eq!(verdict(&deny, "shop/a", "GET /; x-role: administrator"), "allowed");
}

#[test]
fn a_trace_says_what_failed_and_with_which_value() {
    let compiled =
        in_force(&["{rules: [{from: [{source: {namespaces: [bank]}}], to: [{operation: {methods: [GET]}}]}]}"]);
    let identity = SpiffeId::parse("spiffe://outrigger.local/ns/shop/sa/web").unwrap();
    let labels = BTreeMap::new();
    let connection = Connection {
        identity: Some(&identity),
        source_ip: None,
        destination_ip: None,
        destination_port: 80,
        service: None,
        labels: &labels,
        now: Moment::default(),
        sni: None,
    };
    let mut steps = Vec::new();
    compiled.decide(&connection, None, &mut steps);
    let said: Vec<String> = steps.iter().map(|step| format!("{} {}: {}", step.object, step.result, step.why)).collect();
    assert_eq!(
        said,
        ["AuthorizationPolicy/shop/p0 rule 0 no match: from[0].source.namespaces: the caller is \
             spiffe://outrigger.local/ns/shop/sa/web, expected one of bank"]
    );
}

#[test]
fn an_unknown_field_refuses_the_whole() {
    let known = r#"{"policies":[{"namespace":"a","name":"b","action":"DENY","shadow":false,"rules":[{}]}],"defaultAction":"Allow"}"#;
    assert!(serde_json::from_str::<Authorization>(known).is_ok());
    for (from, to) in [
        (r#""shadow":false"#, r#""shadow":false,"newer":1"#),
        (r#""rules":[{}]"#, r#""rules":[{"newer":[]}]"#),
        (r#""rules":[{}]"#, r#""rules":[{"from":[{"newer":{}}]}]"#),
        (r#""rules":[{}]"#, r#""rules":[{"to":[{"newer":{}}]}]"#),
        (r#""rules":[{}]"#, r#""rules":[{"when":[{"key":"Newer","values":{"Texts":{"anyOf":[],"noneOf":[]}}}]}]"#),
        (r#""DENY""#, r#""CUSTOM""#),
        (r#""Allow""#, r#""Ask""#),
    ] {
        let newer = known.replace(from, to);
        assert_ne!(newer, known);
        assert!(serde_json::from_str::<Authorization>(&newer).is_err(), "{newer}");
    }
}
