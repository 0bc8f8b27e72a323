//! What operators and probes ask a sidecar: admin (loopback only), metrics and health, each on a port of its own.
//! Answers are made from what is true now; what changes something is a POST.

mod explain;
mod lately;
mod readiness;

pub use readiness::{EXEMPT_HINT, NotReady, Readiness, WAY_BACK_HINT};

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use outrigger_api::snapshot::EndpointTls;
use outrigger_runtime::admin::Hosts;
use outrigger_runtime::drain::{DrainHandle, State};
use outrigger_runtime::heartbeat::Heartbeats;
use outrigger_runtime::logging::Logs;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::config::Config;
use crate::connection::Table;
use crate::discovery::{Directory, Known};
use crate::key_sets::KeySets;
use crate::telemetry::{self, Telemetry};
use crate::tls::Tls;

/// What the answers are made from.
#[derive(Clone)]
pub struct Admin {
    pub tls: Tls,
    pub directory: Directory,
    pub key_sets: KeySets,
    pub telemetry: Arc<Telemetry>,
    pub readiness: Readiness,
    pub tables: Arc<[Arc<Table>]>,
    pub hearts: Arc<Heartbeats>,
    pub logs: Logs,
    /// Told to renew the certificate now.
    pub renew: Arc<Notify>,
    /// Told to end.
    pub quit: Arc<Notify>,
    pub config: Arc<ConfigView>,
}

/// The settings in force, without secrets: the token's path is one, its content is never read here.
#[derive(Debug, Serialize)]
pub struct ConfigView {
    control_plane: String,
    name: String,
    namespace: String,
    service_account: String,
    workload: String,
    trust_domain: String,
    transparent: bool,
    keep_source_address: bool,
    inbound: Vec<String>,
    outbound: Vec<String>,
    http_proxy: Option<String>,
    dns_listen: Option<String>,
    dns_upstream: Vec<String>,
    workers: usize,
    state: Option<String>,
    drain_delay_seconds: f64,
}

impl ConfigView {
    pub fn new(config: &Config) -> ConfigView {
        ConfigView {
            control_plane: config.control_plane.clone(),
            name: config.name.clone(),
            namespace: config.namespace.clone(),
            service_account: config.service_account.clone(),
            workload: config.workload.clone(),
            trust_domain: config.trust_domain.to_string(),
            transparent: config.transparent,
            keep_source_address: config.keep_source_address,
            inbound: config.inbound.iter().map(|one| format!("{}={}", one.listen, one.app)).collect(),
            outbound: config.outbound.iter().map(|one| format!("{}={}", one.listen, one.destination)).collect(),
            http_proxy: config.http_proxy.map(|address| address.to_string()),
            dns_listen: config.dns_listen.map(|address| address.to_string()),
            dns_upstream: config.dns_upstream.iter().map(ToString::to_string).collect(),
            workers: config.workers,
            state: config.state.as_ref().map(|state| state.display().to_string()),
            drain_delay_seconds: config.drain_delay.as_secs_f64(),
        }
    }
}

/// The listeners of this module; one per address family where they listen everywhere.
pub struct ForOperators {
    pub admin: Vec<std::net::TcpListener>,
    pub metrics: Vec<std::net::TcpListener>,
    pub health: Vec<std::net::TcpListener>,
}

/// Serves them until the drain is done.
pub async fn serve(admin: Admin, listeners: ForOperators, drain: &DrainHandle) -> io::Result<()> {
    let kinds = [
        (listeners.admin, operator_routes(admin.clone()), Hosts::Loopback),
        (listeners.metrics, metrics_routes(admin.clone()), Hosts::Any),
        (listeners.health, health_routes(admin), Hosts::Any),
    ];
    for (sockets, router, hosts) in kinds {
        for socket in sockets {
            let (listener, router) = (TcpListener::from_std(socket)?, router.clone());
            tokio::spawn(outrigger_runtime::admin::serve(listener, router, hosts, drain.when(State::Done)));
        }
    }
    Ok(())
}

fn operator_routes(admin: Admin) -> Router {
    Router::new()
        .route("/config", get(config))
        .route("/connections", get(connections))
        .route("/plaintext-callers", get(plaintext_callers))
        .route("/explain", post(explain::explain))
        .route("/explain/{id}", get(lately::lately))
        .route("/certs", get(certs))
        .route("/certs/renew", post(renew))
        .route("/log-level", get(log_level).post(set_log_level))
        .route("/quitquitquit", post(quit))
        .with_state(admin)
}

fn metrics_routes(admin: Admin) -> Router {
    Router::new()
        .route(
            "/metrics",
            get(|Extract(admin): Extract<Admin>| async move {
                ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], admin.telemetry.encode())
            }),
        )
        .with_state(admin)
}

fn health_routes(admin: Admin) -> Router {
    Router::new().route("/ready", get(ready)).route("/live", get(live)).with_state(admin)
}

async fn ready(Extract(admin): Extract<Admin>) -> Response {
    match admin.readiness.check() {
        Ok(()) => Json(json!({"ready": true})).into_response(),
        Err(not_ready) => (StatusCode::SERVICE_UNAVAILABLE, Json(not_ready)).into_response(),
    }
}

