//! Puts a control plane together and runs it: as a process ([`command`]) or inside another one ([`ControlPlane`]).
//! The only place that binds, spawns and ends; everything else is told what to do.

mod command;
mod virtual_addresses;

pub use command::command;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outrigger_api::identity::{DEFAULT_TRUST_DOMAIN, IdentityError, TrustDomain};
use outrigger_api::resource::Resources;
use outrigger_runtime::admin::Hosts;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::admin;
use crate::ca::token::{self, TokenKey};
use crate::ca::{Authority, AuthorityError, Redemptions, ServingCertificate};
use crate::config::{Args, Directory, JournalError, State, StateError, StateLock, TRUST_DOMAIN};
use crate::distribute::{Catalog, Control, Lines, Metrics, Publisher, Recent, Reports, Server, Shadows};
use crate::registry::{Registry, SavedLease};
use virtual_addresses::{Keeper, configure};

const LEASES: &str = "leases.json";
const WATCH_VERSION: &str = "watch-version";
/// Versions that one run may give out before the next one's begin.
const VERSION_RESERVE: u64 = 1 << 32;
/// Leases that change together are written together.
const LEASE_DEBOUNCE: Duration = Duration::from_millis(500);
/// Longer than sidecars take to come back: they dial again within five seconds.
const SETTLE: Duration = Duration::from_secs(7);
const MAINTENANCE: Duration = Duration::from_secs(30);
/// Streams end at once when told to; this is for a peer that does not read.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("--config {path}: {source}")]
    Config { path: PathBuf, source: io::Error },
    #[error(
        "MeshConfig's trustDomain is {configured}, and --trust-domain is {flag}; make them agree, or leave one out"
    )]
    TrustDomains { configured: TrustDomain, flag: TrustDomain },
    #[error(
        "--state {path} belongs to trust domain {known}, not to {wanted}; give {wanted} its own --state, or start with \
         --trust-domain {known}"
    )]
    OtherTrustDomain { path: PathBuf, known: String, wanted: TrustDomain },
    #[error(transparent)]
    TrustDomain(#[from] IdentityError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Token(#[from] token::CreateError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "{path} cannot be read: {source}. Mend it, or remove it once no client can remember an address from it: those \
         in it would be given to other services"
    )]
    VirtualAddresses { path: PathBuf, source: crate::registry::Damaged },
    #[error("cannot listen on {address} ({flag}): {source}")]
    Bind { flag: &'static str, address: SocketAddr, source: io::Error },
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl StartError {
    /// 2 for what the operator's flags and files say, 1 for what the machine does not give.
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::State(StateError::Exposed(_)) => 2,
            StartError::State(_) | StartError::Bind { .. } | StartError::Tls(_) | StartError::Metrics(_) => 1,
            StartError::Journal(JournalError::Io { .. } | JournalError::State(_)) => 1,
            StartError::Authority(AuthorityError::State(_) | AuthorityError::Random) => 1,
            StartError::Token(token::CreateError::State(_) | token::CreateError::Random) => 1,
            StartError::Config { .. }
            | StartError::TrustDomains { .. }
            | StartError::OtherTrustDomain { .. }
            | StartError::TrustDomain(_)
            | StartError::Authority(_)
            | StartError::Token(_)
            | StartError::VirtualAddresses { .. }
            | StartError::Journal(JournalError::Damaged { .. }) => 2,
        }
    }
}

/// A running control plane. Dropping it ends it at once; [`ControlPlane::shutdown`] ends it in order.
pub struct ControlPlane {
    grpc: SocketAddr,
    admin: SocketAddr,
    state: State,
    publisher: Arc<Publisher>,
    reload: Arc<Notify>,
    refresh: Arc<Notify>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
    _directory: Directory,
    _lock: StateLock,
}

impl ControlPlane {
    /// Starts on the current tokio runtime. When it returns, the listeners are bound, STATE/trust-bundle.pem is
    /// written and the configuration is in force.
    pub async fn start(args: &Args) -> Result<ControlPlane, StartError> {
        let state = State::open(&args.state)?;
        let lock = state.lock()?;
        let directory = Directory::watch(&args.config, outrigger_api::compile::load, &state)
            .map_err(|source| StartError::Config { path: args.config.clone(), source })?;
        let (stop, stopping) = watch::channel(false);
        let Opened { control, serving, keeper } = open(args, &state, &directory, stopping)?;
        let grpc = bind("--listen", args.listen).await?;
        let admin_listener = bind("--admin-listen", args.admin_listen).await?;
        let server = Server::new(grpc, serving.clone(), control.clone())?;
        let configuration = directory.subscribe();
        let mut control_plane = ControlPlane {
            grpc: server.address().map_err(|source| bound("--listen", args.listen, source))?,
            admin: admin_listener.local_addr().map_err(|source| bound("--admin-listen", args.admin_listen, source))?,
            state,
            publisher: control.publisher.clone(),
            reload: directory.reload(),
            refresh: Arc::default(),
            stop,
            tasks: JoinSet::new(),
            _directory: directory,
            _lock: lock,
        };
        control_plane.spawn(
            server,
            admin_listener,
            admin::Sources { control, serving, configuration, started: Instant::now() },
            keeper,
        );
        Ok(control_plane)
    }

