//! What `redirect check` cannot find out by doing it: connections over loopback are never asked in PREROUTING, so whether the
//! kernel asks the inbound rules there is read from the packet filter, which takes NET_ADMIN. With it come the counters of
//! what was dropped. Without the right, or without the program, nothing is known and nothing is said to be wrong.

use std::process::{Command, Stdio};

use super::nft::TABLE;

/// What was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Hooks {
    /// PREROUTING does not lead to the inbound rules, which are there.
    pub(super) v4_unhooked: bool,
    pub(super) v6_unhooked: bool,
    /// Packets that began a connection past the sidecar and were dropped: inbound, outbound. nftables only.
    pub(super) dropped: Option<(u64, u64)>,
}

/// None: it cannot be known.
pub(super) fn look() -> Option<Hooks> {
    let mut words = vec!["list", "table"];
    words.extend(TABLE.split(' '));
    match listed("nft", &words) {
        Some(table) => Some(of_nft(&table)),
        None => of_iptables(),
    }
}

fn of_iptables() -> Option<Hooks> {
    // Asking the legacy kind makes its tables, so it is asked only where it has some.
    let legacy = |file: &str| {
        let tables = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        tables.lines().any(|table| table == "nat")
    };
    let family = |program: &str, file: &str| {
        let kind = if legacy(file) { format!("{program}-legacy") } else { format!("{program}-nft") };
        let rules = listed(&kind, &["-w", "5", "-t", "nat", "-S"])
            .or_else(|| listed(program, &["-w", "5", "-t", "nat", "-S"]))?;
        is_unhooked(&rules)
    };
    let (v4, v6) = (family("iptables", "ip_tables_names"), family("ip6tables", "ip6_tables_names"));
    if v4.is_none() && v6.is_none() {
        return None;
    }
    Some(Hooks { v4_unhooked: v4 == Some(true), v6_unhooked: v6 == Some(true), dropped: None })
}

/// What a program that only reads says on stdout; none when it failed.
fn listed(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Of `iptables -S`; none where there is no chain of ours.
fn is_unhooked(rules: &str) -> Option<bool> {
    let has = |line: &str| rules.lines().any(|rule| rule.trim_end() == line);
    has("-N OUTRIGGER_INBOUND").then(|| !has("-A PREROUTING -j OUTRIGGER_INBOUND"))
}

fn of_nft(table: &str) -> Hooks {
    let mut chain = "";
    let (mut hooked, mut jumps) = (false, false);
    let mut dropped = (0, 0);
    for line in table.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            chain = name;
        }
        match chain {
            "prerouting" => {
                hooked |= line.contains(" hook prerouting ");
                jumps |= line == "jump inbound";
            }
            "bypass_inbound" => dropped.0 += counted(line),
            "bypass_outbound" => dropped.1 += counted(line),
            _ => {}
        }
    }
    let unhooked = !(hooked && jumps);
    Hooks { v4_unhooked: unhooked, v6_unhooked: unhooked, dropped: Some(dropped) }
}

/// `... counter packets 3 bytes 180 drop`
fn counted(line: &str) -> u64 {
    let behind = line.split_once("counter packets ").map_or("", |(_, behind)| behind);
    behind.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_and_counters_are_read_from_what_the_programs_list() {
        let table = |jump: &str| {
            format!(
                "table inet outrigger {{\n\tchain prerouting {{\n\t\ttype nat hook prerouting priority dstnat; policy \
                 accept;\n{jump}\t}}\n\n\tchain inbound {{\n\t\tjump inbound\n\t}}\n\tchain bypass_inbound {{\n\t\ttype filter \
                 hook input priority filter; policy accept;\n\t\ttcp flags & (syn | ack) == syn counter packets 3 bytes 180 \
                 drop\n\t}}\n\tchain bypass_outbound {{\n\t\ttcp flags & (syn | ack) == syn counter packets 4 bytes 1 drop\n\
                 \t\tip frag-off & 16383 != 0 counter packets 2 bytes 1 drop\n\t}}\n}}\n"
            )
        };
        let hooked = Hooks { dropped: Some((3, 6)), ..Hooks::default() };
        assert_eq!(of_nft(&table("\t\tjump inbound\n")), hooked);
        assert_eq!(of_nft(&table("")), Hooks { v4_unhooked: true, v6_unhooked: true, ..hooked });
        assert_eq!(is_unhooked("-P PREROUTING ACCEPT\n"), None);
        assert_eq!(is_unhooked("-N OUTRIGGER_INBOUND\n-A OUTPUT -j OUTRIGGER_OUTBOUND\n"), Some(true));
        assert_eq!(is_unhooked("-N OUTRIGGER_INBOUND\n-A PREROUTING -j OUTRIGGER_INBOUND\n"), Some(false));
    }
}
