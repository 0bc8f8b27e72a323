//! Logins that authenticate a connection instead of a request: NTLM and Negotiate (RFC 4559). A pooled connection would
//! hand such a login to the next client. A downstream connection on which one begins has upstream connections of its
//! own from then on, one lane per target, until it ends. The lanes ask this; nothing here does I/O.

use std::cell::RefCell;
use std::rc::Rc;

use super::dial::Target;
use super::lane::Lane;

/// The upstream connections that belong to one downstream connection.
#[derive(Default)]
pub struct Bound {
    lanes: RefCell<Vec<Rc<Lane>>>,
}

/// Targets to which one downstream connection keeps connections of its own. The oldest login ends beyond that.
const MOST_TARGETS: usize = 8;

/// Schemes that authenticate the connection, in lower case.
const SCHEMES: [&[u8]; 4] = [b"ntlm", b"negotiate", b"kerberos", b"nego2"];

impl Bound {
    /// No login has begun on this downstream connection.
    pub fn is_empty(&self) -> bool {
        self.lanes.borrow().is_empty()
    }

    /// Whether a login has begun at this target.
    pub fn has(&self, target: &Target) -> bool {
        self.lanes.borrow().iter().any(|lane| lane.target().is_same(target))
    }

    /// The own lane to the target of `shared`, if a login has begun there.
    pub fn find(&self, shared: &Lane) -> Option<Rc<Lane>> {
        self.lanes.borrow().iter().find(|lane| lane.target().is_same(shared.target())).cloned()
    }

    /// The own lane to the target of `shared`; made now if none is there.
    pub fn bind(&self, shared: &Lane) -> Rc<Lane> {
        if let Some(own) = self.find(shared) {
            return own;
        }
        let own = shared.unshared();
        let mut lanes = self.lanes.borrow_mut();
        if lanes.len() >= MOST_TARGETS {
            lanes.remove(0);
        }
        lanes.push(own.clone());
        own
    }
}

/// Whether a field of credentials or challenges names a scheme that authenticates the connection. Text within quotes
/// may be mistaken for one: that costs a connection and nothing else.
pub fn names_scheme(field: &[u8]) -> bool {
    field.split(|byte| *byte == b',').any(|member| {
        let start = member.iter().position(u8::is_ascii_alphanumeric).unwrap_or(member.len());
        let word = &member[start..];
        let end = word.iter().position(|byte| !byte.is_ascii_alphanumeric()).unwrap_or(word.len());
        SCHEMES.iter().any(|scheme| word[..end].eq_ignore_ascii_case(scheme))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_that_bind() {
        let cases: &[(&[u8], bool)] = &[
            (b"NTLM", true),
            (b"ntlm TlRMTVNTUAABAAAA", true),
            (b"Negotiate", true),
            (b"NEGOTIATE oYGxMIGu==", true),
            (b"Kerberos", true),
            (b"Nego2 x", true),
            (b"Basic realm=\"a\", NTLM", true),
            (b"Negotiate,NTLM", true),
            (b", \tnegotiate", true),
            (b"Bearer realm=\"x, y\",\tNegotiate token", true),
            (b"NTLM\xa0x", true),
            (b"", false),
            (b",,", false),
            (b"Basic realm=\"NTLM\"", false),
            (b"Basic TlRMTVNTUAABAAAA", false),
            (b"Bearer ntlm", false),
            (b"NTLMv2 x", false),
            (b"Digest username=\"ntlm\", realm=\"negotiate\"", false),
            (b"Bearer eyJhbGciOiJFUzI1NiJ9.e30.x", false),
        ];
        for (field, expected) in cases {
            assert_eq!(names_scheme(field), *expected, "{}", String::from_utf8_lossy(field));
        }
    }
}
