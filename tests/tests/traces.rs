//! Promise: the sidecars of a call and the application's own spans are one trace. Each attempt is a CLIENT span, each
//! served request a SERVER span below it; what the caller decided about sampling is kept, in the formats that came in.

use outrigger_tests::application::{Seen, nobody};
use outrigger_tests::collector::{Collector, Span};
use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{self, Response};
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually};

/// cart -> catalog -> stock, where catalog's application is the test.
struct Chain {
    collector: Collector,
    cart: Sidecar,
    catalog: Sidecar,
    catalog_app: Application,
    stock_app: Application,
    _stock: Sidecar,
    _mesh: Mesh,
}

/// `tracing` is the value in MeshConfig; `ENDPOINT` stands for the collector's.
async fn chain(tracing: &str) -> Chain {
    let collector = Collector::start().await;
    let mesh = traced_mesh(tracing, &collector).await;
    let (catalog_app, stock_app) = (Application::start("catalog").await, Application::start("stock").await);
    mesh.service("catalog.shop", 80, catalog_app.port(), None);
    mesh.service("stock.shop", 80, stock_app.port(), None);
    let stock = mesh.sidecar("stock-1").label("app", "stock").inbound(stock_app.address()).start().await;
    let catalog = mesh.sidecar("catalog-1").label("app", "catalog").workload("catalog-api");
    let catalog = catalog.inbound(catalog_app.address()).outbound("stock:80").start().await;
    let cart = mesh.sidecar("cart-1").workload("cart-web").outbound("catalog:80").start().await;
    Chain { collector, cart, catalog, catalog_app, stock_app, _stock: stock, _mesh: mesh }
}

async fn traced_mesh(tracing: &str, collector: &Collector) -> Mesh {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let tracing = tracing.replace("ENDPOINT", collector.endpoint());
    let config = format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: \
         outrigger-system}}\nspec: {{tracing: {{{tracing}}}}}\n"
    );
    mesh.write("mesh-config.yaml", &config);
    eventually("the settings are read", async || {
        let status = mesh.control_plane_get("/status").await;
        assert_eq!(status["config"]["errors"], serde_json::json!([]));
        // A sidecar that comes now gets them with its first snapshot, or a moment later.
        Some(())
    })
    .await;
    mesh
}

const ALL: &str = "otlpEndpoint: 'ENDPOINT', randomSamplingPercentage: 100";
const NONE: &str = "otlpEndpoint: 'ENDPOINT', randomSamplingPercentage: 0";

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

impl Chain {
    async fn ask(&self, fields: &str) -> (Response, Seen) {
        let answer = ask(&self.cart, "/books/7?x=1", fields).await;
        assert_eq!(answer.status, 200);
        (answer, self.catalog_app.last())
    }

