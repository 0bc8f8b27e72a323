//! Promise: connecting is no less patient than a program without the mesh is. The kernel sends a lost first packet again
//! after 1 s and 3 s, so an endpoint has 5 s and the own application 10 s; another endpoint is dialled beside one that has
//! not answered for 1 s, and who connects first is used.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use outrigger_tests::application::Backend;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::Families;
use outrigger_tests::transparent::{TransparentMesh, get};
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually, under_test};
use tokio::net::TcpListener;

/// A listener whose queue is full: packets that would open a connection are dropped. The kernel drops them for real
/// listeners of a short queue as well, under a burst (Python's http.server has 5).
struct Full {
    listener: std::net::TcpListener,
    waiting: Vec<std::net::TcpStream>,
}

impl Full {
    async fn on(address: SocketAddr) -> Full {
        tokio::task::spawn_blocking(move || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(0).unwrap();
            let listener: std::net::TcpListener = socket.into();
            let address = listener.local_addr().unwrap();
            let mut waiting = Vec::new();
            while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
                waiting.push(stream);
                assert!(waiting.len() < 64, "the queue does not fill");
            }
            Full { listener, waiting }
        })
        .await
        .unwrap()
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Accepts those that wait. What comes now is taken.
    fn empty(self) -> TcpListener {
        for _ in &self.waiting {
            drop(self.listener.accept().unwrap());
        }
        self.listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(self.listener).unwrap()
    }
}

fn workloads(addresses: &[SocketAddr]) -> String {
    let mut text = String::new();
    for (index, address) in addresses.iter().enumerate() {
        text += &format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: far-{index}, namespace: shop}}\nspec: \
             {{address: {}, serviceAccount: far, labels: {{app: far}}, ports: {{main: {}}}}}\n---\n",
            address.ip(),
            address.port()
        );
    }
    text
}

/// A service of workloads without sidecars, HTTP at port 80 and opaque at port 81.
async fn service(addresses: &[SocketAddr]) -> (Mesh, Sidecar) {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let port = addresses[0].port();
    mesh.write(
        "far.yaml",
        &format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: far, namespace: shop, annotations: \
             {{outrigger.dev/load-balancer: RoundRobin}}}}\nspec:\n  selector: {{app: far}}\n  \
             ports:\n  - {{name: http-main, port: 80, targetPort: {port}}}\n  - {{name: tcp-main, port: 81, targetPort: \
             {port}}}\n"
        ),
    );
    mesh.write("workloads.yaml", &workloads(addresses));
    let near = mesh.sidecar("cart-1").outbound("far:80").outbound("far:81").start().await;
    (mesh, near)
}

fn doors(near: &Sidecar) -> [SocketAddr; 2] {
    [near.address("outbound:far.shop:80"), near.address("outbound:far.shop:81")]
}

/// Longer than the kernel waits before it sends the packet again for the first time.
const ONCE_MORE: Duration = Duration::from_millis(1300);

