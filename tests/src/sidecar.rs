//! One sidecar of a mesh, in this process, with every listener on port 0.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use outrigger_api::identity::TrustDomain;
use outrigger_api::name::{Protocol, ServicePort};
use outrigger_runtime::logging::{self, Logs};
use outrigger_sidecar::config::{Config, DeclaredPort, Inbound, Limits, Outbound};
use serde_json::Value;

use crate::eventually::{PATIENCE, soon};
use crate::mesh::{Mesh, TRUST_DOMAIN};
use crate::metrics::Samples;
use crate::process::{Process, Program};
use crate::wire::{self, Response};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// What a sidecar is to be.
pub struct SidecarBuilder<'a> {
    mesh: &'a Mesh,
    pub config: Config,
    pub limits: Limits,
    token: Token,
}

enum Token {
    Fresh,
    Text(String),
    None,
}

impl<'a> SidecarBuilder<'a> {
    pub(crate) fn new(mesh: &'a Mesh, name: &str) -> SidecarBuilder<'a> {
        let account = name.rsplit_once('-').map_or(name, |(account, _)| account);
        let config = Config {
            control_plane: mesh.control_plane().to_string(),
            trust_bundle: mesh.trust_bundle(),
            token_file: Some(mesh.path(&format!("{name}.token"))),
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            service_account: account.to_owned(),
            trust_domain: TrustDomain::new(TRUST_DOMAIN).unwrap(),
            workload: account.to_owned(),
            labels: BTreeMap::new(),
            workload_address: Vec::new(),
            ports: Vec::new(),
            inbound: Vec::new(),
            outbound: Vec::new(),
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
            state: Some(mesh.path(&format!("state-{name}"))),
            drain_delay: Duration::ZERO,
            log: logging::Settings::default(),
        };
        SidecarBuilder { mesh, config, limits: Limits::default(), token: Token::Fresh }
    }

    pub fn service_account(mut self, account: &str) -> Self {
        self.config.service_account = account.to_owned();
        self
    }

    pub fn namespace(mut self, namespace: &str) -> Self {
        self.config.namespace = namespace.to_owned();
        self
    }

    /// The name in metrics; the service account unless said otherwise.
    pub fn workload(mut self, workload: &str) -> Self {
        self.config.workload = workload.to_owned();
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Serves the application at `app`, whose protocol is detected unless [`SidecarBuilder::port`] says more.
    pub fn inbound(mut self, app: SocketAddr) -> Self {
        let listen = SocketAddr::new(app.ip(), 0);
        self.config.inbound.push(Inbound { listen, app });
        if self.config.workload_address.is_empty() {
            self.config.workload_address.push(app.ip());
        }
        if !self.config.ports.iter().any(|port| port.port == app.port()) {
            self.config.ports.push(DeclaredPort { port: app.port(), protocol: None });
        }
        self
    }

    pub fn port(mut self, port: u16, protocol: Option<Protocol>) -> Self {
        self.config.ports.retain(|known| known.port != port);
        self.config.ports.push(DeclaredPort { port, protocol });
        self
    }

    /// Opens a listener for `service[.namespace]:port`.
    pub fn outbound(mut self, destination: &str) -> Self {
        let destination = ServicePort::parse(destination, &self.config.namespace).unwrap();
        self.config.outbound.push(Outbound { listen: LOOPBACK, destination });
        self
    }

    pub fn http_proxy(mut self) -> Self {
        self.config.http_proxy = Some(LOOPBACK);
        self
    }

    pub fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self
    }

    /// Anything else.
    pub fn config(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    pub fn workers(mut self, workers: usize) -> Self {
        self.config.workers = workers;
        self
    }

    pub fn drain_delay(mut self, delay: Duration) -> Self {
        self.config.drain_delay = delay;
        self
    }

    /// No `--state`.
    pub fn stateless(mut self) -> Self {
        self.config.state = None;
        self
    }

    /// This token instead of a fresh one.
    pub fn token(mut self, text: &str) -> Self {
        self.token = Token::Text(text.to_owned());
        self
    }

    /// No token file at all: what is in `--state` must do.
    pub fn no_token(mut self) -> Self {
        self.token = Token::None;
        self
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Sidecar {
        self.mesh.settled().await;
        let sidecar = self.start_unready();
        sidecar.ready().await;
        sidecar
    }

    /// The same sidecar as a process of its own; `under_test` is `under_test!()`. Limits cannot be set there.
    pub async fn spawn(mut self, under_test: &str) -> Process {
        self.mesh.settled().await;
        self.write_token();
        Process::run(under_test, Program::Sidecar, self.arguments())
    }

    /// What stands behind `outrigger-sidecar`.
    fn arguments(&self) -> Vec<String> {
        let config = &self.config;
        let mut all = vec!["run".to_owned()];
        let mut flag = |name: &str, value: String| all.extend([format!("--{name}"), value]);
        flag("control-plane", config.control_plane.clone());
        flag("trust-bundle", config.trust_bundle.display().to_string());
        config.token_file.iter().for_each(|file| flag("token-file", file.display().to_string()));
        flag("name", config.name.clone());
        flag("namespace", config.namespace.clone());
        flag("service-account", config.service_account.clone());
        flag("workload", config.workload.clone());
        config.labels.iter().for_each(|(key, value)| flag("label", format!("{key}={value}")));
        config.workload_address.iter().for_each(|address| flag("workload-address", address.to_string()));
        for port in &config.ports {
            let protocol = port.protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
            flag("port", format!("{}{protocol}", port.port));
        }
        config.inbound.iter().for_each(|inbound| flag("inbound", format!("{}={}", inbound.listen, inbound.app)));
        config.outbound.iter().for_each(|one| flag("outbound", format!("{}={}", one.listen, one.destination)));
        config.http_proxy.iter().for_each(|address| flag("http-proxy", address.to_string()));
        config.mark.iter().for_each(|mark| flag("mark", mark.to_string()));
        config.dns_listen.iter().for_each(|address| flag("dns-listen", address.to_string()));
        config.dns_upstream.iter().for_each(|address| flag("dns-upstream", address.to_string()));
        flag("admin-listen", config.admin_listen.to_string());
        flag("metrics-listen", config.metrics_listen.to_string());
        flag("health-listen", config.health_listen.to_string());
        config.state.iter().for_each(|state| flag("state", state.display().to_string()));
        flag("workers", config.workers.to_string());
        flag("drain-delay", format!("{}ms", config.drain_delay.as_millis()));
        if config.transparent {
            all.push("--transparent".to_owned());
        }
        all
    }

    fn write_token(&mut self) {
        let labels: Vec<(&str, &str)> =
            self.config.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let granted: Vec<String> = self.config.workload_address.iter().map(ToString::to_string).collect();
        let granted: Vec<&str> = granted.iter().map(String::as_str).collect();
        let hour = Duration::from_secs(3600);
        let (namespace, account) = (&self.config.namespace, &self.config.service_account);
        let token = match &self.token {
            Token::Fresh => Some(self.mesh.token_for(namespace, account, &labels, &granted, 1, hour)),
            Token::Text(text) => Some(text.clone()),
            Token::None => None,
        };
        match token {
            Some(token) => std::fs::write(self.config.token_file.as_ref().expect("a path"), token).unwrap(),
            None => self.config.token_file = None,
        }
    }

    /// Starts it and waits for nothing.
    pub fn start_unready(mut self) -> Sidecar {
        self.write_token();
        let name = self.config.name.clone();
        let state = self.config.state.clone();
        let outbound = self.config.outbound.iter().map(|outbound| outbound.destination.to_string()).collect();
        let inbound = self.config.inbound.iter().map(|inbound| inbound.app.port()).collect();
        let running = outrigger_sidecar::app::Sidecar::start(self.config, self.limits, Logs::nowhere());
        let running = running.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        Sidecar { name, state, outbound, inbound, running: Some(running) }
    }
}

/// A running sidecar. Dropping it ends it at once.
pub struct Sidecar {
    pub name: String,
    pub state: Option<PathBuf>,
    outbound: Vec<String>,
    inbound: Vec<u16>,
    running: Option<outrigger_sidecar::app::Sidecar>,
}

impl Sidecar {
    fn running(&self) -> &outrigger_sidecar::app::Sidecar {
        self.running.as_ref().expect("runs")
    }

    /// The address of a listener, by the name that stdout shows.
    pub fn address(&self, name: &str) -> SocketAddr {
        let listening = self.running().listening();
        self.running().address(name).unwrap_or_else(|| panic!("{}: no {name} among {listening:?}", self.name))
    }

    /// Where peers dial the first `inbound`.
    pub fn inbound(&self) -> SocketAddr {
        self.address(&format!("inbound:{}", self.inbound.first().expect("an inbound")))
    }

    /// Where the application dials the first `outbound`.
    pub fn outbound(&self) -> SocketAddr {
        self.address(&format!("outbound:{}", self.outbound.first().expect("an outbound")))
    }

    pub fn http_proxy(&self) -> SocketAddr {
        self.address("http-proxy")
    }

    /// Waits until `/ready` would be 200. Panics with its reason.
    pub async fn ready(&self) {
        let readiness = self.running().readiness();
        if tokio::time::timeout(PATIENCE, readiness.reached()).await.is_err() {
            panic!("{} is not ready: {:?}", self.name, readiness.check());
        }
    }

    pub fn readiness(&self) -> &outrigger_sidecar::admin::Readiness {
        self.running().readiness()
    }

    pub async fn metrics(&self) -> Samples {
        let answer = wire::get(self.address("metrics"), "/metrics").await;
        assert_eq!(answer.status, 200);
        Samples::parse(&answer.text())
    }

    /// A GET on the admin port; JSON.
    pub async fn admin_get(&self, path: &str) -> Value {
        let answer = self.admin("GET", path, "").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub async fn admin_post(&self, path: &str, body: &str) -> Response {
        self.admin("POST", path, body).await
    }

    /// A POST of JSON on the admin port; JSON.
    pub async fn admin_post_json(&self, path: &str, body: &Value) -> Value {
        let answer = self.admin("POST", path, &body.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    async fn admin(&self, method: &str, path: &str, body: &str) -> Response {
        let length = body.len();
        let kind = if body.starts_with('{') { "Content-Type: application/json\r\n" } else { "" };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{kind}Content-Length: {length}\r\n\r\n{body}"
        );
        wire::ask(self.address("admin"), request).await
    }

    /// `/ready` or `/live`: status and JSON.
    pub async fn health(&self, path: &str) -> (u16, Value) {
        let answer = wire::get(self.address("health"), path).await;
        (answer.status, serde_json::from_slice(&answer.body).unwrap())
    }

    /// Drains as after SIGTERM, then ends. Says how many connections were cut.
    pub async fn drain(mut self) -> usize {
        let running = self.running.take().expect("runs");
        let cut = running.drain().await;
        join(running).await;
        cut
    }

    /// Drains without ending, so that a test can look at it meanwhile.
    pub async fn draining(&self) -> usize {
        self.running().drain().await
    }

    /// Ends it at once, as a crash would for its peers.
    pub async fn stop(mut self) {
        join(self.running.take().expect("runs")).await;
    }
}

async fn join(running: outrigger_sidecar::app::Sidecar) {
    soon("a sidecar ends", tokio::task::spawn_blocking(move || running.stop())).await.unwrap();
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            // Waiting for its threads here would stop the test's own tasks, on which they may wait.
            std::thread::spawn(move || running.stop());
        }
    }
}
