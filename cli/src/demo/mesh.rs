//! A whole mesh in this process: a control plane with a fresh CA, three services, a sidecar beside each and one beside
//! the customer. Everything listens on loopback, on ports that the system chooses, and lives in one temporary
//! directory. Ended in order by [`Mesh::end`]; dropped, it ends at once and leaves nothing behind either.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::{DEFAULT_TRUST_DOMAIN, TrustDomain};
use outrigger_api::name::ServicePort;
use outrigger_api::resource::Labels;
use outrigger_control_plane::app::ControlPlane;
use outrigger_control_plane::ca::Grant;
use outrigger_control_plane::ca::token::{self, Asked};
use outrigger_control_plane::config::{Args, State};
use outrigger_runtime::logging::{Logs, Settings};
use outrigger_sidecar::app::Sidecar;
use outrigger_sidecar::config::{Config, DeclaredPort, Inbound, Limits, Outbound};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::edge::{CALLS, NAMESPACE};
use super::services::{Tally, run_load, serve_catalog, serve_ledger, serve_web};
use super::{DemoError, Options, configuration};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// From the first listener to the last sidecar's readiness; far more than it takes.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Nothing should run any more when the sidecars drain.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a join token is good: the sidecars use theirs at once.
const TOKEN_LIFE: Duration = Duration::from_secs(300);

/// The service ports by which the demo's applications are called, as (name, port).
pub(super) const PORTS: [(&str, u16); 3] = [("web", 80), ("catalog", 50051), ("ledger", 7000)];

/// A sidecar and where it can be asked. Dropping it ends it.
pub(super) struct Beside {
    pub name: &'static str,
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    sidecar: Option<Sidecar>,
}

impl Beside {
    fn sidecar(&self) -> Option<&Sidecar> {
        self.sidecar.as_ref()
    }

    fn listener(&self, name: &str) -> Result<SocketAddr, DemoError> {
        let address = self.sidecar().and_then(|sidecar| sidecar.address(name));
        address.ok_or_else(|| DemoError::NoListener { sidecar: self.name, listener: name.to_owned() })
    }

    async fn ready(&self) {
        if let Some(sidecar) = &self.sidecar {
            sidecar.readiness().reached().await;
        }
    }

    /// Why it is not ready, for a person.
    fn trouble(&self) -> Option<String> {
        let not_ready = self.sidecar()?.readiness().check().err()?;
        Some(format!("{} ({})", not_ready.reason, not_ready.hint))
    }

    async fn end(mut self) {
        let Some(sidecar) = self.sidecar.take() else { return };
        sidecar.drain().await;
        // Waits for threads. A failure is a panic of one of those, which has been logged there.
        let _ = tokio::task::spawn_blocking(move || sidecar.stop()).await;
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(sidecar) = self.sidecar.take() {
            sidecar.stop();
        }
    }
}

/// Fields in the order in which they are dropped: callers before those they call, the directory last.
pub(super) struct Mesh {
    load: Option<(JoinSet<()>, watch::Sender<bool>)>,
    services: JoinSet<()>,
    pub sidecars: Vec<Beside>,
    control_plane: ControlPlane,
    pub tally: Arc<Tally>,
    /// Where a customer without a sidecar of their own can call the shop: the load's outbound port.
    pub shop: SocketAddr,
    directory: tempfile::TempDir,
}

