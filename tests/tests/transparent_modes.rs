//! Promise: a workload goes STRICT port by port. STRICT lets nobody in who has not proved who he is, PERMISSIVE serves
//! plaintext and passes an application's own TLS unparsed, DISABLE takes plaintext alone, and peers dial it so. Who comes
//! without proof is listed with address and port.

use std::net::SocketAddr;

use outrigger_tests::application::Backend;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::Families;
use outrigger_tests::peer::{Peer, self_signed};
use outrigger_tests::transparent::{TransparentMesh, everything, get};
use outrigger_tests::{End, eventually, under_test};
use serde_json::{Value, json};

/// STRICT for the mesh; of the catalog's ports two differ, one of which no Service knows.
const PORTS: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: catalog, namespace: shop}
spec:
  selector: {matchLabels: {app: catalog}}
  mtls: {mode: STRICT}
  portLevelMtls:
    8081: {mode: PERMISSIVE}
    8082: {mode: DISABLE}
";

const LOG_ALL: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: outrigger-system}
spec: {accessLog: All}
";

async fn callers(sidecar: &outrigger_tests::transparent::TransparentSidecar<'_>) -> Vec<Value> {
    sidecar.admin("/plaintext-callers").await["callers"].as_array().unwrap().clone()
}

async fn modes(families: Families) {
    let yaml = format!("{STRICT}---\n{PORTS}");
    let names = ["web", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, &yaml).await else { return };
    mesh.service("catalog", None, 80, 8080, "").await;
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let web = mesh.sidecar("web", "web", &[]).await;
    let applications = [8080, 8081, 8082, 8083].map(|port| catalog.application(&format!("catalog-{port}"), port));
    let hub = mesh.network.hub();
    let at = |port| SocketAddr::new(mesh.address("catalog"), port);

    // From the mesh: mutual TLS, but where it is disabled. 8083 is in no document: the mesh's mode.
    for (port, mtls) in [(8080, "true"), (8081, "true"), (8082, "false"), (8083, "true")] {
        let answer = get(mesh.at("web"), &at(port).to_string(), "/hello").await;
        let name = format!("catalog-{port}");
        assert_eq!((answer.status, answer.header("x-app")), (200, Some(&*name)), "{port}: {}", answer.text());
        let told = applications.iter().find(|application| application.port() == port).unwrap().last();
        assert_eq!(told.header("x-outrigger-identity").is_some(), mtls == "true", "{port}");
    }
    for (sidecar, direction) in [(&web, "outbound"), (&catalog, "inbound")] {
        let labels = |mtls| [("direction", direction), ("code", "200"), ("mtls", mtls)];
        sidecar.counts("outrigger_http_requests_total", &labels("true"), 3.0).await;
        sidecar.counts("outrigger_http_requests_total", &labels("false"), 1.0).await;
    }

    // From outside of it, in plaintext.
    for (port, status) in [(8080, None), (8081, Some(200)), (8082, Some(200)), (8083, None)] {
        let mut connection = hub.connect(at(port)).await;
        connection.send("GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        match status {
            Some(status) => assert_eq!(connection.response(false).await.status, status, "{port}"),
            None => assert_eq!(everything(connection).await, b"", "{port}"),
        }
    }
    assert_eq!([0, 3].map(|nth| applications[nth].count()), [1, 1], "no byte of it reached a STRICT port");
    catalog.counts("outrigger_tcp_connections_closed_total", &[("reason", "mtls_required")], 2.0).await;

    // Who it was.
    let hub_address = if families == Families::V6 { hub.v6().to_string() } else { hub.v4().to_string() };
    let seen = callers(&catalog).await;
    let counts = |address: &str, port: u16| {
        let line = seen.iter().find(|line| line["address"] == address && line["port"] == port);
        line.map(|line| ["plaintext", "foreign_tls", "refused"].map(|kind| line[kind].as_u64().unwrap()))
    };
    let web_address = mesh.address("web").to_string();
    assert_eq!(counts(&hub_address, 8080), Some([0, 0, 1]), "{seen:?}");
    assert_eq!(counts(&hub_address, 8081), Some([1, 0, 0]), "{seen:?}");
    assert_eq!(counts(&hub_address, 8082), Some([1, 0, 0]), "{seen:?}");
    assert_eq!(counts(&web_address, 8082), Some([1, 0, 0]), "{seen:?}");
    assert_eq!(seen.len(), 5, "nobody who proved who he is: {seen:?}");
}

