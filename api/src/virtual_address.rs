//! Virtual addresses: what a service without a clusterIP is reached at by those who ask a sidecar's resolver. They exist
//! nowhere on the network; the redirect rules bring what is sent to them to the sidecar, which knows whose they are.
//! The control plane gives each such service one number, and so one address of each family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `240.240.0.0/16`: of the block that the internet never assigned (RFC 1112 section 4), so it is nobody's.
pub const IPV4_NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(240, 240, 0, 0), 16);
/// A unique local network (RFC 4193) with a random global id, the same for every mesh: the rules and routes on a machine
/// do not depend on which control plane its sidecar has.
pub const IPV6_NETWORK: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd3a, 0x94e7, 0xc15b, 0, 0, 0, 0, 0), 64);
/// Numbers begin at 1. The last address of the IPv4 network is left out like the first: some programs take both for
/// something else than a host's.
pub const LAST_NUMBER: u16 = u16::MAX - 1;

/// The addresses of a number, IPv4 first; None of 0 and of what is beyond [`LAST_NUMBER`].
pub fn addresses(number: u16) -> Option<[IpAddr; 2]> {
    let [high, low] = number.to_be_bytes();
    let [a, b, ..] = IPV4_NETWORK.0.octets();
    let [first, second, third, fourth, ..] = IPV6_NETWORK.0.segments();
    (1..=LAST_NUMBER).contains(&number).then(|| {
        [Ipv4Addr::new(a, b, high, low).into(), Ipv6Addr::new(first, second, third, fourth, 0, 0, 0, number).into()]
    })
}

/// Whether an address is of one of the two networks, given to a service or not.
pub fn is_virtual(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets()[..2] == IPV4_NETWORK.0.octets()[..2],
        IpAddr::V6(ip) => ip.segments()[..4] == IPV6_NETWORK.0.segments()[..4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_two_addresses_of_its_own() {
        let texts = |number| addresses(number).map(|ips| ips.map(|ip| ip.to_string()));
        assert_eq!(texts(1).unwrap(), ["240.240.0.1", "fd3a:94e7:c15b::1"]);
        assert_eq!(texts(LAST_NUMBER).unwrap(), ["240.240.255.254", "fd3a:94e7:c15b::fffe"]);
        assert_eq!((texts(0), texts(u16::MAX)), (None, None));
        assert!((1..=LAST_NUMBER).flat_map(|number| addresses(number).unwrap()).all(is_virtual));
    }

    #[test]
    fn others_are_not_virtual() {
        for ip in ["240.241.0.1", "10.0.0.1", "fd3a:94e7:c15b:1::1", "::1", "255.255.255.255"] {
            assert!(!is_virtual(ip.parse().unwrap()), "{ip}");
        }
        assert!(is_virtual("::ffff:240.240.0.7".parse().unwrap()));
    }
}
