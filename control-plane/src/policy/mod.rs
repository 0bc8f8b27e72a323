//! What the operator's policies say about one workload, as the index asks for it. The decisions themselves are pure
//! functions of `outrigger_api::policy`, which `explain` and offline tests call too.

use outrigger_api::name::Protocol;
use outrigger_api::policy::ModeSet;
use outrigger_api::resource::{Labels, Resources, ServicePort};
use outrigger_api::snapshot::MtlsMode;

/// Ports of protocols in which the server speaks first, or that nothing but their own client understands: SMTP, MySQL
/// and its group replication, PostgreSQL, Redis, Elasticsearch's transport, memcached.
const OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

/// The modes in force for a workload with these labels.
pub fn mtls_modes(resources: &Resources, namespace: &str, labels: &Labels) -> ModeSet {
    let policies = resources.peer_authentications.values().map(|policy| (&policy.metadata, &policy.spec));
    outrigger_api::policy::mtls_modes(policies, namespace, labels)
}

/// The mode of one application port.
pub fn mode_of(modes: &ModeSet, port: u16) -> MtlsMode {
    modes.ports.get(&port).copied().unwrap_or(modes.default)
}

/// What is declared about a port: the sidecar's own word, then appProtocol, then the port's name, then the lists of
/// opaque ports. None: the sidecar detects.
pub fn protocol(
    resources: &Resources,
    sidecar: Option<Protocol>,
    service: Option<&ServicePort>,
    application_port: Option<u16>,
) -> Option<Protocol> {
    let by_service = || {
        let service = service?;
        let by_name = || Protocol::from_port_name(service.name.as_deref()?);
        service.app_protocol.as_deref().and_then(Protocol::from_app_protocol).or_else(by_name)
    };
    let is_opaque = |port: u16| OPAQUE_PORTS.contains(&port) || resources.mesh.opaque_ports.contains(&port);
    let opaque = service.map(|service| service.port).into_iter().chain(application_port).any(is_opaque);
    sidecar.or_else(by_service).or(opaque.then_some(Protocol::Tcp))
}

/// True when every wanted label is there.
pub fn contains(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::TargetPort;

    use super::*;

    #[test]
    fn who_declares_a_protocol() {
        let mut resources = Resources::default();
        resources.mesh.opaque_ports = vec![7000];
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
            (None, port(None, None, 7000), Some(Protocol::Tcp)),
            (None, port(None, None, 8080), None),
        ];
        for (sidecar, service, expected) in cases {
            assert_eq!(protocol(&resources, sidecar, Some(&service), None), expected, "{service:?}");
        }
        assert_eq!(protocol(&resources, None, Some(&port(None, None, 80)), Some(5432)), Some(Protocol::Tcp));
        assert_eq!(protocol(&resources, None, None, Some(80)), None);
    }
}
