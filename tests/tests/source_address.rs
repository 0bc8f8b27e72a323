//! Promise: with `--keep-source-address` an application behind a transparent sidecar sees the address of each client as its
//! peer, whatever is spoken, in both families, from the mesh and from strangers; a connection that was made in one client's
//! name never carries another's request. Without the flag it sees its own address; without the rules no connection is made.

use std::net::{IpAddr, SocketAddr};

use outrigger_tests::application::{Application, Backend};
use outrigger_tests::grpc::Http2;
use outrigger_tests::mesh::{PERMISSIVE, STRICT};
use outrigger_tests::namespace::{Families, installed, only_root};
use outrigger_tests::process::{Program, command};
use outrigger_tests::raw_tcp::{ACK, PSH, RST, RawTcp, Segment};
use outrigger_tests::transparent::{MARK, TransparentMesh, TransparentSidecar, get};
use outrigger_tests::{Connection, Namespace, eventually, under_test};
use socket2::SockRef;

const KEEP: [&str; 4] = ["apply", "--mark", MARK, "--keep-source-address"];

/// The last of the application's peers.
fn seen(application: &Application) -> IpAddr {
    application.peers().last().expect("a connection to the application").ip()
}

fn own(machine: &Namespace, families: Families) -> IpAddr {
    if families == Families::V6 { machine.v6().into() } else { machine.v4().into() }
}

/// Says something that is no HTTP, and gives the peer that a server sees, and what both have heard.
async fn opaque(from: &Namespace, server: &Backend) -> (IpAddr, Vec<u8>, Vec<u8>) {
    let mut client = from.connect(server.address()).await;
    client.send("\x01no http at all\n").await;
    client.finish().await;
    let mut accepted = server.accept().await;
    let peer = accepted.tcp().peer_addr().unwrap().ip();
    let (heard, _) = accepted.take_to_end().await;
    accepted.send("and an answer").await;
    accepted.finish().await;
    (peer, heard, client.take_to_end().await.0)
}

