//! Promise: routes of Gateway API that bind Services say where calls go, as its conformance tests for meshes want it. Each
//! test is named after one of those. What is asked of a live pair is asked of `explain` and of `test`, and all three agree.

use std::cell::RefCell;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_api::compile::load;
use outrigger_api::explain::{Asked, Outcome, Question, explain};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::name::ServicePort;
use outrigger_api::resource::SourceFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use outrigger_tests::application::Backend;
use outrigger_tests::eventually::within;
use outrigger_tests::grpc::Http2;
use outrigger_tests::mesh::TRUST_DOMAIN;
use outrigger_tests::process::{Program, command};
use outrigger_tests::wire::text;
use outrigger_tests::{
    Application, Connection, End, Mesh, MeshOptions, Peer, Response, Sidecar, eventually, under_test,
};

/// As in the conformance tests: `echo` has the workloads of `echo-v1` and of `echo-v2`.
fn services(port: u16) -> String {
    let service = |name: &str, selector: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  selector: \
             {{{selector}}}\n  ports:\n  - {{name: http, port: 80, targetPort: {port}, appProtocol: http}}\n  - {{name: \
             http-alt, port: 8080, targetPort: {port}, appProtocol: http}}\n  - {{name: grpc, port: 7070, targetPort: \
             {port}, appProtocol: grpc}}\n"
        )
    };
    service("echo", "app: echo")
        + &service("echo-v1", "app: echo, version: v1")
        + &service("echo-v2", "app: echo, version: v2")
}

/// An HTTPRoute of namespace `namespace` that binds the Service of `parent`.
fn route_of(namespace: &str, name: &str, parent: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec: {{parentRefs: [{{group: '', kind: Service, {parent}}}], rules: {rules}}}\n"
    )
}

fn route(rules: &str) -> String {
    route_of("shop", "echo", "name: echo", rules)
}

const V1: &str = "backendRefs: [{name: echo-v1, port: 80}]";
const V2: &str = "backendRefs: [{name: echo-v2, port: 8080}]";

struct Echo {
    yaml: String,
    apps: [Application; 2],
    _servers: [Sidecar; 2],
    client: Sidecar,
    mesh: Mesh,
    /// Cases of a PolicyTest about what was asked.
    cases: RefCell<String>,
}

impl Echo {
    async fn start(routes: &str) -> Echo {
        Echo::start_in("shop", routes).await
    }

    /// With its client in that namespace.
    async fn start_in(namespace: &str, routes: &str) -> Echo {
        let apps = Application::replicas::<2>("echo").await;
        let yaml = services(apps[0].port()) + routes;
        let mesh = Mesh::start(MeshOptions { yaml: yaml.clone(), ..MeshOptions::default() }).await;
        let server = async |index: usize, version: &str| {
            let builder = mesh.sidecar(&format!("echo-{version}")).label("app", "echo").label("version", version);
            builder.inbound(apps[index].address()).start().await
        };
        let servers = [server(0, "v1").await, server(1, "v2").await];
        let client = mesh.sidecar("client-1").namespace(namespace).http_proxy();
        let client =
            client.outbound("echo.shop:80").outbound("echo.shop:8080").outbound("echo.shop:7070").start().await;
        Echo { yaml, apps, _servers: servers, client, mesh, cases: RefCell::default() }
    }

    fn listener(&self, port: u16) -> SocketAddr {
        self.client.address(&format!("outbound:echo.shop:{port}"))
    }

    /// `GET /path name=value ...`, to port 80.
    async fn ask(&self, asked: &str) -> Response {
        self.ask_at(80, asked).await
    }

    async fn ask_at(&self, port: u16, asked: &str) -> Response {
        let (method, target, fields) = words(asked);
        let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("{method} {target} HTTP/1.1\r\nHost: echo.shop\r\nConnection: close\r\n{fields}\r\n");
        Connection::open(self.listener(port)).await.ask(request).await
    }

    /// Asks in all three ways: `v1` or `v2` for the Service that gets it, else the status with reason or place.
    async fn expect(&self, asked: &str, expected: &str) {
        self.expect_at(80, asked, expected).await;
    }

    async fn expect_at(&self, port: u16, asked: &str, expected: &str) {
        assert_eq!(said(&self.ask_at(port, asked).await), expected, "live: {asked}");
        self.expect_told(port, asked, expected);
    }

