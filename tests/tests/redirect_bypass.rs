//! Promise: under the redirect rules no connection gets past the sidecar, whatever packets come before it, in either direction
//! and family, with nftables and with iptables: it goes to the sidecar, or it is dropped and counted. What is excluded,
//! loopback and what the sidecar opens go where they went.

use std::net::{IpAddr, SocketAddr};

use outrigger_tests::eventually::eventually;
use outrigger_tests::namespace::installed;
use outrigger_tests::process::{Program, command};
use outrigger_tests::raw_tcp::{ACK, FIN, PSH, RST, RawTcp, SYN, Segment, silence_resets};
use outrigger_tests::stand_in::{self, ask, ask_marked};
use outrigger_tests::{Namespace, Network, under_test};
use socket2::SockRef;
use tokio::io::AsyncReadExt;

/// Who makes the rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rules {
    Nftables,
    Iptables,
}

impl Rules {
    const BOTH: [Rules; 2] = [Rules::Nftables, Rules::Iptables];

    fn apply(self, at: &Namespace, flags: &str) {
        let mut redirect = command(under_test!(), Program::Sidecar);
        match self {
            Rules::Nftables => {
                redirect.args(["redirect", "apply"]).args(flags.split_whitespace());
                let output = at.inside(&redirect).output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            Rules::Iptables => {
                redirect.args(["redirect", "print", "--iptables"]).args(flags.split_whitespace());
                let script = redirect.output().unwrap();
                assert!(script.status.success());
                let file = at.directory().join("outrigger.sh");
                std::fs::write(&file, script.stdout).unwrap();
                at.run(&format!("sh {}", file.display()));
            }
        }
    }

    /// Packets that were dropped: inbound, outbound.
    fn dropped(self, at: &Namespace) -> [u64; 2] {
        let first_number = |text: &str, behind: &str| -> u64 {
            let count = |line: &str| line.split_once(behind)?.1.split_whitespace().next()?.parse::<u64>().ok();
            text.lines().filter_map(count).sum()
        };
        match self {
            Rules::Nftables => ["bypass_inbound", "bypass_outbound"].map(|chain| {
                first_number(
                    &at.try_run(&format!("nft list chain inet outrigger {chain}")).unwrap_or_default(),
                    "counter packets ",
                )
            }),
            Rules::Iptables => {
                [("mangle", "OUTRIGGER_BYPASS_IN"), ("filter", "OUTRIGGER_BYPASS_OUT")].map(|(table, chain)| {
                    let both =
                        at.try_run(&format!("for it in iptables ip6tables; do $it -t {table} -v -S {chain}; done"));
                    let both = both.unwrap_or_default();
                    let drops: Vec<&str> =
                        both.lines().filter(|rule| rule.ends_with("-j DROP") && !rule.contains("--dport")).collect();
                    drops.iter().map(|rule| first_number(rule, " -c ")).sum()
                })
            }
        }
    }
}

const TOOLS: [&str; 3] = ["nft", "iptables-nft", "ip6tables-nft"];

fn to(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// Connects from this port and gives what was said; none when the packets of the attempt were dropped and counted.
async fn connects(
    rules: Rules,
    watch: (&Namespace, usize),
    from: &Namespace,
    own: SocketAddr,
    to: SocketAddr,
) -> Option<String> {
    let (at, which) = watch;
    let before = rules.dropped(at)[which];
    let socket = from.socket(to.ip());
    SockRef::from(&socket).set_reuse_address(true).unwrap();
    socket.bind(own).unwrap();
    let asking = async {
        let mut stream = socket.connect(to).await.ok()?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await.ok()?;
        Some(said.trim_end().to_owned())
    };
    let counted = eventually("the drop is counted, or the sidecar answers", async || {
        (rules.dropped(at)[which] > before).then_some(())
    });
    tokio::select! {
        said = asking => said,
        () = counted => None,
    }
}

#[tokio::test]
async fn no_stray_packet_makes_way_for_a_connection_that_comes_in() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let _sidecar = stand_in::sidecar(catalog);
        let _server = stand_in::server(catalog, "catalog", &[80]);
        rules.apply(catalog, "");
        let strays = [
            Segment { md5: true, ack: 7, ..Segment::of(ACK) },
            Segment { md5: true, ack: 7, payload: b"GET / HTTP/1.1\r\n\r\n".to_vec(), ..Segment::of(ACK | PSH) },
            Segment { md5: true, ..Segment::of(SYN | ACK) },
            Segment { md5: true, ..Segment::of(RST) },
            Segment { md5: true, ..Segment::of(RST | ACK) },
            Segment { md5: true, ..Segment::of(FIN) },
            Segment { md5: true, ..Segment::of(FIN | ACK) },
            Segment { md5: true, ..Segment::of(SYN | FIN) },
            Segment { md5: true, ..Segment::of(SYN) },
            Segment { md5: true, ..Segment::of(0) },
            Segment { ack: 7, ..Segment::of(ACK) },
        ];
        let mut port = 40_000;
        for loose in [1, 0] {
            catalog.run(&format!("echo {loose} >/proc/sys/net/netfilter/nf_conntrack_tcp_loose"));
            for (from, at) in web.addresses().into_iter().zip(catalog.addresses()) {
                for (index, stray) in strays.iter().enumerate() {
                    port += 1;
                    let (own, there) = (to(from, port), to(at, 80));
                    let raw = RawTcp::open(web, own, there);
                    raw.send(stray);
                    let said = connects(rules, (catalog, 0), web, own, there).await;
                    let sidecar = format!("inbound {there}");
                    assert!(
                        said.as_ref().is_none_or(|said| *said == sidecar),
                        "{rules:?}, {index}: {stray:?}: {said:?}"
                    );
                    // Those that are known to make an entry without a redirect.
                    assert!(said.is_none() || loose == 0 || index >= 2, "{rules:?}, {index}: {stray:?}: {said:?}");
                    let whole = ask(web, there).await.unwrap();
                    assert_eq!(whole, sidecar, "others are served");
                }
            }
        }
    }
}

