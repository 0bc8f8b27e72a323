//! Promise: a login that authenticates its connection (NTLM, Negotiate) works through a pair of sidecars, and serves the
//! client that made it and nobody else: from the client to the application the connections are then one to one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use outrigger_api::name::Protocol;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::{Http2, Http2Server};
use outrigger_tests::{Connection, Mesh, MeshOptions, Sidecar, wire};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The words that a server and its client use for a login.
#[derive(Clone, Copy, Debug)]
struct Words {
    status: &'static str,
    /// The field of the server's challenges; `{}` is the token of the second leg.
    challenge: &'static str,
    /// The field of the client's credentials.
    credentials: &'static str,
}

const WORDS: [Words; 6] = [
    Words { status: "401 Unauthorized", challenge: "WWW-Authenticate: NTLM {}", credentials: "Authorization: NTLM" },
    Words {
        status: "401 Unauthorized",
        challenge: "WWW-Authenticate: negotiate {}",
        credentials: "authorization: NEGOTIATE",
    },
    Words {
        status: "401 Unauthorized",
        challenge: "www-authenticate: Basic realm=\"a, b\", Negotiate {}, NTLM",
        credentials: "Authorization: Negotiate",
    },
    Words {
        status: "401 Unauthorized",
        challenge: "WWW-Authenticate: Bearer\r\nWWW-Authenticate: nTlM {}",
        credentials: "Authorization:  ntlm",
    },
    Words {
        status: "401 Unauthorized",
        challenge: "WWW-Authenticate: Kerberos {}",
        credentials: "Authorization: Kerberos",
    },
    Words {
        status: "407 Proxy Authentication Required",
        challenge: "Proxy-Authenticate: NTLM {}",
        credentials: "Proxy-Authorization: NTLM",
    },
];

/// A server that authenticates connections.
struct Guarded {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Guarded {
    async fn start(words: Words) -> Guarded {
        Guarded::start_at(words, "127.0.0.1:0".parse().unwrap()).await
    }

    async fn start_at(words: Words, address: SocketAddr) -> Guarded {
        let (address, listeners) = listeners(address).await;
        let connections = Arc::<AtomicUsize>::default();
        let mut serving = JoinSet::new();
        for listener in listeners {
            let count = connections.clone();
            serving.spawn(async move {
                let mut all = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    count.fetch_add(1, Relaxed);
                    all.spawn(guard(stream.into(), words));
                }
            });
        }
        Guarded { address, connections, _serving: serving }
    }
}

/// Where it is reached without a sidecar: an address of a Workload document belongs to no sidecar.
const BARE: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 5);

/// On this address, and at the same port on [`BARE`].
async fn listeners(address: SocketAddr) -> (SocketAddr, Vec<TcpListener>) {
    for _ in 0..100 {
        let first = TcpListener::bind(address).await.unwrap();
        let address = first.local_addr().unwrap();
        match TcpListener::bind((BARE, address.port())).await {
            Ok(bare) => return (address, vec![first, bare]),
            // The second endpoint of a service has the port of the first.
            Err(_) if address.ip() != std::net::Ipv4Addr::LOCALHOST => return (address, vec![first]),
            Err(_) => {}
        }
    }
    panic!("no port that is free on two loopback addresses");
}

async fn guard(mut client: Connection, words: Words) {
    let (mut challenged, mut authenticated) = (false, false);
    while let Ok(head) = client.try_take_until(b"\r\n\r\n").await {
        let head = wire::text(&head);
        let credentials = words.credentials.to_ascii_lowercase();
        let name = credentials.split(':').next().unwrap();
        let token = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name));
        let token = token.and_then(|line| line.rsplit(' ').next());
        let second_leg = match token {
            Some("first") => {
                challenged = true;
                "second"
            }
            Some("third") => {
                authenticated = std::mem::take(&mut challenged);
                ""
            }
            _ => "",
        };
        let answer = if authenticated {
            "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello alice".to_owned()
        } else {
            let challenge = words.challenge.replace(" {}", if second_leg.is_empty() { "" } else { " second" });
            format!("HTTP/1.1 {}\r\n{challenge}\r\nContent-Length: 0\r\n\r\n", words.status)
        };
        if client.try_send(answer).await.is_err() {
            return;
        }
    }
}

