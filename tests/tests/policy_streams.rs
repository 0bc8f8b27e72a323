//! Promise: a request that runs on, such as a gRPC stream, a long download or a WebSocket, is judged again when policy moves:
//! it ends within seconds when it would not be let in any more, and goes on when it would.

use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, HeaderValue, Request, Response};
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::{Answer, Http2, Http2Server, Stream, frame};
use outrigger_tests::{Connection, Mesh, MeshOptions, Sidecar, eventually};

/// Five seconds are promised; the machine that runs the tests may be busy with others.
const GONE: Duration = Duration::from_secs(20);

struct Pair {
    app: Backend,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, far, mesh }
}

impl Pair {
    /// Readers are refused from now on: by a header, which is known to nobody when the policy comes.
    fn turn(&self) {
        self.mesh.write(
            "p.yaml",
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: turn, namespace: shop}\nspec: \
             {action: DENY, rules: [{to: [{operation: {paths: ['*']}}], when: [{key: 'request.headers[x-role]', values: \
             [reader]}]}]}\n",
        );
    }

    async fn counted(&self, code: &str) {
        let labels = [("direction", "inbound"), ("reason", "policy_denied"), ("code", code)];
        eventually("the refusal is counted", async || {
            (self.far.metrics().await.sum("outrigger_http_requests_total", &labels) >= 1.0).then_some(())
        })
        .await;
    }
}

async fn call(client: &Http2, role: &str) -> Stream {
    let mut stream = client.call("Watch", &[("x-role", role)]).await.unwrap();
    stream.write(frame(b"hello"), false).await.unwrap();
    stream
}

/// Reads to the end, whatever it is.
async fn end(answer: &mut Answer) -> Result<HeaderMap, h2::Error> {
    let reading = async {
        while answer.body.data().await.transpose()?.is_some() {}
        Ok(answer.body.trailers().await?.unwrap_or_default())
    };
    tokio::time::timeout(GONE, reading).await.expect("the stream ends")
}

#[tokio::test]
async fn grpc_streams_end_with_a_status_and_others_go_on() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let (reader, writer) = (call(&client, "reader").await, call(&client, "writer").await);
    let waiting = call(&client, "reader").await;
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(app.next().await);
    }
    let ok = || Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let role = |request: &Request<h2::RecvStream>| request.headers()["x-role"] == "reader";
    // One reader gets the head of an answer and a message, the other has no answer yet.
    let index = calls.iter().position(|(request, _)| role(request)).unwrap();
    let (_asked, mut respond) = calls.remove(index);
    let mut read = respond.send_response(ok(), false).unwrap();
    read.send_data(frame(b"one"), false).unwrap();
    let index = calls.iter().position(|(request, _)| !role(request)).unwrap();
    let (_asked_too, mut respond) = calls.remove(index);
    let mut written = respond.send_response(ok(), false).unwrap();
    // Either of the readers may be the one with the answer.
    let (first, second) = (tokio::spawn(reader.answer()), tokio::spawn(waiting.answer()));
    let mut writer = writer.answer().await.unwrap();
    pair.turn();
    let mut statuses = Vec::new();
    for answer in [first, second] {
        let answer = tokio::time::timeout(GONE, answer).await.expect("an answer").unwrap();
        let mut answer = answer.unwrap();
        let status = match answer.headers.get("grpc-status") {
            Some(status) => (status.clone(), "head"),
            None => (end(&mut answer).await.unwrap()["grpc-status"].clone(), "trailers"),
        };
        statuses.push(status);
    }
    statuses.sort_by_key(|(_, place)| *place);
    let seven = HeaderValue::from_static("7");
    assert_eq!(statuses, [(seven.clone(), "head"), (seven, "trailers")]);
    pair.counted("200").await;
    // Nobody has anything against the writer.
    written.send_data(frame(b"still here"), false).unwrap();
    assert_eq!(writer.data().await.unwrap(), Some(frame(b"still here")));
}

#[tokio::test]
async fn http2_is_reset_and_http1_is_cut() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let request = Request::get("http://test/events").header("x-role", "reader").body(()).unwrap();
    let stream = client.begin(request, true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_, mut respond) = app.next().await;
    let mut events = respond.send_response(Response::new(()), false).unwrap();
    events.send_data(Bytes::from_static(b"data: 1\n\n"), false).unwrap();
    let mut answer = stream.answer().await.unwrap();
    assert_eq!(answer.data().await.unwrap(), Some(Bytes::from_static(b"data: 1\n\n")));

    let ask = |path: &str, role: &str| format!("GET {path} HTTP/1.1\r\nHost: catalog\r\nX-Role: {role}\r\n\r\n");
    let mut download = Connection::open(pair.near.outbound()).await;
    download.send(ask("/file", "reader")).await;
    let mut server = pair.app.accept().await;
    server.take_until(b"\r\n\r\n").await;
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbegin").await;
    download.take_until(b"begin").await;
    let mut allowed = Connection::open(pair.near.outbound()).await;
    allowed.send(ask("/file", "writer")).await;
    let mut other = pair.app.accept().await;
    other.take_until(b"\r\n\r\n").await;
    other.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nwell").await;

    pair.turn();
    assert!(end(&mut answer).await.is_err_and(|error| error.reason() != Some(Reason::NO_ERROR)));
    let cut = tokio::time::timeout(GONE, download.take_to_end()).await.expect("the download ends").0;
    assert!(cut.is_empty(), "{}", cut.len());
    pair.counted("200").await;
    other.send("done").await;
    assert_eq!(allowed.response(false).await.text(), "welldone");
}

#[tokio::test]
async fn a_websocket_is_cut_and_another_goes_on() {
    let pair = pair().await;
    let upgrade = |role: &str| {
        format!(
            "GET /chat HTTP/1.1\r\nHost: catalog\r\nX-Role: {role}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
    };
    let mut open = Vec::new();
    for role in ["reader", "writer"] {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(upgrade(role)).await;
        let mut server = pair.app.accept().await;
        server.take_until(b"\r\n\r\n").await;
        server.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi").await;
        client.take_until(b"\r\n\r\nhi").await;
        open.push((client, server));
    }
    pair.turn();
    let (reader, _) = &mut open[0];
    tokio::time::timeout(GONE, reader.take_to_end()).await.expect("the reader's ends");
    pair.counted("101").await;
    let (writer, server) = &mut open[1];
    writer.send("ping").await;
    assert_eq!(server.take(4).await, b"ping");
}