#[tokio::test]
async fn no_stray_packet_makes_way_for_a_connection_that_goes_out() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let _sidecar = stand_in::sidecar(web);
        let _server = stand_in::server(catalog, "catalog", &[80]);
        rules.apply(web, "--mark 7");
        for (from, at) in web.addresses().into_iter().zip(catalog.addresses()) {
            let (own, there) = (to(from, 41_000), to(at, 80));
            let raw = RawTcp::open(web, own, there);
            raw.send(&Segment { md5: true, ack: 7, ..Segment::of(ACK) });
            let said = connects(rules, (web, 1), web, own, there).await;
            assert_eq!(said, None, "{rules:?} {there}");
            assert_eq!(ask(web, there).await.unwrap(), format!("outbound {there}"), "others go to the sidecar");
            let before = rules.dropped(web);
            assert_eq!(
                ask_marked(web, there, 7).await.unwrap(),
                format!("catalog {there}"),
                "the sidecar's own go out"
            );
            assert_eq!(rules.dropped(web), before, "and are not counted");
        }
        // In pieces that are not put together here: none of them leaves. Those of IPv6 are put together.
        let (own, there) = (to(web.v4().into(), 41_001), to(catalog.v4().into(), 80));
        let raw = RawTcp::open(web, own, there);
        for (pieces, least) in [(0..3, 2), (1..3, 2)] {
            let before = rules.dropped(web)[1];
            raw.send_pieces(&Segment::of(SYN), |piece| pieces.contains(&piece));
            eventually("the pieces are dropped", async || (rules.dropped(web)[1] >= before + least).then_some(()))
                .await;
        }
        let raw = RawTcp::open(web, to(web.v6().into(), 41_001), to(catalog.v6().into(), 80));
        silence_resets(web);
        raw.send(&Segment { md5: true, ack: 7, ..Segment::of(ACK) });
        let before = rules.dropped(web)[1];
        raw.send_in_pieces(&Segment::of(SYN));
        eventually("a SYN in pieces is dropped", async || (rules.dropped(web)[1] > before).then_some(())).await;
    }
}

/// A SYN in pieces is one: put together it goes where a whole one goes.
#[tokio::test]
async fn pieces_that_come_in_are_put_together_first() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let _sidecar = stand_in::sidecar(catalog);
        let _server = stand_in::server(catalog, "catalog", &[80]);
        rules.apply(catalog, "");
        silence_resets(web);
        for (from, at) in web.addresses().into_iter().zip(catalog.addresses()) {
            let there = to(at, 80);
            let raw = RawTcp::open(web, to(from, 42_000), there);
            raw.send_in_pieces(&Segment::of(SYN));
            assert_eq!(raw.finish().await, format!("inbound {there}"), "{rules:?}");
            let raw = RawTcp::open(web, to(from, 42_001), there);
            raw.send(&Segment { md5: true, ack: 7, ..Segment::of(ACK) });
            let before = rules.dropped(catalog)[0];
            raw.send_in_pieces(&Segment::of(SYN));
            eventually("a SYN in pieces is dropped", async || (rules.dropped(catalog)[0] > before).then_some(())).await;
        }
    }
}

