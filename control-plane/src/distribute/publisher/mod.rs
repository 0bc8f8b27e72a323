//! One place that knows everything and everybody: the configuration, the registry, and which sidecar subscribed to
//! what. A change marks what it may concern; [`Publisher::run`] then computes each of those subscriptions once,
//! however many sidecars share it, and wakes only those for whom the answer really changed. Versions come from one
//! counter that grows over restarts too, so within each key they only grow.

mod accounts;
mod scope;
mod subscriber;
mod topics;

pub use accounts::AccountLimit;
pub use subscriber::{Refusal, SidecarStatus, Subscriber};
pub use topics::Topic;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrigger_api::name::ServiceName;
use outrigger_api::resource::{Labels, Resources};
use outrigger_api::wire;
use tokio::sync::Notify;

use super::catalog::Catalog;
use super::metrics::Metrics;
use crate::registry::{Instance, InstanceId, RegisterError, Registration, Registry, SavedLease, VirtualAddresses};
use accounts::Accounts;
use scope::Scope;
use topics::{Entry, NO_CALLER};

/// Changes that come together are computed together: those of this time, and of more when computing takes longer, so
/// that it never takes more than a fifth of the thread.
const COALESCE: Duration = Duration::from_millis(10);
const MAX_COALESCE: Duration = Duration::from_millis(500);

/// Why a stream is not taken in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Instance(#[from] RegisterError),
    #[error(transparent)]
    Account(#[from] AccountLimit),
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
    accounts: Accounts,
    /// The stream of each instance.
    streams: HashMap<InstanceId, u64>,
    /// Until then sidecars are still coming back after a restart: see [`Publisher::settle_for`].
    settles: Option<tokio::time::Instant>,
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
            accounts: Accounts::default(),
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
        inner.accounts.take_stream(&subscriber.id)?;
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
            inner.accounts.take_subscription(&subscriber.id)?;
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
            inner.accounts.give_back(&subscriber.id, 0, 1);
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

impl Inner {
    fn disconnect(&mut self, subscriber: &Subscriber) {
        if self.subscribers.remove(&subscriber.number).is_none() {
            return;
        }
        if self.streams.get(&subscriber.id) == Some(&subscriber.number) {
            self.streams.remove(&subscriber.id);
        }
        let topics = subscriber.leave_all();
        self.accounts.give_back(&subscriber.id, 1, topics.len());
        for topic in topics {
            self.leave(&topic, subscriber.number);
        }
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
}

#[cfg(test)]
mod tests;
