//! Names of services and workloads, and the protocol that a port declares. Both sides parse them here, so that
//! `catalog`, `catalog.shop` and `catalog.shop.svc.cluster.local` mean the same thing everywhere.

use std::fmt;
use std::sync::Arc;

use crate::peer_text::cut;

/// Why a text is not a name. The message says which rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} is not a DNS label: 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit")]
    Label(String),
    #[error(
        "{0:?} is not a service name: expected `service`, `service.namespace` or `service.namespace.svc.cluster.local`"
    )]
    Service(String),
    #[error("{0:?} is not a destination: expected `service[.namespace]:port`")]
    Destination(String),
    #[error("{0:?} is not a protocol: expected http, http2, grpc, tcp or tls")]
    Protocol(String),
}

/// True for a DNS label (RFC 1123): what namespaces, services, service accounts and workloads are called.
pub fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| edge(b) || *b == b'-')
        && bytes.first().is_some_and(edge)
        && bytes.last().is_some_and(edge)
}

/// Checks a DNS label and says what is wrong with it.
pub fn label(text: &str) -> Result<&str, NameError> {
    if is_label(text) { Ok(text) } else { Err(NameError::Label(cut(text))) }
}

/// A service: `name` in `namespace`. Its text form is `name.namespace`, the value of the metric label
/// `destination_service`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceName {
    pub fn new(name: &str, namespace: &str) -> Result<ServiceName, NameError> {
        Ok(ServiceName { name: label(name)?.into(), namespace: label(namespace)?.into() })
    }

    /// Parses `svc` (in `own_namespace`), `svc.ns`, `svc.ns.svc` and `svc.ns.svc.cluster.local`, with or without
    /// a trailing dot, in any case.
    pub fn parse(text: &str, own_namespace: &str) -> Result<ServiceName, NameError> {
        let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let bare = lower.strip_suffix(".svc.cluster.local").or_else(|| lower.strip_suffix(".svc")).unwrap_or(&lower);
        let qualified = bare.len() != lower.len();
        let parsed = match bare.split_once('.') {
            Some((name, namespace)) => ServiceName::new(name, namespace),
            None if qualified => return Err(NameError::Service(cut(text))),
            None => ServiceName::new(bare, own_namespace),
        };
        parsed.map_err(|_| NameError::Service(cut(text)))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// One port of a service, as `--outbound` and an authority name it: `catalog.shop:80`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServicePort {
    pub service: ServiceName,
    pub port: u16,
}

impl ServicePort {
    /// Parses `service[.namespace]:port`.
    pub fn parse(text: &str, own_namespace: &str) -> Result<ServicePort, NameError> {
        let wrong = || NameError::Destination(cut(text));
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        Ok(ServicePort { service: ServiceName::parse(host, own_namespace)?, port })
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// What is declared about a port. Not declared is `Option::None`: the sidecar detects.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    Http,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

impl Protocol {
    pub const ALL: [Protocol; 5] = [Protocol::Http, Protocol::Http2, Protocol::Grpc, Protocol::Tcp, Protocol::Tls];

    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Http => "http",
            Protocol::Http2 => "http2",
            Protocol::Grpc => "grpc",
            Protocol::Tcp => "tcp",
            Protocol::Tls => "tls",
        }
    }

    /// What `Service.spec.ports[].appProtocol` says, in any case; a value that names no protocol of ours declares
    /// nothing. Knows the Kubernetes values too (`kubernetes.io/h2c`, `kubernetes.io/ws`, `kubernetes.io/wss`).
    pub fn from_app_protocol(text: &str) -> Option<Protocol> {
        match text.to_ascii_lowercase().as_str() {
            "kubernetes.io/ws" => Some(Protocol::Http),
            "kubernetes.io/h2c" => Some(Protocol::Http2),
            "kubernetes.io/wss" => Some(Protocol::Tls),
            word => Protocol::from_word(word),
        }
    }

