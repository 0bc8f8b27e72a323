//! `redirect check`: whether interception works in this network namespace, for each family and both directions, found out by
//! doing it and with no privilege. A connection to the probe's address must reach the running sidecar, which answers with
//! that original destination (`probe`). Where it does not, a second address tells whether the rules or the sidecar are
//! absent. A third must be dropped, as what was not redirected is. All are on loopback: nothing leaves the machine, and the
//! sidecar's own user may ask as well. What takes a privilege to see is in `hooks`.

use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::hooks::{self, Hooks};
use super::probe::{
    INBOUND_DROP_PORT, INBOUND_RULES_PORT, OUTBOUND_DROP_PORT, PROBE_V4, PROBE_V6, RULES_PORT, RULES_TARGET_PORT,
    answer, complaint, inbound_probe, no_way_back,
};

/// A sidecar that takes longer than this does not serve either.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longer than any answer.
const LONGEST: u64 = 512;

/// On loopback a connection that is not dropped is refused, or made, before the call returns.
const DROPPED_AFTER: Duration = Duration::from_secs(1);

/// Which rules were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Outbound,
    Inbound,
}

/// What was found for one family.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Works,
    /// Connections are not redirected.
    NoRules(Way),
    /// They are, and nobody answers as a sidecar does.
    NoSidecar(Way, String),
    /// They are, and what gets past the redirect is not dropped.
    Open(Way),
    /// The inbound rules are there, and PREROUTING does not lead to them.
    Unhooked,
    /// The sidecar connects to the application with the client's address, and what is answered does not come back.
    NoWayBack(String),
    /// Both are there, but the rules bring the sidecar's own connections back to it, so that none leaves.
    NotExempt,
    /// The sidecar cannot listen for this family, which is in use.
    NoLoopback,
    /// This namespace has no addresses of this family, so no application uses it.
    NotUsed,
}

impl Found {
    /// **Contract**: 0 works, 3 rules absent, 4 sidecar absent; 5 both there and not fitting.
    fn code(&self) -> u8 {
        match self {
            Found::Works | Found::NotUsed => 0,
            Found::NoRules(_) | Found::Open(_) | Found::Unhooked | Found::NoWayBack(_) => 3,
            Found::NoSidecar(..) | Found::NoLoopback => 4,
            Found::NotExempt => 5,
        }
    }
}

/// What was found for both.
#[derive(Debug)]
pub(super) struct Report {
    v4: Found,
    v6: Found,
    /// None: no right to look, or nothing to look with.
    hooks: Option<Hooks>,
}

impl Report {
    /// The first in the order of the codes: without rules the sidecar is not asked.
    pub(super) fn code(&self) -> u8 {
        let codes = [self.v4.code(), self.v6.code()];
        codes.into_iter().filter(|code| *code != 0).min().unwrap_or(0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const APPLY: &str = "`outrigger-sidecar redirect apply` in this network namespace, as root (NET_ADMIN)";
        for (family, found, probe) in [("IPv4", &self.v4, PROBE_V4), ("IPv6", &self.v6, PROBE_V6)] {
            let of = |way: &Way| match way {
                Way::Outbound => ("", probe),
                Way::Inbound => ("inbound ", inbound_probe(probe)),
            };
            match found {
                Found::Works => writeln!(
                    f,
                    "{family}: works: connections to {probe} (outbound) and {} (inbound) reached the sidecar with that \
                     destination, and what is not redirected is dropped",
                    inbound_probe(probe)
                )?,
                Found::NoRules(way) => {
                    let (which, probe) = of(way);
                    writeln!(
                        f,
                        "{family}: {which}rules absent: a connection to {probe} was not redirected\n      to do: {APPLY}"
                    )?;
                }
                Found::NoSidecar(way, why) => {
                    let (which, probe) = of(way);
                    writeln!(
                        f,
                        "{family}: sidecar absent: the {which}rules redirect a connection to {probe}, {why}\n      to do: start \
                         `outrigger-sidecar run --transparent` in this network namespace, or see what its log says"
                    )?;
                }
                Found::Open(way) => writeln!(
                    f,
                    "{family}: {}rules absent in part: connections are redirected, and those that get past it are not dropped\n\
                     \x20     to do: {APPLY}",
                    of(way).0
                )?,
                Found::Unhooked => writeln!(
                    f,
                    "{family}: inbound rules absent in part: PREROUTING does not lead to them\n      to do: {APPLY}"
                )?,
                Found::NoWayBack(why) => writeln!(
                    f,
                    "{family}: rules absent in part: the sidecar keeps clients' source addresses, and what the application \
                     answers does not come back to it ({why})\n      to do: `outrigger-sidecar redirect apply \
                     --keep-source-address`, with the flags that it was applied with, in this network namespace, as root \
                     (NET_ADMIN)"
                )?,
                Found::NotExempt => writeln!(
                    f,
                    "{family}: does not work: the rules bring the sidecar's own connections back to it\n      to do: run the \
                     sidecar as the user of `redirect apply --uid` (1337), or give `run` and `redirect apply` the same \
                     --mark"
                )?,
                Found::NoLoopback => writeln!(
                    f,
                    "{family}: sidecar absent: loopback has no address of this family, where it would listen\n      to \
                     do: `ip link set lo up`, then start the sidecar"
                )?,
                Found::NotUsed => writeln!(f, "{family}: not used here: no address of it but loopback's")?,
            }
        }
        match &self.hooks {
            None if self.code() == 0 => writeln!(
                f,
                "not looked at, which takes root (NET_ADMIN): whether PREROUTING leads to the inbound rules, and how many packets \
                 were dropped"
            ),
            Some(Hooks { dropped: Some((inbound, outbound)), .. }) => writeln!(
                f,
                "packets that would have begun a connection past the sidecar, dropped since the rules were applied: {inbound} \
                 inbound, {outbound} outbound"
            ),
            None | Some(_) => Ok(()),
        }
    }
}

/// Asks both families of this network namespace.
pub(super) fn check() -> io::Result<Report> {
    let used = (has_v4(), has_v6());
    let both = std::thread::scope(|scope| {
        let v4 = scope.spawn(|| family(PROBE_V4, Ipv4Addr::LOCALHOST.into()));
        let v6 = family(PROBE_V6, Ipv6Addr::LOCALHOST.into());
        (v4.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), v6)
    });
    let hooks = hooks::look();
    let hooked = |found: Option<Found>, unhooked: bool| match found {
        Some(Found::Works) if unhooked => Some(Found::Unhooked),
        found => found,
    };
    let v4 = hooked(both.0?, hooks.as_ref().is_some_and(|hooks| hooks.v4_unhooked));
    let v6 = hooked(both.1?, hooks.as_ref().is_some_and(|hooks| hooks.v6_unhooked));
    Ok(Report { hooks, ..judge(v4, v6, used) })
}

