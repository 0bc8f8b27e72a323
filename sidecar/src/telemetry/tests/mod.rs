//! The contract of telemetry, asked through its public face as the data path does it. What several of these files need
//! stands here: the labels of one edge, a log that a test reads, and the samples of one metric.

mod access_log;
mod documents;
mod metrics;
mod report;
mod traces;

use serde_json::Value;

use super::*;

/// A writer whose bytes the test reads.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn own() -> Own {
    Own {
        instance: "catalog-0".into(),
        workload: "catalog".into(),
        namespace: "shop".into(),
        principal: "spiffe://outrigger.local/ns/shop/sa/catalog".into(),
        mark: None,
    }
}

fn labels(direction: Direction, protocol: WireProtocol) -> EdgeLabels {
    EdgeLabels {
        direction,
        source_workload: "web".into(),
        source_namespace: "shop".into(),
        source_principal: "spiffe://outrigger.local/ns/shop/sa/web".into(),
        destination_service: "catalog.shop".into(),
        destination_workload: "catalog".into(),
        destination_namespace: "shop".into(),
        protocol,
        mtls: true,
        destination_principal: "spiffe://outrigger.local/ns/shop/sa/catalog".into(),
    }
}

fn telemetry() -> (Arc<Telemetry>, Sink) {
    let sink = Sink::default();
    (Telemetry::with_log_sink(own(), sink.clone()), sink)
}

fn inbound(telemetry: &Arc<Telemetry>) -> Arc<Edge> {
    telemetry.edge(&labels(Direction::Inbound, WireProtocol::Http1))
}

fn after(start: Instant, millis: u64) -> Instant {
    start + Duration::from_millis(millis)
}

/// The samples of one metric, without comments.
fn samples(telemetry: &Telemetry, name: &str) -> Vec<String> {
    let is_of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    telemetry.encode().lines().filter(is_of).map(str::to_owned).collect()
}
