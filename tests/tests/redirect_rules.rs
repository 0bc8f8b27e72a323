//! Promise: `redirect apply` brings to the sidecar what the application opens and what others open to it, in IPv4 and
//! IPv6, with the original destination; the sidecar's own connections, loopback and what is excluded go where they went.
//! Applied twice is once, `remove` undoes exactly ours, and connections that are there go on.

use std::net::{IpAddr, SocketAddr};

use outrigger_tests::eventually::soon;
use outrigger_tests::namespace::{Families, installed, only_root};
use outrigger_tests::process::{Program, command};
use outrigger_tests::stand_in::{self, ask, ask_as, ask_marked};
use outrigger_tests::{Namespace, Network, under_test};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Runs `redirect LINE` there: exit code, stdout, stderr.
fn redirect(at: &Namespace, line: &str) -> (i32, String, String) {
    let mut outside = command(under_test!(), Program::Sidecar);
    outside.arg("redirect").args(line.split_whitespace());
    let output = at.inside(&outside).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("ended by itself"), text(output.stdout), text(output.stderr))
}

fn apply(at: &Namespace, flags: &str) {
    let (code, _, stderr) = redirect(at, &format!("apply {flags}"));
    assert_eq!((code, stderr.as_str()), (0, ""), "{flags}");
}

fn to(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

async fn said(from: &Namespace, address: SocketAddr) -> String {
    ask(from, address).await.unwrap_or_else(|error| format!("{address}: {error}"))
}

#[tokio::test]
async fn what_the_application_opens_goes_to_the_sidecar_and_the_sidecars_own_does_not() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "catalog"]) else { return };
    let (web, catalog) = (network.at("web"), network.at("catalog"));
    let _sidecar = stand_in::sidecar(web);
    let _server = stand_in::server(catalog, "catalog", &[80]);
    let _own = stand_in::server(web, "web", &[80]);
    for ip in catalog.addresses() {
        assert_eq!(said(web, to(ip, 80)).await, format!("catalog {}", to(ip, 80)), "before the rules");
    }
    apply(web, "");
    for ip in catalog.addresses() {
        assert_eq!(said(web, to(ip, 80)).await, format!("outbound {}", to(ip, 80)));
        // Nobody listens there; only the sidecar can find out.
        assert_eq!(said(web, to(ip, 81)).await, format!("outbound {}", to(ip, 81)));
    }
    // A clusterIP is nobody's address.
    for address in ["10.96.0.10:80", "[fd96::10]:80"] {
        assert_eq!(said(web, address.parse().unwrap()).await, format!("outbound {address}"));
    }
    for ip in ["127.0.0.1", "127.8.9.10", "::1"].map(|ip| ip.parse().unwrap()).into_iter().chain(web.addresses()) {
        assert_eq!(said(web, to(ip, 80)).await, format!("web {}", to(ip, 80)), "stays on this machine");
    }
    if !only_root() {
        for (uid, who) in [(1337, "catalog"), (1336, "outbound")] {
            for ip in catalog.addresses() {
                let said = ask_as(uid, web, to(ip, 80)).await.unwrap();
                assert_eq!(said, format!("{who} {}", to(ip, 80)), "uid {uid}");
            }
        }
        apply(web, "--uid 1336");
        assert!(ask_as(1336, web, to(catalog.v4().into(), 80)).await.unwrap().starts_with("catalog "));
        assert!(ask_as(1337, web, to(catalog.v4().into(), 80)).await.unwrap().starts_with("outbound "));
    }
}

#[tokio::test]
async fn by_mark_where_all_run_as_one_user() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "catalog"]) else { return };
    let (web, catalog) = (network.at("web"), network.at("catalog"));
    let _sidecar = stand_in::sidecar(web);
    let _server = stand_in::server(catalog, "catalog", &[80]);
    apply(web, "--mark 4711");
    for ip in catalog.addresses() {
        assert_eq!(said(web, to(ip, 80)).await, format!("outbound {}", to(ip, 80)));
        for (mark, who) in [(4711, "catalog"), (4712, "outbound"), (1337, "outbound")] {
            let said = ask_marked(web, to(ip, 80), mark).await.unwrap();
            assert_eq!(said, format!("{who} {}", to(ip, 80)), "mark {mark}");
        }
    }
}

/// `unshare -Urnm` makes whoever calls it root of a world with one user.
#[tokio::test]
async fn by_mark_inside_a_user_namespace() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    if Namespace::lone().is_none() {
        return;
    }
    let mut inside = std::process::Command::new("unshare");
    inside.args(["-Urnm", "--"]).arg(std::env::current_exe().unwrap());
    inside.args(["--exact", "by_mark_where_all_run_as_one_user"]).env("OUTRIGGER_REQUIRE", "netns");
    let output = tokio::task::spawn_blocking(move || inside.output()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
async fn what_others_open_goes_to_the_sidecar_but_for_its_own_ports() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "catalog"]) else { return };
    let (web, catalog) = (network.at("web"), network.at("catalog"));
    let _sidecar = stand_in::sidecar(catalog);
    let _server = stand_in::server(catalog, "catalog", &[80, 15020, 15021]);
    apply(catalog, "");
    for ip in catalog.addresses() {
        for port in [80, 81, 15000, 15001, 15006] {
            assert_eq!(said(web, to(ip, port)).await, format!("inbound {}", to(ip, port)));
        }
        for port in [15020, 15021] {
            assert_eq!(said(web, to(ip, port)).await, format!("catalog {}", to(ip, port)));
        }
        assert_eq!(said(catalog, to(ip, 80)).await, format!("catalog {}", to(ip, 80)), "never left the machine");
    }
}

