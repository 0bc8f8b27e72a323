//! Promise: AuthorizationPolicies decide who may, per request on HTTP and per connection on opaque bytes, on running
//! connections within about a second of the file's change. A refusal says which object and rule it was, to callers that
//! prove who they are. `explain` of a running sidecar decides alike.

use std::time::Duration;

use outrigger_tests::eventually::within;
use outrigger_tests::peer::{H1, TCP};
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Peer, Sidecar, eventually};
use serde_json::json;

/// The promise is a second; the machine that runs the tests may be busy with others.
const SOON: Duration = Duration::from_secs(20);

const GET: &str = "GET /v1/charges HTTP/1.1\r\nHost: catalog\r\n\r\n";
const ADMIN: &str = "GET /admin HTTP/1.1\r\nHost: catalog\r\n\r\n";

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(protocol: Option<&str>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), protocol);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, far, mesh }
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {spec}\n"
    )
}

async fn becomes(client: &mut Connection, request: &str, status: u16) {
    within(SOON, &format!("{status}"), async || (client.ask(request).await.status == status).then_some(())).await;
}

#[tokio::test]
async fn a_policy_is_in_force_on_a_running_connection_and_says_who_refused() {
    let pair = pair(Some("http")).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    assert_eq!(client.ask(GET).await.status, 200);
    pair.mesh.write("p.yaml", &policy("lock", "{action: DENY, rules: [{to: [{operation: {paths: ['/admin*']}}]}]}"));
    becomes(&mut client, ADMIN, 403).await;
    let before = pair.app.count();
    let refused = client.ask(ADMIN).await;
    assert_eq!((refused.status, refused.reason().as_str()), (403, "policy_denied"));
    assert_eq!(
        refused.header("proxy-status"),
        Some("catalog-1; error=http_request_denied; details=\"AuthorizationPolicy/shop/lock rule 0\"")
    );
    // The connection goes on, and so does everything else.
    assert_eq!(client.ask(GET).await.status, 200);
    assert_eq!(pair.app.count(), before + 1);
    let ambiguous = client.ask("GET /x/..;/admin HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    assert_eq!((ambiguous.status, ambiguous.reason().as_str()), (400, "path_ambiguous"));
    let labels = [("direction", "inbound"), ("reason", "policy_denied"), ("code", "403")];
    eventually("the refusals are counted", async || {
        (pair.far.metrics().await.sum("outrigger_http_requests_total", &labels) >= 2.0).then_some(())
    })
    .await;
    // A typo changes nothing.
    pair.mesh.write("p.yaml", &policy("lock", "{action: DENNY}"));
    eventually("the mistake is told", async || {
        let status = pair.mesh.control_plane_get("/status").await;
        status.to_string().contains("DENNY").then_some(())
    })
    .await;
    assert_eq!(client.ask(ADMIN).await.status, 403);
    pair.mesh.remove("p.yaml");
    becomes(&mut client, ADMIN, 200).await;
}

#[tokio::test]
async fn callers_are_told_apart_and_strangers_are_told_nothing() {
    let pair = pair(Some("http")).await;
    let (cart, other) = (
        Peer::issue(&pair.mesh, "shop", "cart", "cart-9").await,
        Peer::issue(&pair.mesh, "shop", "other", "other-9").await,
    );
    pair.mesh.write(
        "p.yaml",
        &policy(
            "readers",
            "{rules: [{from: [{source: {serviceAccounts: [cart]}}], to: [{operation: {methods: [GET]}}]}]}",
        ),
    );
    pair.mesh.write("mesh.yaml", outrigger_tests::mesh::PERMISSIVE);
    let mut refused = other.connect(pair.far.inbound(), &[H1]).await.unwrap();
    becomes(&mut refused, GET, 403).await;
    let mut allowed = cart.connect(pair.far.inbound(), &[H1]).await.unwrap();
    assert_eq!(allowed.ask(GET).await.status, 200);
    let write = allowed.ask("POST /v1 HTTP/1.1\r\nHost: catalog\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(write.status, 403);
    assert!(write.header("proxy-status").unwrap().contains("AuthorizationPolicy/shop/readers"), "{write:?}");
    let stranger = within(SOON, "plaintext is heard", async || {
        let mut stranger = Connection::open(pair.far.inbound()).await;
        stranger.send(GET).await;
        stranger.try_response(false).await.ok()
    })
    .await;
    assert_eq!((stranger.status, stranger.reason().as_str()), (403, "policy_denied"));
    assert_eq!(stranger.header("proxy-status"), Some("catalog-1; error=http_request_denied"));
}

#[tokio::test]
async fn the_default_action_shadow_and_audit() {
    let pair = pair(Some("http")).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    assert_eq!(client.ask(GET).await.status, 200);
    pair.mesh.write(
        "p.yaml",
        &(policy("trial", "{mode: Shadow, rules: []}") + "---\n" + &policy("watch", "{action: AUDIT, rules: [{}]}")),
    );
    within(SOON, "shadow and audit are counted", async || {
        assert_eq!(client.ask(GET).await.status, 200);
        let samples = pair.far.metrics().await;
        let shadow = [("policy", "AuthorizationPolicy/shop/trial"), ("would", "denied")];
        let audit = [("policy", "AuthorizationPolicy/shop/watch")];
        let counted = samples.sum("outrigger_policy_shadow_total", &shadow) > 0.0
            && samples.sum("outrigger_policy_audit_total", &audit) > 0.0;
        counted.then_some(())
    })
    .await;
    // The control plane learns of callers and shapes of requests, never of paths.
    let reported = within(SOON, "the report has it", async || {
        assert_eq!(client.ask("GET /v1/charges/8371 HTTP/1.1\r\nHost: catalog\r\n\r\n").await.status, 200);
        let report = pair.mesh.control_plane_get("/policy-report").await;
        let policy = report["policies"].as_array()?.first()?.clone();
        let has = |shape: &str| policy["callers"].to_string().contains(shape);
        (has("GET /v1/charges\"") && has("GET /v1/charges/{*}")).then_some(policy)
    })
    .await;
    assert_eq!((&reported["policy"], &reported["action"]), (&json!("AuthorizationPolicy/shop/trial"), &json!("ALLOW")));
    assert!(reported["selects"].as_u64() >= Some(1), "{reported}");
    for caller in reported["callers"].as_array().unwrap() {
        assert_eq!(
            (&caller["caller"], &caller["called"], &caller["would"]),
            (
                &json!("spiffe://outrigger.local/ns/shop/sa/cart"),
                &json!("spiffe://outrigger.local/ns/shop/sa/catalog"),
                &json!("denied")
            )
        );
    }
    // Enforced, it is under trial no more.
    pair.mesh.remove("p.yaml");
    within(SOON, "the report forgets it", async || {
        let report = pair.mesh.control_plane_get("/policy-report").await;
        report["policies"].as_array()?.is_empty().then_some(())
    })
    .await;
    pair.mesh.write(
        "deny.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
         outrigger-system}\nspec: {defaultAction: Deny}\n",
    );
    becomes(&mut client, GET, 403).await;
    let refused = client.ask(GET).await;
    assert!(refused.header("proxy-status").unwrap().contains("MeshConfig/outrigger-system/default"), "{refused:?}");
    pair.mesh.write("p.yaml", &policy("open", "{rules: [{}]}"));
    becomes(&mut client, GET, 200).await;
}

/// HTTP conditions never let opaque bytes in, and always keep them out.
#[tokio::test]
async fn opaque_bytes_are_judged_as_what_they_are() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = outrigger_tests::application::Backend::start().await;
    mesh.service("catalog.shop", 80, backend.port(), Some("tcp"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).start().await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let gets_through = async || {
        let mut client = peer.connect(far.inbound(), &[TCP]).await.unwrap();
        if client.try_send("hello").await.is_err() {
            return false;
        }
        tokio::select! {
            mut accepted = backend.accept() => { accepted.take(5).await; true }
            _ = client.take_to_end() => false,
        }
    };
    assert!(gets_through().await);
    let mut open = peer.connect(far.inbound(), &[TCP]).await.unwrap();
    open.send("hello").await;
    let mut accepted = backend.accept().await;
    accepted.take(5).await;
    mesh.write("p.yaml", &policy("http", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"));
    within(SOON, "an ALLOW about methods keeps bytes out", async || (!gets_through().await).then_some(())).await;
    // What was open is judged again.
    open.expect_end().await;
    mesh.write("p.yaml", &policy("who", "{rules: [{from: [{source: {namespaces: [shop]}}]}]}"));
    within(SOON, "an ALLOW about callers lets them in", async || gets_through().await.then_some(())).await;
    mesh.write("p.yaml", &policy("deny", "{action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}"));
    within(SOON, "a DENY about paths keeps bytes out", async || (!gets_through().await).then_some(())).await;
    let labels = [("direction", "inbound"), ("reason", "policy_denied")];
    eventually("the refusals are counted", async || {
        (far.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) > 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_running_sidecar_explains() {
    let pair = pair(Some("http")).await;
    pair.mesh.write("p.yaml", &policy("none", "{rules: [{to: [{operation: {methods: [PUT]}}]}]}"));
    let mut client = Connection::open(pair.near.outbound()).await;
    becomes(&mut client, GET, 403).await;
    let question = json!({
        "from": "spiffe://outrigger.local/ns/shop/sa/cart", "fromIp": null, "to": "catalog.shop", "port": 80,
        "request": {"method": "GET", "target": "/v1/charges", "headers": []}, "at": 0,
    });
    let answer = pair.far.admin_post_json("/explain", &question).await;
    assert_eq!(
        (&answer["verdict"], &answer["status"], &answer["reason"]),
        (&json!("refused"), &json!(403), &json!("policy_denied"))
    );
    assert_eq!(answer["by"]["name"], "none");
    assert!(answer["steps"].to_string().contains("expected one of PUT"), "{answer}");
    let asked = pair.near.admin_post_json("/explain", &question).await;
    assert_eq!((&asked["verdict"], &asked["backends"][0]["endpoints"]), (&json!("forwarded"), &json!(1)));
}

/// By its id a refused request is explained as it was decided, and as it would be now; one that could not be forwarded, too.
#[tokio::test]
async fn a_refused_request_is_explained_by_its_id() {
    let pair = pair(Some("http")).await;
    let rule = "{action: DENY, rules: [{when: [{key: 'request.headers[x-role]', values: [reader]}]}]}";
    pair.mesh.write("p.yaml", &policy("readers", rule));
    let mut client = Connection::open(pair.near.outbound()).await;
    let ask = |id: &str| {
        format!(
            "GET /v1/charges?token=secret HTTP/1.1\r\nHost: catalog\r\nX-Request-Id: {id}\r\nX-Role: reader\r\nCookie: \
             secret\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
        )
    };
    becomes(&mut client, &ask("first"), 403).await;
    assert_eq!(client.ask(ask("one")).await.status, 403);
    let was = pair.far.admin_get("/explain/one").await;
    assert_eq!(
        (&was["verdict"], &was["status"], &was["reason"], &was["by"]["name"], &was["by"]["rule"]),
        (&json!("refused"), &json!(403), &json!("policy_denied"), &json!("readers"), &json!(0))
    );
    assert_eq!((&was["request"]["target"], &was["now"]["otherwise"]), (&json!("/v1/charges"), &json!(false)));
    assert!(was["steps"].to_string().contains("AuthorizationPolicy/shop/readers rule 0"), "{was}");
    assert!(was.to_string().contains("reader") && !was.to_string().contains("secret"), "{was}");
    let by_trace = pair.far.admin_get("/explain/0af7651916cd43dd8448eb211c80319c").await;
    assert_eq!(by_trace["request"]["request_id"], "one");
    pair.mesh.write("p.yaml", &policy("readers", &rule.replace("[reader]", "[writer]")));
    becomes(&mut client, &ask("three"), 200).await;
    let was = pair.far.admin_get("/explain/one").await;
    assert_eq!((&was["verdict"], &was["now"]["verdict"]), (&json!("refused"), &json!("forwarded")));
    assert!(was["steps"].to_string().contains("\"refused\""), "the steps are those of that time: {was}");
    // What could not be forwarded.
    drop(pair.app);
    within(SOON, "the application is gone", async || {
        let answer = client.ask(ask("four")).await;
        (answer.status >= 500).then_some(())
    })
    .await;
    let failed = pair.far.admin_get("/explain/four").await;
    assert_eq!((&failed["verdict"], &failed["now"]), (&json!("failed"), &json!(null)), "{failed}");
    assert!(failed["steps"].to_string().contains("\"failed\""), "{failed}");
}

/// Labels of callers are those that all workloads of an account have, whoever comes later.
#[tokio::test]
async fn expressions_and_labels_of_callers() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let other = Application::start("cart").await;
    let near =
        mesh.sidecar("cart-1").label("tier", "web").inbound(other.address()).outbound("catalog:80").start().await;
    let rule = "{rules: [{when: [{key: 'source.labels[tier]', values: [web]}, {expression: \"request.path.startsWith('/v1/') && \
                source.labels.tier == 'web' && !('x-debug' in request.headers)\"}]}]}";
    mesh.write("p.yaml", &policy("web", rule));
    let mut client = Connection::open(near.outbound()).await;
    becomes(&mut client, ADMIN, 403).await;
    assert_eq!(client.ask(GET).await.status, 200);
    let debug = "GET /v1/charges HTTP/1.1\r\nHost: catalog\r\nX-Debug: 1\r\n\r\n";
    assert_eq!(client.ask(debug).await.status, 403);
    // Another workload of this account, without the label.
    let second = mesh.sidecar("cart-2").inbound(other.address()).start().await;
    becomes(&mut client, GET, 403).await;
    drop(second);
}

fn hello(name: &'static str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The server name of an application's own TLS decides before the application is opened, and again when policy moves.
#[tokio::test]
async fn the_server_name_of_an_applications_own_tls() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = outrigger_tests::application::Backend::start().await;
    mesh.service("catalog.shop", 443, backend.port(), Some("tls"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).start().await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let open = async |bytes: &[u8]| {
        let mut client = peer.connect(far.inbound(), &[TCP]).await.unwrap();
        client.try_send(bytes).await.ok()?;
        tokio::select! {
            mut accepted = backend.accept() => {
                accepted.take(bytes.len()).await;
                Some((client, accepted))
            }
            _ = client.take_to_end() => None,
        }
    };
    mesh.write("p.yaml", &policy("names", "{rules: [{when: [{key: connection.sni, values: ['*.db.test']}]}]}"));
    let (a, b) = (hello("a.db.test"), hello("b.test"));
    within(SOON, "another name is refused", async || open(&b).await.is_none().then_some(())).await;
    let (mut allowed, _accepted) = open(&a).await.expect("the name is allowed");
    assert!(open(b"no TLS at all").await.is_none(), "without a name");
    mesh.write("p.yaml", &policy("names", "{rules: [{when: [{key: connection.sni, notValues: ['*.db.test']}]}]}"));
    within(SOON, "the names are the others", async || open(&b).await.map(drop)).await;
    allowed.expect_end().await;
    assert!(open(&a).await.is_none());
}
