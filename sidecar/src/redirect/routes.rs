//! The routes to virtual addresses that go with `--dns`. A connection to where no route leads ends before the packet filter
//! sees it, so both networks are this machine's own: on loopback, with a metric by which they are known as ours and leave
//! everybody else's alone. Asked of the kernel itself (rtnetlink(7)): that takes no program, and its errors are numbers.

use std::io;
use std::net::Ipv4Addr;

use outrigger_api::virtual_address::{IPV4_NETWORK, IPV6_NETWORK};
use socket2::{Domain, Protocol, Socket, Type};

/// Ours have it, and nobody else's. It decides nothing: no other route leads there.
const METRIC: u32 = 15053;
/// The same in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const NLMSG_ERROR: u16 = 2;
const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
const CREATE_EXCLUSIVELY: u16 = 0x400 | 0x200;
const TABLE_LOCAL: u8 = 255;
const PROTOCOL_STATIC: u8 = 4;
const SCOPE_HOST: u8 = 254;
const SCOPE_ANY: u8 = 255;
const TYPE_LOCAL: u8 = 2;
const DESTINATION: u16 = 1;
const OUT_INTERFACE: u16 = 4;
const PRIORITY: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;

/// Why there are no routes.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "no right to add or remove the routes to virtual addresses ({0}). It takes CAP_NET_ADMIN in this network namespace: \
         run this as root, in a container with `capabilities: {{add: [NET_ADMIN]}}`, or inside `unshare -Urnm`"
    )]
    NoRight(io::Error),
    #[error(
        "there can be no route to virtual addresses, because the loopback interface is down ({0}): `ip link set lo up`"
    )]
    LoopbackDown(io::Error),
    #[error("the kernel does not take the routes to virtual addresses, which `redirect print --dns` shows: {0}")]
    Refused(io::Error),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// What the routes are as commands, for people and for the script.
pub(super) fn commands(verb: &str) -> [String; 2] {
    let ((v4, v4_prefix), (v6, v6_prefix)) = (IPV4_NETWORK, IPV6_NETWORK);
    let source = if verb == "del" { "" } else { " src 127.0.0.1" };
    [
        format!("ip route {verb} local {v4}/{v4_prefix} dev lo{source} metric {METRIC}"),
        format!("ip -6 route {verb} local {v6}/{v6_prefix} dev lo metric {METRIC}"),
    ]
}

/// Adds those that are not there and says which they were. After an error none was added.
pub(super) fn add() -> Result<Vec<Family>, Error> {
    let mut added = Vec::new();
    for family in FAMILIES {
        match ask(&request(RTM_NEWROUTE, family)) {
            Ok(()) => added.push(family),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) if family == Family::V6 && is_absent(&error) => {}
            Err(error) => {
                take_back(&added);
                return Err(told(error));
            }
        }
    }
    Ok(added)
}

/// Undoes [`add`]. What fails now worked a moment ago, and the caller has an error to tell.
pub(super) fn take_back(added: &[Family]) {
    for family in added {
        let _ = ask(&request(RTM_DELROUTE, *family));
    }
}

/// Takes away those that are there.
pub(super) fn remove() -> Result<(), Error> {
    for family in FAMILIES {
        match ask(&request(RTM_DELROUTE, family)) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) if family == Family::V6 && is_absent(&error) => {}
            Err(error) => return Err(told(error)),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// A kernel or a network namespace without IPv6, or without it on loopback.
fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES, libc::ENODEV];
    error.raw_os_error().is_some_and(|code| absent.contains(&code))
}

fn told(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EPERM) => Error::NoRight(error),
        Some(libc::ENETDOWN) => Error::LoopbackDown(error),
        _ => Error::Refused(error),
    }
}

/// One message: struct nlmsghdr, struct rtmsg, attributes. In the byte order of this machine but for addresses.
fn request(what: u16, family: Family) -> Vec<u8> {
    let is_new = what == RTM_NEWROUTE;
    let (family, prefix, network) = match family {
        Family::V4 => (libc::AF_INET as u8, IPV4_NETWORK.1, IPV4_NETWORK.0.octets().to_vec()),
        Family::V6 => (libc::AF_INET6 as u8, IPV6_NETWORK.1, IPV6_NETWORK.0.octets().to_vec()),
    };
    let is_v4 = network.len() == 4;
    let scope = match (is_new, is_v4) {
        (true, true) => SCOPE_HOST,
        (true, false) => 0,
        (false, _) => SCOPE_ANY,
    };
    let protocol = if is_new { PROTOCOL_STATIC } else { 0 };
    let mut body = vec![family, prefix, 0, 0, TABLE_LOCAL, protocol, scope, TYPE_LOCAL, 0, 0, 0, 0];
    let mut attribute = |kind: u16, value: &[u8]| {
        body.extend((value.len() as u16 + 4).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend_from_slice(value);
    };
    attribute(DESTINATION, &network);
    attribute(OUT_INTERFACE, &LOOPBACK_INDEX.to_ne_bytes());
    attribute(PRIORITY, &METRIC.to_ne_bytes());
    if is_new && is_v4 {
        // Otherwise who connects would have the address that it connects to.
        attribute(PREFERRED_SOURCE, &Ipv4Addr::LOCALHOST.octets());
    }
    let flags = REQUEST_AND_ACK | if is_new { CREATE_EXCLUSIVELY } else { 0 };
    let mut message = (body.len() as u32 + 16).to_ne_bytes().to_vec();
    message.extend(what.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence and sender: there is but this message on this socket.
    message.extend([1u32.to_ne_bytes(), [0; 4]].concat());
    message.extend(body);
    message
}

/// Sends it to the kernel, which answers with an error number, 0 of which is none.
fn ask(message: &[u8]) -> io::Result<()> {
    let kernel = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    kernel.send(message)?;
    let mut answer = [0; 256];
    let count = io::Read::read(&mut &kernel, &mut answer)?;
    let field = |at: usize| answer[..count].get(at..).and_then(|rest| rest.first_chunk::<4>()).copied();
    let kind = field(4).map(|[low, high, ..]| u16::from_ne_bytes([low, high]));
    match (kind, field(16).map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_length_that_they_say() {
        for family in FAMILIES {
            for what in [RTM_NEWROUTE, RTM_DELROUTE] {
                let message = request(what, family);
                assert_eq!(u32::from_ne_bytes(*message.first_chunk().unwrap()) as usize, message.len());
                assert_eq!(message.len() % 4, 0);
            }
        }
    }

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

    #[test]
    fn errors_say_what_to_do() {
        let said = |code| told(io::Error::from_raw_os_error(code)).to_string();
        assert!(said(libc::EPERM).contains("CAP_NET_ADMIN"));
        assert!(said(libc::ENETDOWN).contains("ip link set lo up"));
        assert!(said(libc::EINVAL).contains("redirect print"));
    }
}
