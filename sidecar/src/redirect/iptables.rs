//! The same rules as a shell script for iptables and ip6tables, for machines without nftables; people run it, we never
//! do. Each family is changed by one iptables-restore, which takes all of its input or nothing. Pure.

use std::fmt::{Display, Write};
use std::net::IpAddr;

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};

use super::probe::{
    EXEMPT_PORT, INBOUND_DROP_PORT, INBOUND_PROBE_PORT, INBOUND_RULES_PORT, OUTBOUND_DROP_PORT, PROBE_PORT, PROBE_V4,
    PROBE_V6, RULES_PORT, RULES_TARGET_PORT,
};

use super::{INBOUND_PORT, NEVER_REDIRECTED, OUTBOUND_PORT, Own, RESOLVER_PORT, Rules, routes, way_back};
use crate::net::KEPT_SOURCE_MARK;

const HEAD: &str = r#"#!/bin/sh
# Outrigger: brings this network namespace's TCP connections to the sidecar, by iptables and ip6tables.
#   sh FILE          puts the rules in force; twice is as once
#   sh FILE remove   takes exactly them away
# All rules are in chains of their own, into which one jump each leads: OUTRIGGER_OUTBOUND and OUTRIGGER_INBOUND in the table
# nat, and what drops connections that got past them, OUTRIGGER_BYPASS_IN in mangle (where others' ACCEPT does not come
# first) and OUTRIGGER_BYPASS_OUT in filter. With --keep-source-address there are OUTRIGGER_SOURCE in raw and
# OUTRIGGER_SOURCE_BACK in mangle besides.
#   iptables -t mangle -nvL OUTRIGGER_BYPASS_IN; iptables -nvL OUTRIGGER_BYPASS_OUT     how many were dropped
set -eu

# The jump into a chain of ours, unless it is there.
jump() {
    "$1" -w 30 -t "$2" -C "$3" -j "$4" 2>/dev/null || echo "-I $3 -j $4"
}

# apply PROGRAM TABLE BUILT-IN OURS [BUILT-IN OURS], rules on stdin. Naming a chain of ours empties it; --noflush leaves
# everybody else's alone. What is there is asked before iptables-restore begins: it may hold a lock from its first line on.
apply() {
    jumps=$(
        jump "$1" "$2" "$3" "$4"
        [ $# = 4 ] || jump "$1" "$2" "$5" "$6"
    )
    {
        printf '%s\n' "*$2" ":$4 - [0:0]"
        [ $# = 4 ] || printf '%s\n' ":$6 - [0:0]"
        cat
        printf '%s\n' "$jumps" COMMIT
    } | "$1-restore" -w 30 --noflush
}

# A jump and the chain to which it leads.
gone() {
    ! "$1" -w 30 -t "$2" -C "$3" -j "$4" 2>/dev/null || echo "-D $3 -j $4"
    ! "$1" -w 30 -t "$2" -n -L "$4" >/dev/null 2>&1 || printf '%s\n' "-F $4" "-X $4"
}

taken() {
    [ -z "$3" ] || printf '%s\n' "*$2" "$3" COMMIT | "$1-restore" -w 30 --noflush
}

# The chains of --keep-source-address, where they are: a table that is only asked may be made by that.
no_source() {
    "$1-save" 2>/dev/null | grep -q '^:OUTRIGGER_SOURCE' || return 0
    taken "$1" mangle "$(gone "$1" mangle OUTPUT OUTRIGGER_SOURCE_BACK)"
    taken "$1" raw "$(gone "$1" raw OUTPUT OUTRIGGER_SOURCE)"
}

# What drops goes before what redirects.
remove() {
    no_source "$1"
    taken "$1" mangle "$(gone "$1" mangle INPUT OUTRIGGER_BYPASS_IN)"
    taken "$1" filter "$(gone "$1" filter OUTPUT OUTRIGGER_BYPASS_OUT)"
    ours=$(
        gone "$1" nat OUTPUT OUTRIGGER_OUTBOUND
        gone "$1" nat PREROUTING OUTRIGGER_INBOUND
    )
    taken "$1" nat "$ours"
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

# The way back of --keep-source-address: what the application answers to a client's address is marked, and led to the sidecar.
way_back() {
    BACKROUTE4
    ip -4 rule list | grep -q 'LISTED' || BACKRULE4
    ! grep -qs ' lo$' /proc/net/if_inet6 || {
        BACKROUTE6
        ip -6 rule list | grep -q 'LISTED' || BACKRULE6
    }
}

no_way_back() {
    NOBACKRULE4 2>/dev/null || :
    NOBACKROUTE4 2>/dev/null || :
    NOBACKRULE6 2>/dev/null || :
    NOBACKROUTE6 2>/dev/null || :
}

case "${1:-apply}" in
apply) ;;
remove)
    no_routes
    no_way_back
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
    let ([back, no_back], listed) = (["add", "del"].map(way_back::commands), way_back::listed());
    for (prefix, commands) in [("NOBACK", no_back), ("BACK", back)] {
        for (family, [route, rule]) in (["4", "6"]).iter().zip(commands) {
            text = text.replace(&format!("{prefix}ROUTE{family}"), &route);
            text = text.replace(&format!("{prefix}RULE{family}"), &rule);
        }
    }
    text = text.replace("LISTED", &listed);
    text += if rules.dns { "\nroutes\n" } else { "\nno_routes\n" };
    text += if rules.keep_source_address { "way_back\n" } else { "no_way_back\n" };
    text += "\n";
    text += &applied("iptables", &Family::v4(rules));
    text += "\nhas_v6 || exit 0\n";
    text += &applied("ip6tables", &Family::v6(rules));
    text
}