    /// The same without the live pair.
    fn expect_told(&self, port: u16, asked: &str, expected: &str) {
        let files = [SourceFile { name: "mesh.yaml".to_owned(), text: self.yaml.clone() }];
        let parsed = load(&files);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        let domain = TrustDomain::new(TRUST_DOMAIN).unwrap();
        let to = ServicePort::parse("echo.shop:80", "shop").unwrap().service;
        let (method, target, headers) = words(asked);
        let request = Some(Asked { method: method.clone(), target: target.clone(), headers: headers.clone() });
        let namespace = self.client_namespace();
        let from = Some(SpiffeId::new(&domain, &namespace, "client").unwrap());
        let question = Question {
            from,
            from_ip: None,
            to,
            port: Some(port),
            request,
            sni: None,
            claims: None,
            token: None,
            at: 0,
        };
        let told = explain(&parsed, &files, &domain, &question);
        let got = match told.verdict {
            Outcome::Forwarded => {
                let all = told.backends.iter().filter(|backend| backend.weight > 0);
                all.map(|backend| backend.service.replace("echo-", "").replace(".shop", ""))
                    .collect::<Vec<_>>()
                    .join("+")
            }
            Outcome::Redirected => format!("{} {}", told.status.unwrap(), told.hint.trim_start_matches("to ")),
            Outcome::Refused | Outcome::Failed => format!("{} {}", told.status.unwrap(), told.reason.unwrap()),
        };
        assert_eq!(got, expected, "explain: {asked} {told:?}");
        let mut cases = self.cases.borrow_mut();
        let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value:?}, ")).collect();
        let expect = match expected.split_once(' ') {
            None => {
                let backends =
                    told.backends.iter().map(|one| format!("'{}:{}': {}", one.service, one.port, one.weight));
                format!("verdict: forwarded, status: 200, backends: {{{}}}", backends.collect::<Vec<_>>().join(", "))
            }
            Some((status, _)) if told.verdict == Outcome::Redirected => {
                format!("verdict: redirected, status: {status}")
            }
            Some((status, reason)) => format!("verdict: failed, status: {status}, reason: {reason}"),
        };
        writeln!(
            cases,
            "  - {{name: {asked:?}, from: {{serviceAccount: {namespace}/client}}, to: {{service: echo.shop, port: {port}}}, \
             request: {{method: {method}, path: {target:?}, headers: {{{fields}}}}}, expect: {{{expect}}}}}"
        )
        .unwrap();
    }

    fn client_namespace(&self) -> String {
        if self.yaml.contains("namespace: consumer") { "consumer".to_owned() } else { "shop".to_owned() }
    }

    /// Runs what was asked as a PolicyTest.
    fn test(&self) {
        let directory = tempfile::tempdir().unwrap();
        let cases = self.cases.borrow();
        let test = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: PolicyTest\nmetadata: {{name: routes, namespace: shop}}\nspec:\n  \
             cases:\n{cases}"
        );
        std::fs::write(directory.path().join("mesh.yaml"), &self.yaml).unwrap();
        std::fs::write(directory.path().join("test.yaml"), &test).unwrap();
        let ran = command(under_test!(), Program::Outrigger).arg("test").arg(directory.path()).output().unwrap();
        let text = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{text}\n{test}");
    }

    /// How many of so many requests each Service got.
    async fn shares(&self, asked: &str, count: usize) -> [usize; 2] {
        let mut got = [0, 0];
        for _ in 0..count {
            match said(&self.ask(asked).await).as_str() {
                "v1" => got[0] += 1,
                "v2" => got[1] += 1,
                other => panic!("{other}"),
            }
        }
        got
    }
}

fn words(asked: &str) -> (String, String, Vec<(String, String)>) {
    let mut words = asked.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let field = |word: String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap();
    (method, target, words.map(field).collect())
}

fn said(answer: &Response) -> String {
    match answer.header("x-app") {
        Some("echo-1") => "v1".to_owned(),
        Some("echo-2") => "v2".to_owned(),
        Some(other) => other.to_owned(),
        None => format!("{} {}{}", answer.status, answer.reason(), answer.header("location").unwrap_or_default()),
    }
}

