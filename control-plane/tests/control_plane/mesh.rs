//! The control plane end to end over real sockets: a token becomes a certificate, the certificate opens the streams,
//! a lease becomes an endpoint that others are told of, and a restart forgets none of it.

use outrigger_api::snapshot::{self, EndpointTls, Key};
use outrigger_api::wire::discovery_client::DiscoveryClient;
use outrigger_api::wire::registry_client::RegistryClient;
use outrigger_api::wire::telemetry_client::TelemetryClient;
use outrigger_api::wire::{
    Ack, Edge, Hello, LeaseRequest, LeaseResponse, RegisteredPort, Registration, ReportRequest, WatchRequest,
    WatchResponse, Withdraw, lease_request, watch_request, watch_response,
};
use outrigger_control_plane::admin::view;
use outrigger_control_plane::app::ControlPlane;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::support::{Fixture, PATIENCE, Workload, admin, names};

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  selector: {app: cart}
  ports:
  - {name: http, port: 80, targetPort: 8080}
";

/// A Watch stream.
pub struct Watch {
    requests: mpsc::Sender<WatchRequest>,
    updates: Streaming<WatchResponse>,
}

impl Watch {
    pub async fn open(control_plane: &ControlPlane, workload: &Workload) -> Result<Watch, Status> {
        let (requests, stream) = mpsc::channel(16);
        let mut client = DiscoveryClient::new(workload.connect(control_plane).await?);
        let hello = Hello { version: "test".into(), workload: workload.name.clone(), ..Hello::default() };
        requests.send(WatchRequest { kind: Some(watch_request::Kind::Hello(hello)) }).await.unwrap();
        let updates = client.watch(ReceiverStream::new(stream)).await?.into_inner();
        Ok(Watch { requests, updates })
    }

    pub async fn subscribe(&self, key: &Key) {
        let kind = watch_request::Kind::Subscribe(key.into());
        self.requests.send(WatchRequest { kind: Some(kind) }).await.unwrap();
    }

    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        let update = timeout(PATIENCE, self.updates.message()).await.expect("no update came")?;
        update.ok_or_else(|| Status::ok("the stream ended"))
    }

    /// The next update that satisfies, among those of one destination.
    async fn until(&mut self, wanted: impl Fn(Option<&snapshot::Destination>) -> bool) -> WatchResponse {
        loop {
            let update = self.next().await.unwrap();
            if wanted(destination(&update).as_ref()) {
                return update;
            }
        }
    }

    async fn answer(&self, update: &WatchResponse, refusal: &str) {
        let ack = Ack { key: update.key.clone(), version: update.version, refusal: refusal.into() };
        self.requests.send(WatchRequest { kind: Some(watch_request::Kind::Ack(ack)) }).await.unwrap();
    }
}

fn destination(update: &WatchResponse) -> Option<snapshot::Destination> {
    match update.resource.as_ref().unwrap() {
        watch_response::Resource::Destination(destination) => Some(destination.try_into().unwrap()),
        watch_response::Resource::Unregistered(_) => None,
        watch_response::Resource::Workload(_) | watch_response::Resource::ServiceAddresses(_) => {
            panic!("not a destination")
        }
    }
}

/// A Lease stream.
struct Lease {
    requests: mpsc::Sender<LeaseRequest>,
    answers: Streaming<LeaseResponse>,
}

