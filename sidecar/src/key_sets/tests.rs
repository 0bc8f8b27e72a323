//! Servers of key sets that are slow, huge, redirecting, failing, rotating, and one that is as it should be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_api::policy::jwt::{Authentication, KeySetUrl, Keys, Place, Policy, RemoteKeys, Rule};
use outrigger_api::snapshot::{MeshSettings, MtlsMode, Workload};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair as CertificateKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::fetch::{Failure, Fetcher};
use super::{KeySets, Settings, run};
use crate::config::Limits;

const PATIENCE: Duration = Duration::from_secs(30);

/// A key set of one new key, by this name.
fn key_set(id: &str) -> String {
    let key = Ed25519KeyPair::generate().unwrap();
    let x = URL_SAFE_NO_PAD.encode(key.public_key().as_ref());
    format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","kid":"{id}","x":"{x}"}}]}}"#)
}

fn answer(status: &str, more: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{more}\r\n{body}", body.len())
}

/// A server that gives the answers in turn, the last one again and again, and counts what it is asked. An empty answer:
/// none, and the connection stays open.
struct Server {
    url: KeySetUrl,
    asked: Arc<AtomicUsize>,
}

async fn server(answers: Vec<String>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = KeySetUrl::parse(&format!("http://{}/keys", listener.local_addr().unwrap())).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = asked.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let turn = counting.fetch_add(1, Ordering::SeqCst);
            let answer = answers[turn.min(answers.len() - 1)].clone();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                if answer.is_empty() {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    Server { url, asked }
}

async fn fetched(answer: String, timeout: Duration) -> String {
    let server = server(vec![answer]).await;
    let fetcher = Fetcher::new(None, None, 100_000);
    let outcome = fetcher.fetch(&server.url, timeout).await;
    outcome.map_or_else(|failure| failure.to_string(), |_| "keys".to_owned())
}

#[tokio::test]
async fn what_servers_answer() {
    let other = server(vec![answer("200 OK", "", &key_set("k"))]).await;
    let location = format!("location: {}\r\n", other.url);
    let huge = " ".repeat(200_000);
    let cases = [
        (answer("200 OK", "", &key_set("k")), "keys"),
        (answer("302 Found", &location, ""), "the server redirects (302 Found), which is not followed"),
        (answer("308 Permanent Redirect", &location, ""), "the server redirects"),
        (answer("404 Not Found", "", &key_set("k")), "the server answers 404 Not Found"),
        (answer("503 Service Unavailable", "", ""), "the server answers 503"),
        (answer("204 No Content", "", ""), "the server answers 204"),
        (answer("200 OK", "", &huge), "the answer is larger than 100000 bytes"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned(), "the answer broke off"),
        (format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n30d40\r\n{huge}\r\n"), "the answer is larger"),
        (answer("200 OK", "", "<html>"), "the key set is no JSON"),
        (answer("200 OK", "", r#"{"keys": []}"#), "the key set is empty"),
        (answer("200 OK", "", r#"{"keys": [{"kty": "oct", "k": "AAAA"}]}"#), "the key set has no key that can be used"),
        ("no HTTP\r\n\r\n".to_owned(), "HTTP: "),
    ];
    for (given, expected) in cases {
        let outcome = fetched(given.clone(), PATIENCE).await;
        assert!(outcome.starts_with(expected), "{given:.80}: {outcome}");
    }
    assert_eq!(other.asked.load(Ordering::SeqCst), 0, "no redirect is followed");
    let slow = fetched(String::new(), Duration::from_millis(50)).await;
    assert!(slow.starts_with("no answer within 50ms"), "{slow}");
    let drip = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned();
    assert!(fetched(drip, PATIENCE).await.starts_with("the answer broke off"));
}

#[tokio::test]
async fn nobody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = KeySetUrl::parse(&format!("http://{}/keys", listener.local_addr().unwrap())).unwrap();
    drop(listener);
    let failure = Fetcher::new(None, None, 1000).fetch(&url, PATIENCE).await.unwrap_err();
    assert!(matches!(failure, Failure::Connect(_)), "{failure}");
}

/// `https` with a certificate of a root that is trusted, and with one of another.
#[tokio::test]
async fn tls_is_checked() {
    let root_key = CertificateKey::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap();
    let issuer = Issuer::new(params, root_key);
    let key = CertificateKey::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(crate::tls::provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer("200 OK", "", &key_set("k")).as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let [good, other, none] = ["good.pem", "other.pem", "none.pem"].map(|name| directory.path().join(name));
    std::fs::write(&good, root.pem()).unwrap();
    let stranger = CertificateKey::generate().unwrap();
    std::fs::write(&other, CertificateParams::new(Vec::new()).unwrap().self_signed(&stranger).unwrap().pem()).unwrap();
    let by_name = KeySetUrl::parse(&format!("https://localhost:{port}/keys")).unwrap();
    let by_address = KeySetUrl::parse(&format!("https://127.0.0.1:{port}/keys")).unwrap();
    let fetch = async |roots: &std::path::Path, url: &KeySetUrl| {
        Fetcher::new(None, Some(roots.to_owned()), 1000).fetch(url, PATIENCE).await.map(|_| ())
    };
    fetch(&good, &by_name).await.unwrap();
    let failure = fetch(&good, &by_address).await.unwrap_err();
    assert!(matches!(failure, Failure::Tls(_)), "another name: {failure}");
    let failure = fetch(&other, &by_name).await.unwrap_err();
    assert!(matches!(failure, Failure::Tls(_)), "another root: {failure}");
    let failure = fetch(&none, &by_name).await.unwrap_err();
    assert!(matches!(failure, Failure::Roots(_)), "no root: {failure}");
}

fn own(url: &KeySetUrl) -> Option<Arc<Workload>> {
    let keys = Keys::Remote { url: url.clone(), timeout_ms: 5000 };
    let rule = Rule {
        issuer: "a".into(),
        audiences: Vec::new(),
        keys,
        from: vec![Place::authorization()],
        forward: false,
        claim_headers: Vec::new(),
        payload_header: None,
    };
    let policy =
        Policy { namespace: "shop".into(), name: "a".into(), services: Vec::new(), required: false, rules: vec![rule] };
    Some(Arc::new(Workload {
        name: "pay-1".into(),
        namespace: "shop".into(),
        service_account: "pay".into(),
        ports: Default::default(),
        default_mtls_mode: MtlsMode::Permissive,
        mesh: MeshSettings::default(),
        registered: true,
        labels: Default::default(),
        authorization: Default::default(),
        rate_limits: Default::default(),
        authentication: Arc::new(Authentication { policies: vec![policy] }),
    }))
}

struct Following {
    key_sets: KeySets,
    own: watch::Sender<Option<Arc<Workload>>>,
    task: tokio::task::JoinHandle<()>,
}

fn follow(url: &KeySetUrl, limits: &Limits, state: Option<&std::path::Path>) -> Following {
    let key_sets = KeySets::new(limits);
    let (own, told) = watch::channel(own(url));
    let settings = Settings { state: state.map(Into::into), mark: None, roots: None, limits: limits.clone() };
    let task = tokio::spawn(run(key_sets.clone(), told, settings));
    Following { key_sets, own, task }
}

impl Following {
    /// The text of the key set, once one is known.
    async fn text(&self, url: &KeySetUrl) -> String {
        let mut ended = self.key_sets.0.ended.subscribe();
        let wait = async {
            loop {
                if let Some(set) = self.key_sets.of(url) {
                    return set.text().to_owned();
                }
                ended.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap()
    }
}

#[tokio::test]
async fn a_rotated_set_is_fetched_when_it_is_asked_for_and_not_too_often() {
    let (first, second) = (key_set("one"), key_set("two"));
    let server = server(vec![answer("200 OK", "", &first), answer("200 OK", "", &second)]).await;
    let patient = Limits { key_set_again: PATIENCE * 10, ..Limits::default() };
    let following = follow(&server.url, &patient, None);
    assert_eq!(following.text(&server.url).await, first);
    // The last fetch began a moment ago.
    assert!(!following.key_sets.refreshed(&server.url).await);
    assert_eq!(server.asked.load(Ordering::SeqCst), 1);
    let hasty = Limits { key_set_again: Duration::ZERO, ..Limits::default() };
    let following = follow(&server.url, &hasty, None);
    assert_eq!(following.text(&server.url).await, second);
    let before = following.key_sets.version();
    assert!(following.key_sets.refreshed(&server.url).await);
    assert_eq!(server.asked.load(Ordering::SeqCst), 3);
    assert_eq!(following.key_sets.version(), before, "the same keys");
    // Nobody names it any more.
    following.own.send_replace(None);
    following.own.send_replace(own(&KeySetUrl::parse("http://127.0.0.1:1/other").unwrap()));
    let gone = async {
        while following.key_sets.of(&server.url).is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
}

#[tokio::test]
async fn the_last_good_set_is_kept_while_its_server_fails_and_over_a_restart() {
    let set = key_set("one");
    let server = server(vec![answer("200 OK", "", &set), answer("500 Oops", "", "")]).await;
    let state = tempfile::tempdir().unwrap();
    let limits = Limits { key_set_again: Duration::ZERO, ..Limits::default() };
    let following = follow(&server.url, &limits, Some(state.path()));
    assert_eq!(following.text(&server.url).await, set);
    assert!(following.key_sets.refreshed(&server.url).await);
    assert_eq!(following.text(&server.url).await, set, "the failure changes nothing");
    let kept = state.path().join("key-sets.json");
    let written = async {
        while !kept.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, written).await.unwrap();
    following.task.abort();
    let again = follow(&server.url, &limits, Some(state.path()));
    assert_eq!(again.text(&server.url).await, set, "the server answers 500 alone");
    again.task.abort();
    // Too old: as if there were none.
    let old = Limits { key_set_lifetime: Duration::ZERO, ..limits };
    let too_old = follow(&server.url, &old, Some(state.path()));
    assert!(too_old.key_sets.refreshed(&server.url).await);
    assert!(too_old.key_sets.of(&server.url).is_none());
}
