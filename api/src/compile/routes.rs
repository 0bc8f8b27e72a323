//! Which routes bind which port of which Service: parents, producers and consumers, kinds at odds, age, backends and
//! their grants. What Gateway API would write into a status are remarks here.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::name::{ServiceName, ServicePort};
use crate::resource::{Metadata, ObjectName, Parent, Remark, Resource, Resources, Route, Service};
use crate::route::{Backend, Kind, Routes, Rule, To, order};

/// All routes in force, by the port that they bind.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    bound: BTreeMap<ServicePort, Bound>,
    pub remarks: Vec<Remark>,
}

/// What binds one port.
#[derive(Clone, Debug, Default)]
struct Bound {
    /// Routes of the Service's own namespace, for every caller.
    producer: Option<Arc<Routes>>,
    /// Routes of another namespace, for the callers of that namespace, who follow them instead of the producer's.
    consumers: BTreeMap<String, Arc<Routes>>,
}

impl RouteTable {
    pub fn new(resources: &Resources) -> RouteTable {
        let mut table = RouteTable::default();
        let mut binding: BTreeMap<(ServicePort, &str), Vec<Binding<'_>>> = BTreeMap::new();
        for route in resources.routes() {
            for parent in &route.spec.parents {
                for port in table.ports(resources, route, parent) {
                    let of = binding.entry((port, &route.metadata.namespace)).or_default();
                    // Two parents of one route may mean one port.
                    if !of.iter().any(|other| std::ptr::eq(other.route, route)) {
                        of.push(Binding { route, parent });
                    }
                }
            }
        }
        for ((port, namespace), bindings) in binding {
            let routes = Arc::new(table.in_force(resources, bindings));
            let bound = table.bound.entry(port.clone()).or_default();
            match *port.service.namespace == *namespace {
                true => bound.producer = Some(routes),
                false => drop(bound.consumers.insert(namespace.to_owned(), routes)),
            }
        }
        table.remarks.sort_by(|one, other| (&one.object, &one.message).cmp(&(&other.object, &other.message)));
        table.remarks.dedup();
        table
    }

    /// What callers of a namespace follow when they call a port.
    pub fn of(&self, port: &ServicePort, caller_namespace: &str) -> Option<&Arc<Routes>> {
        let bound = self.bound.get(port)?;
        bound.consumers.get(caller_namespace).or(bound.producer.as_ref())
    }

    /// Whether callers of that namespace follow routes of their own.
    pub fn is_consumer(&self, port: &ServicePort, caller_namespace: &str) -> bool {
        self.bound.get(port).is_some_and(|bound| bound.consumers.contains_key(caller_namespace))
    }

    /// The ports that a parent means.
    fn ports(&mut self, resources: &Resources, route: &Resource<Route>, parent: &Parent) -> Vec<ServicePort> {
        let key = (parent.namespace.clone(), parent.name.clone());
        let (Some(service), Ok(name)) =
            (resources.services.get(&key), ServiceName::new(&parent.name, &parent.namespace))
        else {
            let message = format!("there is no Service {}/{}", parent.namespace, parent.name);
            self.remark(route, None, &format!("it binds nothing (NoMatchingParent): {message}"));
            return Vec::new();
        };
        let ports = service.spec.ports.iter().filter(|port| {
            parent.port.is_none_or(|wanted| wanted == port.port)
                && parent.section.as_ref().is_none_or(|wanted| port.name.as_ref() == Some(wanted))
        });
        let ports: Vec<ServicePort> =
            ports.map(|port| ServicePort { service: name.clone(), port: port.port }).collect();
        if ports.is_empty() {
            let wanted = match (parent.port, &parent.section) {
                (Some(port), _) => format!("port {port}"),
                (None, Some(section)) => format!("port named {section}"),
                (None, None) => "port".to_owned(),
            };
            let known = service.spec.ports.iter().map(|port| match &port.name {
                Some(name) => format!("{} ({name})", port.port),
                None => port.port.to_string(),
            });
            let known = known.collect::<Vec<_>>().join(", ");
            let message = format!("Service {}/{} has no such {wanted}; it has {known}", parent.namespace, parent.name);
            self.remark(route, None, &format!("it binds nothing (NoMatchingParent): {message}"));
        }
        ports
    }

