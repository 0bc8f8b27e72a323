//! At which of its ports an instance serves, and where that is dialled.

use outrigger_api::name::Protocol;
use outrigger_api::resource::TargetPort;

use crate::registry::{Instance, LeasedPort, Ports};

/// Where an instance serves a port.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) application: u16,
    pub(super) dial: u16,
    pub(super) protocol: Option<Protocol>,
}

impl Target {
    pub(super) fn of(port: &LeasedPort) -> Target {
        Target { application: port.application, dial: port.mesh, protocol: port.protocol }
    }

    pub(super) fn plain(port: u16) -> Target {
        Target { application: port, dial: port, protocol: None }
    }
}

/// By the port at which peers dial, or else by the application's.
pub(super) fn leased_at(ports: &[LeasedPort], port: u16) -> Option<Target> {
    let by_mesh = ports.iter().find(|leased| leased.mesh == port);
    by_mesh.or_else(|| ports.iter().find(|leased| leased.application == port)).map(Target::of)
}

pub(super) fn target(instance: &Instance, wanted: &TargetPort) -> Option<Target> {
    let (application, leased) = application_port(instance, wanted)?;
    Some(leased.map_or(Target::plain(application), Target::of))
}

/// The instance's port that a targetPort means: a sidecar serves the ports that it registered, which have no names, and
/// every other only when it is transparent; a Workload document serves any number and the names that it lists.
pub(super) fn application_port<'a>(
    instance: &'a Instance,
    wanted: &TargetPort,
) -> Option<(u16, Option<&'a LeasedPort>)> {
    match (&instance.ports, wanted) {
        (Ports::Leased(ports), TargetPort::Number(number)) => {
            ports.iter().find(|port| port.application == *number).map(|port| (*number, Some(port)))
        }
        (Ports::Intercepted(ports), TargetPort::Number(number)) => {
            Some((*number, ports.iter().find(|port| port.application == *number)))
        }
        (Ports::Leased(_) | Ports::Intercepted(_), TargetPort::Name(_)) => None,
        (Ports::Named(_), TargetPort::Number(number)) => Some((*number, None)),
        (Ports::Named(ports), TargetPort::Name(name)) => ports.get(name).map(|number| (*number, None)),
    }
}