async fn live(Extract(admin): Extract<Admin>) -> Response {
    let missed = admin.hearts.missed();
    if missed.is_empty() {
        return Json(json!({"live": true})).into_response();
    }
    let threads: Vec<_> =
        missed.iter().map(|(name, silent)| json!({"thread": name, "silent_seconds": silent.as_secs_f64()})).collect();
    let body = json!({"reason": "worker_stuck", "hint": "restart this sidecar and keep its log", "threads": threads});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

async fn config(Extract(admin): Extract<Admin>) -> Json<Value> {
    let own = admin.directory.own().borrow().clone();
    let workload = own.map(|own| {
        let ports: Vec<_> = own
            .ports
            .iter()
            .map(|(port, inbound)| {
                json!({
                    "port": port,
                    "protocol": inbound.protocol.map(|protocol| protocol.as_str()),
                    "mtls": inbound.mtls_mode.as_str(),
                    "service": inbound.service.as_ref().map(ToString::to_string),
                })
            })
            .collect();
        json!({
            "name": own.name,
            "namespace": own.namespace,
            "service_account": own.service_account,
            "default_mtls": own.default_mtls_mode.as_str(),
            "outbound_mode": format!("{:?}", own.mesh.outbound_mode),
            "otlp_endpoint": own.mesh.otlp_endpoint,
            "random_sampling_percentage": own.mesh.random_sampling_percentage,
            "access_log": format!("{:?}", own.mesh.access_log),
            "ports": ports,
        })
    });
    let destinations: Vec<_> = admin.directory.known().iter().map(|(key, known)| destination(key, known)).collect();
    Json(json!({
        "settings": &*admin.config,
        "control_plane_connected": *admin.directory.connected().borrow(),
        "snapshot_age_seconds": admin.directory.snapshot_age().map(|age| age.as_secs_f64()),
        "workload": workload,
        "destinations": destinations,
    }))
}

fn destination(key: &outrigger_api::snapshot::Key, known: &Known) -> Value {
    match known {
        Known::Pending => json!({"key": key.to_string(), "state": "pending"}),
        Known::Unregistered => json!({"key": key.to_string(), "state": "unregistered"}),
        Known::Untold => json!({"key": key.to_string(), "state": "untold"}),
        Known::Named(addresses) => json!({"key": key.to_string(), "state": "named", "addresses": addresses}),
        Known::Registered(destination) => {
            let endpoints: Vec<_> = destination
                .endpoints
                .iter()
                .map(|endpoint| {
                    let identity = match &endpoint.tls {
                        EndpointTls::Mutual(identity) => Some(identity.to_string()),
                        EndpointTls::Plaintext => None,
                    };
                    json!({
                        "address": endpoint.address.to_string(),
                        "workload": endpoint.workload,
                        "instance": endpoint.instance,
                        "weight": endpoint.weight,
                        "identity": identity,
                    })
                })
                .collect();
            json!({
                "key": key.to_string(),
                "state": "registered",
                "service": destination.service.to_string(),
                "port": destination.port,
                "protocol": destination.protocol.map(|protocol| protocol.as_str()),
                "load_balancer": format!("{:?}", destination.load_balancer),
                "stale": destination.stale,
                "endpoints": endpoints,
            })
        }
    }
}

async fn connections(Extract(admin): Extract<Admin>) -> Json<Value> {
    let views: Vec<_> = admin
        .tables
        .iter()
        .enumerate()
        .map(|(worker, table)| json!({"worker": worker, "connections": table.views()}))
        .collect();
    Json(json!(views))
}

async fn plaintext_callers(Extract(admin): Extract<Admin>) -> Json<telemetry::CallersView> {
    Json(admin.telemetry.plaintext_callers().view())
}

async fn certs(Extract(admin): Extract<Admin>) -> Json<Value> {
    let status = admin.readiness.identity.borrow().clone();
    let trouble = status.trouble.map(|trouble| json!({"reason": trouble.reason, "hint": trouble.hint}));
    let Some(material) = admin.tls.current() else {
        return Json(json!({"certificate": null, "trouble": trouble}));
    };
    let credential = material.credential();
    let now = SystemTime::now();
    let encode = |der: &[u8]| pem(der);
    Json(json!({
        "certificate": {
            "identity": credential.identity().to_string(),
            "workload": &**credential.workload(),
            "serial": credential.serial(),
            "not_before": unix(credential.not_before()),
            "not_after": unix(credential.not_after()),
            "seconds_left": credential.not_after().duration_since(now).map_or(0.0, |left| left.as_secs_f64()),
            "chain": credential.chain().iter().map(|der| encode(der)).collect::<Vec<_>>(),
        },
        "renew_at": status.renew_at.map(unix),
        "trust_bundle": {
            "trust_domain": credential.bundle().trust_domain().to_string(),
            "generation": credential.bundle().generation(),
            "roots": credential.bundle().roots().iter().map(|der| encode(der)).collect::<Vec<_>>(),
        },
        "trouble": trouble,
    }))
}

fn pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

async fn renew(Extract(admin): Extract<Admin>) -> Response {
    admin.renew.notify_one();
    (StatusCode::ACCEPTED, Json(json!({"renewal": "begun", "see": "/certs"}))).into_response()
}

async fn log_level(Extract(admin): Extract<Admin>) -> String {
    format!("{}\n", admin.logs.level())
}

async fn set_log_level(Extract(admin): Extract<Admin>, body: String) -> Response {
    match admin.logs.set_level(body.trim()) {
        Ok(()) => format!("{}\n", admin.logs.level()).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn quit(Extract(admin): Extract<Admin>) -> Response {
    admin.quit.notify_one();
    (StatusCode::ACCEPTED, "draining\n").into_response()
}
