//! Promise: requests are spread over a service's endpoints as its Service says, each request by itself also on HTTP/2,
//! and an endpoint that keeps failing is left alone for a while.

use std::net::SocketAddr;

use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually, wire};

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

struct Replicas<const N: usize> {
    apps: [Application; N],
    near: Sidecar,
    far: Vec<Sidecar>,
    _mesh: Mesh,
}

async fn replicas<const N: usize>(balancer: &str) -> Replicas<N> {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let apps = Application::replicas::<N>("catalog").await;
    let annotation = format!("outrigger.dev/load-balancer: {balancer}");
    mesh.service_with("catalog.shop", 80, apps[0].port(), None, &annotation);
    let mut far = Vec::new();
    for (index, app) in apps.iter().enumerate() {
        let name = format!("catalog-{}", index + 1);
        far.push(mesh.sidecar(&name).label("app", "catalog").inbound(app.address()).start().await);
    }
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Replicas { apps, near, far, _mesh: mesh }
}

impl<const N: usize> Replicas<N> {
    fn counts(&self) -> Vec<usize> {
        self.apps.iter().map(Application::count).collect()
    }

    async fn ask(&self, times: usize) {
        let mut client = Connection::open(self.near.outbound()).await;
        for _ in 0..times {
            assert_eq!(client.ask(GET).await.status, 200);
        }
    }
}

#[tokio::test]
async fn round_robin_takes_each_in_turn() {
    let replicas = replicas::<3>("RoundRobin").await;
    replicas.ask(30).await;
    assert_eq!(replicas.counts(), [10, 10, 10]);
    // One HTTP/2 connection of the client, a choice for each of its streams.
    let client = Http2::open(replicas.near.outbound()).await;
    for _ in 0..30 {
        assert_eq!(client.get("/").await.unwrap().status.as_u16(), 200);
    }
    assert_eq!(replicas.counts(), [20, 20, 20]);
}

#[tokio::test]
async fn random_reaches_all() {
    let replicas = replicas::<3>("Random").await;
    replicas.ask(300).await;
    let counts = replicas.counts();
    // 300 fair draws leave this band once in a billion runs.
    assert!(counts.iter().all(|count| (50..=150).contains(count)), "{counts:?}");
}

#[tokio::test]
async fn the_least_loaded_gets_the_next() {
    let replicas = replicas::<2>("LeastRequest").await;
    replicas.apps[1].release();
    // Each request that waits makes the first endpoint less wanted; the second answers at once.
    let mut clients = Vec::new();
    for sent in 1..=60 {
        let mut client = Connection::open(replicas.near.outbound()).await;
        client.send("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        clients.push(client);
        eventually("it arrives", async || (replicas.counts().iter().sum::<usize>() == sent).then_some(())).await;
    }
    let counts = replicas.counts();
    assert!(counts[0] <= 15, "{counts:?}");
    replicas.apps[0].release();
    for client in &mut clients {
        assert_eq!(client.response(false).await.status, 200);
    }
}

#[tokio::test]
async fn grpc_calls_of_one_connection_reach_all_endpoints() {
    let replicas = replicas::<2>("LeastRequest").await;
    let client = Http2::open(replicas.near.outbound()).await;
    for _ in 0..60 {
        assert_eq!(client.unary("Unary", b"x").await.unwrap().grpc_status(), Some("0"));
    }
    assert!(replicas.counts().iter().all(|count| *count > 0), "{:?}", replicas.counts());
}

#[tokio::test]
async fn an_endpoint_that_drains_gets_nothing_new_and_loses_nothing() {
    let mut replicas = replicas::<2>("RoundRobin").await;
    replicas.ask(10).await;
    let leaving = replicas.far.remove(0);
    let address = replicas.near.outbound();
    let load = tokio::spawn(async move {
        let mut client = Connection::open(address).await;
        for _ in 0..300 {
            let answer = client.ask(GET).await;
            assert_eq!((answer.status, answer.is_whole()), (200, true), "{}", answer.text());
        }
    });
    assert_eq!(leaving.drain().await, 0, "nothing was cut");
    load.await.unwrap();
    let gone = replicas.apps[0].count();
    replicas.ask(20).await;
    assert_eq!(replicas.apps[0].count(), gone);
}

fn workload(name: &str, address: SocketAddr, weight: u32) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {{address: {}, serviceAccount: catalog, labels: {{app: catalog}}, weight: {weight}, ports: {{main: {}}}}}\n",
        address.ip(),
        address.port()
    )
}

