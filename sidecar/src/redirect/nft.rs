//! The rules as one script for `nft -f -`. It is one transaction: all of it is in force or nothing has changed, and since
//! it begins by taking our table away, twice is as once. Nothing outside of our table is named. Pure.

use std::fmt::{Display, Write};

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};

use super::probe::{
    EXEMPT_PORT, INBOUND_DROP_PORT, INBOUND_PROBE_PORT, INBOUND_RULES_PORT, OUTBOUND_DROP_PORT, PROBE_PORT, PROBE_V4,
    PROBE_V6, RULES_PORT, RULES_TARGET_PORT,
};

use super::{INBOUND_PORT, NEVER_REDIRECTED, OUTBOUND_PORT, Own, RESOLVER_PORT, Rules, routes, way_back};
use crate::net::KEPT_SOURCE_MARK;

/// Our table; everything that we put into the packet filter is in it.
pub(super) const TABLE: &str = "inet outrigger";

/// What `apply` feeds to nft.
pub(super) fn script(rules: &Rules) -> String {
    let mut text = String::new();
    text += "# Outrigger: brings this network namespace's TCP connections to the sidecar, IPv4 and IPv6.\n";
    text += "# One transaction for `nft -f -`: the table is taken away, if it is there, and made anew.\n";
    if rules.dns {
        text += "# Beside them stand the routes to virtual addresses, which `apply` adds and `remove` takes away:\n";
        routes::commands("replace").iter().for_each(|command| text += &format!("#   {command}\n"));
    }
    if rules.keep_source_address {
        text +=
            "# Beside them stands the way back of --keep-source-address, which `apply` adds and `remove` takes away:\n";
        way_back::commands("add").iter().flatten().for_each(|command| text += &format!("#   {command}\n"));
    }
    text += &removal();
    let mut chains = vec![outbound(rules), prerouting(), inbound(rules), bypass_outbound(rules), bypass_inbound(rules)];
    if rules.keep_source_address {
        chains.extend([kept_source(), kept_source_back()]);
    }
    let _ = write!(text, "\ntable {TABLE} {{\n{}}}\n", chains.join("\n"));
    text
}

/// What `remove` feeds to nft. A table can only be deleted where there is one, so it is made first.
pub(super) fn removal() -> String {
    format!("table {TABLE} {{}}\ndelete table {TABLE}\n")
}

fn outbound(rules: &Rules) -> String {
    let mut chain = Chain::new(
        "What is opened here. The first rule that says `return` leaves a connection alone.",
        "outbound",
        "type nat hook output priority -100; policy accept;",
    );
    chain.beginnings();
    chain.comment("`redirect check` asks here: whether the sidecar answers, and whether these rules are in force.");
    chain.probe(PROBE_PORT, format_args!("redirect to :{OUTBOUND_PORT}"));
    chain.probe(RULES_PORT, format_args!("redirect to :{RULES_TARGET_PORT}"));
    chain.comment("It asks the inbound rules, too: what arrives over loopback is not asked in prerouting.");
    chain.probe(INBOUND_PROBE_PORT, "jump inbound");
    chain.probe(INBOUND_RULES_PORT, "jump inbound");
    chain.own(rules);
    chain.comment("The sidecar asks here whether it is known: this is for all others.");
    chain.probe(EXEMPT_PORT, format_args!("redirect to :{OUTBOUND_PORT}"));
    if rules.dns {
        chain.comment("--dns: questions about names, to servers on loopback as well.");
        chain.rule(format_args!("udp dport 53 redirect to :{RESOLVER_PORT}"));
        chain.rule(format_args!("tcp dport 53 redirect to :{RESOLVER_PORT}"));
        chain.comment("--dns: virtual addresses of services, which are nobody's on any network.");
        let ((v4, v4_prefix), (v6, v6_prefix)) = (IPV4_NETWORK, IPV6_NETWORK);
        chain.rule(format_args!("ip daddr {v4}/{v4_prefix} meta l4proto tcp redirect to :{OUTBOUND_PORT}"));
        chain.rule(format_args!("ip6 daddr {v6}/{v6_prefix} meta l4proto tcp redirect to :{OUTBOUND_PORT}"));
    }
    chain.comment("What stays on this machine: loopback and its own addresses.");
    chain.rule("oifname \"lo\" return");
    chain.except("--exclude-cidrs", "ip daddr", &rules.exclude_v4);
    chain.except("--exclude-cidrs", "ip6 daddr", &rules.exclude_v6);
    chain.except("--exclude-outbound-ports", "tcp dport", &rules.exclude_outbound_ports);
    chain.rule(format_args!("meta l4proto tcp redirect to :{OUTBOUND_PORT}"));
    chain.end()
}

