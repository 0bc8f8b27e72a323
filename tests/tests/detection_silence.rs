//! Promise: clients that say nothing on an undeclared port cost little and harm nobody. Few upstreams are opened for
//! them, a server that speaks first is heard by all, what was found out is remembered, and too many of them make room
//! for others.

use std::time::{Duration, Instant};

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::{Backend, nobody};
use outrigger_tests::metrics::Samples;
use outrigger_tests::peer::{Peer, TCP};
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually, under_test};

/// For what must not happen; nothing waits on it.
const A_WHILE: Duration = Duration::from_millis(300);
const GREETING: &[u8] = b"220 mail.test ESMTP\r\n";

struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(port: u16, limits: impl Fn(&mut Limits)) -> Pair {
    pair_in(MeshOptions::default(), port, limits).await
}

async fn pair_in(options: MeshOptions, port: u16, limits: impl Fn(&mut Limits)) -> Pair {
    let mesh = Mesh::start(options).await;
    mesh.service("mail.shop", 2525, port, None);
    let address = ([127, 0, 0, 1], port).into();
    let far = mesh.sidecar("mail-1").label("app", "mail").inbound(address).limits(&limits).start().await;
    let near = mesh.sidecar("cart-1").outbound("mail:2525").http_proxy().limits(&limits).start().await;
    Pair { near, far, mesh }
}

async fn clients(count: usize, address: std::net::SocketAddr) -> Vec<Connection> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(Connection::open(address).await);
    }
    all
}

async fn detected(sidecar: &Sidecar, outcome: &str) -> f64 {
    sidecar.metrics().await.sum("outrigger_detect_total", &[("outcome", outcome)])
}

async fn open(sidecar: &Sidecar) -> usize {
    let views = sidecar.admin_get("/connections").await;
    views.as_array().unwrap().iter().map(|view| view["connections"].as_array().unwrap().len()).sum()
}

async fn closed(sidecar: &Sidecar, reason: &str) -> f64 {
    sidecar.metrics().await.sum("outrigger_tcp_connections_closed_total", &[("reason", reason)])
}

#[tokio::test]
async fn one_upstream_is_opened_for_all_and_what_the_server_says_is_heard_by_all() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), |limits| limits.speculation_widens = Duration::from_secs(3600)).await;
    let mut silent = clients(100, pair.near.outbound()).await;
    let mut first = backend.accept().await;
    tokio::time::sleep(A_WHILE).await;
    assert!(backend.accepted().await.is_none(), "one for all of them");
    first.send(GREETING).await;
    let greeting = tokio::spawn(async move {
        let mut greeted = vec![first];
        for _ in 1..100 {
            let mut app = backend.accept().await;
            app.send(GREETING).await;
            greeted.push(app);
        }
        greeted
    });
    for client in &mut silent {
        assert_eq!(client.take(GREETING.len()).await, GREETING);
    }
    let mut greeted = greeting.await.unwrap();
    silent[99].send(b"HELO\r\n").await;
    for client in silent.drain(..99) {
        drop(client);
    }
    let mut heard = 0;
    for app in &mut greeted {
        heard += app.take_to_end_or(6).await;
    }
    assert_eq!(heard, 1, "each client has a connection of its own");
    for sidecar in [&pair.near, &pair.far] {
        assert_eq!(detected(sidecar, "server_first").await, 100.0);
    }
}

/// A pool of connections to a server that takes its time before it speaks: nobody waits for it twice.
#[tokio::test]
async fn a_pool_is_greeted_at_the_servers_own_pace() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), |_| {}).await;
    let mut pool = clients(60, pair.near.outbound()).await;
    let mut opened = Vec::new();
    while opened.len() < 60 {
        opened.push(backend.accept().await);
    }
    for server in &mut opened {
        server.send(GREETING).await;
    }
    for client in &mut pool {
        assert_eq!(client.take(GREETING.len()).await, GREETING);
    }
}

trait OneOrTheOther {
    async fn take_to_end_or(&mut self, count: usize) -> usize;
}