impl Lease {
    async fn open(control_plane: &ControlPlane, workload: &Workload) -> Lease {
        let (requests, stream) = mpsc::channel(16);
        let mut client = RegistryClient::new(workload.connect(control_plane).await.unwrap());
        let answers = client.lease(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Lease { requests, answers }
    }

    async fn say(&mut self, kind: lease_request::Kind) -> LeaseResponse {
        self.requests.send(LeaseRequest { kind: Some(kind) }).await.unwrap();
        timeout(PATIENCE, self.answers.message()).await.unwrap().unwrap().unwrap()
    }

    async fn register(&mut self, workload: &Workload, label: &str) -> LeaseResponse {
        let port = RegisteredPort { application_port: 8080, mesh_port: 18080, protocol: 0 };
        let registration = Registration {
            instance: workload.name.clone(),
            workload: "cart".into(),
            labels: [("app".to_owned(), label.to_owned())].into(),
            ip: String::new(),
            ports: vec![port],
            ..Registration::default()
        };
        self.say(lease_request::Kind::Register(registration)).await
    }
}

fn cart() -> Key {
    Key::Service(outrigger_api::name::ServicePort::parse("cart.shop:80", "shop").unwrap())
}

#[tokio::test]
async fn from_token_to_endpoint_and_back() {
    let fixture = Fixture::new();
    fixture.write("cart.yaml", SERVICE);
    let control_plane = fixture.start().await;
    let mut server = Workload::new("cart-1");
    let mut client = Workload::new("web-1");
    let token = fixture.token("cart", &[("app", "cart")], 1);
    let issued = server.issue(&control_plane, &token).await.unwrap();
    client.issue(&control_plane, &fixture.token("web", &[], 1)).await.unwrap();
    assert_eq!(names(&issued.chain_der[0]), ["spiffe://outrigger.local/ns/shop/sa/cart"]);

    let mut watch = Watch::open(&control_plane, &client).await.unwrap();
    watch.subscribe(&cart()).await;
    let first = watch.until(|destination| destination.is_some()).await;
    assert!(destination(&first).unwrap().endpoints.is_empty());

    let mut lease = Lease::open(&control_plane, &server).await;
    let refused = lease.register(&server, "pay").await;
    assert!(refused.refusal.contains("app=pay was not granted"), "{}", refused.refusal);
    let accepted = lease.register(&server, "cart").await;
    assert_eq!((accepted.refusal.as_str(), &accepted.services[..]), ("", &["cart.shop".to_owned()][..]));
    let there = watch.until(|destination| destination.is_some_and(|known| !known.endpoints.is_empty())).await;
    assert!(there.version > first.version);
    let endpoint = &destination(&there).unwrap().endpoints[0];
    assert_eq!(endpoint.address, "127.0.0.1:18080".parse().unwrap());
    assert_eq!((endpoint.instance.as_str(), endpoint.application_port), ("cart-1", 8080));
    let EndpointTls::Mutual(identity) = &endpoint.tls else { panic!("plaintext to a lease") };
    assert_eq!(identity.as_str(), "spiffe://outrigger.local/ns/shop/sa/cart");
    watch.answer(&there, "no such protocol").await;

    // The stream is one lease: under another name it leaves no ghost.
    server.name = "cart-2".to_owned();
    assert_eq!(lease.register(&server, "cart").await.refusal, "");
    let renamed = |known: &snapshot::Destination| known.endpoints.iter().any(|one| one.instance == "cart-2");
    let there = watch.until(|destination| destination.is_some_and(renamed)).await;
    assert_eq!(destination(&there).unwrap().endpoints.len(), 1);

    lease.say(lease_request::Kind::Withdraw(Withdraw {})).await;
    let gone = watch.until(|destination| destination.is_some_and(|known| known.endpoints.is_empty())).await;
    assert!(gone.version > there.version);

    let (code, body) = admin(&control_plane, "/status", "localhost").await;
    assert_eq!(code, 200);
    let status: view::Status = serde_json::from_str(&body).unwrap();
    let sidecar = &status.sidecars[0];
    assert_eq!((sidecar.instance.as_str(), sidecar.subscriptions), ("web-1", 1));
    assert_eq!(sidecar.refusals[0].reason, "no such protocol");
    assert_eq!(admin(&control_plane, "/status", "evil.test").await.0, 403);
    let (_, metrics) = admin(&control_plane, "/metrics", "127.0.0.1").await;
    assert!(metrics.contains("outrigger_control_plane_certificates_issued_total{proof=\"token\"} 2"), "{metrics}");
    control_plane.shutdown().await;
}

#[tokio::test]
async fn a_restart_forgets_nothing() {
    let fixture = Fixture::new();
    fixture.write("cart.yaml", SERVICE);
    let control_plane = fixture.start().await;
    let bundle = std::fs::read(control_plane.trust_bundle_path()).unwrap();
    let mut server = Workload::new("cart-1");
    let token = fixture.token("cart", &[("app", "cart")], 1);
    server.issue(&control_plane, &token).await.unwrap();
    let mut lease = Lease::open(&control_plane, &server).await;
    assert_eq!(lease.register(&server, "cart").await.refusal, "");
    let mut watch = Watch::open(&control_plane, &server).await.unwrap();
    watch.subscribe(&cart()).await;
    let before = watch.until(|destination| destination.is_some_and(|known| !known.endpoints.is_empty())).await;
    control_plane.shutdown().await;
    assert!(watch.next().await.is_err(), "the stream ends with the control plane");

    let control_plane = fixture.start().await;
    assert_eq!(std::fs::read(control_plane.trust_bundle_path()).unwrap(), bundle);
    let mut watch = Watch::open(&control_plane, &server).await.unwrap();
    watch.subscribe(&cart()).await;
    let after = watch.next().await.unwrap();
    assert_eq!(after.resource, before.resource, "the lease is there before its sidecar is");
    assert!(after.version > before.version);
    let mut lease = Lease::open(&control_plane, &server).await;
    assert_eq!(lease.register(&server, "cart").await.refusal, "", "the grant is remembered");
    // The lost reply: the same key may ask again. Anybody else who has the token is a replay.
    server.chain.clear();
    server.issue(&control_plane, &token).await.unwrap();
    let replay = Workload::new("cart-1").issue(&control_plane, &token).await.unwrap_err();
    assert_eq!(replay.code(), Code::PermissionDenied);
    assert!(replay.message().starts_with("token_replayed: "), "{}", replay.message());
    control_plane.shutdown().await;
}

#[tokio::test]
async fn certificates_renew_themselves_and_nothing_else() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let mut workload = Workload::new("web-1");
    let nobody = Watch::open(&control_plane, &workload).await;
    assert_eq!(nobody.err().unwrap().code(), Code::Unauthenticated);
    let missing = workload.issue(&control_plane, "").await.unwrap_err();
    assert!(missing.message().starts_with("token_missing: "), "{}", missing.message());
    workload.issue(&control_plane, &fixture.token("web", &[], 1)).await.unwrap();
    let first = workload.chain[0].clone();
    workload.issue(&control_plane, "").await.unwrap();
    assert_ne!(workload.chain[0], first);
    assert_eq!(names(&workload.chain[0]), names(&first));
    let foreign = workload.issue(&control_plane, &fixture.token("pay", &[], 1)).await.unwrap_err();
    assert!(foreign.message().starts_with("token_namespace: "), "{}", foreign.message());
    let other_name = std::mem::replace(&mut workload.name, "web-2".into());
    let renamed = workload.issue(&control_plane, "").await.unwrap_err();
    assert!(renamed.message().starts_with("workload_name: "), "{}", renamed.message());
    workload.name = other_name;
    control_plane.shutdown().await;
}