    /// Asks until the sidecars have the settings: their first snapshot may be of the moment before.
    async fn settled(self) -> Chain {
        eventually("traces are on", async || {
            let (_, seen) = self.ask("").await;
            seen.header("traceparent").is_some().then_some(())
        })
        .await;
        eventually("on both sides", async || {
            let spans = self.collector.spans();
            let (_, seen) = self.ask(&format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n")).await;
            let own = parts(seen.header("traceparent").unwrap());
            let client = spans.iter().find(|span| span.service() == "cart-web");
            let server = spans.iter().find(|span| span.service() == "catalog");
            (client.is_some() && server.is_some() && own.1 != SPAN).then_some(())
        })
        .await;
        self
    }
}

async fn ask(sidecar: &Sidecar, path: &str, fields: &str) -> Response {
    let request = format!("GET {path} HTTP/1.1\r\nHost: catalog.shop:80\r\n{fields}Connection: close\r\n\r\n");
    wire::ask(sidecar.outbound(), request).await
}

/// Trace, span and flags of a traceparent.
fn parts(traceparent: &str) -> (&str, &str, &str) {
    let parts: Vec<&str> = traceparent.split('-').collect();
    assert_eq!((parts.len(), parts[0]), (4, "00"), "{traceparent}");
    assert_eq!((parts[1].len(), parts[2].len(), parts[3].len()), (32, 16, 2), "{traceparent}");
    (parts[1], parts[2], parts[3])
}

fn has(span: &Span, expected: &[(&str, &str)]) {
    for (key, value) in expected {
        assert_eq!(span.attribute(key), *value, "{key} of {span:#?}");
    }
}

#[tokio::test]
async fn two_calls_are_one_trace_when_the_application_passes_its_headers_on() {
    let chain = chain(ALL).await.settled().await;
    let (_, seen) = chain.ask("").await;
    let context = seen.header("traceparent").expect("a trace begins at the first sidecar").to_owned();
    let (trace, exported, flags) = parts(&context);
    assert_eq!(flags, "01");
    // What an application does that knows of traces no more than to pass the headers on.
    let answer = ask(&chain.catalog, "/stock", &format!("traceparent: {context}\r\n")).await;
    assert_eq!(answer.status, 200);
    let last = chain.stock_app.last().header("traceparent").unwrap().to_owned();

    let spans = chain.collector.trace(trace, 4).await;
    let line: Vec<_> = spans.iter().map(|span| (span.service(), span.kind)).collect();
    let expected = [("cart-web", "CLIENT"), ("catalog", "SERVER"), ("catalog", "CLIENT"), ("stock", "SERVER")];
    assert_eq!(line, expected, "the Service's name; without a Service the workload's");
    assert_eq!(spans[0].parent, "");
    for (child, parent) in spans[1..].iter().zip(&spans) {
        assert_eq!(child.parent, parent.id, "{spans:#?}");
    }
    assert_eq!(exported, spans[1].id, "the application's traceparent names an exported span");
    assert_eq!(parts(&last).1, spans[3].id);
    assert_eq!(spans.iter().filter(|span| span.start > span.end).count(), 0);
    assert_eq!(spans[1].resource["service.namespace"], "shop");
    assert_eq!(spans[1].resource["service.instance.id"], "catalog-1");
}

#[tokio::test]
async fn attributes_are_those_of_the_conventions() {
    let chain = chain(ALL).await.settled().await;
    let (_, seen) = chain.ask("User-Agent: curl/8\r\n").await;
    let (trace, _, _) = parts(seen.header("traceparent").unwrap());
    let spans = chain.collector.trace(trace, 2).await;
    let (client, server) = (&spans[0], &spans[1]);
    for span in [client, server] {
        assert_eq!(span.name, "GET", "no path in a name");
        assert!(!span.error);
        has(
            span,
            &[
                ("http.request.method", "GET"),
                ("url.scheme", "http"),
                ("url.path", "/books/7"),
                ("server.address", "catalog.shop"),
                ("server.port", "80"),
                ("http.response.status_code", "200"),
                ("user_agent.original", "curl/8"),
                ("network.protocol.name", "http"),
                ("network.protocol.version", "1.1"),
                ("error.type", ""),
                ("http.request.resend_count", ""),
            ],
        );
    }
    let inbound = chain.catalog.inbound();
    has(client, &[("network.peer.address", "127.0.0.1"), ("network.peer.port", &inbound.port().to_string())]);
    assert_eq!(client.attribute("url.full"), "http://catalog.shop:80/books/7");
    has(server, &[("client.address", "127.0.0.1"), ("network.peer.address", "127.0.0.1"), ("url.full", "")]);

    // A server is not at fault for a 4xx, a client got an error.
    ask(&chain.cart, "/status/404", "").await;
    let seen = chain.catalog_app.last();
    let spans = chain.collector.trace(parts(seen.header("traceparent").unwrap()).0, 2).await;
    assert_eq!((spans[0].error, spans[0].attribute("error.type")), (true, "404"));
    assert_eq!((spans[1].error, spans[1].attribute("error.type")), (false, ""));
    ask(&chain.cart, "/status/503", "").await;
    let seen = chain.catalog_app.last();
    for span in chain.collector.trace(parts(seen.header("traceparent").unwrap()).0, 2).await {
        assert_eq!((span.error, span.attribute("error.type")), (true, "503"));
    }
    let other = "PROPFIND /x HTTP/1.1\r\nHost: catalog\r\n\r\n";
    Connection::open(chain.cart.outbound()).await.ask(other).await;
    let seen = chain.catalog_app.last();
    for span in chain.collector.trace(parts(seen.header("traceparent").unwrap()).0, 2).await {
        assert_eq!(span.name, "HTTP");
        has(&span, &[("http.request.method", "_OTHER"), ("http.request.method_original", "PROPFIND")]);
    }
}

#[tokio::test]
async fn grpc_has_the_attributes_of_rpc() {
    let chain = chain(ALL).await.settled().await;
    let client = Http2::open(chain.cart.outbound()).await;
    for (method, status, name, error) in [("Unary", "0", "OK", [false; 2]), ("Fail", "5", "NOT_FOUND", [true, false])] {
        let whole = client.unary(method, b"hello").await.unwrap();
        assert_eq!(whole.grpc_status(), Some(status));
        let seen = chain.catalog_app.last();
        let spans = chain.collector.trace(parts(seen.header("traceparent").unwrap()).0, 2).await;
        for (span, error) in spans.iter().zip(error) {
            assert_eq!(span.name, format!("echo.Echo/{method}"));
            assert_eq!(span.error, error, "{span:#?}");
            let rpc_method = format!("echo.Echo/{method}");
            has(span, &[("rpc.system.name", "grpc"), ("rpc.method", &rpc_method), ("rpc.response.status_code", name)]);
        }
    }
}

#[tokio::test]
async fn what_the_caller_decided_is_kept() {
    let chain = chain(ALL).await.settled().await;
    // Unsampled, though everything that begins here is sampled.
    let unseen = "a3ce929d0e0e47364bf92f3577b34da6";
    let unsampled = format!("00-{unseen}-{SPAN}-00");
    let fields = format!("traceparent: {unsampled}\r\ntracestate: a=1,b=2\r\nbaggage: user=7\r\n");
    let (_, seen) = chain.ask(&fields).await;
    assert_eq!(seen.all("traceparent"), [unsampled], "as it came");
    assert_eq!(seen.all("tracestate"), ["a=1,b=2"]);
    assert_eq!(seen.all("baggage"), ["user=7"]);

    // Sampled: the caller's span is the parent.
    let own = "0af7651916cd43dd8448eb211c80319c";
    let (_, seen) = chain.ask(&format!("traceparent: 00-{own}-{SPAN}-01\r\ntracestate: a=1\r\n")).await;
    assert_eq!(parts(seen.header("traceparent").unwrap()).0, own);
    assert_eq!(seen.all("tracestate"), ["a=1"]);
    let spans = chain.collector.trace(own, 2).await;
    assert_eq!((spans[0].parent.as_str(), spans[0].kind), (SPAN, "CLIENT"));
    assert_eq!(spans[1].parent, spans[0].id);
    // The sampled one came later.
    assert!(chain.collector.spans().iter().all(|span| span.trace != unseen));

    // Nonsense begins a new trace, and its state goes.
    let (_, seen) = chain.ask("traceparent: 00-zz-1-01\r\ntracestate: a=1\r\n").await;
    let (trace, _, flags) = parts(seen.header("traceparent").unwrap());
    assert_eq!((flags, seen.header("tracestate")), ("01", None));
    chain.collector.trace(trace, 2).await;
}

#[tokio::test]
async fn b3_is_read_and_written_back() {
    let chain = chain(ALL).await.settled().await;
    let single = "80f198ee56343ba864fe8b2a57d3eff7";
    let (_, seen) = chain.ask(&format!("b3: {single}-{SPAN}-1\r\n")).await;
    let spans = chain.collector.trace(single, 2).await;
    assert_eq!(spans[0].parent, SPAN);
    let server = &spans[1].id;
    assert_eq!(seen.all("b3"), [format!("{single}-{server}-1-{}", spans[0].id)]);
    assert_eq!(parts(seen.header("traceparent").unwrap()), (single, server.as_str(), "01"));
    assert_eq!(seen.header("x-b3-traceid"), None, "written only when it came in");

    let multi = "463ac35c9f6413ad48485a3953bb6124";
    let fields = format!("X-B3-TraceId: {multi}\r\nX-B3-SpanId: {SPAN}\r\nX-B3-Sampled: 1\r\n");
    let (_, seen) = chain.ask(&fields).await;
    let spans = chain.collector.trace(multi, 2).await;
    assert_eq!((&spans[0].parent, &spans[1].parent), (&SPAN.to_owned(), &spans[0].id));
    assert_eq!(seen.all("x-b3-traceid"), [multi]);
    assert_eq!(seen.all("x-b3-spanid"), [&spans[1].id]);
    assert_eq!(seen.all("x-b3-parentspanid"), [&spans[0].id]);
    assert_eq!(seen.all("x-b3-sampled"), ["1"]);
    assert_eq!(seen.header("b3"), None);

    let unsampled = format!("{single}-{SPAN}-0");
    let (_, seen) = chain.ask(&format!("b3: {unsampled}\r\n")).await;
    assert_eq!(seen.all("b3"), [unsampled]);
    assert_eq!(parts(seen.header("traceparent").unwrap()), (single, SPAN, "00"));
    let (_, seen) = chain.ask("b3: 0\r\n").await;
    assert_eq!((seen.all("b3"), parts(seen.header("traceparent").unwrap()).2), (vec!["0"], "00"));
}

#[tokio::test]
async fn a_trace_that_begins_here_is_sampled_by_the_percentage() {
    let chain = chain(NONE).await;
    eventually("traces are on", async || {
        let (_, seen) = chain.ask("").await;
        let begun = seen.header("traceparent")?;
        assert_eq!(parts(begun).2, "00", "no trace that begins here is sampled");
        Some(())
    })
    .await;
    for _ in 0..20 {
        let (_, seen) = chain.ask("").await;
        assert_eq!(parts(seen.header("traceparent").unwrap()).2, "00");
    }
    // One that the caller samples is.
    chain.ask(&format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n")).await;
    chain.collector.trace(TRACE, 2).await;
    assert_eq!(chain.collector.spans().len(), 2, "and nothing else");
}

#[tokio::test]
async fn every_attempt_has_a_span() {
    let collector = Collector::start().await;
    let mesh = traced_mesh(ALL, &collector).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    // An endpoint of the mesh at which nobody listens.
    let dead = format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: dead, namespace: shop}}\nspec: \
         {{address: 127.0.0.9, ports: {{main: {}}}, serviceAccount: catalog, mesh: true, labels: {{app: catalog}}}}\n",
        app.port()
    );
    mesh.write("dead.yaml", &dead);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let again = eventually("a second attempt", async || {
        assert_eq!(ask(&near, "/", "").await.status, 200);
        let resent = |span: &Span| !span.attribute("http.request.resend_count").is_empty();
        collector.spans().into_iter().find(resent)
    })
    .await;
    let spans = collector.trace(&again.trace, 3).await;
    let clients: Vec<&Span> = spans.iter().filter(|span| span.kind == "CLIENT").collect();
    let server = spans.iter().find(|span| span.kind == "SERVER").unwrap();
    assert_eq!(clients.len(), 2, "{spans:#?}");
    let (failed, again) = (clients[0], clients[1]);
    assert!(failed.error);
    has(
        failed,
        &[
            ("error.type", "connection_refused"),
            ("network.peer.address", "127.0.0.9"),
            ("http.response.status_code", ""),
            ("http.request.resend_count", ""),
        ],
    );
    assert_eq!((failed.parent.as_str(), again.parent.as_str()), ("", ""), "siblings, not parent and child");
    has(again, &[("http.request.resend_count", "1"), ("http.response.status_code", "200")]);
    assert_eq!(server.parent, again.id);
}

