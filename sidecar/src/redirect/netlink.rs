//! Messages to the kernel's routing side, by rtnetlink(7): that takes no program, and its errors are numbers. What is
//! added and taken away is an [`Entry`]; `routes` and `way_back` say which there are.

use std::io;

use socket2::{Domain, Protocol, Socket, Type};

/// The same in every network namespace.
pub(super) const LOOPBACK_INDEX: u32 = 1;

pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_GETROUTE: u16 = 26;
pub(super) const RTM_NEWRULE: u16 = 32;
pub(super) const RTM_DELRULE: u16 = 33;
const NLMSG_ERROR: u16 = 2;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE_EXCLUSIVELY: u16 = 0x400 | 0x200;

/// What is wrong when something could not be added or taken away.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "no right to add or remove {what} ({error}). It takes CAP_NET_ADMIN in this network namespace: run this as root, in a \
         container with `capabilities: {{add: [NET_ADMIN]}}`, or inside `unshare -Urnm`"
    )]
    NoRight { what: &'static str, error: io::Error },
    #[error("{what} cannot be added, because the loopback interface is down ({error}): `ip link set lo up`")]
    LoopbackDown { what: &'static str, error: io::Error },
    #[error("the kernel does not take {what}, which `redirect print` shows: {error}")]
    Refused { what: &'static str, error: io::Error },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub(super) fn number(self) -> u8 {
        match self {
            Family::V4 => libc::AF_INET as u8,
            Family::V6 => libc::AF_INET6 as u8,
        }
    }
}

/// One route or rule of ours.
#[derive(Debug)]
pub(super) struct Entry {
    /// As errors call it.
    pub(super) what: &'static str,
    pub(super) family: Family,
    pub(super) add: Body,
    pub(super) delete: Body,
}

/// A message without its header: which it is, struct rtmsg or fib_rule_hdr, attributes.
#[derive(Clone, Debug)]
pub(super) struct Body {
    kind: u16,
    bytes: Vec<u8>,
}

impl Body {
    pub(super) fn new(kind: u16, head: [u8; 12]) -> Body {
        Body { kind, bytes: head.to_vec() }
    }

    /// In the byte order of this machine but for addresses. Values are padded to four bytes.
    pub(super) fn with(mut self, attribute: u16, value: &[u8]) -> Body {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(attribute.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn number(self, attribute: u16, value: u32) -> Body {
        self.with(attribute, &value.to_ne_bytes())
    }

    /// With struct nlmsghdr before it.
    fn message(&self) -> Vec<u8> {
        let flags = REQUEST
            | match self.kind {
                RTM_NEWROUTE | RTM_NEWRULE => ACK | CREATE_EXCLUSIVELY,
                RTM_DELROUTE | RTM_DELRULE => ACK,
                _ => 0,
            };
        let mut message = (self.bytes.len() as u32 + 16).to_ne_bytes().to_vec();
        message.extend(self.kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence and sender: there is but this message on this socket.
        message.extend([1u32.to_ne_bytes(), [0; 4]].concat());
        message.extend_from_slice(&self.bytes);
        message
    }
}

/// Adds those that are not there and gives them back. After an error none was added.
pub(super) fn add(entries: impl IntoIterator<Item = Entry>) -> Result<Vec<Entry>, Error> {
    let mut added = Vec::new();
    for entry in entries {
        match change(&entry.add) {
            Ok(()) => added.push(entry),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) if entry.family == Family::V6 && is_absent(&error) => {}
            Err(error) => {
                take_back(&added);
                return Err(told(entry.what, error));
            }
        }
    }
    Ok(added)
}

/// Undoes [`add`]. What fails now worked a moment ago, and the caller has an error to tell.
pub(super) fn take_back(added: &[Entry]) {
    for entry in added.iter().rev() {
        let _ = change(&entry.delete);
    }
}

/// Takes away those that are there.
pub(super) fn remove(entries: impl IntoIterator<Item = Entry>) -> Result<(), Error> {
    for entry in entries {
        match change(&entry.delete) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => {}
            Err(error) if entry.family == Family::V6 && is_absent(&error) => {}
            Err(error) => return Err(told(entry.what, error)),
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

fn told(what: &'static str, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EPERM) => Error::NoRight { what, error },
        Some(libc::ENETDOWN) => Error::LoopbackDown { what, error },
        _ => Error::Refused { what, error },
    }
}

/// Sends it to the kernel, which answers with an error number, 0 of which is none.
fn change(body: &Body) -> io::Result<()> {
    let (kind, answer) = ask(body)?;
    match (kind, number_at(&answer, 0)) {
        (NLMSG_ERROR, Some(0)) => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Sends it to the kernel; which message the answer is, and what is in it. An error number other than 0 is an error.
pub(super) fn ask(body: &Body) -> io::Result<(u16, Vec<u8>)> {
    let kernel = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    kernel.send(&body.message())?;
    let mut answer = [0; 1024];
    let count = io::Read::read(&mut &kernel, &mut answer)?;
    let (Some([low, high]), Some(inner)) = (answer.get(4..6), answer.get(16..count)) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let kind = u16::from_ne_bytes([*low, *high]);
    match number_at(inner, 0) {
        Some(code) if kind == NLMSG_ERROR && code != 0 => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Ok((kind, inner.to_vec())),
    }
}

fn number_at(bytes: &[u8], at: usize) -> Option<i32> {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).map(|number| i32::from_ne_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_length_that_they_say() {
        for kind in [RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE, RTM_NEWRULE, RTM_DELRULE] {
            let message = Body::new(kind, [0; 12]).number(1, 7).with(2, &[1, 2, 3, 4, 5, 6]).message();
            assert_eq!(u32::from_ne_bytes(*message.first_chunk().unwrap()) as usize, message.len());
            assert_eq!(message.len() % 4, 0);
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        let said = |code| told("the routes", io::Error::from_raw_os_error(code)).to_string();
        assert!(said(libc::EPERM).contains("CAP_NET_ADMIN"));
        assert!(said(libc::ENETDOWN).contains("ip link set lo up"));
        assert!(said(libc::EINVAL).contains("redirect print"));
    }
}
