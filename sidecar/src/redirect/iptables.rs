//! The same rules as a shell script for iptables and ip6tables, for machines without nftables; people run it, we never
//! do. Each family is changed by one iptables-restore, which takes all of its input or nothing. Pure.

use std::fmt::{Display, Write};
use std::net::IpAddr;

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};

use super::probe::{EXEMPT_PORT, PROBE_PORT, PROBE_V4, PROBE_V6, RULES_PORT, RULES_TARGET_PORT};

use super::{INBOUND_PORT, NEVER_REDIRECTED, OUTBOUND_PORT, Own, RESOLVER_PORT, Rules, routes};

const HEAD: &str = r#"#!/bin/sh
# Outrigger: brings this network namespace's TCP connections to the sidecar, by iptables and ip6tables.
#   sh FILE          puts the rules in force; twice is as once
#   sh FILE remove   takes exactly them away
# All rules are in the chains OUTRIGGER_OUTBOUND and OUTRIGGER_INBOUND of the table nat, into which one jump each leads.
set -eu

# The jump into a chain of ours, unless it is there.
jump() {
    "$1" -w 30 -t nat -C "$2" -j "$3" 2>/dev/null || echo "-I $2 -j $3"
}

# Rules come on stdin. Naming a chain of ours empties it; --noflush leaves everybody else's alone. What is there is asked
# before iptables-restore begins: it may hold a lock from its first line on.
apply() {
    jumps=$(
        jump "$1" OUTPUT OUTRIGGER_OUTBOUND
        jump "$1" PREROUTING OUTRIGGER_INBOUND
    )
    {
        printf '%s\n' '*nat' ':OUTRIGGER_OUTBOUND - [0:0]' ':OUTRIGGER_INBOUND - [0:0]'
        cat
        printf '%s\n' "$jumps" COMMIT
    } | "$1-restore" -w 30 --noflush
}

# A jump and the chain to which it leads.
gone() {
    ! "$1" -w 30 -t nat -C "$2" -j "$3" 2>/dev/null || echo "-D $2 -j $3"
    ! "$1" -w 30 -t nat -n -L "$3" >/dev/null 2>&1 || printf '%s\n' "-F $3" "-X $3"
}

remove() {
    ours=$(
        gone "$1" OUTPUT OUTRIGGER_OUTBOUND
        gone "$1" PREROUTING OUTRIGGER_INBOUND
    )
    [ -z "$ours" ] || printf '%s\n' '*nat' "$ours" COMMIT | "$1-restore" -w 30 --noflush
}

# Kernels without IPv6 have nothing to redirect there.
has_v6() {
    [ -e /proc/net/if_inet6 ]
}

# The routes to virtual addresses of services, which stand beside the rules of --dns, and alone do no harm.
routes() {
    ADD4
    ! grep -qs ' lo$' /proc/net/if_inet6 || ADD6
}

no_routes() {
    DEL4 2>/dev/null || :
    DEL6 2>/dev/null || :
}

case "${1:-apply}" in
apply) ;;
remove)
    no_routes
    remove iptables
    ! has_v6 || remove ip6tables
    exit
    ;;
*)
    echo "usage: sh FILE [apply|remove]" >&2
    exit 2
    ;;
esac
"#;

/// What `print --iptables` prints.
pub(super) fn script(rules: &Rules) -> String {
    let [[add4, add6], [del4, del6]] = ["replace", "del"].map(routes::commands);
    let mut text = HEAD.to_owned();
    for (place, command) in [("ADD4", add4), ("ADD6", add6), ("DEL4", del4), ("DEL6", del6)] {
        text = text.replace(place, &command);
    }
    text += if rules.dns { "\nroutes\n" } else { "\nno_routes\n" };
    let network = |(ip, prefix): (IpAddr, u8)| format!("{ip}/{prefix}");
    let (ours4, ours6) = ((IPV4_NETWORK.0.into(), IPV4_NETWORK.1), (IPV6_NETWORK.0.into(), IPV6_NETWORK.1));
    let v4 = family(rules, PROBE_V4.ip(), &network(ours4), &rules.exclude_v4);
    let v6 = family(rules, PROBE_V6.ip(), &network(ours6), &rules.exclude_v6);
    let _ = write!(text, "\napply iptables <<'RULES'\n{v4}RULES\n");
    let _ = write!(text, "\nhas_v6 || exit 0\napply ip6tables <<'RULES'\n{v6}RULES\n");
    text
}