#[tokio::test]
async fn a_sidecar_is_told_of_itself_and_of_changed_files() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let mut workload = Workload::new("cart-1");
    workload.issue(&control_plane, &fixture.token("cart", &[("app", "cart")], 1)).await.unwrap();
    let mut watch = Watch::open(&control_plane, &workload).await.unwrap();
    watch.subscribe(&Key::Own).await;
    let own = |update: &WatchResponse| match update.resource.as_ref().unwrap() {
        watch_response::Resource::Workload(workload) => workload.clone(),
        other => panic!("{other:?}"),
    };
    let first = own(&watch.next().await.unwrap());
    assert_eq!(first.decode().unwrap().default_mtls_mode, snapshot::MtlsMode::Permissive);
    let bundle = first.trust_bundle.unwrap();
    let generation = bundle.generation;
    assert_eq!(bundle.root_der.len(), 1);
    fixture.write(
        "strict.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: mesh, namespace: \
         outrigger-system}\nspec:\n  mtls: {mode: STRICT}\n",
    );
    let second = own(&watch.next().await.unwrap());
    assert_eq!(second.decode().unwrap().default_mtls_mode, snapshot::MtlsMode::Strict);
    // A second root that the operator puts beside the first reaches sidecars with the next generation.
    let other = Fixture::new();
    let other_control_plane = other.start().await;
    let trust = control_plane.state_path().join("ca/trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::copy(other_control_plane.trust_bundle_path(), trust.join("old.pem")).unwrap();
    control_plane.reload();
    let bundle = own(&watch.next().await.unwrap()).trust_bundle.unwrap();
    assert_eq!(bundle.root_der.len(), 2);
    assert!(bundle.generation > generation, "{} after {generation}", bundle.generation);
    other_control_plane.shutdown().await;
    control_plane.shutdown().await;
}

#[tokio::test]
async fn reports_become_golden_signals() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let mut workload = Workload::new("cart-1");
    workload.issue(&control_plane, &fixture.token("cart", &[], 1)).await.unwrap();
    let own = "spiffe://outrigger.local/ns/shop/sa/cart";
    let edge = |destination_principal: &str| Edge {
        inbound: true,
        source_workload: "web".into(),
        destination_service: "cart.shop".into(),
        destination_principal: destination_principal.into(),
        protocol: "http1".into(),
        mtls: true,
        requests: 100,
        failures: 1,
        latency_buckets: vec![0, 0, 0, 100],
        ..Edge::default()
    };
    let edges = vec![edge(own), edge("spiffe://outrigger.local/ns/shop/sa/pay")];
    let report = ReportRequest { instance: "cart-1".into(), window_seconds: 5.0, edges, ..Default::default() };
    let mut client = TelemetryClient::new(workload.connect(&control_plane).await.unwrap());
    client.report(report.clone()).await.unwrap();
    let nameless = ReportRequest { instance: "not a label".into(), ..report.clone() };
    assert_eq!(client.report(nameless).await.unwrap_err().code(), Code::InvalidArgument);
    let endless = ReportRequest { window_seconds: 0.0, ..report };
    assert_eq!(client.report(endless).await.unwrap_err().code(), Code::InvalidArgument);
    let (_, body) = admin(&control_plane, "/stats", "[::1]:15014").await;
    let stats: view::Stats = serde_json::from_str(&body).unwrap();
    let [edge] = &stats.edges[..] else { panic!("a sidecar speaks for itself only: {body}") };
    assert_eq!((edge.requests_per_second, edge.success_percent), (20.0, Some(99.0)));
    assert_eq!((edge.direction, edge.mtls, edge.destination_identity.as_str()), (view::Direction::Inbound, true, own));
    assert!(edge.p50.is_some_and(|p50| (0.0025..0.005).contains(&p50)), "{edge:?}");
    control_plane.shutdown().await;
}
