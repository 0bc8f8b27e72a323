//! What is declared about a port: by its own sidecar, by its Service, by the mesh's list of opaque ports.

use crate::name::Protocol;
use crate::resource::{Resources, ServicePort, TargetPort};

/// What is declared about a port, as its own sidecar serves it: the sidecar's own word, then the Service's, then the opaque
/// ports, in which the Service's port counts as well as its targetPort. None: the sidecar detects.
pub fn protocol(
    resources: &Resources,
    sidecar: Option<Protocol>,
    service: Option<&ServicePort>,
    application_port: Option<u16>,
) -> Option<Protocol> {
    sidecar.or_else(|| service_protocol(service?)).or_else(|| opaque(resources, service, application_port))
}

/// What is declared about a port, as callers of it go by: the Service's word, then what its sidecars say, then the opaque
/// ports. One sidecar of many must not decide how the others are called: theirs counts when all of them say the same.
pub fn called_protocol(
    resources: &Resources,
    service: Option<&ServicePort>,
    sidecars: impl IntoIterator<Item = Option<Protocol>>,
    application_port: Option<u16>,
) -> Option<Protocol> {
    let by_sidecars = || {
        let mut said = sidecars.into_iter();
        let first = said.next().flatten()?;
        said.all(|other| other == Some(first)).then_some(first)
    };
    service.and_then(service_protocol).or_else(by_sidecars).or_else(|| opaque(resources, service, application_port))
}

/// appProtocol, then the port's name.
pub fn service_protocol(service: &ServicePort) -> Option<Protocol> {
    let by_name = || Protocol::from_port_name(service.name.as_deref()?);
    service.app_protocol.as_deref().and_then(Protocol::from_app_protocol).or_else(by_name)
}

fn opaque(resources: &Resources, service: Option<&ServicePort>, application_port: Option<u16>) -> Option<Protocol> {
    let target = service.and_then(|service| match &service.target_port {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(_) => None,
    });
    let numbers = [service.map(|service| service.port), target, application_port];
    let opaque = numbers.into_iter().flatten().any(|port| resources.mesh.opaque_ports().contains(&port));
    opaque.then_some(Protocol::Tcp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_declares_a_protocol() {
        let mut resources = Resources::default();
        let port = |name: Option<&str>, app: Option<&str>, port| ServicePort {
            name: name.map(Into::into),
            port,
            target_port: TargetPort::Number(port),
            app_protocol: app.map(Into::into),
        };
        let cases = [
            (Some(Protocol::Grpc), port(Some("http"), Some("http2"), 3306), Some(Protocol::Grpc)),
            (None, port(Some("http"), Some("http2"), 3306), Some(Protocol::Http2)),
            (None, port(Some("http-web"), Some("example.com/x"), 3306), Some(Protocol::Http)),
            (None, port(Some("web"), None, 3306), Some(Protocol::Tcp)),
            (None, port(Some("redis"), None, 80), Some(Protocol::Tcp)),
            (None, port(None, None, 7000), None),
            (None, port(None, None, 8080), None),
        ];
        for (sidecar, service, expected) in cases {
            assert_eq!(protocol(&resources, sidecar, Some(&service), None), expected, "{service:?}");
        }
        assert_eq!(protocol(&resources, None, Some(&port(None, None, 80)), Some(5432)), Some(Protocol::Tcp));
        assert_eq!(protocol(&resources, None, None, Some(80)), None);
        let target = ServicePort { target_port: TargetPort::Number(5432), ..port(None, None, 80) };
        assert_eq!(protocol(&resources, None, Some(&target), None), Some(Protocol::Tcp));
        let called = |service, sidecars: &[Option<Protocol>]| {
            called_protocol(&resources, Some(&service), sidecars.iter().copied(), None)
        };
        let (grpc, tcp) = (Some(Protocol::Grpc), Some(Protocol::Tcp));
        let cases = [
            ("the Service before its sidecars", port(Some("http"), None, 80), vec![tcp, tcp], Some(Protocol::Http)),
            ("appProtocol before the name", port(Some("http"), Some("grpc"), 80), vec![tcp], grpc),
            ("all sidecars", port(None, None, 80), vec![grpc, grpc], grpc),
            ("one of two", port(None, None, 80), vec![tcp, None], None),
            ("the other of two", port(None, None, 80), vec![None, tcp], None),
            ("two words", port(None, None, 80), vec![grpc, tcp], None),
            ("two words on an opaque port", port(None, None, 3306), vec![grpc, None], tcp),
            ("nobody", port(None, None, 80), vec![], None),
        ];
        for (name, service, sidecars, expected) in cases {
            assert_eq!(called(service, &sidecars), expected, "{name}");
        }
        // A list of the operator's own takes the place of the defaults.
        resources.mesh.opaque_ports = Some(vec![7000]);
        assert_eq!(protocol(&resources, None, Some(&port(None, None, 7000)), None), Some(Protocol::Tcp));
        assert_eq!(protocol(&resources, None, Some(&port(None, None, 3306)), None), None);
    }
}
