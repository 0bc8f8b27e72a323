//! Promise: an application's own connections go through two sidecars with mutual TLS when nothing of it is changed: by
//! clusterIP, by the address of a workload, to a headless service, over IPv4 and IPv6.

use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::Families;
use outrigger_tests::transparent::{TransparentMesh, get};
use outrigger_tests::under_test;

const V4: &str = "10.96.0.10";
const V6: &str = "fd96::10";

async fn through_two_sidecars(families: Families, cluster_ip: &str) {
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &["web", "catalog"], STRICT).await else { return };
    mesh.service("catalog", Some(cluster_ip), 80, 8080, "").await;
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let application = catalog.application("catalog", 8080);
    let web = mesh.sidecar("web", "web", &[]).await;

    let cluster: std::net::IpAddr = cluster_ip.parse().unwrap();
    let dialled = [(cluster, 80), (mesh.address("catalog"), 8080)];
    for (count, (ip, port)) in (1..).zip(dialled) {
        let address = std::net::SocketAddr::new(ip, port).to_string();
        let answer = get(mesh.at("web"), &address, "/hello").await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{address}: {}", answer.text());
        let seen = application.last();
        let identity = "spiffe://outrigger.local/ns/shop/sa/web";
        assert_eq!(seen.header("x-outrigger-identity"), Some(identity), "{address}");
        let labels = [
            ("source_workload", "web"),
            ("destination_service", "catalog.shop"),
            ("destination_workload", "catalog"),
            ("code", "200"),
            ("mtls", "true"),
        ];
        web.counts(
            "outrigger_http_requests_total",
            &[&labels[..], &[("direction", "outbound")]].concat(),
            count.into(),
        )
        .await;
        catalog
            .counts("outrigger_http_requests_total", &[&labels[..], &[("direction", "inbound")]].concat(), count.into())
            .await;
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
