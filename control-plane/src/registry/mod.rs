//! Who is there: the instances that sidecars lease and the static Workloads, as one index. Pure: time is passed in,
//! and who asks decides when to [`Registry::sweep`]. An instance whose lease was withdrawn goes at once; one whose
//! stream was lost goes 15 s later; and when more than half of a service is lost, it is kept for another 60 s,
//! marked stale, because then the fault is rather ours or the network's.
//!
//! Port by port an address belongs to the identity that claims it first, also while its holder is lost or drains and for
//! 60 s after: else a workload that is quick could take the place of one that restarts. What an address may be claimed by
//! at all (the stream's own address, the token's grant) is asked in `distribute/lease.rs`.

mod instance;
mod virtual_addresses;

pub use instance::{Holder, Instance, InstanceId, LeasedPort, Overlap, Ports, Registration, SavedLease};
pub use virtual_addresses::{Damaged, VirtualAddresses};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_api::name::ServiceName;
use outrigger_api::resource::Resources;

/// How long a lost stream may stay away.
pub const LOST: Duration = Duration::from_secs(15);
/// How long leases from before our own start may stay away.
pub const RESTORED: Duration = Duration::from_secs(30);
/// How much longer endpoints are kept when more than half of their service went at once.
pub const STALE: Duration = Duration::from_secs(60);
/// How long the addresses of an instance that is gone are kept for its identity.
pub const KEPT: Duration = Duration::from_secs(60);
/// How long the drain of a sidecar that withdrew its lease may last (DESIGN section 11).
const DRAIN: Duration = Duration::from_secs(30);
/// Instances for which one redemption may stand at once, leases that are lost among them: a sidecar has one, and for a
/// while another when it starts again under another name.
const MAX_INSTANCES: usize = 4;
/// Instances that are gone whose addresses are kept for one redemption.
const MAX_KEPT: usize = 8;

/// Why a registration is not taken. The text is for the sidecar: it says what to do and not who holds an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    #[error("{what} of {ip} is another workload's; give this one another port, or its own --workload-address")]
    AddressInUse { ip: IpAddr, what: Overlap, holder: InstanceId },
    #[error(
        "{what} of {ip} was another workload's until a moment ago and is kept for it while it drains and for 60s after; \
         nothing is to be done, it is tried again"
    )]
    AddressKept { ip: IpAddr, what: Overlap, holder: InstanceId },
    #[error(
        "{ip} is the address of a Workload document, which no sidecar can register; give another --workload-address, or \
         remove the document"
    )]
    AddressOfWorkload { ip: IpAddr, holder: InstanceId },
    #[error("{ip} is the address of a Service, which no workload can register; give --workload-address")]
    AddressOfService { ip: IpAddr },
    #[error(
        "the Workload document {} in namespace {} says that it has no sidecar; give this one another --name, set `mesh: true` \
         in the document, or remove it", .0.name, .0.namespace
    )]
    NameOfWorkload(InstanceId),
    #[error(
        "instance_exists: another sidecar with the name {} and the same namespace and service account is connected; give \
         each its own --name", .0.name
    )]
    InstanceExists(InstanceId),
    #[error(
        "the certificate of this sidecar stands for {MAX_INSTANCES} instances already; give each sidecar a join token of its \
         own, or one with `--uses N` for replicas"
    )]
    TooManyInstances,
}

impl RegisterError {
    /// Who has what was asked for, for the operator's eyes.
    pub fn holder(&self) -> Option<&InstanceId> {
        match self {
            RegisterError::AddressInUse { holder, .. }
            | RegisterError::AddressKept { holder, .. }
            | RegisterError::AddressOfWorkload { holder, .. } => Some(holder),
            RegisterError::AddressOfService { .. }
            | RegisterError::NameOfWorkload(_)
            | RegisterError::InstanceExists(_)
            | RegisterError::TooManyInstances => None,
        }
    }
}

#[derive(Debug, Default)]
pub struct Registry {
    leases: BTreeMap<InstanceId, Lease>,
    workloads: BTreeMap<InstanceId, Arc<Instance>>,
    by_ip: HashMap<IpAddr, BTreeSet<InstanceId>>,
    /// Leases by the redemption that stands behind them.
    by_lineage: HashMap<String, BTreeSet<InstanceId>>,
    /// Leases that are over.
    kept: BTreeMap<InstanceId, Kept>,
}

/// An instance that is gone and whose addresses still belong to its identity.
#[derive(Debug)]
struct Kept {
    instance: Arc<Instance>,
    lineage: String,
    until: Instant,
    /// Its sidecar withdrew it and is still connected.
    draining: bool,
}

#[derive(Debug)]
struct Lease {
    instance: Arc<Instance>,
    holder: Holder,
    hold: Hold,
}

