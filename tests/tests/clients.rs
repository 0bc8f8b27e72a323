//! Promise: other people's clients and servers work through two sidecars under STRICT as they do without: curl, requests
//! with Flask, grpcio, websockets, a mail server that speaks first. curl comes from the system; Python and what it
//! needs (tests/clients/requirements.txt) from the virtual environment that MESH_TEST_PYTHON names, which `.ci/run` makes.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use outrigger_api::name::Protocol;
use outrigger_tests::process::Process;
use outrigger_tests::{Application, Mesh, MeshOptions, PATIENCE, Sidecar, eventually};

/// cart's sidecar with a local port for the service and a forward proxy, and the service's own.
struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(app: SocketAddr, protocol: Option<Protocol>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).port(app.port(), protocol).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").http_proxy().start().await;
    Pair { near, far, mesh }
}

impl Pair {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.near.outbound())
    }

    fn proxy(&self) -> String {
        format!("http://{}", self.near.http_proxy())
    }

    /// Nothing went around the mesh, and nothing that went through it was without mutual TLS.
    async fn all_mutual(&self, name: &str) {
        eventually(&format!("{name} with mutual TLS"), async || {
            let samples = self.far.metrics().await;
            assert_eq!(samples.sum(name, &[("mtls", "false")]), 0.0);
            (samples.sum(name, &[("mtls", "true")]) > 0.0).then_some(())
        })
        .await;
    }
}

const REQUESTS: &str = "outrigger_http_requests_total";
const CONNECTIONS: &str = "outrigger_tcp_connections_closed_total";

/// Says that something was not run, or fails where it has to be there.
fn not_run(what: &str, how: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{what} is not there: {how}");
    println!("not run: {what} is not there: {how}");
}

/// Runs to the end and gives what it said on stdout. Panics with what it complained of.
async fn run(command: Command) -> String {
    let line = format!("{command:?}");
    let mut process = Process::spawn(command);
    let status = process.wait(PATIENCE).await;
    assert!(status.success(), "{line}: {status}\n{}\n{}", process.stdout(), process.stderr());
    // The last line may come a moment after the end.
    eventually(&format!("output of {line}"), async || Some(process.stdout()).filter(|text| !text.is_empty())).await
}

// --- curl -------------------------------------------------------------------------------------------------------

fn has_curl() -> bool {
    let there = Command::new("curl")
        .arg("--version")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("HTTP2"));
    if !there {
        not_run("curl with HTTP/2", "apt-get install curl");
    }
    there
}

/// curl without the settings of whoever runs the test; `-w` shows what `shown` asks for.
async fn curl<S: AsRef<OsStr>>(shown: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new("curl");
    command.args(["-q", "-sS", "--max-time", "15", "-w"]).arg(format!("{shown}\n")).args(arguments);
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "no_proxy", "NO_PROXY"] {
        command.env_remove(name);
    }
    run(command).await
}

const STATUS: &str = "%{http_version} %{response_code} %{size_download}";

#[tokio::test]
async fn curl_speaks_every_version() {
    if !has_curl() {
        return;
    }
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let out = pair.mesh.path("body").to_str().unwrap().to_owned();
    for (flag, version, arrives) in
        [("--http1.0", "1", "HTTP/1.1"), ("--http1.1", "1.1", "HTTP/1.1"), ("--http2-prior-knowledge", "2", "HTTP/2.0")]
    {
        let shown = curl(STATUS, [flag, "-o", &out, &pair.url("/bytes/300")]).await;
        let answered = shown.split(' ').next().unwrap().to_owned();
        assert!(answered == version || (version == "1" && answered == "1.1"), "{flag}: {shown}");
        assert!(shown.ends_with(" 200 300"), "{flag}: {shown}");
        assert_eq!(app.last().version, arrives, "{flag}");
        let shown = curl(STATUS, [flag, "-I", "-o", &out, &pair.url("/status/200")]).await;
        assert!(shown.ends_with(" 200 0"), "{flag}: {shown}");
        let shown = curl(STATUS, [flag, "-X", "DELETE", "-o", &out, &pair.url("/status/204")]).await;
        assert!(shown.ends_with(" 204 0"), "{flag}: {shown}");
    }
    pair.all_mutual(REQUESTS).await;
}

