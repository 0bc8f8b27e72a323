//! Who is there: the instances that sidecars lease and the static Workloads, as one index. Pure: time is passed in,
//! and who asks decides when to [`Registry::sweep`]. An instance whose lease was withdrawn goes at once; one whose
//! stream was lost goes 15 s later; and when more than half of a service is lost, it is kept for another 60 s,
//! marked stale, because then the fault is rather ours or the network's.

mod instance;
mod virtual_addresses;

pub use instance::{Instance, InstanceId, LeasedPort, Ports, Registration, SavedLease};
pub use virtual_addresses::{Damaged, VirtualAddresses};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
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

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    #[error("{address} is registered by {holder}; give this instance its own address or port")]
    AddressInUse { address: SocketAddr, holder: InstanceId },
    #[error("all ports of {ip} are taken by the transparent sidecar of {holder}; one address has one such sidecar")]
    AddressIntercepted { ip: IpAddr, holder: InstanceId },
}

#[derive(Debug, Default)]
pub struct Registry {
    leases: BTreeMap<InstanceId, Lease>,
    workloads: BTreeMap<InstanceId, Arc<Instance>>,
    by_ip: HashMap<IpAddr, BTreeSet<InstanceId>>,
}

#[derive(Debug)]
struct Lease {
    instance: Arc<Instance>,
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
    /// Takes a registration, or one that replaces it. Returns the instances that changed for others. A newer stream
    /// takes the lease over: the older one's end means nothing any more.
    pub fn register(
        &mut self,
        id: &InstanceId,
        stream: u64,
        registration: &Registration,
    ) -> Result<Vec<InstanceId>, RegisterError> {
        if registration.transparent {
            self.check_interception(id, registration.ip)?;
        }
        for port in &registration.ports {
            self.check_address(id, SocketAddr::new(registration.ip, port.mesh))?;
        }
        let mut changed = self.evict_the_lost(id, registration);
        let instance = Instance::leased(id, registration, false);
        let before = self.leases.get(id).map(|lease| lease.instance.clone());
        let hold = Hold::Stream(stream);
        if before.as_deref() == Some(&instance) {
            if let Some(lease) = self.leases.get_mut(id) {
                lease.hold = hold;
            }
            return Ok(changed);
        }
        self.insert(id, Lease { instance: Arc::new(instance), hold });
        changed.push(id.clone());
        Ok(changed)
    }

    /// Takes an instance back at once. False when another stream holds it by now.
    pub fn withdraw(&mut self, id: &InstanceId, stream: u64) -> bool {
        let held = self.leases.get(id).is_some_and(|lease| lease.hold == Hold::Stream(stream));
        if held {
            self.remove(id);
        }
        held
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
                self.insert(id, Lease { instance, hold: Hold::Stale { until: now + STALE } });
            } else {
                self.remove(id);
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
        self.leases.values().filter_map(|lease| SavedLease::of(&lease.instance)).collect()
    }

    /// Takes the leases of before our start; who does not come back in time goes.
    pub fn restore(&mut self, saved: Vec<SavedLease>, now: Instant) {
        for lease in saved {
            let (id, registration) = lease.into_parts();
            let instance = Arc::new(Instance::leased(&id, &registration, false));
            self.insert(&id, Lease { instance, hold: Hold::Lost { until: now + RESTORED } });
        }
    }

    /// The instance in force under this id: the lease before the static one.
    pub fn get(&self, id: &InstanceId) -> Option<&Arc<Instance>> {
        self.leases.get(id).map(|lease| &lease.instance).or_else(|| self.workloads.get(id))
    }

    /// Every instance of a namespace, leases first.
    pub fn of_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Instance>> {
        let first = InstanceId::first_of(namespace);
        let leases = self.leases.range(first.clone()..).map(|(_, lease)| &lease.instance);
        let workloads =
            self.workloads.range(first..).filter(|(id, _)| !self.leases.contains_key(id)).map(|(_, fixed)| fixed);
        let inside = move |instance: &&Arc<Instance>| instance.id.namespace == namespace;
        leases.take_while(inside).chain(workloads.take_while(inside))
    }

    /// Instances whose address this is.
    pub fn at(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Instance>> {
        let leases = self.by_ip.get(&ip).into_iter().flatten().filter_map(|id| self.get(id));
        let workloads = self.workloads.iter().filter(|(id, _)| !self.leases.contains_key(id)).map(|(_, fixed)| fixed);
        leases.chain(workloads.filter(move |instance| instance.ip == ip))
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let workloads = self.workloads.iter().filter(|(id, _)| !self.leases.contains_key(id));
        self.leases.values().map(|lease| &lease.instance).chain(workloads.map(|(_, fixed)| fixed))
    }

    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    /// Instances that are listed although they were lost.
    pub fn stale(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.leases.values().map(|lease| &lease.instance).filter(|instance| instance.stale)
    }

    /// An address belongs to one identity at a time, also while its holder is lost and may come back: else whoever is
    /// quick could take the place of a workload that restarts. A successor of the same identity may take it over.
    fn check_address(&self, id: &InstanceId, address: SocketAddr) -> Result<(), RegisterError> {
        let holder =
            self.at(address.ip()).find(|other| !same_identity(&other.id, id) && other.listens_on(address.port()));
        match holder {
            Some(holder) => Err(RegisterError::AddressInUse { address, holder: holder.id.clone() }),
            None => Ok(()),
        }
    }

    /// Beside a transparent sidecar others may listen on ports that its rules exclude, but it is the only one of its kind.
    fn check_interception(&self, id: &InstanceId, ip: IpAddr) -> Result<(), RegisterError> {
        let intercepts = |other: &&Arc<Instance>| matches!(other.ports, Ports::Intercepted(_));
        match self.at(ip).filter(intercepts).find(|other| !same_identity(&other.id, id)) {
            Some(holder) => Err(RegisterError::AddressIntercepted { ip, holder: holder.id.clone() }),
            None => Ok(()),
        }
    }

    /// Where a successor listens now, whoever was lost from there is not coming back.
    fn evict_the_lost(&mut self, id: &InstanceId, registration: &Registration) -> Vec<InstanceId> {
        let intercepts = |other: &Instance| registration.transparent && matches!(other.ports, Ports::Intercepted(_));
        let listens = |other: &Instance| registration.ports.iter().any(|port| other.listens_on(port.mesh));
        let taken = |other: &Instance| intercepts(other) || listens(other);
        let evicted: Vec<InstanceId> = self
            .at(registration.ip)
            .filter(|other| other.id != *id && same_identity(&other.id, id) && self.is_lost(&other.id) && taken(other))
            .map(|other| other.id.clone())
            .collect();
        for id in &evicted {
            self.remove(id);
        }
        evicted
    }

    fn is_lost(&self, id: &InstanceId) -> bool {
        self.leases.get(id).is_some_and(|lease| !matches!(lease.hold, Hold::Stream(_)))
    }

    fn insert(&mut self, id: &InstanceId, lease: Lease) {
        self.remove(id);
        self.by_ip.entry(lease.instance.ip).or_default().insert(id.clone());
        self.leases.insert(id.clone(), lease);
    }

    fn remove(&mut self, id: &InstanceId) {
        let Some(lease) = self.leases.remove(id) else { return };
        if let Some(ids) = self.by_ip.get_mut(&lease.instance.ip) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_ip.remove(&lease.instance.ip);
            }
        }
    }
}

fn same_identity(one: &InstanceId, other: &InstanceId) -> bool {
    one.namespace == other.namespace && one.service_account == other.service_account
}

#[cfg(test)]
mod tests;
