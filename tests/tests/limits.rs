//! Promise: what a peer can make a sidecar do is bounded (LIMITS-AND-FAULTS section 4): connections, waiting, memory,
//! file descriptors. What goes beyond is refused or ended, is counted, and the others are served as before.

use std::process::Command;
use std::time::{Duration, Instant};

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::process::{self, Process, Program};
use outrigger_tests::{Application, Connection, End, Mesh, MeshOptions, Peer, Sidecar, eventually, under_test, wire};
use tokio::sync::Mutex;

/// What measures memory runs alone.
static ALONE: Mutex<()> = Mutex::const_new(());

const GET: &str = "GET /in HTTP/1.1\r\nHost: catalog\r\n\r\n";
const MIB: usize = 1 << 20;

struct Pair {
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

/// A caller's sidecar and one in front of an application at this port.
async fn pair(port: u16, protocol: Option<&str>, limits: impl Fn(&mut Limits)) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, port, protocol);
    let app = ([127, 0, 0, 1], port).into();
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).limits(&limits).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(&limits).start().await;
    Pair { near, far, _mesh: mesh }
}

/// The watchdog looks often enough for tests.
fn watchful(limits: &mut Limits) {
    limits.head_timeout = Duration::from_millis(200);
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_counted() {
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), Some("http"), |limits| limits.connections = 4).await;
    let mut open = Vec::new();
    for _ in 0..4 {
        let mut connection = Connection::open(pair.near.outbound()).await;
        assert_eq!(connection.ask(GET).await.status, 200);
        open.push(connection);
    }
    for _ in 0..3 {
        let mut refused = Connection::open(pair.near.outbound()).await;
        refused.expect_end().await;
    }
    let samples = pair.near.metrics().await;
    assert_eq!(samples.sum("outrigger_connections_refused_total", &[]), 3.0);
    for connection in &mut open {
        assert_eq!(connection.ask(GET).await.status, 200, "those that were there go on");
    }
    drop(open.pop());
    eventually("the place is given back", async || {
        let mut connection = Connection::open(pair.near.outbound()).await;
        let _ = connection.try_send(GET).await;
        connection.try_response(false).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_ended() {
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), None, |limits| limits.handshake_timeout = Duration::from_millis(300)).await;
    for first in [&b""[..], b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"] {
        let mut connection = Connection::open(pair.far.inbound()).await;
        connection.send(first).await;
        let begun = Instant::now();
        connection.expect_end().await;
        assert!(begun.elapsed() < Duration::from_secs(3), "{first:?}");
    }
    assert_eq!(app.connections(), 0);
}

#[tokio::test]
async fn idle_clients_and_tunnels_are_ended() {
    let app = Application::start("catalog").await;
    let idle = |limits: &mut Limits| {
        watchful(limits);
        limits.client_idle = Duration::from_millis(400);
        limits.tunnel_idle = Duration::from_millis(400);
    };
    let http = pair(app.port(), Some("http"), idle).await;
    let mut client = Connection::open(http.near.outbound()).await;
    let answer = client.ask(GET).await;
    assert!(answer.status == 200 && answer.header("connection").is_none());
    assert_eq!(client.expect_end().await, End::Closed, "a keep-alive connection on which nothing is asked");

    let backend = Backend::start().await;
    let tcp = pair(backend.port(), Some("tcp"), idle).await;
    let mut client = Connection::open(tcp.near.outbound()).await;
    client.send("hello").await;
    let mut server = backend.accept().await;
    assert_eq!(server.take(5).await, b"hello");
    // Something moves, so it stays longer than the limit.
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        server.send("x").await;
        assert_eq!(client.take(1).await, b"x");
    }
    client.expect_end().await;
    server.expect_end().await;
}

