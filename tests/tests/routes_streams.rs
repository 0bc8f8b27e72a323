//! Promise: TCPRoutes and TLSRoutes that bind Services decide which Service gets a connection whose bytes are not parsed.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use outrigger_tests::application::Backend;
use outrigger_tests::{Connection, End, Mesh, MeshOptions, Peer, Sidecar, eventually};

/// Services `db`, `db-v1` and `db-v2` for bytes that are not parsed, with ports for each kind of route.
struct Db {
    backends: [Backend; 2],
    _servers: [Sidecar; 2],
    client: Sidecar,
    _mesh: Mesh,
}

impl Db {
    async fn start(protocol: &str, routes: &str) -> Db {
        let backends = Backend::replicas::<2>().await;
        let port = backends[0].port();
        let service = |name: &str, selector: &str| {
            let ports = [9000, 9001, 9002]
                .map(|number| format!("{{name: p{number}, port: {number}, targetPort: {port}{protocol}}}"));
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: \
                 {{{selector}}}, ports: [{}]}}\n",
                ports.join(", ")
            )
        };
        let yaml = service("db", "app: db")
            + &service("db-v1", "app: db, v: one")
            + &service("db-v2", "app: db, v: two")
            + routes;
        let mesh = Mesh::start(MeshOptions { yaml, ..MeshOptions::default() }).await;
        let server = async |index: usize, version: &str| {
            let builder = mesh.sidecar(&format!("db-{version}")).label("app", "db").label("v", version);
            builder.inbound(backends[index].address()).start().await
        };
        let servers = [server(0, "one").await, server(1, "two").await];
        let client = mesh.sidecar("client-1");
        let client = client.outbound("db:9000").outbound("db:9001").outbound("db:9002").start().await;
        Db { backends, _servers: servers, client, _mesh: mesh }
    }

    /// How a connection with these first bytes is ended, whenever that is.
    async fn ended_at(&self, port: u16, bytes: &[u8]) -> End {
        let address = self.client.address(&format!("outbound:db.shop:{port}"));
        let mut client = match tokio::net::TcpStream::connect(address).await {
            Ok(client) => client,
            Err(_) => return End::Reset,
        };
        let _ = client.write_all(bytes).await;
        match client.read(&mut [0; 16]).await {
            Ok(_) => End::Closed,
            Err(_) => End::Reset,
        }
    }

    /// Which of the two gets a connection with these first bytes; None: it is ended.
    async fn gets(&self, port: u16, bytes: &[u8]) -> Option<usize> {
        let mut client = Connection::open(self.client.address(&format!("outbound:db.shop:{port}"))).await;
        let _ = client.try_send(bytes).await;
        let (index, mut accepted) = tokio::select! {
            accepted = self.backends[0].accept() => (0, accepted),
            accepted = self.backends[1].accept() => (1, accepted),
            _ = client.take_to_end() => return None,
        };
        assert_eq!(accepted.take(bytes.len()).await, bytes);
        Some(index)
    }
}

fn stream_route(kind: &str, name: &str, parent: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1alpha2\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {{parentRefs: [{{group: '', kind: Service, name: db, {parent}}}], {rest}}}\n"
    )
}

#[tokio::test]
async fn tcp_routes_say_where_connections_go() {
    let routes = stream_route("TCPRoute", "one", "port: 9000", "rules: [{backendRefs: [{name: db-v1, port: 9000}]}]")
        + &stream_route(
            "TCPRoute",
            "two",
            "sectionName: p9001",
            "rules: [{backendRefs: [{name: db-v1, port: 9000, weight: 0}, {name: db-v2, port: 9000, weight: 5}]}]",
        )
        + &stream_route("TCPRoute", "gone", "port: 9002", "rules: [{backendRefs: [{name: gone, port: 1}]}]");
    for protocol in [", appProtocol: tcp", ""] {
        let db = Db::start(protocol, &routes).await;
        for (port, expected) in [(9000, Some(0)), (9001, Some(1))] {
            for _ in 0..4 {
                assert_eq!(db.gets(port, b"\x00\x01hello").await, expected, "{protocol} {port}");
            }
        }
        for _ in 0..4 {
            let end = db.ended_at(9002, b"\x00\x01hello").await;
            assert_eq!(end, End::Reset, "{protocol}");
        }
        let labels = [("direction", "outbound"), ("reason", "backend_invalid")];
        eventually("the refusals are counted", async || {
            let metrics = db.client.metrics().await;
            (metrics.sum("outrigger_tcp_connections_closed_total", &labels) == 4.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn tls_routes_go_by_the_server_name() {
    let hello = |name: &str| {
        let config = Arc::new(Peer::without_certificate().client_config(&[]));
        let mut client = rustls::ClientConnection::new(config, name.to_owned().try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    };
    let routes = stream_route(
        "TLSRoute",
        "one",
        "port: 9000",
        "hostnames: [a.test], rules: [{backendRefs: [{name: db-v1, port: 9000}]}]",
    ) + &stream_route(
        "TLSRoute",
        "two",
        "port: 9000",
        "hostnames: ['*.test'], rules: [{backendRefs: [{name: db-v2, port: 9000}]}]",
    );
    for protocol in [", appProtocol: tls", ""] {
        let db = Db::start(protocol, &routes).await;
        for (name, expected) in [("a.test", Some(0)), ("b.test", Some(1)), ("c.b.test", Some(1)), ("other", None)] {
            assert_eq!(db.gets(9000, &hello(name)).await, expected, "{protocol} {name}");
        }
        assert_eq!(db.gets(9000, b"GET / HTTP/1.1\r\n\r\n").await, None, "no server name");
    }
}
