//! Promise: what a stranger, or one workload with one certificate, can make a control plane do is bounded: memory,
//! waiting, log lines, what `stat` and `status` show. Whoever is honest meanwhile does not notice.

use std::time::{Duration, Instant};

use outrigger_api::wire::discovery_client::DiscoveryClient;
use outrigger_api::wire::identity_client::IdentityClient;
use outrigger_api::wire::registry_client::RegistryClient;
use outrigger_api::wire::telemetry_client::TelemetryClient;
use outrigger_api::wire::{
    Ack, Edge, Hello, IssueRequest, LeaseRequest, ReportRequest, ResourceKey, Self_, ShadowNote, WatchRequest,
    lease_request, resource_key, watch_request,
};
use outrigger_tests::eventually::within;
use outrigger_tests::{Connection, Mesh, MeshOptions, Peer, eventually};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

fn report(instance: &str, edges: Vec<Edge>) -> ReportRequest {
    ReportRequest { instance: instance.into(), window_seconds: 3.0, edges, ..ReportRequest::default() }
}

/// What a sidecar says of policies in Shadow mode is about its own workload and about policies that can select it.
#[tokio::test]
async fn shadow_notes_speak_for_their_sender_and_are_bounded() {
    let policy = |namespace: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: trial, namespace: \
             {namespace}}}\nspec: {{mode: Shadow}}\n---\n"
        )
    };
    let yaml = ["bank", "evil", "outrigger-system"].map(policy).concat();
    let mesh = Mesh::start(MeshOptions { yaml, ..MeshOptions::default() }).await;
    let mallory = Peer::issue(&mesh, "evil", "mallory", "mallory-1").await;
    let mut telemetry = TelemetryClient::new(mallory.channel(mesh.control_plane()).await.unwrap());
    let note = |namespace: &str, shape: String| ShadowNote {
        policy: format!("AuthorizationPolicy/{namespace}/trial"),
        would: "denied".into(),
        principal: "spiffe://outrigger.local/ns/bank/sa/pay".into(),
        shape,
        count: u64::MAX,
    };
    let mut shadow: Vec<ShadowNote> =
        ["bank", "evil", "outrigger-system", "nowhere"].map(|namespace| note(namespace, "GET /".into())).into();
    shadow.extend((0..1_500).map(|number| note("evil", format!("GET /{number}"))));
    for (number, shadow) in shadow.chunks(500).enumerate() {
        let request = ReportRequest { shadow: shadow.to_vec(), ..report(&format!("m-{number}"), Vec::new()) };
        telemetry.report(request).await.unwrap();
    }
    let report = mesh.control_plane_get("/policy-report").await;
    let callers = report["policies"].as_array().unwrap().iter().map(|policy| {
        let callers = policy["callers"].as_array().unwrap();
        let own = "spiffe://outrigger.local/ns/evil/sa/mallory";
        assert!(callers.iter().all(|caller| caller["called"] == own && caller["count"].as_u64() < Some(1 << 40)));
        (policy["policy"].as_str().unwrap().to_owned(), callers.len().min(501))
    });
    let expected = [("bank", 0), ("evil", 501), ("outrigger-system", 1)];
    let expected = expected.map(|(namespace, kept)| (format!("AuthorizationPolicy/{namespace}/trial"), kept));
    assert_eq!(callers.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn a_report_speaks_for_its_sender_and_is_bounded() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let mallory = Peer::issue(&mesh, "evil", "mallory", "mallory-1").await;
    let mut telemetry = TelemetryClient::new(mallory.channel(mesh.control_plane()).await.unwrap());
    let mut sent = 0;
    let mut send = async |edges: Vec<Edge>, window: f64| {
        sent += 1;
        let request = ReportRequest { window_seconds: window, ..report(&format!("m-{sent}"), edges) };
        telemetry.report(request).await.map(drop)
    };
    let forged = |inbound, own: &str, other: &str| {
        let (source, destination) = if inbound { (other, own) } else { (own, other) };
        Edge {
            inbound,
            source_workload: "pay".into(),
            source_namespace: "bank".into(),
            source_principal: source.into(),
            destination_service: "ledger.bank".into(),
            destination_workload: "ledger".into(),
            destination_namespace: "bank".into(),
            destination_principal: destination.into(),
            protocol: "http1".into(),
            requests: 600,
            ..Edge::default()
        }
    };
    let own = "spiffe://outrigger.local/ns/evil/sa/mallory";
    let pay = "spiffe://outrigger.local/ns/bank/sa/pay";
    let edges = [("", pay), (pay, own), (own, pay)].into_iter();
    let edges = edges.flat_map(|(side, other)| [forged(false, side, other), forged(true, side, other)]).collect();
    send(edges, 3.0).await.unwrap();
    for window in [0.0, 5e-324, 61.0, f64::NAN, f64::INFINITY] {
        assert_eq!(send(Vec::new(), window).await.unwrap_err().code(), Code::InvalidArgument, "{window}");
    }
    let huge = forged(false, own, &"x".repeat(300 * 1024));
    assert!(send(vec![huge], 3.0).await.is_err(), "300 KiB");
    let long = Edge { destination_service: "y".repeat(100_000), requests: u64::MAX, ..forged(false, own, "") };
    send(vec![long], 3.0).await.unwrap();
    let twice = report("m-1", Vec::new());
    let codes = [telemetry.report(twice.clone()).await, telemetry.report(twice).await].map(|sent| sent.map(drop));
    assert!(codes.iter().any(|sent| sent.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted)));

    let stats = mesh.control_plane_get("/stats").await;
    let edges = stats["edges"].as_array().unwrap();
    assert_eq!(edges.len(), 3, "{stats:#}");
    for edge in edges {
        let own_side = if edge["direction"] == "inbound" { "destination" } else { "source" };
        let field = |name: &str| edge[format!("{own_side}_{name}")].as_str().unwrap().to_owned();
        assert_eq!([field("identity"), field("namespace"), field("workload")], [own, "evil", "mallory-1"]);
        assert!(edge["destination_service"].as_str().unwrap().len() <= 253);
        assert!(edge["requests_per_second"].as_f64().is_some_and(f64::is_finite), "{edge}");
        if edge["direction"] == "inbound" {
            assert_eq!(edge["destination_service"], "", "a service of another namespace is not served here");
        }
    }
}

