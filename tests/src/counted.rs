//! A pair of sidecars whose metrics a test compares with the contract: the metrics' names, the labels that both sides have
//! in common, and how to wait for a value.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use outrigger_api::name::Protocol;

use crate::eventually::eventually;
use crate::mesh::{Mesh, MeshOptions};
use crate::metrics::Samples;
use crate::sidecar::Sidecar;

pub const REQUESTS: &str = "outrigger_http_requests_total";
pub const REQUEST_BYTES: &str = "outrigger_http_request_bytes_total";
pub const RESPONSE_BYTES: &str = "outrigger_http_response_bytes_total";
pub const IN_FLIGHT: &str = "outrigger_http_requests_in_flight";
pub const MESSAGES: &str = "outrigger_grpc_messages_total";
pub const OPENED: &str = "outrigger_tcp_connections_opened_total";
pub const CLOSED: &str = "outrigger_tcp_connections_closed_total";
pub const SENT: &str = "outrigger_tcp_sent_bytes_total";
pub const RECEIVED: &str = "outrigger_tcp_received_bytes_total";

/// A caller and a service whose names in metrics are those of `--workload`, not of instances or accounts.
pub struct CountedPair {
    pub near: Sidecar,
    pub far: Sidecar,
    pub mesh: Mesh,
}

pub async fn pair(app: SocketAddr, protocol: Option<Protocol>) -> CountedPair {
    pair_in(Mesh::start(MeshOptions::default()).await, app, protocol).await
}

pub async fn pair_in(mesh: Mesh, app: SocketAddr, protocol: Option<Protocol>) -> CountedPair {
    let far = mesh.far(app, None).workload("catalog-api").port(app.port(), protocol).start().await;
    let near = mesh.near().workload("cart-web").start().await;
    CountedPair { near, far, mesh }
}

impl CountedPair {
    /// Each sidecar, with the direction in which it counts.
    pub fn sides(&self) -> [(&'static str, &Sidecar); 2] {
        [("outbound", &self.near), ("inbound", &self.far)]
    }

    /// Both sides come to these values for these labels.
    pub async fn both(&self, protocol: &str, outcome: &[(&str, &str)], values: &[(&str, f64)]) {
        for (direction, sidecar) in self.sides() {
            counts(sidecar, &labels(direction, protocol, outcome), values).await;
        }
    }
}

/// What both sides say of a call through the pair, but for direction and outcome.
pub fn labels<'a>(direction: &'a str, protocol: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut labels = vec![
        ("direction", direction),
        ("source_workload", "cart-web"),
        ("source_namespace", "shop"),
        ("destination_service", "catalog.shop"),
        ("destination_workload", "catalog-api"),
        ("destination_namespace", "shop"),
        ("protocol", protocol),
        ("mtls", "true"),
    ];
    labels.extend_from_slice(more);
    labels
}

/// The sidecar comes to these values for these labels.
pub async fn counts(sidecar: &Sidecar, labels: &[(&str, &str)], values: &[(&str, f64)]) {
    for (name, value) in values {
        let begun = Instant::now();
        let what = format!("{name} is {value}");
        eventually(&what, async || {
            let samples = sidecar.metrics().await;
            let there = samples.select(name, labels).next().is_some();
            if there && samples.sum(name, labels) == *value {
                return Some(());
            }
            if begun.elapsed() > Duration::from_secs(5) {
                let others: Vec<_> = samples.select(name, &[]).collect();
                panic!("{}: no {name} with {labels:?} is {value} among {others:#?}", sidecar.name);
            }
            None
        })
        .await;
    }
}

/// The names of the labels of each metric, exactly.
pub fn label_sets(samples: &Samples, names: &[&str], expected: &str) {
    let expected: BTreeSet<&str> = expected.split_whitespace().collect();
    for name in names {
        let mut any = false;
        for sample in samples.select(name, &[]) {
            any = true;
            let found: BTreeSet<&str> = sample.labels.keys().map(String::as_str).collect();
            assert_eq!(found, expected, "{name}");
        }
        assert!(any, "no sample of {name}");
    }
}