#[tokio::test]
async fn mesh_basic() {
    let echo = Echo::start("").await;
    assert!(["v1", "v2"].contains(&said(&echo.ask("GET /").await).as_str()));
    echo.expect_told(80, "GET /", "echo");
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_matching() {
    let echo = Echo::start(&route(&format!(
        "[{{matches: [{{path: {{type: PathPrefix, value: /}}}}, {{headers: [{{name: version, value: one}}]}}], {V1}}}, \
          {{matches: [{{path: {{type: PathPrefix, value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}], {V2}}}]"
    )))
    .await;
    for (asked, expected) in [
        ("GET /", "v1"),
        ("GET /example", "v1"),
        ("GET / version=one", "v1"),
        ("GET /v2", "v2"),
        ("GET /v2/", "v2"),
        ("GET /v2/example", "v2"),
        ("GET /v2example", "v1"),
        ("GET / version=two", "v2"),
        ("GET /v2 Version=two", "v2"),
        ("GET / version=three", "v1"),
        ("GET /x/../v2/a", "v2"),
        ("GET /foo/v2/example", "v1"),
    ] {
        echo.expect(asked, expected).await;
    }
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_query_param_matching() {
    let query = |pairs: &[(&str, &str)], backend: &str| {
        let pairs: Vec<String> =
            pairs.iter().map(|(name, value)| format!("{{name: {name}, value: {value}}}")).collect();
        format!("{{matches: [{{queryParams: [{}]}}], {backend}}}", pairs.join(", "))
    };
    let rules = [
        query(&[("animal", "whale")], V1),
        query(&[("animal", "dolphin")], V2),
        query(&[("animal", "dolphin"), ("color", "blue")], V1),
    ];
    let echo = Echo::start(&route(&format!("[{}]", rules.join(", ")))).await;
    for (asked, expected) in [
        ("GET /?animal=whale", "v1"),
        ("GET /?animal=dolphin", "v2"),
        ("GET /?animal=dolphin&color=blue", "v1"),
        ("GET /?color=blue&animal=%64olphin", "v1"),
        ("GET /?animal=dolphin&color=red", "v2"),
        ("GET /?animal=shark", "404 route_not_found"),
        ("GET /", "404 route_not_found"),
    ] {
        echo.expect(asked, expected).await;
    }
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_simple_same_namespace_and_named_rule() {
    let echo = Echo::start(&route(&format!("[{{name: all, {V1}}}]"))).await;
    echo.expect("GET /", "v1").await;
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_redirects() {
    let redirect = |path: &str, filter: &str| {
        format!(
            "{{matches: [{{path: {{type: PathPrefix, value: {path}}}}}], filters: [{{type: RequestRedirect, requestRedirect: \
             {{{filter}}}}}]}}"
        )
    };
    let rules = [
        redirect("/hostname", "hostname: example.org"),
        redirect("/status", "hostname: example.org, statusCode: 301"),
        redirect("/see-other", "hostname: example.org, statusCode: 303"),
        redirect("/temporary", "hostname: example.org, statusCode: 307"),
        redirect("/permanent", "hostname: example.org, statusCode: 308"),
        redirect("/port", "port: 8083"),
        redirect("/scheme", "scheme: https"),
        redirect("/scheme-port", "scheme: https, port: 8443"),
        redirect("/full", "path: {type: ReplaceFullPath, replaceFullPath: /full-path-replacement}"),
        redirect("/prefix", "path: {type: ReplacePrefixMatch, replacePrefixMatch: /replacement}, statusCode: 302"),
    ];
    let echo = Echo::start(&route(&format!("[{}]", rules.join(", ")))).await;
    for (asked, expected) in [
        ("GET /hostname", "302 http://example.org/hostname"),
        ("GET /status/x?y=z", "301 http://example.org/status/x?y=z"),
        ("GET /see-other", "303 http://example.org/see-other"),
        ("GET /temporary", "307 http://example.org/temporary"),
        ("GET /permanent", "308 http://example.org/permanent"),
        ("GET /port", "302 http://echo.shop:8083/port"),
        ("GET /scheme", "302 https://echo.shop/scheme"),
        ("GET /scheme-port", "302 https://echo.shop:8443/scheme-port"),
        ("GET /full/original", "302 http://echo.shop/full-path-replacement"),
        ("GET /prefix/lemon?q", "302 http://echo.shop/replacement/lemon?q"),
    ] {
        echo.expect(asked, expected).await;
    }
    // The port of a redirect without one is the Service's.
    echo.expect_at(8080, "GET /hostname", "302 http://example.org:8080/hostname").await;
    assert_eq!(echo.apps[0].count() + echo.apps[1].count(), 0, "no application was asked");
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_rewrite_path_and_host() {
    let rewrite = |path: &str, rewrite: &str| {
        format!(
            "{{matches: [{{path: {{type: PathPrefix, value: {path}}}}}], filters: [{{type: URLRewrite, urlRewrite: \
             {{{rewrite}}}}}], {V1}}}"
        )
    };
    let rules = [
        rewrite("/prefix/one", "path: {type: ReplacePrefixMatch, replacePrefixMatch: /one}"),
        rewrite("/strip-prefix", "path: {type: ReplacePrefixMatch, replacePrefixMatch: /}"),
        rewrite("/full/one", "path: {type: ReplaceFullPath, replaceFullPath: /one}"),
        rewrite("/host", "hostname: one.example.org"),
    ];
    let echo = Echo::start(&route(&format!("[{}]", rules.join(", ")))).await;
    for (asked, target, host) in [
        ("GET /prefix/one/two", "/one/two", "echo.shop"),
        ("GET /strip-prefix/three", "/three", "echo.shop"),
        ("GET /strip-prefix", "/", "echo.shop"),
        ("GET /full/one/two?q=1", "/one?q=1", "echo.shop"),
        ("GET /host/x", "/host/x", "one.example.org"),
    ] {
        echo.expect(asked, "v1").await;
        let seen = echo.apps[0].last();
        assert_eq!((seen.target.as_str(), seen.header("host")), (target, Some(host)), "{asked}");
    }
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_header_modifiers() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /backend}}], backendRefs: [{name: echo-v2, port: 80, filters: [{type: \
         RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-backend, value: v2}]}}, {type: \
         ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Backend, value: v2}]}}]}]}, {filters: [{type: \
         RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Header-Set, value: set}], add: [{name: X-Header-Add, \
         value: add}], remove: [X-Header-Remove]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {remove: \
         [content-type], add: [{name: X-Answer, value: more}]}}], backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    let asked = "GET / X-Header-Set=before X-Header-Add=before X-Header-Remove=before X-Kept=kept";
    echo.expect(asked, "v1").await;
    let seen = echo.apps[0].last();
    assert_eq!(seen.all("x-header-set"), ["set"]);
    assert_eq!(seen.all("x-header-add"), ["before", "add"]);
    assert!(seen.all("x-header-remove").is_empty() && seen.all("x-kept") == ["kept"]);
    let answer = echo.ask(asked).await;
    assert_eq!((answer.header("x-answer"), answer.header("content-type")), (Some("more"), None));
    echo.expect("GET /backend", "v2").await;
    assert_eq!(echo.apps[1].last().header("x-backend"), Some("v2"));
    assert_eq!(echo.ask("GET /backend").await.header("x-backend"), Some("v2"));
    echo.test();
}

