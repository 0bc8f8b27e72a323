//! Promise: the resolver answers names of services with what the mesh knows of them, in every form and spelling, and never
//! asks anybody else about them; it forwards all other questions byte for byte and gives back what the upstream said: times
//! to live, denials, truncation, EDNS. What it knows it still answers when upstreams and control plane are gone.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use outrigger_tests::dns::{self, A, AAAA, By, HTTPS, MX, Message, NameServer, OPT, SOA, question, with_edns};
use outrigger_tests::namespace::refused;
use outrigger_tests::pods::{find, run};
use outrigger_tests::{Application, Mesh, MeshOptions, PATIENCE, Sidecar, eventually};

const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd96::10"];

fn service(name: &str, cluster_ips: &[&str]) -> String {
    let ips = match cluster_ips {
        [] => "clusterIP: None".to_owned(),
        all => format!("clusterIP: \"{}\"\n  clusterIPs: {all:?}", all[0]),
    };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  {ips}\n  selector: {{app: \
         {name}}}\n  ports:\n  - {{name: main, port: 80, targetPort: 8080}}\n"
    )
}

async fn mesh() -> Mesh {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.write("catalog.yaml", &service("catalog", &CLUSTER_IPS));
    mesh.write("four.yaml", &service("four", &CLUSTER_IPS[..1]));
    mesh.write("empty.yaml", &service("empty", &[]));
    mesh
}

/// A sidecar with a resolver, for which these are the name servers.
async fn sidecar(mesh: &Mesh, upstreams: &[SocketAddr]) -> Sidecar {
    let upstreams = upstreams.to_vec();
    let change = |config: &mut outrigger_sidecar::config::Config| {
        config.dns_listen = Some(([127, 0, 0, 1], 0).into());
        config.dns_upstream = upstreams;
    };
    // On a busy machine answers may come late; how long they are waited for is not what most of this is about.
    let patient = |limits: &mut outrigger_sidecar::config::Limits| {
        (limits.dns_first_answer, limits.dns_server_timeout, limits.dns_budget) = (PATIENCE, PATIENCE, PATIENCE);
    };
    mesh.sidecar("cart-1").limits(patient).config(change).start().await
}

async fn ask(to: SocketAddr, name: &str, kind: u16) -> Message {
    let message = Message::read(&dns::udp(to, &question(77, name, kind)).await);
    assert_eq!((message.id, message.question.clone()), (77, Some((name.trim_end_matches('.').to_owned(), kind))));
    message
}

async fn count(sidecar: &Sidecar, outcome: &str) -> f64 {
    sidecar.metrics().await.sum("outrigger_dns_queries_total", &[("outcome", outcome)])
}

#[tokio::test]
async fn names_of_services_in_every_form() {
    let mesh = mesh().await;
    let upstream = NameServer::start(|_, asked| Some(dns::answer(asked, 3, &[], 60))).await;
    let cart = sidecar(&mesh, &[upstream.address]).await;
    let resolver = cart.address("dns");
    for name in [
        "catalog",
        "catalog.shop",
        "catalog.shop.svc",
        "catalog.shop.svc.cluster.local",
        "catalog.shop.svc.cluster.local.",
        "CaTaLoG.shop.SVC.cluster.LOCAL",
    ] {
        for (kind, expected) in [(A, CLUSTER_IPS[0]), (AAAA, CLUSTER_IPS[1])] {
            let message = ask(resolver, name, kind).await;
            assert_eq!((message.code, message.truncated), (0, false), "{name}");
            assert_eq!(message.addresses(), [expected.parse::<IpAddr>().unwrap()], "{name}");
            assert!(message.answers[0].ttl <= 30, "{}", message.answers[0].ttl);
            let by_tcp = Message::read(&dns::tcp(resolver, &question(77, name, kind)).await);
            assert_eq!(by_tcp, message);
        }
    }
    // It is there, and has none of these: nobody else may deny it.
    for (name, kind) in [("catalog", MX), ("catalog", HTTPS), ("four", AAAA), ("empty", A), ("empty.shop", AAAA)] {
        let message = ask(resolver, name, kind).await;
        assert_eq!((message.code, message.answers.len()), (0, 0), "{name} {kind}");
        assert_eq!((message.authority[0].kind, message.authority[0].ttl), (SOA, 5));
    }
    assert_eq!(upstream.names(), [""; 0], "nothing of that is anybody else's business");
    assert_eq!((count(&cart, "mesh").await, count(&cart, "forwarded").await), (29.0, 0.0));
    // What is no service's name, or is one of no service.
    for name in
        ["absent", "absent.shop", "catalog.elsewhere.svc.cluster.local", "a.catalog.shop", "_sip.catalog", "x.org"]
    {
        assert_eq!(ask(resolver, name, A).await.code, 3, "{name}");
    }
    assert_eq!(upstream.names().len(), 6);
    assert_eq!(count(&cart, "forwarded").await, 6.0);
}

