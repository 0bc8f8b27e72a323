//! Promise: a rule of a route does more than choose a Service: it redirects, rewrites, mirrors, answers preflights, limits
//! the time and retries, as Gateway API says. A test named `mesh_...` is named after one of its conformance tests for meshes.

use outrigger_tests::routes::{Echo, V1, route, said};
use outrigger_tests::{Connection, eventually, under_test};

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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
    echo.test(under_test!());
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