    /// What a port's name declares by its prefix, as in `grpc`, `http-web` or `grpc-web-public`.
    pub fn from_port_name(name: &str) -> Option<Protocol> {
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Protocol::from_word("grpc-web");
        }
        Protocol::from_word(name.split_once('-').map_or(name, |(prefix, _)| prefix))
    }

    /// The words that Services use, and the names of well-known protocols that nobody here parses. gRPC-Web is
    /// carried as the HTTP that it is.
    fn from_word(word: &str) -> Option<Protocol> {
        match word {
            "http" | "http1" | "grpc-web" => Some(Protocol::Http),
            "http2" | "h2c" => Some(Protocol::Http2),
            "grpc" => Some(Protocol::Grpc),
            "tcp" | "amqp" | "kafka" | "memcache" | "mongo" | "mongodb" | "mysql" | "postgres" | "postgresql"
            | "redis" | "smtp" | "ssh" => Some(Protocol::Tcp),
            "tls" | "https" => Some(Protocol::Tls),
            _ => None,
        }
    }
}

impl std::str::FromStr for Protocol {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Protocol, NameError> {
        Protocol::ALL
            .into_iter()
            .find(|protocol| protocol.as_str() == text)
            .ok_or_else(|| NameError::Protocol(cut(text)))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_service_is_the_same_service() {
        let expected = ServiceName::new("catalog", "shop").unwrap();
        for text in [
            "catalog",
            "catalog.shop",
            "catalog.shop.",
            "Catalog.Shop",
            "catalog.shop.svc",
            "catalog.shop.svc.cluster.local",
            "catalog.shop.svc.cluster.local.",
        ] {
            assert_eq!(ServiceName::parse(text, "shop").as_ref(), Ok(&expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_service_is_refused() {
        for text in ["", ".", "a.b.c", "a..b", "-a", "a_b", "a.svc.cluster.local", "10.0.0.1", "example.com.", "x y"] {
            let parsed = ServiceName::parse(text, "shop");
            // `example.com.` has the shape of a service in namespace `com`; only the registry can tell.
            assert_eq!(parsed.is_err(), text != "example.com.", "{text}: {parsed:?}");
        }
    }

    #[test]
    fn destinations_need_a_port() {
        assert_eq!(ServicePort::parse("a.b:80", "x").unwrap().to_string(), "a.b:80");
        for text in ["a", "a:", "a:0", "a:65536", "a:b", ":80"] {
            assert!(ServicePort::parse(text, "x").is_err(), "{text}");
        }
    }

    #[test]
    fn port_names_declare_by_prefix() {
        let cases = [
            ("http", Some(Protocol::Http)),
            ("http-web", Some(Protocol::Http)),
            ("grpc-api", Some(Protocol::Grpc)),
            ("https", Some(Protocol::Tls)),
            ("tcp-db", Some(Protocol::Tcp)),
            ("grpc-web", Some(Protocol::Http)),
            ("grpc-web-public", Some(Protocol::Http)),
            ("grpc-webby", Some(Protocol::Grpc)),
            ("mysql", Some(Protocol::Tcp)),
            ("mongo-primary", Some(Protocol::Tcp)),
            ("redis-cache", Some(Protocol::Tcp)),
            ("kafka", Some(Protocol::Tcp)),
            ("kafka-internal", Some(Protocol::Tcp)),
            ("amqp-broker", Some(Protocol::Tcp)),
            ("postgres", Some(Protocol::Tcp)),
            ("postgres-ro", Some(Protocol::Tcp)),
            ("kafkaesque", None),
            ("httpish", None),
            ("web", None),
            ("udp", None),
        ];
        for (name, expected) in cases {
            assert_eq!(Protocol::from_port_name(name), expected, "{name}");
        }
    }

    #[test]
    fn app_protocols() {
        let cases: [(&[&str], Option<Protocol>); 6] = [
            (&["http", "HTTP", "http1", "grpc-web", "kubernetes.io/ws"], Some(Protocol::Http)),
            (&["http2", "h2c", "kubernetes.io/h2c", "Kubernetes.io/H2C"], Some(Protocol::Http2)),
            (&["grpc", "GRPC"], Some(Protocol::Grpc)),
            (
                &["tcp", "redis", "mongo", "mysql", "postgres", "postgresql", "amqp", "kafka", "smtp"],
                Some(Protocol::Tcp),
            ),
            (&["tls", "https", "kubernetes.io/wss"], Some(Protocol::Tls)),
            (&["", "udp", "example.com/own", "kubernetes.io/http", "http-web"], None),
        ];
        for (texts, expected) in cases {
            for text in texts {
                assert_eq!(Protocol::from_app_protocol(text), expected, "{text}");
            }
        }
    }
}