    fn spawn(&mut self, server: Server, admin_listener: TcpListener, sources: admin::Sources, keeper: Keeper) {
        let admin::Sources { control, serving, configuration, .. } = sources.clone();
        self.tasks.spawn(async move {
            if let Err(error) = server.serve().await {
                tracing::error!("the gRPC listener ended: {error}");
            }
        });
        let hosts = if self.admin.ip().is_loopback() { Hosts::Loopback } else { Hosts::Any };
        let mut stop = control.stop.clone();
        self.tasks.spawn(async move {
            let stopped = async move {
                let _ = stop.wait_for(|stop| *stop).await;
            };
            outrigger_runtime::admin::serve(admin_listener, admin::router(sources), hosts, stopped).await;
        });
        let publisher = self.publisher.clone();
        self.tasks.spawn(until_stop(&control, async move { publisher.run().await }));
        self.tasks.spawn(until_stop(&control, configure(self.publisher.clone(), configuration, keeper)));
        self.tasks.spawn(until_stop(&control, keep_leases(self.publisher.clone(), self.state.clone())));
        self.tasks.spawn(until_stop(&control, maintain(control.clone(), serving, self.refresh.clone())));
    }

    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    pub fn trust_bundle_path(&self) -> PathBuf {
        self.state.path("trust-bundle.pem")
    }

    pub fn state_path(&self) -> &Path {
        self.state.directory()
    }

    /// Reads the configuration and the roots again now.
    pub fn reload(&self) {
        self.reload.notify_one();
        self.refresh.notify_one();
    }

    /// Resolves when one of the tasks that run to the end has ended, by a panic most likely. Cancel safe.
    pub async fn broken(&mut self) {
        if self.tasks.join_next().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Ends every stream, writes the leases and returns when everything has ended.
    pub async fn shutdown(mut self) {
        let _ = self.stop.send(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
            tracing::warn!("some connections did not end within {STOP_TIMEOUT:?}");
        }
        self.tasks.abort_all();
        if let Err(error) = save_leases(&self.publisher, &self.state) {
            tracing::error!("the leases are not kept over this restart: {error}");
        }
    }
}

struct Opened {
    control: Arc<Control>,
    serving: Arc<ServingCertificate>,
    keeper: Keeper,
}

/// Everything that the state directory and the configuration give, before a port is bound.
fn open(args: &Args, state: &State, directory: &Directory, stop: watch::Receiver<bool>) -> Result<Opened, StartError> {
    let resources = directory.subscribe().borrow().resources.clone();
    let trust_domain = trust_domain(args, state, &resources)?;
    let now = SystemTime::now();
    let authority = Arc::new(Authority::open(state, &trust_domain, now)?);
    let serving = Arc::new(ServingCertificate::new(&authority, now)?);
    let metrics = Arc::new(metrics()?);
    let restarted = matches!(state.read(WATCH_VERSION), Ok(Some(_)));
    let mut keeper = Keeper::open(state)?;
    let (addresses, written) = keeper.settle(&resources, now);
    written?;
    let publisher = Publisher::new(
        Catalog::new(resources, trust_domain, addresses),
        restored(state),
        authority.bundle().to_wire(),
        first_version(state, now),
        metrics.clone(),
    );
    if restarted {
        publisher.settle_for(SETTLE);
    }
    let control = Control {
        authority,
        tokens: TokenKey::open(state)?,
        redemptions: Redemptions::open(state)?,
        publisher: Arc::new(publisher),
        reports: Reports::default(),
        shadows: Shadows::default(),
        metrics,
        lines: Lines::default(),
        recent: Recent::default(),
        open_streams: Arc::default(),
        streams: AtomicU64::new(1),
        stop,
    };
    Ok(Opened { control: Arc::new(control), serving, keeper })
}

fn until_stop<F: Future<Output = ()> + Send + 'static>(
    control: &Control,
    work: F,
) -> impl Future<Output = ()> + Send + 'static {
    let mut stop = control.stop.clone();
    async move {
        tokio::select! {
            () = work => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
}

/// Keeps the leases on disk: the first change at once, what follows it together.
async fn keep_leases(publisher: Arc<Publisher>, state: State) {
    loop {
        publisher.leases_changed.notified().await;
        let (publisher, state) = (publisher.clone(), state.clone());
        let saved = tokio::task::spawn_blocking(move || save_leases(&publisher, &state)).await;
        if let Ok(Err(error)) = saved {
            tracing::error!("the leases would not survive a restart now: {error}");
        }
        tokio::time::sleep(LEASE_DEBOUNCE).await;
    }
}

/// Renews what the control plane itself holds, and reads the roots again.
async fn maintain(control: Arc<Control>, serving: Arc<ServingCertificate>, refresh: Arc<Notify>) {
    let mut tick = tokio::time::interval(MAINTENANCE);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = refresh.notified() => {}
        }
        let (shared, serving) = (control.clone(), serving.clone());
        let done = tokio::task::spawn_blocking(move || {
            let now = SystemTime::now();
            let changed = shared.authority.maintain(now);
            serving.renew_when_due(&shared.authority, now)?;
            changed
        })
        .await;
        match done {
            Ok(Ok(true)) => control.publisher.set_bundle(control.authority.bundle().to_wire()),
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => tracing::error!("certificate authority: {error}"),
        }
        let standing = control.authority.standing(SystemTime::now());
        if standing.early {
            tracing::warn!("the clock stands before the beginning of the issuing certificate; set it right");
        }
        if standing.overdue {
            tracing::warn!(
                "more than half of the intermediate certificate's life is over, and ca/root.key is not here to \
                 renew it; replace ca/intermediate.pem and ca/intermediate.key"
            );
        }
    }
}

