//! The task against a control plane of ours, over real sockets; and the directory by itself.

use std::net::SocketAddr;
use std::time::SystemTime;

use outrigger_api::name::{ServiceName, ServicePort};
use outrigger_api::snapshot::{
    Destination, Endpoint, EndpointTls, InboundPort, Key, LoadBalancer, MeshSettings, MtlsMode, Workload,
};
use outrigger_api::wire::{self, ResourceKey, WatchResponse, lease_request, watch_request, watch_response::Resource};
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::directory::Applied;
use super::*;
use crate::identity::test_control_plane::{ControlPlane, Record};
use crate::tls::test_authority::{Authority, LeafSpec};
use crate::tls::{Clock, Credential};

const LIMIT: Duration = Duration::from_secs(30);

struct Fixture {
    control_plane: ControlPlane,
    credential: Credential,
    settings: DiscoverySettings,
    tls: Tls,
    directory: Directory,
    lease: Option<Lease>,
    withdraw: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Fixture {
    async fn new() -> Fixture {
        let authority = Authority::new("outrigger.local");
        let credential = authority.credential(&LeafSpec::valid("shop", "cart"));
        let control_plane = ControlPlane::start(authority).await;
        let tls = Tls::new(Clock::system());
        tls.install(credential.clone()).unwrap();
        let settings = DiscoverySettings {
            control_plane: control_plane.address.to_string(),
            trust_domain: TrustDomain::new("outrigger.local").unwrap(),
            name: "cart-1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "cart".to_owned(),
            state: None,
            mark: None,
            version: "test".to_owned(),
            process: "p".to_owned(),
        };
        let directory = Directory::new(Clock::system());
        Fixture { control_plane, credential, settings, tls, directory, lease: None, withdraw: None, task: None }
    }

    fn start(&mut self) {
        let (withdraw, wanted) = oneshot::channel();
        self.withdraw = Some(withdraw);
        let run = run(
            self.settings.clone(),
            self.tls.clone(),
            self.lease.clone(),
            self.directory.clone(),
            ReportSource {
                make: Box::new(outrigger_api::wire::ReportRequest::default),
                taken: std::sync::Arc::new(|_| {}),
            },
            async move {
                if wanted.await.is_err() {
                    pending().await
                }
            },
        );
        self.task = Some(tokio::spawn(run));
    }

    /// The same sidecar in a new process.
    fn restart(&mut self) {
        self.stop();
        self.directory = Directory::new(Clock::system());
        self.start();
    }

    fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    fn record(&self) -> &Record {
        &self.control_plane.record
    }

    fn push_own(&self, version: u64, mode: MtlsMode) {
        let bundle = self.control_plane.trust_bundle();
        self.push(&Key::Own, version, Resource::Workload(wire::Workload::encode(&own(mode), bundle)));
    }

    fn push(&self, key: &Key, version: u64, resource: Resource) {
        let key = Some(ResourceKey::from(key));
        self.control_plane.push(WatchResponse { key, version, resource: Some(resource) });
    }

    /// Waits until the control plane has the answer for a version of a key, and returns the refusal.
    async fn answer(&self, key: &Key, version: u64) -> String {
        let wanted = ResourceKey::from(key);
        let mut refusal = None;
        self.record()
            .until(|record| {
                let watched = record.watched.lock().unwrap();
                refusal = watched.iter().rev().find_map(|kind| match kind {
                    watch_request::Kind::Ack(ack) if ack.key.as_ref() == Some(&wanted) && ack.version == version => {
                        Some(ack.refusal.clone())
                    }
                    _ => None,
                });
                refusal.is_some()
            })
            .await;
        refusal.unwrap()
    }

    async fn subscribed(&self, key: &Key, times: usize) {
        let wanted = watch_request::Kind::Subscribe(ResourceKey::from(key));
        let count =
            |record: &Record| record.watched.lock().unwrap().iter().filter(|kind| **kind == wanted).count() >= times;
        self.record().until(count).await;
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop();
    }
}

fn own(mode: MtlsMode) -> Workload {
    let port = InboundPort { protocol: None, mtls_mode: mode, service: ServiceName::new("cart", "shop").ok() };
    Workload {
        name: "cart-1".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
        ports: [(8080, port)].into(),
        default_mtls_mode: mode,
        mesh: MeshSettings::default(),
        registered: true,
        labels: Default::default(),
        authentication: Default::default(),
        rate_limits: Default::default(),
        authorization: Default::default(),
    }
}

fn key(name: &str) -> Key {
    Key::Service(ServicePort { service: ServiceName::new(name, "shop").unwrap(), port: 80 })
}

fn destination(name: &str, endpoints: &[&str]) -> Destination {
    let endpoint = |address: &&str| Endpoint {
        address: address.parse().unwrap(),
        tls: EndpointTls::Plaintext,
        workload: name.to_owned(),
        namespace: "shop".to_owned(),
        instance: name.to_owned(),
        weight: 1,
        application_port: 8080,
    };
    Destination {
        service: ServiceName::new(name, "shop").unwrap(),
        port: 80,
        protocol: None,
        load_balancer: LoadBalancer::default(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        stale: false,
        why_empty: String::new(),
        no_such_port: false,
        routes: None,
    }
}

fn wire(destination: &Destination) -> Resource {
    Resource::Destination(destination.into())
}

async fn until<T: Clone>(receiver: &mut watch::Receiver<T>, so: impl FnMut(&T) -> bool) -> T {
    timeout(LIMIT, receiver.wait_for(so)).await.expect("it did not become so").unwrap().clone()
}

fn endpoints(known: &Known) -> usize {
    match known {
        Known::Registered(destination) => destination.endpoints.len(),
        Known::Pending | Known::Unregistered | Known::Untold | Known::Named(_) => 0,
    }
}

#[tokio::test]
async fn what_is_asked_for_is_told_now_and_on_change() {
    let mut sidecar = Fixture::new().await;
    sidecar.push_own(1, MtlsMode::Permissive);
    sidecar.push(&key("pay"), 1, wire(&destination("pay", &["10.0.0.1:80"])));
    sidecar.push(&key("void"), 1, Resource::Unregistered(wire::Unregistered {}));
    let mut early = sidecar.directory.destination(&key("pay"));
    assert_eq!(*early.borrow(), Known::Pending);
    sidecar.start();
    let mode = |own: &Option<Arc<Workload>>| own.as_ref().map(|own| own.default_mtls_mode);
    let mut own = sidecar.directory.own();
    until(&mut own, |own| mode(own) == Some(MtlsMode::Permissive)).await;
    assert_eq!(endpoints(&until(&mut early, |known| *known != Known::Pending).await), 1);
    let mut late = sidecar.directory.destination(&key("void"));
    assert_eq!(until(&mut late, |known| *known != Known::Pending).await, Known::Unregistered);
    sidecar.push_own(2, MtlsMode::Strict);
    sidecar.push(&key("pay"), 2, wire(&destination("pay", &["10.0.0.1:80", "10.0.0.2:80"])));
    sidecar.push(&key("void"), 2, wire(&destination("void", &["[::1]:80"])));
    until(&mut own, |own| mode(own) == Some(MtlsMode::Strict)).await;
    until(&mut early, |known| endpoints(known) == 2).await;
    until(&mut late, |known| endpoints(known) == 1).await;
    for (key, version) in [(Key::Own, 2), (key("pay"), 2), (key("void"), 2)] {
        assert_eq!(sidecar.answer(&key, version).await, "");
    }
    let hello = sidecar.record().watched.lock().unwrap()[0].clone();
    assert!(matches!(hello, watch_request::Kind::Hello(hello) if hello.workload == "cart-1"));
    assert_eq!(sidecar.directory.snapshot_age(), Some(Duration::ZERO));
    assert!(*sidecar.directory.connected().borrow());
}

#[tokio::test]
async fn an_address_is_a_key_too() {
    let mut sidecar = Fixture::new().await;
    let address = Key::Address("10.1.2.3:80".parse::<SocketAddr>().unwrap());
    sidecar.push(&address, 7, wire(&destination("pay", &["10.0.0.1:80"])));
    sidecar.start();
    let mut known = sidecar.directory.destination(&address);
    assert_eq!(endpoints(&until(&mut known, |known| *known != Known::Pending).await), 1);
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_and_changes_nothing() {
    let mut sidecar = Fixture::new().await;
    sidecar.push_own(5, MtlsMode::Strict);
    sidecar.push(&key("pay"), 5, wire(&destination("pay", &["10.0.0.1:80"])));
    sidecar.start();
    let mut known = sidecar.directory.destination(&key("pay"));
    until(&mut known, |known| endpoints(known) == 1).await;
    let good = wire::Workload::encode(&own(MtlsMode::Permissive), sidecar.control_plane.trust_bundle());
    let bundle = |change: fn(&mut wire::TrustBundle)| {
        let mut workload = good.clone();
        change(workload.trust_bundle.as_mut().unwrap());
        Resource::Workload(workload)
    };
    let workload = |change: fn(&mut wire::Workload)| {
        let mut workload = good.clone();
        change(&mut workload);
        Resource::Workload(workload)
    };
    let mut bad_endpoint = wire::Destination::from(&destination("pay", &["10.0.0.1:80"]));
    bad_endpoint.endpoints[0].tls = 99;
    let pay = key("pay");
    let cases = [
        (&Key::Own, 6, workload(|workload| workload.default_mtls_mode = 99), "mtls_mode"),
        (&Key::Own, 7, workload(|workload| workload.mesh = None), "mesh"),
        (&Key::Own, 8, workload(|workload| workload.name = "other".to_owned()), "other.shop"),
        (&Key::Own, 9, bundle(|bundle| bundle.trust_domain = "other.local".to_owned()), "other.local"),
        (&Key::Own, 10, bundle(|bundle| bundle.root_der.clear()), "no root"),
        (&Key::Own, 11, bundle(|bundle| bundle.root_der[0].truncate(20)), "root 0"),
        (&Key::Own, 12, wire(&destination("pay", &[])), "not of the kind"),
        (&Key::Own, 4, Resource::Workload(good.clone()), "older than 5"),
        (&pay, 6, Resource::Destination(bad_endpoint), "endpoints.tls"),
        (&pay, 7, wire(&destination("other", &[])), "asked for was pay.shop:80"),
        (&pay, 8, Resource::Workload(good.clone()), "not of the kind"),
        (&pay, 1, wire(&destination("pay", &[])), "older than 5"),
    ];
    for (key, version, resource, expected) in cases {
        sidecar.push(key, version, resource);
        let refusal = sidecar.answer(key, version).await;
        assert!(refusal.contains(expected), "{key} {version}: {refusal}");
    }
    assert_eq!(sidecar.directory.own().borrow().as_ref().unwrap().default_mtls_mode, MtlsMode::Strict);
    assert_eq!(endpoints(&known.borrow()), 1);
    sidecar.push(&pay, 20, wire(&destination("pay", &[])));
    assert_eq!(sidecar.answer(&pay, 20).await, "", "a good one after bad ones");
    assert_eq!(endpoints(&known.borrow()), 0);
}

#[tokio::test]
async fn a_new_bundle_goes_into_force() {
    let mut sidecar = Fixture::new().await;
    sidecar.push_own(1, MtlsMode::Strict);
    sidecar.start();
    assert_eq!(sidecar.answer(&Key::Own, 1).await, "");
    sidecar.control_plane.script.lock().unwrap().generation = 2;
    let mut materials = sidecar.tls.subscribe();
    sidecar.push_own(2, MtlsMode::Strict);
    let generation = |material: &Option<Arc<Material>>| material.as_ref().unwrap().credential().bundle().generation();
    until(&mut materials, |material| generation(material) == 2).await;
    assert_eq!(sidecar.answer(&Key::Own, 2).await, "");
    assert_eq!(sidecar.record().streams.lock().unwrap().len(), 1, "the stream stands");
}

#[tokio::test]
async fn the_last_good_state_serves_while_the_control_plane_is_away() {
    let mut sidecar = Fixture::new().await;
    sidecar.push_own(1, MtlsMode::Strict);
    sidecar.push(&key("pay"), 1, wire(&destination("pay", &["10.0.0.1:80"])));
    sidecar.start();
    let mut pay = sidecar.directory.destination(&key("pay"));
    until(&mut pay, |known| endpoints(known) == 1).await;
    let mut connected = sidecar.directory.connected();
    until(&mut connected, |connected| *connected).await;
    sidecar.control_plane.stop();
    until(&mut connected, |connected| !*connected).await;
    assert_eq!(endpoints(&pay.borrow()), 1);
    assert!(sidecar.directory.snapshot_age().is_some());
    // Asked for meanwhile: it waits, and is told when somebody answers again.
    let mut new = sidecar.directory.destination(&key("new"));
    sidecar.push(&key("new"), 1, wire(&destination("new", &["10.0.0.3:80"])));
    sidecar.push(&key("pay"), 2, wire(&destination("pay", &["10.0.0.1:80", "10.0.0.2:80"])));
    sidecar.control_plane.restart().await;
    until(&mut connected, |connected| *connected).await;
    until(&mut pay, |known| endpoints(known) == 2).await;
    until(&mut new, |known| endpoints(known) == 1).await;
    // Cut again and again, it comes back.
    for version in 3..5 {
        sidecar.control_plane.cut();
        until(&mut connected, |connected| !*connected).await;
        let resource = destination("pay", &vec!["10.0.0.1:80"; version as usize]);
        sidecar.push(&key("pay"), version, wire(&resource));
        until(&mut pay, |known| endpoints(known) == version as usize).await;
    }
}

#[tokio::test]
async fn a_renewed_certificate_takes_the_stream_and_the_lease_along() {
    let mut sidecar = Fixture::new().await;
    sidecar.lease = Some(lease());
    sidecar.push_own(1, MtlsMode::Strict);
    sidecar.start();
    let mut state = sidecar.directory.lease();
    until(&mut state, |state| matches!(state, LeaseState::Accepted { .. })).await;
    let mut connected = sidecar.directory.connected();
    until(&mut connected, |connected| *connected).await;
    connected.mark_unchanged();
    let authority = Arc::clone(&sidecar.control_plane.script.lock().unwrap().authority);
    sidecar.tls.install(authority.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    sidecar.subscribed(&Key::Own, 2).await;
    sidecar.record().until(|record| record.leases.lock().unwrap().len() == 2).await;
    assert!(!connected.has_changed().unwrap(), "it was connected all the time");
    // Nothing was said of an address: it is that of this end of the connection.
    let register = lease_request::Kind::Register(
        Lease { ips: vec![[127, 0, 0, 1].into()], ..lease() }.registration("p".to_owned()),
    );
    assert_eq!(*sidecar.record().leases.lock().unwrap(), [register.clone(), register]);
}

fn lease() -> Lease {
    Lease {
        instance: "cart-1".to_owned(),
        workload: "cart".to_owned(),
        labels: [("app".to_owned(), "cart".to_owned())].into(),
        ips: Vec::new(),
        ports: vec![(8080, 15006, Some(Protocol::Http))],
        transparent: false,
    }
}

#[tokio::test]
async fn a_lease_is_held_refused_lost_and_withdrawn() {
    let mut sidecar = Fixture::new().await;
    sidecar.lease = Some(lease());
    sidecar.push_own(1, MtlsMode::Strict);
    sidecar.control_plane.script.lock().unwrap().lease_refusal = "label app was not granted".to_owned();
    sidecar.start();
    let mut state = sidecar.directory.lease();
    let refused = until(&mut state, |state| *state != LeaseState::Pending).await;
    assert_eq!(refused, LeaseState::Refused { reason: "label app was not granted".into() });
    sidecar.control_plane.script.lock().unwrap().lease_refusal.clear();
    let accepted = until(&mut state, |state| matches!(state, LeaseState::Accepted { .. })).await;
    assert_eq!(accepted, LeaseState::Accepted { services: ["cart.shop".to_owned()].into() });
    let so_far = sidecar.record().leases.lock().unwrap().len();
    sidecar.control_plane.cut();
    sidecar.record().until(|record| record.leases.lock().unwrap().len() > so_far).await;
    sidecar.withdraw.take().unwrap().send(()).unwrap();
    let withdrawn =
        |record: &Record| matches!(record.leases.lock().unwrap().last(), Some(lease_request::Kind::Withdraw(_)));
    sidecar.record().until(withdrawn).await;
    // Discovery goes on. A connection that broke before the withdrawal was confirmed says it again.
    sidecar.control_plane.cut();
    sidecar.push_own(2, MtlsMode::Permissive);
    assert_eq!(sidecar.answer(&Key::Own, 2).await, "");
    sidecar.record().until(withdrawn).await;
}

#[tokio::test]
async fn without_a_certificate_it_waits_for_one() {
    let mut sidecar = Fixture::new().await;
    sidecar.push_own(1, MtlsMode::Strict);
    sidecar.tls = Tls::new(Clock::system());
    sidecar.start();
    tokio::task::yield_now().await;
    sidecar.tls.install(sidecar.credential.clone()).unwrap();
    let mut own = sidecar.directory.own();
    until(&mut own, Option::is_some).await;
}

#[tokio::test]
async fn the_copy_in_state_serves_a_restart() {
    let state = TempDir::new().unwrap();
    let mut sidecar = Fixture::new().await;
    sidecar.settings.state = Some(state.path().to_owned());
    sidecar.push_own(3, MtlsMode::Strict);
    sidecar.push(&key("pay"), 4, wire(&destination("pay", &["10.0.0.1:80"])));
    sidecar.push(&key("void"), 5, Resource::Unregistered(wire::Unregistered {}));
    sidecar.start();
    let mut pay = sidecar.directory.destination(&key("pay"));
    let mut void = sidecar.directory.destination(&key("void"));
    until(&mut pay, |known| *known != Known::Pending).await;
    until(&mut void, |known| *known != Known::Pending).await;
    let file = copy::path(state.path());
    let expected = copy::encode(&sidecar.directory).len();
    timeout(LIMIT, async {
        while std::fs::metadata(&file).is_ok_and(|file| file.len() == expected as u64).eq(&false) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    sidecar.control_plane.stop();
    sidecar.restart();
    let mut own = sidecar.directory.own();
    let own = until(&mut own, Option::is_some).await.unwrap();
    assert_eq!(*own, super::tests::own(MtlsMode::Strict));
    assert_eq!(endpoints(&sidecar.directory.destination(&key("pay")).borrow()), 1);
    assert_eq!(*sidecar.directory.destination(&key("void")).borrow(), Known::Unregistered);
    assert!(!*sidecar.directory.connected().borrow());
    assert!(sidecar.directory.snapshot_age().unwrap() < Duration::from_secs(60));
    // What is newer wins; what is older than the copy does not.
    sidecar.control_plane.restart().await;
    sidecar.push(&key("pay"), 9, wire(&destination("pay", &["10.0.0.1:80", "10.0.0.2:80"])));
    let mut pay = sidecar.directory.destination(&key("pay"));
    until(&mut pay, |known| endpoints(known) == 2).await;
}

#[test]
fn a_broken_copy_is_told_and_not_used() {
    let settings = DiscoverySettings {
        control_plane: String::new(),
        trust_domain: TrustDomain::new("outrigger.local").unwrap(),
        name: "cart-1".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
        state: None,
        mark: None,
        version: String::new(),
        process: String::new(),
    };
    let full = Directory::new(Clock::system());
    full.set_own(1, own(MtlsMode::Strict));
    full.restore(key("pay"), 2, Known::Registered(destination("pay", &["10.0.0.1:80"]).into()));
    let bytes = copy::encode(&full);
    let restore = |bytes: &[u8], settings: &DiscoverySettings| {
        let directory = Directory::new(Clock::system());
        (copy::restore(&directory, bytes, settings), directory.own().borrow().is_some())
    };
    assert_eq!(restore(&bytes, &settings), (Ok(2), true));
    for end in 0..bytes.len() - 1 {
        let _ = restore(&bytes[..end], &settings);
    }
    assert!(restore(b"", &settings).0.is_err());
    assert!(restore(b"outrigger snapshot 2\n", &settings).0.is_err());
    let other = DiscoverySettings { name: "cart-2".to_owned(), ..settings };
    assert!(!restore(&bytes, &other).1, "the copy of another workload");
}

#[tokio::test(start_paused = true)]
async fn what_nobody_holds_is_forgotten_after_ten_minutes() {
    let directory = Directory::new(Clock::system());
    let mut changes = directory.take_changes().unwrap();
    let held = directory.destination(&key("held"));
    drop(directory.destination(&key("dropped")));
    drop(directory.destination(&key("used-again")));
    for _ in 0..3 {
        assert!(matches!(changes.recv().await, Some(Change::Subscribe(_))));
    }
    tokio::time::advance(Duration::from_secs(599)).await;
    drop(directory.destination(&key("used-again")));
    directory.forget_unused();
    assert_eq!(directory.keys().len(), 3);
    tokio::time::advance(Duration::from_secs(2)).await;
    directory.forget_unused();
    assert_eq!(changes.recv().await, Some(Change::Unsubscribe(key("dropped"))));
    assert_eq!(directory.keys().len(), 2);
    assert_eq!(directory.set_destination(&key("dropped"), 1, Known::Unregistered), Applied::Forgotten);
    tokio::time::advance(Duration::from_secs(3600)).await;
    directory.forget_unused();
    assert_eq!(directory.keys(), [key("held")]);
    drop(held);
    tokio::time::advance(Duration::from_secs(601)).await;
    directory.forget_unused();
    assert!(directory.keys().is_empty());
}

#[tokio::test(start_paused = true)]
async fn there_is_an_end_to_what_is_known() {
    let directory = Directory::new(Clock::system());
    let numbered = |number: usize| key(&format!("s{number}"));
    let held: Vec<_> = (0..10).map(|number| directory.destination(&numbered(number))).collect();
    tokio::time::advance(Duration::from_secs(1)).await;
    // A client that names a new service each time finds room, and pushes out only what nobody holds.
    for number in 10..3 * MAX_DESTINATIONS {
        let receiver = directory.destination(&numbered(number));
        assert_eq!(*receiver.borrow(), Known::Pending, "{number}");
    }
    assert!(directory.keys().len() <= MAX_DESTINATIONS);
    for (number, receiver) in held.iter().enumerate() {
        assert!(receiver.same_channel(&directory.destination(&numbered(number))), "{number}");
    }
    // When all are held, the next one is not known.
    let all: Vec<_> = (0..MAX_DESTINATIONS + 5).map(|number| directory.destination(&numbered(number))).collect();
    let refused = all.iter().filter(|receiver| *receiver.borrow() == Known::Untold).count();
    assert_eq!((refused, directory.keys().len()), (5, MAX_DESTINATIONS));
    drop(all);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(*directory.destination(&numbered(MAX_DESTINATIONS + 1)).borrow(), Known::Pending);
}

#[test]
fn versions_only_grow() {
    let directory = Directory::new(Clock::system());
    let pay = directory.destination(&key("pay"));
    let known = |endpoints: &[&str]| Known::Registered(destination("pay", endpoints).into());
    assert_eq!(directory.set_destination(&key("pay"), 5, known(&[])), Applied::New);
    assert_eq!(directory.set_destination(&key("pay"), 5, Known::Unregistered), Applied::Same);
    assert_eq!(directory.set_destination(&key("pay"), 4, Known::Unregistered), Applied::Older(5));
    assert_eq!(*pay.borrow(), known(&[]));
    directory.forget_versions();
    assert_eq!(directory.set_destination(&key("pay"), 1, Known::Unregistered), Applied::New);
    assert_eq!(*pay.borrow(), Known::Unregistered);
    assert_eq!(*directory.destination(&Key::Own).borrow(), Known::Untold);
    assert!(directory.snapshot_age().is_none());
    directory.set_confirmed(SystemTime::now());
    assert!(directory.snapshot_age().is_some());
}