#[tokio::test]
async fn what_the_mesh_answers_itself_has_its_reason_in_the_span() {
    let collector = Collector::start().await;
    let mesh = traced_mesh(ALL, &collector).await;
    let app = nobody().await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let span = eventually("a span of the refusal", async || {
        assert_eq!(ask(&near, "/", "").await.status, 503);
        collector.spans().into_iter().find(|span| span.kind == "SERVER")
    })
    .await;
    assert!(span.error);
    has(&span, &[("error.type", "connection_refused"), ("http.response.status_code", "503")]);
    let spans = collector.trace(&span.trace, 2).await;
    assert_eq!((spans[0].kind, &spans[1].parent), ("CLIENT", &spans[0].id));
}

#[tokio::test]
async fn without_an_endpoint_headers_stay_as_they_came() {
    let chain = chain("").await;
    let fields = format!(
        "traceparent: 00-{TRACE}-{SPAN}-01\r\ntracestate: a=1\r\nb3: {TRACE}-{SPAN}-1\r\nX-B3-Sampled: 1\r\nX-Request-Id: 7\r\n"
    );
    let (_, seen) = chain.ask(&fields).await;
    assert_eq!(seen.all("traceparent"), [format!("00-{TRACE}-{SPAN}-01")]);
    assert_eq!(seen.all("tracestate"), ["a=1"]);
    assert_eq!(seen.all("b3"), [format!("{TRACE}-{SPAN}-1")]);
    assert_eq!((seen.all("x-b3-sampled"), seen.all("x-request-id")), (vec!["1"], vec!["7"]));
    let (_, seen) = chain.ask("traceparent: nonsense\r\n").await;
    assert_eq!(seen.all("traceparent"), ["nonsense"]);
    let (_, seen) = chain.ask("").await;
    assert_eq!((seen.header("traceparent"), seen.header("b3")), (None, None));
    assert!(chain.collector.spans().is_empty());
}

