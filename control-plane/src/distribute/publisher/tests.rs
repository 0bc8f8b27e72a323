//! Who is told what, when, and how often.

use std::time::UNIX_EPOCH;

use outrigger_api::identity::TrustDomain;
use outrigger_api::name;
use outrigger_api::resource::{Metadata, Resource, Service, ServicePort, TargetPort};
use outrigger_api::snapshot::Key;
use outrigger_api::wire::watch_response;

use super::accounts::{MAX_ACCOUNT_STREAMS, MAX_ACCOUNT_SUBSCRIPTIONS};
use super::*;
use crate::registry::{Holder, LOST, LeasedPort};

fn resources(services: &[&str]) -> Arc<Resources> {
    let mut resources = Resources::default();
    for service in services {
        let metadata = Metadata { name: service.to_string(), namespace: "shop".into(), ..Metadata::default() };
        let spec = Service {
            selector: Labels::from([("app".to_owned(), service.to_string())]),
            ports: vec![ServicePort {
                name: None,
                port: 80,
                target_port: TargetPort::Number(8080),
                app_protocol: None,
            }],
            cluster_ips: Vec::new(),
            headless: false,
        };
        resources.services.insert(("shop".into(), service.to_string()), Resource { metadata, spec });
    }
    Arc::new(resources)
}

fn publisher(version: u64) -> Publisher {
    let catalog = Catalog::new(
        resources(&["cart", "pay"]),
        TrustDomain::new("outrigger.local").unwrap(),
        VirtualAddresses::default(),
    );
    let metrics = Arc::new(Metrics::new().unwrap());
    Publisher::new(catalog, Registry::default(), wire::TrustBundle::default(), version, metrics)
}

fn id(name: &str) -> InstanceId {
    InstanceId { namespace: "shop".into(), service_account: name.into(), name: name.into() }
}

fn subscriber(publisher: &Publisher, number: u64) -> Arc<Subscriber> {
    let id = id(&format!("client-{number}"));
    let subscriber = stream(number, id, "one");
    publisher.connect(&subscriber).unwrap();
    subscriber
}

fn stream(number: u64, id: InstanceId, process: &str) -> Arc<Subscriber> {
    let holder = Holder { lineage: id.name.clone(), process: process.into() };
    Arc::new(Subscriber::new(number, id, holder, Arc::default(), "test".into(), UNIX_EPOCH, UNIX_EPOCH))
}

fn topic(text: &str) -> Topic {
    Topic::Destination(Key::Service(name::ServicePort::parse(text, "shop").unwrap()))
}

fn registration(app: &str, last: u8) -> Registration {
    Registration {
        holder: Holder { lineage: app.into(), process: String::new() },
        workload: app.into(),
        labels: Labels::from([("app".to_owned(), app.to_owned())]),
        ip: [10, 0, 0, last].into(),
        other_ips: Vec::new(),
        ports: vec![LeasedPort { application: 8080, mesh: 18080, protocol: None }],
        transparent: false,
    }
}

/// What a sidecar would be sent now: keys and versions.
fn sent(publisher: &Publisher, subscriber: &Subscriber) -> Vec<(Topic, u64)> {
    let mut sent = Vec::new();
    while let Some(topic) = subscriber.take() {
        let version = publisher.message(&topic, "shop").unwrap().version;
        sent.push((topic, version));
    }
    sent
}