#[tokio::test]
async fn mesh_http_route_weight_and_traffic_split() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /v1}}], backendRefs: [{name: echo-v1, port: 80, weight: 1}, {name: \
         echo-v2, port: 80, weight: 0}]}, {backendRefs: [{name: echo-v1, port: 80, weight: 70}, {name: echo-v2, port: 80, \
         weight: 30}]}]",
    ))
    .await;
    let [v1, v2] = echo.shares("GET /", 500).await;
    // Five standard deviations around 350 of 500.
    assert!((299..=401).contains(&v1), "{v1} and {v2}");
    assert_eq!(echo.shares("GET /v1", 40).await, [40, 0]);
    echo.expect_told(80, "GET /", "v1+v2");
    echo.expect_told(80, "GET /v1", "v1");
    echo.test();
    let metrics = echo.client.metrics().await;
    let labels = [("direction", "outbound"), ("destination_service", "echo-v2.shop")];
    assert_eq!(metrics.sum("outrigger_http_requests_total", &labels), v2 as f64);
}

#[tokio::test]
async fn mesh_ports() {
    // One port by its number, the other by its name.
    let routes = route_of("shop", "one", "name: echo, port: 80", &format!("[{{{V1}}}]"))
        + &route_of("shop", "other", "name: echo, sectionName: http-alt", &format!("[{{{V2}}}]"));
    let echo = Echo::start(&routes).await;
    echo.expect_at(80, "GET /", "v1").await;
    echo.expect_at(8080, "GET /", "v2").await;
    echo.test();
}

/// A consumer's route counts for callers of its namespace alone, and takes the place of the producer's.
#[tokio::test]
async fn mesh_consumer_route() {
    let producer = route(&format!("[{{{V1}}}]"));
    let consumer = route_of(
        "consumer",
        "mine",
        "name: echo, namespace: shop",
        "[{matches: [{path: {type: PathPrefix, value: /v2}}], backendRefs: [{name: echo-v2, namespace: shop, port: 80}]}]",
    );
    let echo = Echo::start_in("consumer", &(producer.clone() + &consumer)).await;
    echo.expect("GET /v2", "v2").await;
    echo.expect("GET /v1", "404 route_not_found").await;
    echo.test();
    let other = echo.mesh.sidecar("other-1").outbound("echo.shop:80").start().await;
    let asked = "GET /v2 HTTP/1.1\r\nHost: echo\r\nConnection: close\r\n\r\n";
    assert_eq!(said(&Connection::open(other.outbound()).await.ask(asked).await), "v1");
    // What goes is what the others follow, on a running connection.
    echo.mesh.write("mesh.yaml", &(services(echo.apps[0].port()) + &producer));
    within(Duration::from_secs(20), "the producer's route holds", async || {
        (said(&echo.ask("GET /v2").await) == "v1").then_some(())
    })
    .await;
    echo.mesh.write("mesh.yaml", &(services(echo.apps[0].port()) + &producer + &consumer));
    within(Duration::from_secs(20), "the consumer's route holds", async || {
        (said(&echo.ask("GET /v2").await) == "v2").then_some(())
    })
    .await;
    assert_eq!(said(&Connection::open(other.outbound()).await.ask(asked).await), "v1");
}