impl OneOrTheOther for Connection {
    /// 1 when so many bytes came, 0 when the other side left without one.
    async fn take_to_end_or(&mut self, count: usize) -> usize {
        while self.ahead().len() < count {
            match self.read_some().await {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return 0,
            }
        }
        1
    }
}

#[tokio::test]
async fn a_server_that_was_heard_to_speak_first_is_opened_at_once() {
    let backend = Backend::start().await;
    // Long enough that waiting for it cannot be taken for anything else.
    const WAIT: Duration = Duration::from_secs(2);
    let pair = pair(backend.port(), |limits| limits.detect_wait = WAIT).await;
    for round in 0..3 {
        let begun = Instant::now();
        let mut client = Connection::open(pair.near.outbound()).await;
        let mut app = backend.accept().await;
        assert_eq!(begun.elapsed() < WAIT, round > 0, "round {round} took {:?}", begun.elapsed());
        app.send(GREETING).await;
        assert_eq!(client.take(GREETING.len()).await, GREETING);
    }
}

#[tokio::test]
async fn what_is_remembered_is_forgotten() {
    let backend = Backend::start().await;
    const WAIT: Duration = Duration::from_millis(1500);
    let forgetful = |limits: &mut Limits| {
        limits.detect_wait = WAIT;
        limits.detect_memory = Duration::from_millis(1);
    };
    let pair = pair(backend.port(), forgetful).await;
    for _ in 0..2 {
        let begun = Instant::now();
        let mut client = Connection::open(pair.near.outbound()).await;
        let mut app = backend.accept().await;
        assert!(begun.elapsed() >= WAIT);
        app.send(GREETING).await;
        client.take(GREETING.len()).await;
    }
}

#[tokio::test]
async fn memory_never_decides_what_a_clients_bytes_are() {
    let app = Application::start("mail").await;
    let mail = Backend::start().await;
    let pair = pair(mail.port(), |_| {}).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let mut server = mail.accept().await;
    server.send(GREETING).await;
    client.take(GREETING.len()).await;
    // The same service is now something else.
    pair.mesh.service("mail.shop", 2525, app.port(), None);
    let _web = pair.mesh.sidecar("web-1").label("app", "mail").inbound(app.address()).start().await;
    let get = "GET /x HTTP/1.1\r\nHost: mail\r\n\r\n";
    eventually("the new endpoint answers", async || {
        let mut client = Connection::open(pair.near.outbound()).await;
        let _ = client.try_send(get).await;
        client.try_response(false).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
    // A client that is slow on a port where the server is thought to speak first.
    let mut client = Connection::open(pair.near.outbound()).await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(client.ask(get).await.status, 200);
    assert_eq!(app.last().all("x-outrigger-identity"), ["spiffe://outrigger.local/ns/shop/sa/cart"]);
}

#[tokio::test]
async fn where_clients_speak_first_nothing_is_opened_for_silent_ones() {
    let app = Application::start("mail").await;
    let pair = pair(app.port(), |limits| limits.speculation_settles = Duration::ZERO).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    eventually("opened on suspicion", async || (app.connections() == 1).then_some(())).await;
    assert_eq!(client.ask("GET /x HTTP/1.1\r\nHost: mail\r\n\r\n").await.status, 200);
    let opened = app.connections();
    let mut silent = clients(5, pair.near.outbound()).await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(app.connections(), opened);
    for client in &mut silent {
        assert_eq!(client.ask("GET /y HTTP/1.1\r\nHost: mail\r\n\r\n").await.status, 200, "each may still speak");
    }
}

#[tokio::test]
async fn a_place_that_nobody_speaks_on_is_given_to_another_destination() {
    let few = |limits: &mut Limits| {
        limits.speculative_connects = 2;
        limits.speculation_settles = Duration::from_millis(200);
    };
    let mute = [Backend::start().await, Backend::start().await, Backend::start().await];
    let mail = Backend::start().await;
    let pair = pair(mail.port(), few).await;
    let mut silent = Vec::new();
    for backend in &mute {
        let mut client = Connection::open(pair.near.http_proxy()).await;
        client.send(format!("CONNECT {} HTTP/1.1\r\nHost: x\r\n\r\n", backend.address())).await;
        client.take_until(b"\r\n\r\n").await;
        backend.accept().await.into_tcp().set_nodelay(true).unwrap();
        silent.push(client);
    }
    let mut client = Connection::open(pair.near.outbound()).await;
    mail.accept().await.send(GREETING).await;
    assert_eq!(client.take(GREETING.len()).await, GREETING);
}

#[tokio::test]
async fn the_next_in_line_goes_ahead_when_the_first_leaves() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), |_| {}).await;
    let first = Connection::open(pair.near.outbound()).await;
    let mut opened = backend.accept().await;
    let mut second = Connection::open(pair.near.outbound()).await;
    drop(first);
    opened.expect_end().await;
    let mut app = backend.accept().await;
    app.send(GREETING).await;
    assert_eq!(second.take(GREETING.len()).await, GREETING);
}

