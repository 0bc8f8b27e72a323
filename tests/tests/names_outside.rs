//! Promise: a name of the outside is reached through the forward proxy as a browser reaches it (RFC 8305): its addresses are
//! tried in turn, the next one beside one that has not connected for a moment, or at once behind one that failed; who connects
//! first serves, and nobody else gets a connection.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use outrigger_tests::mesh::PERMISSIVE;
use outrigger_tests::namespace::{Families, Namespace, installed};
use outrigger_tests::transparent::{TransparentMesh, TransparentSidecar};
use outrigger_tests::wire::{Connection, Response};
use outrigger_tests::{Application, under_test};

const PORT: u16 = 8080;
const NAME: &str = "host.example.org";
const PROXY: &str = "127.0.0.1:15080";

/// A caller with a forward proxy, and the outside on the hub.
async fn mesh() -> Option<TransparentMesh> {
    TransparentMesh::start(under_test!(), Families::Both, &["web"], PERMISSIVE).await
}

async fn proxy<'m>(mesh: &'m TransparentMesh, addresses: &[IpAddr]) -> TransparentSidecar<'m> {
    let web = mesh.at("web");
    web.file("/etc/nsswitch.conf", "hosts: files\n");
    web.hosts(&addresses.iter().map(|address| (*address, NAME)).collect::<Vec<_>>());
    // One worker, so that one pool serves all.
    let mut sidecar = mesh.start_sidecar(web, "web", &["--http-proxy", PROXY, "--workers", "1"]);
    sidecar.process.ready().await;
    sidecar.is_ready().await;
    sidecar
}

/// On a connection of its own, as an absolute-form request.
async fn get(web: &Namespace) -> Response {
    let mut client = web.connect(PROXY.parse().unwrap()).await;
    client.ask(format!("GET http://{NAME}:{PORT}/ HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

/// In a tunnel of its own, which goes when it is dropped. The first words come with it, so that nobody waits for them.
async fn tunnel(web: &Namespace, words: &str) -> (Response, Connection) {
    let mut client = web.connect(PROXY.parse().unwrap()).await;
    client.send(format!("CONNECT {NAME}:{PORT} HTTP/1.1\r\nHost: {NAME}:{PORT}\r\n\r\n{words}")).await;
    let head = client.take_until(b"\r\n\r\n").await;
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", outrigger_tests::wire::text(&head));
    (client.response(false).await, client)
}

const HTTP: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
/// What is not HTTP has a connection of its own. The application, which takes nothing else, answers it with 400.
const OPAQUE: &str = "\0\r\n\r\n";

fn serve(at: &Namespace, ip: impl Into<IpAddr>, name: &str) -> Application {
    Application::serve(name, at.listen(SocketAddr::new(ip.into(), PORT)))
}

#[tokio::test]
async fn what_refuses_is_passed_over() {
    let Some(mesh) = mesh().await else { return };
    let (web, hub) = (mesh.at("web"), mesh.network.hub());
    // Nobody listens at the first three of either family, nor is there a way to some.
    hub.run("ip addr add 10.77.0.100/24 dev link0; ip -6 addr add fd77::100/64 dev link0 nodad");
    let dead = ["fd77::100", "2001:db8::9", "10.77.0.100", "203.0.113.9"];
    let mut addresses: Vec<IpAddr> = dead.map(|ip| ip.parse().unwrap()).to_vec();
    addresses.push(hub.v4().into());
    let _proxy = proxy(&mesh, &addresses).await;
    let alive = serve(hub, hub.v4(), "alive");
    for round in 0..8 {
        let answer = get(web).await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("alive")), "{round}: {}", answer.text());
        let (answer, _client) = tunnel(web, HTTP).await;
        assert_eq!((answer.status, answer.header("x-app")), (200, Some("alive")), "{round}: {}", answer.text());
        assert_eq!(tunnel(web, OPAQUE).await.0.status, 400, "{round}");
    }
    assert_eq!(alive.count(), 16, "each was asked once");
}

#[tokio::test]
async fn what_does_not_answer_is_not_waited_for() {
    if !installed(&["nft"]) {
        return;
    }
    // Which of the two the resolver puts first is its own affair.
    for silent_is_six in [true, false] {
        let Some(mesh) = mesh().await else { return };
        let (web, hub) = (mesh.at("web"), mesh.network.hub());
        let _proxy = proxy(&mesh, &[hub.v6().into(), hub.v4().into()]).await;
        let mut apps = [serve(hub, hub.v4(), "four"), serve(hub, hub.v6(), "six")];
        if silent_is_six {
            apps.reverse();
        }
        let [silent, alive] = apps;
        let to = match silent.address().ip() {
            IpAddr::V4(ip) => format!("ip daddr {ip}"),
            IpAddr::V6(ip) => format!("ip6 daddr {ip}"),
        };
        hub.run(&format!(
            "nft 'add table inet hole; add chain inet hole c {{ type filter hook prerouting priority -400; }}; add rule inet \
             hole c {to} tcp dport {PORT} counter drop'"
        ));
        let begun = Instant::now();
        // One connection serves them: a name that has one is not dialled again, neither here nor there.
        for _ in 0..8 {
            assert_eq!(get(web).await.status, 200);
        }
        assert_eq!((alive.connections(), silent.connections()), (1, 0));
        let dropped = hub.run("nft list table inet hole");
        assert!(dropped.contains("counter packets 1 ") || dropped.contains("counter packets 0 "), "{dropped}");
        assert!(begun.elapsed() < Duration::from_secs(4), "before we give up: {:?}", begun.elapsed());
        for opened in 2..=4 {
            let (answer, _client) = tunnel(web, OPAQUE).await;
            assert_eq!((answer.status, alive.connections(), silent.connections()), (400, opened, 0));
        }
    }
}

#[tokio::test]
async fn where_both_answer_one_gets_a_connection() {
    let Some(mesh) = mesh().await else { return };
    let (web, hub) = (mesh.at("web"), mesh.network.hub());
    let _proxy = proxy(&mesh, &[hub.v4().into(), hub.v6().into()]).await;
    let apps = [serve(hub, hub.v4(), "four"), serve(hub, hub.v6(), "six")];
    for _ in 0..4 {
        assert_eq!(get(web).await.status, 200);
    }
    let (answer, _client) = tunnel(web, HTTP).await;
    assert_eq!(answer.status, 200);
    let mut connections = apps.each_ref().map(Application::connections);
    connections.sort_unstable();
    assert_eq!(connections, [0, 1], "what is pooled serves a tunnel's request as well");
    for _ in 0..4 {
        assert_eq!(tunnel(web, OPAQUE).await.0.status, 400);
    }
    let mut connections = apps.each_ref().map(Application::connections);
    connections.sort_unstable();
    assert_eq!(connections, [0, 5], "one for each, and none at the other");
}

#[tokio::test]
async fn when_none_answers_that_is_said() {
    let Some(mesh) = mesh().await else { return };
    let (web, hub) = (mesh.at("web"), mesh.network.hub());
    let _proxy = proxy(&mesh, &[hub.v4().into(), hub.v6().into()]).await;
    let begun = Instant::now();
    let answer = get(web).await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"), "{}", answer.text());
    assert!(begun.elapsed() < Duration::from_secs(4), "at once: {:?}", begun.elapsed());
}
