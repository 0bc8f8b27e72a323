//! Promise: curl needs to know nothing of the mesh: through two transparent sidecars under STRICT it speaks every version of
//! HTTP with other people's servers (aiohttp, nghttpd), moves large bodies whole in both directions, and waits for 100;
//! with IPv4 alone and with IPv6 alone.

use std::process::Command;

use outrigger_tests::namespace::Families;
use outrigger_tests::pods::{Pods, Port, run};
use outrigger_tests::process::Process;
use outrigger_tests::under_test;

const HTTP1: Port = Port { service: 80, app: 8080 };
const HTTP2: Port = Port { service: 81, app: 8081 };
/// Multiples of nothing.
const LARGE: usize = 64 * 1024 * 1024 + 11;
const MIDDLE: usize = 6_000_013;
const STATUS: &str = "%{http_version} %{response_code} %{size_download}";

/// aiohttp on one port, nghttpd (HTTP/2 with prior knowledge, which echoes uploads) on the other.
async fn start(family: Families) -> Option<(Pods, [Process; 2])> {
    let pods = Pods::start(under_test!(), family, &[HTTP1, HTTP2], &["curl", "python", "nghttpd"]).await?;
    let python = pods.python("catalog", "aiohttp_server.py", &[pods.everywhere(), "8080"]);
    let http1 = pods.serve(python).await;
    let documents = pods.path("documents");
    std::fs::create_dir(&documents).unwrap();
    std::fs::write(documents.join("small"), "hello\n").unwrap();
    std::fs::write(documents.join("large"), body(LARGE)).unwrap();
    std::fs::write(documents.join("middle"), body(MIDDLE)).unwrap();
    let mut nghttpd = pods.program("catalog", "nghttpd");
    nghttpd.args(["--no-tls", "--echo-upload", "--address", pods.everywhere(), "--htdocs"]).arg(documents).arg("8081");
    let http2 = pods.serve_on(nghttpd, 8081).await;
    Some((pods, [http1, http2]))
}