#[tokio::test]
async fn too_many_make_room_for_others() {
    let app = Application::start("mail").await;
    for inbound in [false, true] {
        let few = |limits: &mut Limits| {
            limits.detections_in_flight = 50;
            limits.speculation_widens = Duration::from_secs(3600);
        };
        let pair = pair_in(MeshOptions::permissive(), app.port(), few).await;
        let (door, sidecar) =
            if inbound { (pair.far.inbound(), &pair.far) } else { (pair.near.outbound(), &pair.near) };
        let before = app.connections();
        let mut silent = clients(600, door).await;
        eventually("those that said nothing for longest are refused", async || {
            (closed(sidecar, "overloaded").await == 550.0).then_some(())
        })
        .await;
        eventually("and gone", async || (open(sidecar).await == 50).then_some(())).await;
        // The very first may be the one for which the application was opened; which of the others are the oldest, to the
        // millisecond, a busy machine decides.
        let ends = silent[1..200].iter_mut().map(|client| Box::pin(client.expect_end()));
        assert_eq!(futures_util::future::select_all(ends).await.0, End::Reset);
        for _ in 0..10 {
            assert_eq!(wire::get(door, "/x").await.status, 200, "who speaks is served");
        }
        let last = silent.last_mut().unwrap();
        assert_eq!(last.ask("GET /x HTTP/1.1\r\nHost: mail\r\n\r\n").await.status, 200);
        // One for the silent, one for each that spoke in plaintext.
        assert!(app.connections() - before < 30, "{} upstreams", app.connections() - before);
    }
}