/// The Service that is called is the one of the address; Host changes nothing, nor do `hostnames`.
#[tokio::test]
async fn mesh_frontend_and_frontend_hostname() {
    let routes = route(&format!(
        "[{{matches: [{{headers: [{{name: host, value: echo-v2}}]}}], {V2}}}, {{{V1}}}], hostnames: [nobody.test]"
    ));
    let echo = Echo::start(&routes).await;
    let with_host = async |host: &str| {
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        said(&Connection::open(echo.listener(80)).await.ask(request).await)
    };
    for host in ["echo", "echo-v1.shop", "example.org", "10.0.0.1:1"] {
        assert_eq!(with_host(host).await, "v1", "{host}");
    }
    assert_eq!(with_host("echo-v2").await, "v2", "a match of the header");
    // The forward proxy takes the Service from the target, and its routes with it.
    let request = "GET http://echo.shop/ HTTP/1.1\r\nHost: echo.shop\r\nConnection: close\r\n\r\n";
    assert_eq!(said(&Connection::open(echo.client.http_proxy()).await.ask(request).await), "v1");
    // No route binds echo-v2 itself.
    let request = "GET http://echo-v2.shop/ HTTP/1.1\r\nHost: echo-v2.shop\r\nConnection: close\r\n\r\n";
    assert_eq!(said(&Connection::open(echo.client.http_proxy()).await.ask(request).await), "v2");
}

#[tokio::test]
async fn what_no_rule_matches_goes_nowhere() {
    let echo = Echo::start(&route_of(
        "shop",
        "exact",
        "name: echo, port: 80",
        "[{matches: [{path: {type: Exact, value: /one}, method: GET}], backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    echo.expect("GET /one", "v1").await;
    echo.expect("PUT /one", "404 route_not_found").await;
    echo.expect("GET /one/", "404 route_not_found").await;
    let answer = echo.ask("GET /two").await;
    assert_eq!(answer.header("proxy-status"), Some("client-1; error=destination_not_found"));
    assert!(answer.text().contains("no rule of the HTTPRoutes that bind echo.shop:80 matches GET /two"), "{answer:?}");
    // The other port is bound by nothing.
    assert_eq!(echo.ask_at(8080, "GET /two").await.status, 200);
    echo.test();
}

#[tokio::test]
async fn an_invalid_backend_gets_its_share_and_answers_500() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /half}}], backendRefs: [{name: echo-v1, port: 80}, {name: gone, port: \
         80}]}, {matches: [{path: {type: PathPrefix, value: /foreign}}], backendRefs: [{name: other, namespace: elsewhere, \
         port: 80}]}, {matches: [{path: {type: PathPrefix, value: /port}}], backendRefs: [{name: echo-v1, port: 81}]}, \
         {matches: [{path: {type: PathPrefix, value: /none}}]}]",
    ))
    .await;
    for asked in ["GET /foreign", "GET /port", "GET /none"] {
        echo.expect(asked, "500 backend_invalid").await;
    }
    let answer = echo.ask("GET /foreign").await;
    let expected = "client-1; error=destination_unavailable; details=\"HTTPRoute/shop/echo rule 1\"";
    assert_eq!(answer.header("proxy-status"), Some(expected));
    assert!(answer.text().contains("RefNotPermitted"), "{answer:?}");
    let mut got = [0, 0];
    for _ in 0..200 {
        match said(&echo.ask("GET /half").await).as_str() {
            "v1" => got[0] += 1,
            "500 backend_invalid" => got[1] += 1,
            other => panic!("{other}"),
        }
    }
    assert!(got.iter().all(|count| (65..=135).contains(count)), "{got:?}");
    echo.expect_told(80, "GET /half", "v1");
    echo.test();
}

