//! Looks at the running demo as its user can: `/metrics` and `/config` of each sidecar over HTTP, nothing else. Called
//! once a second and at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde::Deserialize;

use super::edge::{CALLS, Call, Edge, NAMESPACE, Side};
use super::exposition::{self, Series};
use super::mesh::Beside;
use crate::fetch::{self, FetchError};

/// Every edge at one moment, in the order of [`CALLS`].
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub at: Instant,
    pub edges: [Edge; CALLS.len()],
    /// Requests and connections that were served to a caller without an identity.
    pub served_to_nobody: u64,
}

impl Sample {
    /// Both sides of every edge have counted the same.
    pub(super) fn agrees(&self) -> bool {
        self.edges.iter().all(|edge| edge.outbound.ended == edge.inbound.ended)
    }
}

/// Asks every sidecar.
pub(super) async fn sample(sidecars: &[Beside]) -> Result<Sample, FetchError> {
    let at = Instant::now();
    let mut pages = BTreeMap::new();
    for beside in sidecars {
        let metrics = fetch::get(&beside.metrics.to_string(), "/metrics").await?;
        let config: Config = fetch::json(&beside.admin.to_string(), "/config").await?;
        pages.insert(beside.name, (exposition::parse(&String::from_utf8_lossy(&metrics)), config));
    }
    let nothing = (Vec::new(), Config::default());
    let edges = CALLS.each_ref().map(|call| {
        let (caller, service) = (pages.get(call.from).unwrap_or(&nothing), pages.get(call.to).unwrap_or(&nothing));
        Edge {
            outbound: side(call, "outbound", &caller.0),
            inbound: side(call, "inbound", &service.0),
            demanded: caller.1.demanded(&call.service()),
        }
    });
    let served_to_nobody = pages.values().flat_map(|(series, _)| series).filter(|one| is_plaintext_served(one));
    Ok(Sample { at, edges, served_to_nobody: served_to_nobody.map(Series::count).sum() })
}

/// What of `/config` is read: whom the sidecar expects behind each destination.
#[derive(Default, Deserialize)]
struct Config {
    destinations: Vec<Destination>,
}

#[derive(Deserialize)]
struct Destination {
    #[serde(default)]
    service: String,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    identity: Option<String>,
}

impl Config {
    fn demanded(&self, service: &str) -> BTreeSet<String> {
        let of_service = self.destinations.iter().filter(|destination| destination.service == service);
        // An endpoint of which no identity is demanded shows as an empty one.
        of_service
            .flat_map(|destination| &destination.endpoints)
            .map(|endpoint| endpoint.identity.clone().unwrap_or_default())
            .collect()
    }
}

const HTTP_ENDED: &str = "outrigger_http_requests_total";
const TCP_ENDED: &str = "outrigger_tcp_connections_closed_total";
const LATENCY: [&str; 2] =
    ["outrigger_http_request_duration_seconds_bucket", "outrigger_tcp_connection_duration_seconds_bucket"];

fn side(call: &Call, direction: &str, page: &[Series]) -> Side {
    let mut side = Side::default();
    let own = |series: &&Series| {
        series.label("direction") == direction
            && series.label("source_workload") == call.from
            && series.label("source_namespace") == NAMESPACE
            && series.label("destination_service") == call.service()
    };
    for series in page.iter().filter(own) {
        let name = series.name.as_str();
        if name == HTTP_ENDED || name == TCP_ENDED {
            count(&mut side, series);
        } else if LATENCY.contains(&name)
            && let Ok(bound) = series.label("le").parse()
        {
            side.latency.add(bound, series.count());
        }
    }
    side
}

fn count(side: &mut Side, series: &Series) {
    let count = series.count();
    if count == 0 {
        return;
    }
    side.ended += count;
    if failed(series) {
        side.failed += count;
    }
    if series.label("mtls") != "true" {
        side.plaintext += count;
    }
    if !series.label("reason").is_empty() {
        *side.reasons.entry(series.label("reason").to_owned()).or_default() += count;
    }
    side.principals.insert(series.label("source_principal").to_owned());
    side.protocols.insert(series.label("protocol").to_owned());
}

/// As docs/metrics.md defines availability; a connection failed when the mesh had a reason to end it.
fn failed(series: &Series) -> bool {
    if series.name == TCP_ENDED {
        return !series.label("reason").is_empty();
    }
    let code = series.label("code");
    let grpc_failed = ["2", "4", "12", "13", "14", "15"].contains(&series.label("grpc_status"));
    code.is_empty() || code.starts_with('5') || grpc_failed
}

/// Something came in without mutual TLS and was not refused.
fn is_plaintext_served(series: &Series) -> bool {
    [HTTP_ENDED, TCP_ENDED].contains(&series.name.as_str())
        && series.label("direction") == "inbound"
        && series.label("mtls") != "true"
        && series.label("reason").is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_becomes_a_side() {
        let labels = "direction=\"inbound\",source_workload=\"load\",source_namespace=\"demo\",\
                      destination_service=\"web.demo\",protocol=\"http1\"";
        let own = format!("{labels},source_principal=\"spiffe://outrigger.local/ns/demo/sa/load\"");
        let page = format!(
            "{HTTP_ENDED}{{{own},code=\"200\",grpc_status=\"\",mtls=\"true\",reason=\"\"}} 7\n\
             {HTTP_ENDED}{{{own},code=\"503\",grpc_status=\"\",mtls=\"false\",reason=\"connect_timeout\"}} 2\n\
             {HTTP_ENDED}{{{own},code=\"\",grpc_status=\"\",mtls=\"true\",reason=\"client_closed\"}} 1\n\
             {HTTP_ENDED}{{direction=\"outbound\",source_workload=\"load\",code=\"200\"}} 99\n\
             {}{{{labels},le=\"0.5\"}} 8\n{}{{{labels},le=\"+Inf\"}} 10\n",
            LATENCY[0], LATENCY[0]
        );
        let side = side(&CALLS[0], "inbound", &exposition::parse(&page));
        assert_eq!((side.ended, side.failed, side.plaintext), (10, 3, 2));
        assert_eq!(side.reasons, [("client_closed".to_owned(), 1), ("connect_timeout".to_owned(), 2)].into());
        assert_eq!(side.principals, [CALLS[0].caller_identity()].into());
        assert_eq!(side.latency.quantile(0.8), Some(0.5));
    }

    #[test]
    fn plaintext_counts_when_it_was_served() {
        let line = |direction, mtls, reason| {
            let page = format!("{TCP_ENDED}{{direction=\"{direction}\",mtls=\"{mtls}\",reason=\"{reason}\"}} 1\n");
            is_plaintext_served(&exposition::parse(&page)[0])
        };
        assert!(line("inbound", "false", ""));
        assert!(!line("inbound", "false", "mtls_required"));
        assert!(!line("inbound", "true", ""));
        assert!(!line("outbound", "false", ""));
    }

    #[test]
    fn demanded_identities_are_those_of_the_service() {
        let config: Config = serde_json::from_str(
            r#"{"settings": 1, "destinations": [
                {"key": "x", "state": "pending"},
                {"service": "web.demo", "endpoints": [{"identity": "a"}, {"identity": null}]},
                {"service": "cart.demo", "endpoints": [{"identity": "b"}]}]}"#,
        )
        .unwrap();
        assert_eq!(config.demanded("web.demo"), ["".to_owned(), "a".to_owned()].into());
    }
}