#[test]
fn each_is_told_what_it_asked_for_and_only_when_it_changes() {
    let publisher = publisher(100);
    let (one, other) = (subscriber(&publisher, 1), subscriber(&publisher, 2));
    let (cart, pay, unknown) = (topic("cart:80"), topic("pay:80"), topic("unknown:80"));
    for topic in [&cart, &unknown] {
        publisher.subscribe(&one, topic, &Labels::new()).unwrap();
    }
    publisher.subscribe(&other, &pay, &Labels::new()).unwrap();
    publisher.subscribe(&other, &cart, &Labels::new()).unwrap();
    assert_eq!(sent(&publisher, &one), [(cart.clone(), 101), (unknown.clone(), 102)]);
    assert_eq!(
        sent(&publisher, &other),
        [(pay.clone(), 103), (cart.clone(), 101)],
        "who shares a key shares its version"
    );

    publisher.register(&id("cart"), 7, &registration("cart", 1)).unwrap();
    publisher.publish();
    assert_eq!(sent(&publisher, &one), [(cart.clone(), 104)]);
    assert_eq!(sent(&publisher, &other), [(cart.clone(), 104)]);
    publisher.register(&id("cart"), 8, &registration("cart", 1)).unwrap();
    publisher.publish();
    assert!(sent(&publisher, &one).is_empty(), "a new stream with the same words changes nothing");

    publisher.configure(resources(&["cart", "unknown"]), VirtualAddresses::default());
    publisher.publish();
    assert_eq!(
        sent(&publisher, &one),
        [(unknown, 105)].map(|(topic, _)| (topic.clone(), publisher.message(&topic, "shop").unwrap().version))
    );
    assert_eq!(sent(&publisher, &other).len(), 1, "pay is unregistered now");

    publisher.unsubscribe(&one, &cart);
    publisher.withdraw(&id("cart"), 8);
    publisher.publish();
    assert!(sent(&publisher, &one).is_empty());
    publisher.disconnect(&one);
    publisher.disconnect(&other);
    assert_eq!((publisher.subscriptions(), publisher.connected()), (0, 0), "nothing is computed for nobody");
}

#[test]
fn a_slow_sidecar_gets_the_newest_only() {
    let publisher = publisher(0);
    let slow = subscriber(&publisher, 1);
    let cart = topic("cart:80");
    publisher.subscribe(&slow, &cart, &Labels::new()).unwrap();
    for last in 1..=100 {
        publisher.register(&id("cart"), 7, &registration("cart", last)).unwrap();
        publisher.publish();
    }
    assert_eq!(sent(&publisher, &slow), [(cart, 101)]);
}

#[test]
fn a_workload_is_told_of_itself_and_of_the_trust_bundle() {
    let publisher = publisher(0);
    let (one, other) = (subscriber(&publisher, 1), subscriber(&publisher, 2));
    for subscriber in [&one, &other] {
        publisher.subscribe(subscriber, &Topic::Own(subscriber.id.clone()), &Labels::new()).unwrap();
        sent(&publisher, subscriber);
    }
    publisher.register(&one.id, 7, &registration("cart", 1)).unwrap();
    publisher.publish();
    assert_eq!(sent(&publisher, &one).len(), 1);
    assert!(sent(&publisher, &other).is_empty(), "what concerns one is not computed for the other");
    publisher.set_bundle(wire::TrustBundle { generation: 2, ..wire::TrustBundle::default() });
    publisher.publish();
    assert_eq!((sent(&publisher, &one).len(), sent(&publisher, &other).len()), (1, 1));
}

#[test]
fn refusals_are_kept_until_they_are_over() {
    let publisher = publisher(0);
    let sidecar = subscriber(&publisher, 1);
    let cart = topic("cart:80");
    publisher.subscribe(&sidecar, &cart, &Labels::new()).unwrap();
    let status = || publisher.sidecars().remove(0);
    assert_eq!((status().subscriptions, status().unacknowledged), (1, 1));
    assert!(sidecar.answered(&cart, "cart.shop:80".into(), 1, "unknown protocol"));
    assert!(!sidecar.answered(&cart, "cart.shop:80".into(), 1, "unknown protocol"), "known already");
    assert_eq!(status().refusals["cart.shop:80"], Refusal { version: 1, reason: "unknown protocol".into() });
    assert!(!sidecar.answered(&topic("pay:80"), "pay.shop:80".into(), 1, "never asked for"));
    sidecar.answered(&cart, "cart.shop:80".into(), 2, "");
    assert_eq!((status().refusals.len(), status().unacknowledged), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_published_after_fifteen_seconds() {
    let publisher = Arc::new(publisher(0));
    let client = subscriber(&publisher, 1);
    let cart = topic("cart:80");
    publisher.register(&id("cart"), 7, &registration("cart", 1)).unwrap();
    publisher.subscribe(&client, &cart, &Labels::new()).unwrap();
    sent(&publisher, &client);
    let running = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.run().await }
    });
    let lost = tokio::time::Instant::now();
    publisher.lost(&id("cart"), 7);
    while sent(&publisher, &client).is_empty() {
        client.wake.notified().await;
    }
    let after = lost.elapsed();
    assert!(after >= LOST && after < LOST + COALESCE * 2, "{after:?}");
    let message = publisher.message(&cart, "shop").unwrap();
    let Some(watch_response::Resource::Destination(destination)) = &message.resource else { panic!("{message:?}") };
    assert!(destination.endpoints.is_empty());
    running.abort();
}

