//! The control plane's own HTTP: metrics, health, and the status that `outrigger status` and `stat` print. Read-only;
//! no secret is reachable from here.

pub mod view;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use outrigger_api::identity::SpiffeId;
use outrigger_api::resource::Problem;
use outrigger_runtime::metrics;
use tokio::sync::watch;

use crate::ca::{ServingCertificate, unix_seconds};
use crate::config::Configuration;
use crate::distribute::{Caller, Control, EdgeKey, EdgeStats, Event, Noted, Seen, SidecarStatus, Totals, Trial};

/// What the pages are made from.
#[derive(Clone)]
pub struct Sources {
    pub control: Arc<Control>,
    pub serving: Arc<ServingCertificate>,
    pub configuration: watch::Receiver<Arc<Configuration>>,
    pub started: Instant,
}

pub fn router(sources: Sources) -> Router {
    Router::new()
        .route("/metrics", get(print_metrics))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/status", get(|State(sources): State<Sources>| async move { Json(status(&sources)) }))
        .route("/stats", get(|State(sources): State<Sources>| async move { Json(stats(&sources)) }))
        .route("/policy-report", get(|State(sources): State<Sources>| async move { Json(policy_report(&sources)) }))
        .with_state(sources)
}

async fn ready(State(sources): State<Sources>) -> Response {
    if *sources.control.stop.borrow() {
        let body = serde_json::json!({ "reason": "draining", "hint": "the control plane is stopping" });
        return (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    }
    "ready\n".into_response()
}

async fn print_metrics(State(sources): State<Sources>) -> Response {
    let Control { authority, publisher, metrics: counted, .. } = &*sources.control;
    let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    counted.leases.set(gauge(publisher.leases()));
    counted.connected.set(gauge(publisher.connected()));
    counted.subscriptions.set(gauge(publisher.subscriptions()));
    counted.stale_services.set(gauge(publisher.stale_services().len()));
    counted.config_errors.set(gauge(sources.configuration.borrow().errors.len()));
    let now = SystemTime::now();
    let left = unix_seconds(authority.standing(now).not_after) as i64 - unix_seconds(now) as i64;
    counted.issuer_expiry.set(left);
    metrics::answer(&counted.registry)
}

fn status(sources: &Sources) -> view::Status {
    let Control { authority, publisher, reports, .. } = &*sources.control;
    let configuration = sources.configuration.borrow().clone();
    let (standing, bundle) = (authority.standing(SystemTime::now()), authority.bundle());
    let trust_domain = authority.trust_domain();
    let mut warnings = publisher.warnings();
    if let Some(configured) = &configuration.resources.mesh.trust_domain
        && configured != trust_domain
    {
        warnings.push(format!(
            "MeshConfig's trustDomain is {configured}, and the control plane runs with {trust_domain}; it takes \
             another one only at start, with a --state of its own"
        ));
    }
    if standing.early {
        warnings.push("the clock stands before the beginning of the issuing certificate; set it right".to_owned());
    }
    let sidecar = |sidecar: SidecarStatus| {
        let SidecarStatus { id, version, connected, not_after, subscriptions, unacknowledged, refusals, .. } = sidecar;
        let (connections, troubles) = reports.last(&id).unzip();
        let troubles = troubles.unwrap_or_default();
        let identity = SpiffeId::new(trust_domain, &id.namespace, &id.service_account);
        let refusal = |(key, refusal): (_, crate::distribute::Refusal)| view::Refusal {
            key,
            version: refusal.version,
            reason: refusal.reason,
        };
        view::Sidecar {
            identity: identity.map(|identity| identity.to_string()).unwrap_or_default(),
            instance: id.name,
            namespace: id.namespace,
            version,
            connected_since: unix_seconds(connected),
            certificate_not_after: unix_seconds(not_after),
            subscriptions,
            unacknowledged,
            connections,
            refusals: refusals.into_iter().map(refusal).collect(),
            troubles,
        }
    };
    let recent = |event| {
        let all = sources.control.recent.all(event, SystemTime::now());
        let shown =
            |(what, noted): (String, Noted)| view::Event { what, count: noted.count, last: unix_seconds(noted.last) };
        all.into_iter().map(shown).collect()
    };
    view::Status {
        version: metrics::VERSION.to_owned(),
        trust_domain: trust_domain.to_string(),
        authority: view::Authority {
            not_after: unix_seconds(standing.not_after),
            overdue: standing.overdue,
            roots: bundle.roots.len(),
            generation: bundle.generation,
            serving_not_after: unix_seconds(sources.serving.validity().not_after),
        },
        sidecars: publisher.sidecars().into_iter().map(sidecar).collect(),
        leases: publisher.leases(),
        config: view::Config { errors: problems(&configuration.errors), warnings: problems(&configuration.warnings) },
        stale_services: publisher.stale_services().iter().map(ToString::to_string).collect(),
        warnings,
        refused_joins: recent(Event::JoinRefused),
        refused_registrations: recent(Event::RegistrationRefused),
        gone: recent(Event::SidecarGone),
    }
}

fn problems(problems: &[Problem]) -> Vec<view::Problem> {
    let problem = |problem: &Problem| {
        let Problem { file, line, column, message } = problem.clone();
        view::Problem { file, line, column, message }
    };
    problems.iter().map(problem).collect()
}

fn stats(sources: &Sources) -> view::Stats {
    let now = tokio::time::Instant::now().into_std();
    let Control { reports, publisher, .. } = &*sources.control;
    view::Stats {
        edges: reports.edges(now).into_iter().map(|(key, stats)| edge(key, &stats)).collect(),
        totals: reports.totals(now).into_iter().map(|(key, totals)| total(key, &totals, now)).collect(),
        sidecars: publisher.connected(),
        reporting: reports.reporting(),
        uptime: sources.started.elapsed().as_secs(),
    }
}

fn policy_report(sources: &Sources) -> view::PolicyReport {
    let Control { shadows, publisher, .. } = &*sources.control;
    let resources = publisher.resources();
    let caller = |(caller, seen): (Caller, Seen)| view::ShadowCaller {
        called: caller.called,
        caller: caller.principal,
        request: caller.shape,
        would: caller.would.to_owned(),
        count: seen.count,
        first: unix_seconds(seen.first),
        last: unix_seconds(seen.last),
    };
    let policy = |trial: Trial| view::ShadowPolicy {
        selects: publisher.selected_by(&trial.policy),
        policy: trial.policy,
        action: trial.action,
        since: unix_seconds(trial.since),
        callers: trial.callers.into_iter().map(caller).collect(),
    };
    view::PolicyReport {
        now: unix_seconds(SystemTime::now()),
        policies: shadows.trials(&resources, SystemTime::now()).into_iter().map(policy).collect(),
    }
}

fn direction(inbound: bool) -> view::Direction {
    if inbound { view::Direction::Inbound } else { view::Direction::Outbound }
}

fn total(key: EdgeKey, totals: &Totals, now: std::time::Instant) -> view::Total {
    view::Total {
        source_workload: key.source_workload,
        source_namespace: key.source_namespace,
        destination_service: key.destination_service,
        direction: direction(key.inbound),
        protocol: key.protocol,
        mtls: key.mtls,
        requests: totals.requests,
        failures: totals.failures,
        quiet: now.saturating_duration_since(totals.last).as_secs(),
    }
}

fn edge(key: EdgeKey, stats: &EdgeStats) -> view::Edge {
    view::Edge {
        source_workload: key.source_workload,
        source_namespace: key.source_namespace,
        source_identity: key.source_principal,
        destination_service: key.destination_service,
        destination_workload: key.destination_workload,
        destination_namespace: key.destination_namespace,
        destination_identity: key.destination_principal,
        direction: direction(key.inbound),
        protocol: key.protocol,
        mtls: key.mtls,
        requests_per_second: stats.requests_per_second,
        success_percent: stats.success_percent(),
        p50: stats.quantile(0.5),
        p99: stats.quantile(0.99),
        sent_bytes_per_second: stats.sent_bytes_per_second,
        received_bytes_per_second: stats.received_bytes_per_second,
    }
}
