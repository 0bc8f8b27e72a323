//! Promise: a sidecar that has run out of file descriptors says so, in a metric and in few words in its log; what is
//! open goes on, and it accepts again within two seconds of having some. With what it has at its start it does not run out: it
//! refuses connections beyond, keeps a share for itself, and says so in `/ready`.

use std::process::Command;
use std::time::{Duration, Instant};

use outrigger_tests::application::Backend;
use outrigger_tests::metrics::Samples;
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Mesh, MeshOptions, eventually, under_test};

fn limit_files(pid: u32, files: usize) {
    let status = Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={files}:")]).status();
    assert!(status.expect("prlimit, of util-linux").success());
}

/// The number that the next descriptor would have: a limit of as much leaves none.
fn next_file(pid: u32) -> usize {
    (0..).find(|number| !std::path::Path::new(&format!("/proc/{pid}/fd/{number}")).exists()).unwrap()
}

#[tokio::test]
async fn without_descriptors_what_is_open_goes_on_and_the_rest_waits() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = Backend::start().await;
    mesh.service("queue.shop", 5672, backend.port(), Some("tcp"));
    let _far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address()).start().await;
    let mut near = mesh.sidecar("cart-1").outbound("queue:5672").spawn(under_test!()).await;
    near.ready().await;
    let door = near.address("outbound:queue.shop:5672").await;
    let mut client = Connection::open(door).await;
    let mut app = backend.accept().await;
    // Connected before, so that what it asks needs no descriptor.
    let mut metrics = Connection::open(near.address("metrics").await).await;
    let get = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    assert_eq!(metrics.ask(get).await.status, 200);

    limit_files(near.pid(), next_file(near.pid()));
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(Connection::open(door).await);
    }
    let failures = async |metrics: &mut Connection| {
        let answer = metrics.ask(get).await;
        Samples::parse(&answer.text()).sum("outrigger_accept_failures_total", &[])
    };
    let begun = Instant::now();
    while failures(&mut metrics).await < 10.0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "no failure is counted");
        client.send(b"question").await;
        assert_eq!(app.take(8).await, b"question");
        app.send(b"answer").await;
        assert_eq!(client.take(6).await, b"answer");
    }
    // A pause of 100 ms between two tries: ten need about a second.
    assert!(begun.elapsed() > Duration::from_millis(700), "it spins: {:?}", begun.elapsed());
    near.says("cannot accept a connection").await;
    let told = near.stderr().matches("cannot accept a connection").count();
    assert!((1..=3).contains(&told), "told {told} times:\n{}", near.stderr());

    limit_files(near.pid(), 4096);
    let begun = Instant::now();
    let answering = tokio::spawn(async move {
        loop {
            let mut app = backend.accept().await;
            app.send(b"at last").await;
            app.finish().await;
        }
    });
    let mut refused = 0;
    for client in &mut waiting {
        // A descriptor that was free for a moment accepts a connection and does not open the next.
        match client.take_to_end().await {
            (bytes, End::Closed) => assert_eq!(bytes, b"at last"),
            (_, End::Reset) => refused += 1,
        }
    }
    assert!(refused < 10, "{refused} of 20 were refused");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(waiting);
    answering.abort();
    eventually("everything is given back", async || {
        let answer = wire::get(near.address("metrics").await, "/metrics").await;
        let samples = Samples::parse(&answer.text());
        let counted = samples.sum("outrigger_tcp_connections_closed_total", &[("reason", "overloaded")]);
        assert_eq!(counted, f64::from(refused));
        (samples.sum("outrigger_tcp_connections_closed_total", &[]) >= 20.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn few_descriptors_are_few_connections_and_a_share_is_kept() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = Backend::start().await;
    mesh.service("queue.shop", 5672, backend.port(), Some("tcp"));
    let _far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address()).start().await;
    let few = mesh.path("few.sh");
    std::fs::write(&few, format!("#!/bin/sh\nulimit -n 300 && exec {} \"$@\"\n", under_test!())).unwrap();
    std::fs::set_permissions(&few, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut near = mesh.sidecar("cart-1").outbound("queue:5672").spawn(few.to_str().unwrap()).await;
    near.ready().await;
    let (door, health) = (near.address("outbound:queue.shop:5672").await, near.address("health").await);
    let mut open = Vec::new();
    let mut refused = 0;
    let mut apps = Vec::new();
    for _ in 0..200 {
        let mut client = Connection::open(door).await;
        let _ = client.try_send("hello").await;
        // Served or refused, and nothing hangs.
        tokio::select! {
            mut app = backend.accept() => {
                assert_eq!(app.take(5).await, b"hello");
                apps.push(app);
                open.push(client);
            }
            _ = client.expect_end() => refused += 1,
        }
    }
    assert!(open.len() >= 50 && refused >= 50, "{} open, {refused} refused", open.len());
    let answer = wire::get(health, "/ready").await;
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(answer.text().contains("overloaded") && answer.text().contains("ulimit -Hn"), "{}", answer.text());
    let metrics = wire::get(near.address("metrics").await, "/metrics").await;
    assert_eq!(Samples::parse(&metrics.text()).sum("outrigger_accept_failures_total", &[]), 0.0, "it ran out of none");
    drop((open, apps));
    eventually("it is ready again", async || (wire::get(health, "/ready").await.status == 200).then_some(())).await;
}
