//! Promise: an HTTP/2 stream through a pair of sidecars is one stream: both directions move by themselves, an end is an
//! end, a reset is a reset with its code, what nobody looked at is sent again, and the peer's limits and silence are heeded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use outrigger_sidecar::config::Limits;
use outrigger_tests::application::{Backend, write};
use outrigger_tests::eventually::soon;
use outrigger_tests::grpc::{Http2, Http2Server, Whole};
use outrigger_tests::{Connection, Mesh, MeshOptions, Sidecar};

struct Pair {
    app: Backend,
    near: Sidecar,
    _far: Sidecar,
    _mesh: Mesh,
}

async fn pair() -> Pair {
    pair_with(|_| {}).await
}

async fn pair_with(limits: impl Fn(&mut Limits)) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some("http2"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).limits(&limits).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(&limits).start().await;
    Pair { app, near, _far: far, _mesh: mesh }
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://catalog{path}")).body(()).unwrap()
}

fn post(path: &str) -> Request<()> {
    Request::post(format!("http://catalog{path}")).body(()).unwrap()
}

fn say(reply: &mut SendResponse<Bytes>, body: &'static str) {
    let mut sending = reply.send_response(Response::new(()), false).unwrap();
    sending.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
}

fn text(answer: &Whole) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

const MUCH: usize = 4 << 20;

#[tokio::test]
async fn an_upload_goes_on_while_nobody_reads_the_answer() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(post("/"), false).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (mut request, mut reply) = app.next().await;
    let mut sending = reply.send_response(Response::new(()), false).unwrap();
    let answering = tokio::spawn(async move {
        let much = Bytes::from(vec![b'd'; MUCH]);
        write(&mut sending, much, true).await
    });
    let reading = tokio::spawn(async move {
        let mut count = 0;
        while let Some(data) = request.body_mut().data().await {
            let data = data.unwrap();
            count += data.len();
            request.body_mut().flow_control().release_capacity(data.len()).unwrap();
        }
        count
    });
    // All of it, before a byte of the answer is asked for.
    stream.write(Bytes::from(vec![b'u'; MUCH]), true).await.unwrap();
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    assert_eq!((answer.body.len(), reading.await.unwrap()), (MUCH, MUCH));
    answering.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_request_may_go_on_behind_its_answer() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(post("/early"), false).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (mut request, mut reply) = app.next().await;
    say(&mut reply, "answered");
    let (answer, mut sending) = stream.answer_keeping().await.unwrap();
    assert_eq!(answer.whole().await.unwrap().body, b"answered");
    for _ in 0..3 {
        write(&mut sending, Bytes::from_static(b"more"), false).await.unwrap();
        assert_eq!(request.body_mut().data().await.unwrap().unwrap(), "more");
    }
    write(&mut sending, Bytes::from_static(b"end"), true).await.unwrap();
    assert_eq!(request.body_mut().data().await.unwrap().unwrap(), "end");
    assert!(request.body_mut().data().await.is_none(), "its end is an end");
}

/// What its windows allow a client to send, it may send in however small pieces: a gRPC message is a DATA frame.
#[tokio::test]
async fn small_messages_wait_for_an_application_that_pauses() {
    const MESSAGE: &[u8] = b"\0\0\0\0\x03abc";
    // A window at the far sidecar, and half of one at the near: windows are opened again by halves.
    const COUNT: usize = 96 * 1024 / MESSAGE.len();
    let pair = pair_with(|limits| limits.h2_stream_window_most = limits.h2_stream_window).await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(post("/stream"), false).await.unwrap();
    let small = |server: &mut h2::server::Builder| {
        server.initial_window_size(1024).data_frame_budget(1 << 30);
    };
    let mut app = Http2Server::accept(&pair.app, small).await;
    let (mut request, mut reply) = app.next().await;
    for number in 0..COUNT {
        let written = stream.write(Bytes::from_static(MESSAGE), number + 1 == COUNT).await;
        written.unwrap_or_else(|error| panic!("message {number}: {error}"));
    }
    let mut came = 0;
    while let Some(data) = soon("a message", request.body_mut().data()).await {
        let data = data.unwrap();
        came += data.len();
        request.body_mut().flow_control().release_capacity(data.len()).unwrap();
    }
    assert_eq!(came, COUNT * MESSAGE.len());
    say(&mut reply, "all");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"all");
}