/// What keeps a lease alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// An open stream, by its number.
    Stream(u64),
    Lost {
        until: Instant,
    },
    Stale {
        until: Instant,
    },
}

impl Registry {
    /// Takes a registration, or one that replaces it. Returns the instances that changed for others. A newer stream of the
    /// same sidecar takes the lease over: the older one's end means nothing any more.
    pub fn register(
        &mut self,
        id: &InstanceId,
        stream: u64,
        registration: &Registration,
        now: Instant,
    ) -> Result<Vec<InstanceId>, RegisterError> {
        self.kept.retain(|_, kept| kept.until > now);
        let instance = Instance::leased(id, registration, false);
        self.check_holder(id, &registration.holder)?;
        for ip in instance.ips() {
            self.check_address(&instance, ip)?;
        }
        self.kept.remove(id);
        let mut changed = self.evict_the_lost(&instance);
        let before = self.leases.get(id).map(|lease| lease.instance.clone());
        let (hold, holder) = (Hold::Stream(stream), registration.holder.clone());
        if let Some(instance) = before.filter(|before| **before == instance) {
            self.insert(Lease { instance, holder, hold });
            return Ok(changed);
        }
        self.insert(Lease { instance: Arc::new(instance), holder, hold });
        changed.push(id.clone());
        Ok(changed)
    }

    /// Takes an instance back at once. False when another stream holds it by now.
    pub fn withdraw(&mut self, id: &InstanceId, stream: u64, now: Instant) -> bool {
        let held = self.leases.get(id).is_some_and(|lease| lease.hold == Hold::Stream(stream));
        if held {
            self.end(id, now + DRAIN + KEPT);
            if let Some(kept) = self.kept.get_mut(id) {
                kept.draining = true;
            }
        }
        held
    }

    /// The sidecar of an instance is gone. True when it was withdrawn: its drain is over.
    pub fn drained(&mut self, id: &InstanceId, now: Instant) -> bool {
        let Some(kept) = self.kept.get_mut(id) else { return false };
        kept.until = kept.until.min(now + KEPT);
        std::mem::take(&mut kept.draining)
    }

    /// Instances of a namespace that were withdrawn and whose sidecars are still connected.
    pub fn draining<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Instance>> {
        let kept = self.kept.range(InstanceId::first_of(namespace)..);
        let kept = kept.take_while(move |(id, _)| id.namespace == namespace);
        kept.filter(|(_, kept)| kept.draining).map(|(_, kept)| &kept.instance)
    }

    /// The stream ended without a withdrawal.
    pub fn lost(&mut self, id: &InstanceId, stream: u64, now: Instant) {
        if let Some(lease) = self.leases.get_mut(id)
            && lease.hold == Hold::Stream(stream)
        {
            lease.hold = Hold::Lost { until: now + LOST };
        }
    }

    /// Takes the static instances from a configuration. True when something changed.
    pub fn set_workloads(&mut self, resources: &Resources) -> bool {
        let workloads: BTreeMap<InstanceId, Arc<Instance>> = resources
            .workloads
            .values()
            .map(|resource| {
                let instance = Instance::fixed(&resource.metadata, &resource.spec);
                (instance.id.clone(), Arc::new(instance))
            })
            .collect();
        let changed = workloads != self.workloads;
        self.workloads = workloads;
        changed
    }

    /// When [`Registry::sweep`] has something to do next.
    pub fn next_sweep(&self) -> Option<Instant> {
        self.leases
            .values()
            .filter_map(|lease| match lease.hold {
                Hold::Stream(_) => None,
                Hold::Lost { until } | Hold::Stale { until } => Some(until),
            })
            .min()
    }

    /// Lets go of what was lost for too long. `services` tells which services an instance is part of. Returns the
    /// instances that went or became stale.
    pub fn sweep(&mut self, now: Instant, services: &dyn Fn(&Instance) -> Vec<ServiceName>) -> Vec<InstanceId> {
        let due: Vec<(InstanceId, bool)> = self
            .leases
            .iter()
            .filter_map(|(id, lease)| match lease.hold {
                Hold::Lost { until } if until <= now => Some((id.clone(), false)),
                Hold::Stale { until } if until <= now => Some((id.clone(), true)),
                _ => None,
            })
            .collect();
        if due.is_empty() {
            return Vec::new();
        }
        let suspicious = self.mostly_lost(services);
        for (id, was_stale) in &due {
            let Some(lease) = self.leases.get(id) else { continue };
            let keep = !was_stale && services(&lease.instance).iter().any(|name| suspicious.contains(name));
            if keep {
                let instance = Arc::new(Instance { stale: true, ..Instance::clone(&lease.instance) });
                let holder = lease.holder.clone();
                self.insert(Lease { instance, holder, hold: Hold::Stale { until: now + STALE } });
            } else {
                self.end(id, now + KEPT);
            }
        }
        due.into_iter().map(|(id, _)| id).collect()
    }

