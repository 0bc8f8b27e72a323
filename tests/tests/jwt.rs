//! Promise: RequestAuthentications decide which tokens count: with real keys and signatures, on HTTP/1.1, HTTP/2 and gRPC, with
//! key sets in the document and behind a URL. The application learns what a token says from fields that no caller can write.
//! What the data path decides, `explain` of files and of the running sidecar decide alike.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrigger_api::compile::load;
use outrigger_api::explain::{Asked, Question, explain};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::name::ServiceName;
use outrigger_api::resource::SourceFile;
use outrigger_tests::eventually::within;
use outrigger_tests::grpc::Http2;
use outrigger_tests::issuer::{SigningKey, key_set};
use outrigger_tests::peer::TCP;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Peer, Sidecar, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The promise is a second; the machine that runs the tests may be busy with others.
const SOON: Duration = Duration::from_secs(20);
const ISSUER: &str = "https://issuer.test";

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(protocol: &str) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some(protocol));
    let hasty = |limits: &mut outrigger_sidecar::config::Limits| limits.key_set_again = Duration::ZERO;
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).limits(hasty).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, far, mesh }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn claims(more: &Value) -> Value {
    let mut claims = json!({"iss": ISSUER, "sub": "alice", "exp": now() + 600});
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    claims
}

/// `keys`: `jwks: ...` or `jwksUri: ...`, and what else stands in the rule; `more`: what stands beside the rules.
fn authentication(keys: &str, more: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: tokens, namespace: shop}}\nspec:\n  \
         selector: {{matchLabels: {{app: catalog}}}}\n{more}  jwtRules:\n  - issuer: {ISSUER}\n    {keys}\n"
    )
}

fn inline(key: &SigningKey) -> String {
    format!("jwks: '{}'", key_set(&[key.jwk()]))
}

const REQUIRED: &str = "  required: true\n";

fn get(fields: &[(&str, &str)]) -> String {
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("GET /v1/charges HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n")
}

fn bearer(token: &str) -> String {
    get(&[("Authorization", &format!("Bearer {token}"))])
}

async fn becomes(client: &mut Connection, request: &str, status: u16) {
    within(SOON, &format!("{status}"), async || (client.ask(request).await.status == status).then_some(())).await;
}

