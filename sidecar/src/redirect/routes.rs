//! The routes to virtual addresses that go with `--dns`. A connection to where no route leads ends before the packet filter
//! sees it, so both networks are this machine's own: on loopback, with a metric by which they are known as ours and leave
//! everybody else's alone. Asked of the kernel itself by `netlink`.

use std::net::Ipv4Addr;

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};

use super::netlink::{Body, Entry, FAMILIES, Family, LOOPBACK_INDEX, RTM_DELROUTE, RTM_NEWROUTE};

/// Ours have it, and nobody else's. It decides nothing: no other route leads there.
const METRIC: u32 = 15053;

const TABLE_LOCAL: u8 = 255;
pub(super) const PROTOCOL_STATIC: u8 = 4;
pub(super) const SCOPE_HOST: u8 = 254;
pub(super) const SCOPE_ANY: u8 = 255;
pub(super) const TYPE_LOCAL: u8 = 2;
pub(super) const DESTINATION: u16 = 1;
pub(super) const OUT_INTERFACE: u16 = 4;
const PRIORITY: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;

/// What the routes are as commands, for people and for the script.
pub(super) fn commands(verb: &str) -> [String; 2] {
    let ((v4, v4_prefix), (v6, v6_prefix)) = (IPV4_NETWORK, IPV6_NETWORK);
    let source = if verb == "del" { "" } else { " src 127.0.0.1" };
    [
        format!("ip route {verb} local {v4}/{v4_prefix} dev lo{source} metric {METRIC}"),
        format!("ip -6 route {verb} local {v6}/{v6_prefix} dev lo metric {METRIC}"),
    ]
}

pub(super) fn entries() -> [Entry; 2] {
    FAMILIES.map(|family| Entry {
        what: "the routes to virtual addresses",
        family,
        add: body(RTM_NEWROUTE, family),
        delete: body(RTM_DELROUTE, family),
    })
}

fn body(kind: u16, family: Family) -> Body {
    let is_new = kind == RTM_NEWROUTE;
    let (prefix, network) = match family {
        Family::V4 => (IPV4_NETWORK.1, IPV4_NETWORK.0.octets().to_vec()),
        Family::V6 => (IPV6_NETWORK.1, IPV6_NETWORK.0.octets().to_vec()),
    };
    let is_v4 = family == Family::V4;
    let scope = match (is_new, is_v4) {
        (true, true) => SCOPE_HOST,
        (true, false) => 0,
        (false, _) => SCOPE_ANY,
    };
    let protocol = if is_new { PROTOCOL_STATIC } else { 0 };
    let head = [family.number(), prefix, 0, 0, TABLE_LOCAL, protocol, scope, TYPE_LOCAL, 0, 0, 0, 0];
    let body = Body::new(kind, head)
        .with(DESTINATION, &network)
        .number(OUT_INTERFACE, LOOPBACK_INDEX)
        .number(PRIORITY, METRIC);
    if is_new && is_v4 {
        // Otherwise who connects would have the address that it connects to.
        return body.with(PREFERRED_SOURCE, &Ipv4Addr::LOCALHOST.octets());
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_commands() {
        assert_eq!(
            commands("replace"),
            [
                "ip route replace local 240.240.0.0/16 dev lo src 127.0.0.1 metric 15053",
                "ip -6 route replace local fd3a:94e7:c15b::/64 dev lo metric 15053",
            ]
        );
        assert_eq!(commands("del")[0], "ip route del local 240.240.0.0/16 dev lo metric 15053");
    }
}
