//! Promise: the HTTP/2 connections behind a pair of sidecars are shared without harm to a stream. What no application has
//! looked at is sent again, many streams find room under a server's limit, and a connection's silence or end is heeded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::eventually::soon;
use outrigger_tests::grpc::{Http2, Http2Server, frame, get, post, reply_with};
use outrigger_tests::{Connection, Mesh, MeshOptions, Pair};

async fn pair() -> Pair<Backend> {
    Pair::start(Backend::start().await, Some("http2")).await
}

#[tokio::test]
async fn what_the_application_refused_is_sent_again() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut streams = vec![client.begin(get("/0"), true).await.unwrap()];
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    streams.push(client.begin(post("/1"), true).await.unwrap());
    let mut refused = [app.next().await, app.next().await];
    for (_request, reply) in &mut refused {
        reply.send_reset(Reason::REFUSED_STREAM);
    }
    for _ in 0..2 {
        let (_request, mut reply) = app.next().await;
        reply_with(&mut reply, "second");
    }
    for stream in streams {
        assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"second");
    }
}

const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// GOAWAY with NO_ERROR that covers no stream.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Reads frames until a HEADERS comes.
async fn until_headers(app: &mut Connection) {
    app.take(24).await;
    loop {
        let head = app.take(9).await;
        app.take(usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])).await;
        if head[3] == 1 {
            return;
        }
    }
}

#[tokio::test]
async fn what_a_farewell_does_not_cover_is_sent_again() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut leaving = pair.app.accept().await;
    until_headers(&mut leaving).await;
    leaving.send([&SETTINGS[..], &GOAWAY[..]].concat()).await;
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    reply_with(&mut reply, "elsewhere");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"elsewhere");
}

#[tokio::test]
async fn what_may_have_been_looked_at_is_not_sent_again() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut leaving = pair.app.accept().await;
    until_headers(&mut leaving).await;
    let mut covering = GOAWAY;
    covering[12] = 1;
    leaving.send([&SETTINGS[..], &covering[..]].concat()).await;
    leaving.finish().await;
    drop(leaving);
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{}", answer.text());
    assert!(pair.app.accepted().await.is_none());
}

/// A gRPC client tries UNAVAILABLE again and INTERNAL not.
#[tokio::test]
async fn a_grpc_server_that_dies_is_unavailable() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    for ended in [true, false] {
        for message in [&b"\0\0\0\0\x01a"[..], b"\0\0\0\0\x05half"] {
            let mut stream = client.call("Repeat", &[]).await.unwrap();
            stream.write(frame(b"ask"), ended).await.unwrap();
            let mut leaving = pair.app.accept().await;
            until_headers(&mut leaving).await;
            // `:status 200` and a content type that matters to nobody.
            let head = [0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88];
            let length = u8::try_from(message.len()).unwrap();
            let data = [&[0, 0, length, 0, 0, 0, 0, 0, 1][..], message].concat();
            leaving.send([&SETTINGS[..], &head, &data].concat()).await;
            let mut answer = stream.answer().await.unwrap();
            assert_eq!(answer.data().await.unwrap().unwrap(), message);
            leaving.reset();
            let answer = answer.whole().await.expect("no reset");
            assert_eq!(answer.grpc_status(), Some("14"), "{answer:?}");
            let said = answer.trailers["grpc-message"].to_str().unwrap();
            assert!(said.starts_with("upstream_truncated"), "{said}");
        }
    }
    // Without gRPC there is nothing to say it with.
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut leaving = pair.app.accept().await;
    until_headers(&mut leaving).await;
    leaving.send([&SETTINGS[..], &[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]].concat()).await;
    let answer = stream.answer().await.unwrap();
    leaving.reset();
    assert_eq!(answer.whole().await.expect_err("a truncation").reason(), Some(Reason::INTERNAL_ERROR));
}

#[tokio::test]
async fn no_more_streams_than_the_application_allows() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    // So that the application's word is known.
    let first = client.begin(get("/first"), true).await.unwrap();
    let mut one = Http2Server::accept(&pair.app, |server| {
        server.max_concurrent_streams(10);
    })
    .await;
    let (_request, mut reply) = one.next().await;
    reply_with(&mut reply, "first");
    drop(reply);
    assert_eq!(first.answer().await.unwrap().whole().await.unwrap().body, b"first");
    let mut streams = Vec::new();
    for number in 0..16 {
        streams.push(client.begin(get(&format!("/{number}")), true).await.unwrap());
    }
    let mut two = Http2Server::accept(&pair.app, |_| {}).await;
    let mut replies = Vec::new();
    for _ in 0..8 {
        replies.push(one.next().await.1);
        replies.push(two.next().await.1);
    }
    for reply in &mut replies {
        reply_with(reply, "answered");
    }
    for stream in streams {
        assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"answered");
    }
}

/// A server that says how many streams it takes on a connection, and really takes another number of them. `/watch` begins
/// its answer and goes on until the client leaves; anything else is answered with the length of its body.
fn few_streams(app: Backend, says: u32, takes: usize) {
    tokio::spawn(async move {
        loop {
            let mut server = Http2Server::over(app.wait().await, |server| {
                server.max_concurrent_streams(says);
            })
            .await;
            tokio::spawn(async move {
                let open = Arc::new(AtomicUsize::new(0));
                while let Some((request, mut reply)) = server.try_next().await {
                    if open.fetch_add(1, Relaxed) >= takes {
                        reply.send_reset(Reason::REFUSED_STREAM);
                        open.fetch_sub(1, Relaxed);
                        continue;
                    }
                    let open = open.clone();
                    tokio::spawn(async move {
                        // It ends as it likes: the client may leave.
                        let _ = answer(request, reply).await;
                        open.fetch_sub(1, Relaxed);
                    });
                }
            });
        }
    });
}

