//! Puts a sidecar together: binds every listener, starts the workers and the control thread, drains, ends. Used by
//! `main` for a process and by the demo and the tests for a sidecar among others in one process.

mod control;
mod exemption;
mod listeners;
mod memory;
pub mod process;
mod way_back;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context as _;
use outrigger_api::identity::SpiffeId;
use outrigger_runtime::drain::{Budget, Drain, State};
use outrigger_runtime::heartbeat::Heartbeats;
use outrigger_runtime::logging::Logs;
use tokio::sync::{Notify, mpsc, watch};

use control::Control;
use listeners::{Bound, DataListener, bind};
use worker::{Crew, Purpose, Start};

use crate::admin::{self, Admin, Readiness};
use crate::balance::Loads;
use crate::config::{Config, Limits};
use crate::connect::dial::OwnListeners;
use crate::connect::own_dials::OwnDials;
use crate::connect::worker::{Own, Shared};
use crate::connection::{Places, Table};
use crate::discovery::{Directory, Lease};
use crate::identity::IdentityStatus;
use crate::key_sets::KeySets;
use crate::net::SocketOptions;
use crate::policy;
use crate::resolver;
use crate::telemetry::{self, Telemetry};
use crate::tls::{Clock, Tls};

/// A running sidecar.
pub struct Sidecar {
    listening: Vec<(String, SocketAddr)>,
    readiness: Readiness,
    drain: Arc<Drain>,
    budget: Budget,
    quit: Arc<Notify>,
    threads: Vec<JoinHandle<()>>,
    ended: watch::Receiver<Option<String>>,
}

impl Sidecar {
    /// Binds and starts. The error names the address that cannot be bound.
    pub fn start(config: Config, limits: Limits, logs: Logs) -> anyhow::Result<Sidecar> {
        let socket = SocketOptions {
            keepalive: limits.keepalive,
            keepalive_interval: limits.keepalive_interval,
            keepalive_probes: limits.keepalive_probes,
            user_timeout: None,
            mark: config.mark,
        };
        let bound = bind(&config, &socket, limits.no_ack_timeout)?;
        let own_listeners = OwnListeners::default();
        for (_, address) in &bound.listening {
            own_listeners.add(*address);
        }
        let principal = SpiffeId::new(&config.trust_domain, &config.namespace, &config.service_account)
            .context("--namespace and --service-account do not make an identity")?;
        let telemetry = Telemetry::new(telemetry::Own {
            instance: config.name.clone(),
            workload: config.workload.clone(),
            namespace: config.namespace.clone(),
            principal: principal.to_string(),
            mark: config.mark,
        });
        outrigger_runtime::metrics::build_info(telemetry.registry(), "outrigger_build_info")?;
        outrigger_runtime::process_metrics::register(telemetry.registry())?;
        let drain = Arc::new(Drain::new());
        let clock = Clock::system();
        let tls = Tls::new(clock.clone());
        let directory = Directory::new(clock);
        let key_sets = KeySets::new(&limits);
        let places = Places::new(limits.connections);
        let buffers = memory::budget(&limits);
        let tables: Arc<[Arc<Table>]> = (0..config.workers).map(|_| Table::new(places.clone())).collect();
        let hearts = Arc::new(Heartbeats::new());
        let (identity_status, identity) = watch::channel(IdentityStatus::default());
        let way_back = config.keep_source_address.then(Arc::<AtomicBool>::default);
        let readiness = Readiness {
            tls: tls.clone(),
            directory: directory.clone(),
            identity,
            drain: drain.handle(),
            offers: offers(&config),
            comes_back: Arc::default(),
            way_back: way_back.clone(),
            places: places.clone(),
        };
        let shared = Shared {
            own: Arc::new(Own {
                instance: config.name.clone(),
                workload: config.workload.clone(),
                namespace: config.namespace.clone(),
                principal,
                inbound: inbound(&bound),
                transparent: config.transparent,
            }),
            telemetry: telemetry.clone(),
            directory: directory.clone(),
            key_sets: key_sets.clone(),
            buckets: policy::Buckets::default(),
            tls: tls.clone(),
            own_dials: if config.transparent { OwnDials::remembered() } else { OwnDials::default() },
            way_back,
            loads: Loads::default(),
            epoch: Instant::now(),
            limits: limits.clone(),
            memory: buffers.clone(),
            drain: drain.handle(),
        };
        let lease = lease(&config, &bound);
        let (ending, ended) = watch::channel(None);
        let mut threads = start_workers(&shared, &tables, bound.data, &own_listeners, socket, &hearts, &ending)?;
        let renew = Arc::new(Notify::new());
        let quit = Arc::new(Notify::new());
        let admin = Admin {
            tls: tls.clone(),
            directory: directory.clone(),
            key_sets: key_sets.clone(),
            telemetry: telemetry.clone(),
            readiness: readiness.clone(),
            tables: tables.clone(),
            hearts,
            logs,
            renew: renew.clone(),
            quit: quit.clone(),
            config: Arc::new(admin::ConfigView::new(&config)),
        };
        let budget = Budget { delay: config.drain_delay, total: limits.drain_total };
        let names = resolver::Settings {
            namespace: config.namespace.clone(),
            upstreams: config.dns_upstream.clone(),
            mark: config.mark,
            own: bound.names.iter().filter_map(|listener| listener.tcp.local_addr().ok()).collect(),
        };
        if !bound.names.is_empty() {
            let (listeners, directory, telemetry) = (bound.names, directory.clone(), telemetry.clone());
            let (limits, drain) = (limits.clone(), drain.handle());
            let run = move || resolver::run(names, listeners, directory, telemetry, limits, drain);
            threads.push(thread("resolver", &ending, run)?);
        }
        let control = Control {
            config,
            tls,
            directory,
            key_sets,
            telemetry: telemetry.clone(),
            identity_status,
            renew,
            lease,
            limits,
            places,
            buffers,
            tables,
            drain: drain.handle(),
            admin,
            listeners: bound.operators,
        };
        threads.push(thread("control", &ending, move || control.run())?);
        Ok(Sidecar { listening: bound.listening, readiness, drain, budget, quit, threads, ended })
    }