/// A Watch and a lease of a peer.
struct Streams {
    requests: mpsc::Sender<WatchRequest>,
    updates: Streaming<outrigger_api::wire::WatchResponse>,
    _leases: mpsc::Sender<LeaseRequest>,
    leases: Streaming<outrigger_api::wire::LeaseResponse>,
}

fn own_key() -> ResourceKey {
    ResourceKey { key: Some(resource_key::Key::Self_(Self_ {})) }
}

async fn streams(channel: Channel, instance: &str) -> Streams {
    let (requests, queue) = mpsc::channel(8);
    let send = async |kind| requests.send(WatchRequest { kind: Some(kind) }).await.unwrap();
    send(watch_request::Kind::Hello(Hello { workload: instance.into(), ..Hello::default() })).await;
    send(watch_request::Kind::Subscribe(own_key())).await;
    let updates = DiscoveryClient::new(channel.clone()).watch(ReceiverStream::new(queue)).await.unwrap().into_inner();
    let (leases, queue) = mpsc::channel(8);
    let registration =
        outrigger_api::wire::Registration { instance: instance.into(), ..outrigger_api::wire::Registration::default() };
    leases.send(LeaseRequest { kind: Some(lease_request::Kind::Register(registration)) }).await.unwrap();
    let answers = RegistryClient::new(channel).lease(ReceiverStream::new(queue)).await.unwrap().into_inner();
    let mut streams = Streams { requests, updates, _leases: leases, leases: answers };
    assert!(streams.updates.message().await.unwrap().is_some());
    assert!(streams.leases.message().await.unwrap().is_some());
    streams
}

impl Streams {
    /// How both ended.
    async fn ends(&mut self) -> [Option<Status>; 2] {
        let watch = async {
            loop {
                match self.updates.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(status) => return Some(status),
                }
            }
        };
        let lease = async {
            loop {
                match self.leases.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(status) => return Some(status),
                }
            }
        };
        let (watch, lease) = tokio::join!(watch, lease);
        [watch, lease]
    }
}

