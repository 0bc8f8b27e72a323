//! Promise: who declares a port's protocol is believed, in this order: the sidecar's --port, appProtocol, the port's
//! name, the opaque ports. Declared tcp is never parsed, and no sidecar gets HTTP past a port that declares it. The
//! opaque ports hold for Services and for addresses that nobody registered.

use std::net::SocketAddr;

use outrigger_api::name::Protocol;
use outrigger_tests::application::Backend;
use outrigger_tests::peer::{Peer, TCP};
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

const GET: &str = "GET /x HTTP/1.1\r\nHost: catalog\r\n\r\n";

struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

fn mesh_config(opaque: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: \
         outrigger-system}}\nspec: {{opaquePorts: {opaque}}}\n"
    )
}

/// What a Service's port says, and where it leads.
struct Service<'a> {
    name: &'a str,
    app_protocol: Option<&'a str>,
    port: u16,
}

async fn pair(app: SocketAddr, service: Service<'_>, port: Option<Protocol>, opaque: Option<&str>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    if let Some(opaque) = opaque {
        mesh.write("mesh-config.yaml", &mesh_config(opaque));
    }
    let Service { name, app_protocol, port: number } = service;
    let declared = app_protocol.map(|text| format!(", appProtocol: {text}")).unwrap_or_default();
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: catalog, namespace: shop}}\nspec:\n  selector: {{app: \
         catalog}}\n  ports: [{{name: {name}, port: {number}, targetPort: {}{declared}}}]\n",
        app.port()
    );
    mesh.write("catalog.yaml", &text);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).port(app.port(), port).start().await;
    let near = mesh.sidecar("cart-1").outbound(&format!("catalog:{number}")).http_proxy().start().await;
    Pair { near, far, mesh }
}

/// How a request was carried, from both sides' metrics.
async fn carried(pair: &Pair) -> &'static str {
    eventually("counted on both sides", async || {
        let mut found = Vec::new();
        for sidecar in [&pair.near, &pair.far] {
            let samples = sidecar.metrics().await;
            let requests = samples.sum("outrigger_http_requests_total", &[]);
            let opaque = samples.sum("outrigger_tcp_connections_opened_total", &[]);
            found.push((requests, opaque, samples.sum("outrigger_detect_total", &[])));
        }
        match found[..] {
            [(1.0, 0.0, detected), (1.0, 0.0, _)] => Some(if detected > 0.0 { "detected" } else { "http" }),
            [(0.0, 1.0, 0.0), (0.0, 1.0, 0.0)] => Some("opaque"),
            _ => None,
        }
    })
    .await
}

/// The port's name, appProtocol, its number, what --port says, opaquePorts, and how a request is then carried.
type Case = (&'static str, Option<&'static str>, u16, Option<Protocol>, Option<&'static str>, &'static str);

#[tokio::test]
async fn who_is_believed() {
    let app = Application::start("catalog").await;
    // Opaque by its targetPort, which nobody can know before.
    let own: &'static str = app.port().to_string().leak();
    let cases: [Case; 13] = [
        ("main", None, 80, None, None, "detected"),
        ("main", Some("example.com/own"), 80, None, None, "detected"),
        ("main", None, 6379, None, None, "opaque"),
        ("main", None, 6379, None, Some("[]"), "detected"),
        ("main", None, 80, None, Some(own), "opaque"),
        ("main", None, 7000, None, Some("[7000]"), "opaque"),
        ("http-web", None, 6379, None, None, "http"),
        ("tcp-web", None, 80, None, None, "opaque"),
        ("redis", None, 80, None, None, "opaque"),
        ("tcp-web", Some("kubernetes.io/ws"), 80, None, None, "http"),
        ("http-web", Some("mysql"), 80, None, None, "opaque"),
        // A sidecar's word counts where the Service says nothing, and before the opaque ports.
        ("main", None, 80, Some(Protocol::Http), None, "http"),
        ("main", None, 6379, Some(Protocol::Http), None, "http"),
    ];
    for (name, app_protocol, port, sidecar, opaque, expected) in cases {
        let opaque = opaque.map(|ports| if ports.starts_with('[') { ports.to_owned() } else { format!("[{ports}]") });
        let pair = pair(app.address(), Service { name, app_protocol, port }, sidecar, opaque.as_deref()).await;
        let request = "GET /x HTTP/1.1\r\nHost: catalog\r\nConnection: close\r\n\r\n";
        assert_eq!(wire::ask(pair.near.outbound(), request).await.status, 200);
        assert_eq!(carried(&pair).await, expected, "{name} {app_protocol:?} {port} {sidecar:?} {opaque:?}");
        // An opaque request arrives as it was sent.
        assert_eq!(app.last().header("x-outrigger-identity").is_none(), expected == "opaque");
    }
}

