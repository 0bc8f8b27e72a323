use super::*;

fn id(name: &str) -> InstanceId {
    InstanceId { namespace: "shop".into(), service_account: "cart".into(), name: name.into() }
}

fn at(ip: [u8; 4], port: u16) -> Registration {
    let ports = vec![LeasedPort { application: 8080, mesh: port, protocol: None }];
    Registration {
        holder: Holder::default(),
        workload: "cart".into(),
        labels: Default::default(),
        ip: ip.into(),
        other_ips: Vec::new(),
        ports,
        transparent: false,
    }
}

impl Registry {
    /// As the sidecar of the redemption that has the instance's name.
    fn take(
        &mut self,
        id: &InstanceId,
        stream: u64,
        registration: &Registration,
        now: Instant,
    ) -> Result<Vec<InstanceId>, RegisterError> {
        let holder = Holder { lineage: id.name.clone(), process: String::new() };
        self.register(id, stream, &Registration { holder, ..registration.clone() }, now)
    }
}

/// The instance `cart-<n>` at 10.0.0.<n>, held by stream n.
fn hold(registry: &mut Registry, number: u8) {
    let changed =
        registry.take(&id(&format!("cart-{number}")), number.into(), &at([10, 0, 0, number], 80), Instant::now());
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
    assert!(!registry.withdraw(&id("cart-1"), 9, Instant::now()), "not that stream's");
    assert!(registry.withdraw(&id("cart-1"), 1, Instant::now()));
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
    assert_eq!(
        registry.take(&id("cart-1"), 2, &at([10, 0, 0, 1], 80), Instant::now()),
        Ok(vec![]),
        "nothing changed for others"
    );
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
            registry.take(&id("cart-1"), 99, &at([10, 0, 0, 1], 80), Instant::now()).unwrap();
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
    let now = Instant::now();
    (1..=3_u8).for_each(|number| assert!(registry.withdraw(&id(&format!("cart-{number}")), number.into(), now)));
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
        let registered =
            registry.take(&id(&format!("cart-{number}")), number.into(), &at([10, 0, 0, number], 80), Instant::now());
        assert_eq!(registered, Ok(vec![]));
    }
    assert!(registry.sweep(start + RESTORED - SECOND, &one_service).is_empty());
    registry.sweep(start + RESTORED, &one_service);
    assert_eq!(names(&registry), ["cart-1", "cart-2", "cart-3"]);
}

fn other(name: &str) -> InstanceId {
    InstanceId { service_account: "pay".into(), ..id(name) }
}

/// Explicit, at 10.0.0.1: application port and mesh port.
fn explicit(ports: &[(u16, u16)]) -> Registration {
    let port = |(application, mesh): &(u16, u16)| LeasedPort { application: *application, mesh: *mesh, protocol: None };
    Registration { ports: ports.iter().map(port).collect(), ..at([10, 0, 0, 1], 80) }
}

fn transparent() -> Registration {
    Registration { transparent: true, ..explicit(&[]) }
}

#[test]
fn port_by_port_an_address_belongs_to_the_first_who_claims_it() {
    let cases = [
        ("the same mesh port", explicit(&[(8080, 18080)]), explicit(&[(9, 18080)]), Some(Overlap::Port(18080))),
        ("the same application port", explicit(&[(8080, 18080)]), explicit(&[(8080, 9)]), Some(Overlap::Port(8080))),
        (
            "its application's for a mesh port",
            explicit(&[(8080, 18080)]),
            explicit(&[(9, 8080)]),
            Some(Overlap::Port(8080)),
        ),
        (
            "its mesh port for an application",
            explicit(&[(8080, 18080)]),
            explicit(&[(18080, 9)]),
            Some(Overlap::Port(18080)),
        ),
        ("one of several", explicit(&[(1, 2), (3, 4)]), explicit(&[(5, 6), (7, 4)]), Some(Overlap::Port(4))),
        ("others", explicit(&[(1, 2), (3, 4)]), explicit(&[(5, 6), (7, 8)]), None),
        ("all of them", explicit(&[(8080, 18080)]), transparent(), Some(Overlap::Port(8080))),
        ("one of all", transparent(), explicit(&[(5, 6)]), Some(Overlap::Port(5))),
        ("all twice", transparent(), transparent(), Some(Overlap::Everything)),
        ("another address", transparent(), Registration { ip: [10, 0, 0, 2].into(), ..transparent() }, None),
    ];
    let start = Instant::now();
    for (name, first, second, expected) in cases {
        let mut registry = Registry::default();
        registry.take(&id("cart-1"), 1, &first, start).unwrap();
        let taken = registry.take(&other("pay-1"), 2, &second, start);
        let what = match &taken {
            Ok(_) => None,
            Err(RegisterError::AddressInUse { what, .. }) => Some(*what),
            Err(error) => panic!("{name}: {error}"),
        };
        assert_eq!(what, expected, "{name}");
        if let Err(error) = taken {
            assert!(!error.to_string().contains("cart"), "{name}: it tells who has it: {error}");
            assert_eq!(error.holder(), Some(&id("cart-1")), "{name}");
        }
        assert!(
            registry.take(&id("cart-2"), 3, &second, start).is_ok() || expected.is_none(),
            "{name}: the same identity"
        );
    }
}

