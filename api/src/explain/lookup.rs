//! From the name that is called to the Service, its port, and the workloads that may get it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::answer::Explanation;
use super::question::Question;
use crate::policy::trace::Step;
use crate::resource::{Labels, Resource, Resources, Service, ServicePort, TargetPort, Workload, nearest_word};

/// One workload that may get it.
pub(super) struct Candidate<'r> {
    pub(super) labels: &'r Labels,
    /// The application's port; None where only a workload's own list of ports would say.
    pub(super) port: Option<u16>,
    /// None: no Workload document, its sidecar registers itself.
    pub(super) name: Option<&'r str>,
    pub(super) ip: Option<IpAddr>,
    pub(super) mesh: bool,
}

pub(super) fn service_object(service: &Resource<Service>) -> String {
    format!("Service/{}/{}", service.metadata.namespace, service.metadata.name)
}

pub(super) fn lookup<'r>(
    resources: &'r Resources,
    question: &Question,
    answer: &mut Explanation,
) -> Option<(&'r Resource<Service>, &'r ServicePort)> {
    let to = &question.to;
    let Some(service) = resources.services.get(&(to.namespace.to_string(), to.name.to_string())) else {
        let known: Vec<String> =
            resources.services.keys().map(|(namespace, name)| format!("{name}.{namespace}")).collect();
        let near = nearest(&to.to_string(), &known).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        answer.steps.push(Step::new("lookup", format!("Service/{}/{}", to.namespace, to.name), "failed", {
            "no such Service".to_owned()
        }));
        answer.hint = format!("there is no Service {to}{near}");
        return None;
    };
    let listed = || {
        let ports = service.spec.ports.iter().map(|port| match &port.name {
            Some(name) => format!("{} ({name})", port.port),
            None => port.port.to_string(),
        });
        ports.collect::<Vec<_>>().join(", ")
    };
    let found = match question.port {
        Some(wanted) => service.spec.ports.iter().find(|port| port.port == wanted),
        None => service.spec.ports.first(),
    };
    let Some(port) = found else {
        let wanted = question.port.map_or_else(|| "no port".to_owned(), |port| format!("no port {port}"));
        answer.steps.push(Step::new("lookup", service_object(service), "failed", format!("it has {}", listed())));
        answer.hint = format!("{to} has {wanted}; it has {}", listed());
        return None;
    };
    let why = match &port.target_port {
        TargetPort::Number(number) => format!("port {}, targetPort {number}", port.port),
        TargetPort::Name(name) => format!("port {}, targetPort {name}", port.port),
    };
    answer.steps.push(Step::new("lookup", service_object(service), "found", why));
    Some((service, port))
}

/// The static workloads that the Service selects; where there are none of them at all, one that registers itself with
/// the labels that the Service asks for.
pub(super) fn candidates<'r>(
    resources: &'r Resources,
    service: &'r Resource<Service>,
    port: &ServicePort,
) -> Vec<Candidate<'r>> {
    let selects = |workload: &Resource<Workload>| {
        let wanted = &service.spec.selector;
        workload.metadata.namespace == service.metadata.namespace
            && !wanted.is_empty()
            && wanted.iter().all(|(key, value)| workload.spec.labels.get(key) == Some(value))
    };
    let target = |workload: Option<&Workload>| match &port.target_port {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload.and_then(|workload| workload.ports.get(name).copied()),
    };
    let of = |workload: &'r Resource<Workload>| Candidate {
        labels: &workload.spec.labels,
        port: target(Some(&workload.spec)),
        name: Some(&workload.metadata.name),
        ip: Some(workload.spec.address),
        mesh: workload.spec.mesh,
    };
    let mut found: Vec<Candidate<'_>> =
        resources.workloads.values().filter(|workload| selects(workload)).map(of).collect();
    if found.is_empty() && !service.spec.selector.is_empty() {
        let labels = &service.spec.selector;
        found.push(Candidate { labels, port: target(None), name: None, ip: None, mesh: true });
    }
    found
}

pub(super) fn shown_labels(labels: &Labels) -> String {
    if labels.is_empty() {
        return "(none)".to_owned();
    }
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn nearest(word: &str, known: &[String]) -> Option<String> {
    let known: BTreeSet<&str> = known.iter().map(String::as_str).collect();
    let known: Vec<&str> = known.into_iter().collect();
    nearest_word(word, &known).map(str::to_owned)
}