#[tokio::test]
async fn a_request_that_is_never_attempted_has_a_span() {
    let collector = Collector::start().await;
    let mesh = traced_mesh(ALL, &collector).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    mesh.service("empty.shop", 80, 8080, None);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let builder = mesh.sidecar("cart-1").outbound("catalog:80").outbound("empty:80").outbound("absent.bank:81");
    let near = builder.http_proxy().start().await;
    eventually("traces are on", async || {
        ask(&near, "/", "").await;
        (!collector.spans().is_empty()).then_some(())
    })
    .await;
    let service = |name: &'static str, namespace: &'static str, port: &'static str| {
        vec![("service.peer.name", name), ("service.peer.namespace", namespace), ("server.port", port)]
    };
    let cases = [
        ("outbound:empty.shop:80", "/x", "destination_unavailable", service("empty", "shop", "80")),
        ("outbound:absent.bank:81", "/x", "not_registered", service("absent", "bank", "81")),
        ("http-proxy", "http://nowhere.invalid/x", "unknown_destination", vec![("server.address", "nowhere.invalid")]),
        ("http-proxy", "/x", "bad_request", vec![]),
    ];
    for (number, (listener, target, reason, attributes)) in cases.into_iter().enumerate() {
        let trace = format!("{:032x}", 0xabc + number);
        let address = near.address(listener);
        let host = if target.starts_with("http") { "nowhere.invalid".to_owned() } else { address.to_string() };
        let context = format!("traceparent: 00-{trace}-{SPAN}-01");
        let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{context}\r\nConnection: close\r\n\r\n");
        let answer = wire::ask(address, request).await;
        assert!(answer.status >= 400, "{reason}");
        assert_eq!(answer.reason(), reason);
        let spans = collector.trace(&trace, 1).await;
        let span = &spans[0];
        assert_eq!((span.kind, span.parent.as_str(), span.error), ("CLIENT", SPAN, true), "{reason}: {span:#?}");
        has(span, &[("error.type", reason), ("outrigger.reason", reason), ("network.peer.address", "")]);
        has(span, &attributes);
    }
}