#[tokio::test]
async fn timeouts_of_heads_and_of_bodies() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /hold}}], timeouts: {request: 100ms}, backendRefs: [{name: echo-v1, \
         port: 80}]}, {timeouts: {request: 10s, backendRequest: 150ms}, backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    echo.apps[0].hold();
    assert_eq!(said(&echo.ask("GET /hold").await), "504 request_timeout");
    echo.apps[0].release();
    let labels = [("direction", "outbound"), ("reason", "request_timeout"), ("code", "504")];
    eventually("the timeout is counted", async || {
        (echo.client.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
    // The answer has begun when the time ends, so that it breaks off.
    let mut upload = Connection::open(echo.listener(80)).await;
    upload.send("POST /echo HTTP/1.1\r\nHost: echo\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
    let answer = upload.try_response(false).await;
    assert!(!matches!(&answer, Ok(answer) if answer.is_whole() && answer.status == 200), "{answer:?}");
    echo.expect("GET /", "v1").await;
}

#[tokio::test]
async fn http2_and_grpc_follow_routes_too() {
    let echo = Echo::start(&route(&format!(
        "[{{matches: [{{path: {{type: PathPrefix, value: /echo.Echo/Unary}}}}], {V2}}}, {{matches: [{{path: {{type: Exact, \
         value: /one}}}}], filters: [{{type: URLRewrite, urlRewrite: {{hostname: b.test, path: {{type: ReplaceFullPath, \
         replaceFullPath: /two}}}}}}], {V1}}}]"
    )))
    .await;
    let client = Http2::open(echo.listener(7070)).await;
    let whole = client.unary("Unary", b"hello").await.unwrap();
    assert_eq!(whole.grpc_status(), Some("0"));
    assert_eq!((echo.apps[0].count(), echo.apps[1].count()), (0, 1));
    let nowhere = client.unary("Other", b"hello").await.unwrap();
    assert_eq!(nowhere.grpc_status(), Some("12"));
    client.get("/one").await.unwrap();
    assert_eq!(echo.apps[0].last().target, "http://b.test/two");
}

/// Services `db`, `db-v1` and `db-v2` for bytes that are not parsed, with ports for each kind of route.
struct Db {
    backends: [Backend; 2],
    _servers: [Sidecar; 2],
    client: Sidecar,
    _mesh: Mesh,
}

impl Db {
    async fn start(protocol: &str, routes: &str) -> Db {
        let backends = Backend::replicas::<2>().await;
        let port = backends[0].port();
        let service = |name: &str, selector: &str| {
            let ports = [9000, 9001, 9002]
                .map(|number| format!("{{name: p{number}, port: {number}, targetPort: {port}{protocol}}}"));
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: \
                 {{{selector}}}, ports: [{}]}}\n",
                ports.join(", ")
            )
        };
        let yaml = service("db", "app: db")
            + &service("db-v1", "app: db, v: one")
            + &service("db-v2", "app: db, v: two")
            + routes;
        let mesh = Mesh::start(MeshOptions { yaml, ..MeshOptions::default() }).await;
        let server = async |index: usize, version: &str| {
            let builder = mesh.sidecar(&format!("db-{version}")).label("app", "db").label("v", version);
            builder.inbound(backends[index].address()).start().await
        };
        let servers = [server(0, "one").await, server(1, "two").await];
        let client = mesh.sidecar("client-1");
        let client = client.outbound("db:9000").outbound("db:9001").outbound("db:9002").start().await;
        Db { backends, _servers: servers, client, _mesh: mesh }
    }

    /// How a connection with these first bytes is ended, whenever that is.
    async fn ended_at(&self, port: u16, bytes: &[u8]) -> End {
        let address = self.client.address(&format!("outbound:db.shop:{port}"));
        let mut client = match tokio::net::TcpStream::connect(address).await {
            Ok(client) => client,
            Err(_) => return End::Reset,
        };
        let _ = client.write_all(bytes).await;
        match client.read(&mut [0; 16]).await {
            Ok(_) => End::Closed,
            Err(_) => End::Reset,
        }
    }

    /// Which of the two gets a connection with these first bytes; None: it is ended.
    async fn gets(&self, port: u16, bytes: &[u8]) -> Option<usize> {
        let mut client = Connection::open(self.client.address(&format!("outbound:db.shop:{port}"))).await;
        let _ = client.try_send(bytes).await;
        let (index, mut accepted) = tokio::select! {
            accepted = self.backends[0].accept() => (0, accepted),
            accepted = self.backends[1].accept() => (1, accepted),
            _ = client.take_to_end() => return None,
        };
        assert_eq!(accepted.take(bytes.len()).await, bytes);
        Some(index)
    }
}

fn stream_route(kind: &str, name: &str, parent: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1alpha2\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {{parentRefs: [{{group: '', kind: Service, name: db, {parent}}}], {rest}}}\n"
    )
}