#[test]
fn an_address_is_kept_while_its_holder_drains_or_is_lost_and_for_a_minute_after() {
    let start = Instant::now();
    let claim = explicit(&[(8080, 18080)]);
    let held = || {
        let mut registry = Registry::default();
        registry.take(&id("cart-1"), 1, &claim, start).unwrap();
        registry
    };
    let refused = |registry: &mut Registry, now: Instant| registry.take(&other("pay-1"), 7, &claim, now).err();
    let kept = |registry: &mut Registry, now| matches!(refused(registry, now), Some(RegisterError::AddressKept { .. }));

    // Withdrawn: for the drain, and a minute.
    let mut registry = held();
    assert!(registry.withdraw(&id("cart-1"), 1, start));
    assert!(names(&registry).is_empty());
    assert!(kept(&mut registry, start + DRAIN + KEPT - SECOND));
    assert_eq!(refused(&mut registry, start + DRAIN + KEPT), None);

    // Its sidecar is gone: a minute from then.
    let mut registry = held();
    registry.withdraw(&id("cart-1"), 1, start);
    registry.drained(&id("cart-1"), start + 5 * SECOND);
    assert!(kept(&mut registry, start + 4 * SECOND + KEPT));
    assert_eq!(refused(&mut registry, start + 5 * SECOND + KEPT), None);

    // Lost, and its time is over.
    let mut registry = held();
    registry.lost(&id("cart-1"), 1, start);
    assert!(matches!(refused(&mut registry, start), Some(RegisterError::AddressInUse { .. })), "it may come back");
    registry.sweep(start + LOST, &one_service);
    assert!(names(&registry).is_empty());
    assert!(kept(&mut registry, start + LOST + KEPT - SECOND));
    // A restart of the control plane does not free it.
    let mut restarted = Registry::default();
    let text = serde_json::to_string(&registry.save()).unwrap();
    restarted.restore(serde_json::from_str(&text).unwrap(), start);
    assert!(names(&restarted).is_empty());
    assert!(kept(&mut restarted, start + KEPT));
    assert_eq!(refused(&mut registry, start + LOST + KEPT), None);

    // Its own identity need not wait, and another port is free.
    let mut registry = held();
    registry.withdraw(&id("cart-1"), 1, start);
    assert!(registry.take(&other("pay-1"), 7, &explicit(&[(8081, 18081)]), start).is_ok());
    assert!(registry.take(&id("cart-2"), 8, &claim, start).is_ok());
}

#[test]
fn to_a_successor_of_its_identity_a_lost_instance_gives_way() {
    let start = Instant::now();
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    registry.take(&id("cart-2"), 8, &at([10, 0, 0, 1], 80), start).unwrap();
    registry.withdraw(&id("cart-2"), 8, start);
    registry.lost(&id("cart-1"), 1, start);
    let successor = registry.take(&id("cart-3"), 9, &at([10, 0, 0, 1], 80), start).unwrap();
    assert_eq!(successor, [id("cart-1"), id("cart-3")]);
    registry.take(&id("cart-4"), 1, &transparent(), start).unwrap();
    registry.lost(&id("cart-4"), 1, start);
    registry.take(&id("cart-5"), 2, &transparent(), start).unwrap();
    assert!(registry.get(&id("cart-4")).is_none());
    let mut restored = Registry::default();
    restored.restore(registry.save(), start);
    assert_eq!(restored.get(&id("cart-5")).unwrap().ports, Ports::Intercepted(Vec::new()));
    assert!(matches!(restored.get(&id("cart-3")).unwrap().ports, Ports::Leased(_)));
}

