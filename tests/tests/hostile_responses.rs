//! Promise: an upstream that answers what two parsers could read in two ways becomes a 502 or an answer that is visibly
//! cut, and never gets its bytes into another answer: not the next on the pooled connection, not another client's.

#[path = "hostile_http1/field.rs"]
mod field;

use std::net::SocketAddr;
use std::sync::LazyLock;

use field::{Place, resident};
use outrigger_api::name::Protocol;
use outrigger_tests::{Connection, Mesh, MeshOptions, Sidecar};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

const MIB: usize = 1024 * 1024;
const FOREIGN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nforeign";
const NEXT: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext";

/// What an answer must become.
#[derive(Clone, Copy, Debug)]
enum Becomes {
    /// 502 `upstream_protocol`, or cut.
    Failure,
    /// This status and body.
    Answer(u16, &'static str),
}
use Becomes::{Answer, Failure};

fn cases() -> Vec<(&'static str, String, Becomes)> {
    let ok = |fields: &str, body: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n{body}");
    let length = |value: &str| ok(&format!("Content-Length: {value}"), &format!("hello{FOREIGN}"));
    let coding = |value: &str| ok(&format!("Transfer-Encoding: {value}"), &format!("5\r\nhello\r\n0\r\n\r\n{FOREIGN}"));
    let chunks = |body: &str| ok("Transfer-Encoding: chunked", &format!("{body}{FOREIGN}"));
    vec![
        ("GET", length("5\r\nContent-Length: 6"), Failure),
        ("GET", length("5\r\nContent-Length: 5"), Answer(200, "hello")),
        ("GET", length("5, 5"), Answer(200, "hello")),
        ("GET", length("5, 6"), Failure),
        ("GET", length("-5"), Failure),
        ("GET", length("+5"), Failure),
        ("GET", length("0x5"), Failure),
        ("GET", length("5.0"), Failure),
        ("GET", length("five"), Failure),
        ("GET", length(""), Failure),
        ("GET", length("9223372036854775808"), Failure),
        ("GET", length("18446744073709551621"), Failure),
        ("GET", length("5\r\n 6"), Failure),
        ("GET", ok("Content-Length: 5\r\nTransfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", ok("Transfer-Encoding: chunked\r\nContent-Length: 5", "5\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", coding("chunked, chunked"), Failure),
        ("GET", coding("gzip, chunked"), Failure),
        ("GET", coding("identity"), Failure),
        ("GET", coding("xchunked"), Failure),
        ("GET", coding("chunked\r\nTransfer-Encoding: identity"), Failure),
        ("GET", coding("\x0bchunked"), Failure),
        ("GET", coding("chunked").replacen("HTTP/1.1", "HTTP/1.0", 1), Failure),
        ("GET", chunks("x\r\n"), Failure),
        ("GET", chunks("5\r\nhelloo\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\r\nhell\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("+5\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\r;a\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\x0c;a\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\r\nhello\r\n0\x0b;a\r\n\r\n"), Failure),
        ("GET", chunks("5;a=\"b\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("10000000000000005\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", chunks("5\r\nhello\r\n0\r\nno colon\r\n\r\n"), Failure),
        ("GET", chunks(&format!("5\r\nhello\r\n0\r\nX: {}\r\n\r\n", "a".repeat(17_000))), Failure),
        ("GET", chunks("5\r\nhello\r\n0\r\n\n"), Failure),
        ("GET", ok("X: a\0b\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("X\0: a\r\nContent-Length: 5", "hello"), Failure),
        // Blanks behind a name are removed (RFC 9112 section 5.1), and hide no framing.
        ("GET", ok("X : a\r\nContent-Length: 5", "hello"), Answer(200, "hello")),
        ("GET", ok("X: a\r\nContent-Length\t : 5", "hello") + FOREIGN, Answer(200, "hello")),
        ("GET", ok("Content-Length : 5\r\nContent-Length: 6", "hello"), Failure),
        ("GET", ok("Transfer-Encoding : chunked\r\nContent-Length: 5", "5\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", ok("Transfer-Encoding : gzip", "5\r\nhello\r\n0\r\n\r\n"), Failure),
        ("GET", ok(" X: a\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("X\x0b: a\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("X Y : a\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok(" : a\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("X: a\r\n b\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("X: a\rb\r\nContent-Length: 5", "hello"), Failure),
        ("GET", ok("no colon\r\nContent-Length: 5", "hello"), Failure),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\nhello".to_owned() + FOREIGN, Answer(204, "")),
        ("GET", "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello".to_owned() + FOREIGN, Answer(204, "")),
        ("GET", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), Answer(204, "")),
        ("GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello".to_owned() + FOREIGN, Answer(304, "")),
        ("HEAD", ok("Content-Length: 5", "hello") + FOREIGN, Answer(200, "")),
        ("HEAD", ok("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n") + FOREIGN, Answer(200, "")),
        ("HEAD", ok("Content-Length: -5", ""), Failure),
        ("GET", ok("Content-Length: 5", "hello") + FOREIGN, Answer(200, "hello")),
        ("GET", ok("Content-Length: 5", "hello") + &FOREIGN.repeat(1000), Answer(200, "hello")),
        ("GET", ok("Content-Length: 5", "hello") + "garbage", Answer(200, "hello")),
        ("POST", ok("Content-Length: 5", "hello") + FOREIGN, Answer(200, "hello")),
        ("GET", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\n\r\n".to_owned() + FOREIGN, Failure),
        ("GET", "HTTP/1.1 102 Processing\r\n\r\n".repeat(100_000), Failure),
        ("GET", ok(&format!("X: {}", "a".repeat(4 * MIB)), ""), Failure),
        ("GET", ok(&"X: a\r\n".repeat(20_000), ""), Failure),
        ("GET", "HTTP/1.1 200 OK\r\n".to_owned() + &"a".repeat(4 * MIB), Failure),
        ("GET", "SSH-2.0-OpenSSH_9.9\r\n".to_owned(), Failure),
        ("GET", "\0\u{1}\u{2}\u{3}garbage\r\n\r\n".to_owned(), Failure),
        ("GET", "<html>no head</html>\r\n\r\n".to_owned(), Failure),
        ("GET", "HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(), Failure),
        ("GET", "HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(), Failure),
        ("GET", "HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(), Failure),
        ("GET", "HTTP/1.1 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(), Failure),
        ("GET", " HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(), Failure),
    ]
}

static CASES: LazyLock<Vec<(&str, String, Becomes)>> = LazyLock::new(cases);

/// One at a time, so that the memory that is measured is theirs.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Answers `/N` with the N-th case and everything else honestly, as long as the connection lasts.
async fn scripted() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

async fn serve(mut stream: TcpStream) {
    let mut heard = Vec::new();
    loop {
        while !heard.ends_with(b"\r\n\r\n") {
            if !matches!(stream.read_buf(&mut heard).await, Ok(count) if count > 0) {
                return;
            }
        }
        let target = String::from_utf8_lossy(&heard).split([' ', '/']).nth(2).unwrap_or_default().to_owned();
        let answer = target.parse().ok().map_or(NEXT.to_owned(), |index: usize| CASES[index].1.clone());
        heard.clear();
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        // Garbage that no parser can find an end in ends with the connection.
        if !answer.contains("\r\n\r\n") {
            return;
        }
    }
}

struct Pair {
    far: Sidecar,
    near: Sidecar,
    port: u16,
    _mesh: Mesh,
}

impl Pair {
    async fn new(app: SocketAddr) -> Pair {
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        // Outbound reaches it as a workload that has no sidecar.
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        mesh.write(
            "workload.yaml",
            &format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: plain, namespace: shop}}\nspec: \
                 {{address: {}, serviceAccount: catalog, labels: {{app: catalog}}, ports: {{main: {}}}}}\n",
                app.ip(),
                app.port()
            ),
        );
        // The document's address is no sidecar's.
        let far = mesh.sidecar("other-1").config(|config| config.workload_address.push([127, 0, 0, 9].into()));
        let far = far.inbound(app).port(app.port(), Some(Protocol::Http)).start().await;
        let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
        Pair { far, near, port: app.port(), _mesh: mesh }
    }

    fn address(&self, place: Place) -> SocketAddr {
        match place {
            Place::Outbound => self.near.outbound(),
            Place::Inbound => self.far.address(&format!("inbound:{}", self.port)),
        }
    }
}

fn request(method: &str, target: &str) -> String {
    let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
    format!("{method} /{target} HTTP/1.1\r\nHost: catalog\r\n{length}\r\n")
}

#[tokio::test]
async fn an_answer_is_one_answer() {
    let _alone = ALONE.lock().await;
    let pair = Pair::new(scripted().await).await;
    for place in [Place::Inbound, Place::Outbound] {
        let before = resident();
        for (index, (method, raw, becomes)) in CASES.iter().enumerate() {
            let name = format!("{place:?} {index} {method} {:?}", &raw[..raw.len().min(120)]);
            let mut client = Connection::open(pair.address(place)).await;
            client.send(request(method, &index.to_string())).await;
            let answer = client.try_response(*method == "HEAD").await;
            match *becomes {
                Answer(status, body) => {
                    let answer = answer.unwrap_or_else(|end| panic!("{name}: {end:?}"));
                    assert_eq!((answer.status, answer.text().as_str()), (status, body), "{name}: {answer:?}");
                    assert!(answer.is_whole(), "{name}");
                    if body.len() == 5 {
                        assert_eq!(answer.header("content-length"), Some("5"), "{name}");
                    }
                    let lengths = answer.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                    assert!(lengths.count() <= 1, "{name}: {answer:?}");
                    // The same client's next request.
                    client.send(request("GET", "next")).await;
                    assert_eq!(client.response(false).await.text(), "next", "{name}");
                }
                Failure => match answer {
                    Ok(answer) if answer.is_whole() => {
                        assert_eq!(answer.status, 502, "{name}");
                        assert!(answer.header("proxy-status").is_some(), "{name}: {answer:?}");
                        if *method != "HEAD" {
                            assert_eq!(answer.reason(), "upstream_protocol", "{name}");
                        }
                        assert!(answer.interim.len() <= 2000, "{name}");
                    }
                    // Visibly cut.
                    Ok(_) | Err(_) => {}
                },
            }
            // And another's, on what is pooled.
            for _ in 0..2 {
                let mut other = Connection::open(pair.address(place)).await;
                let answer = other.ask(request("GET", "next")).await;
                assert_eq!((answer.status, answer.text().as_str()), (200, "next"), "{name}: {answer:?}");
            }
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < 64 * MIB, "{place:?}: grew by {grown} bytes");
    }
}

/// A client that does not read is not made to hold endless interim answers here.
#[tokio::test]
async fn interim_answers_without_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _alone = ALONE.lock().await;
    let pair = Pair::new(listener.local_addr().unwrap()).await;
    for place in [Place::Inbound, Place::Outbound] {
        let before = resident();
        let mut client = Connection::open(pair.address(place)).await;
        client.send(request("GET", "flood")).await;
        let (mut served, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert!(served.read_buf(&mut head).await.unwrap() > 0);
        }
        let interim = format!("HTTP/1.1 103 Early Hints\r\nLink: {}\r\n\r\n", "a".repeat(10_000));
        let mut sent = 0;
        while served.write_all(interim.as_bytes()).await.is_ok() {
            sent += interim.len();
            assert!(sent < 256 * MIB, "{place:?}: nobody ends it");
        }
        let answer = client.response(false).await;
        assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_protocol"), "{place:?}");
        let grown = resident().saturating_sub(before);
        assert!(grown < 32 * MIB, "{place:?}: grew by {grown} bytes");
    }
}
