use std::time::UNIX_EPOCH;

use outrigger_api::identity::TrustDomain;
use outrigger_api::name;
use outrigger_api::resource::{Metadata, Resource, Service, ServicePort, TargetPort};

use super::*;
use crate::registry::{LOST, LeasedPort};

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
    let subscriber = Arc::new(Subscriber::new(number, id, "test".into(), UNIX_EPOCH, UNIX_EPOCH));
    publisher.connect(&subscriber);
    subscriber
}

fn topic(text: &str) -> Topic {
    Topic::Destination(Key::Service(name::ServicePort::parse(text, "shop").unwrap()))
}

fn registration(app: &str, last: u8) -> Registration {
    Registration {
        workload: app.into(),
        labels: Labels::from([("app".to_owned(), app.to_owned())]),
        ip: [10, 0, 0, last].into(),
        ports: vec![LeasedPort { application: 8080, mesh: 18080, protocol: None }],
        transparent: false,
    }
}

/// What a sidecar would be sent now: keys and versions.
fn sent(publisher: &Publisher, subscriber: &Subscriber) -> Vec<(Topic, u64)> {
    let mut sent = Vec::new();
    while let Some(topic) = subscriber.take() {
        let version = publisher.message(&topic).unwrap().version;
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
        publisher.subscribe(&one, topic, &Labels::new());
    }
    publisher.subscribe(&other, &pay, &Labels::new());
    publisher.subscribe(&other, &cart, &Labels::new());
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
        [(unknown, 105)].map(|(topic, _)| (topic.clone(), publisher.message(&topic).unwrap().version))
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
    publisher.subscribe(&slow, &cart, &Labels::new());
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
        publisher.subscribe(subscriber, &Topic::Own(subscriber.id.clone()), &Labels::new());
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
    publisher.subscribe(&sidecar, &cart, &Labels::new());
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
    publisher.subscribe(&client, &cart, &Labels::new());
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
    let message = publisher.message(&cart).unwrap();
    let Some(watch_response::Resource::Destination(destination)) = &message.resource else { panic!("{message:?}") };
    assert!(destination.endpoints.is_empty());
    running.abort();
}