    /// Services of which more than half is lost now. A single endpoint is no half of anything: it goes when its
    /// time is over.
    fn mostly_lost(&self, services: &dyn Fn(&Instance) -> Vec<ServiceName>) -> BTreeSet<ServiceName> {
        let mut counts: BTreeMap<ServiceName, (usize, usize)> = BTreeMap::new();
        for instance in self.all() {
            let lost = self.is_lost(&instance.id);
            for service in services(instance) {
                let (total, down) = counts.entry(service).or_default();
                *total += 1;
                *down += usize::from(lost);
            }
        }
        counts
            .into_iter()
            .filter(|(_, (total, down))| *down >= 2 && *down * 2 > *total)
            .map(|(service, _)| service)
            .collect()
    }

    /// The leases as they are to be written to disk.
    pub fn save(&self) -> Vec<SavedLease> {
        let leases = self.leases.values().filter_map(|lease| SavedLease::of(&lease.instance, &lease.holder, false));
        let kept = self.kept.values().filter_map(|kept| {
            let holder = Holder { lineage: kept.lineage.clone(), process: String::new() };
            SavedLease::of(&kept.instance, &holder, true)
        });
        leases.chain(kept).collect()
    }

    /// Takes the leases of before our start; who does not come back in time goes.
    pub fn restore(&mut self, saved: Vec<SavedLease>, now: Instant) {
        for lease in saved {
            let over = lease.over;
            let (id, registration) = lease.into_parts();
            let instance = Arc::new(Instance::leased(&id, &registration, false));
            let holder = registration.holder;
            self.insert(Lease { instance, holder, hold: Hold::Lost { until: now + RESTORED } });
            if over {
                self.end(&id, now + DRAIN + KEPT);
            }
        }
    }

    /// The instance in force under this id: a Workload document before a lease.
    pub fn get(&self, id: &InstanceId) -> Option<&Arc<Instance>> {
        self.workloads.get(id).or_else(|| self.leases.get(id).map(|lease| &lease.instance))
    }

    /// Every instance of a namespace, leases first.
    pub fn of_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Instance>> {
        let first = InstanceId::first_of(namespace);
        let leases = self.leases.range(first.clone()..).filter(|(id, _)| !self.workloads.contains_key(id));
        let leases = leases.map(|(_, lease)| &lease.instance);
        let workloads = self.workloads.range(first..).map(|(_, fixed)| fixed);
        let inside = move |instance: &&Arc<Instance>| instance.id.namespace == namespace;
        leases.take_while(inside).chain(workloads.take_while(inside))
    }