/// Redirects first: what was not redirected is dropped only then. Before them stands what they would redirect otherwise.
fn applied(program: &str, family: &Family<'_>) -> String {
    let kept = family.rules.keep_source_address;
    let mut text = if kept { String::new() } else { format!("no_source {program}\n") };
    let mangle =
        if kept { "INPUT OUTRIGGER_BYPASS_IN OUTPUT OUTRIGGER_SOURCE_BACK" } else { "INPUT OUTRIGGER_BYPASS_IN" };
    for (table, chains, rules) in [
        ("raw", "OUTPUT OUTRIGGER_SOURCE", family.kept_source()),
        ("nat", "OUTPUT OUTRIGGER_OUTBOUND PREROUTING OUTRIGGER_INBOUND", family.outbound() + &family.inbound()),
        ("mangle", mangle, family.bypass_inbound() + &family.kept_source_back()),
        ("filter", "OUTPUT OUTRIGGER_BYPASS_OUT", family.bypass_outbound()),
    ] {
        if kept || table != "raw" {
            let _ = write!(text, "apply {program} {table} {chains} <<'RULES'\n{rules}RULES\n");
        }
    }
    text
}

/// One family's rules.
struct Family<'a> {
    rules: &'a Rules,
    probe: IpAddr,
    loopback: &'static str,
    virtual_network: String,
    excluded: Vec<String>,
}

