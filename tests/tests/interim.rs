//! Promise: interim answers (1xx, RFC 9110 section 15.2) pass through a pair of sidecars as they come and in their order,
//! on HTTP/2 as on HTTP/1.1, 100-continue among them; 101 is none of HTTP/2, and endless ones harm nobody.

use bytes::Bytes;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::{Http2, Http2Server};
use outrigger_tests::namespace::installed;
use outrigger_tests::{Connection, Mesh, MeshOptions, Sidecar};

struct Pair {
    app: Backend,
    near: Sidecar,
    _far: Sidecar,
    _mesh: Mesh,
}

async fn pair(protocol: &str) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some(protocol));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, _far: far, _mesh: mesh }
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://catalog{path}")).body(()).unwrap()
}

fn interim(status: u16, link: &str) -> Response<()> {
    Response::builder().status(status).header("link", link).header("content-length", "5").body(()).unwrap()
}

async fn say(reply: &mut SendResponse<Bytes>, body: &'static str) {
    let mut body_of = reply.send_response(Response::new(()), false).unwrap();
    body_of.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
}

#[tokio::test]
async fn they_pass_on_http2_before_the_final_answer_is_known() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    for (status, link) in [(103, "</a.css>"), (102, "</b>"), (103, "</c.js>")] {
        reply.send_informational(interim(status, link)).unwrap();
        let passed = stream.interim().await.unwrap().expect("an interim answer");
        assert_eq!((passed.status().as_u16(), passed.headers()["link"].as_bytes()), (status, link.as_bytes()));
        assert_eq!(passed.headers().len(), 1, "without the length of a body that it does not have: {passed:?}");
    }
    // Several at once, with the final one behind them.
    for status in [103, 199] {
        reply.send_informational(interim(status, "</d>")).unwrap();
    }
    say(&mut reply, "final").await;
    let mut passed = Vec::new();
    while let Some(interim) = stream.interim().await.unwrap() {
        passed.push(interim.status().as_u16());
    }
    assert_eq!(passed, [103, 199]);
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    assert_eq!((answer.status, answer.body.as_slice()), (StatusCode::OK, &b"final"[..]));
    assert!(!answer.headers.contains_key("link"), "they are not mixed up");
}

#[tokio::test]
async fn streams_beside_each_other_get_their_own() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut streams = Vec::new();
    for number in 0..10 {
        streams.push(client.begin(get(&format!("/{number}")), true).await.unwrap());
    }
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let mut replies = Vec::new();
    for _ in 0..streams.len() {
        replies.push(app.next().await);
    }
    for (request, reply) in &mut replies {
        reply.send_informational(interim(103, request.uri().path())).unwrap();
    }
    for (_, reply) in &mut replies {
        say(reply, "final").await;
    }
    for (number, mut stream) in streams.into_iter().enumerate() {
        let passed = stream.interim().await.unwrap().expect("an interim answer");
        assert_eq!(passed.headers()["link"].as_bytes(), format!("/{number}").as_bytes());
        assert!(stream.interim().await.unwrap().is_none(), "{number}");
        assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"final");
    }
}

#[tokio::test]
async fn a_body_waits_for_100_on_http2() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let request = Request::post("http://catalog/upload").header("expect", "100-continue").body(()).unwrap();
    let mut stream = client.begin(request, false).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (mut request, mut reply) = app.next().await;
    assert_eq!(request.headers()["expect"], "100-continue");
    reply.send_informational(Response::builder().status(100).body(()).unwrap()).unwrap();
    let passed = stream.interim().await.unwrap().expect("100");
    assert_eq!(passed.status(), StatusCode::CONTINUE);
    stream.write(Bytes::from_static(b"the body"), true).await.unwrap();
    assert_eq!(request.body_mut().data().await.unwrap().unwrap(), "the body");
    say(&mut reply, "thanks").await;
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"thanks");
}

#[tokio::test]
async fn switching_protocols_does_not_exist_on_http2() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    reply.send_informational(Response::builder().status(101).body(()).unwrap()).unwrap();
    assert!(stream.interim().await.unwrap().is_none(), "101 does not pass");
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(answer.status == StatusCode::BAD_GATEWAY && text.contains("upstream_protocol"), "{text}");
    let gone = std::future::poll_fn(|cx| reply.poll_reset(cx)).await;
    assert!(gone.is_ok(), "the application is told: {gone:?}");
}