#[tokio::test]
async fn tcp_routes_say_where_connections_go() {
    let routes = stream_route("TCPRoute", "one", "port: 9000", "rules: [{backendRefs: [{name: db-v1, port: 9000}]}]")
        + &stream_route(
            "TCPRoute",
            "two",
            "sectionName: p9001",
            "rules: [{backendRefs: [{name: db-v1, port: 9000, weight: 0}, {name: db-v2, port: 9000, weight: 5}]}]",
        )
        + &stream_route("TCPRoute", "gone", "port: 9002", "rules: [{backendRefs: [{name: gone, port: 1}]}]");
    for protocol in [", appProtocol: tcp", ""] {
        let db = Db::start(protocol, &routes).await;
        for (port, expected) in [(9000, Some(0)), (9001, Some(1))] {
            for _ in 0..4 {
                assert_eq!(db.gets(port, b"\x00\x01hello").await, expected, "{protocol} {port}");
            }
        }
        for _ in 0..4 {
            let end = db.ended_at(9002, b"\x00\x01hello").await;
            assert_eq!(end, End::Reset, "{protocol}");
        }
        let labels = [("direction", "outbound"), ("reason", "backend_invalid")];
        eventually("the refusals are counted", async || {
            let metrics = db.client.metrics().await;
            (metrics.sum("outrigger_tcp_connections_closed_total", &labels) == 4.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn tls_routes_go_by_the_server_name() {
    let hello = |name: &str| {
        let config = Arc::new(Peer::without_certificate().client_config(&[]));
        let mut client = rustls::ClientConnection::new(config, name.to_owned().try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    };
    let routes = stream_route(
        "TLSRoute",
        "one",
        "port: 9000",
        "hostnames: [a.test], rules: [{backendRefs: [{name: db-v1, port: 9000}]}]",
    ) + &stream_route(
        "TLSRoute",
        "two",
        "port: 9000",
        "hostnames: ['*.test'], rules: [{backendRefs: [{name: db-v2, port: 9000}]}]",
    );
    for protocol in [", appProtocol: tls", ""] {
        let db = Db::start(protocol, &routes).await;
        for (name, expected) in [("a.test", Some(0)), ("b.test", Some(1)), ("c.b.test", Some(1)), ("other", None)] {
            assert_eq!(db.gets(9000, &hello(name)).await, expected, "{protocol} {name}");
        }
        assert_eq!(db.gets(9000, b"GET / HTTP/1.1\r\n\r\n").await, None, "no server name");
    }
}

/// gRPC by service and method; plain HTTP goes nowhere on a port that only GRPCRoutes bind.
#[tokio::test]
async fn mesh_grpc_route_weight_and_request_header_modifier() {
    let echo = Echo::start(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: echo, namespace: shop}\nspec: \
         {parentRefs: [{group: '', kind: Service, name: echo, port: 7070}], rules: [{matches: [{method: {service: echo.Echo, \
         method: Unary}}], backendRefs: [{name: echo-v1, port: 7070, weight: 3}, {name: echo-v2, port: 7070, weight: 1}]}, \
         {matches: [{method: {service: echo.Echo, method: Collect}}], filters: [{type: RequestHeaderModifier, \
         requestHeaderModifier: {set: [{name: x-set, value: a}]}}], backendRefs: [{name: echo-v2, port: 7070}]}]}\n",
    )
    .await;
    let client = Http2::open(echo.listener(7070)).await;
    for _ in 0..200 {
        assert_eq!(client.unary("Unary", b"hello").await.unwrap().grpc_status(), Some("0"));
    }
    let counts = [echo.apps[0].count(), echo.apps[1].count()];
    // Five standard deviations around 150 of 200.
    assert!((119..=181).contains(&counts[0]) && counts[0] + counts[1] == 200, "{counts:?}");
    client.unary("Collect", b"hello").await.unwrap();
    assert_eq!((echo.apps[1].count(), echo.apps[1].last().header("x-set")), (counts[1] + 1, Some("a")));
    assert_eq!(client.unary("Repeat", b"hello").await.unwrap().grpc_status(), Some("12"));
    assert_eq!(said(&echo.ask_at(7070, "GET /echo.Echo/Unary").await), "404 route_not_found");
    let grpc = "content-type=application/grpc";
    echo.expect_told(7070, &format!("POST /echo.Echo/Unary {grpc}"), "v1+v2");
    echo.expect_told(7070, &format!("POST /echo.Echo/Collect {grpc}"), "v2");
    echo.expect_told(7070, &format!("POST /echo.Echo/Repeat {grpc}"), "200 route_not_found");
    echo.expect_told(7070, "GET /echo.Echo/Unary", "404 route_not_found");
    echo.test();
}

#[tokio::test]
async fn requests_are_mirrored_with_their_bodies() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /none}}], filters: [{type: RequestMirror, requestMirror: {backendRef: \
         {name: echo-v2, port: 80}, percent: 0}}], backendRefs: [{name: echo-v1, port: 80}]}, {filters: [{type: RequestMirror, \
         requestMirror: {backendRef: {name: echo-v2, port: 80}}}, {type: RequestHeaderModifier, requestHeaderModifier: {set: \
         [{name: x-a, value: b}]}}], backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    echo.expect("GET /none", "v1").await;
    echo.expect("GET /one?q=1", "v1").await;
    eventually("the copy arrives", async || (echo.apps[1].count() == 1).then_some(())).await;
    let copy = echo.apps[1].last();
    assert_eq!(
        (copy.target.as_str(), copy.header("x-a"), copy.header("host")),
        ("/one?q=1", Some("b"), Some("echo.shop"))
    );
    let mut client = Connection::open(echo.listener(80)).await;
    let chunked =
        "POST /two HTTP/1.1\r\nHost: echo\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    assert_eq!(said(&client.ask(chunked).await), "v1");
    eventually("the copy has the whole body", async || {
        let copy = echo.apps[1].requests().pop()?;
        (copy.target == "/two" && copy.whole && copy.body == b"abcde").then_some(())
    })
    .await;
    // Too long to be kept: the request itself does not mind.
    let long = 100_000;
    client.send(format!("POST /three HTTP/1.1\r\nHost: echo\r\nContent-Length: {long}\r\n\r\n")).await;
    assert_eq!(said(&client.ask(vec![b'x'; long]).await), "v1");
    echo.expect("GET /four", "v1").await;
    eventually("the next copy arrives", async || {
        echo.apps[1].requests().iter().any(|copy| copy.target == "/four").then_some(())
    })
    .await;
    assert_eq!(echo.apps[1].count(), 3, "none of the long one");
    echo.test();
}

#[tokio::test]
async fn what_fails_is_tried_again_when_it_may_be() {
    let echo = Echo::start(&route(
        "[{matches: [{path: {type: PathPrefix, value: /status/503}}], retry: {codes: [503], attempts: 2, backoff: 1ms}, \
         backendRefs: [{name: echo-v1, port: 80}]}, {matches: [{path: {type: PathPrefix, value: /hold}}], retry: {attempts: 1, \
         backoff: 1ms}, timeouts: {backendRequest: 100ms}, backendRefs: [{name: echo-v1, port: 80}]}, {retry: {codes: [500], \
         attempts: 2, backoff: 1ms}, backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    let tries = async |asked: &str| {
        echo.apps[0].forget();
        let answer = echo.ask(asked).await;
        (answer.status, echo.apps[0].count())
    };
    assert_eq!(tries("GET /status/503").await, (503, 3), "the last answer is passed on");
    assert_eq!(tries("POST /status/503").await, (503, 1), "not idempotent");
    assert_eq!(tries("POST /status/503 Idempotency-Key=1").await, (503, 3));
    assert_eq!(tries("GET /status/502").await, (502, 1), "not listed");
    echo.apps[0].hold();
    assert_eq!(tries("GET /hold").await, (504, 2), "an attempt's time is up");
    echo.apps[0].release();
    assert_eq!(tries("GET /").await, (200, 1));
}

#[tokio::test]
async fn pages_of_other_origins() {
    let echo = Echo::start(&route(
        "[{filters: [{type: CORS, cors: {allowOrigins: ['https://*.test'], allowMethods: [GET, PUT], allowCredentials: true, \
         exposeHeaders: [x-app], maxAge: 60}}], backendRefs: [{name: echo-v1, port: 80}]}]",
    ))
    .await;
    let preflight = echo.ask("OPTIONS / Origin=https://a.test Access-Control-Request-Method=PUT").await;
    assert_eq!((preflight.status, preflight.header("x-app")), (200, None));
    assert_eq!(preflight.header("access-control-allow-origin"), Some("https://a.test"));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("GET, PUT"));
    assert_eq!(echo.apps[0].count(), 0, "the application is not asked");
    let answer = echo.ask("GET / Origin=https://a.test").await;
    assert_eq!(said(&answer), "v1");
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://a.test"));
    assert_eq!(answer.header("access-control-expose-headers"), Some("x-app"));
    let other = echo.ask("GET / Origin=https://evil.example").await;
    assert_eq!((said(&other).as_str(), other.header("access-control-allow-origin")), ("v1", None));
}

#[tokio::test]
async fn a_running_sidecar_explains_its_routes() {
    let echo =
        Echo::start(&route(&format!("[{{matches: [{{path: {{type: PathPrefix, value: /v2}}}}], {V2}}}, {{{V1}}}]")))
            .await;
    assert_eq!(said(&echo.ask("GET /").await), "v1");
    let question = |target: &str| {
        serde_json::json!({
            "from": "spiffe://outrigger.local/ns/shop/sa/client", "fromIp": null, "to": "echo.shop", "port": 80,
            "request": {"method": "GET", "target": target, "headers": []}, "at": 0,
        })
    };
    let told = echo.client.admin_post_json("/explain", &question("/v2/x")).await;
    assert_eq!((&told["route"]["name"], &told["route"]["rule"]), (&"echo".into(), &0.into()), "{told}");
    assert_eq!(told["backends"][0]["service"], "echo-v2.shop");
    let told = echo.client.admin_post_json("/explain", &question("/other")).await;
    assert_eq!((&told["route"]["rule"], &told["backends"][0]["endpoints"]), (&1.into(), &1.into()), "{told}");
}

/// The examples of the documentation are whole: they are valid, without a warning, and their tests pass.
#[test]
fn what_the_documentation_shows_holds() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/routes.md");
    let text = std::fs::read_to_string(page).unwrap();
    let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split_once("```").map(|(block, _)| block));
    let yaml = blocks.collect::<Vec<_>>().join("---\n");
    let parsed = load(&[SourceFile { name: "routes.yaml".to_owned(), text: yaml.clone() }]);
    assert_eq!((parsed.errors.as_slice(), parsed.warnings.as_slice()), (&[][..], &[][..]));
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("routes.yaml"), yaml).unwrap();
    let ran = command(under_test!(), Program::Outrigger).arg("test").arg(directory.path()).output().unwrap();
    let text = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && text.contains("2 as expected") && !text.contains("no case reached"), "{text}");
}

#[test]
fn the_canary_of_the_examples_holds() {
    let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/policies/canary/config");
    for word in ["validate", "test"] {
        let ran = command(under_test!(), Program::Outrigger).arg(word).arg(&config).output().unwrap();
        assert!(ran.status.success(), "{word}: {}{}", text(&ran.stdout), text(&ran.stderr));
    }
}
