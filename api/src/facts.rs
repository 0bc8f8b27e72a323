//! What a decision looks at: one connection and, on HTTP, one request of it. Borrowed views, so that they can be made of
//! a request on the wire, of a command line, or of a line of the access log, and so that making them costs nothing.

mod claims;

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::identity::SpiffeId;
use crate::name::ServiceName;
use crate::path::NormalPath;
pub use claims::Claims;

/// One connection, seen by the side that it comes in at.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// What mutual TLS proved; None for a caller that proved nothing.
    pub identity: Option<&'a SpiffeId>,
    pub source_ip: Option<IpAddr>,
    pub destination_ip: Option<IpAddr>,
    /// The application's port.
    pub destination_port: u16,
    /// The Service that the port belongs to.
    pub service: Option<&'a ServiceName>,
    /// Labels of the workload that is called.
    pub labels: &'a BTreeMap<String, String>,
    pub now: Moment,
    /// The server name that the application's own TLS asks for, on opaque bytes.
    pub sni: Option<&'a str>,
}

impl Connection<'_> {
    /// Whether it is to one of the Services, each `name.namespace`. No list means all of the workload's ports.
    pub fn is_of(&self, services: &[String]) -> bool {
        let is_called = |service: &String| {
            let (Some(called), Some((name, namespace))) = (self.service, service.split_once('.')) else { return false };
            *called.name == *name && *called.namespace == *namespace
        };
        services.is_empty() || services.iter().any(is_called)
    }
}

/// A time in UTC, as far as rules look at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Moment {
    /// 0 to 23.
    pub hour: u8,
    /// 0 is Monday.
    pub weekday: u8,
    /// Seconds since the Unix epoch.
    pub unix: u64,
}

impl Moment {
    pub const WEEKDAYS: [&'static str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

    /// From seconds since the Unix epoch, which began on a Thursday.
    pub fn of_unix_time(seconds: u64) -> Moment {
        let (hours, days) = (seconds / 3_600, seconds / 86_400);
        Moment { hour: (hours % 24) as u8, weekday: ((days + 3) % 7) as u8, unix: seconds }
    }
}

/// One request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a NormalPath<'a>,
    /// Behind the path, as it came.
    pub query: Option<&'a str>,
    /// Host or `:authority` as it came.
    pub host: &'a str,
    pub headers: &'a dyn Headers,
    /// What its token says, once that is verified; None without one.
    pub claims: Option<&'a Claims>,
}

/// The fields of a head.
pub trait Headers {
    /// Calls `each` with every value of a field, in their order, until it answers false. `name` is in lower case.
    fn each_value(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool);
}

impl Headers for Vec<(String, String)> {
    fn each_value(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        for (field, value) in self {
            if field.eq_ignore_ascii_case(name) && !each(value.as_bytes()) {
                return;
            }
        }
    }
}

/// A host as rules compare it: in lower case, without port and without one trailing dot.
pub fn normal_host(host: &str) -> String {
    bare_host(host).to_ascii_lowercase()
}

/// The same in a place of the caller's; None when it does not fit.
pub fn lower_host<'b>(host: &str, place: &'b mut [u8; 256]) -> Option<&'b str> {
    let bare = bare_host(host);
    let place = place.get_mut(..bare.len())?;
    place.copy_from_slice(bare.as_bytes());
    place.make_ascii_lowercase();
    std::str::from_utf8(place).ok()
}

fn bare_host(host: &str) -> &str {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(host, |(address, _)| address),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    bare.strip_suffix('.').unwrap_or(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_bare() {
        let cases = [
            ("a.test", "a.test"),
            ("A.TEST", "a.test"),
            ("a.test:80", "a.test"),
            ("a.test.", "a.test"),
            ("a.test.:80", "a.test"),
            ("[::1]:80", "::1"),
            ("[FD00::1]", "fd00::1"),
            ("", ""),
        ];
        for (host, expected) in cases {
            assert_eq!(normal_host(host), expected, "{host}");
        }
    }

    #[test]
    fn moments() {
        assert_eq!(Moment::of_unix_time(0), Moment { hour: 0, weekday: 3, unix: 0 });
        // 2026-11-28 14:30 UTC, a Saturday.
        assert_eq!(Moment::of_unix_time(1_795_876_200), Moment { hour: 14, weekday: 5, unix: 1_795_876_200 });
    }
}