impl Mesh {
    /// Returns when every sidecar is ready; no request has been sent yet.
    pub(super) async fn start(options: &Options) -> Result<Mesh, DemoError> {
        let directory = tempfile::Builder::new().prefix("outrigger-demo-").tempdir().map_err(DemoError::Directory)?;
        let [web, catalog, ledger] = [listen().await?, listen().await?, listen().await?];
        let ports = [address(&web)?.port(), address(&catalog)?.port(), address(&ledger)?.port()];
        let args = Args {
            config: directory.path().join("config"),
            state: directory.path().join("state"),
            listen: LOOPBACK,
            admin_listen: LOOPBACK,
            trust_domain: None,
        };
        std::fs::create_dir(&args.config).map_err(DemoError::Directory)?;
        let yaml = configuration::yaml(ports, options.otlp.as_deref());
        std::fs::write(args.config.join("demo.yaml"), yaml).map_err(DemoError::Directory)?;
        let control_plane = ControlPlane::start(&args).await?;
        let launch = Launch { control_plane: &control_plane, directory: directory.path(), logs: &options.logs };
        let sidecars = vec![
            launch.sidecar("load", None, &["web"])?,
            launch.sidecar("web", Some(ports[0]), &["catalog", "ledger"])?,
            launch.sidecar("catalog", Some(ports[1]), &[])?,
            launch.sidecar("ledger", Some(ports[2]), &[])?,
        ];
        let shop = outbound(&sidecars[0], "web")?;
        let (to_catalog, to_ledger) = (outbound(&sidecars[1], "catalog")?, outbound(&sidecars[1], "ledger")?);
        let mut services = JoinSet::new();
        // They run until they are aborted: who calls them has ended by then.
        services.spawn(serve_web(web, to_catalog, to_ledger, std::future::pending()));
        services.spawn(serve_catalog(catalog, std::future::pending()));
        services.spawn(serve_ledger(ledger, std::future::pending()));
        all_ready(&sidecars).await?;
        Ok(Mesh { load: None, services, sidecars, control_plane, tally: Arc::default(), shop, directory })
    }

    /// Lets the customer begin.
    pub(super) fn begin_load(&mut self, rate: NonZeroU32) {
        let (stop, mut stopped) = watch::channel(false);
        let mut load = JoinSet::new();
        let until = async move {
            // A sender that is gone says the same.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        load.spawn(run_load(self.shop, rate, self.tally.clone(), until));
        self.load = Some((load, stop));
    }

    /// No further requests; returns when those under way are answered.
    pub(super) async fn end_load(&mut self) {
        if let Some((mut load, stop)) = self.load.take() {
            let _ = stop.send(true);
            while load.join_next().await.is_some() {}
        }
    }

    pub(super) fn control_plane_admin(&self) -> SocketAddr {
        self.control_plane.admin_address()
    }

    /// The mesh ports of the services, at which only sidecars should get in.
    pub(super) fn inbound(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let listening = |beside: &Beside| beside.sidecar().map(|sidecar| sidecar.listening().to_vec());
        self.sidecars.iter().flat_map(move |beside| {
            let all = listening(beside).unwrap_or_default().into_iter();
            all.filter(|(name, _)| name.starts_with("inbound:")).map(|(_, address)| (beside.name, address))
        })
    }

    /// Everything, in order. Nothing is left when it returns: no thread, no port, no file.
    pub(super) async fn end(mut self) -> Result<(), DemoError> {
        self.end_load().await;
        let mut ending = JoinSet::new();
        for beside in std::mem::take(&mut self.sidecars) {
            ending.spawn(beside.end());
        }
        while ending.join_next().await.is_some() {}
        self.services.shutdown().await;
        self.control_plane.shutdown().await;
        self.directory.close().map_err(DemoError::Directory)
    }
}

async fn listen() -> Result<TcpListener, DemoError> {
    TcpListener::bind(LOOPBACK).await.map_err(DemoError::Listen)
}

fn address(listener: &TcpListener) -> Result<SocketAddr, DemoError> {
    listener.local_addr().map_err(DemoError::Listen)
}

fn service_port(name: &str) -> Result<ServicePort, DemoError> {
    let port = PORTS.iter().find(|(known, _)| *known == name).map_or(0, |(_, port)| *port);
    ServicePort::parse(&format!("{name}:{port}"), NAMESPACE).map_err(|error| DemoError::Name(error.to_string()))
}

fn outbound(beside: &Beside, service: &str) -> Result<SocketAddr, DemoError> {
    beside.listener(&format!("outbound:{}", service_port(service)?))
}

/// What every sidecar of the demo has in common.
struct Launch<'a> {
    control_plane: &'a ControlPlane,
    directory: &'a Path,
    logs: &'a Logs,
}