fn of_account(name: &str) -> InstanceId {
    InstanceId { name: name.into(), ..id("cart") }
}

fn connected(publisher: &Publisher, number: usize, name: &str) -> Arc<Subscriber> {
    let number = number as u64;
    let subscriber = stream(number, of_account(name), "one");
    publisher.connect(&subscriber).unwrap();
    subscriber
}

#[test]
fn what_one_service_account_holds_is_bounded() {
    let publisher = publisher(0);
    let key = |number: usize| {
        let address =
            std::net::SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 80 + (number >> 16) as u16));
        Topic::Destination(Key::Address(address))
    };
    let streams: Vec<_> =
        (0..MAX_ACCOUNT_STREAMS).map(|number| connected(&publisher, number, &format!("a-{number}"))).collect();
    let more = stream(9_999_999, of_account("more"), "one");
    assert_eq!(publisher.connect(&more), Err(ConnectError::Account(AccountLimit::Streams)));
    publisher.disconnect(&streams[0]);
    assert_eq!(publisher.connect(&more), Ok(()));
    for number in 0..MAX_ACCOUNT_SUBSCRIPTIONS {
        publisher.subscribe(&streams[1 + number % 8], &key(number), &Labels::new()).unwrap();
    }
    let beyond = key(MAX_ACCOUNT_SUBSCRIPTIONS);
    assert_eq!(publisher.subscribe(&more, &beyond, &Labels::new()), Err(AccountLimit::Subscriptions));
    // What it has already costs nothing, and what is given back is there again.
    publisher.subscribe(&streams[1], &key(0), &Labels::new()).unwrap();
    publisher.unsubscribe(&streams[1], &key(0));
    publisher.subscribe(&more, &beyond, &Labels::new()).unwrap();
    assert_eq!(publisher.subscribe(&more, &key(0), &Labels::new()), Err(AccountLimit::Subscriptions));
    for stream in &streams[1..] {
        publisher.disconnect(stream);
    }
    publisher.disconnect(&more);
    assert!(publisher.lock().accounts.is_empty());
}

#[test]
fn an_instance_has_one_stream_and_the_newer_of_its_sidecar_takes_the_place() {
    let publisher = publisher(0);
    let first = subscriber(&publisher, 1);
    let cart = topic("cart:80");
    publisher.subscribe(&first, &cart, &Labels::new()).unwrap();
    assert_eq!(first.subscribed(), 1);
    let another = stream(2, first.id.clone(), "other");
    let refused = publisher.connect(&another).unwrap_err();
    assert_eq!(refused, ConnectError::Instance(RegisterError::InstanceExists(first.id.clone())));
    publisher.disconnect(&another);
    assert_eq!(publisher.connected(), 1, "the first lives on");

    let next = stream(3, first.id.clone(), "one");
    publisher.connect(&next).unwrap();
    assert_eq!((publisher.connected(), publisher.subscriptions(), first.subscribed()), (1, 0, 0));
    // What the old one still says changes nothing.
    publisher.subscribe(&first, &cart, &Labels::new()).unwrap();
    publisher.disconnect(&first);
    assert_eq!((publisher.connected(), publisher.subscriptions()), (1, 0));
    publisher.disconnect(&next);
    publisher.connect(&another).unwrap();
}

