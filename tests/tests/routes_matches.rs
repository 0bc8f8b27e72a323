//! Promise: routes of Gateway API that bind Services decide which Service gets a call, by matches, weights and the caller's
//! namespace, as Gateway API's conformance tests for meshes require. A test named `mesh_...` is named after one of those.

use std::time::Duration;

use outrigger_tests::eventually::within;
use outrigger_tests::grpc::Http2;
use outrigger_tests::routes::{Echo, V1, V2, route, route_of, said, services};
use outrigger_tests::{Connection, under_test};

#[tokio::test]
async fn mesh_basic() {
    let echo = Echo::start("").await;
    assert!(["v1", "v2"].contains(&said(&echo.ask("GET /").await).as_str()));
    echo.expect_told(80, "GET /", "echo");
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
}

#[tokio::test]
async fn mesh_http_route_simple_same_namespace_and_named_rule() {
    let echo = Echo::start(&route(&format!("[{{name: all, {V1}}}]"))).await;
    echo.expect("GET /", "v1").await;
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
}
