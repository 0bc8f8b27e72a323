//! Parsers for the values of single flags. Each error says what was expected; key and value are added by the caller.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use outrigger_api::identity::{ROOT_NAMESPACE, is_account};
use outrigger_api::name::{self, NameError, Protocol, ServicePort};
use outrigger_api::resource::duration as go_duration;

use super::{DeclaredPort, Inbound};

/// Why a value is not what its flag takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("expected HOST:PORT, as in mesh.example:15012 or [::1]:15012")]
    HostAndPort,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{ROOT_NAMESPACE} is the namespace of the mesh's own parts; a workload needs another one")]
    RootNamespace,
    #[error("expected a service account's name: DNS labels, divided by dots")]
    Account,
    #[error("expected KEY=VALUE")]
    KeyAndValue,
    #[error(
        "the key is not one: at most 63 of letters, digits, '-', '_' and '.', starting and ending with a letter or \
         digit, behind an optional prefix such as example.com/"
    )]
    LabelKey,
    #[error(
        "the value of a label is at most 63 of letters, digits, '-', '_' and '.', starting and ending with a letter \
         or digit"
    )]
    LabelValue,
    #[error("no peer can reach this address; expected one of this workload's own")]
    Unreachable,
    #[error("expected PORT or PORT/PROTOCOL, PORT being 1 to 65535")]
    Port,
    #[error("expected LISTEN=APP, both ADDR:PORT, as in 10.0.0.7:9080=127.0.0.1:8080")]
    Inbound,
    #[error("the application's address needs an IP and a port to connect to")]
    Application,
    #[error("expected LISTEN=SERVICE:PORT, as in 127.0.0.1:7001=catalog.shop:80")]
    Outbound,
    #[error("expected ADDR or ADDR:PORT of a name server, as in 10.0.0.2, 10.0.0.2:53 or [fd00::53]:53")]
    NameServer,
    #[error(transparent)]
    Duration(#[from] go_duration::DurationError),
}

/// A control plane's address: a name or an IP, and a port that is not 0.
pub(super) fn host_and_port(text: &str) -> Result<String, ValueError> {
    let (host, port) = text.rsplit_once(':').ok_or(ValueError::HostAndPort)?;
    let is_host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && host.len() <= 253
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        }
    };
    if is_host && number(port).is_some() { Ok(text.to_owned()) } else { Err(ValueError::HostAndPort) }
}

pub(super) fn label(text: &str) -> Result<String, ValueError> {
    Ok(name::label(text)?.to_owned())
}

pub(super) fn namespace(text: &str) -> Result<String, ValueError> {
    if text == ROOT_NAMESPACE { Err(ValueError::RootNamespace) } else { label(text) }
}

pub(super) fn account(text: &str) -> Result<String, ValueError> {
    if is_account(text) { Ok(text.to_owned()) } else { Err(ValueError::Account) }
}

/// A label, by the rules of Kubernetes, so that what selects pods selects other workloads as well.
pub(super) fn key_and_value(text: &str) -> Result<(String, String), ValueError> {
    let (key, value) = text.split_once('=').ok_or(ValueError::KeyAndValue)?;
    let is_key = match key.split_once('/') {
        Some((prefix, name)) => is_account(prefix) && is_label_text(name),
        None => is_label_text(key),
    };
    if !is_key {
        return Err(ValueError::LabelKey);
    }
    if !value.is_empty() && !is_label_text(value) {
        return Err(ValueError::LabelValue);
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn is_label_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

pub(super) fn reachable(text: &str) -> Result<IpAddr, ValueError> {
    let ip: IpAddr = text.parse().map_err(|_| ValueError::Unreachable)?;
    if ip.is_unspecified() || ip.is_multicast() { Err(ValueError::Unreachable) } else { Ok(ip) }
}

pub(super) fn declared_port(text: &str) -> Result<DeclaredPort, ValueError> {
    let (port, protocol) = match text.split_once('/') {
        Some((port, protocol)) => (port, Some(protocol.parse::<Protocol>()?)),
        None => (text, None),
    };
    Ok(DeclaredPort { port: number(port).ok_or(ValueError::Port)?, protocol })
}

pub(super) fn inbound(text: &str) -> Result<Inbound, ValueError> {
    let (listen, app) = text.split_once('=').ok_or(ValueError::Inbound)?;
    let address = |text: &str| text.parse::<SocketAddr>().map_err(|_| ValueError::Inbound);
    let (listen, app) = (address(listen)?, address(app)?);
    if app.port() == 0 || app.ip().is_unspecified() || app.ip().is_multicast() {
        return Err(ValueError::Application);
    }
    Ok(Inbound { listen, app })
}

/// `--outbound` before the own namespace is known, which a short name of a service needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnqualifiedOutbound {
    pub listen: SocketAddr,
    /// `service[.namespace]:port`, checked.
    pub destination: String,
}

pub(super) fn outbound(text: &str) -> Result<UnqualifiedOutbound, ValueError> {
    let (listen, destination) = text.split_once('=').ok_or(ValueError::Outbound)?;
    let listen = listen.parse().map_err(|_| ValueError::Outbound)?;
    ServicePort::parse(destination, "any")?;
    Ok(UnqualifiedOutbound { listen, destination: destination.to_owned() })
}

/// Names are asked at port 53 unless another one is given.
pub(super) fn name_server(text: &str) -> Result<SocketAddr, ValueError> {
    let address = text.parse::<SocketAddr>().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, 53)));
    let usable =
        |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast();
    address.ok().filter(usable).ok_or(ValueError::NameServer)
}