#[tokio::test]
async fn who_wants_no_more_of_a_request_says_so() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(post("/early"), false).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (request, mut reply) = app.next().await;
    say(&mut reply, "enough");
    // The library tells with NO_ERROR.
    drop((request, reply));
    let (answer, mut sending) = stream.answer_keeping().await.unwrap();
    assert_eq!(answer.whole().await.unwrap().body, b"enough", "the answer is whole");
    let code = tokio::time::timeout(Duration::from_secs(10), std::future::poll_fn(|cx| sending.poll_reset(cx))).await;
    assert_eq!(code.expect("it is told").unwrap(), Reason::NO_ERROR);
}

#[tokio::test]
async fn a_reset_carries_its_code_and_never_looks_like_an_end() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let first = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let codes = [
        (Reason::ENHANCE_YOUR_CALM, Reason::ENHANCE_YOUR_CALM),
        (Reason::CANCEL, Reason::CANCEL),
        (Reason::NO_ERROR, Reason::INTERNAL_ERROR),
    ];
    let mut stream = Some(first);
    for (said, expected) in codes {
        let stream = match stream.take() {
            Some(stream) => stream,
            None => client.begin(get("/"), true).await.unwrap(),
        };
        let (_request, mut reply) = app.next().await;
        let mut sending = reply.send_response(Response::new(()), false).unwrap();
        sending.send_data(Bytes::from_static(b"half"), false).unwrap();
        let mut answer = stream.answer().await.unwrap();
        assert_eq!(answer.data().await.unwrap().unwrap(), "half");
        sending.send_reset(said);
        let broken = answer.data().await.expect_err("a truncation is an error");
        assert_eq!(broken.reason(), Some(expected), "{said:?}: {broken}");
    }
    // And from the client.
    let mut stream = client.begin(post("/"), false).await.unwrap();
    stream.write(Bytes::from_static(b"half"), false).await.unwrap();
    let (mut request, _reply) = app.next().await;
    assert_eq!(request.body_mut().data().await.unwrap().unwrap(), "half");
    stream.cancel();
    let broken = request.body_mut().data().await.expect("no end").expect_err("a truncation is an error");
    assert_eq!(broken.reason(), Some(Reason::CANCEL));
}

/// Codes that a program may say; beside those of the RFC one that nobody knows.
const CODES: [Reason; 7] = [
    Reason::NO_ERROR,
    Reason::INTERNAL_ERROR,
    Reason::STREAM_CLOSED,
    Reason::CANCEL,
    Reason::CONNECT_ERROR,
    Reason::ENHANCE_YOUR_CALM,
    Reason::HTTP_1_1_REQUIRED,
];

#[tokio::test]
async fn a_client_leaves_with_its_own_code() {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum When {
        InTheRequest,
        BeforeTheAnswer,
        InTheAnswer,
    }
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut app = None;
    for when in [When::InTheRequest, When::BeforeTheAnswer, When::InTheAnswer] {
        for code in CODES.into_iter().chain([Reason::from(0xbe)]) {
            let ends = when != When::InTheRequest;
            let mut stream = client.begin(post("/"), ends).await.unwrap();
            if app.is_none() {
                app = Some(Http2Server::accept(&pair.app, |_| {}).await);
            }
            let (_request, mut reply) = app.as_mut().unwrap().next().await;
            let heard = if when == When::InTheAnswer {
                let mut sending = reply.send_response(Response::new(()), false).unwrap();
                sending.send_data(Bytes::from_static(b"half"), false).unwrap();
                let (mut answer, mut send) = stream.answer_keeping().await.unwrap();
                assert_eq!(answer.data().await.unwrap().unwrap(), "half");
                send.send_reset(code);
                soon("the reset", std::future::poll_fn(|cx| sending.poll_reset(cx))).await
            } else {
                stream.send.send_reset(code);
                soon("the reset", std::future::poll_fn(|cx| reply.poll_reset(cx))).await
            };
            assert_eq!(heard.unwrap(), code, "{when:?}");
        }
    }
}

#[tokio::test]
async fn an_application_resets_with_its_own_code() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut app = None;
    for code in CODES.into_iter().skip(1).chain([Reason::from(0xbe)]) {
        for ends in [true, false] {
            let stream = client.begin(post("/"), ends).await.unwrap();
            if app.is_none() {
                app = Some(Http2Server::accept(&pair.app, |_| {}).await);
            }
            let (_request, mut reply) = app.as_mut().unwrap().next().await;
            reply.send_reset(code);
            let broken = stream.answer().await.err().expect("no answer");
            assert_eq!(broken.reason(), Some(code), "ended: {ends}");
        }
    }
    let failed = pair.near.metrics().await.sum("outrigger_http_requests_total", &[("reason", "upstream_reset")]);
    assert_eq!(failed, 14.0);
}

