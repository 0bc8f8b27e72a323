//! Promise: an application's own connections go through two sidecars with mutual TLS when nothing of it is changed: by
//! clusterIP, by the address of a workload, to a headless service, over IPv4 and IPv6. Services that share a port number
//! have nothing to do with each other, and a workload may call itself.

use std::net::{IpAddr, SocketAddr};

use outrigger_tests::application::Backend;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::{Families, only_root};
use outrigger_tests::transparent::{TransparentMesh, TransparentSidecar, get};
use outrigger_tests::under_test;

const V4: &str = "10.96.0.10";
const V6: &str = "fd96::10";
const WEB: &str = "spiffe://outrigger.local/ns/shop/sa/web";
const CATALOG: &str = "spiffe://outrigger.local/ns/shop/sa/catalog";

/// Requests that both sidecars counted, with mutual TLS between them.
async fn both_count(web: &TransparentSidecar<'_>, catalog: &TransparentSidecar<'_>, count: u32) {
    let labels = [
        ("source_workload", "web"),
        ("destination_service", "catalog.shop"),
        ("destination_workload", "catalog"),
        ("code", "200"),
        ("mtls", "true"),
    ];
    for (sidecar, direction) in [(web, "outbound"), (catalog, "inbound")] {
        let labels = [&labels[..], &[("direction", direction)]].concat();
        sidecar.counts("outrigger_http_requests_total", &labels, count.into()).await;
    }
}

async fn through_two_sidecars(families: Families, cluster_ip: &str) {
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &["web", "catalog"], STRICT).await else { return };
    mesh.service("catalog", Some(cluster_ip), 80, 8080, "").await;
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let application = catalog.application("catalog", 8080);
    let web = mesh.sidecar("web", "web", &[]).await;

    let cluster: IpAddr = cluster_ip.parse().unwrap();
    for (count, (ip, port)) in (1..).zip([(cluster, 80), (mesh.address("catalog"), 8080)]) {
        let address = SocketAddr::new(ip, port).to_string();
        let answer = get(mesh.at("web"), &address, "/hello").await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{address}: {}", answer.text());
        assert_eq!(application.last().header("x-outrigger-identity"), Some(WEB), "{address}");
        both_count(&web, &catalog, count).await;
    }
}

#[tokio::test]
async fn over_ipv4() {
    through_two_sidecars(Families::V4, V4).await;
}

#[tokio::test]
async fn over_ipv6_alone() {
    through_two_sidecars(Families::V6, V6).await;
}

#[tokio::test]
async fn services_on_one_port_are_apart_and_an_endpoint_that_is_dialled_is_the_one_that_answers() {
    let names = ["web", "catalog", "cart-one", "cart-two"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, STRICT).await else { return };
    mesh.service("catalog", Some("10.96.0.10"), 80, 8080, "").await;
    // Headless: its name resolves to the addresses of its endpoints.
    mesh.service("cart", None, 80, 80, "").await;
    mesh.service("basket", Some("10.96.0.11"), 80, 80, "").await;
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: basket, namespace: shop}\nspec:\n  clusterIP: \
                10.96.0.11\n  selector: {app: cart}\n  ports: [{name: main, port: 80}]\n";
    mesh.write("service-basket.yaml", text).await;
    let mut sidecars = Vec::new();
    let mut applications = Vec::new();
    for (machine, app, port) in [("catalog", "catalog", 8080), ("cart-one", "cart", 80), ("cart-two", "cart", 80)] {
        let sidecar = mesh.sidecar(machine, app, &[]).await;
        applications.push(sidecar.application(machine, port));
        sidecars.push(sidecar);
    }
    let web = mesh.sidecar("web", "web", &[]).await;

    for _ in 0..5 {
        let answer = get(mesh.at("web"), "10.96.0.10:80", "/hello").await;
        assert_eq!(answer.header("x-app"), Some("catalog"), "{}", answer.text());
        for machine in ["cart-one", "cart-two"] {
            let address = SocketAddr::new(mesh.address(machine), 80).to_string();
            let answer = get(mesh.at("web"), &address, "/hello").await;
            assert_eq!(answer.header("x-app"), Some(machine), "{}", answer.text());
        }
    }
    let own =
        |service| [("destination_service", service), ("direction", "outbound"), ("code", "200"), ("mtls", "true")];
    web.counts("outrigger_http_requests_total", &own("catalog.shop"), 5.0).await;
    // An address that two services share counts as the first of them by name.
    web.counts("outrigger_http_requests_total", &own("basket.shop"), 10.0).await;
    // Through the clusterIP both endpoints get their share.
    let mut heard = std::collections::BTreeSet::new();
    while heard.len() < 2 {
        let answer = get(mesh.at("web"), "10.96.0.11:80", "/hello").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        heard.insert(answer.header("x-app").unwrap().to_owned());
    }
}