#[tokio::test]
async fn curl_moves_large_bodies_whole() {
    if !has_curl() {
        return;
    }
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let upload = pair.mesh.path("upload");
    // Not a multiple of anything, and no two blocks alike.
    let body: Vec<u8> = (0..6_000_011_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&upload, &body).unwrap();
    let (data, out) = (format!("@{}", upload.display()), pair.mesh.path("out"));
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        for more in [&["-H", "Expect: 100-continue"][..], &["-H", "Expect:"], &["-H", "Transfer-Encoding: chunked"]] {
            let mut arguments = vec![version, "-o", out.to_str().unwrap(), "--data-binary", &data];
            arguments.extend_from_slice(more);
            let url = pair.url("/echo");
            arguments.push(&url);
            let shown = curl(STATUS, arguments).await;
            assert!(shown.ends_with(" 200 6000011"), "{version} {more:?}: {shown}");
            assert!(std::fs::read(&out).unwrap() == body, "{version} {more:?}: other bytes came back");
            assert!(app.last().body == body, "{version} {more:?}: other bytes arrived");
        }
    }
    let size = 40_000_003;
    let direct = format!("http://{}/bytes/{size}", app.address());
    for url in [direct, pair.url(&format!("/bytes/{size}"))] {
        let shown = curl(STATUS, ["--http1.1", "-o", out.to_str().unwrap(), &url]).await;
        assert!(shown.ends_with(&format!(" 200 {size}")), "{shown}");
        let sum = run({
            let mut command = Command::new("sha256sum");
            command.arg(&out);
            command
        })
        .await;
        let known = pair.mesh.path("sum");
        match std::fs::read_to_string(&known) {
            Ok(first) => assert_eq!(sum, first, "through the mesh as directly"),
            Err(_) => std::fs::write(&known, sum).unwrap(),
        }
    }
    pair.all_mutual(REQUESTS).await;
}

#[tokio::test]
async fn curl_reuses_its_connection() {
    if !has_curl() {
        return;
    }
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let out = pair.mesh.path("out").to_str().unwrap().to_owned();
    // HTTP/1.1 only: curl 7.88 fails its second request with prior knowledge of HTTP/2 on one connection against any
    // server. grpcio below has all its calls on one.
    let local = (0..5).map(|n| pair.url(&format!("/{n}")));
    let proxied = (0..5).map(|n| format!("http://catalog.shop/{n}"));
    for (proxy, urls) in [(String::new(), local.collect::<Vec<_>>()), (pair.proxy(), proxied.collect())] {
        let arguments = ["--http1.1", "-x", &proxy].map(str::to_owned).into_iter();
        let urls = urls.into_iter().flat_map(|url| ["-o".to_owned(), out.clone(), url]);
        assert_eq!(curl("%{num_connects}", arguments.chain(urls)).await, "1\n0\n0\n0\n0");
    }
}

#[tokio::test]
async fn curl_uses_the_forward_proxy_with_and_without_connect() {
    if !has_curl() {
        return;
    }
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let out = pair.mesh.path("out").to_str().unwrap().to_owned();
    for name in ["catalog", "catalog.shop", "catalog.shop.svc.cluster.local"] {
        let url = format!("http://{name}/items?q=1");
        let proxy = pair.proxy();
        for more in [&[][..], &["-p"], &["-p", "--http2-prior-knowledge"]] {
            let mut arguments = vec!["-x", &proxy, "-o", &out];
            arguments.extend_from_slice(more);
            arguments.push(&url);
            let shown = curl(STATUS, arguments).await;
            assert!(shown.contains(" 200 "), "{more:?} {url}: {shown}");
            let seen = app.last();
            assert_eq!(seen.header("x-outrigger-identity"), Some("spiffe://outrigger.local/ns/shop/sa/cart"));
            assert!(seen.target.ends_with("/items?q=1"), "{}", seen.target);
            if seen.version == "HTTP/1.1" {
                assert_eq!((seen.target.as_str(), seen.header("host")), ("/items?q=1", Some(name)));
            }
        }
    }
    pair.all_mutual(REQUESTS).await;
}