#[tokio::test]
async fn on_a_declared_port_announced_as_opaque_is_refused() {
    let app = Application::start("catalog").await;
    for protocol in ["http", "http2", "grpc"] {
        let service = Service { name: "main", app_protocol: Some(protocol), port: 80 };
        let pair = pair(app.address(), service, None, None).await;
        let peer = Peer::issue(&pair.mesh, "shop", "web", "web-1").await;
        for bytes in [GET.as_bytes(), b"\x00\x01\x02"] {
            let mut connection = peer.connect(pair.far.inbound(), &[TCP]).await.unwrap();
            let _ = connection.try_send(bytes).await;
            assert_eq!(connection.take_to_end().await.0, b"");
        }
        let labels = [("reason", "protocol_mismatch"), ("source_workload", "web-1")];
        eventually("counted", async || {
            let samples = pair.far.metrics().await;
            (samples.sum("outrigger_tcp_connections_closed_total", &labels) == 2.0).then_some(())
        })
        .await;
    }
    assert_eq!(app.connections(), 0);
}

/// HTTP says which version it is: the three words for it mean the same.
#[tokio::test]
async fn on_a_port_declared_http_the_client_chooses_the_version() {
    let app = Application::start("catalog").await;
    for protocol in ["http", "http2", "grpc"] {
        let service = Service { name: "main", app_protocol: Some(protocol), port: 80 };
        let pair = pair(app.address(), service, None, None).await;
        assert_eq!(wire::get(pair.near.outbound(), "/one").await.status, 200);
        let http2 = outrigger_tests::grpc::Http2::open(pair.near.outbound()).await;
        assert_eq!(http2.get("/two").await.unwrap().status.as_u16(), 200);
        let samples = pair.near.metrics().await;
        for version in ["http1", "http2"] {
            let count = samples.sum("outrigger_http_requests_total", &[("protocol", version)]);
            assert_eq!(count, 1.0, "{version} on {protocol}");
        }
        assert_eq!(samples.sum("outrigger_detect_total", &[]), 0.0);
    }
}

#[tokio::test]
async fn opaque_ports_hold_for_addresses_that_nobody_registered() {
    let backend = Backend::start().await;
    let other = Backend::start().await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.write("mesh-config.yaml", &mesh_config(&format!("[{}]", backend.port())));
    // Whoever waits for the client waits for ever.
    let patient = |limits: &mut outrigger_sidecar::config::Limits| {
        limits.detect_wait = std::time::Duration::from_secs(600);
    };
    let near = mesh.sidecar("cart-1").http_proxy().limits(patient).start().await;
    let connect = async |address: SocketAddr| {
        let mut client = Connection::open(near.http_proxy()).await;
        client.send(format!("CONNECT {address} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        client.take_until(b"\r\n\r\n").await;
        client
    };
    let mut client = connect(backend.address()).await;
    let mut server = backend.accept().await;
    server.send(b"220 first").await;
    assert_eq!(client.take(9).await, b"220 first");
    server.finish().await;
    assert_eq!(client.expect_end().await, End::Closed);
    let mut client = connect(other.address()).await;
    client.send(b"\0").await;
    other.accept().await.take(1).await;
    assert_eq!(near.metrics().await.sum("outrigger_detect_total", &[]), 1.0, "the second only");
    // A new list is in force for the next connection.
    mesh.write("mesh-config.yaml", &mesh_config(&format!("[{}]", other.port())));
    mesh.settled().await;
    eventually("the new list", async || {
        let _client = connect(other.address()).await;
        let mut waited = 0;
        while waited < 10 {
            if other.accepted().await.is_some() {
                return Some(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            waited += 1;
        }
        None
    })
    .await;
}
