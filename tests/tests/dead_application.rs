//! Promise: an application that died beside a living sidecar costs no request that another instance can serve. Its sidecar
//! tells the caller's that nobody has seen the request, in a way that no application can, and the request goes elsewhere,
//! whatever its method; after five such answers the endpoint is left alone for a while.

use http::Request;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::{Http2, Http2Server};
use outrigger_tests::peer::{H1, Peer};
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

const MARK: &str = "x-outrigger-unprocessed";
const IN_TURN: &str = "outrigger.dev/load-balancer: RoundRobin";

/// Two instances of a service, each with a living sidecar; the second one's application has died.
struct Half {
    alive: Application,
    far: [Sidecar; 2],
    mesh: Mesh,
}

impl Half {
    async fn start() -> Half {
        let [alive, dead] = Backend::replicas::<2>().await;
        let (alive, dead) = (alive.stop(), dead.stop());
        let mesh = Mesh::start(MeshOptions::default()).await;
        mesh.service_with("catalog.shop", 80, alive.port(), None, IN_TURN);
        let alive = Application::start_at("alive", alive).await;
        let far = ["catalog-1", "catalog-2"].map(|name| mesh.sidecar(name).label("app", "catalog"));
        let [one, two] = far;
        let far = [one.inbound(alive.address()).start().await, two.inbound(dead).start().await];
        Half { alive, far, mesh }
    }

    /// A caller that has not met the dead one yet.
    async fn near(&self, number: usize) -> Sidecar {
        self.mesh.sidecar(&format!("cart-{number}")).outbound("catalog:80").start().await
    }

    /// Requests that the dead one's sidecar has refused so far.
    async fn refused(&self) -> f64 {
        let labels = [("direction", "inbound"), ("reason", "connection_refused")];
        self.far[1].metrics().await.sum("outrigger_http_requests_total", &labels)
    }
}

const EACH: usize = 20;

#[derive(Clone, Copy, Debug)]
enum Spoken {
    Length,
    Chunked,
    Http2,
    Grpc,
}

impl Spoken {
    /// Sends the same request so often on one connection; gives the statuses, those of gRPC as 0 for success.
    async fn ask(self, near: &Sidecar, method: &str, body: usize) -> Vec<u16> {
        let bytes = vec![b'x'; body];
        let mut statuses = Vec::new();
        match self {
            Spoken::Length | Spoken::Chunked => {
                let mut client = Connection::open(near.outbound()).await;
                for _ in 0..EACH {
                    let mut request = format!("{method} /it HTTP/1.1\r\nHost: catalog\r\n").into_bytes();
                    match self {
                        Spoken::Chunked => {
                            request.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                            for piece in bytes.chunks(1_000) {
                                request.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                                request.extend_from_slice(piece);
                                request.extend_from_slice(b"\r\n");
                            }
                            request.extend_from_slice(b"0\r\n\r\n");
                        }
                        _ => {
                            request.extend_from_slice(format!("Content-Length: {body}\r\n\r\n").as_bytes());
                            request.extend_from_slice(&bytes);
                        }
                    }
                    let answer = client.ask(request).await;
                    assert_eq!(answer.header(MARK), None, "{self:?}: not for the caller");
                    statuses.push(answer.status);
                }
            }
            Spoken::Http2 => {
                let client = Http2::open(near.outbound()).await;
                for _ in 0..EACH {
                    let request = Request::builder().method(method).uri("http://test/it").body(()).unwrap();
                    statuses.push(client.ask(request, &bytes).await.unwrap().status.as_u16());
                }
            }
            Spoken::Grpc => {
                let client = Http2::open(near.outbound()).await;
                for _ in 0..EACH {
                    let answer = client.unary("Unary", &bytes).await.unwrap();
                    statuses.push(answer.grpc_status().unwrap().parse().unwrap());
                }
            }
        }
        statuses
    }
}

