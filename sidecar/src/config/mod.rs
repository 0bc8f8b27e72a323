//! What a sidecar was told on its command line, checked: every later module reads [`Config`] and never a flag, a file
//! of settings or an environment variable. The numbers that nobody sets are in [`limits`].

mod args;
mod check;
pub mod limits;
mod value;

pub use args::Args;
pub use limits::Limits;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use outrigger_api::identity::TrustDomain;
use outrigger_api::name::{Protocol, ServicePort};
use outrigger_runtime::settings::Stop;

/// Where redirect rules send what the application opens, with `--transparent`. **Contract**, as the other one.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where redirect rules send what others open to the application, with `--transparent`.
pub const INBOUND_PORT: u16 = 15006;

/// A checked command line: addresses do not collide, names are names, nothing that is set lacks what it needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `HOST:PORT` of the control plane.
    pub control_plane: String,
    /// PEM file with the roots that vouch for the control plane and the mesh.
    pub trust_bundle: PathBuf,
    /// Holds the join token; read anew at each try. None only with `state`.
    pub token_file: Option<PathBuf>,
    /// The instance.
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub trust_domain: TrustDomain,
    /// Name in metrics; the instance's name unless said otherwise.
    pub workload: String,
    pub labels: BTreeMap<String, String>,
    /// Where peers reach this workload; None: the local address of the socket to the control plane.
    pub workload_address: Vec<IpAddr>,
    /// The application's ports, by number: those of `--port`, and with no protocol those of `--inbound`.
    pub ports: Vec<DeclaredPort>,
    pub inbound: Vec<Inbound>,
    pub outbound: Vec<Outbound>,
    pub http_proxy: Option<SocketAddr>,
    /// Who may use the forward proxy besides loopback.
    pub http_proxy_allow: Vec<IpNet>,
    /// Takes redirected connections at [`OUTBOUND_PORT`] and [`INBOUND_PORT`]. An address 0.0.0.0 of a listener then means
    /// all addresses of both families.
    pub transparent: bool,
    /// Connections to the application begin with the client's address; only with `transparent`, and needs CAP_NET_ADMIN.
    pub keep_source_address: bool,
    /// Mark (SO_MARK) for the sidecar's own sockets; needs CAP_NET_ADMIN.
    pub mark: Option<u32>,
    /// Data threads, at least 1.
    pub workers: usize,
    pub admin_listen: SocketAddr,
    pub metrics_listen: SocketAddr,
    pub health_listen: SocketAddr,
    /// Where names are resolved, if they are.
    pub dns_listen: Option<SocketAddr>,
    /// Whom other names are forwarded to; none: whom /etc/resolv.conf names.
    pub dns_upstream: Vec<SocketAddr>,
    /// Roots of the servers of key sets; None: the system's.
    pub jwks_roots: Option<PathBuf>,
    /// Directory for the last good snapshot and certificate; without it nothing survives a restart.
    pub state: Option<PathBuf>,
    /// How long connections are still accepted after SIGTERM; at most [`Limits::drain_total`].
    pub drain_delay: Duration,
    pub log: outrigger_runtime::logging::Settings,
}

impl Config {
    /// Parses what stands behind `run` on the command line of `name` (as in `outrigger-sidecar run`), with the process's
    /// variables and the settings file that one of them names. All mistakes are reported at once.
    pub fn from_command_line(
        name: &'static str,
        argv: impl IntoIterator<Item = OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Config, Stop> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        outrigger_runtime::settings::parse_checked(name, argv, environment, |args: Args, mistakes| {
            check::check(args, processors, mistakes)
        })
    }
}

/// A port of the application; `protocol` None means: detect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeclaredPort {
    pub port: u16,
    pub protocol: Option<Protocol>,
}

/// `--inbound LISTEN=APP`: peers dial `listen`, the application serves at `app`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inbound {
    pub listen: SocketAddr,
    pub app: SocketAddr,
}

/// `--outbound LISTEN=SERVICE:PORT`: what connects to `listen` means that service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbound {
    pub listen: SocketAddr,
    pub destination: ServicePort,
}
