//! Answers that RFC 9113 forbids, from an application that writes its frames byte by byte: the client gets an error and never
//! an answer that looks whole, and the next request is answered.

use std::sync::{Arc, Mutex};

use outrigger_tests::{Connection, Mesh, MeshOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::frames::*;

/// What a server sends on a stream.
type Script = Arc<dyn Fn(u32) -> Vec<u8> + Send + Sync>;

/// An application that answers every request with the script of the moment.
struct Server {
    listener: TcpListener,
    script: Arc<Mutex<Script>>,
}

impl Server {
    async fn start() -> (Server, std::net::SocketAddr, Arc<Mutex<Script>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Arc::new(fine)));
        (Server { listener, script: script.clone() }, address, script)
    }

    async fn serve(self) {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else { return };
            tokio::spawn(answer(stream, self.script.clone()));
        }
    }
}

async fn answer(mut stream: TcpStream, script: Arc<Mutex<Script>>) -> std::io::Result<()> {
    stream.read_exact(&mut [0; PREFACE.len()]).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, [])).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        let sending = match head[3] {
            SETTINGS if head[4] & ACK == 0 => frame(SETTINGS, ACK, 0, []),
            PING if head[4] & ACK == 0 => frame(PING, ACK, 0, payload),
            HEADERS => {
                let script = script.lock().unwrap().clone();
                script(u32::from_be_bytes(head[5..9].try_into().unwrap()))
            }
            _ => continue,
        };
        stream.write_all(&sending).await?;
    }
}

const OK: [u8; 1] = [0x88];

fn fine(stream: u32) -> Vec<u8> {
    let trailers = literal(b"x-sum", b"1");
    [
        frame(HEADERS, END_HEADERS, stream, OK),
        frame(DATA, 0, stream, b"body"),
        frame(HEADERS, END_HEADERS | END_STREAM, stream, trailers),
    ]
    .concat()
}

/// Heads of answers that are refused.
fn heads() -> Vec<(&'static str, Vec<u8>)> {
    let with = |name: &[u8], value: &[u8]| [&OK[..], &literal(name, value)].concat();
    vec![
        ("no :status", literal(b"x-a", b"b")),
        (":status twice", vec![0x88, 0x88]),
        (":status behind a field", [literal(b"x-a", b"b"), OK.to_vec()].concat()),
        (":status that is no number", literal(b":status", b"2x0")),
        (":path in a head", vec![0x88, 0x84]),
        (":method in a head", vec![0x82, 0x88]),
        (":authority in a head", with(b":authority", b"a")),
        ("an unknown pseudo-header", with(b":other", b"1")),
        ("a blank before a value", with(b"x-a", b" b")),
        ("a tab behind a value", with(b"x-a", b"b\t")),
        ("an upper case name", with(b"X-A", b"b")),
        ("CRLF in a value", with(b"x-a", b"b\r\nx-injected: 1")),
        ("connection", with(b"connection", b"close")),
        ("keep-alive", with(b"keep-alive", b"timeout=5")),
        ("proxy-connection", with(b"proxy-connection", b"close")),
        ("transfer-encoding", with(b"transfer-encoding", b"chunked")),
        ("upgrade", with(b"upgrade", b"h2c")),
        ("content-length twice", [with(b"content-length", b"1"), literal(b"content-length", b"2")].concat()),
        ("a head that is too large", [&OK[..], &literal(b"x-large", &[b'v'; 12_000]).repeat(6)].concat()),
        ("a blank in an interim answer", [literal(b":status", b"103"), literal(b"link", b" a")].concat()),
    ]
}

/// Trailers of answers that are refused.
fn trailers() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (":status in trailers", OK.to_vec()),
        (":path in trailers", vec![0x84]),
        (":status behind a field in trailers", [literal(b"x-a", b"b"), OK.to_vec()].concat()),
        ("a blank in trailers", literal(b"x-a", b"b ")),
        ("connection in trailers", literal(b"connection", b"close")),
        ("an upper case name in trailers", literal(b"X-A", b"b")),
        ("trailers that are too large", literal(b"x-large", &[b'v'; 12_000]).repeat(6)),
    ]
}

fn in_pieces(flags: u8, stream: u32, block: &[u8]) -> Vec<u8> {
    let mut pieces = block.chunks(16_000);
    let mut frames = frame(HEADERS, flags & END_STREAM, stream, pieces.next().unwrap_or_default());
    pieces.for_each(|piece| frames.extend(frame(CONTINUATION, 0, stream, piece)));
    frames.extend(frame(CONTINUATION, END_HEADERS, stream, []));
    frames
}

#[tokio::test]
async fn forbidden_answers_are_errors() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let (server, address, script) = Server::start().await;
    let server = tokio::spawn(server.serve());
    mesh.service("catalog.shop", 80, address.port(), Some("http2"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(address).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let ask = async |name: &str, answer: Script| {
        *script.lock().unwrap() = answer;
        let mut client = Client::open(Connection::open(near.outbound()).await, &[]).await;
        client.send(get(1, "/")).await;
        client.until(&format!("{name}: over"), |heard| heard.is_over(1)).await
    };
    assert!(ask("fine", Arc::new(fine)).await.answered_whole(1));
    for (name, block) in heads() {
        for ends in [END_STREAM, 0] {
            let block = block.clone();
            let answer = move |stream| {
                let head = in_pieces(ends, stream, &block);
                let body = if ends == 0 { frame(DATA, END_STREAM, stream, b"body") } else { Vec::new() };
                [head, body].concat()
            };
            let heard = ask(name, Arc::new(answer)).await;
            assert!(!heard.answered_200(1), "{name}: {heard:?}");
            assert!(ask("the next one", Arc::new(fine)).await.answered_whole(1), "after {name}");
        }
    }
    for (name, block) in trailers() {
        let answer = move |stream| {
            let head = [frame(HEADERS, END_HEADERS, stream, OK), frame(DATA, 0, stream, b"body")].concat();
            [head, in_pieces(END_STREAM, stream, &block)].concat()
        };
        let heard = ask(name, Arc::new(answer)).await;
        assert!(!heard.answered_whole(1), "{name}: {heard:?}");
        assert!(ask("the next one", Arc::new(fine)).await.answered_whole(1), "after {name}");
    }
    // An answer of a head alone looks like trailers from below, and is none.
    let alone = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, OK);
    assert!(ask("a head alone", Arc::new(alone)).await.answered_whole(1));
    server.abort();
}
