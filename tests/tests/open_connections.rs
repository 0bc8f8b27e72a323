//! Promise: every open connection is judged again when a certificate, the trust bundle or the mTLS mode moves, and is gone
//! within seconds when it would not be let in any more, whatever its peer does. Opaque bytes alone outlive a certificate.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use outrigger_tests::application::Backend;
use outrigger_tests::eventually::within;
use outrigger_tests::mesh::{PERMISSIVE, STRICT};
use outrigger_tests::peer::{Authority, H1, H2, TCP};
use outrigger_tests::wire::Connection;
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, Sidecar, eventually};

#[expect(dead_code, reason = "written for another promise, of which this one needs less")]
#[path = "hostile_http2/frames.rs"]
mod frames;

use frames::Client;

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";
const HOLD: &str = "GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n";
/// Five seconds are promised; the machine that runs the tests may be busy with others.
const GONE: Duration = Duration::from_secs(15);

/// HTTP and an opaque port behind one sidecar.
struct Served {
    app: Application,
    raw: Backend,
    /// Its protocol is not declared.
    any: Backend,
    sidecar: Sidecar,
    mesh: Mesh,
}

async fn served(yaml: &str) -> Served {
    let mesh = Mesh::start(MeshOptions { yaml: yaml.to_owned(), ..MeshOptions::default() }).await;
    let (app, raw, any) = (Application::start("catalog").await, Backend::start().await, Backend::start().await);
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    mesh.service("queue.shop", 5672, raw.port(), Some("tcp"));
    let builder = mesh.sidecar("catalog-1").label("app", "catalog");
    let builder = builder.inbound(app.address()).inbound(raw.address()).inbound(any.address());
    let builder = builder.port(app.port(), Some(outrigger_api::name::Protocol::Http));
    let builder = builder.port(raw.port(), Some(outrigger_api::name::Protocol::Tcp));
    let sidecar = builder.outbound("catalog:80").start().await;
    Served { app, raw, any, sidecar, mesh }
}

impl Served {
    fn port(&self, port: u16) -> SocketAddr {
        self.sidecar.address(&format!("inbound:{port}"))
    }

    fn http(&self) -> SocketAddr {
        self.port(self.app.port())
    }

    /// A connection that bytes have passed on, with the application's end of it.
    async fn opaque(&self, peer: Option<&Peer>) -> (Connection, Connection) {
        let address = self.port(self.raw.port());
        let mut client = match peer {
            Some(peer) => peer.connect(address, &[TCP]).await.unwrap(),
            None => Connection::open(address).await,
        };
        client.send(b"\x00\x01").await;
        let mut server = self.raw.accept().await;
        assert_eq!(server.take(2).await, b"\x00\x01");
        (client, server)
    }

    /// HTTP/2 on which a request was answered; the PING of a GOAWAY stays unanswered.
    async fn http2(&self, connection: Connection) -> Client {
        let mut client = Client::open(connection, &[]).await;
        client.send(frames::get(1, "/")).await;
        client.until("an answer", |heard| heard.answered_200(1)).await;
        client
    }
}

/// Ends by itself within the time; what came before is not looked at.
async fn is_gone(what: &str, connection: &mut Connection) {
    let ended = async { while let Ok(Some(_)) = connection.read_some().await {} };
    assert!(tokio::time::timeout(GONE, ended).await.is_ok(), "{what} is open still");
}

async fn lives(client: &mut Connection, server: &mut Connection) {
    client.send(b"ping").await;
    assert_eq!(server.take(4).await, b"ping");
    server.send(b"pong").await;
    assert_eq!(client.take(4).await, b"pong");
}