/// Connections from before the rules have entries without a redirect, and their ports are used again.
#[tokio::test]
async fn no_second_connection_on_the_ports_of_one_that_ended() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        catalog
            .run("nft 'add table inet tracking; add chain inet tracking seen { type filter hook input priority 50; }'");
        catalog.run("nft add rule inet tracking seen ct state new counter");
        let _sidecar = stand_in::sidecar(catalog);
        let _server = stand_in::server(catalog, "catalog", &[80]);
        silence_resets(web);
        let mut tuples = Vec::new();
        for (from, at) in web.addresses().into_iter().zip(catalog.addresses()) {
            for port in [43_000, 43_001] {
                let raw = RawTcp::open(web, to(from, port), to(at, 80));
                raw.send(&Segment::of(SYN));
                assert_eq!(raw.finish().await, format!("catalog {}", to(at, 80)), "before the rules");
                tuples.push(raw);
            }
        }
        rules.apply(catalog, "");
        for (index, raw) in tuples.iter().enumerate() {
            let before = rules.dropped(catalog)[0];
            if index % 2 == 1 {
                // Alive again, as connection tracking sees it.
                raw.send(&Segment { md5: true, ack: 7, ..Segment::of(ACK) });
            }
            raw.received();
            raw.send(&Segment::of(SYN));
            let done = eventually("dropped, or the sidecar answers", async || {
                if rules.dropped(catalog)[0] > before {
                    return Some(None);
                }
                raw.received().into_iter().find(|segment| segment.flags & (SYN | ACK) == SYN | ACK).map(Some)
            })
            .await;
            if done.is_some() {
                raw.send(&Segment::of(SYN));
                let said = raw.finish().await;
                assert!(said.starts_with("inbound "), "{rules:?}: {said}");
            }
        }
    }
}

/// A connection that this machine begins, excluded from the redirect, is not turned round by its peer.
#[tokio::test]
async fn no_simultaneous_open() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        rules.apply(catalog, "--exclude-outbound-ports 5432");
        silence_resets(web);
        for (from, at) in web.addresses().into_iter().zip(catalog.addresses()) {
            let (peer, own) = (to(from, 5432), to(at, 44_000));
            let raw = RawTcp::open(web, peer, own);
            let socket = catalog.socket(at);
            socket.bind(own).unwrap();
            let opening = tokio::spawn(socket.connect(peer));
            eventually("its SYN has come", async || {
                raw.received().iter().any(|segment| segment.flags & SYN != 0).then_some(())
            })
            .await;
            let before = rules.dropped(catalog)[0];
            raw.send(&Segment::of(SYN));
            eventually("the SYN is dropped", async || (rules.dropped(catalog)[0] > before).then_some(())).await;
            assert!(raw.received().iter().all(|segment| segment.flags & (SYN | ACK) != SYN | ACK), "{rules:?}");
            assert!(!opening.is_finished());
            opening.abort();
        }
    }
}

/// What others' rules have redirected meanwhile was excluded by the port and the address that were dialled.
#[tokio::test]
async fn what_is_excluded_stays_so_behind_rules_of_others() {
    if !installed(&TOOLS) {
        return;
    }
    for rules in Rules::BOTH {
        let Some(network) = Network::new(&["web", "catalog"]) else { return };
        let (web, catalog) = (network.at("web"), network.at("catalog"));
        let _sidecars = (stand_in::sidecar(catalog), stand_in::sidecar(web));
        let _server = stand_in::server(catalog, "catalog", &[8443, 80]);
        catalog.run(
            "nft -f - <<'X'\ntable inet theirs {\nchain prerouting {\ntype nat hook prerouting priority -90; policy \
             accept;\ntcp dport 443 redirect to :8443\n}\n}\nX",
        );
        let (v4, v6) = (catalog.v4(), catalog.v6());
        web.run(&format!(
            "nft -f - <<'X'\ntable inet theirs {{\nchain output {{\ntype nat hook output priority -90; policy accept;\nip daddr \
             198.51.100.7 dnat ip to {v4}\nip6 daddr 2001:db8::7 dnat ip6 to {v6}\n}}\n}}\nX"
        ));
        rules.apply(catalog, "--exclude-inbound-ports 443,80");
        rules.apply(web, "--exclude-cidrs 198.51.100.0/24,2001:db8::/32 --exclude-outbound-ports 443");
        for ip in catalog.addresses() {
            assert_eq!(ask(web, to(ip, 443)).await.unwrap(), format!("catalog {}", to(ip, 443)), "{rules:?}");
        }
        for address in ["198.51.100.7:80", "[2001:db8::7]:80"] {
            let said = ask(web, address.parse().unwrap()).await.unwrap();
            assert!(said.starts_with("catalog "), "{rules:?} {address}: {said}");
        }
        assert_eq!((rules.dropped(catalog), rules.dropped(web)), ([0, 0], [0, 0]), "{rules:?}");
    }
}
