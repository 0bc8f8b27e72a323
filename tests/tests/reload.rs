//! Promise: a change of the YAML directory is in force everywhere within about a second and fails no request; a bad
//! file changes nothing and is reported with its place.

use std::time::Duration;

use outrigger_tests::eventually::within;
use outrigger_tests::mesh::{PERMISSIVE, STRICT};
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually, wire};

/// The promise is a second; the machine that runs the tests may be busy with others.
const SOON: Duration = Duration::from_secs(3);

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").outbound("stock:80").start().await;
    Pair { app, near, far, mesh }
}

/// Whether a plaintext request to the inbound port is answered.
async fn plaintext_is_served(pair: &Pair) -> bool {
    let mut client = Connection::open(pair.far.inbound()).await;
    client.send(GET).await;
    client.try_response(false).await.is_ok_and(|answer| answer.status == 200)
}

#[tokio::test]
async fn strict_and_permissive_change_in_flight_and_no_mesh_request_fails() {
    let pair = pair().await;
    let address = pair.near.outbound();
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let load = tokio::spawn(async move {
        let mut client = Connection::open(address).await;
        let mut asked = 0;
        while !*stopped.borrow_and_update() {
            assert_eq!(client.ask(GET).await.status, 200);
            asked += 1;
        }
        asked
    });
    for _ in 0..3 {
        pair.mesh.write("mesh.yaml", PERMISSIVE);
        within(SOON, "PERMISSIVE", async || plaintext_is_served(&pair).await.then_some(())).await;
        pair.mesh.write("mesh.yaml", STRICT);
        within(SOON, "STRICT", async || (!plaintext_is_served(&pair).await).then_some(())).await;
    }
    stop.send(true).unwrap();
    assert!(load.await.unwrap() > 10);
}

#[tokio::test]
async fn a_port_that_becomes_strict_keeps_no_plaintext_connection() {
    let pair = pair().await;
    pair.mesh.write("mesh.yaml", PERMISSIVE);
    within(SOON, "PERMISSIVE", async || plaintext_is_served(&pair).await.then_some(())).await;
    let mut plaintext = Connection::open(pair.far.inbound()).await;
    assert_eq!(plaintext.ask(GET).await.status, 200);
    let mut mutual = Connection::open(pair.near.outbound()).await;
    assert_eq!(mutual.ask(GET).await.status, 200);
    pair.mesh.write("mesh.yaml", STRICT);
    plaintext.expect_end().await;
    assert_eq!(mutual.ask(GET).await.status, 200);
}

#[tokio::test]
async fn a_service_that_appears_is_reached_and_one_that_goes_is_not() {
    let pair = pair().await;
    let stock = pair.near.address("outbound:stock.shop:80");
    assert_eq!(wire::get(stock, "/").await.reason(), "not_registered");
    let app = Application::start("stock").await;
    let other = pair.mesh.sidecar("stock-1").label("app", "stock").inbound(app.address()).start().await;
    pair.mesh.service("stock.shop", 80, app.port(), Some("http"));
    within(SOON, "the new service", async || (wire::get(stock, "/").await.status == 200).then_some(())).await;
    pair.mesh.remove("service-stock.shop.yaml");
    within(SOON, "the service is gone", async || {
        (wire::get(stock, "/").await.reason() == "not_registered").then_some(())
    })
    .await;
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    drop(other);
}

#[tokio::test]
async fn a_bad_file_keeps_the_last_good_state_and_is_reported_with_its_place() {
    let pair = pair().await;
    let bad = "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: mesh, namespace: \
               outrigger-system}\nspec:\n  mtls:\n    mod: PERMISSIVE\n";
    pair.mesh.write("mesh.yaml", bad);
    // Another file's change is in force all the same.
    pair.mesh.service("stock.shop", 80, pair.app.port(), Some("http"));
    let error = within(SOON, "the error is reported", async || {
        let status = pair.mesh.control_plane_get("/status").await;
        let errors = status["config"]["errors"].as_array().unwrap().clone();
        errors.into_iter().find(|error| error["file"].as_str().is_some_and(|file| file.ends_with("mesh.yaml")))
    })
    .await;
    assert_eq!((error["line"].as_u64(), error["column"].as_u64()), (Some(6), Some(5)), "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("mod") && message.contains("mode"), "names the field and the nearest: {message}");
    let stock = pair.near.address("outbound:stock.shop:80");
    within(SOON, "the other file", async || {
        (wire::get(stock, "/").await.reason() == "destination_unavailable").then_some(())
    })
    .await;
    assert!(!plaintext_is_served(&pair).await, "STRICT as before");
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);

    pair.mesh.write("mesh.yaml", "kind: [\n");
    pair.mesh.settled().await;
    assert!(!plaintext_is_served(&pair).await, "STRICT as before");
    pair.mesh.write("mesh.yaml", PERMISSIVE);
    within(SOON, "the repaired file", async || plaintext_is_served(&pair).await.then_some(())).await;
    eventually("no error is left", async || {
        let status = pair.mesh.control_plane_get("/status").await;
        status["config"]["errors"].as_array().unwrap().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_declared_protocol_may_change() {
    let pair = pair().await;
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    pair.mesh.service("catalog.shop", 80, pair.app.port(), Some("tcp"));
    let labels = [("direction", "inbound"), ("protocol", "tcp"), ("reason", ""), ("mtls", "true")];
    within(SOON, "bytes pass unparsed", async || {
        let answer = wire::get(pair.near.outbound(), "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        (pair.far.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) > 0.0).then_some(())
    })
    .await;
}

/// A typo in the file that says STRICT, and then a new start of the control plane: nobody is let in for it.
#[tokio::test]
async fn a_typo_and_a_restart_open_nothing() {
    let pair = pair().await;
    assert!(!plaintext_is_served(&pair).await);
    let broken = outrigger_tests::mesh::STRICT.replace("mode: STRICT", "mode: STRCIT");
    pair.mesh.write("mesh.yaml", &broken);
    pair.mesh.settled().await;
    let stays_strict = async |what: &str, lines: usize| {
        pair.mesh.stop_control_plane().await;
        pair.mesh.start_control_plane().await;
        let status = pair.mesh.control_plane_get("/status").await;
        let errors = status["config"]["errors"].as_array().unwrap().clone();
        assert_eq!(errors.len(), lines, "{what}: {errors:?}");
        // A service that appears proves that the sidecars heard of the new control plane.
        let port = pair.app.port();
        pair.mesh.service("stock.shop", 80, port, Some(if what == "again" { "tcp" } else { "http" }));
        eventually("the sidecars are connected again", async || {
            let status = pair.mesh.control_plane_get("/status").await;
            (status["sidecars"].as_array().unwrap().len() == 2).then_some(())
        })
        .await;
        for _ in 0..5 {
            assert!(!plaintext_is_served(&pair).await, "{what}");
        }
        assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200, "{what}");
    };
    stays_strict("with a last good text", 1).await;
    stays_strict("again", 1).await;
    // Without one: as if the file had been broken from the very first.
    pair.mesh.stop_control_plane().await;
    std::fs::remove_file(pair.mesh.path("control-plane/last-good-config.json")).unwrap();
    pair.mesh.start_control_plane().await;
    stays_strict("without a last good text", 2).await;
    // Taken away on purpose, it is gone.
    pair.mesh.remove("mesh.yaml");
    within(SOON, "plaintext is taken", async || plaintext_is_served(&pair).await.then_some(())).await;
}