fn prerouting() -> String {
    let mut chain =
        Chain::new("What others open to here.", "prerouting", "type nat hook prerouting priority -100; policy accept;");
    chain.rule("jump inbound");
    chain.end()
}

fn inbound(rules: &Rules) -> String {
    let mut chain = Chain::new("Which of it goes to the sidecar.", "inbound", "");
    chain.beginnings();
    chain.comment("`redirect check` asks here, by way of the outbound chain.");
    chain.probe(INBOUND_PROBE_PORT, format_args!("redirect to :{INBOUND_PORT}"));
    chain.probe(INBOUND_RULES_PORT, format_args!("redirect to :{RULES_TARGET_PORT}"));
    chain.comment("What never left this machine.");
    chain.rule("iifname \"lo\" return");
    chain.comment("What this machine forwards for others.");
    chain.rule("fib daddr type != local return");
    chain.except("The sidecar's metrics and health.", "tcp dport", &NEVER_REDIRECTED);
    chain.except("--exclude-cidrs", "ip saddr", &rules.exclude_v4);
    chain.except("--exclude-cidrs", "ip6 saddr", &rules.exclude_v6);
    chain.except("--exclude-inbound-ports", "tcp dport", &rules.exclude_inbound_ports);
    chain.rule(format_args!("meta l4proto tcp redirect to :{INBOUND_PORT}"));
    chain.end()
}

/// NAT is decided once for each entry of connection tracking, and any packet may begin an entry. This chain looks at the
/// packets themselves, so that a connection that NAT was never asked about does not get past the sidecar.
fn bypass_outbound(rules: &Rules) -> String {
    let mut chain = Chain::new(
        "What begins a connection past the sidecar, though it should have been redirected: dropped and counted.",
        "bypass_outbound",
        "type filter hook output priority 0; policy accept;",
    );
    chain.comment("`redirect check` asks here.");
    chain.probe(OUTBOUND_DROP_PORT, "drop");
    chain.rule("meta l4proto != tcp return");
    chain.own(rules);
    chain.comment("What was redirected, and what stays on this machine.");
    chain.rule("oifname \"lo\" return");
    chain.rule("ip daddr 127.0.0.0/8 return");
    chain.rule("ip6 daddr ::1 return");
    // Where somebody else's rules have changed the destination meanwhile, the one that was dialled counts.
    chain.except("--exclude-cidrs", "ip daddr", &rules.exclude_v4);
    chain.also("ct direction original ct original ip daddr", &rules.exclude_v4);
    chain.except("--exclude-cidrs", "ip6 daddr", &rules.exclude_v6);
    chain.also("ct direction original ct original ip6 daddr", &rules.exclude_v6);
    chain.except("--exclude-outbound-ports", "tcp dport", &rules.exclude_outbound_ports);
    chain.also("meta l4proto tcp ct direction original ct original proto-dst", &rules.exclude_outbound_ports);
    chain.comment("A beginning, whatever other flags it has.");
    chain.rule("tcp flags & (syn | ack) == syn counter drop");
    chain.comment("Pieces that could hide one: the kernel's own TCP is never in pieces here, a raw socket's may be.");
    chain.rule("ip frag-off & 0x3fff != 0 counter drop");
    chain.end()
}

