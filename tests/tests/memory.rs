//! Promise: a sidecar whose memory is nearly used up refuses new connections and says so; what is open goes on, and it
//! accepts again when there is enough. HTTP/2 streams that stand still and hold bytes are ended before that, so that
//! nobody can fill the memory with them, and nobody else notices.

#[path = "hostile_http2/frames.rs"]
#[expect(dead_code, reason = "what other tests need of it")]
mod frames;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use frames::{Client, DATA, END_HEADERS, HEADERS, PING, frame, request, setting};
use http::Request;
use outrigger_tests::application::Backend;
use outrigger_tests::eventually::within;
use outrigger_tests::grpc::{Http2, Http2Server};
use outrigger_tests::metrics::Samples;
use outrigger_tests::peer::H2;
use outrigger_tests::process::{self, Process, Program};
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, eventually, under_test};

/// A control group with a limit of memory, of version 2 or 1; taken away when it is dropped.
struct Group {
    directory: PathBuf,
    limit: PathBuf,
}

impl Group {
    fn new() -> Option<Group> {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let name = format!("outrigger-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        for (root, limit) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            let directory = Path::new(root).join(&name);
            if fs::create_dir(&directory).is_err() {
                continue;
            }
            let group = Group { limit: directory.join(limit), directory };
            if group.limit.exists() && fs::write(&group.limit, (1_u64 << 40).to_string()).is_ok() {
                return Some(group);
            }
        }
        // Past the test runner, which keeps to itself what a passing test prints.
        let why = "no control group with a limit of memory can be made here, as root it can";
        let _ = writeln!(std::io::stderr(), "memory DID NOT RUN: {why}");
        None
    }

    fn limit(&self, bytes: u64) {
        fs::write(&self.limit, bytes.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once its processes are gone, which takes the kernel a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// A sidecar as a process in that group.
async fn sidecar_in(group: &Group, mesh: &Mesh, name: &str, labels: &[(&str, &str)], arguments: &[&str]) -> Process {
    let account = name.trim_end_matches("-1");
    let token = mesh.path(&format!("{name}.token"));
    fs::write(&token, mesh.token("shop", account, labels)).unwrap();
    let program = process::command(under_test!(), Program::Sidecar);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.directory.display())).arg("sh");
    command.arg(program.get_program()).args(program.get_args());
    command.arg("run").args(["--name", name, "--namespace", "shop", "--service-account", account]);
    command.args(["--control-plane", &mesh.control_plane().to_string(), "--workers", "1"]);
    command.arg("--trust-bundle").arg(mesh.trust_bundle()).arg("--token-file").arg(token);
    command.args(arguments);
    for port in ["--admin-listen", "--metrics-listen", "--health-listen"] {
        command.args([port, "127.0.0.1:0"]);
    }
    let mut process = Process::spawn(command);
    process.ready().await;
    process
}

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

#[tokio::test]
async fn when_memory_is_short_what_is_open_goes_on_and_nothing_new_comes_in() {
    let Some(group) = Group::new() else { return };
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = sidecar_in(&group, &mesh, "cart-1", &[], &["--outbound", "127.0.0.1:0=catalog:80"]).await;
    let door = near.address("outbound:catalog.shop:80").await;
    let metrics = near.address("metrics").await;
    let value = async |name: &str| Samples::parse(&wire::get(metrics, "/metrics").await.text()).sum(name, &[]);
    let mut open = Vec::new();
    for _ in 0..30 {
        let mut client = Connection::open(door).await;
        assert_eq!(client.ask(GET).await.status, 200);
        open.push(client);
    }
    assert_eq!(value("outrigger_memory_pressure").await, 0.0);

    let resident = value("process_resident_memory_bytes").await as u64;
    group.limit(resident / 95 * 100);
    eventually("memory is short", async || (value("outrigger_memory_pressure").await == 1.0).then_some(())).await;
    for _ in 0..10 {
        Connection::open(door).await.expect_end().await;
    }
    assert_eq!(value("outrigger_connections_refused_total").await, 10.0);
    for client in &mut open {
        assert_eq!(client.ask(GET).await.status, 200);
    }
    near.says("memory is short").await;

    group.limit(2 * resident);
    eventually("there is enough again", async || (value("outrigger_memory_pressure").await == 0.0).then_some(())).await;
    assert_eq!(wire::get(door, "/").await.status, 200);
    near.says("memory is no longer short").await;
    assert_eq!(near.stderr().matches("memory is short").count(), 1, "{}", near.stderr());
}

/// What an attacker does with each of a thousand streams of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stall {
    /// Asks for an answer and takes none of it.
    Answers,
    /// Sends a body that the application does not read.
    Requests,
    /// The same, a byte at a time.
    Bytes,
}