#[tokio::test]
async fn endless_ones_end_their_request_alone() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(get("/flood"), true).await.unwrap();
    let beside = client.begin(get("/beside"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    let (_beside, mut reply_beside) = app.next().await;
    for _ in 0..5_000 {
        // Until the stream is reset.
        if reply.send_informational(interim(103, "</a>")).is_err() {
            break;
        }
    }
    let mut passed = 0;
    while stream.interim().await.unwrap().is_some() {
        passed += 1;
    }
    assert!((1..=2_000).contains(&passed), "{passed}");
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(answer.status == StatusCode::BAD_GATEWAY && text.contains("upstream_protocol"), "{text}");
    say(&mut reply_beside, "beside").await;
    assert_eq!(beside.answer().await.unwrap().whole().await.unwrap().body, b"beside");
}

#[tokio::test]
async fn large_ones_are_left_out_when_there_are_too_many() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let mut stream = client.begin(get("/"), true).await.unwrap();
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    for _ in 0..40 {
        reply.send_informational(interim(103, &"a".repeat(10_000))).unwrap();
    }
    say(&mut reply, "final").await;
    let mut passed = 0;
    while stream.interim().await.unwrap().is_some() {
        passed += 1;
    }
    assert!((1..=6).contains(&passed), "64 KiB of them: {passed}");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"final");
}

#[tokio::test]
async fn curl_sees_them_on_http2() {
    if !installed(&["curl"]) {
        return;
    }
    let pair = pair("http2").await;
    let url = format!("http://{}/", pair.near.outbound());
    let curl = tokio::task::spawn_blocking(move || {
        let arguments = ["-sS", "--include", "--http2-prior-knowledge", "--noproxy", "*", "--max-time", "20"];
        std::process::Command::new("curl").args(arguments).arg(url).output()
    });
    let mut app = Http2Server::accept(&pair.app, |_| {}).await;
    let (_request, mut reply) = app.next().await;
    for link in ["</a.css>", "</b.js>"] {
        reply.send_informational(interim(103, link)).unwrap();
    }
    say(&mut reply, "final").await;
    let output = curl.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let hints = "HTTP/2 103 \nlink: </a.css>\n\nHTTP/2 103 \nlink: </b.js>\n\nHTTP/2 200 \n";
    assert!(text.starts_with(hints) && text.ends_with("\n\nfinal"), "{text} {output:?}");
}

#[tokio::test]
async fn they_pass_on_http1_with_their_spelling() {
    let pair = pair("http").await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    let mut app = pair.app.accept().await;
    app.take_until(b"\r\n\r\n").await;
    for status in ["102 Processing", "103 Early Hints"] {
        let head = format!("HTTP/1.1 {status}\r\nX-Link: </a.css>\r\n");
        app.send(format!("{head}Connection: x-hop\r\nX-Hop: 1\r\n\r\n")).await;
        let passed = client.take_until(b"\r\n\r\n").await;
        assert_eq!(String::from_utf8_lossy(&passed), format!("{head}\r\n"));
    }
    app.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal").await;
    assert_eq!(client.response(false).await.text(), "final");
}

/// A frame of HTTP/2 on the first stream; the head of an interim answer when `kind` is 1.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let (flags, stream) = if kind == 1 { (4, 1) } else { (0, 0) };
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// The most memory that the process ever had.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Each of a few bytes, and of many fields when it is unpacked: 3,000 bytes that HPACK remembers, 20 times.
#[tokio::test]
async fn endless_ones_are_not_held() {
    let pair = pair("http2").await;
    let client = Http2::open(pair.near.outbound()).await;
    let stream = client.begin(get("/"), true).await.unwrap();
    let mut app = pair.app.accept().await;
    let status = [8, 3, b'1', b'0', b'3'];
    let remembered = [&status[..], &[0x40, 4], b"link", &[0x7f, 0xb9, 0x16], &[b'a'; 3000]].concat();
    let many = frame(1, &[&status[..], &[0xbe; 20]].concat()).repeat(10_000);
    app.send(frame(4, &[])).await;
    // The preface, frames, and the head of the request among them.
    app.take(24).await;
    loop {
        let head = app.take(9).await;
        app.take(usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])).await;
        if head[3] == 1 {
            break;
        }
    }
    let before = peak();
    app.send(frame(1, &remembered)).await;
    for _ in 0..4 {
        if app.try_send(&many).await.is_err() {
            break;
        }
    }
    let answer = stream.answer().await.unwrap().whole().await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    let grown = peak() - before;
    assert!(grown < 32 << 20, "grew by {grown} bytes");
}
