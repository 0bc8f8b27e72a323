//! Promise: an HTTP/2 stream through a pair of sidecars is one stream: both directions move by themselves, an end is an
//! end, and a reset is a reset with its code. The connections that streams share are in `http2_connections.rs`.

use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::Response;
use outrigger_sidecar::config::Limits;
use outrigger_tests::application::{Backend, write};
use outrigger_tests::eventually::soon;
use outrigger_tests::grpc::{Http2, Http2Server, frame, get, post, reply_with};
use outrigger_tests::{MeshOptions, Pair};

async fn pair() -> Pair<Backend> {
    Pair::start(Backend::start().await, Some("http2")).await
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
    reply_with(&mut reply, "answered");
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
    let narrow = |limits: &mut Limits| limits.h2_stream_window_most = limits.h2_stream_window;
    let pair = Pair::start_with(MeshOptions::default(), Backend::start().await, Some("http2"), narrow).await;
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
    reply_with(&mut reply, "all");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"all");
}

#[tokio::test]
async fn who_wants_no_more_of_a_request_says_so() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(post("/early"), false).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (request, mut reply) = app.next().await;
    reply_with(&mut reply, "enough");
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

#[tokio::test]
async fn grpc_metadata_beyond_the_limit_is_resource_exhausted() {
    let pair = pair().await;
    let client = Http2::open(pair.near.outbound()).await;
    for size in [70_000, 130_000, 200_000] {
        let large = "m".repeat(size);
        let mut stream = client.call("Unary", &[("x-large", &large)]).await.unwrap();
        // The answer may be there first.
        let _ = stream.write(frame(b"ask"), true).await;
        let answer = stream.answer().await.unwrap().whole().await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, Some("8")), "{size}: {:?}", answer.headers);
    }
    let labels = [("reason", "request_head_too_large"), ("protocol", "grpc"), ("grpc_status", "8")];
    assert_eq!(pair.near.metrics().await.sum("outrigger_http_requests_total", &labels), 3.0);
    // The other way round, in the head and in the trailers.
    let mut app = None;
    for in_head in [true, false] {
        let mut stream = client.call("Unary", &[]).await.unwrap();
        stream.write(frame(b"ask"), true).await.unwrap();
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