#[tokio::test]
async fn the_end_of_a_certificate_is_the_end_of_http_on_its_connections() {
    let served = served(STRICT).await;
    let end = SystemTime::now() + Duration::from_secs(4);
    let peer = Authority::of(&served.mesh).leaf(&[CART], |params| params.not_after = end.into());
    let mut idle = peer.connect(served.http(), &[H1]).await.unwrap();
    assert_eq!(idle.ask(GET).await.status, 200);
    let mut busy = peer.connect(served.http(), &[H1]).await.unwrap();
    busy.send(HOLD).await;
    let mut silent = served.http2(peer.connect(served.http(), &[H2]).await.unwrap()).await;
    silent.send(frames::get(3, "/hold")).await;
    let mut greedy = served.http2(peer.connect(served.http(), &[H2]).await.unwrap()).await;
    let (mut client, mut server) = served.opaque(Some(&peer)).await;

    let mut stream = 1;
    let gone = eventually("the connection that asks on and on ends", async || {
        stream += 2;
        greedy.try_send(frames::get(stream, "/")).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        greedy.heard().ended.then(SystemTime::now)
    })
    .await;
    let after = gone.duration_since(end).expect("not before the certificate does");
    assert!(after < GONE, "{after:?}");
    is_gone("HTTP/1.1 between requests", &mut idle).await;
    is_gone("HTTP/1.1 with a request that runs", &mut busy).await;
    silent.until("HTTP/2 with a stream ends", |heard| heard.ended).await;
    lives(&mut client, &mut server).await;
    eventually("the requests that were cut say why", async || {
        let samples = served.sidecar.metrics().await;
        (samples.sum("outrigger_http_requests_total", &[("reason", "peer_certificate")]) == 2.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_peer_that_ignores_goaway() {
    let served = served(STRICT).await;
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    let mut client = served.http2(peer.connect(served.http(), &[H2]).await.unwrap()).await;
    client.send(frames::get(3, "/hold")).await;
    eventually("in flight", async || (served.app.count() == 2).then_some(())).await;
    let begun = Instant::now();
    let Served { app, sidecar, mesh: _mesh, .. } = served;
    let (cut, ()) = tokio::join!(sidecar.drain(), async {
        let heard = client.until("GOAWAY", |heard| heard.goaway.is_some()).await;
        assert_eq!(heard.pongs, 0);
        let mut stream = 3;
        eventually("new streams are refused, so that they can go elsewhere", async || {
            stream += 2;
            client.try_send(frames::get(stream, "/late")).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let heard = client.heard();
            assert!(!heard.ended, "a stream runs still");
            heard.resets.iter().any(|(_, code)| *code == 7).then_some(())
        })
        .await;
        app.release();
        client.until("what ran is answered", |heard| heard.answered_200(3)).await;
        client.until("and that was all", |heard| heard.ended).await;
    });
    assert_eq!(cut, 0);
    assert!(begun.elapsed() < Duration::from_secs(25), "the drain has 30 s: {:?}", begun.elapsed());
}

/// A workload whose sidecar is the test, with a certificate of another authority.
struct Elsewhere {
    peer: Peer,
    http: Backend,
    raw: Backend,
}

impl Elsewhere {
    async fn start(mesh: &Mesh, authority: &Authority) -> Elsewhere {
        let peer = authority.leaf(&["spiffe://outrigger.local/ns/shop/sa/pay"], |_| {});
        let (http, raw) = (Backend::start().await, Backend::start().await);
        let text = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: pay-1, namespace: shop, labels: \
             {{app: pay}}}}\nspec: {{address: 127.0.0.1, serviceAccount: pay, mesh: true, ports: {{http: {}, raw: \
             {}}}}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: pay, namespace: shop}}\nspec:\n  selector: \
             {{app: pay}}\n  ports:\n  - {{name: http, port: 80, targetPort: http, appProtocol: http}}\n  - {{name: \
             raw, port: 90, targetPort: raw, appProtocol: tcp}}\n",
            http.port(),
            raw.port()
        );
        mesh.write("pay.yaml", &text);
        Elsewhere { peer, http, raw }
    }
}

