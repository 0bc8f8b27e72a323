//! How `redirect check` asks a running sidecar whether interception works: it connects to an address that nothing else
//! uses and that the rules send to the outbound listener; the sidecar, which sees that address as the original
//! destination, answers with one line that names it, and closes. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Reserved, with [`PROBE_V4`] and [`PROBE_V6`], for the probe. **Contract.**
pub const PROBE_PORT: u16 = 15002;
/// On loopback, so that there is a route in any namespace, nothing ever leaves the machine, and where there are no rules
/// the connection is refused at once. It is not 127.0.0.1, to which the rules send it: the answer proves the address too.
pub const PROBE_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 15, 0, 1)), PROBE_PORT);
/// Loopback has but this address in IPv6.
pub const PROBE_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), PROBE_PORT);

/// At the same addresses: the rules send it to [`RULES_TARGET_PORT`], where `redirect check` itself listens for a moment.
/// So they show that they are in force to whoever has no right to list them.
pub(super) const RULES_PORT: u16 = 15003;
pub(super) const RULES_TARGET_PORT: u16 = 15004;

/// At the same addresses: the rules send it to the outbound listener, too, but for connections that they exempt. The
/// sidecar, when it is asked, connects there itself: it must be refused.
pub(super) const EXEMPT_PORT: u16 = 15005;

/// At the same addresses: the chain of the inbound rules sends it to the inbound listener. What arrives over loopback is not
/// asked in PREROUTING, so the outbound chain leads connections to these two ports there.
pub(super) const INBOUND_PROBE_PORT: u16 = 15007;
/// As [`RULES_PORT`], for the inbound chain.
pub(super) const INBOUND_RULES_PORT: u16 = 15008;

/// At the same addresses: the two chains that drop connections which were not redirected drop a connection to these ports,
/// where no program listens. Without those chains it is refused.
pub(super) const INBOUND_DROP_PORT: u16 = 15009;
pub(super) const OUTBOUND_DROP_PORT: u16 = 15010;

/// Whether an original destination, seen by the inbound listener, is that of the inbound probe.
pub fn is_inbound_probe(original: SocketAddr) -> bool {
    [PROBE_V4, PROBE_V6].map(inbound_probe).contains(&SocketAddr::new(original.ip().to_canonical(), original.port()))
}

/// The inbound probe of the family of `probe`.
pub(super) fn inbound_probe(probe: SocketAddr) -> SocketAddr {
    SocketAddr::new(probe.ip(), INBOUND_PROBE_PORT)
}

/// Whether an original destination, seen by the outbound listener, is the probe's. Such a connection is told [`answer`]
/// and closed, before policy and limits, and not counted.
pub fn is_probe(original: SocketAddr) -> bool {
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    original == PROBE_V4 || original == PROBE_V6
}

/// What to write to it: one line with its end.
pub fn answer(original: SocketAddr) -> String {
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    format!("outrigger-sidecar original-destination {original}\n")
}

/// Where the sidecar looks, before it answers, whether the rules exempt its own connections.
pub fn exempt_target(probe: SocketAddr) -> SocketAddr {
    SocketAddr::new(probe.ip().to_canonical(), EXEMPT_PORT)
}

/// Whether an original destination is that one: then they do not, and there is nothing to carry.
pub fn is_exempt_target(original: SocketAddr) -> bool {
    [PROBE_V4, PROBE_V6].map(exempt_target).contains(&SocketAddr::new(original.ip().to_canonical(), original.port()))
}

/// What to write instead of [`answer`] when the rules bring the sidecar's own connections back to it.
pub fn complaint(original: SocketAddr) -> String {
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    format!("outrigger-sidecar not-exempt {original}\n")
}

/// What to write to the inbound probe instead of [`answer`] when the sidecar keeps clients' source addresses and what is
/// answered to them does not come back. `why` is one line.
pub fn no_way_back_answer(why: &str) -> String {
    format!("{NO_WAY_BACK}{why}\n")
}

const NO_WAY_BACK: &str = "outrigger-sidecar no-way-back ";

/// Why, if that is what was said.
pub(super) fn no_way_back(said: &[u8]) -> Option<String> {
    let said = std::str::from_utf8(said).ok()?;
    said.strip_prefix(NO_WAY_BACK)?.strip_suffix('\n').map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_addresses_are_the_probe_and_the_answer_names_them() {
        for (address, is) in [
            ("127.15.0.1:15002", true),
            ("[::1]:15002", true),
            ("[::ffff:127.15.0.1]:15002", true),
            ("127.15.0.1:15001", false),
            ("127.0.0.1:15002", false),
            ("[::1]:15001", false),
            ("10.0.0.1:15002", false),
        ] {
            assert_eq!(is_probe(address.parse().unwrap()), is, "{address}");
        }
        assert_eq!(answer(PROBE_V4), "outrigger-sidecar original-destination 127.15.0.1:15002\n");
        assert_eq!(answer(PROBE_V6), "outrigger-sidecar original-destination [::1]:15002\n");
        assert_eq!(complaint(PROBE_V4), "outrigger-sidecar not-exempt 127.15.0.1:15002\n");
        assert_eq!(exempt_target(PROBE_V6).to_string(), "[::1]:15005");
        assert!(is_exempt_target(exempt_target(PROBE_V4)) && !is_exempt_target(PROBE_V4));
        assert!(is_inbound_probe("[::1]:15007".parse().unwrap()) && !is_inbound_probe(PROBE_V6));
        assert!(is_inbound_probe("[::ffff:127.15.0.1]:15007".parse().unwrap()));
        assert!(!is_inbound_probe("127.0.0.1:15007".parse().unwrap()));
        assert_eq!(no_way_back(no_way_back_answer("IPv4: x").as_bytes()).as_deref(), Some("IPv4: x"));
        assert_eq!(no_way_back(answer(PROBE_V4).as_bytes()), None);
        let mapped = "[::ffff:127.15.0.1]:15002".parse().unwrap();
        assert_eq!(answer(mapped), answer(PROBE_V4));
    }
}