async fn answer(request: Request<h2::RecvStream>, mut reply: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let watch = request.uri().path() == "/watch";
    let mut body = request.into_body();
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        length += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    let mut sending = reply.send_response(Response::new(()), false)?;
    sending.send_data(Bytes::from(length.to_string()), !watch)?;
    if watch {
        std::future::poll_fn(|cx| sending.poll_reset(cx)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_server_of_few_streams_serves_many_at_once() {
    // It refuses what is beyond its word; it takes fewer than it said.
    for (says, takes) in [(5, 5), (1, 1), (100, 5)] {
        let pair = Pair::start(Backend::start().await, Some("grpc")).await;
        few_streams(pair.app, says, takes);
        let client = Http2::open(pair.near.outbound()).await;
        for length in [0, 5, 40_000] {
            let body = vec![b'x'; length];
            let calls = (0..30).map(|_| client.ask(post("/call"), &body));
            for answer in futures_util::future::join_all(calls).await {
                let answer = answer.unwrap();
                let seen = (answer.status, answer.text());
                assert_eq!(seen, (StatusCode::OK, length.to_string()), "says {says}, takes {takes}, {length} bytes");
            }
        }
        let mut watches = Vec::new();
        for _ in 0..20 {
            watches.push(client.begin(get("/watch"), true).await.unwrap());
        }
        let mut open = Vec::new();
        for watch in watches {
            let mut answer = watch.answer().await.unwrap();
            assert_eq!(answer.data().await.unwrap().unwrap(), "0", "says {says}, takes {takes}");
            open.push(answer);
        }
        assert_eq!(client.ask(post("/call"), b"12").await.unwrap().text(), "2", "behind them");
    }
}

#[tokio::test]
async fn a_call_behind_many_long_streams_of_one_client_is_answered() {
    let pair = Pair::start(Backend::start().await, Some("grpc")).await;
    few_streams(pair.app, 10_000, 10_000);
    let client = Http2::open(pair.near.outbound()).await;
    let mut open = Vec::new();
    for _ in 0..400 {
        let mut answer = client.begin(get("/watch"), true).await.unwrap().answer().await.unwrap();
        assert_eq!(answer.data().await.unwrap().unwrap(), "0");
        open.push(answer);
    }
    assert_eq!(client.ask(post("/call"), b"12").await.unwrap().text(), "2");
    // Long streams may all be left at once.
    drop(open);
    assert_eq!(client.ask(post("/call"), b"123").await.unwrap().text(), "3");
}

#[tokio::test]
async fn clients_that_leave_do_not_end_what_others_have_on_the_shared_connection() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    let far = mesh.far(app.address(), Some("grpc")).workers(1).start().await;
    let near = mesh.near().workers(1).start().await;
    few_streams(app, 10_000, 10_000);
    let victim = Http2::open(near.outbound()).await;
    let mut watch = victim.begin(get("/watch"), true).await.unwrap().answer().await.unwrap();
    assert_eq!(watch.data().await.unwrap().unwrap(), "0");
    // Each stays below what one client may do. Together they are more than a sidecar takes from one peer.
    for _ in 0..16 {
        let leaving = Http2::open(near.outbound()).await;
        let mut streams = Vec::new();
        for number in 0..200 {
            // Answered, half answered, and not at all.
            let path = if number % 2 == 0 { "/call" } else { "/watch" };
            streams.push(leaving.begin(post(path), number % 3 == 0).await.unwrap());
        }
        for stream in streams {
            stream.cancel();
        }
        drop(leaving);
        assert_eq!(victim.ask(post("/call"), b"12").await.unwrap().text(), "2");
    }
    let mut data = Box::pin(watch.body.data());
    let still = std::future::poll_fn(|cx| std::task::Poll::Ready(data.as_mut().poll(cx).is_pending())).await;
    assert!(still, "the long stream goes on");
    assert_eq!(far.metrics().await.sum("outrigger_http_requests_total", &[("reason", "overloaded")]), 0.0);
}

/// As short as the sockets' own options allow.
fn impatient(limits: &mut Limits) {
    limits.keepalive = Duration::from_secs(1);
    limits.no_ack_timeout = Duration::from_secs(1);
}

#[tokio::test]
async fn the_application_is_sent_no_ping_and_a_mute_client_is_given_up() {
    let pair = Pair::start_with(MeshOptions::default(), Backend::start().await, Some("http2"), impatient).await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut app = pair.app.accept().await;
    until_headers(&mut app).await;
    app.send(SETTINGS).await;

    let mut mute = Connection::open(pair.near.outbound()).await;
    mute.send([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &SETTINGS[..]].concat()).await;
    let begun = Instant::now();
    while let Ok(Some(_)) = soon("its end", mute.read_some()).await {}
    assert!(begun.elapsed() > Duration::from_millis(900), "it got its time");

    // Meanwhile the application, which answers no PING either, had as long. Servers count PINGs.
    app.send(OK_HEADERS).await;
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let mut frames = app.ahead().to_vec();
    while let Some(rest) = frames.get(9..) {
        let length = usize::from(frames[0]) << 16 | usize::from(frames[1]) << 8 | usize::from(frames[2]);
        assert_ne!(frames[3], 6, "a PING");
        frames = rest[length.min(rest.len())..].to_vec();
    }
}

/// HEADERS of stream 1 with `:status: 200` and END_STREAM.
const OK_HEADERS: [u8; 10] = [0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88];

#[tokio::test]
async fn a_peer_that_answers_pings_may_take_its_time() {
    let pair = Pair::start_with(MeshOptions::default(), Backend::start().await, Some("http2"), impatient).await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    reply_with(&mut reply, "at last");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"at last");
}
