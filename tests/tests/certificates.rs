//! Promise: certificates come, renew and end without a failed request. A sidecar lives on what it has while nobody
//! answers, starts again from `--state`, and says what is wrong when it cannot get a certificate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outrigger_tests::eventually::within;
use outrigger_tests::peer::Peer;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually, wire};
use serde_json::Value;

/// Requests that go on until told to stop; says how many were asked, and which failed.
struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    /// Half of the clients keep a connection, the other half open one for each request.
    fn begin(address: std::net::SocketAddr) -> Load {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..4).map(|number| {
            let (stop, asked) = (stop.clone(), asked.clone());
            tokio::spawn(async move {
                let mut failed = Vec::new();
                let mut client = Connection::open(address).await;
                while !stop.load(Ordering::Relaxed) {
                    if number % 2 == 0 {
                        client = Connection::open(address).await;
                    }
                    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
                    match client.try_response(false).await {
                        Ok(answer) if answer.status == 200 && answer.is_whole() => {}
                        Ok(answer) => failed.push(format!("{} {}", answer.status, answer.text())),
                        Err(end) => {
                            failed.push(format!("{end:?}"));
                            client = Connection::open(address).await;
                        }
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
                failed
            })
        });
        let tasks = tasks.collect();
        Load { stop, asked, tasks }
    }

    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            assert_eq!(task.await.unwrap(), Vec::<String>::new());
        }
        self.asked.load(Ordering::Relaxed)
    }

    /// Until so many more were answered.
    async fn more(&self, count: usize) {
        let goal = self.asked.load(Ordering::Relaxed) + count;
        eventually("requests are answered", async || (self.asked.load(Ordering::Relaxed) >= goal).then_some(())).await;
    }
}

struct Pair {
    near: Sidecar,
    far: Sidecar,
    app: Application,
    mesh: Mesh,
}

async fn pair(leaf_lifetime: Option<Duration>) -> Pair {
    let mesh = Mesh::start(MeshOptions { leaf_lifetime, ..MeshOptions::default() }).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { near, far, app, mesh }
}

async fn serial(sidecar: &Sidecar) -> String {
    sidecar.admin_get("/certs").await["certificate"]["serial"].as_str().expect("a serial").to_owned()
}

#[tokio::test]
async fn leaves_of_ten_seconds_are_renewed_under_load_and_no_request_fails() {
    let pair = pair(Some(Duration::from_secs(10))).await;
    let first = [serial(&pair.near).await, serial(&pair.far).await];
    let load = Load::begin(pair.near.outbound());
    // Two renewals of each side: the first certificates have ended by then.
    for round in 1..=2 {
        let before = [serial(&pair.near).await, serial(&pair.far).await];
        eventually(&format!("renewal {round}"), async || {
            let now = [serial(&pair.near).await, serial(&pair.far).await];
            (now[0] != before[0] && now[1] != before[1]).then_some(())
        })
        .await;
    }
    load.more(50).await;
    assert!(load.end().await > 500);
    assert!(serial(&pair.near).await != first[0] && serial(&pair.far).await != first[1]);
}

#[tokio::test]
async fn a_renewal_that_is_asked_for_comes_at_once() {
    let pair = pair(None).await;
    let before = serial(&pair.far).await;
    let load = Load::begin(pair.near.outbound());
    load.more(20).await;
    assert_eq!(pair.far.admin_post("/certs/renew", "").await.status, 202);
    within(Duration::from_secs(5), "the new leaf", async || (serial(&pair.far).await != before).then_some(())).await;
    let peer = Peer::issue(&pair.mesh, "shop", "web", "web-1").await;
    let shown = within(Duration::from_secs(5), "new connections show the new leaf", async || {
        let connection = peer.connect(pair.far.inbound(), &["outrigger/h1"]).await.unwrap();
        let chain = connection.peer_certificates();
        let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        let serial = leaf.raw_serial_as_string().replace(':', "");
        (!same_serial(&serial, &before)).then_some(serial)
    })
    .await;
    assert!(same_serial(&shown, &serial(&pair.far).await), "{shown}");
    load.more(50).await;
    load.end().await;
}

fn same_serial(one: &str, other: &str) -> bool {
    let plain = |text: &str| text.replace(':', "").trim_start_matches('0').to_lowercase();
    plain(one) == plain(other)
}

#[tokio::test]
async fn a_restart_without_a_control_plane_serves_from_state() {
    let Pair { near, far, app, mesh } = pair(None).await;
    assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
    // The copy of what is known names the endpoint, or the own service.
    for (sidecar, known) in [(&near, "catalog-1"), (&far, "catalog")] {
        let state = sidecar.state.clone().unwrap();
        let files = || std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap());
        eventually("the snapshot is on disk", async || {
            let mut texts = files().filter_map(|file| std::fs::read(file.path()).ok());
            texts.any(|text| wire::find(&text, known.as_bytes()).is_some()).then_some(())
        })
        .await;
        for file in files() {
            use std::os::unix::fs::PermissionsExt;
            // A temporary file may have got its name meanwhile, by which it was looked at or will not be.
            let Ok(metadata) = file.metadata() else { continue };
            let mode = metadata.permissions().mode() & 0o777;
            assert!(mode & 0o077 == 0, "{:?} is {mode:o}", file.path());
        }
    }
    // The endpoints in the copy are addresses: the server keeps its own.
    let mesh_port = far.inbound();
    mesh.kill_control_plane().await;
    far.stop().await;
    near.stop().await;
    let begun = Instant::now();
    let far = mesh
        .sidecar("catalog-1")
        .label("app", "catalog")
        .inbound(app.address())
        .config(|config| config.inbound[0].listen = mesh_port)
        .no_token()
        .start()
        .await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").no_token().start().await;
    let answer = wire::get(near.outbound(), "/").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(near.health("/ready").await.0, 200);
    assert_eq!(near.metrics().await.sum("outrigger_control_plane_connected", &[]), 0.0);
    drop(far);
}

