//! Promise: what a sidecar says of itself moves nobody else's traffic. An address is claimed by the workload that connects
//! from it or whose token grants it, port by port by the first; labels belong to the key that redeemed the token; an
//! instance has one sidecar, and one join token stands for few instances.

use std::time::Duration;

use outrigger_api::name::{Protocol, ServicePort};
use outrigger_api::snapshot::Key;
use outrigger_tests::claim::{Lease, Watch, registration};
use outrigger_tests::peer::Peer;
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, wire};

const HOUR: Duration = Duration::from_secs(3600);

/// Static Workloads and a Service with a clusterIP.
const DOCUMENTS: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: legacy-1, namespace: shop}
spec: {address: 10.9.0.1, labels: {app: legacy}, ports: {main: 80}}
---
apiVersion: v1
kind: Service
metadata: {name: bank, namespace: shop}
spec:
  clusterIP: 10.96.0.7
  selector: {app: bank}
  ports: [{port: 80}]
";

async fn mesh() -> Mesh {
    let mesh = Mesh::start(MeshOptions {
        yaml: format!("{}---\n{DOCUMENTS}", outrigger_tests::mesh::PERMISSIVE),
        ..MeshOptions::default()
    });
    mesh.await
}

/// A workload `mallory` in a namespace of its own, with these addresses in its token.
async fn mallory(mesh: &Mesh, addresses: &[&str]) -> Lease {
    let token = mesh.token_for("aaa", "mallory", &[], addresses, 1, HOUR);
    let peer = Peer::issue_by(mesh, &token, "mallory").await;
    Lease::open(mesh.control_plane(), &peer).await.unwrap()
}

#[tokio::test]
async fn an_address_is_the_streams_own_or_the_tokens() {
    let mesh = mesh().await;
    let granted = ["10.20.0.0/16", "fd20::1", "10.96.0.0/12", "240.240.0.0/16", "169.254.0.0/16", "10.9.0.1"];
    // Address, whether the token is asked, and a part of the refusal.
    let cases = [
        ("127.0.0.1", &[][..], None),
        ("127.8.7.6", &[], None),
        ("::1", &[], None),
        ("10.20.0.5", &[], Some("--address 10.20.0.5")),
        ("10.20.0.5", &granted, None),
        ("10.21.0.5", &granted, Some("was not granted")),
        ("fd20::1", &granted, None),
        ("fd20::2", &granted, Some("was not granted")),
        ("8.8.8.8", &[], Some("was not granted")),
        // Not even when somebody granted them.
        ("10.96.0.7", &granted, Some("the address of a Service")),
        ("240.240.0.1", &granted, Some("the address of a Service")),
        ("fd3a:94e7:c15b::1", &["fd3a::/16"], Some("the address of a Service")),
        ("169.254.169.254", &granted, Some("no address at which peers can reach")),
        ("fe80::1", &["fe80::/10"], Some("no address at which peers can reach")),
        ("0.0.0.0", &["0.0.0.0/0"], Some("no address at which peers can reach")),
        ("224.0.0.1", &["0.0.0.0/0"], Some("no address at which peers can reach")),
        ("10.9.0.1", &granted, Some("the address of a Workload document")),
    ];
    for (ip, addresses, refusal) in cases {
        for transparent in [false, true] {
            let mut lease = mallory(&mesh, addresses).await;
            let mut claim = registration("mallory", ip, &[(7001, 7002)]);
            claim.transparent = transparent;
            let said = lease.register(claim.clone()).await;
            match refusal {
                None => assert_eq!(said, "", "{ip} {addresses:?}"),
                Some(text) => assert!(said.contains(text), "{ip} {addresses:?}: {said:?}"),
            }
            // The same as a second address.
            claim.other_ips = vec![std::mem::replace(&mut claim.ip, "127.0.0.1".to_owned())];
            let said = lease.register(claim).await;
            assert_eq!(said.is_empty(), refusal.is_none(), "{ip} second: {said:?}");
            lease.withdraw().await;
        }
    }
}

