//! Promise: who speaks the wrong language to a port gets a clear end, and harms nobody else.

use std::time::{Duration, Instant};

use outrigger_tests::application::Backend;
use outrigger_tests::peer::Authority;
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, Sidecar, eventually};

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
    let short = |limits: &mut outrigger_sidecar::config::Limits| {
        limits.head_timeout = Duration::from_millis(400);
        limits.handshake_timeout = Duration::from_millis(400);
        limits.connections = 40;
    };
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let far = builder.limits(short).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(short).start().await;
    Pair { app, near, far, mesh }
}

impl Pair {
    async fn is_well(&self) {
        let answer = wire::get(self.near.outbound(), "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[tokio::test]
async fn garbage_on_the_mtls_port_harms_nobody() {
    let pair = pair(None).await;
    let garbage: [&[u8]; 6] = [
        b"\x16\x03\x01\xff\xff\x01\x00\x00\x00",
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x00",
        b"\x16\x03\x03\x00\x02\x02\x00",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ];
    for bytes in garbage {
        let mut client = Connection::open(pair.far.inbound()).await;
        client.send(bytes).await;
        let begun = Instant::now();
        let (answer, _) = client.take_to_end().await;
        assert!(answer.is_empty() || answer[0] == 0x15, "an alert at most: {answer:?}");
        assert!(begun.elapsed() < Duration::from_secs(5));
        pair.is_well().await;
    }
    let mut silent = Connection::open(pair.far.inbound()).await;
    assert!(silent.take_to_end().await.0.is_empty(), "a silent client is not waited for");
    assert_eq!(pair.app.count(), 6);
}

#[tokio::test]
async fn tls_to_a_plain_http_port_ends_with_a_reason() {
    let pair = pair(Some("http")).await;
    let error = Peer::without_certificate().connect(pair.near.outbound(), &["http/1.1"]).await.err();
    assert!(error.is_some(), "no handshake");
    let labels = [("reason", "protocol_mismatch"), ("direction", "outbound")];
    eventually("counted", async || {
        (pair.near.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(())
    })
    .await;
    pair.is_well().await;
}

#[tokio::test]
async fn tls_of_the_applications_own_passes_where_nothing_is_declared() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = Backend::start().await;
    mesh.service("bank.shop", 443, backend.port(), None);
    let far = mesh.sidecar("bank-1").label("app", "bank").inbound(backend.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("bank:443").start().await;
    let server = Authority::new().leaf(&["https://bank.test"], |_| {});
    let client = Peer::without_certificate();
    let (client, server) = tokio::join!(client.connect(near.outbound(), &["h2"]), async {
        server.accept(backend.accept().await, &["h2"]).await
    });
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    client.send("inside").await;
    assert_eq!(server.take(6).await, b"inside");
    drop((client, server));
    let labels = [("protocol", "tls"), ("mtls", "true")];
    for sidecar in [&near, &far] {
        eventually("counted as tls inside mutual TLS", async || {
            (sidecar.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn plaintext_to_an_application_that_speaks_tls_is_502() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = Backend::start().await;
    mesh.service("bank.shop", 443, backend.port(), Some("http"));
    let _far = mesh.sidecar("bank-1").label("app", "bank").inbound(backend.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("bank:443").start().await;
    let (answer, ()) = tokio::join!(wire::get(near.outbound(), "/"), async {
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        app.send(b"\x15\x03\x03\x00\x02\x02\x46").await;
    });
    assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_protocol"));
}

#[tokio::test]
async fn a_request_head_that_never_ends_is_408() {
    for protocol in [None, Some("http")] {
        let pair = pair(protocol).await;
        for beginning in ["G", "GET / HT", "GET / HTTP/1.1\r\nHost: cat"] {
            let mut client = Connection::open(pair.near.outbound()).await;
            client.send(beginning).await;
            let answer = client.response(false).await;
            assert_eq!((answer.status, answer.reason().as_str()), (408, "request_head_timeout"), "{beginning:?}");
            client.expect_end().await;
        }
        assert_eq!(pair.app.connections(), 0);
        pair.is_well().await;
    }
}

#[tokio::test]
async fn slow_clients_do_not_take_the_place_of_others() {
    let pair = pair(Some("http")).await;
    let mut slow = Vec::new();
    for _ in 0..30 {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send("GET / HTTP/1.1\r\n").await;
        slow.push(client);
    }
    pair.is_well().await;
    for client in &mut slow {
        assert_eq!(client.response(false).await.status, 408);
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_those_within_served() {
    let pair = pair(Some("http")).await;
    let mut open = Vec::new();
    // Each direction has 80 % of the 40 places.
    for _ in 0..30 {
        let mut client = Connection::open(pair.near.outbound()).await;
        assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
        open.push(client);
    }
    let mut beyond = Vec::new();
    for _ in 0..10 {
        beyond.push(Connection::open(pair.near.outbound()).await);
    }
    eventually("refusals are counted", async || {
        (pair.near.metrics().await.sum("outrigger_connections_refused_total", &[]) >= 8.0).then_some(())
    })
    .await;
    for client in &mut open {
        assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
    }
    drop((open, beyond));
    eventually("places are given back", async || {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        client.try_response(false).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
    drop(pair.mesh);
}

#[tokio::test]
async fn the_admin_port_answers_only_who_calls_it_by_a_loopback_name() {
    let pair = pair(None).await;
    let admin = pair.near.address("admin");
    for (host, status) in
        [("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200), ("evil.test", 403), ("169.254.1.1", 403)]
    {
        let request = format!("GET /config HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(wire::ask(admin, request).await.status, status, "{host}");
    }
    let origin =
        "POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.test\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(wire::ask(admin, origin).await.status, 403);
    for path in ["/certs/renew", "/quitquitquit"] {
        assert_eq!(wire::get(admin, path).await.status, 403, "Host: test");
        let get = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert_eq!(wire::ask(admin, get).await.status, 405, "changes are POST");
    }
    let config = pair.near.admin_get("/config").await;
    assert_eq!(config["workload"]["default_mtls"], "STRICT", "{config}");
    let connections = pair.far.admin_get("/connections").await;
    assert!(connections.is_array());
    assert_eq!(pair.near.admin_post("/log-level", "debug").await.status, 200);
    assert_eq!(pair.near.admin_post("/log-level", "shout").await.status, 400);
    let certs = pair.near.admin_get("/certs").await.to_string();
    assert!(!certs.contains("PRIVATE"), "no key in any answer");
}
