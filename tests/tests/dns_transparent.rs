//! Promise: with `redirect apply --dns` and a sidecar with `--dns-listen` an application that knows nothing of a mesh finds
//! services by their names, with nothing in /etc/hosts: those with a clusterIP, headless ones, and those that have only the
//! virtual addresses of the mesh, in both families whatever the network has. All other names it finds as before. What a
//! service had that is gone is never dialled.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use outrigger_api::virtual_address::is_virtual;
use outrigger_tests::dns::{self, NameServer};
use outrigger_tests::eventually;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::namespace::{Families, Namespace};
use outrigger_tests::process::Process;
use outrigger_tests::transparent::{MARK, TransparentMesh, TransparentSidecar};
use outrigger_tests::under_test;

const OUTSIDE: &str = "192.0.2.80";

/// Everything that says where a name is to be found: the network's name server.
fn finds_names_at(machine: &Namespace, server: IpAddr) {
    machine.hosts(&[]);
    machine.file("/etc/nsswitch.conf", "hosts: files dns\n");
    machine.file("/etc/resolv.conf", &format!("nameserver {server}\noptions timeout:20 attempts:1\n"));
}

/// A name server on the hub, which knows one name.
fn name_server(mesh: &TransparentMesh, ip: IpAddr) -> NameServer {
    let (hub, address) = (mesh.network.hub(), SocketAddr::new(ip, 53));
    let udp = hub.enter(|| std::net::UdpSocket::bind(address).unwrap());
    udp.set_nonblocking(true).unwrap();
    let tcp = hub.listen(address);
    NameServer::on(tokio::net::UdpSocket::from_std(udp).unwrap(), tcp, |_, asked| {
        let is_a = asked.windows(5).any(|bytes| bytes == [0, 0, 1, 0, 1]);
        let known = asked[12..].starts_with(b"\x03www\x07example\x03org\0");
        let ips: Vec<IpAddr> = if known && is_a { vec![OUTSIDE.parse().unwrap()] } else { Vec::new() };
        Some(dns::answer(asked, if known { 0 } else { 3 }, &ips, 60))
    })
}

async fn with_names<'m>(mesh: &'m TransparentMesh, machine: &'m str, app: &str) -> TransparentSidecar<'m> {
    let mut sidecar = mesh.start_sidecar(mesh.at(machine), app, &["--dns-listen", "127.0.0.1:15053"]);
    sidecar.process.ready().await;
    let (code, said) = sidecar.redirect_command(&["apply", "--mark", MARK, "--dns"]);
    assert_eq!(code, 0, "{said}");
    sidecar.is_ready().await;
    sidecar
}

/// Runs a line there to its end: exit code and stdout.
async fn run(machine: &Namespace, line: &str) -> (i32, String) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "LOCALDOMAIN", "RES_OPTIONS"] {
        command.env_remove(name);
    }
    let (status, stdout, stderr) = Process::spawn(machine.inside(&command)).finish(outrigger_tests::PATIENCE * 3).await;
    if !status.success() {
        eprintln!("{line}: {status}: {stderr}");
    }
    (status.code().expect("ended by itself"), stdout)
}

/// The addresses that a name has there.
async fn ahosts(machine: &Namespace, database: &str, name: &str) -> Vec<IpAddr> {
    let (_, said) = run(machine, &format!("getent {database} {name}")).await;
    let mut all: Vec<IpAddr> = said
        .lines()
        .map(|line| line.split_whitespace().next().unwrap().parse::<IpAddr>().unwrap().to_canonical())
        .collect();
    all.sort();
    all.dedup();
    all
}