    /// The routes of one namespace that bind one port, put together.
    fn in_force(&mut self, resources: &Resources, mut bindings: Vec<Binding<'_>>) -> Routes {
        bindings.sort_by(Binding::by_age);
        let kind = bindings.iter().map(|binding| binding.route.spec.kind).min().unwrap_or(Kind::Http);
        let winner = bindings.iter().find(|binding| binding.route.spec.kind == kind).map(|binding| binding.route);
        for loser in bindings.iter().filter(|binding| binding.route.spec.kind != kind) {
            let message = format!("a {kind} binds a port of it already, so this is not in force there (Conflicted)");
            self.remark(loser.route, winner, &message);
        }
        let mut rules = Vec::new();
        for Binding { route, parent } in bindings.into_iter().filter(|binding| binding.route.spec.kind == kind) {
            for rule in &route.spec.rules {
                rules.push(self.resolved(resources, route, parent, rule));
            }
        }
        Routes { kind, order: order(&rules), rules }
    }

    fn resolved(&mut self, resources: &Resources, route: &Resource<Route>, parent: &Parent, rule: &Rule) -> Rule {
        let mut rule = rule.clone();
        for backend in &mut rule.backends {
            self.resolve(resources, route, parent, backend);
        }
        for mirror in &mut rule.filters.mirrors {
            self.resolve(resources, route, parent, &mut mirror.backend);
        }
        rule
    }

    fn resolve(&mut self, resources: &Resources, route: &Resource<Route>, parent: &Parent, backend: &mut Backend) {
        let Some(To(to)) = &backend.to else { return };
        if let Err(why) = reachable(resources, route, parent, to) {
            self.remark(route, None, &format!("the share of its backend {to} gets 500 ({why})"));
            backend.invalid = Some(why);
        }
    }

    fn remark(&mut self, about: &Resource<Route>, other: Option<&Resource<Route>>, message: &str) {
        let object = object_name(about);
        let message = match other {
            Some(other) => format!("{object}: {message}; see {} in {}", object_name(other), Remark::PLACE),
            None => format!("{object}: {message}"),
        };
        self.remarks.push(Remark { object, other: other.map(object_name), message });
    }
}

fn object_name(route: &Resource<Route>) -> ObjectName {
    let Metadata { namespace, name, .. } = &route.metadata;
    ObjectName { kind: route.spec.kind.as_str(), namespace: namespace.clone(), name: name.clone() }
}

/// One route and the parent by which it binds a port.
struct Binding<'r> {
    route: &'r Resource<Route>,
    parent: &'r Parent,
}

impl Binding<'_> {
    /// The oldest first, those without an age last, then by name.
    fn by_age(&self, other: &Binding<'_>) -> Ordering {
        let age = |binding: &Binding<'_>| {
            let metadata = &binding.route.metadata;
            let created = metadata.created.clone();
            (created.is_none(), created, metadata.namespace.clone(), metadata.name.clone())
        };
        age(self).cmp(&age(other))
    }
}

/// Why a backend cannot be used, in Gateway API's word and in ours.
fn reachable(resources: &Resources, route: &Resource<Route>, parent: &Parent, to: &ServicePort) -> Result<(), String> {
    let namespace = to.service.namespace.to_string();
    let near = [&route.metadata.namespace, &parent.namespace].contains(&&namespace);
    if !near && !granted(resources, route, &namespace, &to.service.name) {
        return Err(format!(
            "RefNotPermitted: no ReferenceGrant in namespace {namespace} lets a {} of {} name Service {}",
            route.spec.kind, route.metadata.namespace, to.service.name
        ));
    }
    let service: Option<&Resource<Service>> = resources.services.get(&(namespace, to.service.name.to_string()));
    match service {
        None => Err(format!("BackendNotFound: there is no Service {}", to.service)),
        Some(service) if !service.spec.ports.iter().any(|port| port.port == to.port) => {
            Err(format!("BackendNotFound: Service {} has no port {}", to.service, to.port))
        }
        Some(_) => Ok(()),
    }
}

fn granted(resources: &Resources, route: &Resource<Route>, namespace: &str, name: &str) -> bool {
    let grants = resources.reference_grants.values().filter(|grant| grant.metadata.namespace == namespace);
    grants.map(|grant| &grant.spec).any(|grant| {
        let from = grant.from.iter().any(|from| {
            from.group == "gateway.networking.k8s.io"
                && from.kind == route.spec.kind.as_str()
                && from.namespace == route.metadata.namespace
        });
        let to = grant.to.iter().any(|to| {
            to.group.is_empty() && to.kind == "Service" && to.name.as_deref().is_none_or(|wanted| wanted == name)
        });
        from && to
    })
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;
