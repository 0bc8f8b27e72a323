//! Promise: with `redirect apply --dns` a connection to a virtual address, for which no network has a route, comes to the
//! sidecar in both families; the routes come and go with the rules, leave everybody else's alone, and where they cannot be
//! added nothing is applied and the error says what to do.

use std::net::SocketAddr;
use std::process::Command;

use outrigger_tests::namespace::installed;
use outrigger_tests::process::{Program, command};
use outrigger_tests::stand_in::{self, ask};
use outrigger_tests::{Namespace, under_test};

const VIRTUAL: [&str; 2] = ["240.240.0.1:80", "[fd3a:94e7:c15b::1]:80"];

fn redirect(line: &str) -> Command {
    let mut redirect = command(under_test!(), Program::Sidecar);
    redirect.arg("redirect").args(line.split_whitespace());
    redirect
}

fn run(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code().expect("ended by itself"), said)
}

fn works(at: &Namespace, line: &str) {
    let (code, said) = run(at.inside(&redirect(line)));
    assert_eq!(code, 0, "{said}");
}

fn state(at: &Namespace) -> String {
    at.run("ip route show table all; ip -6 route show table all; nft list ruleset")
}

#[tokio::test]
async fn virtual_addresses_come_to_the_sidecar_where_nothing_else_has_a_route() {
    if !installed(&["nft", "ip"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    let _sidecar = stand_in::sidecar(&lone);
    let before = state(&lone);
    works(&lone, "apply --mark 7");
    for address in VIRTUAL.map(|text| text.parse::<SocketAddr>().unwrap()) {
        assert!(ask(&lone, address).await.is_err(), "there is no route");
    }
    // What others have for the same networks stays.
    lone.run("ip route add local 240.240.0.0/16 dev lo metric 9; ip route add 240.240.7.0/24 dev lo");
    let theirs = lone.run("ip route show table all");
    works(&lone, "apply --dns --mark 7 --exclude-cidrs 0.0.0.0/0,::/0 --exclude-outbound-ports 80");
    let once = state(&lone);
    works(&lone, "apply --dns --mark 7 --exclude-cidrs 0.0.0.0/0,::/0 --exclude-outbound-ports 80");
    assert_eq!(state(&lone), once, "twice is once");
    for address in VIRTUAL.map(|text| text.parse::<SocketAddr>().unwrap()) {
        // Nobody else can take them, so they cannot be excluded.
        assert_eq!(ask(&lone, address).await.unwrap(), format!("outbound {address}"));
    }
    works(&lone, "remove");
    assert_eq!(lone.run("ip route show table all"), theirs);
    lone.run("ip route del local 240.240.0.0/16 dev lo metric 9; ip route del 240.240.7.0/24 dev lo");
    assert_eq!(state(&lone), before);

    // After a crash between the two, and without --dns, none is left.
    for (left, verb) in [("ip route", "remove"), ("ip -6 route", "remove"), ("ip route", "apply --mark 7")] {
        let network = if left.contains('6') { "fd3a:94e7:c15b::/64" } else { "240.240.0.0/16" };
        lone.run(&format!("{left} add local {network} dev lo metric 15053"));
        works(&lone, verb);
        assert!(!state(&lone).contains("metric 15053"), "{left}, {verb}");
    }
    works(&lone, "remove");
    assert_eq!(state(&lone), before);
}

#[tokio::test]
async fn what_print_shows_is_what_apply_does() {
    if !installed(&["nft", "ip"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    let (_, printed) = run(lone.inside(&redirect("print --dns")));
    let before = state(&lone);
    works(&lone, "apply --dns");
    let applied = lone.run("ip route show table all; ip -6 route show table all").replace("proto static ", "");
    works(&lone, "remove");
    assert_eq!(state(&lone), before);
    let commands: Vec<&str> = printed.lines().filter_map(|line| line.strip_prefix("#   ip ")).collect();
    assert_eq!(commands.len(), 2, "{printed}");
    commands.iter().for_each(|command| drop(lone.run(&format!("ip {command}"))));
    assert_eq!(lone.run("ip route show table all; ip -6 route show table all"), applied);
}

#[tokio::test]
async fn without_ipv6_there_is_ipv4_alone() {
    if !installed(&["nft", "ip"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    lone.run("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/lo/disable_ipv6");
    works(&lone, "apply --dns");
    assert_eq!(state(&lone).matches("metric 15053").count(), 1, "{}", state(&lone));
    works(&lone, "remove");
    assert!(!state(&lone).contains("metric 15053"));
}

#[tokio::test]
async fn what_cannot_be_added_leaves_nothing() {
    if !installed(&["nft", "ip", "setpriv"]) {
        return;
    }
    let Some(lone) = Namespace::lone() else { return };
    let before = state(&lone);
    lone.run("ip link set lo down");
    let (code, said) = run(lone.inside(&redirect("apply --dns")));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("ip link set lo up") && said.contains("Nothing was changed"), "{said}");
    lone.run("ip link set lo up");
    assert_eq!(state(&lone), before);

    let apply = redirect("apply --dns");
    let mut without_right = lone.command("setpriv");
    without_right
        .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
        .arg(apply.get_program())
        .args(apply.get_args());
    let (code, said) = run(without_right);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("Nothing was changed"), "{said}");
    assert_eq!(state(&lone), before);

    // The routes could be added, the rules cannot: neither is there.
    let mut without_nft = lone.command("env");
    without_nft.arg("PATH=/nowhere").arg(apply.get_program()).args(apply.get_args());
    let (code, said) = run(without_nft);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("install nftables"), "{said}");
    assert_eq!(state(&lone), before);
    // Unless they were there before.
    works(&lone, "apply --dns");
    let applied = state(&lone);
    let mut without_nft = lone.command("env");
    without_nft.arg("PATH=/nowhere").arg(apply.get_program()).args(apply.get_args());
    assert_eq!(run(without_nft).0, 1);
    assert_eq!(state(&lone), applied);
}