async fn every_protocol(families: Families) {
    let names = ["web", "other", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, PERMISSIVE).await else { return };
    mesh.service("catalog", None, 8080, 8080, "").await;
    // Strict where the kernel looks at where packets come from.
    mesh.at("catalog").run("for it in all lo eth0; do echo 1 >/proc/sys/net/ipv4/conf/$it/rp_filter; done");
    let catalog = mesh.sidecar_that_keeps_source("catalog", "catalog", &[]).await;
    let _web = mesh.sidecar("web", "web", &[]).await;
    let application = catalog.application("catalog", 8080);
    let address = SocketAddr::new(mesh.address("catalog"), 8080);
    let server = Backend::from(mesh.at("catalog").listen(SocketAddr::new(address.ip(), 8081)));

    // `web` has a sidecar and comes by mutual TLS, `other` has none.
    for (machine, mtls) in [("web", true), ("other", false)] {
        let from = mesh.at(machine);
        let client = own(from, families);
        for path in ["/hello", "/hello"] {
            let answer = get(from, &address.to_string(), path).await;
            assert_eq!(answer.status, 200, "{machine}: {}", answer.text());
            assert_eq!(seen(&application), client, "{machine}: HTTP/1.1");
            assert_eq!(application.last().header("x-outrigger-identity").is_some(), mtls, "{machine}");
        }
        let http2 = Http2::over(from.connect(address).await.into_tcp()).await;
        let answer = http2.get("/hello").await.unwrap();
        assert_eq!(answer.status, 200, "{machine}: HTTP/2");
        assert_eq!(seen(&application), client, "{machine}: HTTP/2");
        assert_eq!(application.last().version, "HTTP/2.0", "{machine}");
        let (peer, heard, answered) = opaque(from, &server).await;
        assert_eq!(peer, client, "{machine}: opaque");
        assert_eq!((heard, answered), (b"\x01no http at all\n".to_vec(), b"and an answer".to_vec()), "{machine}");
    }
    let (code, said) = catalog.redirect_command(&["check"]);
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn of_each_client_over_ipv4() {
    every_protocol(Families::V4).await;
}

#[tokio::test]
async fn of_each_client_over_ipv6() {
    every_protocol(Families::V6).await;
}

/// One request that names its client; keeps the connection.
async fn named(connection: &mut Connection, client: IpAddr) -> u16 {
    connection.ask(format!("GET /hello HTTP/1.1\r\nHost: catalog\r\nX-Client: {client}\r\n\r\n")).await.status
}

#[tokio::test]
async fn a_connection_in_one_clients_name_carries_no_others_request() {
    let names = ["one", "two", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, PERMISSIVE).await else { return };
    mesh.service("catalog", None, 8080, 8080, ", appProtocol: http").await;
    // All connections of one worker, whose pools are its own.
    let catalog = mesh.sidecar_that_keeps_source("catalog", "catalog", &["--workers", "1"]).await;
    // Two addresses and one identity.
    let _clients = (mesh.sidecar("one", "web", &[]).await, mesh.sidecar("two", "web", &[]).await);
    let application = catalog.application("catalog", 8080);
    let address = SocketAddr::new(mesh.address("catalog"), 8080);
    // And strangers, whose addresses are all on one machine.
    let hub = mesh.network.hub();
    hub.run("for it in 101 102 103; do ip addr add 10.77.0.$it/24 dev link0; done");
    let mut clients = Vec::new();
    for (machine, ip) in [("one", mesh.address("one")), ("two", mesh.address("two"))] {
        clients.push((ip, mesh.at(machine).connect(address).await));
    }
    for last in [101, 102, 103] {
        let ip = IpAddr::from([10, 77, 0, last]);
        let socket = hub.socket(ip);
        socket.bind((ip, 0).into()).unwrap();
        clients.push((ip, socket.connect(address).await.unwrap().into()));
    }
    let mut asking = tokio::task::JoinSet::new();
    for (ip, mut connection) in clients {
        asking.spawn(async move {
            for _ in 0..20 {
                assert_eq!(named(&mut connection, ip).await, 200, "{ip}");
            }
        });
    }
    while let Some(done) = asking.join_next().await {
        done.unwrap();
    }
    let peers = application.peers();
    let requests = application.requests();
    assert_eq!(requests.len(), 100);
    for request in requests {
        assert_eq!(request.header("x-client"), Some(&*peers[request.connection].ip().to_string()));
    }
    // Each client's requests shared connections all the same.
    assert!(peers.len() < 50, "{} connections", peers.len());
}

#[tokio::test]
async fn a_client_on_the_same_machine_and_a_call_to_itself_go_as_before() {
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["catalog"], STRICT).await else { return };
    mesh.service("catalog", Some("10.96.0.10"), 80, 8080, "").await;
    let explicit = ["--inbound", "0.0.0.0:9443=127.0.0.1:8080"];
    let catalog = mesh.sidecar_that_keeps_source("catalog", "catalog", &explicit).await;
    let application = catalog.application("catalog", 8080);
    let listener = mesh.at("catalog").listen("127.0.0.1:8080".parse().unwrap());
    let on_loopback = Application::serve("on-loopback", listener);
    let own = mesh.address("catalog");
    let direct = SocketAddr::new(own, 8080).to_string();
    let answer = get(mesh.at("catalog"), &direct, "/hello").await;
    assert_eq!((answer.status, seen(&application)), (200, own), "{}", answer.text());
    let answer = get(mesh.at("catalog"), "10.96.0.10:80", "/hello").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    // What `--inbound` leads to on loopback can be reached from there alone.
    assert_eq!((answer.header("x-app"), seen(&on_loopback)), (Some("on-loopback"), IpAddr::from([127, 0, 0, 1])));
}

#[tokio::test]
async fn without_the_flag_it_is_the_sidecars_own() {
    let names = ["other", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, PERMISSIVE).await else { return };
    let catalog = mesh.sidecar("catalog", "catalog", &[]).await;
    let application = catalog.application("catalog", 8080);
    let address = SocketAddr::new(mesh.address("catalog"), 8080).to_string();
    assert_eq!(get(mesh.at("other"), &address, "/hello").await.status, 200);
    assert_eq!(seen(&application), mesh.address("catalog"));
}

/// All that `redirect` may change.
fn state(at: &Namespace) -> String {
    at.run("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; nft list ruleset")
}

