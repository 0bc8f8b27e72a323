//! The way back of `--keep-source-address`. The application answers a connection of the sidecar to the client's address, which
//! is another machine's; the rules mark such an answer, and what is here leads what is marked to this machine instead: a
//! rule for the mark, and a table with one route. Also whether all of it is in force, found out by doing it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::check;
use super::netlink::{
    self, Body, Entry, FAMILIES, Family, LOOPBACK_INDEX, RTM_DELROUTE, RTM_DELRULE, RTM_GETROUTE, RTM_NEWROUTE,
    RTM_NEWRULE,
};
use super::routes::{DESTINATION, OUT_INTERFACE, PROTOCOL_STATIC, SCOPE_ANY, SCOPE_HOST, TYPE_LOCAL};
use crate::net::{self, KEPT_SOURCE_MARK};

/// The number of the table and of the rule, which comes before those for all packets.
const TABLE: u32 = 15006;
const PRIORITY: u32 = 15006;

const ROUTE_TABLE: u16 = 15;
const ROUTE_MARK: u16 = 16;
const RULE_PRIORITY: u16 = 6;
const RULE_MARK: u16 = 10;
const RULE_TABLE: u16 = 15;
const TO_TABLE: u8 = 1;

/// Clients that nobody is: outside of the virtual networks, and on no network that is routed.
const NOBODY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(240, 241, 0, 1));
const NOBODY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd3a, 0x94e7, 0xc15b, 1, 0, 0, 0, 1));
/// On loopback a connection is made before the call returns, or not at all.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the rule and the route are as commands, for people and for the script: per family the route and the rule.
pub(super) fn commands(verb: &str) -> [[String; 2]; 2] {
    [("", "default"), (" -6", "::/0")].map(|(family, all)| {
        let route_verb = if verb == "add" { "replace" } else { verb };
        [
            format!("ip{family} route {route_verb} local {all} dev lo table {TABLE}"),
            format!("ip{family} rule {verb} fwmark {KEPT_SOURCE_MARK} lookup {TABLE} priority {PRIORITY}"),
        ]
    })
}

/// How `ip rule` lists the rule.
pub(super) fn listed() -> String {
    format!("fwmark {KEPT_SOURCE_MARK:#x} lookup {TABLE}")
}

/// The route comes first: a rule that leads to an empty table decides nothing.
pub(super) fn entries() -> impl DoubleEndedIterator<Item = Entry> {
    let entry = |family, add, delete| Entry { what: "the way back of --keep-source-address", family, add, delete };
    FAMILIES.into_iter().flat_map(move |family| {
        [
            entry(family, route(RTM_NEWROUTE, family), route(RTM_DELROUTE, family)),
            entry(family, rule(RTM_NEWRULE, family), rule(RTM_DELRULE, family)),
        ]
    })
}

fn route(kind: u16, family: Family) -> Body {
    let (scope, protocol) = match (kind, family) {
        (RTM_NEWROUTE, Family::V4) => (SCOPE_HOST, PROTOCOL_STATIC),
        (RTM_NEWROUTE, Family::V6) => (0, PROTOCOL_STATIC),
        _ => (SCOPE_ANY, 0),
    };
    Body::new(kind, [family.number(), 0, 0, 0, 0, protocol, scope, TYPE_LOCAL, 0, 0, 0, 0])
        .number(OUT_INTERFACE, LOOPBACK_INDEX)
        .number(ROUTE_TABLE, TABLE)
}

fn rule(kind: u16, family: Family) -> Body {
    Body::new(kind, [family.number(), 0, 0, 0, 0, 0, 0, TO_TABLE, 0, 0, 0, 0])
        .number(RULE_PRIORITY, PRIORITY)
        .number(RULE_MARK, KEPT_SOURCE_MARK)
        .number(RULE_TABLE, TABLE)
}

/// Whether what is answered to a client's address comes back, in each family; an error says in which it does not and what is
/// absent. Takes the right to open such connections.
pub async fn way_back() -> Result<(), String> {
    let (v4, v6) = (way_back_in(true).await, way_back_in(false).await);
    let absent: Vec<String> = [v4, v6].into_iter().filter_map(Result::err).collect();
    if absent.is_empty() { Ok(()) } else { Err(absent.join("; ")) }
}

/// The same in one family. One that no client can use is in order.
pub async fn way_back_in(is_ipv4: bool) -> Result<(), String> {
    let (family, name, nobody, used) = if is_ipv4 {
        (Family::V4, "IPv4", NOBODY_V4, check::has_v4())
    } else {
        (Family::V6, "IPv6", NOBODY_V6, check::has_v6())
    };
    match if used { missing(family, nobody).await } else { None } {
        Some(why) => Err(format!("{name}: {why}")),
        None => Ok(()),
    }
}

async fn missing(family: Family, nobody: IpAddr) -> Option<String> {
    match is_led_back(family, nobody) {
        Ok(true) => {}
        Ok(false) => return Some("no rule leads what is marked back to this machine".to_owned()),
        Err(error) => return Some(format!("the kernel does not say where what is marked goes: {error}")),
    }
    // Where the address would leave this machine, as a client's does, the whole way is tried; elsewhere there is none.
    let own = net::source_towards(nobody).ok().filter(|own| !own.is_loopback() && !is_link_local(*own))?;
    match net::answers_come_back(nobody, own, PATIENCE).await {
        Ok(true) => None,
        Ok(false) => Some("an answer to a client's address left this machine".to_owned()),
        // What this machine has run out of says nothing about the rules.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) =>
        {
            None
        }
        Err(error) => Some(format!("a connection with a client's address failed: {error}")),
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Whether what is marked and goes to that address is delivered here.
fn is_led_back(family: Family, to: IpAddr) -> io::Result<bool> {
    let address = match to {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let whole = address.len() as u8 * 8;
    let question = Body::new(RTM_GETROUTE, [family.number(), whole, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .with(DESTINATION, &address)
        .number(ROUTE_MARK, KEPT_SOURCE_MARK);
    match netlink::ask(&question) {
        // struct rtmsg: its eighth byte is the type.
        Ok((RTM_NEWROUTE, route)) => Ok(route.get(7) == Some(&TYPE_LOCAL)),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_commands() {
        let [v4, v6] = commands("add");
        assert_eq!(
            v4,
            [
                "ip route replace local default dev lo table 15006",
                "ip rule add fwmark 15006 lookup 15006 priority 15006"
            ]
        );
        assert_eq!(v6[0], "ip -6 route replace local ::/0 dev lo table 15006");
        assert_eq!(commands("del")[0][0], "ip route del local default dev lo table 15006");
        assert_eq!(listed(), "fwmark 0x3a9e lookup 15006");
    }
}