#[tokio::test]
async fn a_stream_on_which_nothing_moves_is_ended() {
    let app = Application::start("catalog").await;
    let still = |limits: &mut Limits| {
        watchful(limits);
        limits.stream_idle = Duration::from_millis(500);
    };
    let pair = pair(app.port(), Some("http"), still).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let answer = client.ask("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!((answer.status, answer.reason().as_str()), (504, "stream_idle_timeout"), "{}", answer.text());
    eventually("the application is told", async || app.last().cancelled.then_some(())).await;
    // An upload that takes longer than that, and moves all the while.
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST /in HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n").await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        client.send("x").await;
    }
    assert_eq!(client.response(false).await.status, 200);
    // One that stops in the middle.
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST /in HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf").await;
    if let Ok(answer) = client.try_response(false).await {
        assert!(answer.status >= 400, "{}", answer.status);
    }
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_at_once() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), None, |_| {}).await;
    for round in 1..=2 {
        let begun = Instant::now();
        let mut client = Connection::open(pair.near.outbound()).await;
        let mut server = backend.accept().await;
        server.send("220 hello\r\n").await;
        assert_eq!(client.take_until(b"\r\n").await, b"220 hello\r\n");
        // Twice the wait for a client that might speak first, and the handshake.
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        client.send("EHLO a\r\n").await;
        assert_eq!(server.take_until(b"\r\n").await, b"EHLO a\r\n");
        server.finish().await;
        assert_eq!(client.expect_end().await, End::Closed);
        client.send("still").await;
        assert_eq!(server.take(5).await, b"still", "half-closed");
        for sidecar in [&pair.near, &pair.far] {
            let samples = sidecar.metrics().await;
            let found = samples.sum("outrigger_detect_total", &[("outcome", "server_first")]);
            assert_eq!(found, f64::from(round), "{}", sidecar.name);
        }
    }
    // The same port, a client that speaks first.
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("\0\x01binary").await;
    assert_eq!(backend.accept().await.take(8).await, b"\0\x01binary");
    let samples = pair.near.metrics().await;
    assert_eq!(samples.sum("outrigger_detect_total", &[("outcome", "tcp")]), 1.0);
}

/// What flows until nothing is taken any more.
async fn fill(connection: &mut Connection, most: usize) -> usize {
    let block = vec![b'x'; 256 * 1024];
    let mut sent = 0;
    while sent < most {
        match tokio::time::timeout(Duration::from_millis(500), connection.try_send(&block)).await {
            Ok(Ok(())) => sent += block.len(),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    sent
}

#[tokio::test]
async fn readers_that_do_not_read_hold_little() {
    let _alone = ALONE.lock().await;
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), Some("http"), |_| {}).await;
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    let before = resident();
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send("GET /bytes/209715200 HTTP/1.1\r\nHost: a\r\n\r\n").await;
        client.take_until(b"\r\n\r\n").await;
        slow.push(client);
    }
    // Others are served while it piles up as far as it can.
    let begun = Instant::now();
    let mut other = Connection::open(pair.near.outbound()).await;
    while begun.elapsed() < Duration::from_secs(1) {
        let asked = Instant::now();
        assert_eq!(other.ask(GET).await.status, 200);
        assert!(asked.elapsed() < Duration::from_millis(500));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let grown = resident().saturating_sub(before);
    assert!(grown <= 32 * MIB, "{} MiB more", grown / MIB);
    // It was only waiting.
    assert_eq!(slow[0].take(8 * MIB).await.len(), 8 * MIB);
}

#[tokio::test]
async fn uploads_that_nobody_reads_stop() {
    let _alone = ALONE.lock().await;
    for (protocol, head) in [("http", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 209715200\r\n\r\n"), ("tcp", "")] {
        let backend = Backend::start().await;
        let pair = pair(backend.port(), Some(protocol), |_| {}).await;
        let before = resident();
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(head).await;
        let sent = fill(&mut client, 200 * MIB).await;
        let _unread = backend.accept().await;
        let grown = resident().saturating_sub(before);
        // What the kernel's socket buffers take is not ours.
        assert!(sent < 64 * MIB, "{protocol}: {} MiB went out", sent / MIB);
        assert!(grown <= 32 * MIB, "{protocol}: {} MiB more", grown / MIB);
    }
}

#[tokio::test]
async fn a_thousand_idle_connections_cost_little_and_work() {
    const COUNT: usize = 1_000;
    outrigger_runtime::open_files::raise().unwrap();
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let sidecar = process_with_files(&mesh, 4_000).await;
    let outbound = sidecar.address("outbound:catalog.shop:80").await;
    let metrics = sidecar.address("metrics").await;
    let read = async |name: &str| {
        let answer = wire::get(metrics, "/metrics").await;
        outrigger_tests::metrics::Samples::parse(&answer.text()).sum(name, &[])
    };
    for _ in 0..50 {
        assert_eq!(wire::get(outbound, "/").await.status, 200);
    }
    let before = read("process_resident_memory_bytes").await;
    let mut clients = Vec::with_capacity(COUNT);
    for _ in 0..COUNT {
        let mut client = Connection::open(outbound).await;
        assert_eq!(client.ask(GET).await.status, 200);
        clients.push(client);
    }
    let each = (read("process_resident_memory_bytes").await - before) / COUNT as f64;
    // Not the 16 KiB that are promised for the release build: futures are larger in this one.
    assert!(each <= 32.0 * 1024.0, "{each} bytes each");
    let (used, begun) = (read("process_cpu_seconds_total").await, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let share = (read("process_cpu_seconds_total").await - used) / begun.elapsed().as_secs_f64();
    // The kernel counts in steps of 10 ms, and two scrapes are in it.
    assert!(share < 0.05, "{share} of a processor while nothing happens");
    for client in &mut clients {
        assert_eq!(client.ask(GET).await.status, 200);
    }
}

#[tokio::test]
async fn who_leaves_is_not_worked_for() {
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), Some("http"), |_| {}).await;
    let http1 = "GET /hold/1 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned().into_bytes();
    // :method GET, :scheme http, :authority a, :path /hold/2
    let block = b"\x82\x86\x01\x01a\x04\x07/hold/2";
    let http2 =
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x0e\x01\x05\0\0\0\x01", &block[..]].concat();
    for (request, target) in [(http1, "/hold/1"), (http2, "/hold/2")] {
        for reset in [false, true] {
            app.forget();
            let mut client = Connection::open(pair.near.outbound()).await;
            client.send(&request).await;
            eventually("the request arrives", async || (app.count() == 1).then_some(())).await;
            assert!(app.last().target.ends_with(target), "{}", app.last().target);
            let left = Instant::now();
            if reset {
                client.reset()
            } else {
                drop(client)
            }
            eventually("it is cancelled", async || app.last().cancelled.then_some(())).await;
            assert!(left.elapsed() <= Duration::from_secs(5), "{:?}", left.elapsed());
        }
    }
}