#[tokio::test]
async fn an_application_whose_queue_is_full_for_a_while_is_waited_for() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let full = Full::on(([127, 0, 0, 1], 0).into()).await;
    mesh.service("catalog.shop", 80, full.address().port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(full.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let asking = async {
        let get = wire::get(near.outbound(), "/get");
        let post = wire::ask(near.outbound(), "POST /post HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
        let plain = wire::get(far.inbound(), "/plain");
        tokio::join!(get, post, plain)
    };
    let serving = async {
        tokio::time::sleep(ONCE_MORE).await;
        Application::serve("catalog", full.empty())
    };
    let ((get, post, plain), _app) = tokio::join!(asking, serving);
    assert_eq!([get.status, post.status, plain.status], [200; 3]);
}

#[tokio::test]
async fn opaque_bytes_wait_for_it_as_well() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let full = Full::on(([127, 0, 0, 1], 0).into()).await;
    mesh.service("catalog.shop", 80, full.address().port(), Some("tcp"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(full.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let mut client = Connection::open(near.outbound()).await;
    client.send("ping").await;
    tokio::time::sleep(ONCE_MORE).await;
    let backend = Backend::from(full.empty());
    let mut app = backend.accept().await;
    assert_eq!(app.take(4).await, b"ping");
    app.send("pong").await;
    assert_eq!(client.take(4).await, b"pong");
}

#[tokio::test]
async fn the_only_endpoint_is_waited_for() {
    let full = Full::on(([127, 0, 0, 1], 0).into()).await;
    let (_mesh, near) = service(&[full.address()]).await;
    let [http, opaque] = doors(&near);
    let asking = async { tokio::join!(wire::get(http, "/"), wire::get(opaque, "/")) };
    let serving = async {
        tokio::time::sleep(ONCE_MORE).await;
        Application::serve("far", full.empty())
    };
    let ((http, opaque), _app) = tokio::join!(asking, serving);
    assert_eq!([http.status, opaque.status], [200; 2]);
}

/// Of three endpoints two answer nothing: a third is dialled beside them, and after some times they are left alone.
#[tokio::test]
async fn another_endpoint_is_dialled_beside_one_that_does_not_answer() {
    let hole = Full::on(([127, 0, 0, 1], 0).into()).await;
    let at = |last| SocketAddr::new([127, 0, 0, last].into(), hole.address().port());
    let alive = Application::start_at("alive", at(3)).await;
    let (_mesh, near) = service(&[hole.address(), alive.address()]).await;
    let [http, opaque] = doors(&near);
    for door in [http, opaque] {
        for _ in 0..12 {
            let begun = Instant::now();
            let post = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi";
            assert_eq!(wire::ask(door, post).await.status, 200);
            assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        }
    }
    assert_eq!(alive.count(), 24, "each was asked once");
    let labels = [("reason", "connect_timeout")];
    assert_eq!(near.metrics().await.sum("outrigger_http_requests_total", &labels), 0.0);
    // Six in a row: five that were late would be too many for one that is left alone.
    let begun = Instant::now();
    for _ in 0..6 {
        assert_eq!(wire::get(opaque, "/").await.status, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "it is dialled on and on: {:?}", begun.elapsed());
}

/// Whoever loses is closed: nothing is left of it at the endpoint that was late.
#[tokio::test]
async fn the_one_that_was_late_gets_no_connection() {
    let late = Full::on(([127, 0, 0, 1], 0).into()).await;
    let at = |last| SocketAddr::new([127, 0, 0, last].into(), late.address().port());
    let alive = Application::start_at("alive", at(3)).await;
    let (_mesh, near) = service(&[late.address(), alive.address()]).await;
    for door in doors(&near) {
        for _ in 0..4 {
            assert_eq!(wire::get(door, "/").await.status, 200);
        }
    }
    let backend = Backend::from(late.empty());
    // Long enough for every packet that could still be sent again.
    tokio::time::sleep(Duration::from_secs(4)).await;
    while let Some(mut connection) = backend.accepted().await {
        connection.expect_end().await;
    }
}

#[tokio::test]
async fn a_lost_first_packet_costs_a_second_and_nothing_else() {
    for families in [Families::V4, Families::V6] {
        let Some(mesh) = TransparentMesh::start(under_test!(), families, &["web", "catalog"], STRICT).await else {
            return;
        };
        mesh.service("catalog", None, 80, 8080, "").await;
        let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
        let _application = catalog.application("catalog", 8080);
        let _web = mesh.sidecar("web", "web", &[]).await;
        // Of those between the sidecars and of those to the application every second one gets through.
        let rules = "add table inet lossy; add chain inet lossy c { type filter hook prerouting priority -400; }; add rule \
                     inet lossy c tcp dport 8080 tcp flags & (fin|syn|rst|ack) == syn numgen inc mod 2 0 counter drop";
        mesh.at("catalog").run(&format!("nft '{rules}'"));
        let address = SocketAddr::new(mesh.address("catalog"), 8080).to_string();
        let begun = Instant::now();
        let answer = get(mesh.at("web"), &address, "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(begun.elapsed() >= Duration::from_millis(1900), "two were lost: {:?}", begun.elapsed());
        eventually("two were dropped", async || {
            let list = mesh.at("catalog").run("nft list table inet lossy");
            list.contains("counter packets 2 ").then_some(())
        })
        .await;
    }
}