#[tokio::test]
async fn a_token_is_asked_for_and_what_it_says_is_told() {
    let pair = pair("http").await;
    let (key, other) = (SigningKey::new("P-256", "k"), SigningKey::new("P-256", "k"));
    let mut client = Connection::open(pair.near.outbound()).await;
    assert_eq!(client.ask(get(&[])).await.status, 200);
    let told = "outputClaimToHeaders: [{header: x-jwt-sub, claim: sub}, {header: x-jwt-role, claim: realm.role}]\n    \
                outputPayloadToHeader: x-jwt-payload";
    pair.mesh.write("a.yaml", &authentication(&format!("{}\n    {told}", inline(&key)), REQUIRED));
    becomes(&mut client, &get(&[]), 401).await;
    let before = pair.app.count();
    let missing = client.ask(get(&[])).await;
    assert_eq!((missing.reason().as_str(), missing.header("www-authenticate")), ("jwt_missing", Some("Bearer")));
    assert_eq!(
        missing.header("proxy-status"),
        Some("catalog-1; error=http_request_denied; details=\"RequestAuthentication/shop/tokens\"")
    );
    let good = key.token(&claims(&json!({"realm": {"role": "admin"}})));
    let refused = [
        other.token(&claims(&json!({}))),
        key.token(&claims(&json!({"exp": now() - 61}))),
        key.token(&claims(&json!({"iss": "https://other.test"}))),
        format!("{}.", good.rsplit_once('.').unwrap().0),
        "opaque".to_owned(),
    ];
    for token in refused {
        let invalid = client.ask(bearer(&token)).await;
        assert_eq!((invalid.status, invalid.reason().as_str()), (401, "jwt_invalid"), "{token}");
        assert_eq!(invalid.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
    }
    let line = format!("Bearer {good}");
    let twice = get(&[("Authorization", &line), ("Authorization", &line)]);
    assert_eq!(client.ask(twice).await.reason(), "jwt_invalid");
    assert_eq!(pair.app.count(), before, "nothing of that reached the application");
    // The connection goes on; what a caller says in the fields that are told is gone, in every spelling.
    for _ in 0..3 {
        let forged =
            [("x_jwt_sub", "mallory"), ("X-Jwt-Role", "root"), ("x-jwt-other", "kept"), ("Authorization", &line)];
        assert_eq!(client.ask(get(&forged)).await.status, 200);
        let seen = pair.app.last();
        assert_eq!(seen.all("x-jwt-sub"), ["alice"]);
        assert_eq!(seen.all("x-jwt-role"), ["admin"]);
        assert_eq!(seen.all("x-jwt-payload"), [good.split('.').nth(1).unwrap()]);
        assert_eq!((seen.header("authorization"), seen.header("x_jwt_sub")), (None, None));
        assert_eq!(seen.header("x-jwt-other"), Some("kept"));
    }
    // A CORS preflight has none.
    let preflight = "OPTIONS /v1 HTTP/1.1\r\nHost: catalog\r\nOrigin: https://a.test\r\nAccess-Control-Request-Method: \
                     PUT\r\nx-jwt-sub: mallory\r\n\r\n";
    assert_eq!(client.ask(preflight).await.status, 200);
    assert_eq!(pair.app.last().header("x-jwt-sub"), None);
    // Not required: without a token the request goes on, without anything that tells of one; the token itself goes on too.
    let forward = format!("{}\n    forwardOriginalToken: true\n    {told}", inline(&key));
    pair.mesh.write("a.yaml", &authentication(&forward, ""));
    becomes(&mut client, &get(&[("x-jwt-sub", "mallory")]), 200).await;
    assert_eq!(pair.app.last().header("x-jwt-sub"), None);
    assert_eq!(client.ask(bearer(&good)).await.status, 200);
    assert_eq!(pair.app.last().header("authorization"), Some(line.as_str()));
    assert_eq!(client.ask(bearer("opaque")).await.status, 401);
    let labels = [("direction", "inbound"), ("reason", "jwt_invalid"), ("code", "401")];
    eventually("the refusals are counted", async || {
        (pair.far.metrics().await.sum("outrigger_http_requests_total", &labels) >= 7.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_token_in_a_parameter_stays_with_the_sidecar() {
    let pair = pair("http").await;
    let key = SigningKey::new("Ed25519", "k");
    pair.mesh.write("a.yaml", &authentication(&format!("{}\n    fromParams: [token]", inline(&key)), REQUIRED));
    let mut client = Connection::open(pair.near.outbound()).await;
    becomes(&mut client, &get(&[]), 401).await;
    let token = key.token(&claims(&json!({})));
    assert_eq!(client.ask(bearer(&token)).await.reason(), "jwt_missing");
    let request = format!("GET /v1/charges?a=1&token={token}&b HTTP/1.1\r\nHost: catalog\r\n\r\n");
    assert_eq!(client.ask(request).await.status, 200);
    assert_eq!(pair.app.last().target, "/v1/charges?a=1&b");
    let alone = format!("GET /v1/charges?token={token} HTTP/1.1\r\nHost: catalog\r\n\r\n");
    assert_eq!(client.ask(alone).await.status, 200);
    assert_eq!(pair.app.last().target, "/v1/charges");
}

#[tokio::test]
async fn grpc_is_refused_in_its_own_words() {
    let pair = pair("grpc").await;
    let key = SigningKey::new("Ed25519", "k");
    pair.mesh.write("a.yaml", &authentication(&inline(&key), REQUIRED));
    let client = Http2::open(pair.near.outbound()).await;
    within(SOON, "gRPC 16", async || {
        let whole = client.unary("/shop.Catalog/Get", b"x").await.unwrap();
        (whole.grpc_status() == Some("16")).then_some(())
    })
    .await;
    let token = format!("Bearer {}", key.token(&claims(&json!({}))));
    let before = pair.app.count();
    let mut call = client.call("/shop.Catalog/Get", &[("authorization", token.as_str())]).await.unwrap();
    call.write(outrigger_tests::grpc::frame(b"x"), true).await.unwrap();
    let whole = call.answer().await.unwrap().whole().await.unwrap();
    assert_ne!(whole.grpc_status(), Some("16"));
    assert_eq!(pair.app.count(), before + 1);
}

/// The same request on the wire, asked of the running sidecar, and asked of the files.
#[tokio::test]
async fn the_three_ways_agree() {
    let pair = pair("http").await;
    let key = SigningKey::new("RSA", "k");
    let rules = authentication(&format!("{}\n    audiences: [catalog]", inline(&key)), "")
        + "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: scopes, namespace: shop}\nspec:\n  \
           rules:\n  - from: [{source: {requestPrincipals: ['https://issuer.test/*']}}]\n    when: [{key: \
           'request.auth.claims[scope]', values: [read]}]\n  - when: [{key: 'request.auth.claims[realm][roles]', values: \
           [admin]}, {key: request.auth.presenter, values: [console]}]\n";
    let table = [
        (json!({"scope": "read write"}), 200, None),
        (json!({"scope": "write"}), 403, Some("policy_denied")),
        (json!({"scope": ["x", "read"]}), 200, None),
        (json!({"realm": {"roles": ["admin"]}, "azp": "console"}), 200, None),
        (json!({"realm": {"roles": ["admin"]}, "azp": "web"}), 403, Some("policy_denied")),
        (json!({"scope": "read", "sub": null}), 403, Some("policy_denied")),
        (json!({"scope": "read", "aud": "other"}), 401, Some("jwt_invalid")),
        (json!({"scope": "read", "exp": 1}), 401, Some("jwt_invalid")),
        (json!({"scope": "read", "exp": "soon"}), 401, Some("jwt_invalid")),
        (json!(null), 403, Some("policy_denied")),
    ];
    let mut client = Connection::open(pair.near.outbound()).await;
    pair.mesh.write("a.yaml", &rules);
    becomes(&mut client, &get(&[]), 403).await;
    let files = ["a.yaml", "services.yaml"].map(|name| SourceFile { name: name.into(), text: String::new() });
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: catalog, namespace: shop}}\nspec: {{selector: {{app: catalog}}, ports: \
         [{{name: http, port: 80, targetPort: {}}}]}}\n",
        pair.app.port()
    );
    let [a, services] = files;
    let files = [SourceFile { text: rules, ..a }, SourceFile { text: service, ..services }];
    let parsed = load(&files);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    let domain = TrustDomain::new("outrigger.local").unwrap();
    for (more, status, reason) in table {
        let mut headers = Vec::new();
        if !more.is_null() {
            let mut claims = claims(&json!({"aud": "catalog"}));
            claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            headers.push(("authorization".to_owned(), format!("Bearer {}", key.token(&claims))));
        }
        let fields: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answered = client.ask(get(&fields)).await;
        assert_eq!(answered.status, status, "{more}");
        let said = reason.map(|_| answered.reason());
        assert_eq!(said.as_deref(), reason, "{more}");
        let asked = Asked { method: "GET".into(), target: "/v1/charges".into(), headers };
        let question = json!({
            "from": "spiffe://outrigger.local/ns/shop/sa/cart", "fromIp": null, "to": "catalog.shop", "port": 80,
            "request": asked, "at": now(),
        });
        let running = pair.far.admin_post_json("/explain", &question).await;
        assert_eq!((&running["status"], &running["reason"]), (&json!(status), &json!(reason)), "{more}: {running}");
        let question = Question {
            from: Some(SpiffeId::new(&domain, "shop", "cart").unwrap()),
            from_ip: None,
            to: ServiceName::new("catalog", "shop").unwrap(),
            port: Some(80),
            request: Some(asked),
            sni: None,
            claims: None,
            token: None,
            at: now(),
        };
        let offline = explain(&parsed, &files, &domain, &question);
        assert_eq!((offline.status, offline.reason), (Some(status), reason), "{more}: {offline:?}");
    }
}

/// Bytes that nobody parses carry no token.
#[tokio::test]
async fn opaque_bytes_have_no_token() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = outrigger_tests::application::Backend::start().await;
    mesh.service("catalog.shop", 80, backend.port(), Some("tcp"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).start().await;
    let peer = Peer::issue(&mesh, "shop", "cart", "cart-9").await;
    let mut open = peer.connect(far.inbound(), &[TCP]).await.unwrap();
    open.send("hello").await;
    backend.accept().await.take(5).await;
    mesh.write("a.yaml", &authentication(&inline(&SigningKey::new("Ed25519", "k")), REQUIRED));
    // What was open is judged again.
    open.expect_end().await;
    let labels = [("direction", "inbound"), ("reason", "jwt_missing")];
    within(SOON, "a new one is refused", async || {
        let mut client = peer.connect(far.inbound(), &[TCP]).await.unwrap();
        let _ = client.try_send("hello").await;
        (far.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) > 0.0).then_some(())
    })
    .await;
}

/// A server of key sets, whose answer can be changed; None: it answers 500.
async fn issuer_server(first: Option<String>) -> (String, Arc<Mutex<Option<String>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    let current = Arc::new(Mutex::new(first));
    let served = current.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let body = served.lock().unwrap().clone();
            let status = if body.is_some() { "200 OK" } else { "500 Oops" };
            let body = body.unwrap_or_default();
            let _ = stream.read(&mut [0; 1024]).await;
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (url, current)
}

#[tokio::test]
async fn key_sets_behind_a_url_rotate_and_outlive_their_server() {
    let pair = pair("http").await;
    let (first, second, third) =
        (SigningKey::new("P-256", "one"), SigningKey::new("P-256", "two"), SigningKey::new("P-256", "three"));
    let (url, served) = issuer_server(None).await;
    pair.mesh.write("a.yaml", &authentication(&format!("jwksUri: {url}"), REQUIRED));
    let mut client = Connection::open(pair.near.outbound()).await;
    becomes(&mut client, &get(&[]), 401).await;
    let token = |key: &SigningKey| bearer(&key.token(&claims(&json!({}))));
    let unavailable = client.ask(token(&first)).await;
    assert_eq!((unavailable.status, unavailable.reason().as_str()), (503, "jwks_unavailable"));
    *served.lock().unwrap() = Some(key_set(&[first.jwk()]));
    assert_eq!(client.ask(token(&first)).await.status, 200, "asked for when it was needed");
    assert_eq!(client.ask(token(&second)).await.status, 401);
    // The issuer rotates: the first token that names the new key is not lost.
    *served.lock().unwrap() = Some(key_set(&[second.jwk()]));
    assert_eq!(client.ask(token(&second)).await.status, 200);
    assert_eq!(client.ask(token(&first)).await.status, 401, "a key that is gone is gone, for remembered tokens too");
    *served.lock().unwrap() = None;
    assert_eq!(client.ask(token(&third)).await.status, 401);
    assert_eq!(client.ask(token(&second)).await.status, 200, "the last good set counts");
    // The running sidecar explains with the keys that it has.
    let text = second.token(&claims(&json!({})));
    let question = json!({
        "from": "spiffe://outrigger.local/ns/shop/sa/cart", "fromIp": null, "to": "catalog.shop", "port": 80,
        "request": {"method": "GET", "target": "/", "headers": []}, "token": text, "at": now(),
    });
    let answer = pair.far.admin_post_json("/explain", &question).await;
    assert_eq!((&answer["verdict"], &answer["status"]), (&json!("forwarded"), &json!(200)), "{answer}");
    assert!(answer["steps"].to_string().contains("https://issuer.test/alice"), "{answer}");
}
