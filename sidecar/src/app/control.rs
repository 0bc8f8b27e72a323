//! The control thread: certificates, discovery, admin, reports, gauges. Isolated from the workers' run queues; it tells
//! them nothing, they read what it publishes.

use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use outrigger_api::snapshot::{KeyAlgorithm, Workload};
use outrigger_runtime::drain::{DrainHandle, State};
use outrigger_runtime::memory::Budget;
use tokio::sync::{Notify, watch};

use super::{exemption, memory, way_back};
use crate::admin::{self, Admin, ForOperators};
use crate::config::{Config, Limits};
use crate::connection::{Places, Table};
use crate::discovery::{self, Directory, DiscoverySettings, Lease};
use crate::identity::{self, IdentitySettings, IdentityStatus};
use crate::key_sets::{self, KeySets};
use crate::telemetry::Telemetry;
use crate::tls::Tls;

/// What runs beside the workers, on one thread of its own: certificates, discovery, admin, reports.
pub(super) struct Control {
    pub(super) config: Config,
    pub(super) tls: Tls,
    pub(super) directory: Directory,
    pub(super) key_sets: KeySets,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) identity_status: watch::Sender<IdentityStatus>,
    pub(super) renew: Arc<Notify>,
    pub(super) lease: Option<Lease>,
    pub(super) limits: Limits,
    pub(super) places: Arc<Places>,
    /// What all buffers may hold.
    pub(super) buffers: Arc<Budget>,
    pub(super) tables: Arc<[Arc<Table>]>,
    pub(super) drain: DrainHandle,
    pub(super) admin: Admin,
    pub(super) listeners: ForOperators,
}

impl Control {
    pub(super) fn run(self) -> io::Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(self.serve())
    }

    async fn serve(self) -> io::Result<()> {
        let Control {
            config,
            tls,
            directory,
            key_sets,
            telemetry,
            identity_status,
            renew,
            lease,
            limits,
            places,
            buffers,
            tables,
            drain,
            admin,
            listeners,
        } = self;
        let (algorithm, key_algorithm) = watch::channel(KeyAlgorithm::default());
        let identity = IdentitySettings {
            control_plane: config.control_plane.clone(),
            trust_bundle: config.trust_bundle.clone(),
            token_file: config.token_file.clone(),
            name: config.workload.clone(),
            namespace: config.namespace.clone(),
            service_account: config.service_account.clone(),
            trust_domain: config.trust_domain.clone(),
            state: config.state.clone(),
            mark: config.mark,
            key_algorithm,
        };
        let discovery = DiscoverySettings {
            control_plane: config.control_plane.clone(),
            trust_domain: config.trust_domain.clone(),
            name: config.name.clone(),
            namespace: config.namespace.clone(),
            service_account: config.service_account.clone(),
            state: config.state.clone(),
            mark: config.mark,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: discovery::process_name(),
        };
        if config.state.is_none() {
            tracing::info!("without --state nothing survives a restart: a new join token will be needed then");
        }
        let fetching = key_sets::Settings {
            state: config.state.clone(),
            mark: config.mark,
            roots: config.jwks_roots.clone(),
            limits: limits.clone(),
        };
        tokio::spawn(key_sets::run(key_sets, directory.own(), fetching));
        tokio::spawn(identity::run(identity, tls.clone(), renew.clone(), identity_status));
        tokio::spawn(follow_algorithm(directory.own(), algorithm, renew));
        let reports = Reports { telemetry: telemetry.clone(), tables };
        let withdraw = drain.when(State::Draining);
        tokio::spawn(discovery::run(discovery, tls.clone(), lease, directory.clone(), reports.source(), withdraw));
        tokio::spawn(follow(config.workload.clone(), directory, telemetry.clone()));
        tokio::spawn(gauges(tls, admin.directory.clone(), telemetry.clone()));
        tokio::spawn(memory::watch(limits, buffers, places, telemetry.clone()));
        if config.transparent {
            let readiness = admin.readiness.clone();
            let comes_back = readiness.comes_back.clone();
            tokio::spawn(exemption::watch(config.mark, readiness, comes_back));
        }
        if let Some(holds) = admin.readiness.way_back.clone() {
            tokio::spawn(way_back::watch(holds));
        }
        admin::serve(admin, listeners, &drain).await?;
        drain.reached(State::Done).await;
        telemetry.flush().await;
        Ok(())
    }
}

/// Where the periodic summary for the control plane comes from.
struct Reports {
    telemetry: Arc<Telemetry>,
    tables: Arc<[Arc<Table>]>,
}

impl Reports {
    fn source(self) -> discovery::ReportSource {
        let telemetry = self.telemetry.clone();
        discovery::ReportSource {
            make: Box::new(move || {
                let mut report = self.telemetry.report_window();
                report.connections = self.tables.iter().map(|table| table.len() as u64).sum();
                report
            }),
            taken: Arc::new(move |shadow| telemetry.report_taken(shadow)),
        }
    }
}

/// Applies mesh-wide settings to telemetry as they come.
async fn follow(workload: String, directory: Directory, telemetry: Arc<Telemetry>) {
    let mut own = directory.own();
    loop {
        let current = own.borrow_and_update().clone();
        if let Some(current) = current {
            let service = current.ports.values().find_map(|port| port.service.as_ref());
            let name = service.map_or(workload.as_str(), |service| &service.name);
            telemetry.configure(&current.mesh, name);
        }
        if own.changed().await.is_err() {
            return;
        }
    }
}

/// A key of another kind is wanted: the next certificate has it, and it comes now.
async fn follow_algorithm(
    mut own: watch::Receiver<Option<Arc<Workload>>>,
    algorithm: watch::Sender<KeyAlgorithm>,
    renew: Arc<Notify>,
) {
    loop {
        let wanted = own.borrow_and_update().as_ref().map(|own| own.mesh.key_algorithm);
        if let Some(wanted) = wanted
            && algorithm.send_replace(wanted) != wanted
        {
            renew.notify_one();
        }
        if own.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the gauges that come from elsewhere.
async fn gauges(tls: Tls, directory: Directory, telemetry: Arc<Telemetry>) {
    let mut material = tls.subscribe();
    let mut connected = directory.connected();
    // Changes come by themselves; this is for the age alone.
    let mut tick = tokio::time::interval(Duration::from_secs(10));
    loop {
        if let Some(material) = material.borrow_and_update().as_ref() {
            let end = material.credential().not_after().duration_since(UNIX_EPOCH).unwrap_or_default();
            telemetry.set_certificate_not_after(i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        }
        telemetry.set_control_plane_connected(*connected.borrow_and_update());
        if let Some(age) = directory.snapshot_age() {
            telemetry.confirm_snapshot(std::time::SystemTime::now() - age);
        }
        tokio::select! {
            Ok(()) = material.changed() => {}
            Ok(()) = connected.changed() => {}
            _ = tick.tick() => {}
        }
    }
}