#[tokio::test]
async fn ports_belong_to_the_first_who_claims_them_and_calls_go_on_reaching_it() {
    let mesh = mesh().await;
    let app = Application::start("shop").await;
    mesh.service("shop.shop", 80, app.port(), Some("http"));
    let shop = mesh.sidecar("shop-1").label("app", "shop").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("shop:80").http_proxy().start().await;
    let (ip, mesh_port) = (app.address().ip().to_string(), shop.inbound().port());
    let mut lease = mallory(&mesh, &[]).await;
    let claims = [
        ("its application's port", registration("m", &ip, &[(app.port(), 7002)])),
        ("its mesh port", registration("m", &ip, &[(7001, mesh_port)])),
        ("its application's port for a mesh port", registration("m", &ip, &[(7001, app.port())])),
        ("its mesh port for an application's", registration("m", &ip, &[(mesh_port, 7002)])),
        ("everything", {
            let mut all = registration("m", &ip, &[]);
            all.transparent = true;
            all
        }),
    ];
    for (name, claim) in claims {
        let said = lease.register(claim).await;
        assert!(said.contains("another workload's"), "{name}: {said:?}");
        assert!(!said.contains("shop"), "{name} tells who has it: {said}");
    }
    assert_eq!(lease.register(registration("m", &ip, &[(7001, 7002)])).await, "", "what nobody has");
    assert_eq!(wire::get(near.outbound(), "/").await.header("x-app"), Some("shop"));
    let request = format!("GET http://{}/ HTTP/1.1\r\nHost: {}\r\n\r\n", app.address(), app.address());
    let answer = wire::ask(near.http_proxy(), request).await;
    assert_eq!((answer.status, answer.header("x-app")), (200, Some("shop")), "{}", answer.text());
    // Neither while it drains nor right after it has gone.
    shop.drain().await;
    let said = lease.register(registration("m", &ip, &[(app.port(), 7002)])).await;
    assert!(said.contains("until a moment ago"), "{said:?}");
    assert_eq!(lease.register(registration("m", &ip, &[(7001, 7002)])).await, "");
    // Its own identity comes back at once.
    let again = mesh.sidecar("shop-1").label("app", "shop").inbound(app.address()).start().await;
    eventually("calls reach it", async || (wire::get(near.outbound(), "/").await.status == 200).then_some(())).await;
    drop(again);
}

#[tokio::test]
async fn labels_belong_to_the_key_that_redeemed_and_follow_its_renewals() {
    let mesh = mesh().await;
    let app = Application::start("shop").await;
    mesh.service("shop.shop", 80, app.port(), Some("http"));
    // Early, under the name that another workload will have, and with the same service account.
    let early = Peer::issue_by(&mesh, &mesh.token("shop", "shop", &[]), "shop").await;
    let shop = mesh.sidecar("shop-1").label("app", "shop").inbound(app.address()).start().await;
    let mut claim = registration("other", "127.0.0.1", &[(app.port(), 7002)]);
    claim.labels.insert("app".to_owned(), "shop".to_owned());
    let mut lease = Lease::open(mesh.control_plane(), &early).await.unwrap();
    assert!(lease.register(claim.clone()).await.contains("app=shop was not granted"));
    // Nor by a renewal.
    let mut renewed = Peer::without_certificate();
    let issued = early.ask_for_certificate(&mesh, &renewed.csr(), "", "shop").await.unwrap();
    renewed.chain = issued.chain_der.into_iter().map(Into::into).collect();
    let mut lease = Lease::open(mesh.control_plane(), &renewed).await.unwrap();
    assert!(lease.register(claim).await.contains("app=shop was not granted"));
    // And the honest one keeps them over its renewals, also those that come later than another's redemption.
    let _later = Peer::issue_by(&mesh, &mesh.token("shop", "shop", &[]), "shop").await;
    let serial = shop.admin_get("/certs").await["certificate"]["serial"].clone();
    assert_eq!(shop.admin_post("/certs/renew", "").await.status, 202);
    eventually("a new certificate", async || {
        (shop.admin_get("/certs").await["certificate"]["serial"] != serial).then_some(())
    })
    .await;
    mesh.stop_control_plane().await;
    mesh.start_control_plane().await;
    let near = mesh.sidecar("cart-1").outbound("shop:80").start().await;
    eventually("it is registered with its label", async || {
        (wire::get(near.outbound(), "/").await.status == 200).then_some(())
    })
    .await;
    assert_eq!(shop.health("/ready").await.0, 200);
}