    /// `name` and address of every listener, in the order of the documentation.
    pub fn listening(&self) -> &[(String, SocketAddr)] {
        &self.listening
    }

    /// The address of one listener, by the name that stdout shows.
    pub fn address(&self, name: &str) -> Option<SocketAddr> {
        self.listening.iter().find(|(listener, _)| listener == name).map(|(_, address)| *address)
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// Resolves when `/quitquitquit` asks for the end.
    pub async fn asked_to_quit(&self) {
        self.quit.notified().await;
    }

    /// Resolves with its name when a thread has ended before its time.
    pub async fn broken(&self) -> String {
        let mut ended = self.ended.clone();
        loop {
            if let Some(name) = ended.borrow_and_update().clone()
                && self.drain.handle().state() < State::Done
            {
                return name;
            }
            if ended.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Drains within the budget. Says how many connections were cut.
    pub async fn drain(&self) -> usize {
        self.drain.run(self.budget).await
    }

    /// Ends what is left and waits for the threads.
    pub fn stop(self) {
        self.drain.advance(State::Done);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the sidecar panicked");
            }
        }
    }
}

/// What has to be registered before this sidecar is of use; None: it registers nothing.
fn offers(config: &Config) -> Option<Vec<u16>> {
    let explicit = config.inbound.iter().map(|inbound| inbound.app.port());
    if config.transparent {
        return Some(config.ports.iter().map(|declared| declared.port).chain(explicit).collect());
    }
    Some(explicit.collect()).filter(|ports: &Vec<u16>| !ports.is_empty())
}

/// What peers are told: the mesh ports as they were really bound.
fn lease(config: &Config, bound: &Bound) -> Option<Lease> {
    let declared =
        |port: u16| config.ports.iter().find(|declared| declared.port == port).and_then(|port| port.protocol);
    let mut ports: Vec<_> = bound
        .data
        .iter()
        .filter_map(|listener| match &listener.purpose {
            Purpose::Inbound { application } => {
                Some((application.port(), listener.address.port(), declared(application.port())))
            }
            Purpose::Outbound { .. } | Purpose::Proxy { .. } | Purpose::Redirected(_) => None,
        })
        .collect();
    if config.transparent {
        let listed: Vec<u16> = ports.iter().map(|(application, ..)| *application).collect();
        let others = config.ports.iter().filter(|declared| !listed.contains(&declared.port));
        ports.extend(others.map(|declared| (declared.port, declared.port, declared.protocol)));
    }
    let lease = Lease {
        instance: config.name.clone(),
        workload: config.workload.clone(),
        labels: config.labels.clone(),
        ips: config.workload_address.clone(),
        ports,
        transparent: config.transparent,
    };
    (lease.transparent || !lease.ports.is_empty()).then_some(lease)
}

/// The listeners at which peers dial an application, and where that is.
fn inbound(bound: &Bound) -> Vec<(SocketAddr, SocketAddr)> {
    let application = |listener: &DataListener| match &listener.purpose {
        Purpose::Inbound { application } => Some((listener.address, *application)),
        Purpose::Outbound { .. } | Purpose::Proxy { .. } | Purpose::Redirected(_) => None,
    };
    bound.data.iter().filter_map(application).collect()
}

fn start_workers(
    shared: &Shared,
    tables: &Arc<[Arc<Table>]>,
    data: Vec<DataListener>,
    own_listeners: &OwnListeners,
    socket: SocketOptions,
    hearts: &Heartbeats,
    ending: &watch::Sender<Option<String>>,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let (inboxes, receivers): (Vec<_>, Vec<_>) = tables.iter().map(|_| mpsc::unbounded_channel()).unzip();
    let inboxes: Arc<[_]> = inboxes.into();
    let mut listeners: Vec<Vec<_>> = tables.iter().map(|_| Vec::new()).collect();
    for DataListener { sockets, purpose, .. } in data {
        for (own, socket) in listeners.iter_mut().zip(sockets) {
            own.push((socket, purpose.clone()));
        }
    }
    let mut threads = Vec::new();
    for (own, (inbox, listeners)) in receivers.into_iter().zip(listeners).enumerate() {
        let name = format!("worker-{own}");
        let start = Start {
            shared: shared.clone(),
            crew: Crew { own, tables: tables.clone(), inboxes: inboxes.clone() },
            inbox,
            listeners,
            own_listeners: own_listeners.clone(),
            socket,
            heart: hearts.register(name.clone()),
        };
        threads.push(thread(&name, ending, move || worker::run(start))?);
    }
    Ok(threads)
}

fn thread(
    name: &str,
    ending: &watch::Sender<Option<String>>,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let end = Ended { name: name.to_owned(), ending: ending.clone() };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if let Err(error) = body() {
                tracing::error!(%error, thread = end.name, "a thread of the sidecar ended");
            }
        })
        .with_context(|| format!("cannot start the thread {name}"))
}

/// Tells of a thread's end when it is dropped, also by a panic.
struct Ended {
    name: String,
    ending: watch::Sender<Option<String>>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.ending.send_replace(Some(std::mem::take(&mut self.name)));
    }
}