#[tokio::test]
async fn over_ipv4() {
    modes(Families::V4).await;
}

#[tokio::test]
async fn over_ipv6() {
    modes(Families::V6).await;
}

#[tokio::test]
async fn an_applications_own_tls() {
    let yaml = format!("{STRICT}---\n{PORTS}---\n{LOG_ALL}");
    let names = ["web", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, &yaml).await else { return };
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let web = mesh.sidecar("web", "web", &[]).await;
    let (hub, inside) = (mesh.network.hub(), mesh.at("catalog"));
    let application = self_signed("https://catalog.test");
    let nobody = Peer::without_certificate();
    let at = |port| SocketAddr::new(inside.v4().into(), port);

    // From outside: passed on PERMISSIVE and DISABLE, refused with an alert on STRICT.
    for port in [8081, 8082] {
        let server = Backend::from(inside.listen(at(port)));
        let handshake = async { application.accept(server.accept().await, &["x"]).await };
        let connection = hub.connect(at(port)).await;
        let (client, served) = tokio::join!(nobody.secure(connection, "catalog.test", &["x"]), handshake);
        let (mut client, mut served) = (client.unwrap(), served.unwrap());
        client.send("secret").await;
        assert_eq!(served.take(6).await, b"secret");
        eventually("/connections names the server", async || {
            let connections = catalog.admin("/connections").await.to_string();
            connections.contains("\"sni\":\"catalog.test\"").then_some(())
        })
        .await;
    }
    let strict = Backend::from(inside.listen(at(8080)));
    let error = nobody.secure(hub.connect(at(8080)).await, "catalog.test", &["x"]).await.err().unwrap();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    assert!(strict.accepted().await.is_none());
    let seen = callers(&catalog).await;
    let of = |port: u16| seen.iter().find(|line| line["port"] == port).unwrap();
    assert_eq!((&of(8081)["foreign_tls"], &of(8080)["refused"]), (&json!(1), &json!(1)), "{seen:?}");

    // Between two sidecars it travels inside mutual TLS, and both know the name.
    let handshake = async { application.accept(strict.accept().await, &["x"]).await };
    let connection = mesh.at("web").connect(at(8080)).await;
    let (client, served) = tokio::join!(nobody.secure(connection, "inner.test", &["x"]), handshake);
    let (mut client, mut served) = (client.unwrap(), served.unwrap());
    client.send("secret").await;
    assert_eq!(served.take(6).await, b"secret");
    for sidecar in [&web, &catalog] {
        eventually("/connections names the server", async || {
            let connections = sidecar.admin("/connections").await.to_string();
            connections.contains("\"sni\":\"inner.test\"").then_some(())
        })
        .await;
        let labels = [("mtls", "true"), ("protocol", "tls"), ("source_workload", "web")];
        sidecar.counts("outrigger_tcp_connections_opened_total", &labels, 1.0).await;
    }
    drop((client, served));
    for sidecar in [&web, &catalog] {
        eventually("the access log names the server", async || {
            sidecar.process.stderr().contains("\"sni\":\"inner.test\"").then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_port_becomes_strict_and_open_plaintext_ends() {
    let names = ["catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, "").await else { return };
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let _application = catalog.application("catalog", 8080);
    let mut connection = mesh.network.hub().connect((mesh.address("catalog"), 8080).into()).await;
    connection.send("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(connection.response(false).await.status, 200);
    assert_eq!(callers(&catalog).await[0]["plaintext"], 1);
    mesh.write("mesh.yaml", STRICT).await;
    let (rest, end) = connection.take_to_end().await;
    assert!(rest.is_empty() && matches!(end, End::Closed | End::Reset));
}