impl Family<'_> {
    fn v4(rules: &Rules) -> Family<'_> {
        let (address, prefix) = IPV4_NETWORK;
        Family {
            rules,
            probe: PROBE_V4.ip(),
            loopback: "127.0.0.0/8",
            virtual_network: format!("{address}/{prefix}"),
            excluded: rules.exclude_v4.iter().map(ToString::to_string).collect(),
        }
    }

    fn v6(rules: &Rules) -> Family<'_> {
        let (address, prefix) = IPV6_NETWORK;
        Family {
            rules,
            probe: PROBE_V6.ip(),
            loopback: "::1",
            virtual_network: format!("{address}/{prefix}"),
            excluded: rules.exclude_v6.iter().map(ToString::to_string).collect(),
        }
    }

    fn outbound(&self) -> String {
        let Family { rules, probe, virtual_network, .. } = self;
        let mut out = Chain { name: "OUTRIGGER_OUTBOUND", text: String::new() };
        out.comment("What is opened here. The first rule that says RETURN leaves a connection alone.");
        out.comment("Connections that were there before these rules go on.");
        out.rule("-p tcp ! --syn -j RETURN");
        out.comment("`redirect check` asks here: whether the sidecar answers, and whether these rules are in force.");
        for (port, to) in [(PROBE_PORT, OUTBOUND_PORT), (RULES_PORT, RULES_TARGET_PORT)] {
            out.rule(format_args!("-d {probe} -p tcp --dport {port} -j REDIRECT --to-ports {to}"));
        }
        out.comment("It asks the inbound rules, too: what arrives over loopback is not asked in PREROUTING.");
        for port in [INBOUND_PROBE_PORT, INBOUND_RULES_PORT] {
            out.rule(format_args!("-d {probe} -p tcp --dport {port} -j OUTRIGGER_INBOUND"));
        }
        out.own(rules);
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
        out.except("--exclude-cidrs", "-d", &self.excluded);
        out.except("--exclude-outbound-ports", "-p tcp --dport", &rules.exclude_outbound_ports);
        out.rule(format_args!("-p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"));
        out.text
    }

    fn inbound(&self) -> String {
        let Family { rules, probe, .. } = self;
        let mut into = Chain { name: "OUTRIGGER_INBOUND", text: String::new() };
        into.comment("What others open to here.");
        into.rule("-p tcp ! --syn -j RETURN");
        into.comment("`redirect check` asks here, by way of the outbound chain.");
        for (port, to) in [(INBOUND_PROBE_PORT, INBOUND_PORT), (INBOUND_RULES_PORT, RULES_TARGET_PORT)] {
            into.rule(format_args!("-d {probe} -p tcp --dport {port} -j REDIRECT --to-ports {to}"));
        }
        into.comment("What never left this machine, and what it forwards for others.");
        into.rule("-i lo -j RETURN");
        into.rule("-m addrtype ! --dst-type LOCAL -j RETURN");
        into.except("The sidecar's metrics and health.", "-p tcp --dport", &NEVER_REDIRECTED);
        into.except("--exclude-cidrs", "-s", &self.excluded);
        into.except("--exclude-inbound-ports", "-p tcp --dport", &rules.exclude_inbound_ports);
        into.rule(format_args!("-p tcp -j REDIRECT --to-ports {INBOUND_PORT}"));
        into.text
    }

    fn bypass_inbound(&self) -> String {
        let Family { rules, probe, .. } = self;
        let mut into = Chain { name: "OUTRIGGER_BYPASS_IN", text: String::new() };
        into.comment("What begins a connection to here past the sidecar: dropped and counted.");
        into.comment("`redirect check` asks here.");
        into.rule(format_args!("-d {probe} -p tcp --dport {INBOUND_DROP_PORT} -j DROP"));
        into.comment("What never left this machine.");
        into.rule("-i lo -j RETURN");
        into.except("What was redirected.", "-p tcp --dport", &[INBOUND_PORT]);
        into.except("The sidecar's metrics and health.", "-p tcp --dport", &NEVER_REDIRECTED);
        into.except("--exclude-cidrs", "-s", &self.excluded);
        into.except("--exclude-inbound-ports", "-p tcp --dport", &rules.exclude_inbound_ports);
        into.also("-p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport", &rules.exclude_inbound_ports);
        into.comment("A beginning, whatever other flags it has. Packets come here in one piece.");
        into.rule("-p tcp --tcp-flags SYN,ACK SYN -j DROP");
        if rules.keep_source_address {
            // Any other packet of its tuple is moved to another one by the kernel, which knows that it is taken.
            into.comment(
                "--keep-source-address: what could be meant for a connection that the sidecar made in a client's name.",
            );
            into.rule("-p tcp -m conntrack --ctstate INVALID -j DROP");
        }
        into.text
    }

    fn kept_source(&self) -> String {
        let mut out = Chain { name: "OUTRIGGER_SOURCE", text: String::new() };
        if self.rules.keep_source_address {
            out.comment(
                "The sidecar's connections to the application, which begin with a client's address, are tracked apart",
            );
            out.comment("from the client's own, whose port may be the same.");
            out.rule(format_args!("-m mark --mark {KEPT_SOURCE_MARK} -j CT --zone-orig {KEPT_SOURCE_MARK}"));
        }
        out.text
    }

    fn kept_source_back(&self) -> String {
        let mut out = Chain { name: "OUTRIGGER_SOURCE_BACK", text: String::new() };
        if self.rules.keep_source_address {
            out.comment(
                "What the application answers to a client's address is marked, and so led back to the sidecar.",
            );
            out.rule(format_args!("-m mark --mark {KEPT_SOURCE_MARK} -j CONNMARK --set-mark {KEPT_SOURCE_MARK}"));
            out.rule(format_args!(
                "-m conntrack --ctdir REPLY -m connmark --mark {KEPT_SOURCE_MARK} -j MARK --set-mark {KEPT_SOURCE_MARK}"
            ));
        }
        out.text
    }

    fn bypass_outbound(&self) -> String {
        let Family { rules, probe, .. } = self;
        let mut out = Chain { name: "OUTRIGGER_BYPASS_OUT", text: String::new() };
        out.comment(
            "What begins a connection past the sidecar, though it should have been redirected: dropped and counted.",
        );
        out.comment("`redirect check` asks here.");
        out.rule(format_args!("-d {probe} -p tcp --dport {OUTBOUND_DROP_PORT} -j DROP"));
        out.rule("! -p tcp -j RETURN");
        out.own(rules);
        out.comment("What was redirected, and what stays on this machine.");
        out.rule("-o lo -j RETURN");
        out.rule(format_args!("-d {} -j RETURN", self.loopback));
        // Where somebody else's rules have changed the destination meanwhile, the one that was dialled counts.
        out.except("--exclude-cidrs", "-d", &self.excluded);
        out.also("-m conntrack --ctdir ORIGINAL --ctorigdst", &self.excluded);
        out.except("--exclude-outbound-ports", "-p tcp --dport", &rules.exclude_outbound_ports);
        out.also("-p tcp -m conntrack --ctdir ORIGINAL --ctorigdstport", &rules.exclude_outbound_ports);
        out.comment("A beginning, whatever other flags it has.");
        out.rule("-p tcp --tcp-flags SYN,ACK SYN -j DROP");
        if self.probe.is_ipv4() {
            out.comment(
                "Pieces that could hide one: the kernel's own TCP is never in pieces here, a raw socket's may be.",
            );
            out.rule("-p tcp -f -j DROP");
        }
        out.text
    }
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

    /// Who is left alone.
    fn own(&mut self, rules: &Rules) {
        self.comment("The sidecar's own.");
        match rules.own {
            Own::Uid(uid) => self.rule(format_args!("-m owner --uid-owner {uid} -j RETURN")),
            Own::Mark(mark) => self.rule(format_args!("-m mark --mark {mark} -j RETURN")),
        }
        if rules.keep_source_address {
            self.rule(format_args!("-m mark --mark {KEPT_SOURCE_MARK} -j RETURN"));
        }
        self.except("--exclude-uids", "-m owner --uid-owner", &rules.exclude_uids);
    }

    fn except(&mut self, why: &str, what: &str, list: &[impl Display]) {
        if !list.is_empty() {
            self.comment(why);
        }
        self.also(what, list);
    }

    /// One rule each: a match of iptables takes one value, or too few.
    fn also(&mut self, what: &str, list: &[impl Display]) {
        list.iter().for_each(|one| self.rule(format_args!("{what} {one} -j RETURN")));
    }
}
