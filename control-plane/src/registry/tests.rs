use super::*;

fn id(name: &str) -> InstanceId {
    InstanceId { namespace: "shop".into(), service_account: "cart".into(), name: name.into() }
}

fn at(ip: [u8; 4], port: u16) -> Registration {
    let ports = vec![LeasedPort { application: 8080, mesh: port, protocol: None }];
    Registration { workload: "cart".into(), labels: Default::default(), ip: ip.into(), ports, transparent: false }
}

/// The instance `cart-<n>` at 10.0.0.<n>, held by stream n.
fn hold(registry: &mut Registry, number: u8) {
    let changed = registry.register(&id(&format!("cart-{number}")), number.into(), &at([10, 0, 0, number], 80));
    assert_eq!(changed.unwrap().len(), 1);
}

/// Everything is one service.
fn one_service(_: &Instance) -> Vec<ServiceName> {
    vec![ServiceName::new("cart", "shop").unwrap()]
}

fn no_service(_: &Instance) -> Vec<ServiceName> {
    Vec::new()
}

fn names(registry: &Registry) -> Vec<&str> {
    registry.of_namespace("shop").map(|instance| instance.id.name.as_str()).collect()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_withdrawn_instance_goes_at_once() {
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    assert!(!registry.withdraw(&id("cart-1"), 9), "not that stream's");
    assert!(registry.withdraw(&id("cart-1"), 1));
    assert!(names(&registry).is_empty());
    assert_eq!(registry.at([10, 0, 0, 1].into()).count(), 0);
}

#[test]
fn a_lost_one_goes_after_fifteen_seconds_and_a_new_stream_saves_it() {
    let start = Instant::now();
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    registry.lost(&id("cart-1"), 1, start);
    assert_eq!(registry.next_sweep(), Some(start + LOST));
    assert!(registry.sweep(start + LOST - SECOND, &one_service).is_empty());
    assert_eq!(registry.register(&id("cart-1"), 2, &at([10, 0, 0, 1], 80)), Ok(vec![]), "nothing changed for others");
    registry.lost(&id("cart-1"), 1, start);
    assert_eq!(registry.next_sweep(), None, "the end of the old stream means nothing");
    registry.lost(&id("cart-1"), 2, start);
    assert_eq!(registry.sweep(start + LOST, &one_service), [id("cart-1")]);
    assert!(names(&registry).is_empty());
}

#[test]
fn losing_more_than_half_at_once_keeps_them_as_stale() {
    let start = Instant::now();
    for (lost, kept) in [(1_u8, false), (2, false), (3, true), (4, true)] {
        let mut registry = Registry::default();
        (1..=4).for_each(|number| hold(&mut registry, number));
        for number in 1..=lost {
            registry.lost(&id(&format!("cart-{number}")), number.into(), start);
        }
        registry.sweep(start + LOST, &one_service);
        let expected = if kept { 4 } else { 4 - usize::from(lost) };
        assert_eq!(registry.all().count(), expected, "{lost} of 4 lost");
        assert_eq!(registry.stale().count(), if kept { usize::from(lost) } else { 0 });
        if kept {
            assert_eq!(registry.next_sweep(), Some(start + LOST + STALE));
            // One comes back, the others go when their time is over.
            registry.register(&id("cart-1"), 99, &at([10, 0, 0, 1], 80)).unwrap();
            assert!(!registry.get(&id("cart-1")).unwrap().stale);
            registry.sweep(start + LOST + STALE, &one_service);
            assert_eq!(registry.all().count(), 4 - usize::from(lost) + 1);
        }
    }
}

#[test]
fn a_single_endpoint_and_what_serves_nothing_are_never_stale() {
    let start = Instant::now();
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    registry.lost(&id("cart-1"), 1, start);
    registry.sweep(start + LOST, &one_service);
    assert!(names(&registry).is_empty());
    (1..=3_u8).for_each(|number| hold(&mut registry, number));
    (1..=3_u8).for_each(|number| registry.lost(&id(&format!("cart-{number}")), number.into(), start));
    registry.sweep(start + LOST, &no_service);
    assert!(names(&registry).is_empty());
}

#[test]
fn withdrawals_make_nobody_stale() {
    let start = Instant::now();
    let mut registry = Registry::default();
    (1..=4).for_each(|number| hold(&mut registry, number));
    (1..=3_u8).for_each(|number| assert!(registry.withdraw(&id(&format!("cart-{number}")), number.into())));
    assert!(registry.sweep(start + LOST, &one_service).is_empty());
    assert_eq!(names(&registry), ["cart-4"]);
}

#[test]
fn restored_leases_have_thirty_seconds() {
    let start = Instant::now();
    let mut before = Registry::default();
    (1..=4).for_each(|number| hold(&mut before, number));
    let text = serde_json::to_string(&before.save()).unwrap();
    let mut registry = Registry::default();
    registry.restore(serde_json::from_str(&text).unwrap(), start);
    assert_eq!(
        registry.all().map(|i| (**i).clone()).collect::<Vec<_>>(),
        before.all().map(|i| (**i).clone()).collect::<Vec<_>>()
    );
    for number in 1..=3_u8 {
        let registered = registry.register(&id(&format!("cart-{number}")), number.into(), &at([10, 0, 0, number], 80));
        assert_eq!(registered, Ok(vec![]));
    }
    assert!(registry.sweep(start + RESTORED - SECOND, &one_service).is_empty());
    registry.sweep(start + RESTORED, &one_service);
    assert_eq!(names(&registry), ["cart-1", "cart-2", "cart-3"]);
}

#[test]
fn an_address_belongs_to_one_identity_until_its_lease_is_over() {
    let start = Instant::now();
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    let thief = InstanceId { service_account: "pay".into(), ..id("pay-1") };
    let error = registry.register(&thief, 7, &at([10, 0, 0, 1], 80)).unwrap_err();
    assert!(error.to_string().contains("10.0.0.1:80 is registered by cart-1.shop"), "{error}");
    assert!(registry.register(&thief, 7, &at([10, 0, 0, 1], 81)).is_ok(), "another port");
    assert!(registry.register(&id("cart-2"), 8, &at([10, 0, 0, 1], 80)).is_ok(), "the same identity");
    registry.withdraw(&id("cart-2"), 8);
    registry.lost(&id("cart-1"), 1, start);
    let early = registry.register(&thief, 7, &at([10, 0, 0, 1], 80));
    assert!(early.is_err(), "who was lost may come back: {early:?}");
    let successor = registry.register(&id("cart-3"), 9, &at([10, 0, 0, 1], 80)).unwrap();
    assert_eq!(successor, [id("cart-1"), id("cart-3")], "to a successor it gives way");
    registry.lost(&id("cart-3"), 9, start);
    registry.sweep(start + LOST, &one_service);
    assert!(registry.register(&thief, 7, &at([10, 0, 0, 1], 80)).is_ok(), "nobody's any more");
    assert_eq!(names(&registry), ["pay-1"]);
}

#[test]
fn static_workloads_stand_beside_leases_and_behind_their_own() {
    use outrigger_api::resource::{Metadata, Resource, Workload};
    let mut resources = Resources::default();
    for (name, last) in [("cart-1", 1), ("db", 9)] {
        let metadata = Metadata { name: name.into(), namespace: "shop".into(), ..Metadata::default() };
        let spec = Workload {
            address: [10, 0, 0, last].into(),
            ports: [("http".to_owned(), 80)].into(),
            labels: Default::default(),
            service_account: "cart".into(),
            weight: 3,
            locality: None,
            mesh: false,
        };
        resources.workloads.insert(("shop".into(), name.into()), Resource { metadata, spec });
    }
    let mut registry = Registry::default();
    assert!(registry.set_workloads(&resources));
    assert!(!registry.set_workloads(&resources));
    assert_eq!(names(&registry), ["cart-1", "db"]);
    assert!(!registry.get(&id("cart-1")).unwrap().mesh);
    hold(&mut registry, 1);
    assert_eq!(names(&registry), ["cart-1", "db"]);
    assert!(registry.get(&id("cart-1")).unwrap().mesh, "the lease is the better knowledge");
    assert_eq!(registry.at([10, 0, 0, 1].into()).count(), 1);
    assert_eq!(registry.all().count(), 2);
    let other = InstanceId { service_account: "pay".into(), ..id("pay-1") };
    assert!(registry.register(&other, 5, &at([10, 0, 0, 9], 80)).is_err(), "a Workload's address");
    registry.withdraw(&id("cart-1"), 1);
    assert!(!registry.get(&id("cart-1")).unwrap().mesh);
    assert_eq!(registry.of_namespace("other").count(), 0);
}

#[test]
fn one_address_has_one_transparent_sidecar_and_beside_it_whoever_its_rules_leave_out() {
    let mut registry = Registry::default();
    let other = InstanceId { service_account: "pay".into(), ..id("pay-1") };
    let transparent = |ports| Registration { ports, transparent: true, ..at([10, 0, 0, 1], 80) };
    let ip = IpAddr::from([10, 0, 0, 1]);
    registry.register(&id("cart-1"), 1, &transparent(Vec::new())).unwrap();
    let refused = registry.register(&other, 2, &transparent(Vec::new()));
    assert_eq!(refused, Err(RegisterError::AddressIntercepted { ip, holder: id("cart-1") }));
    registry.register(&other, 2, &at([10, 0, 0, 1], 18080)).unwrap();
    // Its successor of the same identity takes the place of the lost one.
    registry.lost(&id("cart-1"), 1, Instant::now());
    registry.register(&id("cart-2"), 3, &transparent(Vec::new())).unwrap();
    assert!(registry.get(&id("cart-1")).is_none());

    let mut restored = Registry::default();
    restored.restore(registry.save(), Instant::now());
    assert_eq!(restored.get(&id("cart-2")).unwrap().ports, Ports::Intercepted(Vec::new()));
    assert!(matches!(restored.get(&other).unwrap().ports, Ports::Leased(_)));
}