#[tokio::test]
async fn a_workload_calls_its_own_service() {
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["catalog"], STRICT).await else { return };
    mesh.service("catalog", Some(V4), 80, 8080, "").await;
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let application = catalog.application("catalog", 8080);
    catalog.redirect_by_hand();
    let own_address = SocketAddr::new(mesh.address("catalog"), 8080).to_string();
    for (count, address) in (1..).zip([format!("{V4}:80"), own_address]) {
        let mut connection = mesh.at("catalog").connect(address.parse().unwrap()).await;
        let forged = "GET /hello HTTP/1.1\r\nHost: catalog\r\nX-Outrigger-Identity: spiffe://outrigger.local/ns/shop/sa/web\r\n\r\n";
        let answer = connection.ask(forged).await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{address}: {}", answer.text());
        assert_eq!(application.last().all("x-outrigger-identity"), [CATALOG], "{address}");
        // One of each: it went out and in, and neither over a wire.
        for direction in ["outbound", "inbound"] {
            let labels = [
                ("direction", direction),
                ("source_principal", CATALOG),
                ("destination_service", "catalog.shop"),
                ("destination_workload", "catalog"),
                ("code", "200"),
                ("mtls", "false"),
            ];
            catalog.counts("outrigger_http_requests_total", &labels, count.into()).await;
        }
    }
    assert_eq!(catalog.admin("/plaintext-callers").await["callers"], serde_json::json!([]));
    // Bytes that are not parsed are their own connection, with half-close, like any other; the port is in no Service.
    let address = SocketAddr::new(mesh.address("catalog"), 8081);
    let server = Backend::from(mesh.at("catalog").listen(address));
    let mut client = mesh.at("catalog").connect(address).await;
    client.send("no http at all\n").await;
    client.finish().await;
    let mut accepted = server.accept().await;
    let (heard, _) = accepted.take_to_end().await;
    assert_eq!(heard, b"no http at all\n");
    accepted.send("and an answer").await;
    accepted.finish().await;
    assert_eq!(client.take_to_end().await.0, b"and an answer");
}

#[tokio::test]
async fn a_sidecar_without_any_privilege_is_exempt_by_its_user() {
    if only_root() {
        return eprintln!("a_sidecar_without_any_privilege DID NOT RUN: there is no other user than root here");
    }
    let names = ["web", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, STRICT).await else { return };
    mesh.service("catalog", Some(V4), 80, 8080, "").await;
    let mut sidecars = Vec::new();
    for name in names {
        let mut sidecar = mesh.start_sidecar_as(1337, mesh.at(name), name);
        let (code, said) = sidecar.redirect_command(&["apply"]);
        assert_eq!(code, 0, "{said}");
        sidecar.process.ready().await;
        sidecar.is_ready().await;
        let (code, said) = sidecar.redirect_command(&["check"]);
        assert_eq!(code, 0, "{said}");
        sidecars.push(sidecar);
    }
    let _application = sidecars[1].application("catalog", 8080);
    let answer = get(mesh.at("web"), &format!("{V4}:80"), "/hello").await;
    assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{}", answer.text());
    both_count(&sidecars[0], &sidecars[1], 1).await;
}

#[tokio::test]
async fn explicit_listeners_work_beside() {
    let names = ["web", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, STRICT).await else { return };
    mesh.service("catalog", Some(V4), 80, 8080, "").await;
    // An application on loopback that an explicit listener leads to, whose port the rules redirect like any other.
    let explicit = ["--inbound", "0.0.0.0:9443=127.0.0.1:8080"];
    let catalog = mesh.sidecar("catalog", "catalog", &explicit).await;
    let listener = mesh.at("catalog").listen("127.0.0.1:8080".parse().unwrap());
    let _application = outrigger_tests::Application::serve("catalog", listener);
    let web = mesh.sidecar("web", "web", &["--outbound", "127.0.0.1:7080=catalog:80"]).await;
    let by_mesh_port = SocketAddr::new(mesh.address("catalog"), 9443).to_string();
    for (count, address) in (1..).zip([format!("{V4}:80"), "127.0.0.1:7080".to_owned(), by_mesh_port]) {
        let answer = get(mesh.at("web"), &address, "/hello").await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{address}: {}", answer.text());
        both_count(&web, &catalog, count).await;
    }
}
