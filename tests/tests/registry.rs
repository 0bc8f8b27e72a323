//! Promise: who is an endpoint is what the mesh knows to be true: those whose labels were granted, whose account may
//! serve, who hold a lease; and a workload's own service is itself.

use std::time::Duration;

use outrigger_tests::eventually::within;
use outrigger_tests::peer::{H1, Peer};
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, wire};

#[tokio::test]
async fn labels_that_the_token_does_not_grant_are_refused_and_told() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let token = mesh.token("shop", "thief", &[]);
    let builder = mesh.sidecar("thief-1").label("app", "catalog").inbound(app.address()).token(&token);
    let thief = builder.start_unready();
    let body = eventually("/ready tells", async || {
        let (status, body) = thief.health("/ready").await;
        (status == 503 && body["reason"] == "lease_refused").then_some(body)
    })
    .await;
    assert!(body["hint"].as_str().unwrap().contains("app=catalog"), "{body}");
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    assert_eq!(wire::get(near.outbound(), "/").await.reason(), "destination_unavailable");
}

#[tokio::test]
async fn a_service_may_say_which_accounts_serve_it() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let [good, other] = Application::replicas::<2>("bank").await;
    let annotation = "outrigger.dev/service-accounts: \"bank,vault\"";
    mesh.service_with("bank.shop", 80, good.port(), Some("http"), annotation);
    let _good = mesh.sidecar("bank-1").label("app", "bank").inbound(good.address()).start().await;
    let _other = mesh.sidecar("other-1").label("app", "bank").inbound(other.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("bank:80").start().await;
    for _ in 0..10 {
        assert_eq!(wire::get(near.outbound(), "/").await.header("x-app"), Some("bank-1"));
    }
    assert_eq!(other.count(), 0);
}

#[tokio::test]
async fn services_of_one_name_in_two_namespaces_are_two_services() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let (shop, test) = (Application::start("shop").await, Application::start("test").await);
    mesh.service("catalog.shop", 80, shop.port(), Some("http"));
    mesh.service("catalog.test", 80, test.port(), Some("http"));
    let _one = mesh.sidecar("catalog-1").label("app", "catalog").inbound(shop.address()).start().await;
    let builder = mesh.sidecar("catalog-2").namespace("test").label("app", "catalog");
    let _two = builder.inbound(test.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").outbound("catalog.test:80").start().await;
    assert_eq!(wire::get(near.address("outbound:catalog.shop:80"), "/").await.header("x-app"), Some("shop"));
    assert_eq!(wire::get(near.address("outbound:catalog.test:80"), "/").await.header("x-app"), Some("test"));
}

#[tokio::test]
async fn a_workload_reaches_its_own_service() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).outbound("catalog:80");
    let own = builder.start().await;
    let answer = wire::get(own.outbound(), "/").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(app.last().all("x-outrigger-identity"), ["spiffe://outrigger.local/ns/shop/sa/catalog"]);
}

