//! One place that knows everything and everybody: the configuration, the registry, and which sidecar subscribed to
//! what. A change marks what it may concern; [`Publisher::run`] then computes each of those subscriptions once,
//! however many sidecars share it, and wakes only those for whom the answer really changed. Versions come from one
//! counter that grows over restarts too, so within each key they only grow.

mod scope;
mod subscriber;

pub use subscriber::{Refusal, SidecarStatus, Subscriber};

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrigger_api::name::ServiceName;
use outrigger_api::resource::{Labels, Resources};
use outrigger_api::snapshot::Key;
use outrigger_api::wire::{self, watch_response};
use tokio::sync::Notify;

use super::catalog::Catalog;
use super::metrics::Metrics;
use crate::registry::{Instance, InstanceId, RegisterError, Registration, Registry, SavedLease, VirtualAddresses};
use scope::Scope;

/// Changes that come together are computed together: those of this time, and of more when computing takes longer, so
/// that it never takes more than a fifth of the thread.
const COALESCE: Duration = Duration::from_millis(10);
const MAX_COALESCE: Duration = Duration::from_millis(500);

/// Of one service account: far more replicas than one has, and what they know together. 60 MiB.
const MAX_ACCOUNT_STREAMS: usize = 2_000;
const MAX_ACCOUNT_SUBSCRIPTIONS: usize = 65_536;

/// What one service account may not have more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccountLimit {
    #[error("more than {MAX_ACCOUNT_STREAMS} streams of one service account")]
    Streams,
    #[error("more than {MAX_ACCOUNT_SUBSCRIPTIONS} subscriptions of one service account")]
    Subscriptions,
}

/// Why a stream is not taken in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Instance(#[from] RegisterError),
    #[error(transparent)]
    Account(#[from] AccountLimit),
}

/// What a subscription is about, the same value for all who share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    Own(InstanceId),
    Destination(Key),
}

pub struct Publisher {
    inner: Mutex<Inner>,
    /// There is something to compute.
    changed: Notify,
    /// The leases are not what is on disk.
    pub leases_changed: Notify,
    metrics: Arc<Metrics>,
}

struct Inner {
    catalog: Catalog,
    registry: Registry,
    bundle: wire::TrustBundle,
    entries: HashMap<Topic, Entry>,
    scope: Scope,
    version: u64,
    subscribers: HashMap<u64, Arc<Subscriber>>,
    /// Streams and subscriptions, by namespace and service account.
    accounts: HashMap<(String, String), Held>,
    /// The stream of each instance.
    streams: HashMap<InstanceId, u64>,
    /// Until then sidecars are still coming back after a restart: see [`Publisher::settle_for`].
    settles: Option<tokio::time::Instant>,
}

/// What the instances of one service account hold.
#[derive(Default)]
struct Held {
    streams: usize,
    subscriptions: usize,
}

/// One topic that somebody subscribed to.
struct Entry {
    /// None: withheld until the registry has settled.
    message: Option<Arc<wire::WatchResponse>>,
    /// What sidecars of these namespaces are told instead: their callers follow routes of their own.
    consumers: HashMap<String, Arc<wire::WatchResponse>>,
    subscribers: HashMap<u64, Arc<Subscriber>>,
    /// For a workload's own topic: labels to go by until it has a lease.
    granted: Labels,
}

impl Publisher {
    /// `version`: every version that is given out is greater.
    pub fn new(
        catalog: Catalog,
        mut registry: Registry,
        bundle: wire::TrustBundle,
        version: u64,
        metrics: Arc<Metrics>,
    ) -> Publisher {
        registry.set_workloads(&catalog.resources);
        let inner = Inner {
            catalog,
            registry,
            bundle,
            entries: HashMap::new(),
            scope: Scope::default(),
            version,
            subscribers: HashMap::new(),
            accounts: HashMap::new(),
            streams: HashMap::new(),
            settles: None,
        };
        Publisher { inner: Mutex::new(inner), changed: Notify::new(), leases_changed: Notify::new(), metrics }
    }

    /// After a restart: a destination without endpoints is not told for this long. Its endpoints may be on their way
    /// back, and the sidecars that ask have a last good answer.
    pub fn settle_for(&self, time: Duration) {
        self.lock().settles = Some(tokio::time::Instant::now() + time);
    }

