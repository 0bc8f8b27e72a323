//! One moment of configuration and registry after another, and what sidecars and operators are told of it.

use std::time::{Instant, SystemTime};

use outrigger_api::name::Protocol;
use outrigger_api::resource::{
    Attachment, AuthorizationPolicy, Labels, LoadBalancerType, PeerAuthentication, RateLimitPolicy, Selector,
    ServicePort, TargetPort, Workload as WorkloadSpec,
};
use outrigger_api::snapshot::{Destination, Endpoint, EndpointTls, LoadBalancer, MtlsMode};

use super::destination::LOAD_BALANCER;
use super::*;
use crate::registry::{Holder, InstanceId, LeasedPort, Registration};

fn labels(text: &str) -> Labels {
    text.split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn metadata(name: &str, annotations: &[(&str, &str)]) -> Metadata {
    Metadata {
        name: name.into(),
        namespace: "shop".into(),
        annotations: annotations.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        ..Metadata::default()
    }
}

fn port(name: Option<&str>, port: u16, target: TargetPort) -> ServicePort {
    ServicePort { name: name.map(Into::into), port, target_port: target, app_protocol: None }
}

/// A moment: what is configured and who is there.
#[derive(Default)]
struct Moment {
    resources: Resources,
    registry: Registry,
}

impl Moment {
    fn service(mut self, name: &str, selector: &str, annotations: &[(&str, &str)], ports: Vec<ServicePort>) -> Moment {
        let cluster_ips = vec![IpAddr::from([10, 96, 0, 1])];
        let spec = Service { selector: labels(selector), ports, cluster_ips, headless: false };
        let resource = Resource { metadata: metadata(name, annotations), spec };
        self.resources.services.insert(("shop".into(), name.into()), resource);
        self
    }

    fn workload(mut self, name: &str, last: u8, mesh: bool, ports: &[(&str, u16)]) -> Moment {
        let spec = WorkloadSpec {
            address: [10, 0, 1, last].into(),
            ports: ports.iter().map(|(name, port)| (name.to_string(), *port)).collect(),
            labels: labels("app=cart"),
            service_account: "static".into(),
            weight: 5,
            locality: None,
            mesh,
        };
        self.resources.workloads.insert(("shop".into(), name.into()), Resource { metadata: metadata(name, &[]), spec });
        self.registry.set_workloads(&self.resources);
        self
    }

    fn policy(mut self, selector: Option<&str>, mode: Option<MtlsMode>, ports: &[(u16, MtlsMode)]) -> Moment {
        let spec = PeerAuthentication {
            selector: selector.map(|text| Selector { match_labels: labels(text) }),
            mode,
            port_level: ports.iter().copied().collect(),
        };
        let name = format!("policy-{}", self.resources.peer_authentications.len());
        let resource = Resource { metadata: metadata(&name, &[]), spec };
        self.resources.peer_authentications.insert(("shop".into(), name), resource);
        self
    }

    /// `cart-<last>` at 10.0.0.<last>, application port 8080 behind mesh port 18080.
    fn lease(mut self, account: &str, last: u8, text: &str, protocol: Option<Protocol>) -> Moment {
        let id = lease_id(account, last);
        let ports = vec![LeasedPort { application: 8080, mesh: 18080, protocol }];
        let ip = [10, 0, 0, last].into();
        let registration = Registration { labels: labels(text), ..registration("cart", ip, ports) };
        self.registry.register(&id, last.into(), &registration, Instant::now()).unwrap();
        self
    }

    fn catalog(&self) -> Catalog {
        let virtual_addresses = VirtualAddresses::default().settled(&self.resources, SystemTime::UNIX_EPOCH);
        Catalog::new(Arc::new(self.resources.clone()), TrustDomain::new("outrigger.local").unwrap(), virtual_addresses)
    }

    fn find(&self, key: &str) -> Option<Destination> {
        let key = match key.parse() {
            Ok(address) => Key::Address(address),
            Err(_) => Key::Service(name::ServicePort::parse(key, "shop").unwrap()),
        };
        self.catalog().destination(&self.registry, &key, "shop")
    }

    fn endpoints(&self, key: &str) -> Vec<String> {
        let describe = |endpoint: &Endpoint| {
            let tls = match &endpoint.tls {
                EndpointTls::Mutual(identity) => identity.account().to_owned(),
                EndpointTls::Plaintext => "plaintext".to_owned(),
            };
            format!("{} {tls}", endpoint.address)
        };
        self.find(key).unwrap().endpoints.iter().map(describe).collect()
    }
}

/// Of a redemption of its own.
fn registration(workload: &str, ip: IpAddr, ports: Vec<LeasedPort>) -> Registration {
    Registration {
        holder: Holder { lineage: ip.to_string(), process: String::new() },
        workload: workload.into(),
        labels: Labels::new(),
        ip,
        other_ips: Vec::new(),
        ports,
        transparent: false,
    }
}

fn lease_id(account: &str, last: u8) -> InstanceId {
    InstanceId { namespace: "shop".into(), service_account: account.into(), name: format!("cart-{last}") }
}

fn http() -> Vec<ServicePort> {
    vec![port(Some("http"), 80, TargetPort::Number(8080))]
}

#[test]
fn selectors_choose_by_labels_within_the_namespace() {
    let moment = Moment::default()
        .service("cart", "app=cart", &[], http())
        .service("all", "", &[], http())
        .lease("cart", 1, "app=cart,version=2", None)
        .lease("cart", 2, "app=pay", None)
        .workload("db", 1, false, &[]);
    assert_eq!(moment.endpoints("cart:80"), ["10.0.0.1:18080 cart", "10.0.1.1:8080 plaintext"]);
    assert!(moment.endpoints("all:80").is_empty(), "an empty selector selects nothing");
    let other = moment.find("cart:81").unwrap();
    assert_eq!((other.no_such_port, other.endpoints.len()), (true, 0));
    assert_eq!(other.why_empty, "cart.shop has no port 81; it has 80 (http)");
    assert_eq!(moment.find("cart.other:80"), None);
    let found = moment.find("cart.shop:80").unwrap();
    assert_eq!((found.protocol, found.stale), (Some(Protocol::Http), false));
    assert_eq!((found.endpoints[1].weight, found.endpoints[1].instance.as_str()), (5, "db"));
    assert_eq!((found.endpoints[0].workload.as_str(), found.endpoints[0].application_port), ("cart", 8080));
}

#[test]
fn target_ports_by_number_and_name() {
    let by_name = || vec![port(None, 80, TargetPort::Name("web".into()))];
    let by_number = |number| vec![port(None, 80, TargetPort::Number(number))];
    let moment = |ports| {
        Moment::default().service("cart", "app=cart", &[], ports).lease("cart", 1, "app=cart", None).workload(
            "db",
            1,
            false,
            &[("web", 9000)],
        )
    };
    assert_eq!(moment(by_name()).endpoints("cart:80"), ["10.0.1.1:9000 plaintext"]);
    let named = moment(by_name());
    let warnings = named.catalog().warnings(&named.registry);
    assert!(warnings[0].contains("targetPort \"web\""), "{warnings:?}");
    assert_eq!(moment(by_number(8080)).endpoints("cart:80"), ["10.0.0.1:18080 cart", "10.0.1.1:8080 plaintext"]);
    assert_eq!(moment(by_number(7000)).endpoints("cart:80"), ["10.0.1.1:7000 plaintext"]);
}

#[test]
fn how_to_dial() {
    let disable = Some(MtlsMode::Disable);
    let base = || {
        Moment::default()
            .service("cart", "app=cart", &[], http())
            .lease("cart", 1, "app=cart", None)
            .workload("meshed", 1, true, &[])
            .workload("plain", 2, false, &[])
    };
    let (mutual, plain) = ("10.0.0.1:18080 cart", "10.0.0.1:18080 plaintext");
    let (fixed, fixed_plain) = ("10.0.1.1:8080 static", "10.0.1.1:8080 plaintext");
    let cases = [
        ("permissive by default", base(), mutual, fixed),
        ("strict", base().policy(None, Some(MtlsMode::Strict), &[]), mutual, fixed),
        ("disabled", base().policy(None, disable, &[]), plain, fixed_plain),
        (
            "disabled for this port",
            base().policy(Some("app=cart"), None, &[(8080, MtlsMode::Disable)]),
            plain,
            fixed_plain,
        ),
        (
            "disabled for the mesh port's number",
            base().policy(Some("app=cart"), None, &[(18080, MtlsMode::Disable)]),
            mutual,
            fixed,
        ),
        ("disabled for others", base().policy(Some("app=pay"), disable, &[]), mutual, fixed),
    ];
    for (name, moment, lease, meshed) in cases {
        assert_eq!(moment.endpoints("cart:80"), [lease, meshed, "10.0.1.2:8080 plaintext"], "{name}");
    }
}

#[test]
fn a_service_may_say_who_serves_it() {
    let only = [(SERVICE_ACCOUNTS, "cart, other")];
    let moment = Moment::default()
        .service("cart", "app=cart", &only, http())
        .lease("cart", 1, "app=cart", None)
        .lease("intruder", 2, "app=cart", None);
    assert_eq!(moment.endpoints("cart:80"), ["10.0.0.1:18080 cart"]);
    let catalog = moment.catalog();
    let intruder = moment.registry.get(&lease_id("intruder", 2)).unwrap();
    assert!(catalog.services_of(intruder).is_empty());
}

#[test]
fn by_address() {
    let moment = Moment::default()
        .service("cart", "app=cart", &[], http())
        .lease("cart", 1, "app=cart", None)
        .lease("cart", 2, "app=cart", None)
        .lease("alone", 3, "app=none", None)
        .workload("db", 1, false, &[("sql", 5432)]);
    assert_eq!(moment.find("10.96.0.1:80"), moment.find("cart:80"), "clusterIP");
    assert!(moment.find("10.96.0.1:81").is_some_and(|found| found.no_such_port && found.endpoints.is_empty()));
    for address in ["10.0.0.2:8080", "10.0.0.2:18080"] {
        assert_eq!(moment.endpoints(address), ["10.0.0.2:18080 cart"], "{address}");
        let found = moment.find(address).unwrap();
        assert_eq!((found.service.to_string().as_str(), found.port), ("cart.shop", 80));
    }
    let alone = moment.find("10.0.0.3:8080").unwrap();
    assert_eq!((alone.service.to_string().as_str(), alone.port), ("cart.shop", 8080), "under its workload's name");
    let database = moment.find("10.0.1.1:5432").unwrap();
    assert_eq!((database.service.to_string().as_str(), database.protocol), ("db.shop", Some(Protocol::Tcp)));
    for unknown in ["10.0.0.2:9999", "10.0.1.1:9999", "10.0.9.9:80", "[::1]:80"] {
        assert_eq!(moment.find(unknown), None, "{unknown}");
    }
}

/// `name` at 10.0.0.<last>, transparent, with these ports declared besides.
fn intercepted(mut moment: Moment, name: &str, last: u8, ports: Vec<LeasedPort>) -> Moment {
    let id = lease_id(name, last);
    let labels = labels(&format!("app={name}"));
    let ip = [10, 0, 0, last].into();
    let registration = Registration { labels, transparent: true, ..registration(name, ip, ports) };
    moment.registry.register(&id, last.into(), &registration, Instant::now()).unwrap();
    moment
}

#[test]
fn a_transparent_sidecar_serves_every_port_at_its_own_number() {
    let moment = Moment::default()
        .service("cart", "app=cart", &[], http())
        .service("cart-admin", "app=cart", &[], vec![port(None, 9000, TargetPort::Number(9000))])
        .policy(Some("app=cart"), Some(MtlsMode::Strict), &[(9000, MtlsMode::Disable), (9001, MtlsMode::Permissive)]);
    let declared = vec![
        LeasedPort { application: 7000, mesh: 17000, protocol: None },
        LeasedPort { application: 8080, mesh: 8080, protocol: Some(Protocol::Grpc) },
    ];
    let moment = intercepted(moment, "cart", 1, declared);
    for (key, endpoint) in [
        ("cart:80", "10.0.0.1:8080 cart"),
        ("cart-admin:9000", "10.0.0.1:9000 plaintext"),
        ("10.0.0.1:8080", "10.0.0.1:8080 cart"),
        // In no Service and in no registration.
        ("10.0.0.1:4242", "10.0.0.1:4242 cart"),
        // Declared with a mesh port of its own, by either number.
        ("10.0.0.1:7000", "10.0.0.1:17000 cart"),
        ("10.0.0.1:17000", "10.0.0.1:17000 cart"),
        ("10.0.0.1:9000", "10.0.0.1:9000 plaintext"),
    ] {
        assert_eq!(moment.endpoints(key), [endpoint], "{key}");
    }
    let named = |address: &str| {
        let found = moment.find(address).unwrap();
        (found.service.to_string(), found.port, found.protocol)
    };
    assert_eq!(named("10.0.0.1:8080"), ("cart.shop".to_owned(), 80, Some(Protocol::Http)));
    assert_eq!(named("10.0.0.1:4242"), ("cart.shop".to_owned(), 4242, None), "under its workload's name");

    let own = moment.catalog().own_workload(&moment.registry, &lease_id("cart", 1), &Labels::new());
    assert!(own.registered);
    let services: Vec<_> = own.ports.iter().filter_map(|(port, of)| Some((*port, of.service.clone()?))).collect();
    let services: Vec<_> = services.iter().map(|(port, service)| (*port, &*service.name)).collect();
    assert_eq!(services, [(8080, "cart"), (9000, "cart-admin")]);
    let modes = [8080, 9000, 9001, 4242].map(|port| own.mtls_mode(port));
    assert_eq!(modes, [MtlsMode::Strict, MtlsMode::Disable, MtlsMode::Permissive, MtlsMode::Strict]);
    let early = moment.catalog().own_workload(&moment.registry, &lease_id("cart", 9), &labels("app=cart"));
    assert!(!early.registered && !early.ports.contains_key(&8080), "services are known with the lease only");
}

#[test]
fn a_workload_with_a_sidecar_is_dialled_with_mutual_tls_at_any_port() {
    let moment = Moment::default()
        .workload("meshed", 1, true, &[("web", 8080)])
        .workload("plain", 2, false, &[("web", 8080)])
        .policy(Some("app=cart"), None, &[(9000, MtlsMode::Disable)]);
    assert_eq!(moment.endpoints("10.0.1.1:8080"), ["10.0.1.1:8080 static"]);
    assert_eq!(moment.endpoints("10.0.1.1:4242"), ["10.0.1.1:4242 static"]);
    assert_eq!(moment.endpoints("10.0.1.1:9000"), ["10.0.1.1:9000 plaintext"]);
    assert_eq!(moment.find("10.0.1.2:4242"), None, "nothing is known of it");
}

#[test]
fn services_on_one_port_are_told_apart_by_their_addresses() {
    let mut moment = intercepted(Moment::default(), "cart", 1, Vec::new());
    moment = intercepted(moment, "pay", 2, Vec::new());
    moment = moment.service("cart", "app=cart", &[], http()).service("pay", "app=pay", &[], http());
    let set = |moment: &mut Moment, name: &str, ips: Vec<IpAddr>| {
        moment.resources.services.get_mut(&("shop".into(), name.into())).unwrap().spec.cluster_ips = ips;
    };
    set(&mut moment, "pay", vec![[10, 96, 0, 2].into(), "fd96::2".parse().unwrap()]);
    assert_eq!(moment.endpoints("10.96.0.1:80"), ["10.0.0.1:8080 cart"]);
    assert_eq!(moment.endpoints("10.96.0.2:80"), ["10.0.0.2:8080 pay"]);
    assert_eq!(moment.endpoints("[fd96::2]:80"), ["10.0.0.2:8080 pay"]);
    assert!(moment.catalog().warnings(&moment.registry).is_empty());

    set(&mut moment, "pay", vec![[10, 96, 0, 1].into()]);
    assert_eq!(moment.endpoints("10.96.0.1:80"), ["10.0.0.1:8080 cart"]);
    let warnings = moment.catalog().warnings(&moment.registry);
    let told = "Service pay.shop: 10.96.0.1:80 is the clusterIP of cart.shop already, which gets its traffic";
    assert_eq!(warnings, [told]);
}

#[test]
fn a_shared_address_is_told_apart_by_its_ports() {
    let mut moment = Moment::default();
    for (name, application, mesh, taken) in [("a", 9001, 9002, true), ("b", 9002, 9003, false), ("c", 9004, 9003, true)]
    {
        let id = InstanceId { namespace: "shop".into(), service_account: name.into(), name: name.into() };
        let ports = vec![LeasedPort { application, mesh, protocol: None }];
        let registration = registration(name, [127, 0, 0, 1].into(), ports);
        let registered = moment.registry.register(&id, 1, &registration, Instant::now());
        assert_eq!(registered.is_ok(), taken, "{name}: {registered:?}");
    }
    assert_eq!(moment.endpoints("127.0.0.1:9002"), ["127.0.0.1:9002 a"]);
    assert_eq!(moment.endpoints("127.0.0.1:9001"), ["127.0.0.1:9002 a"]);
    assert_eq!(moment.endpoints("127.0.0.1:9003"), ["127.0.0.1:9003 c"]);
}

#[test]
fn an_instance_with_two_addresses_is_one_endpoint_and_found_at_both() {
    let mut moment = Moment::default().service("cart", "app=cart", &[], http());
    let ports = vec![LeasedPort { application: 8080, mesh: 18080, protocol: None }];
    let other_ips = vec!["fd00::1".parse().unwrap()];
    let registration =
        Registration { labels: labels("app=cart"), other_ips, ..registration("cart", [10, 0, 0, 1].into(), ports) };
    moment.registry.register(&lease_id("cart", 1), 1, &registration, Instant::now()).unwrap();
    assert_eq!(moment.endpoints("cart:80"), ["10.0.0.1:18080 cart"]);
    assert_eq!(moment.endpoints("10.0.0.1:8080"), ["10.0.0.1:18080 cart"]);
    assert_eq!(moment.endpoints("[fd00::1]:8080"), ["[fd00::1]:18080 cart"]);
    moment.resources.services.get_mut(&("shop".into(), "cart".into())).unwrap().spec.headless = true;
    moment.resources.services.get_mut(&("shop".into(), "cart".into())).unwrap().spec.cluster_ips.clear();
    let addresses = moment.catalog().addresses(&moment.registry, &ServiceName::new("cart", "shop").unwrap()).unwrap();
    assert_eq!(addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
}

#[test]
fn a_sidecar_does_not_decide_how_a_service_is_called() {
    let unnamed = || vec![port(None, 80, TargetPort::Number(8080))];
    let (http_word, tcp, grpc) = (Some(Protocol::Http), Some(Protocol::Tcp), Some(Protocol::Grpc));
    let cases = [
        ("the Service says it", http(), vec![None, tcp], http_word, Some("says tcp and the Service says http")),
        ("and its sidecars agree", http(), vec![None, http_word], http_word, None),
        ("the Service says nothing", unnamed(), vec![grpc, grpc], grpc, None),
        ("and one of two speaks", unnamed(), vec![None, tcp], None, Some("says nothing and another sidecar says tcp")),
        ("and two speak", unnamed(), vec![grpc, tcp], None, Some("says tcp and another sidecar says grpc")),
    ];
    for (name, ports, sidecars, expected, warning) in cases {
        let mut moment = Moment::default().service("cart", "app=cart", &[], ports);
        for (last, protocol) in (1..).zip(sidecars) {
            moment = moment.lease(&format!("cart{last}"), last, "app=cart", protocol);
        }
        assert_eq!(moment.find("cart:80").unwrap().protocol, expected, "{name}");
        assert_eq!(moment.find("10.96.0.1:80").unwrap().protocol, expected, "{name}");
        let warnings = moment.catalog().warnings(&moment.registry);
        match warning {
            Some(text) => assert!(warnings.iter().any(|line| line.contains(text)), "{name}: {warnings:?}"),
            None => assert!(warnings.is_empty(), "{name}: {warnings:?}"),
        }
    }
}

#[test]
fn a_policy_that_selects_no_workload_is_told_once_workloads_are_there() {
    let mut moment = Moment::default();
    for (name, selector) in
        [("cart", Some("app=cart")), ("crat", Some("app=crat")), ("~broken", Some("app=x")), ("all", None)]
    {
        let spec = AuthorizationPolicy {
            attachment: Attachment {
                selector: selector.map(|text| Selector { match_labels: labels(text) }),
                services: Vec::new(),
            },
            action: outrigger_api::policy::authorization::Action::Deny,
            shadow: false,
            rules: Vec::new(),
        };
        let resource = Resource { metadata: metadata(name, &[]), spec };
        moment.resources.authorization_policies.insert(("shop".into(), name.into()), resource);
    }
    assert!(moment.catalog().warnings(&moment.registry).is_empty());
    moment = moment.lease("cart", 1, "app=cart", None);
    let expected = "AuthorizationPolicy shop/crat: no registered workload has the labels of its selector";
    assert_eq!(moment.catalog().warnings(&moment.registry), [expected]);
    let limit = RateLimitPolicy {
        attachment: Attachment { selector: Some(Selector { match_labels: labels("app=carts") }), services: Vec::new() },
        shadow: true,
        limits: Vec::new(),
        overrides: Vec::new(),
    };
    let resource = Resource { metadata: metadata("many", &[]), spec: limit };
    moment.resources.rate_limit_policies.insert(("shop".into(), "many".into()), resource);
    let also = "RateLimitPolicy shop/many: no registered workload has the labels of its selector";
    assert_eq!(moment.catalog().warnings(&moment.registry), [expected, also]);
    let selected =
        |name: &str| moment.catalog().selected_by(&moment.registry, &format!("AuthorizationPolicy/shop/{name}"));
    assert_eq!(["cart", "crat", "all", "none"].map(selected), [1, 0, 1, 0]);
}

#[test]
fn load_balancers() {
    let balancer = |annotations: &[(&str, &str)], default| {
        let mut moment = Moment::default().service("cart", "app=cart", annotations, http());
        moment.resources.mesh.defaults.load_balancer = default;
        moment.find("cart:80").unwrap().load_balancer
    };
    assert_eq!(balancer(&[], LoadBalancerType::LeastRequest), LoadBalancer::LeastRequest);
    assert_eq!(balancer(&[], LoadBalancerType::Random), LoadBalancer::Random);
    assert_eq!(balancer(&[(LOAD_BALANCER, "RoundRobin")], LoadBalancerType::Random), LoadBalancer::RoundRobin);
    assert_eq!(balancer(&[(LOAD_BALANCER, "Best")], LoadBalancerType::Random), LoadBalancer::Random);
    let odd = Moment::default().service("cart", "app=cart", &[(LOAD_BALANCER, "Best")], http());
    let warnings = odd.catalog().warnings(&odd.registry);
    assert!(warnings[0].contains("\"Best\""), "{warnings:?}");
}

#[test]
fn what_a_sidecar_learns_of_itself() {
    let moment = Moment::default()
        .service("cart", "app=cart", &[], http())
        .service("zz-other", "app=cart", &[], http())
        .policy(None, Some(MtlsMode::Strict), &[])
        .policy(Some("app=cart"), None, &[(9090, MtlsMode::Permissive)])
        .lease("cart", 1, "app=cart", Some(Protocol::Grpc));
    let own = moment.catalog().own_workload(&moment.registry, &lease_id("cart", 1), &Labels::new());
    assert_eq!(own.default_mtls_mode, MtlsMode::Strict);
    let port = &own.ports[&8080];
    assert_eq!((port.protocol, port.mtls_mode), (Some(Protocol::Grpc), MtlsMode::Strict));
    assert_eq!(port.service.as_ref().unwrap().to_string(), "cart.shop");
    assert_eq!(own.mtls_mode(9090), MtlsMode::Permissive);
    assert_eq!(own.mesh.leaf_lifetime_seconds, 86_400);

    // Before the lease its granted labels decide, so that a policy for them is never missing.
    let nobody = lease_id("cart", 9);
    let early = moment.catalog().own_workload(&moment.registry, &nobody, &labels("app=cart"));
    assert_eq!(early.mtls_mode(9090), MtlsMode::Permissive);
    let unknown = moment.catalog().own_workload(&moment.registry, &nobody, &Labels::new());
    assert_eq!(unknown.mtls_mode(9090), MtlsMode::Strict);
}

#[test]
fn a_name_stands_for_the_cluster_ip_or_a_virtual_address_or_the_endpoints() {
    let mut moment = Moment::default()
        .service("cart", "app=cart", &[], http())
        .service("virtual", "app=cart", &[], http())
        .service("headless", "app=cart", &[], http())
        .service("nobody", "app=nobody", &[], http())
        .lease("cart", 2, "app=cart", None)
        .lease("cart", 1, "app=cart", None);
    for (name, ips) in
        [("cart", vec!["10.96.0.7", "fd00::7"]), ("virtual", vec![]), ("headless", vec![]), ("nobody", vec![])]
    {
        let service = moment.resources.services.get_mut(&("shop".to_owned(), name.to_owned())).unwrap();
        service.spec.cluster_ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        service.spec.headless = ["headless", "nobody"].contains(&name);
    }
    let addresses = |name: &str| {
        let name = ServiceName::new(name, "shop").unwrap();
        moment.catalog().addresses(&moment.registry, &name).map(|ips| ips.iter().map(IpAddr::to_string).collect())
    };
    let some = |ips: &[&str]| Some(ips.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>());
    assert_eq!(addresses("cart"), some(&["10.96.0.7", "fd00::7"]));
    assert_eq!(addresses("virtual"), some(&["240.240.0.1", "fd3a:94e7:c15b::1"]));
    assert_eq!(addresses("headless"), some(&["10.0.0.1", "10.0.0.2"]));
    assert_eq!(addresses("nobody"), some(&[]));
    assert_eq!(addresses("void"), None);
    for address in ["240.240.0.1:80", "[fd3a:94e7:c15b::1]:80"] {
        let found = moment.find(address).unwrap();
        assert_eq!((found.service.to_string(), found.endpoints.len()), ("virtual.shop".to_owned(), 2), "{address}");
    }
    assert!(moment.find("240.240.0.1:81").is_some_and(|found| found.no_such_port), "a port that the service has not");
    assert_eq!(moment.find("240.240.0.2:80"), None, "nobody's");
}

#[test]
fn ports_that_nobody_serves_are_listed_with_the_reason() {
    let number = |target| vec![port(None, 80, TargetPort::Number(target))];
    let two = || vec![port(None, 80, TargetPort::Number(8080)), port(None, 81, TargetPort::Number(9))];
    let accounts = [(SERVICE_ACCOUNTS, "others")];
    let mut moment = Moment::default()
        .service("served", "app=cart", &[], number(8080))
        .service("bare", "", &[], number(8080))
        .service("nobody", "app=nobody", &[], number(8080))
        .service("others", "app=cart", &accounts, number(8080))
        .service("half", "app=cart", &[], two())
        .lease("cart", 1, "app=cart", None);
    let said = |moment: &Moment| moment.catalog().empty_ports(&moment.registry);
    let one = [
        "bare.shop, port 80: no endpoints: the Service has no selector",
        "half.shop, port 81: no endpoints: of the workloads with the labels app=cart (1) none serves the targetPort 9",
        "nobody.shop, port 80: no endpoints: no workload of namespace shop has the labels app=nobody of its selector",
        "others.shop, port 80: no endpoints: of the workloads with the labels app=cart (1) none has a service account of \
         outrigger.dev/service-accounts",
    ];
    assert_eq!(said(&moment), one);
    // Its lease was withdrawn, and it is still there; then it is gone.
    let id = lease_id("cart", 1);
    assert!(moment.registry.withdraw(&id, 1, Instant::now()));
    let draining =
        "served.shop, port 80: no endpoints: all workloads with the labels app=cart of its selector (1) are draining";
    assert!(said(&moment).iter().any(|line| line == draining), "{:?}", said(&moment));
    assert!(moment.registry.drained(&id, Instant::now()));
    let gone =
        "served.shop, port 80: no endpoints: no workload of namespace shop has the labels app=cart of its selector";
    assert!(said(&moment).iter().any(|line| line == gone), "{:?}", said(&moment));
    assert!(!moment.registry.drained(&id, Instant::now()), "that was told already");
}