fn bypass_inbound(rules: &Rules) -> String {
    let mut chain = Chain::new(
        "What begins a connection to here past the sidecar: dropped and counted.",
        "bypass_inbound",
        "type filter hook input priority 0; policy accept;",
    );
    chain.comment("`redirect check` asks here.");
    chain.probe(INBOUND_DROP_PORT, "drop");
    chain.comment("What never left this machine.");
    chain.rule("iifname \"lo\" return");
    chain.comment("What was redirected, and the sidecar's metrics and health.");
    let [metrics, health] = NEVER_REDIRECTED;
    chain.rule(format_args!("tcp dport {{ {INBOUND_PORT}, {metrics}, {health} }} return"));
    chain.except("--exclude-cidrs", "ip saddr", &rules.exclude_v4);
    chain.except("--exclude-cidrs", "ip6 saddr", &rules.exclude_v6);
    chain.except("--exclude-inbound-ports", "tcp dport", &rules.exclude_inbound_ports);
    chain.also("meta l4proto tcp ct direction original ct original proto-dst", &rules.exclude_inbound_ports);
    chain.comment("A beginning, whatever other flags it has. Packets come here in one piece.");
    chain.rule("tcp flags & (syn | ack) == syn counter drop");
    if rules.keep_source_address {
        // Any other packet of its tuple is moved to another one by the kernel, which knows that it is taken.
        chain.comment(
            "--keep-source-address: what could be meant for a connection that the sidecar made in a client's name.",
        );
        chain.rule("meta l4proto tcp ct state invalid counter drop");
    }
    chain.end()
}

fn kept_source() -> String {
    let mut chain = Chain::new(
        "--keep-source-address: the sidecar's connections to the application, which begin with a client's address.",
        "kept_source",
        "type filter hook output priority -300; policy accept;",
    );
    chain.comment("Tracked apart from the client's own connections, whose port may be the same.");
    chain.rule(format_args!("meta mark {KEPT_SOURCE_MARK} ct original zone set {KEPT_SOURCE_MARK}"));
    chain.end()
}

fn kept_source_back() -> String {
    let mut chain = Chain::new(
        "--keep-source-address: what the application answers is marked, and so led back to the sidecar.",
        "kept_source_back",
        "type route hook output priority -150; policy accept;",
    );
    chain.rule(format_args!("meta mark {KEPT_SOURCE_MARK} ct mark set {KEPT_SOURCE_MARK}"));
    chain.rule(format_args!("ct direction reply ct mark {KEPT_SOURCE_MARK} meta mark set {KEPT_SOURCE_MARK}"));
    chain.end()
}

/// A chain's text as it grows.
struct Chain {
    text: String,
}

impl Chain {
    /// Without a hook it is asked only where another one jumps to it.
    fn new(about: &str, name: &str, hook: &str) -> Chain {
        let hook = if hook.is_empty() { String::new() } else { format!("        {hook}\n\n") };
        Chain { text: format!("    # {about}\n    chain {name} {{\n{hook}") }
    }

    /// For a port at both addresses of `redirect check`.
    fn probe(&mut self, port: u16, what: impl Display) {
        self.rule(format_args!("ip daddr {} tcp dport {port} {what}", PROBE_V4.ip()));
        self.rule(format_args!("ip6 daddr {} tcp dport {port} {what}", PROBE_V6.ip()));
    }

    /// Who is left alone.
    fn own(&mut self, rules: &Rules) {
        self.comment("The sidecar's own.");
        match rules.own {
            Own::Uid(uid) => self.rule(format_args!("meta skuid {uid} return")),
            Own::Mark(mark) => self.rule(format_args!("meta mark {mark} return")),
        }
        if rules.keep_source_address {
            self.rule(format_args!("meta mark {KEPT_SOURCE_MARK} return"));
        }
        self.except("--exclude-uids", "meta skuid", &rules.exclude_uids);
    }

    /// A connection that was there before the rules would otherwise be redirected in its middle, which ends it: the
    /// kernel, when it begins to track connections, takes any packet for a first one.
    fn beginnings(&mut self) {
        self.comment("Connections that were there before these rules go on.");
        self.rule("tcp flags & (fin | syn | rst | ack) != syn return");
    }

    fn comment(&mut self, why: &str) {
        let _ = writeln!(self.text, "        # {why}");
    }

    fn rule(&mut self, rule: impl Display) {
        let _ = writeln!(self.text, "        {rule}");
    }

    fn except(&mut self, why: &str, what: &str, list: &[impl Display]) {
        if !list.is_empty() {
            self.comment(why);
        }
        self.also(what, list);
    }

    /// Another rule for the same list.
    fn also(&mut self, what: &str, list: &[impl Display]) {
        if !list.is_empty() {
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            self.rule(format_args!("{what} {{ {} }} return", list.join(", ")));
        }
    }

    fn end(mut self) -> String {
        self.text += "    }\n";
        self.text
    }
}