const STREAMS: u32 = 1_000;

impl Stall {
    /// A thousand streams on this connection.
    async fn on(self, connection: Connection) -> Client {
        let no_window = setting(4, 0);
        let mut client = Client::open(connection, if self == Stall::Answers { &no_window } else { &[] }).await;
        // Behind the answer is the connection's window.
        client.send(frame(PING, 0, 0, [0; 8])).await;
        client.until("an answer to a PING", |heard| heard.pongs > 0).await;
        for number in 0..STREAMS {
            let stream = 2 * number + 1;
            let frames = match self {
                Stall::Answers => frames::get(stream, "/bytes/70000"),
                Stall::Requests => {
                    let body = [0; 16_000];
                    let head = frame(HEADERS, END_HEADERS, stream, request("POST", "/unread"));
                    [head, frame(DATA, 0, stream, body).repeat(4)].concat()
                }
                Stall::Bytes => {
                    let head = frame(HEADERS, END_HEADERS, stream, request("POST", "/unread"));
                    [head, frame(DATA, 0, stream, [0]).repeat(80)].concat()
                }
            };
            if !client.try_send(frames).await {
                break;
            }
        }
        client
    }
}

/// Asks and uploads until it is told to stop; says how often.
fn honest(address: std::net::SocketAddr, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<usize> {
    let stop = stop.clone();
    tokio::spawn(async move {
        let client = Http2::open(address).await;
        let mut count = 0;
        let upload = vec![b'u'; 200_000];
        while !stop.load(Relaxed) || count < 10 {
            let answer = client.get("/bytes/100000").await.expect("an answer");
            assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 100_000), "request {count}");
            let request = Request::post("http://catalog/count").body(()).unwrap();
            let answer = client.ask(request, &upload).await.expect("an answer");
            assert_eq!(answer.status, 200, "upload {count}");
            count += 1;
        }
        count
    })
}