/// The flag's, else MeshConfig's, else the default; and always the one that the state directory was made for.
fn trust_domain(args: &Args, state: &State, resources: &Resources) -> Result<TrustDomain, StartError> {
    let configured = resources.mesh.trust_domain.as_ref();
    let wanted = match (&args.trust_domain, configured) {
        (Some(flag), Some(configured)) if flag != configured => {
            return Err(StartError::TrustDomains { configured: configured.clone(), flag: flag.clone() });
        }
        (Some(chosen), _) => chosen.clone(),
        (None, Some(chosen)) => chosen.clone(),
        (None, None) => TrustDomain::new(DEFAULT_TRUST_DOMAIN)?,
    };
    match state.read(TRUST_DOMAIN)? {
        Some(known) if known.trim_ascii() == wanted.as_str().as_bytes() => Ok(wanted),
        Some(known) => Err(StartError::OtherTrustDomain {
            path: state.directory().to_owned(),
            known: String::from_utf8_lossy(&known).trim().to_owned(),
            wanted,
        }),
        None => {
            state.write(TRUST_DOMAIN, format!("{wanted}\n").as_bytes())?;
            Ok(wanted)
        }
    }
}

/// Leases from before the start. Damage costs nothing that reconnecting sidecars do not bring back.
fn restored(state: &State) -> Registry {
    let mut registry = Registry::default();
    let saved = state
        .read(LEASES)
        .map(|bytes| bytes.map_or(Ok(Vec::new()), |bytes| serde_json::from_slice::<Vec<SavedLease>>(&bytes)));
    match saved {
        Ok(Ok(saved)) => registry.restore(saved, tokio::time::Instant::now().into_std()),
        Ok(Err(error)) => tracing::warn!("{LEASES} is damaged, starting without leases: {error}"),
        Err(error) => tracing::warn!("starting without leases: {error}"),
    }
    registry
}

fn save_leases(publisher: &Publisher, state: &State) -> Result<(), StateError> {
    let bytes = serde_json::to_vec(&publisher.saved_leases()).unwrap_or_else(|_| b"[]".to_vec());
    state.write(LEASES, &bytes)
}

/// Greater than every version of earlier runs, whatever the clock did meanwhile.
fn first_version(state: &State, now: SystemTime) -> u64 {
    let clock = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    let clock = u64::try_from(clock).unwrap_or_default();
    let kept = state.read(WATCH_VERSION).ok().flatten();
    let kept = kept.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok()).unwrap_or(0);
    let first = clock.max(kept);
    if let Err(error) = state.write(WATCH_VERSION, format!("{}\n", first + VERSION_RESERVE).as_bytes()) {
        tracing::warn!("versions follow the clock alone: {error}");
    }
    first
}

fn metrics() -> Result<Metrics, prometheus::Error> {
    let metrics = Metrics::new()?;
    outrigger_runtime::metrics::build_info(&metrics.registry, "outrigger_control_plane_build_info")?;
    outrigger_runtime::process_metrics::register(&metrics.registry)?;
    Ok(metrics)
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| bound(flag, address, source))
}

fn bound(flag: &'static str, address: SocketAddr, source: io::Error) -> StartError {
    StartError::Bind { flag, address, source }
}
