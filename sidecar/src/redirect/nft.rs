//! The rules as one script for `nft -f -`. It is one transaction: all of it is in force or nothing has changed, and since
//! it begins by taking our table away, twice is as once. Nothing outside of our table is named. Pure.

use std::fmt::{Display, Write};

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};

use super::probe::{EXEMPT_PORT, PROBE_PORT, PROBE_V4, PROBE_V6, RULES_PORT, RULES_TARGET_PORT};

use super::{INBOUND_PORT, NEVER_REDIRECTED, OUTBOUND_PORT, Own, RESOLVER_PORT, Rules, routes};

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
    text += &removal();
    let _ = write!(text, "\ntable {TABLE} {{\n{}\n{}}}\n", outbound(rules), inbound(rules));
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
        "output",
    );
    chain.beginnings();
    chain.comment("`redirect check` asks here: whether the sidecar answers, and whether these rules are in force.");
    let (v4, v6) = (PROBE_V4.ip(), PROBE_V6.ip());
    for (port, to) in [(PROBE_PORT, OUTBOUND_PORT), (RULES_PORT, RULES_TARGET_PORT)] {
        chain.rule(format_args!("ip daddr {v4} tcp dport {port} redirect to :{to}"));
        chain.rule(format_args!("ip6 daddr {v6} tcp dport {port} redirect to :{to}"));
    }
    chain.comment("The sidecar's own.");
    match rules.own {
        Own::Uid(uid) => chain.rule(format_args!("meta skuid {uid} return")),
        Own::Mark(mark) => chain.rule(format_args!("meta mark {mark} return")),
    }
    chain.except("--exclude-uids", "meta skuid", &rules.exclude_uids);
    chain.comment("The sidecar asks here whether it is known: this is for all others.");
    chain.rule(format_args!("ip daddr {v4} tcp dport {EXEMPT_PORT} redirect to :{OUTBOUND_PORT}"));
    chain.rule(format_args!("ip6 daddr {v6} tcp dport {EXEMPT_PORT} redirect to :{OUTBOUND_PORT}"));
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

fn inbound(rules: &Rules) -> String {
    let mut chain = Chain::new("What others open to here.", "inbound", "prerouting");
    chain.beginnings();
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

/// A chain's text as it grows.
struct Chain {
    text: String,
}

impl Chain {
    fn new(about: &str, name: &str, hook: &str) -> Chain {
        let text = format!(
            "    # {about}\n    chain {name} {{\n        type nat hook {hook} priority -100; policy accept;\n\n"
        );
        Chain { text }
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
        if list.is_empty() {
            return;
        }
        let list: Vec<String> = list.iter().map(ToString::to_string).collect();
        self.comment(why);
        self.rule(format_args!("{what} {{ {} }} return", list.join(", ")));
    }

    fn end(mut self) -> String {
        self.text += "    }\n";
        self.text
    }
}
