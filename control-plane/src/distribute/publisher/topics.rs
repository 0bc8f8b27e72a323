//! What each topic says: computed from one moment of catalog and registry, once for all who share it, and once more for each
//! namespace whose callers follow routes of their own.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use outrigger_api::resource::Labels;
use outrigger_api::snapshot::Key;
use outrigger_api::wire::{self, watch_response};

use super::{Inner, Subscriber};
use crate::registry::InstanceId;

/// What a subscription is about, the same value for all who share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    Own(InstanceId),
    Destination(Key),
}

/// One topic that somebody subscribed to.
pub(super) struct Entry {
    /// None: withheld until the registry has settled.
    pub(super) message: Option<Arc<wire::WatchResponse>>,
    /// What sidecars of these namespaces are told instead: their callers follow routes of their own.
    pub(super) consumers: HashMap<String, Arc<wire::WatchResponse>>,
    pub(super) subscribers: HashMap<u64, Arc<Subscriber>>,
    /// For a workload's own topic: labels to go by until it has a lease.
    pub(super) granted: Labels,
}

/// A namespace that nobody is of.
pub(super) const NO_CALLER: &str = "";

/// Who is told something new of a topic.
pub(super) struct Changed {
    /// Sidecars of namespaces without routes of their own.
    others: bool,
    namespaces: Vec<String>,
}

impl Changed {
    pub(super) fn concerns(&self, namespace: &str, entry: &Entry) -> bool {
        self.namespaces.iter().any(|changed| changed == namespace)
            || (self.others && !entry.consumers.contains_key(namespace))
    }
}

impl Inner {
    /// Computes what a topic says, to every namespace that subscribed to it.
    pub(super) fn renew(&mut self, topic: &Topic, granted: &Labels) -> Changed {
        let mut changed = Changed { others: false, namespaces: Vec::new() };
        let resource = self.compute(topic, granted, NO_CALLER);
        if self.withholds(&resource) {
            return changed;
        }
        let Some(entry) = self.entries.get(topic) else { return changed };
        changed.others = entry.message.as_ref().and_then(|message| message.resource.as_ref()) != Some(&resource);
        let before = entry.consumers.clone();
        let subscribed: BTreeSet<String> =
            entry.subscribers.values().map(|subscriber| subscriber.id.namespace.clone()).collect();
        let is_consumer = |namespace: &String| match topic {
            Topic::Destination(key) => self.catalog.is_consumer(key, namespace),
            Topic::Own(_) => false,
        };
        let consuming: Vec<String> = subscribed.into_iter().filter(is_consumer).collect();
        let mut consumers = HashMap::new();
        for namespace in consuming {
            let resource = self.compute(topic, granted, &namespace);
            let told = before.get(&namespace).filter(|told| told.resource.as_ref() == Some(&resource));
            let message = match told {
                Some(told) => told.clone(),
                None => {
                    changed.namespaces.push(namespace.clone());
                    self.next_message(topic, resource)
                }
            };
            consumers.insert(namespace, message);
        }
        // Those whose routes went follow what the others follow, which needs a version newer than their last.
        let left: Vec<String> = before.into_keys().filter(|namespace| !consumers.contains_key(namespace)).collect();
        let message = (changed.others || !left.is_empty()).then(|| self.next_message(topic, resource));
        changed.namespaces.extend(left);
        if let Some(entry) = self.entries.get_mut(topic) {
            entry.consumers = consumers;
            entry.message = message.or(entry.message.take());
        }
        changed
    }

    /// Sees to it that a namespace with routes of its own is told of them.
    pub(super) fn take_consumer(&mut self, topic: &Topic, namespace: &str) {
        let Topic::Destination(key) = topic else { return };
        if !self.catalog.is_consumer(key, namespace) {
            return;
        }
        let Some(entry) = self.entries.get(topic).filter(|entry| !entry.consumers.contains_key(namespace)) else {
            return;
        };
        let granted = entry.granted.clone();
        let resource = self.compute(topic, &granted, namespace);
        if self.withholds(&resource) {
            return;
        }
        let message = self.next_message(topic, resource);
        if let Some(entry) = self.entries.get_mut(topic) {
            entry.consumers.insert(namespace.to_owned(), message);
        }
    }

    /// `caller`: the namespace whose callers are meant.
    pub(super) fn compute(&self, topic: &Topic, granted: &Labels, caller: &str) -> watch_response::Resource {
        match topic {
            Topic::Own(id) => {
                let own = self.catalog.own_workload(&self.registry, id, granted);
                watch_response::Resource::Workload(wire::Workload::encode(&own, self.bundle.clone()))
            }
            Topic::Destination(Key::Name(service)) => match self.catalog.addresses(&self.registry, service) {
                Some(ips) => watch_response::Resource::ServiceAddresses(ips.as_slice().into()),
                None => watch_response::Resource::Unregistered(wire::Unregistered {}),
            },
            Topic::Destination(key) => match self.catalog.destination(&self.registry, key, caller) {
                Some(destination) => watch_response::Resource::Destination((&destination).into()),
                None => watch_response::Resource::Unregistered(wire::Unregistered {}),
            },
        }
    }

    /// What sidecars ask for at ports that a Service does not have.
    pub(super) fn wrong_ports(&self) -> Vec<String> {
        let asked = self.entries.keys().filter_map(|topic| match topic {
            Topic::Destination(key) => self.catalog.destination(&self.registry, key, NO_CALLER),
            Topic::Own(_) => None,
        });
        let wrong = asked.filter(|destination| destination.no_such_port);
        let mut all: Vec<String> = wrong
            .map(|destination| format!("a sidecar asks for what is not there: {}", destination.why_empty))
            .collect();
        all.sort();
        all.dedup();
        all
    }

    pub(super) fn withholds(&self, resource: &watch_response::Resource) -> bool {
        let empty = match resource {
            watch_response::Resource::Destination(destination) => destination.endpoints.is_empty(),
            // A headless service has the addresses of its endpoints.
            watch_response::Resource::ServiceAddresses(addresses) => addresses.ips.is_empty(),
            watch_response::Resource::Workload(_) | watch_response::Resource::Unregistered(_) => false,
        };
        empty && self.settles.is_some()
    }

    pub(super) fn next_message(
        &mut self,
        topic: &Topic,
        resource: watch_response::Resource,
    ) -> Arc<wire::WatchResponse> {
        self.version += 1;
        let key = match topic {
            Topic::Own(_) => (&Key::Own).into(),
            Topic::Destination(key) => key.into(),
        };
        Arc::new(wire::WatchResponse { key: Some(key), version: self.version, resource: Some(resource) })
    }

    pub(super) fn leave(&mut self, topic: &Topic, number: u64) {
        if let Some(entry) = self.entries.get_mut(topic) {
            entry.subscribers.remove(&number);
            if entry.subscribers.is_empty() {
                self.entries.remove(topic);
            }
        }
    }
}