// --- Python -----------------------------------------------------------------------------------------------------

/// The interpreter of the virtual environment.
fn python() -> Option<PathBuf> {
    let Some(given) = std::env::var_os("MESH_TEST_PYTHON") else {
        not_run(
            "MESH_TEST_PYTHON",
            "python3 -m venv DIR, DIR/bin/pip install -r tests/clients/requirements.txt, MESH_TEST_PYTHON=DIR",
        );
        return None;
    };
    let path = PathBuf::from(given);
    Some(if path.is_dir() { path.join("bin/python") } else { path })
}

fn script(python: &Path, name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(name)).args(arguments);
    for name in ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command
}

async fn server(python: &Path, name: &str, listener: &str) -> (Process, SocketAddr) {
    let mut process = Process::spawn(script(python, name, &[]));
    process.ready().await;
    let address = process.address(listener).await;
    (process, address)
}

#[tokio::test]
async fn requests_and_flask_need_nothing_but_http_proxy() {
    let Some(python) = python() else { return };
    let (_server, app) = server(&python, "flask_server.py", "http").await;
    let pair = pair(app, None).await;
    let mut client = script(&python, "requests_client.py", &["http://catalog.shop"]);
    client.env("http_proxy", pair.proxy());
    assert_eq!(run(client).await, "ok");
    pair.all_mutual(REQUESTS).await;
}

#[tokio::test]
async fn grpcio_makes_every_kind_of_call() {
    let Some(python) = python() else { return };
    for protocol in [Some(Protocol::Grpc), None] {
        let (_server, app) = server(&python, "grpc_server.py", "grpc").await;
        let pair = pair(app, protocol).await;
        let target = pair.near.outbound().to_string();
        assert_eq!(run(script(&python, "grpc_client.py", &[&target])).await, "ok", "{protocol:?}");
        pair.all_mutual(REQUESTS).await;
        let near = pair.near.metrics().await;
        assert_eq!(near.values(REQUESTS, "protocol"), ["grpc".to_owned()].into());
        assert_eq!(near.sum("outrigger_http_requests_in_flight", &[]), 0.0);
    }
}

#[tokio::test]
async fn grpcio_goes_through_connect() {
    let Some(python) = python() else { return };
    let (_server, app) = server(&python, "grpc_server.py", "grpc").await;
    let pair = pair(app, Some(Protocol::Grpc)).await;
    for variable in ["grpc_proxy", "http_proxy"] {
        let mut client = script(&python, "grpc_client.py", &["catalog.shop:80"]);
        client.env(variable, pair.proxy());
        assert_eq!(run(client).await, "ok", "{variable}");
    }
    pair.all_mutual(REQUESTS).await;
}

#[tokio::test]
async fn websockets_are_upgraded_and_stay() {
    let Some(python) = python() else { return };
    let (_server, app) = server(&python, "websocket_server.py", "ws").await;
    for protocol in [Some(Protocol::Http), None] {
        let pair = pair(app, protocol).await;
        let url = format!("ws://{}/", pair.near.outbound());
        assert_eq!(run(script(&python, "websocket_client.py", &[&url])).await, "ok");
        let by_proxy = script(&python, "websocket_client.py", &["ws://catalog.shop/", &pair.proxy()]);
        assert_eq!(run(by_proxy).await, "ok");
        pair.all_mutual(REQUESTS).await;
        eventually("both are counted as switched", async || {
            let samples = pair.far.metrics().await;
            (samples.sum(REQUESTS, &[("code", "101"), ("reason", "")]) == 2.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_mail_server_speaks_first() {
    let Some(python) = python() else { return };
    let (server, app) = server(&python, "smtp_server.py", "smtp").await;
    for protocol in [Some(Protocol::Tcp), None] {
        let pair = pair(app, protocol).await;
        let (host, port) = (pair.near.outbound().ip().to_string(), pair.near.outbound().port().to_string());
        assert_eq!(run(script(&python, "smtp_client.py", &[&host, &port])).await, "ok", "{protocol:?}");
        pair.all_mutual(CONNECTIONS).await;
    }
    assert_eq!(server.stdout().matches("mail 720089").count(), 6, "{}", server.stdout());
}