async fn reason(sidecar: &TransparentSidecar<'_>) -> String {
    sidecar.ready().await.1["reason"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn without_the_rules_no_connection_is_made_and_everybody_says_why() {
    let names = ["other", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::Both, &names, PERMISSIVE).await else { return };
    let machine = mesh.at("catalog");
    let before = state(machine);
    let mut catalog = mesh.start_sidecar(machine, "catalog", &["--keep-source-address"]);
    catalog.redirect();
    catalog.process.address("health").await;
    let application = catalog.application("catalog", 8080);
    let address = SocketAddr::new(mesh.address("catalog"), 8080).to_string();
    eventually("not ready for want of the rules", async || (reason(&catalog).await == "no_way_back").then_some(()))
        .await;
    let answer = get(mesh.at("other"), &address, "/hello").await;
    assert_eq!((answer.status, &*answer.reason()), (503, "not_ready"), "{}", answer.text());
    catalog.process.says("what the application answers would not come back; run `redirect apply").await;
    assert_eq!(
        application.connections(),
        0,
        "it would have seen a wrong address, or a client the answer of a stranger"
    );

    let apply = || assert_eq!(catalog.redirect_command(&KEEP).0, 0);
    let check = || catalog.redirect_command(&["check"]);
    apply();
    let once = state(machine);
    apply();
    assert_eq!(state(machine), once, "twice is once");
    catalog.is_ready().await;
    assert_eq!(check().0, 0, "{}", check().1);
    for missing in [
        "ip rule del priority 15006",
        "ip route flush table 15006",
        "ip -6 rule del priority 15006",
        "ip -6 route flush table 15006",
        "nft flush chain inet outrigger kept_source_back",
    ] {
        machine.run(missing);
        let (code, said) = check();
        assert_eq!(code, 3, "{missing}: {said}");
        assert!(said.contains("redirect apply --keep-source-address"), "{missing}: {said}");
        apply();
        assert_eq!(check().0, 0, "{missing}");
        assert_eq!(state(machine), once, "{missing}");
    }
    catalog.is_ready().await;
    assert_eq!(get(mesh.at("other"), &address, "/hello").await.status, 200);
    assert_eq!(seen(&application), mesh.address("other"));

    // The next sidecar finds the rules as they were, and what they were goes as a whole.
    catalog.process.signal("TERM");
    catalog.process.wait(outrigger_tests::PATIENCE).await;
    assert_eq!(state(machine), once);
    let mut again = mesh.start_sidecar(machine, "catalog", &["--keep-source-address"]);
    again.process.ready().await;
    assert_eq!(get(mesh.at("other"), &address, "/hello").await.status, 200);
    again.redirect();
    assert!(!state(machine).contains("15006 lookup") && !state(machine).contains("table 15006"), "{}", state(machine));
    assert_eq!(again.redirect_command(&KEEP).0, 0);
    assert_eq!(again.redirect_command(&["remove"]).0, 0);
    assert_eq!(state(machine), before);
}

#[tokio::test]
async fn without_the_right_it_ends_at_once_and_says_what_to_do() {
    if !installed(&["setpriv"]) {
        return;
    }
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &["catalog"], PERMISSIVE).await else {
        return;
    };
    let machine = mesh.at("catalog");
    let run = mesh.sidecar_command(machine, "catalog");
    let mut without_right = machine.command("setpriv");
    without_right.args(["--bounding-set=-all", "--inh-caps=-all", "--"]).arg(run.get_program()).args(run.get_args());
    let output = without_right.arg("--keep-source-address").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--keep-source-address") && said.contains("CAP_NET_ADMIN"), "{said}");
}

#[tokio::test]
async fn another_user_than_root_needs_that_one_right_alone() {
    if only_root() {
        return eprintln!("another_user_than_root DID NOT RUN: there is no other user than root here");
    }
    if !installed(&["setpriv"]) {
        return;
    }
    let names = ["other", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), Families::V4, &names, PERMISSIVE).await else { return };
    let flags = ["--keep-source-address"];
    let mut catalog = mesh.start_sidecar_with_net_admin(1337, mesh.at("catalog"), "catalog", &flags);
    let (code, said) = catalog.redirect_command(&["apply", "--keep-source-address"]);
    assert_eq!(code, 0, "{said}");
    catalog.process.ready().await;
    catalog.is_ready().await;
    let application = catalog.application("catalog", 8080);
    let address = SocketAddr::new(mesh.address("catalog"), 8080).to_string();
    assert_eq!(get(mesh.at("other"), &address, "/hello").await.status, 200);
    assert_eq!(seen(&application), mesh.address("other"));
    let (code, said) = catalog.redirect_command(&["check"]);
    assert_eq!(code, 0, "{said}");
}