    /// Instances whose address this is, Workload documents first.
    pub fn at(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Instance>> {
        let leases = self.leases_at(ip).filter(|lease| !self.workloads.contains_key(&lease.instance.id));
        let workloads = self.workloads.values().filter(move |instance| instance.ip == ip);
        workloads.chain(leases.map(|lease| &lease.instance))
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let leases = self.leases.iter().filter(|(id, _)| !self.workloads.contains_key(id));
        leases.map(|(_, lease)| &lease.instance).chain(self.workloads.values())
    }

    /// What the sidecar of an instance says of it, also where a Workload document is in force.
    pub fn leased(&self, id: &InstanceId) -> Option<&Arc<Instance>> {
        self.leases.get(id).map(|lease| &lease.instance)
    }

    /// Leases of which a Workload document that came later says that they have no sidecar.
    pub fn hidden(&self) -> impl Iterator<Item = &InstanceId> {
        self.leases.keys().filter(|id| self.workloads.get(id).is_some_and(|fixed| !fixed.mesh))
    }

    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    /// Instances that are listed although they were lost.
    pub fn stale(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.leases.values().map(|lease| &lease.instance).filter(|instance| instance.stale)
    }

    /// Whether this sidecar may stand for the instance.
    fn check_holder(&self, id: &InstanceId, holder: &Holder) -> Result<(), RegisterError> {
        // The sidecar of a document that says it has one stands for it, and changes nothing about it.
        if self.workloads.get(id).is_some_and(|fixed| !fixed.mesh) {
            return Err(RegisterError::NameOfWorkload(id.clone()));
        }
        if let Some(lease) = self.leases.get(id)
            && matches!(lease.hold, Hold::Stream(_))
            && !lease.holder.is_same(holder)
        {
            return Err(RegisterError::InstanceExists(id.clone()));
        }
        let others = self.by_lineage.get(&holder.lineage).map_or(0, |ids| ids.len() - usize::from(ids.contains(id)));
        if others >= MAX_INSTANCES { Err(RegisterError::TooManyInstances) } else { Ok(()) }
    }

    /// Whether an instance may have its ports at an address. A successor of the same identity may take it over. The address
    /// of a Workload document is never a lease's; loopback is what all workloads of a machine share, and there it is only
    /// the document's ports.
    fn check_address(&self, instance: &Instance, ip: IpAddr) -> Result<(), RegisterError> {
        let (claim, id) = (instance.claim(), &instance.id);
        let fixed = |other: &&Arc<Instance>| {
            let beside = ip.is_loopback() && other.claim().overlap(&claim).is_none();
            other.id != *id && other.ip == ip && !beside
        };
        if let Some(holder) = self.workloads.values().find(fixed) {
            return Err(RegisterError::AddressOfWorkload { ip, holder: holder.id.clone() });
        }
        let overlap = |other: &Instance| {
            let what = (!same_identity(&other.id, id)).then(|| other.claim().overlap(&claim)).flatten()?;
            Some((what, other.id.clone()))
        };
        if let Some((what, holder)) = self.leases_at(ip).find_map(|lease| overlap(&lease.instance)) {
            return Err(RegisterError::AddressInUse { ip, what, holder });
        }
        let mut kept = self.kept.values().filter(|kept| kept.instance.ips().any(|other| other == ip));
        match kept.find_map(|kept| overlap(&kept.instance)) {
            Some((what, holder)) => Err(RegisterError::AddressKept { ip, what, holder }),
            None => Ok(()),
        }
    }

    /// Where a successor listens now, whoever was lost from there is not coming back.
    fn evict_the_lost(&mut self, instance: &Instance) -> Vec<InstanceId> {
        let intercepts = |one: &Instance| matches!(one.ports, Ports::Intercepted(_));
        let taken = |other: &Instance| {
            let ports = instance.leased_ports().unwrap_or_default();
            (intercepts(instance) && intercepts(other)) || ports.iter().any(|port| other.listens_on(port.mesh))
        };
        let is_evicted = |lease: &&Lease| {
            let other = &lease.instance.id;
            *other != instance.id && same_identity(other, &instance.id) && self.is_lost(other) && taken(&lease.instance)
        };
        let evicted: BTreeSet<InstanceId> = instance
            .ips()
            .flat_map(|ip| self.leases_at(ip).filter(is_evicted))
            .map(|lease| lease.instance.id.clone())
            .collect();
        for id in &evicted {
            self.remove(id);
        }
        evicted.into_iter().collect()
    }

    fn leases_at(&self, ip: IpAddr) -> impl Iterator<Item = &Lease> {
        self.by_ip.get(&ip).into_iter().flatten().filter_map(|id| self.leases.get(id))
    }

    fn is_lost(&self, id: &InstanceId) -> bool {
        self.leases.get(id).is_some_and(|lease| !matches!(lease.hold, Hold::Stream(_)))
    }

    fn insert(&mut self, lease: Lease) {
        let id = lease.instance.id.clone();
        self.remove(&id);
        for ip in lease.instance.ips() {
            self.by_ip.entry(ip).or_default().insert(id.clone());
        }
        self.by_lineage.entry(lease.holder.lineage.clone()).or_default().insert(id.clone());
        self.leases.insert(id, lease);
    }

    /// Removes an instance, and keeps its addresses for its identity.
    fn end(&mut self, id: &InstanceId, until: Instant) {
        let Some(Lease { instance, holder, .. }) = self.remove(id) else { return };
        self.kept.insert(id.clone(), Kept { instance, lineage: holder.lineage.clone(), until, draining: false });
        let of_holder = self.kept.iter().filter(|(_, kept)| kept.lineage == holder.lineage);
        if of_holder.clone().count() > MAX_KEPT
            && let Some((first, _)) = of_holder.min_by_key(|(_, kept)| kept.until)
        {
            let first = first.clone();
            self.kept.remove(&first);
        }
    }

    fn remove(&mut self, id: &InstanceId) -> Option<Lease> {
        let lease = self.leases.remove(id)?;
        for ip in lease.instance.ips() {
            take_out(&mut self.by_ip, &ip, id);
        }
        take_out(&mut self.by_lineage, &lease.holder.lineage, id);
        Some(lease)
    }
}

fn take_out<K: std::hash::Hash + Eq>(ids: &mut HashMap<K, BTreeSet<InstanceId>>, key: &K, id: &InstanceId) {
    if let Some(of_key) = ids.get_mut(key) {
        of_key.remove(id);
        if of_key.is_empty() {
            ids.remove(key);
        }
    }
}

fn same_identity(one: &InstanceId, other: &InstanceId) -> bool {
    one.namespace == other.namespace && one.service_account == other.service_account
}

#[cfg(test)]
mod tests;