/// How a client comes to the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Through both sidecars, by the listener that means the service.
    Pair,
    /// Through both, by the forward proxy.
    Proxy,
    /// In plaintext to the sidecar of the server.
    Plaintext,
    /// To a server that has no sidecar.
    Unproved,
}

const WAYS: [Way; 4] = [Way::Pair, Way::Proxy, Way::Plaintext, Way::Unproved];

struct Field {
    near: Sidecar,
    far: Sidecar,
    app: SocketAddr,
    mesh: Mesh,
}

/// Connections to an application are given up early, unless they belong to somebody.
async fn field(app: SocketAddr) -> Field {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    mesh.service("plain.shop", 80, app.port(), Some("http"));
    mesh.write(
        "plain.yaml",
        &format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: plain, namespace: shop}}\nspec: \
             {{address: {BARE}, serviceAccount: plain, labels: {{app: plain}}, ports: {{main: {}}}}}\n",
            app.port()
        ),
    );
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).port(app.port(), Some(Protocol::Http));
    let far = far.limits(|limits| limits.application_pool_idle = Duration::from_millis(50)).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").outbound("plain:80").http_proxy();
    let near = near.limits(|limits| limits.mesh_pool_idle = Duration::from_millis(50)).start().await;
    Field { near, far, app, mesh }
}

impl Field {
    async fn client(&self, way: Way) -> Connection {
        let address = match way {
            Way::Pair => self.near.outbound(),
            Way::Proxy => self.near.http_proxy(),
            Way::Plaintext => self.far.address(&format!("inbound:{}", self.app.port())),
            Way::Unproved => self.near.address("outbound:plain.shop:80"),
        };
        Connection::open(address).await
    }
}

fn request(way: Way, fields: &str) -> String {
    let target = if way == Way::Proxy { "http://catalog/" } else { "/" };
    format!("GET {target} HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n")
}

/// The three legs. Panics unless the last one lets the client in.
async fn log_in(client: &mut Connection, way: Way, words: Words, name: &str) {
    let refused: u16 = words.status[..3].parse().unwrap();
    assert_eq!(client.ask(request(way, "")).await.status, refused, "{name}");
    let second = client.ask(request(way, &format!("{} first\r\n", words.credentials))).await;
    let tokens = second.headers.iter().any(|(_, value)| value.contains("second"));
    assert!(second.status == refused && tokens, "{name}: {second:?}");
    let third = client.ask(request(way, &format!("{} third\r\n", words.credentials))).await;
    assert_eq!((third.status, third.text().as_str()), (200, "hello alice"), "{name}");
}

#[tokio::test]
async fn a_login_of_a_connection_serves_its_client_alone() {
    for words in WORDS {
        let server = Guarded::start(words).await;
        let field = field(server.address).await;
        let refused: u16 = words.status[..3].parse().unwrap();
        for way in WAYS {
            // The forward proxy is who is meant by Proxy-Authorization.
            if way == Way::Proxy && words.credentials.starts_with("Proxy") {
                continue;
            }
            let name = format!("{way:?} {words:?}");
            let mut alice = field.client(way).await;
            log_in(&mut alice, way, words, &name).await;
            for _ in 0..3 {
                let mut stranger = field.client(way).await;
                for _ in 0..2 {
                    let answer = stranger.ask(request(way, "")).await;
                    assert_eq!((answer.status, answer.text().as_str()), (refused, ""), "{name}");
                }
            }
            // What is waited out here is the time for which a connection that nobody owns is kept.
            tokio::time::sleep(Duration::from_millis(150)).await;
            for _ in 0..3 {
                assert_eq!(alice.ask(request(way, "")).await.text(), "hello alice", "{name}");
            }
            // Two may be logged in beside each other, and a login goes with its client.
            let mut other = field.client(way).await;
            log_in(&mut other, way, words, &name).await;
            drop((alice, other));
            for _ in 0..3 {
                let answer = field.client(way).await.ask(request(way, "")).await;
                assert_eq!((answer.status, answer.text().as_str()), (refused, ""), "{name}");
            }
        }
    }
}