/// With the limits as they are, in a process with one worker. All stay open on the clients' side: many more than the
/// sidecar keeps.
#[tokio::test]
async fn ten_thousand_that_never_send_a_byte() {
    const SILENT: usize = 10_000;
    let files = outrigger_runtime::open_files::raise().unwrap();
    assert!(files > SILENT as u64 + 1_000, "{files} open files are too few for {SILENT} clients: raise `ulimit -Hn`");
    let app = Application::start("mail").await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("mail.shop", 2525, app.port(), None);
    let _far = mesh.sidecar("mail-1").label("app", "mail").inbound(app.address()).start().await;
    let mut near = mesh.sidecar("cart-1").outbound("mail:2525").spawn(under_test!()).await;
    near.ready().await;
    let door = near.address("outbound:mail.shop:2525").await;
    let metrics = near.address("metrics").await;
    let counted = async |name: &str, labels: &[(&str, &str)]| {
        Samples::parse(&wire::get(metrics, "/metrics").await.text()).sum(name, labels)
    };
    assert_eq!(wire::get(door, "/x").await.status, 200);
    let (upstreams, memory) = (app.connections(), counted("process_resident_memory_bytes", &[]).await);

    let silent = clients(SILENT, door).await;
    let kept = Limits::default().detections_in_flight;
    let overloaded = [("reason", "overloaded")];
    eventually("the oldest make room", async || {
        let refused = counted("outrigger_tcp_connections_closed_total", &overloaded).await;
        (refused == (SILENT - kept) as f64).then_some(())
    })
    .await;
    // A crowd: at most what was opened before it was known to be one.
    assert!(
        app.connections() - upstreams <= 1 + Limits::default().speculative_beside,
        "{} upstreams",
        app.connections() - upstreams
    );
    let grown = counted("process_resident_memory_bytes", &[]).await - memory;
    assert!(grown < 32.0 * 1024.0 * 1024.0, "{grown} bytes for {SILENT} connections");
    let begun = Instant::now();
    assert_eq!(wire::get(door, "/x").await.status, 200, "who speaks is served");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    drop(silent);
    eventually("nothing is left", async || {
        let mut admin = Connection::open(near.address("admin").await).await;
        let answer = admin.ask("GET /connections HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        let views: serde_json::Value = serde_json::from_str(&answer.text()).unwrap();
        let left = |view: &serde_json::Value| view["connections"].as_array().unwrap().len();
        (views.as_array().unwrap().iter().map(left).sum::<usize>() == 0).then_some(())
    })
    .await;
}

/// A sidecar that lets many silent connections through keeps its peer no less busy than a stranger would.
#[tokio::test]
async fn inside_mutual_tls_the_same_holds() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), |limits| limits.detections_in_flight = 20).await;
    let peer = Peer::issue(&pair.mesh, "shop", "web", "web-1").await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(peer.connect(pair.far.inbound(), &[TCP]).await.unwrap());
    }
    eventually("half of them make room", async || (closed(&pair.far, "overloaded").await == 20.0).then_some(())).await;
    // Whoever is at the head of the line had an upstream; those that took its place after it closed it again.
    let last = silent.last_mut().unwrap();
    last.send(b"\0\x01").await;
    let (arrived, mut bytes) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut app, arrived) = (backend.accept().await, arrived.clone());
            tokio::spawn(async move {
                if app.take_to_end_or(2).await == 1 {
                    let _ = arrived.send(app.take(2).await);
                }
            });
        }
    });
    assert_eq!(outrigger_tests::eventually::soon("the bytes", bytes.recv()).await.unwrap(), b"\0\x01");
}

#[tokio::test]
async fn a_destination_that_is_gone_is_told_to_all_who_wait() {
    let gone = nobody().await;
    let pair = pair_in(MeshOptions::permissive(), gone.port(), |_| {}).await;
    let mut silent = clients(20, pair.far.inbound()).await;
    for client in &mut silent {
        assert_eq!(client.expect_end().await, End::Reset);
    }
    assert_eq!(closed(&pair.far, "connection_refused").await, 20.0);
    assert_eq!(open(&pair.far).await, 0);
}

#[tokio::test]
async fn a_client_that_leaves_before_it_was_known_leaves_nothing_behind() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), |_| {}).await;
    for (beginning, count) in [(&b""[..], 1.0), (b"GE", 2.0)] {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(beginning).await;
        eventually("accepted", async || (open(&pair.near).await == 1).then_some(())).await;
        if beginning.is_empty() {
            let mut app = backend.accept().await;
            client.reset();
            app.expect_end().await;
        } else {
            client.reset();
        }
        eventually("gone", async || (open(&pair.near).await == 0).then_some(())).await;
        // What had begun like a request counts as one.
        eventually("counted", async || {
            let samples = pair.near.metrics().await;
            let requests = samples.sum("outrigger_http_requests_total", &[("reason", "client_closed")]);
            (closed(&pair.near, "client_closed").await + requests == count).then_some(())
        })
        .await;
    }
    // One that leaves in order is nobody's failure.
    let client = Connection::open(pair.near.outbound()).await;
    let mut app = backend.accept().await;
    drop(client);
    assert_eq!(app.expect_end().await, End::Closed);
    eventually("gone", async || (open(&pair.near).await + open(&pair.far).await == 0).then_some(())).await;
    assert_eq!(closed(&pair.near, "client_closed").await, 1.0);
}