#[tokio::test]
async fn a_root_that_leaves_the_bundle_takes_its_connections_with_it() {
    let served = served(STRICT).await;
    let other = Authority::new();
    let trust = served.mesh.path("control-plane/ca/trust");
    std::fs::create_dir_all(&trust).unwrap();
    std::fs::write(trust.join("other.pem"), &other.pem).unwrap();
    let elsewhere = Elsewhere::start(&served.mesh, &other).await;
    served.mesh.stop_control_plane().await;
    served.mesh.start_control_plane().await;
    let near = served.mesh.sidecar("cart-1").outbound("pay:80").outbound("pay:90").outbound("catalog:80").start().await;

    // Inbound, by a peer of the other root and by one of the mesh's own.
    let peer = other.leaf(&["spiffe://outrigger.local/ns/bank/sa/admin"], |_| {});
    eventually("the other root is believed", async || {
        let mut connection = peer.connect(served.http(), &[H1]).await.ok()?;
        connection.try_send(GET).await.ok()?;
        connection.try_response(false).await.ok()
    })
    .await;
    let mut idle = peer.connect(served.http(), &[H1]).await.unwrap();
    assert_eq!(idle.ask(GET).await.status, 200);
    let mut busy = peer.connect(served.http(), &[H1]).await.unwrap();
    busy.send(HOLD).await;
    let http2 = served.http2(peer.connect(served.http(), &[H2]).await.unwrap()).await;
    let (mut client, _server) = served.opaque(Some(&peer)).await;
    let own = Peer::issue(&served.mesh, "shop", "web", "web-1").await;
    let mut own_http = own.connect(served.http(), &[H1]).await.unwrap();
    assert_eq!(own_http.ask(GET).await.status, 200);
    let (mut own_client, mut own_server) = served.opaque(Some(&own)).await;
    let mut through = Connection::open(near.address("outbound:catalog.shop:80")).await;
    assert_eq!(through.ask(GET).await.status, 200);

    // Outbound, to a workload of the other root: in use, pooled, opaque.
    let pay = near.address("outbound:pay.shop:80");
    let mut asking = Connection::open(pay).await;
    asking.send(GET).await;
    let mut asked = elsewhere.peer.accept(elsewhere.http.accept().await, &[H1]).await.unwrap();
    asked.take_until(b"\r\n\r\n").await;
    let mut pooling = Connection::open(pay).await;
    pooling.send(GET).await;
    let mut pooled = elsewhere.peer.accept(elsewhere.http.accept().await, &[H1]).await.unwrap();
    pooled.take_until(b"\r\n\r\n").await;
    pooled.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(pooling.response(false).await.status, 200);
    let mut talking = Connection::open(near.address("outbound:pay.shop:90")).await;
    talking.send(b"\x00\x01").await;
    let mut talked = elsewhere.peer.accept(elsewhere.raw.accept().await, &[TCP]).await.unwrap();
    assert_eq!(talked.take(2).await, b"\x00\x01");

    std::fs::remove_file(trust.join("other.pem")).unwrap();
    served.mesh.stop_control_plane().await;
    served.mesh.start_control_plane().await;
    is_gone("inbound HTTP/1.1 between requests", &mut idle).await;
    is_gone("inbound HTTP/1.1 with a request that runs", &mut busy).await;
    http2.until("inbound HTTP/2 ends", |heard| heard.ended).await;
    is_gone("an inbound opaque connection", &mut client).await;
    is_gone("an outbound connection in use", &mut asked).await;
    is_gone("an outbound pooled connection", &mut pooled).await;
    is_gone("an outbound opaque connection", &mut talked).await;
    is_gone("its client's", &mut talking).await;
    assert!(asking.response(false).await.status >= 500, "what was asked there is answered by the sidecar");

    assert_eq!(own_http.ask(GET).await.status, 200, "who is believed by another root notices nothing");
    lives(&mut own_client, &mut own_server).await;
    assert_eq!(through.ask(GET).await.status, 200);
    let refused = peer.connect(served.http(), &[H1]).await;
    if let Ok(mut connection) = refused {
        let _ = connection.try_send(GET).await;
        assert!(connection.try_response(false).await.is_err(), "a new connection of the removed root");
    }
}