#[test]
fn an_instance_has_one_sidecar_at_a_time() {
    let start = Instant::now();
    let claim = |lineage: &str, process: &str| {
        let holder = Holder { lineage: lineage.into(), process: process.into() };
        Registration { holder, ..explicit(&[(8080, 18080)]) }
    };
    let own = id("cart-1");
    // Who comes while the first stream lives, and whether it is the same sidecar.
    let cases = [
        ("its next connection", claim("a", "p"), true),
        ("with a token of its own", claim("b", "p"), true),
        ("a copy of its state", claim("a", "q"), false),
        ("another", claim("b", "q"), false),
        ("one that says nothing", claim("a", ""), true),
        ("another that says nothing", claim("b", ""), false),
    ];
    for (name, second, same) in cases {
        let mut registry = Registry::default();
        registry.register(&own, 1, &claim("a", "p"), start).unwrap();
        let taken = registry.register(&own, 2, &second, start);
        match same {
            true => assert_eq!(taken, Ok(vec![]), "{name}"),
            false => {
                assert_eq!(taken, Err(RegisterError::InstanceExists(own.clone())), "{name}");
                assert!(taken.unwrap_err().to_string().starts_with("instance_exists: "));
                // Neither its withdrawal nor its end is the first one's.
                assert!(!registry.withdraw(&own, 2, start), "{name}");
                registry.lost(&own, 2, start);
                assert_eq!(registry.next_sweep(), None, "{name}");
                // Once the first is lost the other takes its place at once.
                registry.lost(&own, 1, start);
                assert_eq!(registry.register(&own, 3, &second, start), Ok(vec![]), "{name}");
            }
        }
    }
}

#[test]
fn one_redemption_stands_for_few_instances() {
    let start = Instant::now();
    let mut registry = Registry::default();
    let mut taken = 0;
    for number in 0..1900_u16 {
        let holder = Holder { lineage: "one".into(), process: "p".into() };
        let registration = Registration { holder, ..explicit(&[(number + 1, number + 1)]) };
        let instance = id(&format!("cart-{number}"));
        match registry.register(&instance, number.into(), &registration, start) {
            Ok(_) => taken += 1,
            Err(error) => assert_eq!(error, RegisterError::TooManyInstances),
        }
        // Nor by leaving each of them at once: those that are lost count.
        registry.lost(&instance, number.into(), start);
    }
    assert_eq!(taken, MAX_INSTANCES);
    // Nor does it keep address after address.
    for number in 0..100_u16 {
        let holder = Holder { lineage: "two".into(), process: "p".into() };
        let registration = Registration { holder, ..explicit(&[(20_000 + number, 20_000 + number)]) };
        registry.register(&id(&format!("pay-{number}")), 1, &registration, start).unwrap();
        registry.withdraw(&id(&format!("pay-{number}")), 1, start);
    }
    assert_eq!(registry.kept.len(), MAX_KEPT);
    hold(&mut registry, 9);
}

fn static_workload(name: &str, address: IpAddr) -> Resources {
    use outrigger_api::resource::{Metadata, Resource, Workload};
    let mut resources = Resources::default();
    let metadata = Metadata { name: name.into(), namespace: "shop".into(), ..Metadata::default() };
    let spec = Workload {
        address,
        ports: [("http".to_owned(), 80)].into(),
        labels: Default::default(),
        service_account: "cart".into(),
        weight: 3,
        locality: None,
        mesh: false,
    };
    resources.workloads.insert(("shop".into(), name.into()), Resource { metadata, spec });
    resources
}