#[tokio::test]
async fn a_control_plane_that_is_killed_and_started_again_is_not_missed() {
    let pair = pair(None).await;
    let load = Load::begin(pair.near.outbound());
    load.more(50).await;
    let bundle = std::fs::read(pair.mesh.trust_bundle()).unwrap();
    pair.mesh.kill_control_plane().await;
    let disconnected = async |sidecar: &Sidecar, value: f64| {
        (sidecar.metrics().await.sum("outrigger_control_plane_connected", &[]) == value).then_some(())
    };
    eventually("the loss is seen", async || disconnected(&pair.near, 0.0).await).await;
    load.more(50).await;
    assert_eq!(pair.near.health("/ready").await.0, 200, "the last good state serves on");
    pair.mesh.start_control_plane().await;
    assert_eq!(std::fs::read(pair.mesh.trust_bundle()).unwrap(), bundle, "the same authority");
    within(Duration::from_secs(10), "both are connected again", async || {
        let (near, far) = (disconnected(&pair.near, 1.0).await, disconnected(&pair.far, 1.0).await);
        near.and(far)
    })
    .await;
    load.more(50).await;
    load.end().await;
    let status = pair.mesh.control_plane_get("/status").await;
    assert_eq!(status["leases"], 1, "{status}");
    // The authority goes on issuing, and what it issues is believed.
    let peer = Peer::issue(&pair.mesh, "shop", "web", "web-1").await;
    let mut connection = peer.connect(pair.far.inbound(), &["outrigger/h1"]).await.unwrap();
    assert_eq!(connection.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
}

async fn not_ready(sidecar: &Sidecar, reason: &str) -> Value {
    eventually(&format!("/ready says {reason}"), async || {
        let (status, body) = sidecar.health("/ready").await;
        (status == 503 && body["reason"] == reason).then_some(body)
    })
    .await
}

#[tokio::test]
async fn a_bad_token_is_told_in_ready_and_a_good_one_heals() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let other = Mesh::start(MeshOptions::default()).await;
    let spent = mesh.token("shop", "cart", &[]);
    let _first = mesh.sidecar("cart-1").token(&spent).start().await;
    let expired = mesh.token_with("shop", "cart", &[], 1, Duration::from_secs(1));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let cases = [
        ("a-2", "token_replayed", spent),
        ("b-2", "token_expired", expired),
        ("c-2", "token_signature", other.token("shop", "cart", &[])),
        ("d-2", "token_malformed", "not a token".to_owned()),
    ];
    for (name, reason, token) in cases {
        let sidecar = mesh.sidecar(name).service_account("cart").token(&token).start_unready();
        let body = not_ready(&sidecar, reason).await;
        let hint = body["hint"].as_str().unwrap();
        assert!(hint.len() > 20, "{reason}: {hint:?} says what to do");
        assert!(!body.to_string().contains(&token), "the token itself is never shown");
        assert_eq!(sidecar.health("/live").await.0, 200);
        // The file is read anew at each try.
        std::fs::write(mesh.path(&format!("{name}.token")), mesh.token("shop", "cart", &[]) + "\n").unwrap();
        sidecar.admin_post("/certs/renew", "").await;
        sidecar.ready().await;
    }
}

#[tokio::test]
async fn another_identity_than_the_tokens_is_refused() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let sidecar =
        mesh.sidecar("cart-1").service_account("admin").token(&mesh.token("shop", "cart", &[])).start_unready();
    let body = eventually("/ready tells", async || {
        let (status, body) = sidecar.health("/ready").await;
        (status == 503 && body["reason"] != "certificate_pending").then_some(body)
    })
    .await;
    assert!(body["hint"].as_str().unwrap().contains("admin"), "{body}");
}

#[tokio::test]
async fn a_wrong_trust_bundle_is_told() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let other = Mesh::start(MeshOptions::default()).await;
    let sidecar = mesh.sidecar("cart-1").config(|config| config.trust_bundle = other.trust_bundle()).start_unready();
    let body = eventually("/ready tells", async || {
        let (status, body) = sidecar.health("/ready").await;
        (status == 503 && body["reason"] != "certificate_pending").then_some(body)
    })
    .await;
    assert!(body.to_string().contains("trust"), "{body}");
}

#[tokio::test]
async fn a_control_plane_that_is_not_there_is_told_and_waited_for() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.stop_control_plane().await;
    let sidecar = mesh.sidecar("cart-1").start_unready();
    let body = eventually("/ready tells", async || {
        let (status, body) = sidecar.health("/ready").await;
        (status == 503 && body["reason"] != "certificate_pending").then_some(body)
    })
    .await;
    assert!(body["hint"].as_str().unwrap().contains(&mesh.control_plane().to_string()), "{body}");
    mesh.start_control_plane().await;
    sidecar.ready().await;
}

#[tokio::test]
async fn a_request_for_more_than_the_proof_gives_is_refused() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let wanted = "spiffe://outrigger.local/ns/shop/sa/admin";
    let peer = Peer::without_certificate();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(wanted.try_into().unwrap())];
    let csr = params.serialize_request(&peer.key).unwrap();
    let token = mesh.token("shop", "cart", &[]);
    let refused = peer.ask_for_certificate(&mesh, csr.der(), &token, "cart-1").await.unwrap_err();
    assert!(refused.message().starts_with("csr_identity"), "{refused}");
    // Nothing was spent on it.
    assert!(peer.ask_for_certificate(&mesh, &peer.csr(), &token, "cart-1").await.is_ok());
}