/// A gRPC client tries UNAVAILABLE again and INTERNAL not.
#[tokio::test]
async fn a_grpc_server_that_dies_is_unavailable() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    for ended in [true, false] {
        for message in [&b"\0\0\0\0\x01a"[..], b"\0\0\0\0\x05half"] {
            let mut stream = client.call("Repeat", &[]).await.unwrap();
            stream.write(outrigger_tests::grpc::frame(b"ask"), ended).await.unwrap();
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
async fn grpc_metadata_beyond_the_limit_is_resource_exhausted() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    for size in [70_000, 130_000, 200_000] {
        let large = "m".repeat(size);
        let mut stream = client.call("Unary", &[("x-large", &large)]).await.unwrap();
        // The answer may be there first.
        let _ = stream.write(outrigger_tests::grpc::frame(b"ask"), true).await;
        let answer = stream.answer().await.unwrap().whole().await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, Some("8")), "{size}: {:?}", answer.headers);
    }
    let labels = [("reason", "request_head_too_large"), ("protocol", "grpc"), ("grpc_status", "8")];
    assert_eq!(pair.near.metrics().await.sum("outrigger_http_requests_total", &labels), 3.0);
    // The other way round, in the head and in the trailers.
    let mut app = None;
    for in_head in [true, false] {
        let mut stream = client.call("Unary", &[]).await.unwrap();
        stream.write(outrigger_tests::grpc::frame(b"ask"), true).await.unwrap();
        if app.is_none() {
            app = Some(Http2Server::accept(&pair.app, |_| {}).await);
        }
        let (_request, mut reply) = app.as_mut().unwrap().next().await;
        let large = http::HeaderValue::from_str(&"m".repeat(70_000)).unwrap();
        let mut head = Response::new(());
        if in_head {
            head.headers_mut().insert("x-large", large);
            reply.send_response(head, true).unwrap();
        } else {
            let mut sending = reply.send_response(head, false).unwrap();
            let mut trailers = http::HeaderMap::new();
            trailers.insert("x-large", large);
            trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
            sending.send_trailers(trailers).unwrap();
        }
        let answer = stream.answer().await.unwrap().whole().await.unwrap();
        assert_eq!(
            answer.grpc_status(),
            Some("8"),
            "in the head: {in_head}, {:?} {:?}",
            answer.headers,
            answer.trailers
        );
    }
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
        say(&mut reply, "second");
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
    say(&mut reply, "elsewhere");
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
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{}", text(&answer));
    assert!(pair.app.accepted().await.is_none());
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
    say(&mut reply, "first");
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
        say(reply, "answered");
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
        let mesh = Mesh::start(MeshOptions::default()).await;
        let app = Backend::start().await;
        mesh.service("catalog.shop", 80, app.port(), Some("grpc"));
        let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
        let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
        few_streams(app, says, takes);
        let client = Http2::open(near.outbound()).await;
        for length in [0, 5, 40_000] {
            let body = vec![b'x'; length];
            let calls = (0..30).map(|_| client.ask(post("/call"), &body));
            for answer in futures_util::future::join_all(calls).await {
                let answer = answer.unwrap();
                let seen = (answer.status, text(&answer));
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
        assert_eq!(text(&client.ask(post("/call"), b"12").await.unwrap()), "2", "behind them");
    }
}

#[tokio::test]
async fn a_call_behind_many_long_streams_of_one_client_is_answered() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some("grpc"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    few_streams(app, 10_000, 10_000);
    let client = Http2::open(near.outbound()).await;
    let mut open = Vec::new();
    for _ in 0..400 {
        let mut answer = client.begin(get("/watch"), true).await.unwrap().answer().await.unwrap();
        assert_eq!(answer.data().await.unwrap().unwrap(), "0");
        open.push(answer);
    }
    assert_eq!(text(&client.ask(post("/call"), b"12").await.unwrap()), "2");
    // Long streams may all be left at once.
    drop(open);
    assert_eq!(text(&client.ask(post("/call"), b"123").await.unwrap()), "3");
}

#[tokio::test]
async fn clients_that_leave_do_not_end_what_others_have_on_the_shared_connection() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some("grpc"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).workers(1).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").workers(1).start().await;
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
        assert_eq!(text(&victim.ask(post("/call"), b"12").await.unwrap()), "2");
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
    let pair = pair_with(impatient).await;
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
    assert_eq!(answer.status, StatusCode::OK, "{}", text(&answer));
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
    let pair = pair_with(impatient).await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    say(&mut reply, "at last");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"at last");
}