#[tokio::test]
async fn what_is_excluded_goes_where_it_went() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "catalog", "stock"]) else { return };
    let (web, catalog, stock) = (network.at("web"), network.at("catalog"), network.at("stock"));
    let _sidecars = (stand_in::sidecar(web), stand_in::sidecar(catalog));
    let _servers = (stand_in::server(catalog, "catalog", &[80, 5432, 9100]), stand_in::server(stock, "stock", &[80]));
    apply(web, &format!("--exclude-outbound-ports 5432,5433 --exclude-cidrs {}/32,{}", stock.v4(), stock.v6()));
    apply(
        catalog,
        &format!("--exclude-inbound-ports=9100 --exclude-cidrs {}/32 --exclude-cidrs {}", stock.v4(), stock.v6()),
    );
    for ip in catalog.addresses() {
        // Out through web's rules, in through catalog's.
        assert_eq!(said(web, to(ip, 5432)).await, format!("inbound {}", to(ip, 5432)));
        assert_eq!(said(web, to(ip, 80)).await, format!("outbound {}", to(ip, 80)));
        assert_eq!(said(stock, to(ip, 80)).await, format!("catalog {}", to(ip, 80)), "source excluded");
        assert_eq!(said(network.hub(), to(ip, 9100)).await, format!("catalog {}", to(ip, 9100)));
        assert_eq!(said(network.hub(), to(ip, 80)).await, format!("inbound {}", to(ip, 80)));
    }
    for ip in stock.addresses() {
        assert_eq!(said(web, to(ip, 80)).await, format!("stock {}", to(ip, 80)), "destination excluded");
    }
    if !only_root() {
        apply(stock, "--exclude-uids 1000,1001");
        let _sidecar = (stand_in::sidecar(stock), stand_in::server(web, "web", &[80]));
        for (uid, who) in [(1000, "web"), (1001, "web"), (1002, "outbound"), (1337, "web")] {
            let said = ask_as(uid, stock, to(web.v4().into(), 80)).await;
            // Web excludes this source.
            assert_eq!(said.unwrap(), format!("{who} {}", to(web.v4().into(), 80)), "uid {uid}");
        }
    }
}

#[tokio::test]
async fn a_namespace_that_has_one_family_only() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    for families in [Families::V6, Families::V4] {
        let Some(network) = Network::with(families, &["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let _sidecars = (stand_in::sidecar(web), stand_in::sidecar(catalog));
        apply(web, "");
        apply(catalog, "");
        let ip = catalog.addresses()[usize::from(families == Families::V6)];
        assert_eq!(said(web, to(ip, 80)).await, format!("outbound {}", to(ip, 80)));
        assert_eq!(said(network.hub(), to(ip, 80)).await, format!("inbound {}", to(ip, 80)));
    }
}

#[tokio::test]
async fn what_a_machine_forwards_for_others_is_left_alone() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "router"]) else { return };
    let (web, router) = (network.at("web"), network.at("router"));
    let _sidecar = stand_in::sidecar(router);
    let _server = stand_in::server(network.hub(), "far", &[80]);
    network.hub().run("ip addr add 198.51.100.1/32 dev link0; ip -6 addr add 2001:db8::1/128 dev link0 nodad");
    router.run("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding");
    web.run(&format!("ip route add 198.51.100.1 via {}; ip -6 route add 2001:db8::1 via {}", router.v4(), router.v6()));
    apply(router, "");
    for address in ["198.51.100.1:80", "[2001:db8::1]:80"] {
        assert_eq!(said(web, address.parse().unwrap()).await, format!("far {address}"));
    }
    for ip in router.addresses() {
        assert_eq!(said(web, to(ip, 80)).await, format!("inbound {}", to(ip, 80)));
    }
}