/// Workloads without sidecars, so that a weight can be given and an endpoint can be nobody.
async fn workloads(addresses: &[(SocketAddr, u32)], balancer: &str) -> (Sidecar, Mesh) {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let annotation = format!("outrigger.dev/load-balancer: {balancer}");
    mesh.service_with("catalog.shop", 80, addresses[0].0.port(), Some("http"), &annotation);
    for (index, (address, weight)) in addresses.iter().enumerate() {
        mesh.write(&format!("workload-{index}.yaml"), &workload(&format!("catalog-{index}"), *address, *weight));
    }
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    (near, mesh)
}

#[tokio::test]
async fn weights_divide_the_requests() {
    // LeastRequest goes by latency, too, which depends on the machine; its weights are tested beside it.
    for balancer in ["RoundRobin", "Random"] {
        let apps = Application::replicas::<2>("catalog").await;
        let (near, _mesh) = workloads(&[(apps[0].address(), 1), (apps[1].address(), 3)], balancer).await;
        let mut client = Connection::open(near.outbound()).await;
        for _ in 0..400 {
            assert_eq!(client.ask(GET).await.status, 200);
        }
        let counts = [apps[0].count(), apps[1].count()];
        let fair = if balancer == "RoundRobin" { 100..=100 } else { 40..=180 };
        assert!(fair.contains(&counts[0]), "{balancer}: {counts:?}");
    }
}

#[tokio::test]
async fn five_refused_connections_eject_and_no_request_fails() {
    let [alive, dead] = Backend::replicas::<2>().await;
    let (alive, dead) = (alive.stop(), dead.stop());
    let alive = Application::start_at("alive", alive).await;
    let (near, _mesh) = workloads(&[(alive.address(), 1), (dead, 1)], "RoundRobin").await;
    let mut client = Connection::open(near.outbound()).await;
    for _ in 0..12 {
        assert_eq!(client.ask(GET).await.status, 200, "another endpoint is tried");
    }
    let revived = Application::start_at("revived", dead).await;
    for _ in 0..20 {
        assert_eq!(client.ask(GET).await.status, 200);
    }
    assert_eq!((alive.count(), revived.count()), (32, 0), "left alone for 30 s");
}

#[tokio::test]
async fn five_failures_in_a_row_eject() {
    let apps = Application::replicas::<2>("catalog").await;
    let (near, _mesh) = workloads(&[(apps[0].address(), 1), (apps[1].address(), 1)], "RoundRobin").await;
    let mut client = Connection::open(near.outbound()).await;
    // Every second request fails on one endpoint: never twice in a row on either until one fails alone.
    for _ in 0..20 {
        client.ask("GET /status/500 HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    }
    let counts = [apps[0].count(), apps[1].count()];
    assert_eq!(counts.iter().sum::<usize>(), 20, "a 500 is an answer and is not asked again: {counts:?}");
    let more: Vec<u16> = wire_statuses(&near, 10).await;
    assert_eq!(more, [200; 10], "one endpoint is always left");
    let after = [apps[0].count() - counts[0], apps[1].count() - counts[1]];
    assert!(after.contains(&0), "one of the two is left alone: {after:?}");
}

async fn wire_statuses(near: &Sidecar, times: usize) -> Vec<u16> {
    let mut statuses = Vec::new();
    for _ in 0..times {
        statuses.push(wire::get(near.outbound(), "/").await.status);
    }
    statuses
}

#[tokio::test]
async fn tcp_connections_are_spread_by_how_many_are_open() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backends = Backend::replicas::<2>().await;
    mesh.service("queue.shop", 5672, backends[0].port(), Some("tcp"));
    let mut far = Vec::new();
    for (index, backend) in backends.iter().enumerate() {
        let name = format!("queue-{}", index + 1);
        far.push(mesh.sidecar(&name).label("app", "queue").inbound(backend.address()).start().await);
    }
    let near = mesh.sidecar("cart-1").outbound("queue:5672").start().await;
    let mut open = Vec::new();
    for expected in 1..=10 {
        open.push(Connection::open(near.outbound()).await);
        let labels = [("direction", "outbound")];
        eventually("it is open", async || {
            let opened = near.metrics().await.sum("outrigger_tcp_connections_opened_total", &labels);
            (opened == f64::from(expected)).then_some(())
        })
        .await;
    }
    let mut counts = [0, 0];
    for (count, backend) in counts.iter_mut().zip(&backends) {
        eventually("every connection arrives", async || {
            while backend.accepted().await.is_some() {
                *count += 1;
            }
            (*count == 5).then_some(())
        })
        .await;
    }
    assert_eq!(counts, [5, 5]);
}