#[tokio::test]
async fn a_sidecar_that_is_gone_without_a_word_loses_its_endpoints() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let [one, two] = Application::replicas::<2>("catalog").await;
    mesh.service_with("catalog.shop", 80, one.port(), Some("http"), "outrigger.dev/load-balancer: RoundRobin");
    let _one = mesh.sidecar("catalog-1").label("app", "catalog").inbound(one.address()).start().await;
    let builder = mesh.sidecar("catalog-2").label("app", "catalog").inbound(two.address());
    let mut lost = builder.spawn(outrigger_tests::under_test!()).await;
    lost.ready().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    eventually("both serve", async || {
        assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
        (one.count() > 0 && two.count() > 0).then_some(())
    })
    .await;
    lost.signal("KILL");
    lost.wait(Duration::from_secs(5)).await;
    // From the first moment on another endpoint answers; after 15 s the lost one is no longer known.
    for _ in 0..20 {
        assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
    }
    within(Duration::from_secs(20), "the lease ends", async || {
        (mesh.control_plane_get("/status").await["leases"] == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_second_root_in_the_bundle_reaches_sidecars_that_run() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let other = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
    let stranger = Peer::issue(&other, "shop", "cart", "cart-9").await;
    let served = async || {
        let Ok(mut connection) = stranger.connect(far.inbound(), &[H1]).await else { return false };
        connection.try_send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.is_ok()
            && connection.try_response(false).await.is_ok_and(|answer| answer.status == 200)
    };
    assert!(!served().await, "another mesh's certificate");
    // What the operator believes besides the own root, as in a move from one authority to the next.
    let trust = mesh.path("control-plane/ca/trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::copy(other.trust_bundle(), trust.join("other.pem")).unwrap();
    mesh.stop_control_plane().await;
    mesh.start_control_plane().await;
    within(Duration::from_secs(10), "both roots are believed", async || served().await.then_some(())).await;
    assert_eq!(far.admin_get("/certs").await["trust_bundle"]["roots"].as_array().unwrap().len(), 2);
    assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
}

/// A wrong port and missing endpoints say what is wrong, to the application beside the sidecar.
#[tokio::test]
async fn what_cannot_be_reached_says_why() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("stock").await;
    let service = |name: &str, ports: &str, selector: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{ports: [{ports}]{selector}}}\n"
        );
        mesh.write(&format!("{name}.yaml"), &text);
    };
    let target = app.port();
    let selected = ", selector: {app: stock}";
    service("stock", &format!("{{port: 80, targetPort: {target}, appProtocol: http}}"), selected);
    service("wrong", "{port: 80, targetPort: 1}", selected);
    service("nobody", "{port: 80}", ", selector: {app: nobody}");
    service("bare", "{port: 80}", "");
    let _stock = mesh.sidecar("stock-1").label("app", "stock").inbound(app.address()).start().await;
    let cases = [
        ("stock:81", 502, "not_registered", "stock.shop has no port 81; it has 80 (http)"),
        ("wrong:80", 503, "destination_unavailable", "none serves the targetPort 1"),
        ("nobody:80", 503, "destination_unavailable", "no workload of namespace shop has the labels app=nobody"),
        ("bare:80", 503, "destination_unavailable", "the Service has no selector"),
        ("stok:80", 502, "not_registered", "no Service stok.shop:80 exists"),
    ];
    let mut near = mesh.sidecar("cart-1").http_proxy();
    for (destination, ..) in cases {
        near = near.outbound(destination);
    }
    let near = near.start().await;
    for (destination, status, reason, detail) in cases {
        let (name, port) = destination.split_once(':').unwrap();
        let address = near.address(&format!("outbound:{name}.shop:{port}"));
        within(Duration::from_secs(30), destination, async || {
            let answer = wire::get(address, "/").await;
            let body: serde_json::Value = serde_json::from_slice(&answer.body).ok()?;
            let told = body["detail"].as_str()?.contains(detail);
            (answer.status == status && answer.reason() == reason && told).then_some(())
        })
        .await;
    }
    // A name that the mesh knows is no name of the outside.
    let answer = wire::ask(near.http_proxy(), "GET http://stock.shop:81/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.text().contains("stock.shop has no port 81"), "{}", answer.text());
    // The operator sees the same, of ports that are asked for and of those that are only declared.
    let idle = "apiVersion: v1\nkind: Service\nmetadata: {name: idle, namespace: shop}\nspec: {ports: [{port: 81}]}\n";
    mesh.write("idle.yaml", idle);
    within(Duration::from_secs(30), "status lists what is empty", async || {
        let told = mesh.control_plane_get("/status").await["warnings"].to_string();
        let lines = [
            "wrong.shop, port 80: no endpoints: of the workloads with the labels app=stock (1) none serves the targetPort 1",
            "nobody.shop, port 80: no endpoints: no workload of namespace shop has the labels app=nobody of its selector",
            "bare.shop, port 80: no endpoints: the Service has no selector",
            "idle.shop, port 81: no endpoints: the Service has no selector",
            "a sidecar asks for what is not there: stock.shop has no port 81; it has 80 (http)",
        ];
        assert!(!told.contains("stock.shop, port 80"), "{told}");
        lines.iter().all(|line| told.contains(line)).then_some(())
    })
    .await;
}