#[test]
fn what_a_workload_document_says_is_no_leases() {
    let start = Instant::now();
    let (address, loopback) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([127, 0, 0, 1]));
    let cases = [
        ("its name", address, id("db"), Registration { ip: [10, 0, 0, 2].into(), ..transparent() }, false),
        (
            "its name with another account",
            address,
            other("db"),
            Registration { ip: [10, 0, 0, 2].into(), ..transparent() },
            true,
        ),
        ("its port", address, other("pay-1"), explicit(&[(80, 9)]), false),
        ("its address", address, other("pay-1"), explicit(&[(8080, 9)]), false),
        ("its address, by its own identity", address, id("cart-1"), explicit(&[(8080, 9)]), false),
        ("all of its address", address, other("pay-1"), transparent(), false),
        (
            "as a further address",
            address,
            other("pay-1"),
            Registration { ip: [10, 0, 0, 2].into(), other_ips: vec![address], ..transparent() },
            false,
        ),
        (
            "a port beside it on loopback",
            loopback,
            other("pay-1"),
            Registration { ip: loopback, ..explicit(&[(8080, 9)]) },
            true,
        ),
        (
            "its port on loopback",
            loopback,
            other("pay-1"),
            Registration { ip: loopback, ..explicit(&[(8080, 80)]) },
            false,
        ),
        ("all of loopback", loopback, other("pay-1"), Registration { ip: loopback, ..transparent() }, false),
    ];
    for (name, address, instance, registration, expected) in cases {
        let mut registry = Registry::default();
        registry.set_workloads(&static_workload("db", address));
        let taken = registry.take(&instance, 1, &registration, start);
        assert_eq!(taken.is_ok(), expected, "{name}: {taken:?}");
        assert!(!registry.get(&id("db")).unwrap().mesh, "{name}");
    }
}

#[test]
fn the_sidecar_of_a_workload_document_stands_for_it_and_changes_nothing() {
    let mut resources = static_workload("db", [10, 0, 0, 1].into());
    resources.workloads.values_mut().for_each(|workload| workload.spec.mesh = true);
    let mut registry = Registry::default();
    registry.set_workloads(&resources);
    let before = registry.get(&id("db")).cloned();
    registry.take(&id("db"), 1, &explicit(&[(8080, 80)]), Instant::now()).unwrap();
    assert_eq!(registry.get(&id("db")).cloned(), before);
    assert_eq!(registry.leased(&id("db")).unwrap().leased_ports().unwrap().len(), 1);
    assert_eq!((names(&registry), registry.hidden().count()), (vec!["db"], 0));
    assert!(registry.take(&other("db"), 2, &explicit(&[(1, 2)]), Instant::now()).is_err(), "another account's");
    assert!(registry.take(&id("db-2"), 3, &explicit(&[(1, 2)]), Instant::now()).is_err(), "another name's");
}

#[test]
fn a_workload_document_that_comes_later_stands_before_the_lease() {
    let mut registry = Registry::default();
    hold(&mut registry, 1);
    let resources = static_workload("cart-1", [10, 0, 0, 9].into());
    assert!(registry.set_workloads(&resources));
    assert!(!registry.set_workloads(&resources));
    assert_eq!(names(&registry), ["cart-1"]);
    assert!(!registry.get(&id("cart-1")).unwrap().mesh, "the operator's word");
    assert_eq!(registry.at([10, 0, 0, 1].into()).count(), 0);
    assert_eq!((registry.all().count(), registry.hidden().count()), (1, 1));
    assert!(registry.set_workloads(&Resources::default()));
    assert!(registry.get(&id("cart-1")).unwrap().mesh, "the lease is still there");
    assert_eq!(registry.of_namespace("other").count(), 0);
}

#[test]
fn an_instance_is_found_at_each_of_its_addresses() {
    let mut registry = Registry::default();
    let six: IpAddr = "fd00::1".parse().unwrap();
    let both = Registration { other_ips: vec![six], ..transparent() };
    registry.take(&id("cart-1"), 1, &both, Instant::now()).unwrap();
    let mut restored = Registry::default();
    restored.restore(registry.save(), Instant::now());
    for registry in [&registry, &restored] {
        assert_eq!(registry.at(six).count() + registry.at([10, 0, 0, 1].into()).count(), 2);
    }
    let thief = Registration { ip: six, ..explicit(&[(1, 2)]) };
    assert!(registry.take(&other("pay-1"), 2, &thief, Instant::now()).is_err());
    registry.withdraw(&id("cart-1"), 1, Instant::now());
    assert_eq!(registry.at(six).count(), 0);
    assert!(registry.take(&other("pay-1"), 2, &thief, Instant::now()).is_err(), "kept");
}
