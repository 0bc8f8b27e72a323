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

/// Waits until the certificate of a sidecar has ended.
async fn ended(sidecar: &Sidecar) {
    within(Duration::from_secs(60), "the certificate ends", async || {
        let left = sidecar.metrics().await.sum("outrigger_certificate_expiry_seconds", &[]);
        (left < 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_control_plane_that_was_away_for_longer_than_a_certificate_lives_is_not_missed_after() {
    let pair = pair(Some(Duration::from_secs(10))).await;
    pair.mesh.stop_control_plane().await;
    ended(&pair.near).await;
    ended(&pair.far).await;
    assert_eq!(pair.near.health("/ready").await.0, 503);
    // The tokens are spent: nothing but the certificates that ended is left to prove with.
    pair.mesh.start_control_plane().await;
    pair.near.ready().await;
    pair.far.ready().await;
    eventually("a call goes through", async || {
        (wire::get(pair.near.outbound(), "/").await.status == 200).then_some(())
    })
    .await;
    let issued = pair.mesh.control_plane_get("/status").await;
    assert_eq!(issued["leases"], 1, "registered again, with its label: {issued}");
}

#[tokio::test]
async fn a_sidecar_that_starts_with_a_certificate_that_ended_recovers() {
    let Pair { near, far, app, mesh } = pair(Some(Duration::from_secs(10))).await;
    mesh.stop_control_plane().await;
    ended(&near).await;
    near.stop().await;
    far.stop().await;
    mesh.start_control_plane().await;
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).no_token().start().await;
    // With the token that it has spent beside it.
    let near = mesh.sidecar("cart-1").outbound("catalog:80").token("outrigger1.e30.AAAA").start().await;
    eventually("a call goes through", async || (wire::get(near.outbound(), "/").await.status == 200).then_some(()))
        .await;
    drop(far);
}

#[tokio::test]
async fn after_the_grace_a_token_is_needed_and_that_is_told() {
    let pair = pair(Some(Duration::from_secs(10))).await;
    let config = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                  outrigger-system}\nspec: {leafLifetime: 10s, renewGrace: 0s}\n";
    pair.mesh.write("mesh-config.yaml", config);
    pair.mesh.settled().await;
    pair.mesh.stop_control_plane().await;
    ended(&pair.near).await;
    pair.mesh.start_control_plane().await;
    let body = not_ready(&pair.near, "certificate_expired").await;
    let hint = body["hint"].as_str().unwrap();
    assert!(hint.contains("renewGrace") && hint.contains("outrigger token create"), "{hint}");
    std::fs::write(pair.mesh.path("cart-1.token"), pair.mesh.token("shop", "cart", &[])).unwrap();
    pair.near.ready().await;
}

#[tokio::test]
async fn a_process_that_was_suspended_for_longer_than_its_certificate_lives_recovers() {
    let options = MeshOptions { leaf_lifetime: Some(Duration::from_secs(10)), ..MeshOptions::default() };
    let mesh = Mesh::start(options).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let mut far = builder.spawn(outrigger_tests::under_test!()).await;
    far.ready().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
    far.signal("STOP");
    // Longer than what is left of the certificate that it has.
    let woken = Instant::now() + Duration::from_secs(11);
    within(Duration::from_secs(60), "its certificate ends", async || (Instant::now() > woken).then_some(())).await;
    far.signal("CONT");
    within(Duration::from_secs(60), "it serves again", async || {
        (wire::get(near.outbound(), "/").await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn late_renewals_need_the_key_the_record_and_this_connection() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
    let other = Peer::issue(&mesh, "shop", "pay", "pay-1").await;
    let fresh = Peer::without_certificate();
    let csr = fresh.csr();
    let word = |answer: Result<outrigger_api::wire::IssueResponse, tonic::Status>| match answer {
        Ok(_) => "issued".to_owned(),
        Err(status) => status.message().split(':').next().unwrap_or_default().to_owned(),
    };
    // Signed by another key, over another request, for another connection, or not at all.
    let mut before = Vec::new();
    let answer = peer.renew_late(&mesh, &csr, "cart-1", |message| {
        before = peer.sign(message);
        other.sign(message)
    });
    assert_eq!(word(answer.await), "certificate_proof");
    let replayed = peer.renew_late(&mesh, &csr, "cart-1", |_| before.clone()).await;
    assert_eq!(word(replayed), "certificate_proof", "a signature of another connection");
    let other_request = peer.renew_late(&mesh, &csr, "cart-1", |message| {
        let mut message = message.to_vec();
        *message.last_mut().unwrap() ^= 1;
        peer.sign(&message)
    });
    assert_eq!(word(other_request.await), "certificate_proof");
    assert_eq!(word(peer.renew_late(&mesh, &csr, "cart-1", |_| Vec::new()).await), "certificate_proof");
    // A chain of another authority, none at all, and one that is rightly signed and on no record.
    let id = "spiffe://outrigger.local/ns/shop/sa/cart";
    let foreign = outrigger_tests::peer::Authority::new().leaf(&[id], |_| {});
    assert_eq!(
        word(foreign.renew_late(&mesh, &csr, "peer-1", |message| foreign.sign(message)).await),
        "certificate_proof"
    );
    assert_eq!(word(fresh.renew_late(&mesh, &csr, "cart-1", |message| fresh.sign(message)).await), "certificate_proof");
    let unknown = outrigger_tests::peer::Authority::of(&mesh).leaf(&[id], |leaf| {
        leaf.not_before = rcgen::date_time_ymd(2026, 1, 1);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        leaf.not_after = rcgen::date_time_ymd(1970, 1, 1) + now + Duration::from_secs(3600);
    });
    assert_eq!(
        word(unknown.renew_late(&mesh, &csr, "peer-1", |message| unknown.sign(message)).await),
        "certificate_unknown"
    );
    // Another name, and a request for another identity.
    assert_eq!(word(peer.renew_late(&mesh, &csr, "cart-2", |message| peer.sign(message)).await), "workload_name");
    // The right one; and once its successor was used, the old key is of no use any more.
    let issued = peer.renew_late(&mesh, &csr, "cart-1", |message| peer.sign(message)).await.unwrap();
    let successor = Peer { key: fresh.key, chain: issued.chain_der.into_iter().map(Into::into).collect() };
    let again = Peer::without_certificate();
    assert_eq!(
        word(peer.renew_late(&mesh, &again.csr(), "cart-1", |message| peer.sign(message)).await),
        "issued",
        "a lost answer"
    );
    outrigger_tests::claim::Lease::open(mesh.control_plane(), &successor).await.unwrap();
    let late = peer.renew_late(&mesh, &again.csr(), "cart-1", |message| peer.sign(message)).await;
    assert_eq!(word(late), "certificate_unknown");
}

#[tokio::test]
async fn a_typo_in_the_identity_does_not_spend_the_token() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let token = mesh.token("shop", "cart", &[]);
    for (namespace, account) in [("shop", "crat"), ("shp", "cart")] {
        let builder = mesh.sidecar("cart-1").namespace(namespace).service_account(account).stateless();
        let wrong = builder.token(&token).start_unready();
        let body = not_ready(&wrong, "csr_identity").await;
        let hint = body["hint"].as_str().unwrap();
        for part in ["ns/shop/sa/cart", namespace, account, "--service-account", "not spent"] {
            assert!(hint.contains(part), "{part}: {hint}");
        }
        wrong.stop().await;
    }
    mesh.sidecar("cart-1").token(&token).start().await;
}

/// The control plane's state comes back from a backup: what was in force since is not taken back, and is told.
#[tokio::test]
async fn a_control_plane_from_a_backup_takes_no_sidecar_back() {
    let Pair { near, far, mesh, app: _app } = pair(None).await;
    let other = Mesh::start(MeshOptions::default()).await;
    let record = mesh.path("control-plane/ca/bundle.json");
    let backup = std::fs::read(&record).unwrap();
    let trust = mesh.path("control-plane/ca/trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::copy(other.trust_bundle(), trust.join("other.pem")).unwrap();
    mesh.reload_control_plane();
    let roots = async || far.admin_get("/certs").await["trust_bundle"]["roots"].as_array().unwrap().len();
    eventually("both roots are believed", async || (roots().await == 2).then_some(())).await;
    let in_force = mesh.control_plane_get("/status").await["authority"]["generation"].as_u64().unwrap();
    mesh.stop_control_plane().await;
    std::fs::remove_dir_all(&trust).unwrap();
    std::fs::write(&record, backup).unwrap();
    mesh.start_control_plane().await;
    let refusal = eventually("status tells that sidecars refuse it", async || {
        let status = mesh.control_plane_get("/status").await;
        let refusal = |sidecar: &Value| sidecar["refusals"][0]["reason"].as_str().map(str::to_owned);
        status["sidecars"].as_array().unwrap().iter().find_map(refusal)
    })
    .await;
    assert!(refusal.contains("other roots") && refusal.ends_with("and start it again"), "{refusal}");
    assert_eq!(roots().await, 2);
    let answer = wire::get(near.outbound(), "/").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    // Where the operator means it, it is a new set with a new generation, which is the clock's.
    mesh.stop_control_plane().await;
    eventually("a second has gone by since the last change", async || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        (now > in_force).then_some(())
    })
    .await;
    std::fs::remove_file(&record).unwrap();
    mesh.start_control_plane().await;
    eventually("the own root alone", async || (roots().await == 1).then_some(())).await;
    assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
}