#[tokio::test]
async fn the_legs_of_a_login_use_one_connection() {
    for way in WAYS {
        let server = Guarded::start(WORDS[0]).await;
        let field = field(server.address).await;
        let mut alice = field.client(way).await;
        log_in(&mut alice, way, WORDS[0], &format!("{way:?}")).await;
        assert_eq!(alice.ask(request(way, "")).await.status, 200);
        assert_eq!(server.connections.load(Relaxed), 1, "{way:?}: the refusal belongs to the login as well");
    }
}

#[tokio::test]
async fn a_login_stays_at_the_endpoint_at_which_it_began() {
    let words = WORDS[0];
    let one = Guarded::start(words).await;
    let two = Guarded::start_at(words, SocketAddr::new([127, 0, 0, 2].into(), one.address.port())).await;
    let field = field(one.address).await;
    let _second = field.mesh.sidecar("catalog-2").label("app", "catalog").inbound(two.address).start().await;
    let mut met = [0; 2];
    for _ in 0..20 {
        let before = two.connections.load(Relaxed);
        for way in [Way::Pair, Way::Proxy] {
            let mut client = field.client(way).await;
            log_in(&mut client, way, words, "among two endpoints").await;
            for _ in 0..5 {
                assert_eq!(client.ask(request(way, "")).await.text(), "hello alice");
            }
        }
        met[usize::from(two.connections.load(Relaxed) > before)] += 1;
    }
    assert!(met.iter().all(|met| *met > 0), "both endpoints take part: {met:?}");
}

/// A client that is told that its connection lasts would go on as if it were logged in.
#[tokio::test]
async fn an_end_of_the_upstream_connection_is_told_to_a_client_that_logged_in() {
    let backend = Backend::start().await;
    let field = field(backend.address()).await;
    for way in [Way::Pair, Way::Proxy, Way::Plaintext] {
        let mut client = field.client(way).await;
        client.send(request(way, "Authorization: NTLM third\r\n")).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        app.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        let answer = client.response(false).await;
        assert_eq!((answer.text().as_str(), answer.header("connection")), ("ok", Some("close")), "{way:?}");
        client.expect_end().await;
    }
}

fn say(mut reply: SendResponse<Bytes>, body: &'static str) {
    let mut sending = reply.send_response(Response::new(()), false).unwrap();
    sending.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
}

/// On HTTP/2 such schemes do not work (RFC 9113 has many clients' requests on one connection), and are safe all the same:
/// a server that takes the connection for authenticated sees one client on it.
#[tokio::test]
async fn on_http2_credentials_of_a_connection_are_not_mixed_with_others() {
    let backend = Backend::start().await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, backend.port(), Some("http2"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let get = |credentials: Option<&str>| {
        let mut request = Request::get("http://catalog/");
        if let Some(credentials) = credentials {
            request = request.header("authorization", credentials);
        }
        request.body(()).unwrap()
    };
    let alice = Http2::open(near.outbound()).await;
    let bob = Http2::open(near.outbound()).await;
    let begun = bob.begin(get(None), true).await.unwrap();
    let mut shared = Http2Server::accept(&backend, |_| {}).await;
    say(shared.next().await.1, "shared");
    assert_eq!(begun.answer().await.unwrap().whole().await.unwrap().body, b"shared");

    let begun = alice.begin(get(Some("Negotiate token")), true).await.unwrap();
    let mut own = Http2Server::accept(&backend, |_| {}).await;
    say(own.next().await.1, "own");
    assert_eq!(begun.answer().await.unwrap().whole().await.unwrap().body, b"own");

    for (client, credentials, name) in [
        (&bob, None, "shared"),
        (&alice, None, "own"),
        (&alice, Some("NTLM token"), "own"),
        (&bob, Some("Bearer token"), "shared"),
    ] {
        let server = if name == "own" { &mut own } else { &mut shared };
        let begun = client.begin(get(credentials), true).await.unwrap();
        say(server.next().await.1, name);
        let whole = begun.answer().await.unwrap().whole().await.unwrap();
        assert_eq!((whole.status, whole.body.as_slice()), (StatusCode::OK, name.as_bytes()));
    }
    assert!(backend.accepted().await.is_none(), "one connection each");
}