/// Plaintext connections of every kind.
#[tokio::test]
async fn a_port_that_becomes_strict_keeps_nobody_who_proved_nothing() {
    let on_its_port = |served: &Served| {
        let ports = [served.app.port(), served.raw.port(), served.any.port()];
        let ports = ports.map(|port| format!("{port}: {{mode: STRICT}}")).join(", ");
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {{name: ports, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: catalog}}}}, portLevelMtls: {{{ports}}}}}\n"
        )
    };
    for by_port in [false, true] {
        let served = served(PERMISSIVE).await;
        let mut idle = Connection::open(served.http()).await;
        assert_eq!(idle.ask(GET).await.status, 200);
        let mut busy = Connection::open(served.http()).await;
        busy.send(HOLD).await;
        let http2 = served.http2(Connection::open(served.http()).await).await;
        let mut http2_busy = served.http2(Connection::open(served.http()).await).await;
        http2_busy.send(frames::get(3, "/hold")).await;
        let (mut opaque, _opaque_server) = served.opaque(None).await;
        let mut half_a_head = Connection::open(served.http()).await;
        half_a_head.send("GET / HT").await;
        let mut silent = Connection::open(served.http()).await;
        let any = served.port(served.any.port());
        // The application is opened for a client that is silent, and one that waits for it may be greeted.
        let mut greeted = Connection::open(any).await;
        let mut greeter = served.any.accept().await;
        greeter.send(b"220 hello\r\n").await;
        assert_eq!(greeted.take(11).await, b"220 hello\r\n");
        let foreign = Authority::new().leaf(&["https://bank.test"], |_| {});
        let stranger = Peer::without_certificate();
        let (dialled, accepted) = tokio::join!(stranger.connect(served.port(served.raw.port()), &["h2"]), async {
            foreign.accept(served.raw.accept().await, &["h2"]).await
        });
        let (mut tls, _tls_server) = (dialled.unwrap(), accepted.unwrap());
        let mut undecided = Connection::open(any).await;
        eventually("its connection is looked at", async || {
            let workers = served.sidecar.admin_get("/connections").await;
            (workers[0]["connections"].as_array().map_or(0, Vec::len) >= 10).then_some(())
        })
        .await;
        // What may stay: a peer of the mesh, and the workload itself.
        let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
        let mut mutual = peer.connect(served.http(), &[H1]).await.unwrap();
        assert_eq!(mutual.ask(GET).await.status, 200);
        let mut own = Connection::open(served.sidecar.outbound()).await;
        let before = served.app.count();
        own.send(HOLD).await;
        eventually("the workload calls itself", async || (served.app.count() > before).then_some(())).await;

        if by_port {
            served.mesh.write("ports.yaml", &on_its_port(&served));
        } else {
            served.mesh.write("mesh.yaml", STRICT);
        }
        is_gone("HTTP/1.1 between requests", &mut idle).await;
        is_gone("HTTP/1.1 with a request that runs", &mut busy).await;
        http2.until("HTTP/2 ends", |heard| heard.ended).await;
        http2_busy.until("HTTP/2 with a stream ends", |heard| heard.ended).await;
        is_gone("an opaque connection", &mut opaque).await;
        is_gone("half a head", &mut half_a_head).await;
        is_gone("a silent one on a port declared as HTTP", &mut silent).await;
        is_gone("one whose server spoke first", &mut greeted).await;
        is_gone("TLS of the application's own", &mut tls).await;
        is_gone("an undecided one", &mut undecided).await;
        assert_eq!(mutual.ask(GET).await.status, 200);
        served.app.release();
        assert_eq!(own.response(false).await.status, 200);
        eventually("what was cut says why", async || {
            let samples = served.sidecar.metrics().await;
            let of = |metric| samples.sum(metric, &[("reason", "mtls_required"), ("direction", "inbound")]);
            (of("outrigger_http_requests_total") >= 2.0 && of("outrigger_tcp_connections_closed_total") >= 4.0)
                .then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_port_where_mutual_tls_is_disabled_keeps_none_of_it() {
    let served = served(PERMISSIVE).await;
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    let mut idle = peer.connect(served.http(), &[H1]).await.unwrap();
    assert_eq!(idle.ask(GET).await.status, 200);
    let mut busy = peer.connect(served.http(), &[H1]).await.unwrap();
    busy.send(HOLD).await;
    let http2 = served.http2(peer.connect(served.http(), &[H2]).await.unwrap()).await;
    let (mut opaque, _server) = served.opaque(Some(&peer)).await;
    let mut plaintext = Connection::open(served.http()).await;
    assert_eq!(plaintext.ask(GET).await.status, 200);
    served.mesh.write("mesh.yaml", &PERMISSIVE.replace("PERMISSIVE", "DISABLE"));
    is_gone("HTTP/1.1 between requests", &mut idle).await;
    is_gone("HTTP/1.1 with a request that runs", &mut busy).await;
    http2.until("HTTP/2 ends", |heard| heard.ended).await;
    is_gone("an opaque connection", &mut opaque).await;
    assert_eq!(plaintext.ask(GET).await.status, 200);
    within(GONE, "new ones are refused", async || {
        let Ok(mut connection) = peer.connect(served.http(), &[H1]).await else { return Some(()) };
        let _ = connection.try_send(GET).await;
        connection.try_response(false).await.is_err().then_some(())
    })
    .await;
}