/// A family that no application can use is not a fault when the other one is used. None: it has no loopback address.
fn judge(v4: Option<Found>, v6: Option<Found>, (v4_used, v6_used): (bool, bool)) -> Report {
    let one = |found: Option<Found>, used: bool, other: bool| match found {
        Some(Found::Works) => Found::Works,
        Some(found) if used || !other => found,
        None if used => Found::NoLoopback,
        Some(_) | None => Found::NotUsed,
    };
    Report { v4: one(v4, v4_used, v6_used), v6: one(v6, v6_used, v4_used), hooks: None }
}

fn family(probe: SocketAddr, loopback: IpAddr) -> io::Result<Option<Found>> {
    // Where loopback is down or lacks this family, nothing below says anything.
    match TcpListener::bind((loopback, 0)) {
        Ok(_) => {}
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let ways = [(Way::Outbound, probe, RULES_PORT), (Way::Inbound, inbound_probe(probe), INBOUND_RULES_PORT)];
    for (way, probe, rules) in ways {
        let found = redirected(way, probe, SocketAddr::new(probe.ip(), rules), loopback)?;
        if found != Found::Works {
            return Ok(Some(found));
        }
    }
    let drops = |port| is_dropped(SocketAddr::new(probe.ip(), port));
    let (outbound, inbound) = std::thread::scope(|scope| {
        let outbound = scope.spawn(|| drops(OUTBOUND_DROP_PORT));
        let inbound = drops(INBOUND_DROP_PORT);
        (outbound.join().unwrap_or(false), inbound)
    });
    Ok(Some(match (outbound, inbound) {
        (true, true) => Found::Works,
        (false, _) => Found::Open(Way::Outbound),
        (true, false) => Found::Open(Way::Inbound),
    }))
}

/// Whether a connection to `probe` reaches the sidecar; if not, one to `rules` tells what is absent.
fn redirected(way: Way, probe: SocketAddr, rules: SocketAddr, loopback: IpAddr) -> io::Result<Found> {
    let why = match ask(probe) {
        Ok(said) if said == answer(probe).as_bytes() => return Ok(Found::Works),
        Ok(said) if said == complaint(probe).as_bytes() => return Ok(Found::NotExempt),
        Ok(said) if no_way_back(&said).is_some() => {
            return Ok(Found::NoWayBack(no_way_back(&said).unwrap_or_default()));
        }
        Ok(said) if said.is_empty() => "and it was closed without an answer".to_owned(),
        Ok(said) => format!("and something else answered: {:?}", String::from_utf8_lossy(&said)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => "where nobody listens".to_owned(),
        Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
            format!("where nobody answered within {} s", PATIENCE.as_secs())
        }
        Err(error) => format!("where it failed: {error}"),
    };
    Ok(if in_force(rules, loopback)? { Found::NoSidecar(way, why) } else { Found::NoRules(way) })
}

/// Whether a connection to where nobody listens is dropped, and not refused.
fn is_dropped(address: SocketAddr) -> bool {
    let tried = TcpStream::connect_timeout(&address, DROPPED_AFTER);
    tried.is_err_and(|error| matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock))
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Connects and reads to the end, or to more than an answer has.
fn ask(probe: SocketAddr) -> io::Result<Vec<u8>> {
    let until = Instant::now() + PATIENCE;
    let stream = TcpStream::connect_timeout(&probe, PATIENCE)?;
    let mut said = Vec::new();
    let mut chunk = [0; 128];
    while (said.len() as u64) < LONGEST {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match (&stream).read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => said.extend_from_slice(&chunk[..count]),
            // What refuses a connection may do so after it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(said)
}

/// Whether the rules redirect `address`, where nobody listens, to where this listens.
fn in_force(address: SocketAddr, loopback: IpAddr) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        let listener = match TcpListener::bind((loopback, RULES_TARGET_PORT)) {
            Ok(listener) => Some(listener),
            // Another check is at it; while it is, a connection shows the same there.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            Err(error) => return Err(error),
        };
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(_) => return Ok(true),
            // It may have ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                if listener.is_some() || begun.elapsed() > PATIENCE {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Without the file nobody can tell, and the family counts as used.
pub(super) fn has_v4() -> bool {
    std::fs::read_to_string("/proc/thread-self/net/fib_trie").map_or(true, |text| has_own_v4(&text))
}

pub(super) fn has_v6() -> bool {
    match std::fs::read_to_string("/proc/thread-self/net/if_inet6") {
        Ok(text) => has_own_v6(&text),
        // A kernel without IPv6 has no such file.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// An address in /proc/net/fib_trie stands on the line before its kind.
fn has_own_v4(fib: &str) -> bool {
    let lines: Vec<&str> = fib.lines().map(str::trim).collect();
    lines.windows(2).any(|pair| {
        let address = pair[0].strip_prefix("|-- ").and_then(|address| address.parse::<Ipv4Addr>().ok());
        pair[1] == "/32 host LOCAL" && address.is_some_and(|address| !address.is_loopback())
    })
}

/// /proc/net/if_inet6: address, index, prefix length, scope, flags, device.
fn has_own_v6(addresses: &str) -> bool {
    const LINK: &str = "20";
    addresses.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields[..], [_, _, _, scope, _, device] if device != "lo" && scope != LINK)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_namespace() {
        let fib = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     +-- 127.0.0.0/8 2 0 2\n        |-- 127.0.0.0\n           /8 host \
                   LOCAL\n        |-- 127.0.0.1\n           /32 host LOCAL\n";
        assert!(!has_own_v4(fib));
        assert!(!has_own_v4(&format!("{fib}     |-- 10.77.0.255\n        /32 link BROADCAST\n")));
        assert!(has_own_v4(&format!("{fib}     |-- 10.77.0.2\n        /32 host LOCAL\n")));
        let lo = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert!(!has_own_v6("") && !has_own_v6(lo));
        assert!(!has_own_v6(&format!("{lo}fe80000000000000000000fffe000002 02 40 20 80     eth0\n")));
        assert!(has_own_v6(&format!("{lo}fd770000000000000000000000000002 02 40 00 82     eth0\n")));
    }

    #[test]
    fn what_no_application_uses_is_no_fault_and_rules_come_before_the_sidecar() {
        let absent = || Some(Found::NoSidecar(Way::Outbound, "x".to_owned()));
        for (v4, v6, used, code) in [
            (Some(Found::Works), Some(Found::Works), (true, true), 0),
            (Some(Found::Works), Some(Found::NoRules(Way::Inbound)), (true, true), 3),
            (Some(Found::Works), Some(Found::NoRules(Way::Inbound)), (true, false), 0),
            (Some(Found::Works), None, (true, false), 0),
            (Some(Found::Works), None, (true, true), 4),
            (Some(Found::NoRules(Way::Inbound)), Some(Found::Works), (false, true), 0),
            (Some(Found::NoRules(Way::Inbound)), absent(), (true, true), 3),
            (absent(), Some(Found::NoRules(Way::Inbound)), (true, true), 3),
            (absent(), absent(), (true, false), 4),
            (absent(), Some(Found::Works), (true, true), 4),
            (Some(Found::NotExempt), Some(Found::Works), (true, true), 5),
            (Some(Found::NotExempt), absent(), (true, true), 4),
            (Some(Found::Open(Way::Inbound)), Some(Found::Works), (true, true), 3),
            (Some(Found::Works), Some(Found::Unhooked), (true, true), 3),
            // Loopback alone: all that there is counts.
            (Some(Found::NoRules(Way::Inbound)), Some(Found::NoRules(Way::Inbound)), (false, false), 3),
        ] {
            let report = judge(v4, v6, used);
            assert_eq!(report.code(), code, "{report:?}");
        }
    }
}