/// The rules by iptables, of the kind of this machine; the path of the script.
fn by_iptables(at: &Namespace) -> String {
    let mut print = command(under_test!(), Program::Sidecar);
    print.args(["redirect", "print", "--iptables", "--mark", MARK, "--keep-source-address"]);
    let output = print.output().unwrap();
    assert!(output.status.success());
    let file = at.directory().join("outrigger.sh");
    std::fs::write(&file, output.stdout).unwrap();
    at.run(&format!("nft delete table inet outrigger; sh {}", file.display()));
    format!("sh {}", file.display())
}

async fn nobody_gets_into_such_a_connection(families: Families, with_iptables: bool) {
    let names = ["other", "catalog"];
    let Some(mesh) = TransparentMesh::start(under_test!(), families, &names, PERMISSIVE).await else { return };
    let (machine, other) = (mesh.at("catalog"), mesh.at("other"));
    let before = state(machine);
    let catalog = mesh.sidecar_that_keeps_source("catalog", "catalog", &[]).await;
    let script = if with_iptables { Some(by_iptables(machine)) } else { None };
    let address = SocketAddr::new(mesh.address("catalog"), 8081);
    let server = Backend::from(machine.listen(address));
    let mut client = other.connect(address).await;
    client.send("\x01begin\n").await;
    let mut accepted = server.accept().await;
    assert_eq!(accepted.take(7).await, b"\x01begin\n");
    let peer = accepted.tcp().peer_addr().unwrap();
    assert_eq!(peer.ip(), own(other, families));

    // The client writes by itself into what was made in its name: it cannot see the numbers, and need not guess them here.
    let raw = RawTcp::open(other, peer, address);
    for flags in [RST, RST | ACK, ACK | PSH] {
        raw.send(&Segment { payload: b"forged".to_vec(), ack: 7, ..Segment::of(flags) });
    }
    let drops = if with_iptables {
        "for it in iptables ip6tables; do $it -t mangle -v -S OUTRIGGER_BYPASS_IN; done | grep -e INVALID | grep -v -e '-c 0 0' || :"
    } else {
        "nft list chain inet outrigger bypass_inbound | grep invalid | grep -v 'packets 0 ' || :"
    };
    eventually("the resets are dropped and counted", async || (!machine.run(drops).is_empty()).then_some(())).await;
    client.send("end").await;
    assert_eq!(accepted.take(3).await, b"end");

    // Another one of that very client's ports, made by hand: the sidecar may come to the same.
    let socket = machine.socket(address.ip());
    SockRef::from(&socket).set_mark(15006).unwrap();
    let transparent = SockRef::from(&socket);
    match address {
        SocketAddr::V4(_) => transparent.set_ip_transparent_v4(true).unwrap(),
        SocketAddr::V6(_) => transparent.set_ip_transparent_v6(true).unwrap(),
    }
    let clients_own = client.tcp().local_addr().unwrap();
    socket.bind(clients_own).unwrap();
    let (connected, same) = tokio::join!(socket.connect(address), server.accept());
    connected.unwrap();
    assert_eq!(same.tcp().peer_addr().unwrap(), clients_own);
    client.send("on").await;
    assert_eq!(accepted.take(2).await, b"on");

    if let Some(script) = script {
        let (code, said) = catalog.redirect_command(&["check"]);
        assert_eq!(code, 0, "{said}");
        machine.run(&format!("{script} apply; {script} remove"));
        let rules = machine.run("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all");
        assert!(before.starts_with(&rules), "{rules}");
        let left = machine.run("iptables-save; ip6tables-save");
        assert!(!left.contains("OUTRIGGER"), "{left}");
    }
}

#[tokio::test]
async fn nobody_gets_into_such_a_connection_with_nftables() {
    if installed(&["nft", "ip"]) {
        nobody_gets_into_such_a_connection(Families::V4, false).await;
        nobody_gets_into_such_a_connection(Families::V6, false).await;
    }
}

#[tokio::test]
async fn nobody_gets_into_such_a_connection_with_iptables() {
    if installed(&["iptables", "ip6tables", "ip"]) {
        nobody_gets_into_such_a_connection(Families::V4, true).await;
        nobody_gets_into_such_a_connection(Families::V6, true).await;
    }
}