async fn by_name(families: Families) {
    let names = ["web", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, STRICT).await else { return };
    let is_v6 = families == Families::V6;
    let cluster_ip = if is_v6 { "fd96::10" } else { "10.96.0.10" };
    mesh.service("catalog", Some(cluster_ip), 80, 8080, "").await;
    mesh.service("headless", None, 8080, 8080, "").await;
    let more = "apiVersion: v1\nkind: Service\nmetadata: {name: virtual, namespace: shop}\nspec:\n  selector: {app: \
                catalog}\n  ports:\n  - {name: main, port: 80, targetPort: 8080}\n";
    let headless = "apiVersion: v1\nkind: Service\nmetadata: {name: headless, namespace: shop}\nspec:\n  clusterIP: None\n  \
                    selector: {app: catalog}\n  ports:\n  - {name: main, port: 8080, targetPort: 8080}\n";
    mesh.write("service-headless.yaml", headless).await;
    mesh.write("service-virtual.yaml", more).await;
    let hub = mesh.network.hub();
    let server: IpAddr = if is_v6 { hub.v6().into() } else { hub.v4().into() };
    let upstream = name_server(&mesh, server);
    let web = mesh.at("web");
    finds_names_at(web, server);
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let _application = catalog.application("catalog", 8080);
    let cart = with_names(&mesh, "web", "web").await;

    let cluster_ip: IpAddr = cluster_ip.parse().unwrap();
    // What is asked for the first time is forwarded when a busy machine takes too long over it.
    for name in ["catalog", "headless", "virtual"] {
        eventually(name, async || (!ahosts(web, "ahosts", name).await.is_empty()).then_some(())).await;
    }
    let asked_before = upstream.names().len();
    for name in ["catalog", "catalog.shop", "Catalog.shop.svc.cluster.local"] {
        assert_eq!(ahosts(web, "hosts", name).await, [cluster_ip], "{name}");
        assert_eq!(ahosts(web, "ahosts", name).await, [cluster_ip], "{name}");
    }
    eventually("the endpoint of a headless service", async || {
        (ahosts(web, "ahosts", "headless").await == [mesh.address("catalog")]).then_some(())
    })
    .await;
    // Where a machine has no address of a family but loopback's, C libraries leave that family out when they may.
    let found = [ahosts(web, "ahosts", "virtual.shop").await, ahosts(web, "hosts", "virtual").await].concat();
    assert!(!found.is_empty() && found.iter().all(|ip| is_virtual(*ip)), "{found:?}");
    // Nothing of that was asked of anybody else. What is no service is, and answered as ever.
    assert_eq!(upstream.names().len(), asked_before, "{:?}", upstream.names());
    assert_eq!(ahosts(web, "ahosts", "www.example.org").await, [OUTSIDE.parse::<IpAddr>().unwrap()]);
    assert_eq!(run(web, "getent hosts absent.example.org").await.0, 2, "not found");

    // Under STRICT: whatever arrives came by the mesh.
    let urls =
        ["http://catalog/", "http://headless:8080/", "-4 http://virtual/", "-6 http://virtual.shop.svc.cluster.local/"];
    for (count, url) in (1..).zip(urls) {
        let (code, body) = run(web, &format!("curl -q -sS --fail --max-time 50 --noproxy * {url}")).await;
        assert_eq!((code, body.as_str()), (0, "GET / 0"), "{url}");
        let labels = [("destination_workload", "catalog"), ("mtls", "true"), ("code", "200"), ("reason", "")];
        catalog.counts("outrigger_http_requests_total", &labels, f64::from(count)).await;
    }
    // An endpoint's own address is of whichever of its services comes first.
    for (services, count) in [(&["catalog.shop", "headless.shop"][..], 2.0), (&["virtual.shop"], 2.0)] {
        eventually(&format!("{services:?}"), async || {
            let metrics = cart.metrics().await;
            let requests = |service: &&str| {
                let labels = [("direction", "outbound"), ("destination_service", *service), ("code", "200")];
                metrics.sum("outrigger_http_requests_total", &labels)
            };
            (services.iter().map(requests).sum::<f64>() == count).then_some(())
        })
        .await;
    }

    // The service goes; who remembers its addresses is told so, and nobody dials them.
    std::fs::remove_file(mesh.path("config/service-virtual.yaml")).unwrap();
    eventually("it is gone", async || ahosts(web, "ahosts", "virtual").await.is_empty().then_some(())).await;
    let both = ["240.240.0.1", "fd3a:94e7:c15b::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
    assert!(found.iter().all(|ip| both.contains(ip)), "the first that was given: {found:?}");
    for ip in both {
        let url = format!("http://{}/", SocketAddr::new(ip, 80));
        let (_, said) = run(web, &format!("curl -q -sS --max-time 50 --noproxy * -g -w %{{http_code}} {url}")).await;
        assert!(said.contains("not_registered") && said.ends_with("502"), "{said}");
        let never = if ip.is_ipv4() { "240.240.255.254:9" } else { "[fd3a:94e7:c15b:0:1::1]:9" };
        let mut client = web.connect(never.parse().unwrap()).await;
        client.send("\x01\x02 not http").await;
        assert_eq!(client.take_to_end().await.0, b"", "{never}: never had by anybody");
    }
    let refused = [("direction", "outbound"), ("reason", "not_registered")];
    cart.counts("outrigger_http_requests_total", &refused, 2.0).await;
    cart.counts("outrigger_tcp_connections_closed_total", &refused, 2.0).await;
    cart.process.says("virtual address whose service is gone").await;
}

#[tokio::test]
async fn services_by_name_over_ipv4() {
    by_name(Families::V4).await;
}

#[tokio::test]
async fn services_by_name_over_ipv6() {
    by_name(Families::V6).await;
}

/// The rules know another mark than the sidecar's: what it forwards comes back to it.
#[tokio::test]
async fn questions_that_come_back_end_and_are_complained_of() {
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["web"], STRICT).await else { return };
    mesh.service("catalog", Some("10.96.0.10"), 80, 8080, "").await;
    let (web, hub) = (mesh.at("web"), mesh.network.hub().v4().into());
    let upstream = name_server(&mesh, hub);
    finds_names_at(web, hub);
    let mut cart = mesh.start_sidecar(web, "web", &["--dns-listen", "127.0.0.1:15053"]);
    cart.process.ready().await;
    // The control plane is on the hub and can still be reached.
    let (code, said) = cart.redirect_command(&["apply", "--mark", "7", "--dns", "--exclude-cidrs", &hub.to_string()]);
    assert_eq!(code, 0, "{said}");
    cart.is_ready().await;
    assert_eq!(run(web, "getent hosts www.example.org").await.0, 2);
    cart.process.says("the same --mark").await;
    eventually("catalog", async || {
        (ahosts(web, "hosts", "catalog").await == ["10.96.0.10".parse::<IpAddr>().unwrap()]).then_some(())
    })
    .await;
    assert!(upstream.names().is_empty());
    // Once they fit, all is well.
    let (code, said) = cart.redirect_command(&["apply", "--mark", MARK, "--dns"]);
    assert_eq!(code, 0, "{said}");
    eventually("names beyond the mesh", async || {
        (ahosts(web, "hosts", "www.example.org").await == [OUTSIDE.parse::<IpAddr>().unwrap()]).then_some(())
    })
    .await;
}