#[tokio::test]
async fn upstreams_that_close_or_stall_delay_nobody_else() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    let bad = Backend::start().await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    mesh.service("bad.shop", 80, bad.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let _behind = mesh.sidecar("bad-1").label("app", "bad").inbound(bad.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").outbound("bad:80").start().await;
    let to_bad = near.address("outbound:bad.shop:80");
    // Accept, then close: told at once, and fine as soon as the application is.
    for reset in [false, true] {
        let mut client = Connection::open(to_bad).await;
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        let mut server = bad.accept().await;
        server.take_until(b"\r\n\r\nhi").await;
        let closed = Instant::now();
        if reset {
            server.reset()
        } else {
            drop(server)
        }
        let answer = client.response(false).await;
        assert_eq!(answer.status, 502, "{}", answer.text());
        assert!(closed.elapsed() < Duration::from_millis(500), "{:?}", closed.elapsed());
        client.send(GET).await;
        let mut server = bad.accept().await;
        server.take_until(b"\r\n\r\n").await;
        server.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(client.response(false).await.status, 200, "recovers with the next request");
    }
    // Stalls.
    let mut stalled = Vec::new();
    for _ in 0..100 {
        let mut client = Connection::open(to_bad).await;
        client.send(GET).await;
        stalled.push((client, bad.accept().await));
    }
    let mut client = Connection::open(near.outbound()).await;
    let mut times = Vec::new();
    for _ in 0..100 {
        let asked = Instant::now();
        assert_eq!(client.ask(GET).await.status, 200);
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    assert!(times[98] <= Duration::from_millis(500), "{:?}", times[98]);
}

/// A sidecar as a process that may open so many files.
async fn process_with_files(mesh: &Mesh, files: usize) -> Process {
    let token = mesh.path("cart-2.token");
    std::fs::write(&token, mesh.token("shop", "cart", &[])).unwrap();
    let program = process::command(under_test!(), Program::Sidecar);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -n {files}; exec \"$@\"")).arg("sh");
    command.arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg("run").args(["--name", "cart-2", "--namespace", "shop", "--service-account", "cart"]);
    command.args(["--control-plane", &mesh.control_plane().to_string(), "--workers", "1"]);
    command.arg("--trust-bundle").arg(mesh.trust_bundle()).arg("--token-file").arg(token);
    command.args(["--outbound", "127.0.0.1:0=catalog:80"]);
    for port in ["--admin-listen", "--metrics-listen", "--health-listen"] {
        command.args([port, "127.0.0.1:0"]);
    }
    let mut process = Process::spawn(command);
    process.ready().await;
    process
}