#[tokio::test]
async fn questions_about_names_go_to_the_resolver_only_when_asked_for() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web"]) else { return };
    let web = network.at("web");
    let _sidecar = stand_in::sidecar(web);
    let _tcp = stand_in::server(web, "resolver", &[15053]);
    let mut resolvers = Vec::new();
    for ip in ["127.0.0.1", "::1"] {
        let socket = web.enter(|| std::net::UdpSocket::bind((ip, 15053)).unwrap());
        socket.set_nonblocking(true).unwrap();
        let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
        resolvers.push(tokio::spawn(async move {
            let mut question = [0; 64];
            while let Ok((count, from)) = socket.recv_from(&mut question).await {
                socket.send_to(&question[..count], from).await.unwrap();
            }
        }));
    }
    let servers =
        ["10.96.0.10:53", "127.0.0.53:53", "[fd96::10]:53", "[::1]:53"].map(|it| it.parse::<SocketAddr>().unwrap());
    apply(web, "");
    assert_eq!(said(web, servers[0]).await, format!("outbound {}", servers[0]));
    assert!(ask(web, servers[1]).await.is_err(), "nobody listens there");
    apply(web, "--dns --mark 7");
    for server in servers {
        assert_eq!(said(web, server).await, format!("resolver {server}"), "TCP");
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = web.enter(|| std::net::UdpSocket::bind(any).unwrap());
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(outrigger_tests::PATIENCE)).unwrap();
        // Bytes of a server's own address come back: the client sees no other.
        let answer = tokio::task::spawn_blocking(move || {
            socket.send(b"who is catalog.shop?").unwrap();
            let mut answer = [0; 64];
            socket.recv(&mut answer).map(|count| answer[..count].to_vec())
        });
        assert_eq!(answer.await.unwrap().unwrap(), b"who is catalog.shop?", "UDP {server}");
    }
    // The resolver's own questions go out, to where there is nothing.
    assert!(ask_marked(web, servers[0], 7).await.is_err());
}

#[tokio::test]
async fn twice_is_once_and_remove_undoes_exactly_ours() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(namespace) = Namespace::lone() else { return };
    let rules = || namespace.run("nft list ruleset");
    namespace.run(
        "nft -f - <<'X'\ntable ip nat {\nchain output {\ntype nat hook output priority -100; policy accept;\ntcp dport 9 \
         counter redirect to :10\n}\n}\ntable inet outrigger_of_somebody_else {\n}\nX",
    );
    let before = rules();
    assert_eq!(redirect(&namespace, "remove").0, 0, "nothing to remove is no mistake");
    assert_eq!(rules(), before);
    let flags = "--exclude-inbound-ports 22,9100 --exclude-cidrs 10.0.0.0/8,10.1.0.0/16,fd00::/8 --dns --uid 5";
    apply(&namespace, flags);
    let once = rules();
    apply(&namespace, flags);
    assert_eq!(rules(), once);
    assert!(once.starts_with(&before), "{once}");
    // What a crash, or an older version, may have left.
    namespace.run("nft add chain inet outrigger left_over; nft flush chain inet outrigger inbound");
    apply(&namespace, flags);
    assert_eq!(rules(), once);
    apply(&namespace, "");
    assert_ne!(rules(), once);
    let (code, _, stderr) = redirect(&namespace, &format!("remove {flags}"));
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(rules(), before);
}

#[tokio::test]
async fn print_shows_what_apply_does_and_changes_nothing() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(namespace) = Namespace::lone() else { return };
    let flags = "--exclude-uids 3 --exclude-cidrs 0.0.0.0/0,::/0 --mark 9";
    let (code, script, stderr) = redirect(&namespace, &format!("print {flags}"));
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(namespace.run("nft list ruleset"), "");
    namespace.run(&format!("nft -f - <<'X'\n{script}X"));
    let by_hand = namespace.run("nft list ruleset");
    namespace.run("nft flush ruleset");
    apply(&namespace, flags);
    assert_eq!(namespace.run("nft list ruleset"), by_hand);
}

#[tokio::test]
async fn connections_that_are_there_go_on() {
    if !installed(&["nft", "curl"]) {
        return;
    }
    let Some(network) = Network::new(&["web", "catalog"]) else { return };
    let (web, catalog) = (network.at("web"), network.at("catalog"));
    for ip in catalog.addresses() {
        let listener = catalog.listen(to(ip, 80));
        let (plain, accepted) = tokio::join!(web.connect(to(ip, 80)), listener.accept());
        let mut pairs = vec![(plain.into_tcp(), accepted.unwrap().0)];
        exchange(&mut pairs).await;
        apply(web, "");
        apply(catalog, "");
        exchange(&mut pairs).await;
        let own = if ip.is_ipv4() { "127.0.0.1:15001" } else { "[::1]:15001" };
        let sidecar = web.listen(own.parse().unwrap());
        let (redirected, accepted) = tokio::join!(web.connect(to(ip, 80)), sidecar.accept());
        pairs.push((redirected.into_tcp(), accepted.unwrap().0));
        exchange(&mut pairs).await;
        apply(web, "--mark 3");
        apply(catalog, "--mark 3");
        exchange(&mut pairs).await;
        for at in [web, catalog] {
            assert_eq!(redirect(at, "remove").0, 0);
        }
        // Those that were never redirected at least.
        pairs.truncate(1);
        exchange(&mut pairs).await;
    }
}

async fn exchange(pairs: &mut [(TcpStream, TcpStream)]) {
    for (near, far) in pairs {
        one_way(near, far).await;
        one_way(far, near).await;
    }
}

async fn one_way(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"ping").await.unwrap();
    let mut heard = [0; 4];
    soon("the bytes of a connection that was there", to.read_exact(&mut heard)).await.expect("it goes on");
}