    /// Publishes what changes and lets go of lost leases, until the task is dropped.
    pub async fn run(&self) {
        let mut wait = COALESCE;
        loop {
            let next = self.lock().next_due();
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => tokio::time::sleep(wait).await,
                () = due => {}
            }
            self.sweep(tokio::time::Instant::now().into_std());
            self.lock().settle(tokio::time::Instant::now());
            let began = Instant::now();
            self.publish();
            wait = (began.elapsed() * 4).clamp(COALESCE, MAX_COALESCE);
        }
    }

    /// Takes a configuration, with the virtual addresses that are settled for it.
    pub fn configure(&self, resources: Arc<Resources>, virtual_addresses: VirtualAddresses) {
        let mut inner = self.lock();
        inner.registry.set_workloads(&resources);
        inner.catalog = Catalog::new(resources, inner.catalog.trust_domain.clone(), virtual_addresses);
        inner.scope.everything();
        self.changed.notify_one();
    }

    pub fn set_bundle(&self, bundle: wire::TrustBundle) {
        let mut inner = self.lock();
        inner.bundle = bundle;
        inner.scope.everything();
        self.changed.notify_one();
    }

    pub fn resources(&self) -> Arc<Resources> {
        self.lock().catalog.resources.clone()
    }

    // --- leases ---------------------------------------------------------------------------------------------

    /// Takes a registration; answers with the Services that select the instance now.
    pub fn register(
        &self,
        id: &InstanceId,
        stream: u64,
        registration: &Registration,
    ) -> Result<Vec<ServiceName>, RegisterError> {
        let mut inner = self.lock();
        let now = tokio::time::Instant::now().into_std();
        let mut ips = std::iter::once(&registration.ip).chain(&registration.other_ips);
        let registered = match ips.find(|ip| inner.catalog.is_of_service(**ip)) {
            Some(ip) => Err(RegisterError::AddressOfService { ip: *ip }),
            None => inner.registry.register(id, stream, registration, now),
        };
        for changed in registered? {
            self.lease_changed(&mut inner, &changed);
        }
        let instance = inner.registry.get(id).cloned();
        let services = instance.map(|instance| inner.catalog.services_of(&instance)).unwrap_or_default();
        Ok(services.into_iter().map(|(name, _)| name).collect())
    }

    pub fn withdraw(&self, id: &InstanceId, stream: u64) {
        let mut inner = self.lock();
        if inner.registry.withdraw(id, stream, tokio::time::Instant::now().into_std()) {
            self.lease_changed(&mut inner, id);
        }
    }

    pub fn lost(&self, id: &InstanceId, stream: u64) {
        self.lock().registry.lost(id, stream, tokio::time::Instant::now().into_std());
        // Wakes `run`, which then knows when to look again.
        self.changed.notify_one();
    }

    /// Lets go of what was lost for too long.
    pub fn sweep(&self, now: Instant) {
        let mut inner = self.lock();
        let Inner { catalog, registry, .. } = &mut *inner;
        let services = |instance: &Instance| catalog.services_of(instance).into_iter().map(|(name, _)| name).collect();
        for id in registry.sweep(now, &services) {
            self.lease_changed(&mut inner, &id);
        }
    }

    pub fn saved_leases(&self) -> Vec<SavedLease> {
        self.lock().registry.save()
    }

    fn lease_changed(&self, inner: &mut Inner, id: &InstanceId) {
        inner.scope.instance(id);
        self.changed.notify_one();
        self.leases_changed.notify_one();
    }

    // --- subscriptions --------------------------------------------------------------------------------------

    /// Takes a stream in. A newer one of the same sidecar takes the place of the older one, which is told by its `replaced`
    /// and costs nothing from now on; another sidecar's is refused while the first lives.
    pub fn connect(&self, subscriber: &Arc<Subscriber>) -> Result<(), ConnectError> {
        let mut inner = self.lock();
        let before = inner.streams.get(&subscriber.id).and_then(|number| inner.subscribers.get(number)).cloned();
        if let Some(before) = before {
            if !before.holder.is_same(&subscriber.holder) {
                return Err(RegisterError::InstanceExists(subscriber.id.clone()).into());
            }
            inner.disconnect(&before);
            before.replaced.notify_one();
        }
        let held = inner.accounts.entry(account_of(subscriber)).or_default();
        if held.streams >= MAX_ACCOUNT_STREAMS {
            return Err(AccountLimit::Streams.into());
        }
        held.streams += 1;
        inner.streams.insert(subscriber.id.clone(), subscriber.number);
        inner.subscribers.insert(subscriber.number, subscriber.clone());
        Ok(())
    }

    /// Gives back what [`Publisher::connect`] took.
    pub fn disconnect(&self, subscriber: &Subscriber) {
        let mut inner = self.lock();
        inner.disconnect(subscriber);
        if !inner.streams.contains_key(&subscriber.id) {
            let drained = inner.registry.drained(&subscriber.id, tokio::time::Instant::now().into_std());
            if drained {
                // Why a service has no endpoints is told in other words now.
                inner.scope.instance(&subscriber.id);
                self.changed.notify_one();
            }
        }
    }

    /// Subscribes; the answer is there at once, for [`Publisher::message`].
    pub fn subscribe(&self, subscriber: &Arc<Subscriber>, topic: &Topic, granted: &Labels) -> Result<(), AccountLimit> {
        let mut inner = self.lock();
        // A stream that was replaced a moment ago.
        if !inner.subscribers.contains_key(&subscriber.number) {
            return Ok(());
        }
        if !subscriber.has(topic) {
            let held = inner.accounts.entry(account_of(subscriber)).or_default();
            if held.subscriptions >= MAX_ACCOUNT_SUBSCRIPTIONS {
                return Err(AccountLimit::Subscriptions);
            }
            held.subscriptions += 1;
        }
        if !inner.entries.contains_key(topic) {
            let resource = inner.compute(topic, granted, NO_CALLER);
            let message = (!inner.withholds(&resource)).then(|| inner.next_message(topic, resource));
            let (consumers, subscribers) = (HashMap::new(), HashMap::new());
            inner.entries.insert(topic.clone(), Entry { message, consumers, subscribers, granted: granted.clone() });
        }
        inner.take_consumer(topic, &subscriber.id.namespace);
        if let Some(entry) = inner.entries.get_mut(topic) {
            entry.subscribers.insert(subscriber.number, subscriber.clone());
        }
        subscriber.joined(topic);
        Ok(())
    }

    pub fn unsubscribe(&self, subscriber: &Subscriber, topic: &Topic) {
        let mut inner = self.lock();
        inner.leave(topic, subscriber.number);
        if subscriber.left(topic) {
            inner.give_back(subscriber, 0, 1);
        }
    }

    /// What a topic says now to sidecars of that namespace.
    pub fn message(&self, topic: &Topic, namespace: &str) -> Option<Arc<wire::WatchResponse>> {
        let inner = self.lock();
        let entry = inner.entries.get(topic)?;
        entry.consumers.get(namespace).or(entry.message.as_ref()).cloned()
    }

    /// Computes what may have changed and wakes those for whom it did.
    pub fn publish(&self) {
        let mut inner = self.lock();
        let scope = std::mem::take(&mut inner.scope);
        if scope.is_empty() {
            return;
        }
        let callers = inner.catalog.looks_at_callers;
        let concerned: Vec<(Topic, Labels)> = inner
            .entries
            .iter()
            .filter(|(topic, _)| scope.concerns(topic) || callers && matches!(topic, Topic::Own(_)))
            .map(|(topic, entry)| (topic.clone(), entry.granted.clone()))
            .collect();
        for (topic, granted) in concerned {
            let changed = inner.renew(&topic, &granted);
            let Some(entry) = inner.entries.get(&topic) else { continue };
            for subscriber in entry.subscribers.values() {
                if changed.concerns(&subscriber.id.namespace, entry) {
                    self.metrics.pushes.inc();
                    subscriber.mark(&topic);
                }
            }
        }
    }

    // --- status ---------------------------------------------------------------------------------------------

    /// Everybody who is connected, by name.
    pub fn sidecars(&self) -> Vec<SidecarStatus> {
        let mut sidecars: Vec<SidecarStatus> =
            self.lock().subscribers.values().map(|subscriber| subscriber.status()).collect();
        sidecars.sort_by(|one, other| (&one.id, one.number).cmp(&(&other.id, other.number)));
        sidecars
    }

    pub fn is_connected(&self, id: &InstanceId) -> bool {
        self.lock().streams.contains_key(id)
    }

    pub fn connected(&self) -> usize {
        self.lock().subscribers.len()
    }

    pub fn leases(&self) -> usize {
        self.lock().registry.leases()
    }

    pub fn subscriptions(&self) -> usize {
        self.lock().entries.len()
    }

    pub fn warnings(&self) -> Vec<String> {
        let inner = self.lock();
        let mut warnings = inner.catalog.warnings(&inner.registry);
        // Endpoints that are on their way back after a restart are not missed.
        if inner.settles.is_none() {
            warnings.extend(inner.catalog.empty_ports(&inner.registry));
            warnings.extend(inner.wrong_ports());
        }
        warnings
    }

    /// How many registered workloads a policy selects.
    pub fn selected_by(&self, policy: &str) -> usize {
        let inner = self.lock();
        inner.catalog.selected_by(&inner.registry, policy)
    }

    /// Services that list endpoints which were lost.
    pub fn stale_services(&self) -> Vec<ServiceName> {
        let inner = self.lock();
        let mut services: Vec<ServiceName> = inner
            .registry
            .stale()
            .flat_map(|instance| inner.catalog.services_of(instance))
            .map(|(name, _)| name)
            .collect();
        services.sort();
        services.dedup();
        services
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here leaves a half-made change behind when it panics.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn account_of(subscriber: &Subscriber) -> (String, String) {
    (subscriber.id.namespace.clone(), subscriber.id.service_account.clone())
}

/// A namespace that nobody is of.
const NO_CALLER: &str = "";

/// Who is told something new of a topic.
struct Changed {
    /// Sidecars of namespaces without routes of their own.
    others: bool,
    namespaces: Vec<String>,
}

impl Changed {
    fn concerns(&self, namespace: &str, entry: &Entry) -> bool {
        self.namespaces.iter().any(|changed| changed == namespace)
            || (self.others && !entry.consumers.contains_key(namespace))
    }
}

impl Inner {
    /// Computes what a topic says, to every namespace that subscribed to it.
    fn renew(&mut self, topic: &Topic, granted: &Labels) -> Changed {
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
    fn take_consumer(&mut self, topic: &Topic, namespace: &str) {
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
    fn compute(&self, topic: &Topic, granted: &Labels, caller: &str) -> watch_response::Resource {
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
    fn wrong_ports(&self) -> Vec<String> {
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

    fn disconnect(&mut self, subscriber: &Subscriber) {
        if self.subscribers.remove(&subscriber.number).is_none() {
            return;
        }
        if self.streams.get(&subscriber.id) == Some(&subscriber.number) {
            self.streams.remove(&subscriber.id);
        }
        let topics = subscriber.leave_all();
        self.give_back(subscriber, 1, topics.len());
        for topic in topics {
            self.leave(&topic, subscriber.number);
        }
    }

    fn withholds(&self, resource: &watch_response::Resource) -> bool {
        let empty = match resource {
            watch_response::Resource::Destination(destination) => destination.endpoints.is_empty(),
            // A headless service has the addresses of its endpoints.
            watch_response::Resource::ServiceAddresses(addresses) => addresses.ips.is_empty(),
            watch_response::Resource::Workload(_) | watch_response::Resource::Unregistered(_) => false,
        };
        empty && self.settles.is_some()
    }

    /// When something happens by itself next.
    fn next_due(&self) -> Option<tokio::time::Instant> {
        let sweep = self.registry.next_sweep().map(tokio::time::Instant::from_std);
        sweep.into_iter().chain(self.settles).min()
    }

    fn settle(&mut self, now: tokio::time::Instant) {
        if self.settles.is_some_and(|settles| settles <= now) {
            self.settles = None;
            self.scope.everything();
        }
    }

    fn next_message(&mut self, topic: &Topic, resource: watch_response::Resource) -> Arc<wire::WatchResponse> {
        self.version += 1;
        let key = match topic {
            Topic::Own(_) => (&Key::Own).into(),
            Topic::Destination(key) => key.into(),
        };
        Arc::new(wire::WatchResponse { key: Some(key), version: self.version, resource: Some(resource) })
    }

    fn give_back(&mut self, subscriber: &Subscriber, streams: usize, subscriptions: usize) {
        let MapEntry::Occupied(mut entry) = self.accounts.entry(account_of(subscriber)) else { return };
        let held = entry.get_mut();
        held.streams = held.streams.saturating_sub(streams);
        held.subscriptions = held.subscriptions.saturating_sub(subscriptions);
        if held.streams == 0 && held.subscriptions == 0 {
            entry.remove();
        }
    }

    fn leave(&mut self, topic: &Topic, number: u64) {
        if let Some(entry) = self.entries.get_mut(topic) {
            entry.subscribers.remove(&number);
            if entry.subscribers.is_empty() {
                self.entries.remove(topic);
            }
        }
    }
}

#[cfg(test)]
#[path = "publisher/tests.rs"]
mod tests;