#[tokio::test]
async fn without_file_descriptors_it_waits_and_recovers() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let sidecar = process_with_files(&mesh, 64).await;
    let outbound = sidecar.address("outbound:catalog.shop:80").await;
    let metrics = sidecar.address("metrics").await;
    assert_eq!(wire::get(outbound, "/").await.status, 200);
    let cpu = async || {
        let answer = wire::get(metrics, "/metrics").await;
        let samples = outrigger_tests::metrics::Samples::parse(&answer.text());
        (samples.sum("process_cpu_seconds_total", &[]), samples.sum("outrigger_accept_failures_total", &[]))
    };
    let (used, _) = cpu().await;
    // Connections to every port that takes them, until none is left and some wait to be accepted.
    let health = sidecar.address("health").await;
    let mut open = Vec::new();
    for _ in 0..80 {
        for address in [health, metrics, outbound] {
            open.push(Connection::open(address).await);
        }
    }
    let begun = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(open);
    eventually("it accepts again", async || {
        let mut connection = Connection::open(outbound).await;
        let _ = connection.try_send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
        connection.try_response(false).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(4), "recovers in 2 s: {:?}", begun.elapsed());
    let (after, failures) = cpu().await;
    let spent = (after - used) / begun.elapsed().as_secs_f64();
    assert!(spent < 0.5, "{spent} of a processor while it cannot accept");
    assert!(failures > 0.0, "it came to that");
}

/// Admin, metrics, health and the control plane's 15014: whoever asks is answered, whoever else is connected.
#[tokio::test]
async fn idle_connections_keep_nobody_out_of_health_and_metrics() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let sidecar = mesh.sidecar("cart-1").start().await;
    let listeners = [
        (sidecar.address("health"), "/live"),
        (sidecar.address("metrics"), "/metrics"),
        (sidecar.address("admin"), "/config"),
        (mesh.admin(), "/live"),
    ];
    for (address, path) in listeners {
        // More than any listener has places for. Nothing, and a head that goes on a byte at a time.
        let mut idle = Vec::new();
        for number in 0..300 {
            let mut connection = Connection::open(address).await;
            if number % 2 == 0 {
                let _ = connection.try_send("G").await;
            }
            idle.push(connection);
        }
        for connection in &mut idle {
            let _ = connection.try_send("E").await;
        }
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        // An idle connection that is only timed out, and not evicted, stays for 10 s.
        let asked = tokio::time::timeout(Duration::from_secs(9), wire::ask(address, request)).await;
        let answer = asked.unwrap_or_else(|_| panic!("{path} at {address} was not answered"));
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
}

/// Strangers who take all places that they get.
#[tokio::test]
async fn strangers_keep_neither_the_mesh_nor_the_application_out() {
    const PLACES: usize = 40;
    for strict in [true, false] {
        let mesh = Mesh::start(if strict { MeshOptions::default() } else { MeshOptions::permissive() }).await;
        let (app, stock) = (Application::start("catalog").await, Application::start("stock").await);
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        mesh.service("stock.shop", 80, stock.port(), Some("http"));
        let _stock = mesh.sidecar("stock-1").label("app", "stock").inbound(stock.address()).start().await;
        let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).outbound("stock:80");
        let sidecar = builder.workers(2).limits(|limits| limits.connections = PLACES).start().await;
        let mut strangers = Vec::new();
        for _ in 0..3 * PLACES {
            let mut stranger = Connection::open(sidecar.inbound()).await;
            if strict {
                // The beginning of a ClientHello.
                let _ = stranger.try_send(b"\x16\x03\x01\x02\x00\x01").await;
            } else {
                // Idle between requests: who comes later is served all the same.
                assert_eq!(stranger.ask(GET).await.status, 200);
            }
            strangers.push(stranger);
        }
        let open = async || {
            let workers = sidecar.admin_get("/connections").await;
            workers.as_array().unwrap().iter().map(|worker| worker["connections"].as_array().unwrap().len()).sum()
        };
        let count: usize = eventually("the first have gone", async || {
            let count = open().await;
            (count <= PLACES).then_some(count)
        })
        .await;
        assert!(count >= PLACES / 2, "{count} are open: they go when others come, not before");
        // The application's own way out, and the mesh's way in.
        let mut outbound = Vec::new();
        for _ in 0..PLACES / 4 {
            let mut client = Connection::open(sidecar.outbound()).await;
            assert_eq!(client.ask(GET).await.status, 200);
            outbound.push(client);
        }
        let peer = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
        let mut mutual = Vec::new();
        for _ in 0..PLACES / 2 {
            let mut client = peer.connect(sidecar.inbound(), &[outrigger_tests::peer::H1]).await.unwrap();
            assert_eq!(client.ask(GET).await.status, 200);
            mutual.push(client);
        }
        for client in outbound.iter_mut().chain(&mut mutual) {
            assert_eq!(client.ask(GET).await.status, 200, "who belongs here is not closed for others");
        }
    }
}