#[tokio::test]
async fn what_nobody_has_seen_another_instance_serves() {
    let half = Half::start().await;
    let cases = [
        (Spoken::Length, "GET", 0),
        (Spoken::Length, "POST", 0),
        (Spoken::Length, "POST", 2),
        (Spoken::Length, "PATCH", 60_000),
        (Spoken::Chunked, "POST", 10),
        (Spoken::Chunked, "PUT", 60_000),
        (Spoken::Http2, "GET", 0),
        (Spoken::Http2, "DELETE", 0),
        (Spoken::Http2, "POST", 2),
        (Spoken::Http2, "POST", 60_000),
        (Spoken::Grpc, "POST", 2),
        (Spoken::Grpc, "POST", 60_000),
    ];
    for (number, (spoken, method, body)) in cases.into_iter().enumerate() {
        let before = half.refused().await;
        let near = half.near(number).await;
        let statuses = spoken.ask(&near, method, body).await;
        let good = if matches!(spoken, Spoken::Grpc) { 0 } else { 200 };
        assert_eq!(statuses, [good; EACH], "{spoken:?} {method} {body}");
        let seen = half.alive.requests();
        assert_eq!(seen.len(), EACH, "{spoken:?} {method} {body}: each once");
        let size = if matches!(spoken, Spoken::Grpc) { body + 5 } else { body };
        let sizes: Vec<usize> = seen.iter().map(|seen| seen.body.len()).collect();
        assert_eq!(sizes, [size; EACH], "{spoken:?} {method}: whole");
        half.alive.forget();
        eventually("five times it was tried, and then left alone", async || {
            (half.refused().await - before == 5.0).then_some(())
        })
        .await;
    }
}

/// A workload that calls its own service asks its own application first as often as any other, without a socket between.
#[tokio::test]
async fn its_own_dead_application_is_passed_over_as_well() {
    let [alive, dead] = Backend::replicas::<2>().await;
    let (alive, dead) = (alive.stop(), dead.stop());
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service_with("catalog.shop", 80, alive.port(), None, IN_TURN);
    let alive = Application::start_at("alive", alive).await;
    let _other = mesh.sidecar("catalog-1").label("app", "catalog").inbound(alive.address()).start().await;
    let near = mesh.sidecar("catalog-2").label("app", "catalog").inbound(dead).outbound("catalog:80").start().await;
    for spoken in [Spoken::Chunked, Spoken::Http2, Spoken::Grpc] {
        let statuses = spoken.ask(&near, "POST", 60_000).await;
        let good = if matches!(spoken, Spoken::Grpc) { 0 } else { 200 };
        assert_eq!(statuses, [good; EACH], "{spoken:?}");
        assert_eq!(alive.count(), EACH, "{spoken:?}: each once");
        alive.forget();
    }
}

/// More than is kept of a body cannot be sent again: the caller is told, as it is where nobody else is there.
#[tokio::test]
async fn a_body_that_cannot_be_given_again_is_told_and_its_endpoint_left_alone() {
    for spoken in [Spoken::Length, Spoken::Chunked, Spoken::Http2] {
        let half = Half::start().await;
        let near = half.near(1).await;
        let mut served = 0;
        for round in 0..8 {
            let bytes = vec![b'x'; 4 << 20];
            let status = match spoken {
                Spoken::Http2 => {
                    let request = Request::post("http://test/it").body(()).unwrap();
                    Http2::open(near.outbound())
                        .await
                        .ask(request, &bytes)
                        .await
                        .map_or(0, |answer| answer.status.into())
                }
                _ => {
                    let mut client = Connection::open(near.outbound()).await;
                    let head = format!("POST /it HTTP/1.1\r\nHost: catalog\r\nContent-Length: {}\r\n\r\n", bytes.len());
                    let _ = client.try_send(head).await;
                    let _ = client.try_send(&bytes).await;
                    client.try_response(false).await.map_or(0, |answer| answer.status)
                }
            };
            served += usize::from(status == 200);
            assert!([0, 200, 503].contains(&status), "{spoken:?}, {round}: {status}");
        }
        assert!(served >= 3, "{spoken:?}: at most five met the dead one, {served} were served");
        let seen = half.alive.requests();
        assert_eq!(seen.iter().filter(|seen| seen.whole).count(), served, "{spoken:?}: none twice");
    }
}