/// No two blocks alike.
fn body(size: usize) -> Vec<u8> {
    (0..size as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

async fn checksum(path: &std::path::Path) -> String {
    let mut command = Command::new("sha256sum");
    command.arg(path);
    run(command).await.split(' ').next().unwrap().to_owned()
}

#[tokio::test]
async fn every_version_by_ipv4() {
    every_version(Families::V4).await;
}

#[tokio::test]
async fn every_version_by_ipv6() {
    every_version(Families::V6).await;
}

async fn every_version(family: Families) {
    let Some((pods, _servers)) = start(family).await else { return };
    for (flag, version) in [("--http1.0", "1.0"), ("--http1.1", "1.1")] {
        let shown = pods.curl("", &[flag, "http://catalog.shop/hello"]).await;
        let seen: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(seen["host"], "catalog.shop", "{flag}");
        assert_eq!(seen["caller"], "spiffe://outrigger.local/ns/shop/sa/cart", "{flag}");
        assert!(seen["version"] == "1.1" || seen["version"] == version, "{flag}: {shown}");
        let shown = pods.curl(STATUS, &[flag, "-o", "/dev/null", "http://catalog/nothing"]).await;
        assert!(shown.ends_with(" 404 13"), "{flag}: {shown}");
        let shown = pods.curl(STATUS, &[flag, "-I", "-o", "/dev/null", "http://catalog/hello"]).await;
        assert!(shown.ends_with(" 200 0"), "{flag}: {shown}");
    }
    // One connection for all of them.
    let address = format!("http://{}/hello", std::net::SocketAddr::new(pods.service(), 80));
    let shown = pods.curl("%{num_connects}", &["-o", "/dev/null", &address, "-o", "/dev/null", &address]).await;
    assert_eq!(shown, "1\n0");
    let both = pods.http("http1", 8, &[]).await;
    assert_eq!(both.detected("http1")[0], 7.0, "a connection on an undeclared port each");

    let (pods, _servers) = start(family).await.expect("as before");
    let two = ["--http2-prior-knowledge", "http://catalog.shop:81/small"];
    assert_eq!(pods.curl(STATUS, &two).await, "hello\n2 200 6");
    let missing = ["--http2-prior-knowledge", "-o", "/dev/null", "http://catalog.shop:81/missing"];
    assert!(pods.curl(STATUS, &missing).await.starts_with("2 404 "));
    let echoed = ["--http2-prior-knowledge", "-d", "to and fro", "http://catalog.shop:81/"];
    assert_eq!(pods.curl(STATUS, &echoed).await, "to and fro2 200 10");
    let both = pods.http("http2", 3, &[]).await;
    assert_eq!(both.detected("http2")[0], 3.0);
}

#[tokio::test]
async fn large_bodies_and_100_continue_by_http1() {
    let Some((pods, _servers)) = start(Families::V4).await else { return };
    let out = pods.path("out");
    let url = format!("http://catalog.shop/bytes/{LARGE}");
    let shown = pods.curl(STATUS, &["-o", out.to_str().unwrap(), &url]).await;
    assert_eq!(shown, format!("1.1 200 {LARGE}"));
    let wanted = pods.curl("", &[&format!("http://catalog.shop/sum/{LARGE}")]).await;
    assert_eq!(checksum(&out).await, wanted);

    let heard = pods.path("heard");
    // With Expect curl asks first, and would wait so long that no patience lasts: somebody has answered 100.
    let expect = ["-H", "Expect: 100-continue", "--expect100-timeout", "1000"];
    let chunked = ["-H", "Expect:", "-H", "Transfer-Encoding: chunked"];
    for (file, size, how) in [("large", LARGE, &expect[..]), ("middle", MIDDLE, &chunked), ("middle", MIDDLE, &expect)]
    {
        let file = pods.path("documents").join(file);
        let put = ["-D", heard.to_str().unwrap(), "-T", file.to_str().unwrap(), "http://catalog.shop/sum"];
        let shown = pods.curl("", &[how, &put].concat()).await;
        let seen: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(seen["size"].as_u64(), Some(size as u64), "{how:?}");
        assert_eq!(seen["sha256"].as_str(), Some(&*checksum(&file).await), "{how:?}");
        let heads = std::fs::read_to_string(&heard).unwrap();
        assert_eq!(heads.starts_with("HTTP/1.1 100 "), how == expect, "{how:?}: {heads}");
    }
    let both = pods.http("http1", 5, &[]).await;
    let sent = both.sums("outrigger_http_request_bytes_total", &[]);
    assert_eq!(sent, [(LARGE + 2 * MIDDLE) as f64; 2]);
    let [near, far] = both.sums("outrigger_http_response_bytes_total", &[]);
    assert!(near == far && near > LARGE as f64, "{near} {far}");
}

#[tokio::test]
async fn large_bodies_by_http2() {
    let Some((pods, _servers)) = start(Families::V6).await else { return };
    let out = pods.path("out");
    let (large, middle) = (pods.path("documents").join("large"), pods.path("documents").join("middle"));
    let down = ["--http2-prior-knowledge", "-o", out.to_str().unwrap(), "http://catalog.shop:81/large"];
    assert_eq!(pods.curl(STATUS, &down).await, format!("2 200 {LARGE}"));
    assert_eq!(checksum(&out).await, checksum(&large).await);
    // There and back.
    let data = format!("@{}", middle.display());
    let up = ["--http2-prior-knowledge", "-o", out.to_str().unwrap(), "--data-binary", &data];
    let shown = pods.curl(STATUS, &[&up[..], &["http://catalog.shop:81/"]].concat()).await;
    assert_eq!(shown, format!("2 200 {MIDDLE}"));
    assert_eq!(checksum(&out).await, checksum(&middle).await);
    let both = pods.http("http2", 2, &[]).await;
    assert_eq!(both.sums("outrigger_http_request_bytes_total", &[]), [MIDDLE as f64; 2]);
    assert_eq!(both.sums("outrigger_http_response_bytes_total", &[]), [(LARGE + MIDDLE) as f64; 2]);
}
