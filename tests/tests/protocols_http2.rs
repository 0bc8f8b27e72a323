//! Promise: HTTP/2 with prior knowledge and gRPC pass through a pair of sidecars: many streams on one connection, all
//! kinds of streaming, trailers, deadlines, cancellation, and failures that a gRPC client understands.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::{Http2, frame};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair(protocol: Option<&str>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), protocol);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, far, _mesh: mesh }
}

#[tokio::test]
async fn requests_bodies_and_trailers_pass() {
    for protocol in [None, Some("http2"), Some("http")] {
        let pair = pair(protocol).await;
        let client = Http2::open(pair.near.outbound()).await;
        let request = Request::post("http://shop.test/upload?x=1").header("x-outrigger-identity", "admin").body(());
        let answer = client.ask(request.unwrap(), b"hello").await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.as_slice()), (200, &b"POST /upload 5\n"[..]), "{protocol:?}");
        let seen = pair.app.last();
        assert_eq!(seen.version, "HTTP/2.0");
        assert_eq!(seen.target, "http://shop.test/upload?x=1", ":authority goes through unchanged");
        assert_eq!(seen.all("x-outrigger-identity"), [CART]);
        let answer = client.get("/trailers").await.unwrap();
        assert_eq!((answer.body.as_slice(), answer.trailers["x-sum"].as_bytes()), (&b"hello"[..], &b"5d41402a"[..]));
        assert_eq!(client.get("/status/204").await.unwrap().status.as_u16(), 204);
        assert_eq!(client.get("/bytes/3000000").await.unwrap().body.len(), 3_000_000);
    }
}