impl Launch<'_> {
    /// Starts the sidecar of one workload, which calls `calls` and serves at `application` if it serves at all.
    fn sidecar(&self, name: &'static str, application: Option<u16>, calls: &[&str]) -> Result<Beside, DemoError> {
        debug_assert!(calls.iter().all(|to| CALLS.iter().any(|call| call.from == name && call.to == *to)));
        let inbound = application.map(|port| Inbound { listen: LOOPBACK, app: SocketAddr::new(LOOPBACK.ip(), port) });
        let outbound = calls.iter().map(|to| Ok(Outbound { listen: LOOPBACK, destination: service_port(to)? }));
        let config = Config {
            control_plane: self.control_plane.grpc_address().to_string(),
            trust_bundle: self.control_plane.trust_bundle_path(),
            token_file: Some(self.token(name)?),
            name: name.to_owned(),
            namespace: NAMESPACE.to_owned(),
            service_account: name.to_owned(),
            trust_domain: TrustDomain::new(DEFAULT_TRUST_DOMAIN).map_err(|error| DemoError::Name(error.to_string()))?,
            workload: name.to_owned(),
            labels: labels(name),
            workload_address: Vec::new(),
            // The Service says the protocol.
            ports: application.map(|port| DeclaredPort { port, protocol: None }).into_iter().collect(),
            inbound: inbound.into_iter().collect(),
            outbound: outbound.collect::<Result<_, DemoError>>()?,
            http_proxy: None,
            http_proxy_allow: Vec::new(),
            dns_listen: None,
            dns_upstream: Vec::new(),
            jwks_roots: None,
            transparent: false,
            keep_source_address: false,
            mark: None,
            workers: 1,
            admin_listen: LOOPBACK,
            metrics_listen: LOOPBACK,
            health_listen: LOOPBACK,
            state: None,
            // Whoever calls has ended before: nobody has to learn that it goes.
            drain_delay: Duration::ZERO,
            log: Settings::default(),
        };
        let limits = Limits { drain_total: DRAIN_TIMEOUT, ..Limits::default() };
        let started = Sidecar::start(config, limits, self.logs.clone());
        let sidecar = started.map_err(|source| DemoError::Sidecar { name, source })?;
        let mut beside = Beside { name, admin: LOOPBACK, metrics: LOOPBACK, sidecar: Some(sidecar) };
        (beside.admin, beside.metrics) = (beside.listener("admin")?, beside.listener("metrics")?);
        Ok(beside)
    }

    /// A file with a join token for one workload, as `outrigger token create` would print it.
    fn token(&self, name: &str) -> Result<PathBuf, DemoError> {
        let state = State::open(self.control_plane.state_path()).map_err(token::CreateError::State)?;
        let grant = Grant { labels: labels(name), addresses: Vec::new() };
        let asked = Asked { namespace: NAMESPACE, service_account: name, grant, uses: 1, ttl: TOKEN_LIFE };
        let token = token::create(&state, &asked, SystemTime::now())?;
        let path = self.directory.join(format!("{name}.token"));
        let mut file = std::fs::OpenOptions::new();
        let mut file = file.write(true).create_new(true).mode(0o600).open(&path).map_err(DemoError::Directory)?;
        std::io::Write::write_all(&mut file, token.as_bytes()).map_err(DemoError::Directory)?;
        Ok(path)
    }
}

/// The label by which the demo's Services select.
fn labels(name: &str) -> Labels {
    [("app".to_owned(), name.to_owned())].into()
}

async fn all_ready(sidecars: &[Beside]) -> Result<(), DemoError> {
    let all = async {
        for beside in sidecars {
            beside.ready().await;
        }
    };
    if tokio::time::timeout(START_TIMEOUT, all).await.is_ok() {
        return Ok(());
    }
    let waiting = sidecars.iter().find_map(|beside| Some((beside.name, beside.trouble()?)));
    match waiting {
        Some((name, why)) => Err(DemoError::NotReady { name, why }),
        // The last of them became ready just now.
        None => Ok(()),
    }
}