#[tokio::test]
async fn streams_that_stand_still_fill_no_memory_and_nobody_else_notices() {
    let Some(group) = Group::new() else { return };
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    group.limit(128 << 20);
    let inbound = format!("127.0.0.1:0={}", app.address());
    let labels = [("app", "catalog")];
    let mut far =
        sidecar_in(&group, &mesh, "catalog-1", &labels, &["--inbound", &inbound, "--label", "app=catalog"]).await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    eventually("the service is there", async || (wire::get(near.outbound(), "/").await.status == 200).then_some(()))
        .await;
    let stop = Arc::<AtomicBool>::default();
    let beside = honest(near.outbound(), &stop);
    let attacker = Peer::issue(&mesh, "shop", "attacker", "attacker-1").await;
    let (_, door) = far.addresses().into_iter().find(|(name, _)| name.starts_with("inbound")).expect("a listener");
    let mut clients = Vec::new();
    for _ in 0..4 {
        let Ok(connection) = attacker.connect(door, &[H2]).await else { break };
        clients.push(Stall::Answers.on(connection).await);
    }
    let metrics = far.address("metrics").await;
    let ended = async || {
        let samples = Samples::parse(&wire::get(metrics, "/metrics").await.text());
        let ended = samples.sum("outrigger_http_requests_total", &[("reason", "overloaded")]);
        (ended > 0.0).then_some(ended)
    };
    within(Duration::from_secs(60), "streams are ended", ended).await;
    far.says("HTTP/2 streams that stood still").await;
    // What came meanwhile stands still as well.
    tokio::time::sleep(Duration::from_secs(3)).await;
    stop.store(true, Relaxed);
    let served = beside.await.unwrap();
    assert!(far.try_wait().is_none(), "it lives, after {served} honest requests");
    let events = fs::read_to_string(group.directory.join("memory.events")).unwrap_or_default();
    assert!(!events.lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0"), "{events}");
}

#[tokio::test]
async fn many_uploads_at_once_fit_into_little_memory() {
    let Some(group) = Group::new() else { return };
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    group.limit(64 << 20);
    let inbound = format!("127.0.0.1:0={}", app.address());
    let labels = [("app", "catalog")];
    let arguments = ["--inbound", &inbound, "--label", "app=catalog"];
    let mut far = sidecar_in(&group, &mesh, "catalog-1", &labels, &arguments).await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    eventually("the service is there", async || (wire::get(near.outbound(), "/").await.status == 200).then_some(()))
        .await;
    let mut uploads = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let address = near.outbound();
        uploads.spawn(async move {
            let client = Http2::open(address).await;
            let request = Request::post("http://catalog/discard").body(()).unwrap();
            let mut stream = client.begin(request, false).await.unwrap();
            let piece = Bytes::from(vec![b'u'; 1 << 20]);
            for _ in 0..2 {
                stream.write(piece.clone(), false).await?;
            }
            stream.write(Bytes::new(), true).await?;
            stream.answer().await?.whole().await
        });
    }
    let (mut whole, mut refused) = (0, 0);
    while let Some(upload) = uploads.join_next().await {
        match upload.unwrap() {
            Ok(answer) if answer.status == 200 => whole += 1,
            _ => refused += 1,
        }
    }
    assert!(far.try_wait().is_none(), "it lives");
    assert_eq!((whole, refused), (100, 0));
}

#[tokio::test]
async fn a_budget_holds_without_a_control_group() {
    const BUDGET: u64 = 16 << 20;
    for stall in [Stall::Answers, Stall::Requests, Stall::Bytes] {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let app = Application::start("catalog").await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        // It reads nothing.
        let deaf = Backend::start().await;
        let port = deaf.port();
        tokio::spawn(async move {
            let mut servers = Vec::new();
            loop {
                servers.push(
                    Http2Server::over(deaf.wait().await, |server| {
                        server.initial_window_size(0);
                    })
                    .await,
                );
            }
        });
        let small = |limits: &mut outrigger_sidecar::config::Limits| limits.memory_buffers = Some(BUDGET);
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
        let far = far.inbound(([127, 0, 0, 1], port).into()).limits(small).start().await;
        let door = match stall {
            Stall::Answers => far.inbound(),
            Stall::Requests | Stall::Bytes => far.address(&format!("inbound:{port}")),
        };
        let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
        let stop = Arc::<AtomicBool>::default();
        let beside = honest(near.outbound(), &stop);
        let attacker = Peer::issue(&mesh, "shop", "attacker", "attacker-1").await;
        let mut clients = Vec::new();
        for _ in 0..2 {
            clients.push(stall.on(attacker.connect(door, &[H2]).await.unwrap()).await);
        }
        within(Duration::from_secs(60), "streams are ended", async || {
            let ended = far.metrics().await.sum("outrigger_http_requests_total", &[("reason", "overloaded")]);
            (ended > 0.0).then_some(())
        })
        .await;
        stop.store(true, Relaxed);
        beside.await.unwrap();
        // What the attacker held is given back with its connections.
        drop(clients);
        eventually("an answer", async || (wire::get(near.outbound(), "/").await.status == 200).then_some(())).await;
    }
}
