//! Promise: neither one identity, however many connections it makes, nor one address of callers that prove nothing takes
//! all inbound places of a sidecar. Whoever else calls is served, and what runs for the greedy one goes on.

use std::net::{Ipv4Addr, SocketAddr};

use outrigger_tests::peer::H1;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Peer, Sidecar, eventually};
use tokio::net::TcpSocket;

/// 32 of them are inbound, and one holder may have 24 of these.
const PLACES: usize = 40;
const MOST: usize = 24;
const REST: usize = 8;

const GET: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
const HOLD: &str = "GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n";

struct Field {
    mesh: Mesh,
    app: Application,
    sidecar: Sidecar,
}

impl Field {
    async fn new() -> Field {
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        let app = Application::start("catalog").await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
        let sidecar = builder.workers(2).limits(|limits| limits.connections = PLACES).start().await;
        Field { mesh, app, sidecar }
    }

    /// Inbound connections that are open, by who proved to be there.
    async fn open(&self, principal: Option<&str>) -> usize {
        let workers = self.sidecar.admin_get("/connections").await;
        let all = workers.as_array().unwrap().iter().flat_map(|worker| worker["connections"].as_array().unwrap());
        all.filter(|one| one["direction"] == "inbound" && one["principal"].as_str() == principal).count()
    }

    /// Another identity and a stranger come in, and are served as often as they ask.
    async fn serves_others(&self, how: &str) {
        let peer = Peer::issue(&self.mesh, "shop", "cart", "cart-1").await;
        let mut others = Vec::new();
        for number in 0..REST {
            let mut other = match number % 2 {
                0 => peer.connect(self.sidecar.inbound(), &[H1]).await.unwrap(),
                _ => from(Ipv4Addr::new(127, 0, 0, 9), self.sidecar.inbound()).await,
            };
            assert_eq!(other.ask(GET).await.status, 200, "{how}: {number}");
            others.push(other);
        }
        for other in &mut others {
            assert_eq!(other.ask(GET).await.status, 200, "{how}: again");
        }
    }
}

/// Plaintext from this address.
async fn from(source: Ipv4Addr, to: SocketAddr) -> Connection {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    let stream = socket.connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.into()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Greedy {
    Identity,
    Address,
}

impl Greedy {
    async fn connect(self, field: &Field, peer: &Peer) -> Connection {
        match self {
            Greedy::Identity => peer.connect(field.sidecar.inbound(), &[H1]).await.unwrap(),
            Greedy::Address => from(Ipv4Addr::new(127, 0, 0, 7), field.sidecar.inbound()).await,
        }
    }
}

const MALLORY: &str = "spiffe://outrigger.local/ns/evil/sa/mallory";

#[tokio::test]
async fn who_holds_connections_that_rest_loses_the_oldest_to_its_own_next() {
    let field = Field::new().await;
    let peer = Peer::issue(&field.mesh, "evil", "mallory", "mallory-1").await;
    for greedy in [Greedy::Identity, Greedy::Address] {
        let mut held = Vec::new();
        for number in 0..3 * MOST {
            let mut connection = greedy.connect(&field, &peer).await;
            assert_eq!(connection.ask(GET).await.status, 200, "{greedy:?}: {number}");
            held.push(connection);
        }
        let principal = (greedy == Greedy::Identity).then_some(MALLORY);
        eventually("the oldest have gone", async || (field.open(principal).await == MOST).then_some(())).await;
        field.serves_others(&format!("{greedy:?}")).await;
        assert_eq!(held.last_mut().unwrap().ask(GET).await.status, 200, "the last is open");
        drop(held);
        eventually("all have gone", async || (field.open(principal).await == 0).then_some(())).await;
    }
}

#[tokio::test]
async fn who_holds_connections_that_are_busy_gets_no_more() {
    let field = Field::new().await;
    let peer = Peer::issue(&field.mesh, "evil", "mallory", "mallory-1").await;
    for greedy in [Greedy::Identity, Greedy::Address] {
        field.app.hold();
        field.app.forget();
        let mut held = Vec::new();
        for _ in 0..MOST {
            let mut connection = greedy.connect(&field, &peer).await;
            connection.send(HOLD).await;
            held.push(connection);
            eventually("it runs", async || (field.app.count() == held.len()).then_some(())).await;
        }
        for _ in 0..5 {
            let mut connection = greedy.connect(&field, &peer).await;
            let _ = connection.try_send(HOLD).await;
            assert!(connection.take_to_end().await.0.is_empty(), "{greedy:?}: one more");
        }
        assert_eq!(field.app.count(), MOST);
        field.serves_others(&format!("{greedy:?}, busy")).await;
        field.app.release();
        for connection in &mut held {
            assert_eq!(connection.response(false).await.status, 200, "{greedy:?}: what runs goes on");
        }
    }
}