#[tokio::test]
async fn nothing_goes_on_over_the_end_of_a_certificate() {
    let mesh =
        Mesh::start(MeshOptions { leaf_lifetime: Some(Duration::from_secs(10)), ..MeshOptions::default() }).await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
    let issued = Instant::now();
    let channel = peer.channel(mesh.control_plane()).await.unwrap();
    let mut telemetry = TelemetryClient::new(channel.clone());
    telemetry.report(report("cart-1", Vec::new())).await.unwrap();
    let mut open = streams(channel, "cart-1").await;
    let ends = tokio::time::timeout(Duration::from_secs(30), open.ends()).await.expect("both streams end");
    let lasted = issued.elapsed();
    assert!((Duration::from_secs(8)..Duration::from_secs(15)).contains(&lasted), "{lasted:?}");
    for status in ends {
        assert!(status.as_ref().is_some_and(|status| status.code() == Code::Unauthenticated), "{status:?}");
    }
    let late = telemetry.report(report("cart-1", Vec::new())).await.unwrap_err();
    assert!(matches!(late.code(), Code::Unauthenticated | Code::Unavailable | Code::Unknown), "{late:?}");
}

#[tokio::test]
async fn nothing_goes_on_when_the_root_leaves_the_bundle() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let other = Mesh::start(MeshOptions::default()).await;
    let trust = mesh.path("control-plane/ca/trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::copy(other.trust_bundle(), trust.join("other.pem")).unwrap();
    mesh.reload_control_plane();
    let peer = Peer::issue(&other, "shop", "cart", "cart-1").await;
    let own = Peer::issue(&mesh, "shop", "web", "web-1").await;
    let channel = eventually("both roots are believed", async || {
        let channel = peer.channel(mesh.control_plane()).await.ok()?;
        let taken = TelemetryClient::new(channel.clone()).report(report("cart-1", Vec::new())).await;
        taken.is_ok().then_some(channel)
    })
    .await;
    let mut open = streams(channel.clone(), "cart-1").await;
    let mut kept = streams(own.channel(mesh.control_plane()).await.unwrap(), "web-1").await;
    std::fs::remove_file(trust.join("other.pem")).unwrap();
    mesh.reload_control_plane();
    let ends = tokio::time::timeout(Duration::from_secs(15), open.ends()).await.expect("both streams end");
    for status in ends {
        assert!(status.as_ref().is_some_and(|status| status.code() == Code::Unauthenticated), "{status:?}");
    }
    let late = TelemetryClient::new(channel).report(report("cart-2", Vec::new())).await.unwrap_err();
    assert_eq!(late.code(), Code::Unauthenticated);
    assert!(tokio::time::timeout(Duration::from_secs(3), kept.ends()).await.is_err(), "the own root's go on");
}

/// Half-open handshakes, and strangers whose messages do not end, beside somebody who joins.
#[tokio::test]
async fn strangers_keep_nobody_from_joining() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    // All at once: a handshake that is only timed out, and not evicted, holds its place for 10 s.
    let open = async || {
        let mut connection = Connection::open(mesh.control_plane()).await;
        let _ = connection.try_send(b"\x16\x03\x01\x02\x00").await;
        connection
    };
    let half_open = futures_util::future::join_all((0..2_500).map(|_| open())).await;
    let begun = Instant::now();
    Peer::issue(&mesh, "shop", "cart", "cart-1").await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    drop(half_open);

    let nobody = Peer::without_certificate();
    let mut strangers = Vec::new();
    for _ in 0..150 {
        strangers.push(nobody.channel(mesh.control_plane()).await.unwrap());
    }
    Peer::issue(&mesh, "shop", "cart", "cart-2").await;
}

/// Connections of one workload that carry nothing, beside its own that does and beside others'.
#[tokio::test]
async fn one_workload_has_few_connections_and_loses_those_it_does_not_use() {
    const MOST: usize = 16;
    let mesh = Mesh::start(MeshOptions::default()).await;
    let mallory = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
    let honest = Peer::issue(&mesh, "shop", "web", "web-1").await;
    let mut used = streams(mallory.channel(mesh.control_plane()).await.unwrap(), "cart-1").await;
    let mut others = streams(honest.channel(mesh.control_plane()).await.unwrap(), "web-1").await;
    let mut idle = Vec::new();
    for _ in 0..3 * MOST {
        let mut connection = mallory.connect(mesh.control_plane(), &["h2"]).await.unwrap();
        // The server's SETTINGS: it has its place.
        connection.take(9).await;
        idle.push(connection);
    }
    // One that does not answer PINGs is ended after 15 s; these go at once.
    let begun = Instant::now();
    for connection in &mut idle[..=2 * MOST] {
        tokio::time::timeout(Duration::from_secs(8), connection.take_to_end()).await.expect("its place is another's");
    }
    assert!(begun.elapsed() < Duration::from_secs(9));
    for connection in &mut idle[2 * MOST + 1..] {
        let frames = connection.try_send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        assert!(frames.is_ok(), "the last {} are open", MOST - 1);
    }
    for (streams, who) in [(&mut used, "the one with streams"), (&mut others, "another workload's")] {
        assert!(tokio::time::timeout(Duration::from_millis(500), streams.ends()).await.is_err(), "{who} goes on");
    }
    Peer::issue(&mesh, "shop", "stock", "stock-1").await;
}

