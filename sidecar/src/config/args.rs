//! The command line of `outrigger-sidecar run`, flag by flag. Each value is parsed by itself here; what concerns several
//! is asked in `check`. What is required is an `Option` all the same, so that one run reports all mistakes.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use outrigger_api::identity::{DEFAULT_TRUST_DOMAIN, TrustDomain};

use super::value;

/// Runs the sidecar beside one workload
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where the control plane listens
    #[arg(long, value_name = "HOST:PORT", required = true, value_parser = value::host_and_port)]
    pub control_plane: Option<String>,
    /// PEM file with the mesh's roots, as the control plane writes it to STATE/trust-bundle.pem
    #[arg(long, value_name = "FILE", required = true)]
    pub trust_bundle: Option<PathBuf>,
    /// File with the join token; may be left out when --state holds a certificate
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Name of this instance
    #[arg(long, value_name = "NAME", required = true, value_parser = value::label)]
    pub name: Option<String>,
    #[arg(long, value_name = "NAMESPACE", required = true, value_parser = value::namespace)]
    pub namespace: Option<String>,
    #[arg(long, value_name = "ACCOUNT", required = true, value_parser = value::account)]
    pub service_account: Option<String>,
    #[arg(long, value_name = "DOMAIN", default_value = DEFAULT_TRUST_DOMAIN)]
    pub trust_domain: TrustDomain,
    /// Name in metrics, the same for all replicas [default: --name]
    #[arg(long, value_name = "NAME", value_parser = value::label)]
    pub workload: Option<String>,
    /// Label by which Services select this workload; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::key_and_value)]
    pub label: Vec<(String, String)>,
    /// Where peers reach this workload; may be repeated, with the preferred address first. Another one than that from which
    /// it connects to the control plane has to be granted by its token [default: the local address towards the control
    /// plane]
    #[arg(long, value_name = "IP", value_delimiter = ',', value_parser = value::reachable)]
    pub workload_address: Vec<IpAddr>,
    /// Port of the application, with its protocol (http, http2, grpc, tcp, tls); without one it is detected; may be
    /// repeated
    #[arg(long, value_name = "PORT[/PROTOCOL]", value_parser = value::declared_port)]
    pub port: Vec<super::DeclaredPort>,
    /// Take mutual TLS from peers at LISTEN and pass it on to the application at APP, both ADDR:PORT; may be repeated
    #[arg(long, value_name = "LISTEN=APP", value_parser = value::inbound)]
    pub inbound: Vec<super::Inbound>,
    /// Take connections of the application at LISTEN and carry them to a service; may be repeated
    #[arg(long, value_name = "LISTEN=SERVICE:PORT", value_parser = value::outbound)]
    pub outbound: Vec<value::UnqualifiedOutbound>,
    /// Be an HTTP proxy (absolute-form and CONNECT) for the application at this address
    #[arg(long, value_name = "LISTEN")]
    pub http_proxy: Option<SocketAddr>,
    /// Who may use the HTTP proxy when it listens on another address than loopback; may be repeated
    #[arg(long, value_name = "CIDR")]
    pub http_proxy_allow: Vec<IpNet>,
    /// Take every connection that `outrigger-sidecar redirect apply` redirects, in both directions: listens on the ports
    /// 15001 (outbound) and 15006 (inbound) of this network namespace
    #[arg(long)]
    pub transparent: bool,
    /// Connect to the application with the client's own address, so that the application sees it; needs --transparent,
    /// `redirect apply --keep-source-address` and CAP_NET_ADMIN
    #[arg(long)]
    pub keep_source_address: bool,
    /// Mark (SO_MARK) of the sidecar's own sockets, by which redirect rules know them; needs CAP_NET_ADMIN
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub mark: Option<u32>,
    /// Data threads [default: the processors that this process may use, at most 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// Admin HTTP, loopback only
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15000")]
    pub admin_listen: SocketAddr,
    /// /metrics [default: 127.0.0.1:15020, with --transparent port 15020 of all addresses]
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// /ready and /live [default: 127.0.0.1:15021, with --transparent port 15021 of all addresses]
    #[arg(long, value_name = "ADDR:PORT")]
    pub health_listen: Option<SocketAddr>,
    /// Answer names of services at this address, UDP and TCP, and forward all others; 127.0.0.1:15053 for `redirect apply
    /// --dns`, with --transparent on loopback of both families
    #[arg(long, value_name = "ADDR:PORT")]
    pub dns_listen: Option<SocketAddr>,
    /// Forward other names to this server [default: those of /etc/resolv.conf]; may be repeated
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = value::name_server)]
    pub dns_upstream: Vec<SocketAddr>,
    /// PEM file with the roots by which servers of key sets (`jwksUri` of a RequestAuthentication) are known [default: the
    /// system's]
    #[arg(long, value_name = "FILE")]
    pub jwks_roots: Option<PathBuf>,
    /// Directory in which the certificate and the last good snapshot survive a restart
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// How long connections are still accepted after SIGTERM
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = value::duration)]
    pub drain_delay: Duration,
    #[command(flatten)]
    pub log: outrigger_runtime::logging::Settings,
}