/// One family's rules; `probe`, `virtual_network` and `excluded` are of that family.
fn family(rules: &Rules, probe: impl Display, virtual_network: &str, excluded: &[impl Display]) -> String {
    let mut out = Chain { name: "OUTRIGGER_OUTBOUND", text: String::new() };
    out.comment("What is opened here. The first rule that says RETURN leaves a connection alone.");
    out.comment("Connections that were there before these rules go on.");
    out.rule("-p tcp ! --syn -j RETURN");
    out.comment("`redirect check` asks here: whether the sidecar answers, and whether these rules are in force.");
    for (port, to) in [(PROBE_PORT, OUTBOUND_PORT), (RULES_PORT, RULES_TARGET_PORT)] {
        out.rule(format_args!("-d {probe} -p tcp --dport {port} -j REDIRECT --to-ports {to}"));
    }
    out.comment("The sidecar's own.");
    match rules.own {
        Own::Uid(uid) => out.rule(format_args!("-m owner --uid-owner {uid} -j RETURN")),
        Own::Mark(mark) => out.rule(format_args!("-m mark --mark {mark} -j RETURN")),
    }
    out.except("--exclude-uids", "-m owner --uid-owner", &rules.exclude_uids);
    out.comment("The sidecar asks here whether it is known: this is for all others.");
    out.rule(format_args!("-d {probe} -p tcp --dport {EXEMPT_PORT} -j REDIRECT --to-ports {OUTBOUND_PORT}"));
    if rules.dns {
        out.comment("--dns: questions about names, to servers on loopback as well.");
        out.rule(format_args!("-p udp --dport 53 -j REDIRECT --to-ports {RESOLVER_PORT}"));
        out.rule(format_args!("-p tcp --dport 53 -j REDIRECT --to-ports {RESOLVER_PORT}"));
        out.comment("--dns: virtual addresses of services, which are nobody's on any network.");
        out.rule(format_args!("-d {virtual_network} -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"));
    }
    out.comment("What stays on this machine: loopback and its own addresses.");
    out.rule("-o lo -j RETURN");
    out.except("--exclude-cidrs", "-d", excluded);
    out.except("--exclude-outbound-ports", "-p tcp --dport", &rules.exclude_outbound_ports);
    out.rule(format_args!("-p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"));

    let mut into = Chain { name: "OUTRIGGER_INBOUND", text: String::new() };
    into.comment("What others open to here.");
    into.rule("-p tcp ! --syn -j RETURN");
    into.comment("What never left this machine, and what it forwards for others.");
    into.rule("-i lo -j RETURN");
    into.rule("-m addrtype ! --dst-type LOCAL -j RETURN");
    into.except("The sidecar's metrics and health.", "-p tcp --dport", &NEVER_REDIRECTED);
    into.except("--exclude-cidrs", "-s", excluded);
    into.except("--exclude-inbound-ports", "-p tcp --dport", &rules.exclude_inbound_ports);
    into.rule(format_args!("-p tcp -j REDIRECT --to-ports {INBOUND_PORT}"));
    out.text + &into.text
}

/// A chain's text as it grows.
struct Chain {
    name: &'static str,
    text: String,
}

impl Chain {
    fn comment(&mut self, why: &str) {
        let _ = writeln!(self.text, "# {why}");
    }

    fn rule(&mut self, rule: impl Display) {
        let _ = writeln!(self.text, "-A {} {rule}", self.name);
    }

    /// One rule each: a match of iptables takes one value, or too few.
    fn except(&mut self, why: &str, what: &str, list: &[impl Display]) {
        if !list.is_empty() {
            self.comment(why);
        }
        list.iter().for_each(|one| self.rule(format_args!("{what} {one} -j RETURN")));
    }
}