#[tokio::test]
async fn streams_run_beside_each_other_on_one_connection() {
    let pair = pair(None).await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut held = Vec::new();
    for _ in 0..20 {
        let request = Request::get("http://test/hold").body(()).unwrap();
        held.push(client.begin(request, true).await.unwrap());
    }
    eventually("all arrive", async || (pair.app.count() == 20).then_some(())).await;
    assert_eq!(client.get("/quick").await.unwrap().status.as_u16(), 200, "not behind those that wait");
    assert_eq!(pair.app.connections(), 1, "multiplexed to the application, too");
    pair.app.release();
    for stream in held {
        assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"GET /hold 0\n");
    }
    let labels = [("protocol", "http2"), ("code", "200")];
    for sidecar in [&pair.near, &pair.far] {
        eventually("21 requests are counted", async || {
            (sidecar.metrics().await.sum("outrigger_http_requests_total", &labels) == 21.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_grpc_call_is_answered_with_its_trailers() {
    let pair = pair(Some("grpc")).await;
    let client = Http2::open(pair.near.outbound()).await;
    let answer = client.unary("Unary", b"message").await.unwrap();
    assert_eq!((answer.grpc_status(), answer.messages()), (Some("0"), vec![Bytes::from_static(b"message")]));
    assert_eq!(answer.trailers["x-messages"], "1");
    assert_eq!(pair.app.last().header("te"), Some("trailers"));
    let failed = client.unary("Fail", b"").await.unwrap();
    assert_eq!((failed.grpc_status(), failed.headers["grpc-message"].as_bytes()), (Some("5"), &b"no such thing"[..]));
    for (status, count) in [("0", 1.0), ("5", 1.0)] {
        let labels = [("protocol", "grpc"), ("grpc_status", status), ("code", "200"), ("method", "POST")];
        for sidecar in [&pair.near, &pair.far] {
            eventually("calls are counted by status", async || {
                let samples = sidecar.metrics().await;
                (samples.sum("outrigger_http_requests_total", &labels) == count).then_some(())
            })
            .await;
        }
    }
    // One each way for the first call, one up for the second, whose answer had none.
    let messages = pair.near.metrics().await.sum("outrigger_grpc_messages_total", &[("direction", "outbound")]);
    assert_eq!(messages, 3.0);
}

#[tokio::test]
async fn all_kinds_of_streaming_pass() {
    let pair = pair(Some("grpc")).await;
    let client = Http2::open(pair.near.outbound()).await;

    let repeated = client.unary("Repeat", b"again").await.unwrap();
    assert_eq!(repeated.messages(), vec![Bytes::from_static(b"again"); 3]);

    let mut collect = client.call("Collect", &[]).await.unwrap();
    for message in ["a", "b", "c"] {
        collect.write(frame(message.as_bytes()), false).await.unwrap();
    }
    collect.write(Bytes::new(), true).await.unwrap();
    let collected = collect.answer().await.unwrap().whole().await.unwrap();
    assert_eq!((collected.messages(), collected.trailers["x-messages"].as_bytes()), (vec!["c".into()], &b"3"[..]));

    // Each message comes back before the next is sent: nothing is held until the stream ends.
    let bidi = client.call("Bidi", &[]).await.unwrap();
    let (mut answer, mut send) = bidi.answer_keeping().await.unwrap();
    for number in 0..20_u32 {
        let message = number.to_be_bytes();
        send.send_data(frame(&message), false).unwrap();
        assert_eq!(answer.data().await.unwrap().unwrap(), frame(&message));
    }
    send.send_data(Bytes::new(), true).unwrap();
    assert_eq!(answer.whole().await.unwrap().grpc_status(), Some("0"));
}

#[tokio::test]
async fn a_deadline_travels_and_a_cancellation_arrives() {
    let pair = pair(Some("grpc")).await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut call = client.call("Wait", &[("grpc-timeout", "5S"), ("x-request-id", "7")]).await.unwrap();
    call.write(frame(b"one"), false).await.unwrap();
    eventually("the call arrives", async || (pair.app.count() == 1).then_some(())).await;
    let seen = pair.app.last();
    assert_eq!((seen.header("grpc-timeout"), seen.header("x-request-id")), (Some("5S"), Some("7")));
    call.cancel();
    eventually("the call is cancelled at the application", async || pair.app.last().cancelled.then_some(())).await;
    assert_eq!(client.unary("Unary", b"next").await.unwrap().grpc_status(), Some("0"), "the connection goes on");
    assert_eq!(pair.app.connections(), 1);
}

#[tokio::test]
async fn a_failure_of_the_mesh_is_a_grpc_status() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let gone = Backend::start().await.stop();
    mesh.service("catalog.shop", 80, gone.port(), Some("grpc"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(gone).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let client = Http2::open(near.outbound()).await;
    let answer = client.unary("Unary", b"x").await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, Some("14")));
    assert_eq!(answer.headers["content-type"], "application/grpc");
    let message = answer.headers["grpc-message"].to_str().unwrap();
    assert!(message.contains("connection_refused"), "{message}");
    assert_eq!(answer.headers["proxy-status"], "catalog-1; error=connection_refused", "made by the inbound side");
    let plain = client.get("/").await.unwrap();
    assert_eq!(
        (plain.status.as_u16(), plain.headers["content-type"].as_bytes()),
        (503, &b"application/problem+json"[..])
    );
    let labels = [("grpc_status", "14"), ("code", "200")];
    eventually("counted on both sides", async || {
        let samples = near.metrics().await;
        (samples.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn more_streams_than_the_connection_allows_wait_their_turn() {
    let pair = pair(None).await;
    let client = Http2::open(pair.near.outbound()).await;
    pair.app.release();
    // The server's SETTINGS are here when its first answer is; before, a client cannot know the limit.
    client.get("/first").await.unwrap();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let client = client.clone();
        running.spawn(async move { client.get("/hold").await.unwrap().status.as_u16() });
    }
    let answers = running.join_all().await;
    assert_eq!((answers.len(), answers.iter().all(|status| *status == 200)), (300, true));
}

/// Twenty streams hold more than any connection window of 1 MiB, on a client's connection and on the hop that it shares
/// with another client.
#[tokio::test]
async fn streams_that_nobody_reads_do_not_stop_the_others() {
    let pair = pair(None).await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut unread = Vec::new();
    for _ in 0..20 {
        let stream = client.begin(Request::get("http://test/bytes/3000000").body(()).unwrap(), true).await.unwrap();
        unread.push(stream.answer().await.unwrap());
    }
    let other = Http2::open(pair.near.outbound()).await;
    for client in [&client, &other] {
        assert_eq!(client.get("/bytes/10000").await.unwrap().body.len(), 10_000);
    }
    for answer in unread {
        assert_eq!(answer.whole().await.unwrap().body.len(), 3_000_000, "and each goes on when it is read");
    }
}

/// The same for bodies that the application does not read.
#[tokio::test]
async fn uploads_that_the_application_does_not_read_do_not_stop_the_others() {
    let pair = pair(None).await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut unread = Vec::new();
    for _ in 0..20 {
        let request = Request::post("http://test/unread").body(()).unwrap();
        let mut stream = client.begin(request, false).await.unwrap();
        // As much as is taken without anybody reading.
        while let Ok(sent) =
            tokio::time::timeout(Duration::from_millis(50), stream.write(Bytes::from(vec![0; 16_384]), false)).await
        {
            sent.unwrap();
        }
        unread.push(stream);
    }
    let other = Http2::open(pair.near.outbound()).await;
    let upload = Request::post("http://test/read").body(()).unwrap();
    assert_eq!(other.ask(upload, &[0; 100_000]).await.unwrap().body, b"POST /read 100000\n");
}