#[tokio::test]
async fn a_stranger_is_read_for_64_kib_and_told_little() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let nobody = Peer::without_certificate();
    let ask = async |request: IssueRequest| {
        let mut client = IdentityClient::new(nobody.channel(mesh.control_plane()).await.unwrap());
        client.issue(request).await.map(drop).unwrap_err()
    };
    // Control characters are what grows most when it is quoted.
    let named = IssueRequest { workload: "\u{1b}".repeat(15_000), ..IssueRequest::default() };
    let refused = ask(named).await;
    assert!(refused.message().starts_with("workload_name"), "{refused:?}");
    assert!(refused.message().len() < 2_500, "{}", refused.message().len());
    for bytes in [66 * 1024, 1 << 20] {
        let refused = ask(IssueRequest { csr_der: vec![0; bytes], ..IssueRequest::default() }).await;
        assert!(!refused.message().starts_with("csr"), "{bytes} were read: {refused:?}");
    }
    // Many small ones on one connection are as much as one large one.
    let mut client = IdentityClient::new(nobody.channel(mesh.control_plane()).await.unwrap());
    let mut read = 0;
    while read < (1 << 20) {
        let request = IssueRequest { csr_der: vec![0; 8 * 1024], ..IssueRequest::default() };
        let status = client.issue(request).await.map(drop).unwrap_err();
        if !status.message().contains(':') || status.code() == Code::Unknown || status.code() == Code::Unavailable {
            break;
        }
        read += 8 * 1024;
    }
    assert!(read <= 64 * 1024, "{read}");
}

#[tokio::test]
async fn a_peers_text_is_cut_and_escaped() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
    let open = streams(peer.channel(mesh.control_plane()).await.unwrap(), "cart-1").await;
    let refusal = format!("no\n2026-11-28T00:00:00Z ERROR outrigger_control_plane::ca: forged\n{}", "x".repeat(50_000));
    let ack = Ack { key: Some(own_key()), version: 1, refusal };
    open.requests.send(WatchRequest { kind: Some(watch_request::Kind::Ack(ack)) }).await.unwrap();
    let shown = within(Duration::from_secs(20), "status shows the refusal", async || {
        let status = mesh.control_plane_get("/status").await;
        status["sidecars"][0]["refusals"][0]["reason"].as_str().map(str::to_owned)
    })
    .await;
    assert!(shown.starts_with("no\\n2026") && !shown.contains('\n'), "{shown}");
    assert!(shown.chars().count() <= 210, "{}", shown.len());
}

#[tokio::test]
async fn status_lists_who_was_refused_and_who_went() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let token = mesh.token("shop", "cart", &[]);
    let (first, thief) = (Peer::without_certificate(), Peer::without_certificate());
    first.ask_for_certificate(&mesh, &first.csr(), &token, "cart-1").await.unwrap();
    for _ in 0..2 {
        thief.ask_for_certificate(&mesh, &thief.csr(), &token, "cart-1").await.unwrap_err();
    }
    let peer = Peer::issue(&mesh, "shop", "web", "web-1").await;
    drop(streams(peer.channel(mesh.control_plane()).await.unwrap(), "web-1").await);
    let status = eventually("it has gone", async || {
        let status = mesh.control_plane_get("/status").await;
        status["gone"].as_array().is_some_and(|gone| !gone.is_empty()).then_some(status)
    })
    .await;
    let join = &status["refused_joins"][0];
    assert_eq!(
        (&join["what"], &join["count"]),
        (&"127.0.0.1 (cart-1): token_replayed".into(), &2.into()),
        "{status:#}"
    );
    assert!(status["gone"][0]["what"].as_str().unwrap().contains("web-1"), "{status:#}");
    // Who comes back has not gone.
    let _back = streams(peer.channel(mesh.control_plane()).await.unwrap(), "web-1").await;
    let status = mesh.control_plane_get("/status").await;
    assert!(status["gone"].as_array().unwrap().is_empty(), "{status:#}");
}