pub(super) fn duration(text: &str) -> Result<Duration, ValueError> {
    Ok(go_duration::parse(text)?)
}

/// A port number of digits alone, not 0.
fn number(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_planes() {
        for text in ["localhost:1", "mesh.example:15012", "10.0.0.1:15012", "[::1]:15012", "control_plane:15012"] {
            assert_eq!(host_and_port(text).as_deref(), Ok(text));
        }
        for text in ["", ":1", "a", "a:", "a:0", "a:65536", "a:+1", "::1:15012", "[::1", "[a]:1", "http://a:1", "a b:1"]
        {
            assert!(host_and_port(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names() {
        assert!(label("cart-1").is_ok() && label("Cart").is_err());
        assert_eq!(namespace("outrigger-system"), Err(ValueError::RootNamespace));
        assert!(account("a.b").is_ok() && account("a_b").is_err());
    }

    #[test]
    fn labels() {
        let pair = |key: &str, value: &str| Ok((key.to_owned(), value.to_owned()));
        assert_eq!(key_and_value("app=cart"), pair("app", "cart"));
        assert_eq!(key_and_value("example.com/tier="), pair("example.com/tier", ""));
        for text in ["app", "=x", "a b=c", "-a=b", "app=a=b", "app=a b", "/a=b", "x/y/z=b", "a=-"] {
            assert!(key_and_value(text).is_err(), "{text}");
        }
        assert!(key_and_value(&format!("{}=x", "a".repeat(64))).is_err());
    }

    #[test]
    fn name_servers() {
        for (text, address) in [
            ("10.0.0.2", "10.0.0.2:53"),
            ("10.0.0.2:54", "10.0.0.2:54"),
            ("fd00::53", "[fd00::53]:53"),
            ("[::1]:5", "[::1]:5"),
        ] {
            assert_eq!(name_server(text).unwrap().to_string(), address);
        }
        for text in
            ["", "dns.example", "10.0.0.2:0", "10.0.0.2:", "0.0.0.0", "[::]:53", "224.0.0.251", "10.0.0.2,10.0.0.3"]
        {
            assert_eq!(name_server(text), Err(ValueError::NameServer), "{text}");
        }
    }

    #[test]
    fn ports_and_addresses() {
        assert_eq!(declared_port("80"), Ok(DeclaredPort { port: 80, protocol: None }));
        assert_eq!(declared_port("80/grpc"), Ok(DeclaredPort { port: 80, protocol: Some(Protocol::Grpc) }));
        for text in ["", "0", "80/", "80/udp", "http", "+80", "65536", "80/http/2"] {
            assert!(declared_port(text).is_err(), "{text}");
        }
        let both = inbound("127.0.0.1:0=[::1]:8080").unwrap();
        assert_eq!((both.listen.port(), both.app.to_string()), (0, "[::1]:8080".to_owned()));
        for text in ["", "127.0.0.1:1", "127.0.0.1:1=", "1=2", "127.0.0.1:1=127.0.0.1:0", "127.0.0.1:1=0.0.0.0:80"] {
            assert!(inbound(text).is_err(), "{text}");
        }
        assert_eq!(outbound("127.0.0.1:0=catalog:80").unwrap().destination, "catalog:80");
        for text in ["", "127.0.0.1:1", "127.0.0.1:1=catalog", "catalog:80=127.0.0.1:1", "127.0.0.1:1=a:0"] {
            assert!(outbound(text).is_err(), "{text}");
        }
        for text in ["0.0.0.0", "::", "224.0.0.1", "host"] {
            assert!(reachable(text).is_err(), "{text}");
        }
        assert!(duration("1m30s").is_ok() && duration("5").is_err());
    }
}
