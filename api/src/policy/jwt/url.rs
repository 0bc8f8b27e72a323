//! The address of a key set, and which addresses are never dialled for one: a document must not be able to make a sidecar
//! read what only its own machine or cloud may.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// `https://HOST[:PORT]/PATH`, or `http://` with a host that is loopback.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeySetUrl {
    text: String,
    pub https: bool,
    /// Without brackets.
    pub host: String,
    pub port: u16,
    /// With its query.
    pub path: String,
}

impl KeySetUrl {
    pub fn parse(text: &str) -> Result<KeySetUrl, String> {
        const LONGEST: usize = 2048;
        if text.len() > LONGEST || text.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err("not a URL: printable ASCII without spaces, at most 2048 bytes".to_owned());
        }
        let (https, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err("not an https URL: https://HOST[:PORT]/PATH".to_owned()),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains(['@', '\\', '%']) {
            return Err("user information and escapes are not read in a key set's URL".to_owned());
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(inside) => {
                let (host, behind) = inside.split_once(']').ok_or("an IPv6 address without `]`")?;
                host.parse::<Ipv6Addr>().map_err(|_| "not an IPv6 address between the brackets")?;
                (host, behind.strip_prefix(':').or_else(|| behind.is_empty().then_some("")))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, Some("")),
            },
        };
        let port = match port {
            Some("") if https => 443,
            Some("") => 80,
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or("not a port behind the host")?,
            None => return Err("something other than a port behind the host".to_owned()),
        };
        if host.is_empty() {
            return Err("it has no host".to_owned());
        }
        if path.contains('#') {
            return Err("a fragment is never sent: leave it out".to_owned());
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let url = KeySetUrl { text: text.to_owned(), https, host: host.to_ascii_lowercase(), port, path };
        if !https && !url.is_loopback() {
            return Err("keys are fetched by https; by http from loopback alone".to_owned());
        }
        if let Ok(ip) = url.host.parse()
            && let Some(why) = forbidden(ip, url.is_loopback())
        {
            return Err(format!("{} is {why}: no keys are fetched from there", url.host));
        }
        Ok(url)
    }

    /// Whether the host as it is written is this machine's loopback. A name that merely resolves to it is not.
    pub fn is_loopback(&self) -> bool {
        let name = self.host.strip_suffix('.').unwrap_or(&self.host);
        name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    }

    /// Why an address to which the host resolved must not be dialled.
    pub fn forbids(&self, ip: IpAddr) -> Option<&'static str> {
        forbidden(ip, self.is_loopback())
    }

    /// `Host` of the request.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.https, self.port) {
            (true, 443) | (false, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }
}

impl fmt::Display for KeySetUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for KeySetUrl {
    type Error = String;

    fn try_from(text: String) -> Result<KeySetUrl, String> {
        KeySetUrl::parse(&text)
    }
}

impl From<KeySetUrl> for String {
    fn from(url: KeySetUrl) -> String {
        url.text
    }
}

fn forbidden(ip: IpAddr, loopback: bool) -> Option<&'static str> {
    /// Metadata services of clouds that are not link-local.
    const METADATA_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match ip.to_canonical() {
        IpAddr::V4(ip) if ip.is_loopback() => (!loopback).then_some("this machine"),
        IpAddr::V4(ip) if ip.is_link_local() => Some("a link-local address, where clouds keep credentials"),
        IpAddr::V4(METADATA_V4) => Some("a cloud's metadata service"),
        IpAddr::V4(ip) if ip.octets()[0] == 0 => Some("this machine"),
        IpAddr::V4(ip) if ip.is_multicast() || ip.is_broadcast() => Some("the address of several machines"),
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) if ip.is_loopback() => (!loopback).then_some("this machine"),
        IpAddr::V6(ip) if ip.is_unspecified() => Some("this machine"),
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("a link-local address, where clouds keep credentials"),
        IpAddr::V6(METADATA_V6) => Some("a cloud's metadata service"),
        IpAddr::V6(ip) if ip.is_multicast() => Some("the address of several machines"),
        // NAT64 (RFC 6052) leads to the IPv4 address at its end.
        IpAddr::V6(ip) if ip.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0] => {
            let [.., a, b, c, d] = ip.octets();
            forbidden(Ipv4Addr::new(a, b, c, d).into(), false)
        }
        IpAddr::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let good = [
            ("https://a.test/keys", "a.test", 443, "/keys"),
            ("https://A.test:8443/keys?x=1", "a.test", 8443, "/keys?x=1"),
            ("https://a.test", "a.test", 443, "/"),
            ("https://a.test?x", "a.test", 443, "/?x"),
            ("https://10.0.0.7/k", "10.0.0.7", 443, "/k"),
            ("https://[fd00::1]:1/k", "fd00::1", 1, "/k"),
            ("http://127.0.0.1:8080/k", "127.0.0.1", 8080, "/k"),
            ("http://localhost/k", "localhost", 80, "/k"),
            ("http://[::1]/k", "::1", 80, "/k"),
        ];
        for (text, host, port, path) in good {
            let url = KeySetUrl::parse(text).unwrap();
            assert_eq!((url.host.as_str(), url.port, url.path.as_str()), (host, port, path), "{text}");
        }
        for wrong in [
            "",
            "keys",
            "ftp://a.test/",
            "file:///etc/passwd",
            "http://a.test/keys",
            "http://10.0.0.7/keys",
            "http://localhost.a.test/",
            "https:///keys",
            "https://a@b/keys",
            "https://a.test:0/",
            "https://a.test:x/",
            "https://[::1/",
            "https://[a]/",
            "https://a.test/ b",
            "https://a.test/#x",
            "https://169.254.169.254/latest",
            "https://[fe80::1]/",
            "https://[::ffff:169.254.169.254]/",
            "https://[64:ff9b::a9fe:a9fe]/",
            "https://[fd00:ec2::254]/",
            "https://100.100.100.200/",
            "https://0.0.0.0/",
            "https://224.0.0.1/",
        ] {
            assert!(KeySetUrl::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_name_must_not_resolve_to_this_machine() {
        let url = KeySetUrl::parse("https://a.test/keys").unwrap();
        for ip in ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.0.1", "0.0.0.0", "::"] {
            assert!(url.forbids(ip.parse().unwrap()).is_some(), "{ip}");
        }
        for ip in ["10.0.0.1", "93.184.216.34", "fd00::1"] {
            assert!(url.forbids(ip.parse().unwrap()).is_none(), "{ip}");
        }
        let local = KeySetUrl::parse("http://localhost:1/keys").unwrap();
        assert!(local.forbids("127.0.0.1".parse().unwrap()).is_none());
        assert!(local.forbids("169.254.0.1".parse().unwrap()).is_some());
    }
}