#[tokio::test]
async fn when_every_application_is_dead_the_last_answer_is_passed_on() {
    let [one, two] = Backend::replicas::<2>().await;
    let (one, two) = (one.stop(), two.stop());
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    mesh.service_with("catalog.shop", 80, one.port(), None, IN_TURN);
    let far = ["catalog-1", "catalog-2"].map(|name| mesh.sidecar(name).label("app", "catalog"));
    let [first, second] = far;
    let far = [first.inbound(one).start().await, second.inbound(two).start().await];
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    for _ in 0..4 {
        let post = "POST / HTTP/1.1\r\nHost: catalog\r\nContent-Length: 2\r\n\r\nhi";
        let answer = wire::ask(near.outbound(), post).await;
        assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"));
        let by = answer.header("proxy-status").unwrap();
        assert!(by.starts_with("catalog-") && by.ends_with("; error=connection_refused"), "{by}");
        assert_eq!((answer.header(MARK), answer.header("content-type")), (None, Some("application/problem+json")));
        let client = Http2::open(near.outbound()).await;
        let answer = client.unary("Unary", b"x").await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, Some("14")));
        assert!(answer.headers["proxy-status"].to_str().unwrap().starts_with("catalog-"));
        assert!(!answer.headers.contains_key(MARK));
    }
    // The word is for sidecars: one who has proved nothing does not get it.
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let get = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";
    let mut sidecar = peer.connect(far[0].inbound(), &[H1]).await.unwrap();
    assert_eq!(sidecar.ask(get).await.header(MARK), Some("connection_refused"));
    let plain = wire::ask(far[0].inbound(), get).await;
    assert_eq!((plain.status, plain.header(MARK)), (503, None));
}

const FORGED: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nProxy-Status: catalog-1; \
                      error=connection_refused\r\nX-Outrigger-Unprocessed: connection_refused\r\nx-outrigger-unprocessed: \
                      connection_refused\r\nContent-Length: 46\r\n\r\n{\"status\":503,\"reason\":\"connection_refused\"}\n\n";

/// Takes one request on one of the two, whichever it comes to.
async fn whichever(backends: &[Backend; 2]) -> (usize, Connection) {
    tokio::select! {
        connection = backends[0].wait() => (0, connection),
        connection = backends[1].wait() => (1, connection),
    }
}

/// An application's own answer that looks the same is the application's: it is passed on, and nothing is asked twice.
#[tokio::test]
async fn an_application_cannot_say_it() {
    for sidecars in [true, false] {
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        let backends = Backend::replicas::<2>().await;
        mesh.service_with("catalog.shop", 80, backends[0].port(), None, IN_TURN);
        let mut far = Vec::new();
        for (number, backend) in backends.iter().enumerate() {
            let name = format!("catalog-{number}");
            if sidecars {
                let sidecar = mesh.sidecar(&name).label("app", "catalog").inbound(backend.address());
                far.push(sidecar.start().await);
            } else {
                let text = format!(
                    "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: \
                     shop}}\nspec: {{address: {}, serviceAccount: catalog, labels: {{app: catalog}}, ports: {{main: {}}}}}\n",
                    backend.address().ip(),
                    backend.port()
                );
                mesh.write(&format!("{name}.yaml"), &text);
            }
        }
        let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
        for request in [
            "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: catalog\r\nContent-Length: 2\r\n\r\nhi",
        ] {
            let mut client = Connection::open(near.outbound()).await;
            client.send(request).await;
            let (taken, mut app) = whichever(&backends).await;
            app.take_until(b"\r\n\r\n").await;
            app.send(FORGED).await;
            let answer = client.response(false).await;
            assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"), "its own body");
            assert_eq!(answer.header("proxy-status"), Some("catalog-1; error=connection_refused"), "its own words");
            assert_eq!(answer.header(MARK), None);
            assert!(backends[1 - taken].accepted().await.is_none(), "sidecars: {sidecars}: asked once");
            drop(app);
        }
        // Over HTTP/2, as an answer and as trailers alone.
        for grpc in [false, true] {
            let client = Http2::open(near.outbound()).await;
            let asking = async {
                if grpc { client.unary("Unary", b"x").await.unwrap() } else { client.get("/").await.unwrap() }
            };
            let serving = async {
                let (taken, connection) = whichever(&backends).await;
                let mut server = Http2Server::over(connection, |_| {}).await;
                let (_request, mut reply) = server.next().await;
                let status = if grpc { 200 } else { 503 };
                let mut answer = http::Response::builder().status(status).header(MARK, "connection_refused");
                if grpc {
                    answer = answer.header("content-type", "application/grpc").header("grpc-status", "14");
                }
                reply.send_response(answer.body(()).unwrap(), true).unwrap();
                (taken, server)
            };
            let (answer, (taken, _server)) = tokio::join!(asking, serving);
            assert_eq!(answer.status.as_u16(), if grpc { 200 } else { 503 });
            assert!(!answer.headers.contains_key(MARK));
            assert!(backends[1 - taken].accepted().await.is_none(), "sidecars: {sidecars}: asked once");
        }
    }
}
