//! Promise: RateLimitPolicies bound what a workload takes: over all workers of its sidecar together, of all callers or of each,
//! and what is too much gets 429 with the time to come again. In Shadow mode it is counted and nothing refused.

use std::time::Duration;

use outrigger_tests::eventually::within;
use outrigger_tests::peer::H1;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Peer, Sidecar, eventually};
use serde_json::json;

/// The promise is a second; the machine that runs the tests may be busy with others.
const SOON: Duration = Duration::from_secs(20);

async fn server() -> (Mesh, Application, Sidecar) {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).workers(2).start().await;
    (mesh, app, far)
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: RateLimitPolicy\nmetadata: {{name: rates, namespace: shop}}\nspec: {spec}\n"
    )
}

fn get(path: &str, fields: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n")
}

/// Until the policy is in force: a limit of its own that takes one request a day says so.
async fn in_force(mesh: &Mesh, client: &mut Connection, spec: &str) {
    let marker = "{name: marker, requests: 1, per: 24h, match: [{path: {value: /marker}}]}";
    mesh.write("r.yaml", &policy(&spec.replace("limits: [", &format!("limits: [{marker}, "))));
    within(SOON, "429", async || (client.ask(get("/marker", "")).await.status == 429).then_some(())).await;
}

async fn statuses<const N: usize>(client: &mut Connection, request: &str) -> [u16; N] {
    let mut statuses = [0; N];
    for status in &mut statuses {
        *status = client.ask(request).await.status;
    }
    statuses
}

#[tokio::test]
async fn all_workers_count_together_and_what_is_too_much_is_told_when_to_come_again() {
    let (mesh, app, far) = server().await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let mut client = peer.connect(far.inbound(), &[H1]).await.unwrap();
    in_force(&mesh, &mut client, "{limits: [{name: all, requests: 4, per: 24h, match: [{path: {value: /v1}}]}]}").await;
    let before = app.count();
    let mut allowed = 0;
    // A new connection goes to the worker with fewer of them.
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(peer.connect(far.inbound(), &[H1]).await.unwrap());
    }
    for other in &mut others {
        for _ in 0..2 {
            allowed += u16::from(other.ask(get("/v1/charges", "")).await.status == 200);
        }
    }
    assert_eq!((allowed, app.count() - before), (4, 4));
    let refused = client.ask(get("/v1/charges", "")).await;
    assert_eq!((refused.status, refused.reason().as_str()), (429, "rate_limited"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=24 * 3600 / 4).contains(&wait), "{wait}");
    assert_eq!(refused.header("ratelimit"), Some(format!("\"all\";r=0;t={wait}").as_str()));
    assert_eq!(refused.header("ratelimit-policy"), Some("\"all\";q=4;w=86400"));
    assert!(refused.header("proxy-status").unwrap().contains("details=\"RateLimitPolicy/shop/rates rule 1\""));
    // Other paths are not counted, and a path that can be read in two ways goes nowhere.
    assert_eq!(client.ask(get("/v2", "")).await.status, 200);
    assert_eq!(client.ask(get("/x/..;/v1", "")).await.status, 400);
    let labels = [("direction", "inbound"), ("reason", "rate_limited"), ("code", "429")];
    eventually("the refusals are counted", async || {
        (far.metrics().await.sum("outrigger_http_requests_total", &labels) >= 5.0).then_some(())
    })
    .await;
    mesh.remove("r.yaml");
    within(SOON, "no limit", async || (client.ask(get("/v1", "")).await.status == 200).then_some(())).await;
}

#[tokio::test]
async fn callers_headers_and_claims_have_buckets_of_their_own() {
    let (mesh, _app, far) = server().await;
    let [cart, web] = [("cart", "cart-9"), ("web", "web-9")];
    let cart = Peer::issue(&mesh, "shop", cart.0, cart.1).await;
    let web = Peer::issue(&mesh, "shop", web.0, web.1).await;
    let mut by_cart = cart.connect(far.inbound(), &[H1]).await.unwrap();
    let mut by_web = web.connect(far.inbound(), &[H1]).await.unwrap();
    in_force(
        &mesh,
        &mut by_cart,
        "{limits: [{name: caller, by: Identity, requests: 1, per: 24h, match: [{path: {value: /id}}]}, {name: tenant, by: \
         Header, header: X-Tenant, requests: 1, per: 24h, match: [{path: {value: /tenant}, method: GET}]}], overrides: \
         [{identity: shop/web, requests: 2, per: 24h}]}",
    )
    .await;
    assert_eq!(statuses(&mut by_cart, &get("/id", "")).await, [200, 429]);
    assert_eq!(statuses(&mut by_web, &get("/id", "")).await, [200, 200, 429]);
    assert_eq!(statuses(&mut by_cart, &get("/tenant", "x-tenant: a\r\n")).await, [200, 429]);
    assert_eq!(statuses(&mut by_web, &get("/tenant", "x-tenant: a\r\n")).await, [429]);
    assert_eq!(statuses(&mut by_cart, &get("/tenant", "x-tenant: b\r\n")).await, [200, 429]);
    assert_eq!(statuses(&mut by_cart, &get("/tenant", "")).await, [200, 429], "without the header: one bucket");
    let question = json!({
        "from": "spiffe://outrigger.local/ns/shop/sa/web", "fromIp": null, "to": "catalog.shop", "port": 80,
        "request": {"method": "GET", "target": "/id", "headers": []}, "at": 0,
    });
    let answer = far.admin_post_json("/explain", &question).await;
    assert_eq!(answer["verdict"], "forwarded");
    assert!(answer["steps"].to_string().contains("caller: 2 per 86400s, burst 2, by the caller spiffe"), "{answer}");
}

#[tokio::test]
async fn a_shadow_counts_and_refuses_nothing() {
    let (mesh, _app, far) = server().await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let mut client = peer.connect(far.inbound(), &[H1]).await.unwrap();
    mesh.write("r.yaml", &policy("{mode: Shadow, limits: [{requests: 1, per: 24h}]}"));
    let labels = [("policy", "RateLimitPolicy/shop/rates"), ("would", "limited")];
    within(SOON, "what would have been is counted", async || {
        assert_eq!(client.ask(get("/", "")).await.status, 200);
        (far.metrics().await.sum("outrigger_policy_shadow_total", &labels) > 1.0).then_some(())
    })
    .await;
}
