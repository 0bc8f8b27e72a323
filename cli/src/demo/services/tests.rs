//! The services wired directly to each other, without sidecars.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;

/// The three services; ended and awaited by [`Shop::close`].
struct Shop {
    web: SocketAddr,
    catalog: SocketAddr,
    ledger: SocketAddr,
    open: watch::Sender<bool>,
    services: JoinSet<()>,
}

impl Shop {
    async fn open() -> Shop {
        let [(web_listener, web), (catalog_listener, catalog), (ledger_listener, ledger)] =
            [listen().await, listen().await, listen().await];
        let open = watch::Sender::new(true);
        let mut services = JoinSet::new();
        services.spawn(serve_web(web_listener, catalog, ledger, closed(&open)));
        services.spawn(serve_catalog(catalog_listener, closed(&open)));
        services.spawn(serve_ledger(ledger_listener, closed(&open)));
        Shop { web, catalog, ledger, open, services }
    }

    /// Returns when all have ended.
    async fn close(self) {
        self.open.send(false).unwrap();
        self.services.join_all().await;
    }
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn closed(open: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut open = open.subscribe();
    async move {
        open.wait_for(|open| !open).await.ok();
    }
}

/// Sends a request as written and returns the whole answer, to the end of the connection.
async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(address: SocketAddr, target: &str, headers: &str) -> (String, String) {
    let request = format!("GET {target} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{headers}\r\n");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn the_shop_sells() {
    let shop = Shop::open().await;
    for (target, item, price, total) in [
        ("/shop?item=sail", "sail", 18900, 18900),
        ("/shop", "rope", 1250, 20150),
        ("/shop?a=b&item=float", "float", 7300, 27450),
    ] {
        let (head, body) = get(shop.web, target, "x-outrigger-identity: spiffe://td/ns/shop/sa/load\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{target}: {head}");
        let answer: ShopAnswer = serde_json::from_str(&body).unwrap();
        let expected = ShopAnswer {
            item: item.into(),
            price_cents: price,
            catalog: ["paddle", "rope", "sail", "float"].map(String::from).into(),
            total_cents: total,
            caller: Some("spiffe://td/ns/shop/sa/load".into()),
            catalog_caller: None,
        };
        assert_eq!(answer, expected, "{target}");
    }
    shop.close().await;
}

#[tokio::test]
async fn what_cannot_be_sold_is_refused_with_the_reason() {
    let shop = Shop::open().await;
    for (target, status, reason) in
        [("/", "404", "/shop?item=rope"), ("/shop?item=anchor", "404", "anchor"), ("/shop?item=", "404", "catalog")]
    {
        let (head, body) = get(shop.web, target, "").await;
        assert!(head.contains(status) && body.contains(reason), "{target}: {head} {body}");
    }
    let answer = ask(shop.web, "POST /shop HTTP/1.1\r\nhost: web\r\ncontent-length: 0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET"), "{answer}");
    shop.close().await;
}

#[tokio::test]
async fn web_says_which_service_is_missing() {
    let (gone, nobody) = listen().await;
    drop(gone);
    let shop = Shop::open().await;
    let open = watch::Sender::new(true);
    for (catalog, ledger, reason) in [(nobody, shop.ledger, "catalog"), (shop.catalog, nobody, "ledger")] {
        let (listener, web) = listen().await;
        let serving = tokio::spawn(serve_web(listener, catalog, ledger, closed(&open)));
        let (head, body) = get(web, "/shop", "").await;
        assert!(head.starts_with("HTTP/1.1 502 ") && body.contains(reason), "{head} {body}");
        serving.abort();
    }
    shop.close().await;
}

#[tokio::test]
async fn the_catalog_names_its_caller_and_trace_headers_are_handed_on() {
    // A catalog's listener that shows what web sends, up to the end of the request's head.
    let (listener, catalog) = listen().await;
    let shop = Shop::open().await;
    let (web_listener, web) = listen().await;
    let open = watch::Sender::new(true);
    let serving = tokio::spawn(serve_web(web_listener, catalog, shop.ledger, closed(&open)));
    let (send, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let recorder = tokio::spawn(accept(listener, closed(&open), move |stream| {
        let send = send.clone();
        async move {
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                send.send(request.headers().clone()).unwrap();
                async { Err::<http::Response<http_body_util::Empty<bytes::Bytes>>, _>("enough") }
            });
            let http = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            let _ended = http.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await;
        }
    }));
    let sent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=b\r\n\
                tracestate: c=d\r\nb3: 0\r\nx-request-id: 7\r\nauthorization: Bearer x\r\n\
                x-outrigger-identity: spiffe://td/ns/shop/sa/load\r\n";
    get(web, "/shop", sent).await;
    let headers = seen.recv().await.unwrap();
    assert_eq!(headers["traceparent"], "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    assert_eq!(headers.get_all("tracestate").iter().collect::<Vec<_>>(), ["a=b", "c=d"]);
    assert_eq!((&headers["b3"], &headers["x-request-id"]), (&"0".parse().unwrap(), &"7".parse().unwrap()));
    assert!(!headers.contains_key("authorization") && !headers.contains_key(IDENTITY_HEADER), "{headers:?}");
    serving.abort();
    recorder.abort();

    let mut client =
        catalog::proto::catalog_client::CatalogClient::connect(format!("http://{}", shop.catalog)).await.unwrap();
    let mut request = tonic::Request::new(catalog::proto::GetRequest { name: "rope".into() });
    request.metadata_mut().insert(IDENTITY_HEADER, "spiffe://td/ns/shop/sa/web".parse().unwrap());
    assert_eq!(client.get(request).await.unwrap().into_inner().caller, "spiffe://td/ns/shop/sa/web");
    shop.close().await;
}

#[tokio::test]
async fn the_ledger_answers_each_line() {
    let shop = Shop::open().await;
    let cases = [
        ("ADD 1\nADD 2\r\nADD 0\n", "OK 1\nOK 3\nOK 3\n"),
        ("ADD 18446744073709551615\nADD 1\n", "ERR the ledger is full\nOK 4\n"),
        ("", ""),
        ("SUB 1\n", "ERR expected ADD and a whole number\n"),
        ("ADD -1\nADD 1\n", "ERR expected ADD and a whole number\nOK 5\n"),
        ("ADD 1", "ERR a line ends in \\n within 64 bytes\n"),
    ];
    for (sent, expected) in cases {
        assert_eq!(ask(shop.ledger, sent).await, expected, "{sent:?}");
    }
    assert_eq!(ledger::add(shop.ledger, 5).await.unwrap(), 10);
    shop.close().await;
}

#[tokio::test]
async fn load_counts_what_was_right() {
    let shop = Shop::open().await;
    let tally = Arc::new(Tally::default());
    let enough = async {
        while tally.report().ok < 20 {
            tokio::task::yield_now().await;
        }
    };
    run_load(shop.web, NonZeroU32::new(200).unwrap(), tally.clone(), enough).await;
    let report = tally.report();
    assert!(report.ok >= 20 && report.paid_cents >= 20 * 1250, "{report:?}");
    assert_eq!((report.failed, report.first_failure), (0, None));
    shop.close().await;
}

#[tokio::test]
async fn load_notices_what_is_wrong() {
    let right = ShopAnswer {
        item: "paddle".into(),
        price_cents: 4900,
        catalog: ["paddle", "rope", "sail", "float"].map(String::from).into(),
        total_cents: 4900,
        caller: None,
        catalog_caller: None,
    };
    let cases = [
        ("200 OK", serde_json::to_string(&ShopAnswer { item: "rope".into(), ..right.clone() }).unwrap(), "asked for"),
        ("200 OK", serde_json::to_string(&ShopAnswer { catalog: vec![], ..right.clone() }).unwrap(), "asked for"),
        ("200 OK", serde_json::to_string(&ShopAnswer { total_cents: 4899, ..right }).unwrap(), "the ledger holds"),
        ("200 OK", "{}".to_owned(), "not what it promises"),
        ("503 Service Unavailable", "overloaded".to_owned(), "web answered 503 Service Unavailable: overloaded"),
        ("200 OK", String::new(), "broke off"),
    ];
    for (status, body, expected) in cases {
        let (listener, web) = listen().await;
        let open = watch::Sender::new(true);
        let promised = body.len().max(1);
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {promised}\r\nconnection: close\r\n\r\n{body}");
        let fake = tokio::spawn(accept(listener, closed(&open), move |mut stream| {
            let answer = answer.clone();
            async move {
                let mut head = [0; 1024];
                let _read = stream.read(&mut head).await;
                let _written = stream.write_all(answer.as_bytes()).await;
            }
        }));
        let tally = Arc::new(Tally::default());
        let noticed = async {
            while tally.report().failed == 0 {
                tokio::task::yield_now().await;
            }
        };
        run_load(web, NonZeroU32::MIN, tally.clone(), noticed).await;
        let failure = tally.report().first_failure.unwrap();
        assert!(failure.contains(expected), "{expected}: {failure}");
        fake.abort();
    }
}
