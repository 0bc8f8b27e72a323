//! Promise: the script of `redirect print --iptables` does with iptables, of either kind, what `apply` does with nftables:
//! both directions and families, own connections and excludes, twice as once, and `remove` takes away exactly ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use outrigger_sidecar::redirect;
use outrigger_tests::namespace::installed;
use outrigger_tests::process::{Program, command};
use outrigger_tests::stand_in::{self, ask, ask_marked};
use outrigger_tests::{Namespace, Network, under_test};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

/// Prints the script for these flags into a file of that machine.
fn script(at: &Namespace, flags: &str) -> String {
    let mut print = command(under_test!(), Program::Sidecar);
    let output = print.args(["redirect", "print", "--iptables"]).args(flags.split_whitespace()).output().unwrap();
    assert!(output.status.success());
    let file = at.directory().join("outrigger.sh");
    std::fs::write(&file, output.stdout).unwrap();
    format!("sh {}", file.display())
}

/// Makes `kind` (`nft` or `legacy`) what iptables means in these scripts; both come with the package.
fn kind(at: &Namespace, kind: &str) -> String {
    let bin = at.directory().join(kind);
    std::fs::create_dir(&bin).unwrap();
    for name in ["iptables", "iptables-restore", "iptables-save", "ip6tables", "ip6tables-restore", "ip6tables-save"] {
        let real = name.replacen("tables", &format!("tables-{kind}"), 1);
        let found = at.run(&format!("command -v {real}"));
        std::os::unix::fs::symlink(found.trim(), bin.join(name)).unwrap();
    }
    // The legacy kind's lock is one for all network namespaces.
    at.run("touch /run/xtables.lock");
    at.file("/run/xtables.lock", "");
    format!("export PATH={}:$PATH; ", bin.display())
}

async fn check(at: &Namespace) -> Option<i32> {
    let mut check = command(under_test!(), Program::Sidecar);
    check.args(["redirect", "check"]);
    let mut inside = at.inside(&check);
    tokio::task::spawn_blocking(move || inside.output()).await.unwrap().unwrap().status.code()
}

/// Answers `redirect check` as a sidecar does.
fn answering(at: &Namespace, loopback: IpAddr) -> JoinHandle<()> {
    let (outbound, inbound) = (at.listen((loopback, 15001).into()), at.listen((loopback, 15006).into()));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = outbound.accept() => accepted,
                accepted = inbound.accept() => accepted,
            };
            let Ok((mut stream, _)) = accepted else { return };
            let socket = socket2::SockRef::from(&stream);
            let original = if loopback.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
            let said = redirect::answer(original.unwrap().as_socket().unwrap());
            let _ = stream.write_all(said.as_bytes()).await;
        }
    })
}

#[tokio::test]
async fn the_script_redirects_and_undoes_it() {
    if !installed(&["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"]) {
        return;
    }
    for which in ["nft", "legacy"] {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let mut sidecars = (stand_in::sidecar(web), stand_in::sidecar(catalog));
        let _server = stand_in::server(catalog, "catalog", &[80, 5432, 9100, 15020]);
        let path = kind(web, which);
        let saved = || {
            web.run(&format!(
                "{path} iptables-save | grep -v ^# | sed 's/ \\[.*//'; ip6tables-save | grep -v ^# | sed 's/ \\[.*//'"
            ))
        };
        web.run(&format!(
            "{path} iptables -t nat -A OUTPUT -p tcp --dport 9 -j REDIRECT --to-ports 10; ip6tables -t nat -N THEIRS"
        ));
        // Tables that were used once stay, empty.
        let used =
            "for it in iptables ip6tables; do for t in mangle filter; do $it -t $t -N X; $it -t $t -X X; done; done";
        web.run(&format!("{path} {used}"));
        let before = saved();
        let flags = "--mark 7 --exclude-outbound-ports 5432 --exclude-cidrs 198.51.100.0/24,2001:db8::/32 --dns";
        let routes = || web.run("ip route show table local; ip -6 route show table local");
        let no_routes = routes();
        let run = script(web, flags);
        web.run(&format!("{path} {run} remove"));
        assert_eq!(saved(), before, "{which}: nothing to remove is no mistake");
        web.run(&format!("{path} {run}"));
        let once = saved();
        assert_ne!(once, before);
        web.run(&format!("{path} {run} apply"));
        assert_eq!(saved(), once, "{which}: twice is once");

        for address in ["240.240.0.9:80", "[fd3a:94e7:c15b::9]:80"].map(|text| text.parse().unwrap()) {
            assert_eq!(ask(web, address).await.unwrap(), format!("outbound {address}"), "{which}: a virtual address");
        }
        let run_without = script(web, "--mark 7");
        web.run(&format!("{path} {run_without}"));
        assert_eq!(routes(), no_routes, "{which}: no names, no routes");
        let run = script(web, flags);
        web.run(&format!("{path} {run}"));
        assert_ne!(routes(), no_routes);

        let path_there = kind(catalog, which);
        let run_there = script(catalog, "--exclude-inbound-ports 9100");
        catalog.run(&format!("{path_there} {run_there}"));
        for ip in catalog.addresses() {
            let to = |port| SocketAddr::new(ip, port);
            let hub = network.hub();
            let outcome = [
                (ask(web, to(80)).await, format!("outbound {}", to(80))),
                (ask_marked(web, to(80), 7).await, format!("inbound {}", to(80))),
                (ask(web, to(5432)).await, format!("inbound {}", to(5432))),
                (ask(hub, to(9100)).await, format!("catalog {}", to(9100))),
                (ask(hub, to(15020)).await, format!("catalog {}", to(15020))),
                (ask(hub, to(81)).await, format!("inbound {}", to(81))),
                (ask(catalog, to(80)).await, format!("catalog {}", to(80))),
            ];
            for (said, expected) in outcome {
                assert_eq!(said.unwrap(), expected, "{which}");
            }
            let beyond: IpAddr = if ip.is_ipv4() { "198.51.100.1" } else { "2001:db8::1" }.parse().unwrap();
            assert!(ask(web, (beyond, 80).into()).await.is_err(), "{which}: excluded, and nobody is there");
        }

        // The check does not care who made the rules.
        assert_eq!(check(web).await, Some(4), "{which}: the stand-in is no sidecar");
        sidecars.0.shutdown().await;
        let _answering = (answering(web, Ipv4Addr::LOCALHOST.into()), answering(web, Ipv6Addr::LOCALHOST.into()));
        assert_eq!(check(web).await, Some(0), "{which}");
        for missing in [
            "-t nat -F OUTRIGGER_OUTBOUND",
            "-t nat -F OUTRIGGER_INBOUND",
            "-t nat -D PREROUTING -j OUTRIGGER_INBOUND",
            "-t nat -F PREROUTING",
            "-t mangle -D INPUT -j OUTRIGGER_BYPASS_IN",
            "-t mangle -F OUTRIGGER_BYPASS_IN",
            "-t filter -F OUTRIGGER_BYPASS_OUT",
        ] {
            for program in ["iptables", "ip6tables"] {
                web.run(&format!("{path} {program} {missing}"));
                assert_eq!(check(web).await, Some(3), "{which}: {program} {missing}");
                web.run(&format!("{path} {run}"));
            }
        }
        assert_eq!(check(web).await, Some(0), "{which}");
        web.run(&format!("{path} {run} remove"));
        assert_eq!((saved(), routes()), (before, no_routes), "{which}");
        assert_eq!(check(web).await, Some(3), "{which}");
        assert!(web.try_run(&format!("{path} {run} aply")).unwrap_err().contains("usage"));
    }
}