#[tokio::test]
async fn a_workload_document_is_hidden_by_nobody() {
    let mesh = mesh().await;
    let app = Application::start("legacy").await;
    mesh.service("legacy.shop", 80, app.port(), Some("http"));
    let document = format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: legacy-2, namespace: shop}}\nspec: \
         {{address: {}, labels: {{app: legacy}}, ports: {{main: {}}}}}\n",
        app.address().ip(),
        app.port()
    );
    mesh.write("legacy.yaml", &document);
    // A Workload document that says nothing has the service account `default`.
    let peer = Peer::issue(&mesh, "shop", "default", "legacy-2").await;
    let mut lease = Lease::open(mesh.control_plane(), &peer).await.unwrap();
    mesh.settled().await;
    let near = mesh.sidecar("cart-1").outbound("legacy:80").start().await;
    for (claim, text) in [
        (registration("legacy-2", "127.0.0.9", &[(7001, 7002)]), "give this one another --name"),
        (registration("other", &app.address().ip().to_string(), &[(app.port(), 7002)]), "of a Workload document"),
    ] {
        let said = lease.register(claim).await;
        assert!(said.contains(text), "{said:?}");
    }
    let served = eventually("the Workload serves", async || {
        let answer = wire::get(near.outbound(), "/").await;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert_eq!(served.header("x-app"), Some("legacy"));
}

#[tokio::test]
async fn a_sidecar_that_disagrees_with_its_service_is_a_warning_and_calls_go_by_the_service() {
    let mesh = mesh().await;
    let [one, two] = Application::replicas::<2>("shop").await;
    mesh.service_with("shop.shop", 80, one.port(), Some("http"), "outrigger.dev/load-balancer: RoundRobin");
    let _honest = mesh.sidecar("shop-1").label("app", "shop").inbound(one.address()).start().await;
    let builder = mesh.sidecar("aaa-1").label("app", "shop").inbound(two.address());
    let _other = builder.port(two.port(), Some(Protocol::Tcp)).start().await;
    let near = mesh.sidecar("cart-1").outbound("shop:80").start().await;
    for _ in 0..6 {
        let answer = wire::get(near.outbound(), "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let status = mesh.control_plane_get("/status").await;
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("aaa-1") && warnings.contains("says tcp and the Service says http"), "{warnings}");
}

#[tokio::test]
async fn a_second_sidecar_of_one_name_is_refused_while_the_first_lives() {
    let mesh = mesh().await;
    let [one, two] = Application::replicas::<2>("shop").await;
    mesh.service("shop.shop", 80, one.port(), Some("http"));
    let first = mesh.sidecar("shop-1").label("app", "shop").inbound(one.address()).start().await;
    let builder = mesh.sidecar("shop-1").label("app", "shop").inbound(two.address());
    let second = builder.config(|config| config.state = Some(mesh.path("state-second"))).start_unready();
    let body = eventually("the second one says it", async || {
        let (status, body) = second.health("/ready").await;
        (status == 503 && body["reason"] == "instance_exists").then_some(body)
    })
    .await;
    assert!(body["hint"].as_str().unwrap().contains("--name"), "{body}");
    let status = mesh.control_plane_get("/status").await;
    assert!(status["refused_registrations"].to_string().contains("instance_exists"), "{status}");
    // The first one lost nothing: neither now nor with its next certificate.
    let near = mesh.sidecar("cart-1").outbound("shop:80").start().await;
    for _ in 0..5 {
        assert_eq!(wire::get(near.outbound(), "/").await.header("x-app"), Some("shop-1"));
    }
    assert_eq!(first.admin_post("/certs/renew", "").await.status, 202);
    assert_eq!(first.health("/ready").await.0, 200);
    assert_eq!(status["leases"], 1);
    // And when it is gone the other one takes its place.
    first.drain().await;
    second.ready().await;
    eventually("the survivor serves", async || {
        (wire::get(near.outbound(), "/").await.header("x-app") == Some("shop-2")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_token_stands_for_few_instances_and_streams() {
    let mesh = mesh().await;
    let peer = Peer::issue_by(&mesh, &mesh.token("aaa", "mallory", &[]), "mallory").await;
    let (mut leases, mut taken) = (Vec::new(), 0);
    for number in 0..40_u16 {
        let Ok(mut lease) = Lease::open(mesh.control_plane(), &peer).await else { continue };
        let claim = registration(&format!("m-{number}"), "127.0.0.1", &[(20_000 + number, 30_000 + number)]);
        let said = lease.register(claim).await;
        assert!(said.is_empty() || said.contains("--uses N"), "{said}");
        taken += usize::from(said.is_empty());
        leases.push(lease);
    }
    // Of streams, too, there are few: who opens more loses its own older ones.
    let mut alive = 0;
    for lease in &mut leases {
        alive += usize::from(lease.is_alive().await);
    }
    assert!(taken <= 4 && (1..=16).contains(&alive), "{taken} instances, {alive} streams of {}", leases.len());
    drop(leases);
    // Watch streams of one instance: the newest is the one that counts.
    let open = async || Watch::open(mesh.control_plane(), &peer, "m-0").await;
    let mut last = eventually("the places of the streams are free again", async || open().await.ok()).await;
    for _ in 0..5 {
        last = open().await.unwrap();
        assert!(last.subscribe(&Key::Own).await);
        last.next().await.unwrap().expect("an answer");
    }
    let status = mesh.control_plane_get("/status").await;
    assert_eq!(status["sidecars"].as_array().unwrap().len(), 1, "{status}");
    // And what they subscribe to is bounded for all of them together.
    let mut refused = false;
    for number in 0..20_000 {
        let key = Key::Service(ServicePort::parse(&format!("s{number}.shop:80"), "shop").unwrap());
        if !last.subscribe(&key).await {
            refused = true;
            break;
        }
        if number > 100
            && let Err(status) = last.next().await
        {
            assert!(status.message().contains("subscriptions"), "{status}");
            refused = true;
            break;
        }
    }
    assert!(refused);
}