#[test]
fn no_workload_has_the_address_of_a_service() {
    let mut resources = Resources::clone(&resources(&["cart"]));
    let service = resources.services.get_mut(&("shop".to_owned(), "cart".to_owned())).unwrap();
    service.spec.cluster_ips = vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()];
    let publisher = publisher(0);
    publisher.configure(Arc::new(resources), VirtualAddresses::default());
    for (ip, refused) in [
        ("10.96.0.1", true),
        ("fd96::1", true),
        ("240.240.3.4", true),
        ("fd3a:94e7:c15b::9", true),
        ("10.96.0.2", false),
    ] {
        let ip = ip.parse().unwrap();
        let first = Registration { ip, ..registration("cart", 1) };
        let second = Registration { other_ips: vec![ip], ..registration("cart", 1) };
        for registration in [first, second] {
            let registered = publisher.register(&id("cart"), 1, &registration);
            assert_eq!(registered == Err(RegisterError::AddressOfService { ip }), refused, "{ip}: {registered:?}");
        }
    }
}

fn with_routes(routes: &str) -> Arc<Resources> {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{selector: {{app: cart}}, ports: \
         [{{port: 80, targetPort: 8080}}]}}\n{routes}"
    );
    let parsed = outrigger_api::compile::load(&[outrigger_api::resource::SourceFile { name: "a".into(), text }]);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    Arc::new(parsed.resources)
}

fn route(namespace: &str, weight: u32) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: cart, namespace: {namespace}}}\nspec: \
         {{parentRefs: [{{group: '', kind: Service, name: cart, namespace: shop}}], rules: [{{backendRefs: [{{name: cart, \
         namespace: shop, port: 80, weight: {weight}}}]}}]}}\n"
    )
}

/// Routes of a namespace concern its own callers, and nobody else is woken for them.
#[test]
fn consumers_are_told_of_their_own_routes() {
    let publisher = publisher(100);
    publisher.configure(with_routes(""), VirtualAddresses::default());
    let of = |number: u64, namespace: &str| {
        let id = InstanceId { namespace: namespace.into(), ..id(&format!("client-{number}")) };
        let subscriber = stream(number, id, "one");
        publisher.connect(&subscriber).unwrap();
        subscriber
    };
    let (near, far) = (of(1, "shop"), of(2, "far"));
    let cart = topic("cart:80");
    for subscriber in [&near, &far] {
        publisher.subscribe(subscriber, &cart, &Labels::new()).unwrap();
    }
    let took = |subscriber: &Subscriber| {
        let mut told = None;
        while let Some(topic) = subscriber.take() {
            told = publisher.message(&topic, &subscriber.id.namespace);
        }
        let told = told?;
        let Some(watch_response::Resource::Destination(destination)) = &told.resource else { panic!("{told:?}") };
        let weight = serde_json::from_slice::<serde_json::Value>(&destination.routes).ok();
        let weight = weight.map(|routes| routes["rules"][0]["backends"][0]["weight"].clone());
        Some((told.version, weight.and_then(|weight| weight.as_u64())))
    };
    assert_eq!(took(&near).map(|(_, weight)| weight), Some(None));
    let mut last = took(&far).unwrap().0;
    // Both follow the producer's, then one its own; and when that goes, the producer's again, as something newer.
    for (routes, expected) in [
        (route("shop", 1), [Some(Some(1)), Some(Some(1))]),
        (route("shop", 1) + &route("far", 2), [None, Some(Some(2))]),
        (route("shop", 3) + &route("far", 2), [Some(Some(3)), None]),
        (route("shop", 3) + &route("elsewhere", 9) + &route("far", 2), [None, None]),
        (route("shop", 3), [None, Some(Some(3))]),
        (route("far", 4), [Some(None), Some(Some(4))]),
    ] {
        publisher.configure(with_routes(&routes), VirtualAddresses::default());
        publisher.publish();
        let (one, other) = (took(&near), took(&far));
        assert_eq!([one.map(|(_, weight)| weight), other.map(|(_, weight)| weight)], expected, "{routes}");
        if let Some((version, _)) = other {
            assert!(version > last, "{version} after {last}");
            last = version;
        }
    }
    // A newcomer of that namespace is told the same, at once.
    let late = of(3, "far");
    publisher.subscribe(&late, &cart, &Labels::new()).unwrap();
    assert_eq!(took(&late).map(|(_, weight)| weight), Some(Some(4)));
}
