//! Promise: rules that do not exempt the sidecar make no loop. Its own connection that comes back to it is refused, with a
//! reason that says what to do, and the application's ends; with the right rules everything is as it was.

use std::net::SocketAddr;

use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::{Families, installed};
use outrigger_tests::process::{Program, command};
use outrigger_tests::transparent::{TransparentMesh, everything, get};
use outrigger_tests::{Namespace, eventually, under_test};

const CLOSED: &str = "outrigger_tcp_connections_closed_total";
/// Another worker may look before the one that dialled has noted it, so that a connection goes round a few times. A loop
/// ends where descriptors do, at thousands.
const FEW: f64 = 40.0;

async fn no_loop(families: Families, cluster_ip: &str, outside: &str) {
    let names = ["web", "catalog"];
    if !installed(&["nft"]) {
        return;
    }
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, STRICT).await else { return };
    mesh.service("catalog", Some(cluster_ip), 80, 8080, "").await;
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let _application = catalog.application("catalog", 8080);
    let web = mesh.sidecar("web", "web", &["--workers", "2"]).await;
    let service = SocketAddr::new(cluster_ip.parse().unwrap(), 80).to_string();
    assert_eq!(get(mesh.at("web"), &service, "/").await.status, 200);

    let (code, said) = web.redirect_command(&["apply"]);
    assert_eq!(code, 0, "{said}");
    // That is what the check says, too.
    let (code, said) = web.redirect_command(&["check"]);
    assert!(code == 5 && said.contains("the same --mark"), "{code}: {said}");
    // Nobody registered it.
    ends(mesh.at("web"), outside).await;
    web.counts(CLOSED, &[("reason", "own_port")], 1.0).await;
    web.process.says("the redirect rules do not exempt it").await;
    // A service, on a fresh connection: the pool is of before.
    catalog.process.signal("KILL");
    let answer = get(mesh.at("web"), &service, "/").await;
    assert_eq!(answer.status, 503, "{}", answer.text());
    let rounds = web.metrics().await.sum("outrigger_tcp_connections_opened_total", &[("direction", "outbound")]);
    assert!(rounds < FEW, "{rounds} connections for two of the application's");

    web.redirect();
    let (code, said) = web.redirect_command(&["check"]);
    assert_eq!(code, 0, "{said}");
    let before = web.metrics().await;
    ends(mesh.at("web"), outside).await;
    let all = before.sum(CLOSED, &[("direction", "outbound")]);
    web.counts(CLOSED, &[("direction", "outbound")], all + 1.0).await;
    let own_port = [("reason", "own_port")];
    assert_eq!(web.metrics().await.sum(CLOSED, &own_port), before.sum(CLOSED, &own_port));
}

/// Not even the control plane can be reached then: `/ready` says why, and what to do.
#[tokio::test]
async fn a_sidecar_that_starts_under_such_rules_says_so() {
    if !installed(&["nft"]) {
        return;
    }
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["web"], STRICT).await else { return };
    let mut apply = command(under_test!(), Program::Sidecar);
    apply.args(["redirect", "apply"]);
    assert!(mesh.at("web").inside(&apply).status().unwrap().success());
    let web = mesh.start_sidecar(mesh.at("web"), "web", &[]);
    web.process.address("health").await;
    let hint = eventually("the reason is told", async || {
        let (status, body) = web.ready().await;
        assert_eq!(status, 503, "{body}");
        (body["reason"] == "redirect_not_exempt").then(|| body["hint"].to_string())
    })
    .await;
    assert!(hint.contains("--mark") && hint.contains("--uid"), "{hint}");
    web.process.says("send this sidecar's own connections back to it").await;
    web.redirect();
    web.is_ready().await;
}

/// A certificate in the state directory makes up for nothing: no connection of the application leaves.
#[tokio::test]
async fn a_sidecar_that_starts_again_under_such_rules_says_so_whatever_its_state_directory_has() {
    if !installed(&["nft"]) {
        return;
    }
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["web"], STRICT).await else { return };
    let mut web = mesh.sidecar("web", "web", &[]).await;
    web.process.signal("TERM");
    web.process.wait(outrigger_tests::PATIENCE).await;
    let (code, said) = web.redirect_command(&["apply"]);
    assert_eq!(code, 0, "{said}");
    let web = mesh.start_sidecar(mesh.at("web"), "web", &[]);
    web.process.address("health").await;
    let hint = eventually("the reason is told", async || {
        let (status, body) = web.ready().await;
        (status == 503 && body["reason"] == "redirect_not_exempt").then(|| body["hint"].to_string())
    })
    .await;
    assert!(hint.contains("--mark") && hint.contains("--uid"), "{hint}");
    web.redirect();
    web.is_ready().await;
}

/// Connects to where nobody is: the end comes without a byte, maybe before the client has looked.
async fn ends(from: &Namespace, outside: &str) {
    match from.try_connect(outside.parse().unwrap()).await {
        Ok(mut connection) => {
            let _ = connection.try_send("hello").await;
            assert_eq!(everything(connection).await, b"");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[tokio::test]
async fn no_loop_v4() {
    no_loop(Families::V4, "10.96.0.10", "198.51.100.1:9000").await;
}

#[tokio::test]
async fn no_loop_v6() {
    no_loop(Families::V6, "fd96::10", "[2001:db8::1]:9000").await;
}