#[tokio::test]
async fn a_span_says_which_service_was_called_and_who_answered() {
    let chain = chain(ALL).await.settled().await;
    let host = chain.cart.outbound().to_string();
    let trace = "0123456789abcdef0123456789abcdef";
    let request = format!(
        "GET /books HTTP/1.1\r\nHost: {host}\r\ntraceparent: 00-{trace}-{SPAN}-01\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(wire::ask(chain.cart.outbound(), request).await.status, 200);
    let spans = chain.collector.trace(trace, 2).await;
    has(
        &spans[0],
        &[
            ("service.peer.name", "catalog"),
            ("service.peer.namespace", "shop"),
            ("server.address", "catalog.shop"),
            ("server.port", "80"),
            ("url.full", "http://catalog.shop:80/books"),
            ("outrigger.peer.identity", "spiffe://outrigger.local/ns/shop/sa/catalog"),
            ("outrigger.mtls", "true"),
        ],
    );
    has(
        &spans[1],
        &[("outrigger.peer.identity", "spiffe://outrigger.local/ns/shop/sa/cart"), ("service.peer.name", "")],
    );
}

#[tokio::test]
async fn a_call_to_the_own_service_names_no_port_and_no_plaintext() {
    let collector = Collector::start().await;
    let mesh = traced_mesh(ALL, &collector).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let sidecar = builder.outbound("catalog:80").start().await;
    let spans = eventually("traces are on", async || {
        assert_eq!(ask(&sidecar, "/", "").await.status, 200);
        let seen = app.last();
        let context = seen.header("traceparent")?;
        let spans = collector.trace(parts(context).0, 2).await;
        Some(spans)
    })
    .await;
    for span in &spans {
        assert_ne!(span.attribute("network.peer.port"), "0", "{span:#?}");
        has(span, &[("outrigger.mtls", "")]);
    }
}
