//! Istio's DestinationRule becomes a BackendTrafficPolicy for the Service of its host.

use serde_json::{Map, Value, json};

use super::fields::{Fields, Left, service_of};
use super::{Document, OURS};

pub(super) fn policy(document: &Document, left: &mut Left) -> Option<Value> {
    let mut spec = Fields::new("spec", document.spec(), left);
    let host = spec.text("host", left).unwrap_or_default();
    let Some((name, namespace)) = service_of(&host, &document.namespace) else {
        left.tell(format!("spec.host {host:?} is no Service"));
        return None;
    };
    if namespace != document.namespace {
        left.tell(format!("spec.host is a Service of namespace {namespace}: put the document there"));
        return None;
    }
    let mut ours = Map::new();
    ours.insert("targetRefs".to_owned(), json!([{ "group": "", "kind": "Service", "name": name }]));
    if let Some(mut traffic) = spec.map("trafficPolicy", left) {
        if let Some(balancer) = traffic.map("loadBalancer", left) {
            ours.extend(load_balancer(balancer, left).map(|one| ("loadBalancer".to_owned(), one)));
        }
        if let Some(pool) = traffic.map("connectionPool", left) {
            connection_pool(pool, &mut ours, left);
        }
        if let Some(mut outliers) = traffic.map("outlierDetection", left) {
            let mut detection = Map::new();
            for name in [
                "consecutive5xxErrors",
                "consecutiveGatewayErrors",
                "interval",
                "baseEjectionTime",
                "maxEjectionPercent",
            ] {
                outliers.rename(name, name, &mut detection);
            }
            outliers.end(left);
            ours.insert("outlierDetection".to_owned(), detection.into());
        }
        if let Some(mut tls) = traffic.map("tls", left) {
            match tls.text("mode", left).as_deref() {
                // As it is between two sidecars without a word.
                Some("ISTIO_MUTUAL") => {}
                Some("DISABLE") => left.tell(
                    "spec.trafficPolicy.tls: plaintext is the server's to say: a PeerAuthentication with DISABLE for its workload",
                ),
                _ => left.tell("spec.trafficPolicy.tls: TLS to a host outside is a ServiceEntry's `tls`"),
            }
            tls.end(left);
        }
        traffic.end(left);
    }
    spec.end(left);
    (ours.len() > 1).then(|| document.becomes(OURS, "BackendTrafficPolicy", ours))
}

fn load_balancer(mut balancer: Fields, left: &mut Left) -> Option<Value> {
    let simple = balancer.text("simple", left);
    let hash = balancer.map("consistentHash", left);
    let at = balancer.path("simple");
    balancer.end(left);
    if let Some(mut hash) = hash {
        let mut by = Map::new();
        for name in ["httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName"] {
            hash.rename(name, name, &mut by);
        }
        hash.end(left);
        return Some(json!({ "type": "ConsistentHash", "consistentHash": by }));
    }
    match simple.as_deref() {
        Some("ROUND_ROBIN") => Some(json!({ "type": "RoundRobin" })),
        Some("LEAST_REQUEST" | "LEAST_CONN") => Some(json!({ "type": "LeastRequest" })),
        Some("RANDOM") => Some(json!({ "type": "Random" })),
        Some("UNSPECIFIED") | None => None,
        Some(other) => {
            left.tell(format!("{at} {other} has no counterpart here"));
            None
        }
    }
}

fn connection_pool(mut pool: Fields, ours: &mut Map<String, Value>, left: &mut Left) {
    let (mut bounds, mut timeouts) = (Map::new(), Map::new());
    if let Some(mut tcp) = pool.map("tcp", left) {
        tcp.rename("maxConnections", "maxConnections", &mut bounds);
        tcp.rename("connectTimeout", "connect", &mut timeouts);
        tcp.end(left);
    }
    if let Some(mut http) = pool.map("http", left) {
        http.rename("http1MaxPendingRequests", "maxPending", &mut bounds);
        http.rename("maxRequestsPerConnection", "maxRequestsPerConnection", &mut bounds);
        http.end(left);
    }
    pool.end(left);
    for (name, fields) in [("connectionPool", bounds), ("timeouts", timeouts)] {
        if !fields.is_empty() {
            ours.insert(name.to_owned(), fields.into());
        }
    }
}