#[tokio::test]
async fn a_headless_service_is_all_of_its_endpoints() {
    let mesh = mesh().await;
    mesh.write("many.yaml", &service("many", &[]));
    let cart = sidecar(&mesh, &["127.0.0.1:9".parse().unwrap()]).await;
    let resolver = cart.address("dns");
    assert!(ask(resolver, "many", A).await.addresses().is_empty());
    let application = Application::start("many").await;
    let mut endpoints = Vec::new();
    for number in 1..=3u8 {
        let sidecar = mesh.sidecar(&format!("many-{number}")).label("app", "many").inbound(application.address());
        let address = IpAddr::from([127, 0, 77, number]);
        endpoints.push(sidecar.config(|config| config.workload_address = vec![address]).start().await);
    }
    let mut orders = BTreeSet::new();
    eventually("all endpoints, in changing order", async || {
        let message = ask(resolver, "many", A).await;
        let mut addresses = message.addresses();
        orders.insert(addresses.clone());
        addresses.sort();
        let all = (1..=3u8).map(|number| IpAddr::from([127, 0, 77, number])).collect::<Vec<_>>();
        assert!(message.answers.iter().all(|record| record.ttl <= 5));
        (addresses == all && orders.iter().filter(|order| order.len() == 3).count() > 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_forwarded_stays_as_it_is() {
    let mesh = mesh().await;
    let upstream = NameServer::start(|by, asked| {
        let many: Vec<IpAddr> = (0..200u8).map(|last| [192, 0, 2, last].into()).collect();
        Some(match (asked[12], by) {
            // `long`: too much for UDP.
            (4, By::Udp) => {
                let mut truncated = dns::answer(asked, 0, &many[..20], 7);
                truncated[2] |= 2;
                truncated
            }
            (4, By::Tcp) => dns::answer(asked, 0, &many, 7),
            // `gone`, spelled with a number.
            (5, _) => dns::answer(asked, 3, &[], 1234),
            _ => dns::answer(asked, 0, &many[..1], 86_399),
        })
    })
    .await;
    let cart = sidecar(&mesh, &[upstream.address]).await;
    let resolver = cart.address("dns");
    for (name, by, edns) in [
        ("wWw.eXample.oRg", By::Udp, None),
        ("www.example.org", By::Udp, Some(4096)),
        ("gone0.example.org", By::Udp, None),
        ("gone0.example.org", By::Tcp, Some(512)),
        ("long.example.org", By::Udp, Some(1232)),
        ("long.example.org", By::Tcp, None),
    ] {
        let mut asked = question(0xBEEF, name, A);
        // Bits that we do not know the meaning of, too: AD and CD.
        asked[3] |= 0x30;
        if let Some(size) = edns {
            asked = with_edns(asked, size);
        }
        let before = upstream.asked().len();
        let said = match by {
            By::Udp => dns::udp(resolver, &asked).await,
            By::Tcp => dns::tcp(resolver, &asked).await,
        };
        let all = upstream.asked();
        let (how, mut there) = all[before].clone();
        assert_eq!((all.len(), how), (before + 1, by), "{name}");
        let fresh = [there[0], there[1]];
        there[..2].copy_from_slice(&asked[..2]);
        assert_eq!(there, asked, "{name}: what the upstream was asked");
        let message = Message::read(&said);
        assert_eq!(message.id, 0xBEEF);
        assert_eq!(message.question.unwrap().0, name, "in its own spelling");
        let ttls = message.answers.iter().chain(&message.authority).map(|record| record.ttl).collect::<BTreeSet<_>>();
        let expected = match (name.as_bytes()[0], by) {
            (b'l', By::Udp) => (0, true, 20, 7),
            (b'l', By::Tcp) => (0, false, 200, 7),
            (b'g', _) => (3, false, 0, 1234),
            _ => (0, false, 1, 86_399),
        };
        assert_eq!(
            (message.code, message.truncated, message.answers.len()),
            (expected.0, expected.1, expected.2),
            "{name}"
        );
        assert_eq!(ttls, [expected.3].into(), "{name}");
        assert!(fresh != [0xBE, 0xEF] || before > 0, "another id than the client's, but for chance");
    }
    let ids: BTreeSet<Vec<u8>> = upstream.asked().iter().map(|(_, bytes)| bytes[..2].to_vec()).collect();
    assert!(ids.len() > 3, "ids are not to be guessed: {ids:?}");
}

#[tokio::test]
async fn without_upstreams_and_control_plane_what_is_known_is_answered() {
    let mesh = mesh().await;
    let silent = NameServer::start(|_, _| None).await;
    let gone: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let upstreams = vec![silent.address, gone];
    let begin = |token: bool| {
        let sidecar = mesh.sidecar("cart-1").config(|config| {
            config.dns_listen = Some(([127, 0, 0, 1], 0).into());
            config.dns_upstream = upstreams.clone();
        });
        if token { sidecar } else { sidecar.no_token() }
    };
    let cart = begin(true).start().await;
    let known = [CLUSTER_IPS[0].parse::<IpAddr>().unwrap()];
    eventually("the first answer", async || {
        (ask(cart.address("dns"), "catalog", A).await.addresses() == known).then_some(())
    })
    .await;
    let before = count(&cart, "failed").await;
    // One that does not answer, then one that is not there.
    let said = dns::udp(cart.address("dns"), &with_edns(question(7, "www.example.org", A), 1232)).await;
    let failed = Message::read(&said);
    assert_eq!((failed.code, failed.answers.len(), failed.additional[0].kind), (2, 0, OPT));
    assert_eq!(failed.additional[0].data, [0, 15, 0, 2, 0, 23], "and why: network error");
    assert_eq!(count(&cart, "failed").await, before + 1.0);

    mesh.kill_control_plane().await;
    assert_eq!(ask(cart.address("dns"), "catalog.shop", A).await.addresses(), known);
    // Nobody can say whether there is such a service.
    assert_eq!(ask(cart.address("dns"), "stock", A).await.code, 2);
    cart.stop().await;
    let again = begin(false).start_unready();
    again.ready().await;
    assert_eq!(ask(again.address("dns"), "catalog.shop.svc", A).await.addresses(), known, "from --state");
    assert_eq!(ask(again.address("dns"), "stock", A).await.code, 2);

    // A service that is gone is anybody's name again, and a new one is known at once.
    mesh.start_control_plane().await;
    mesh.remove("catalog.yaml");
    mesh.write("stock.yaml", &service("stock", &["10.96.0.11"]));
    eventually("the change arrives", async || {
        let (catalog, stock) =
            (ask(again.address("dns"), "catalog", A).await, ask(again.address("dns"), "stock", A).await);
        (catalog.code == 2 && stock.addresses() == ["10.96.0.11".parse::<IpAddr>().unwrap()]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn dnspython_reads_it() {
    let Some(python) = refused(find("python")) else { return };
    let mesh = mesh().await;
    let many: Vec<String> = (0..60).map(|last| format!("10.97.0.{last}")).collect();
    mesh.write("many.yaml", &service("many", &many.iter().map(String::as_str).collect::<Vec<_>>()));
    let upstream = NameServer::start(|_, asked| Some(dns::answer(asked, 3, &[], 60))).await;
    let cart = sidecar(&mesh, &[upstream.address]).await;
    let resolver = cart.address("dns");
    let mut client = std::process::Command::new(python);
    client.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/clients/dns_client.py"));
    client.args([resolver.ip().to_string(), resolver.port().to_string()]);
    assert_eq!(run(client).await, "ok");
}
