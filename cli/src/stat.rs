//! `outrigger stat`: the golden signals of every edge over the last ten seconds, from the sidecars' own reports. Reads
//! `/stats` of the control plane's admin address; both sides of an edge become one row.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use outrigger_control_plane::admin::view::{Direction, Edge, Stats};
use outrigger_runtime::stdout;

use crate::fetch::{self, FetchError};
use crate::status::{ControlPlane, complain, run};
use crate::table::{Align, Table, percent, seconds, yes_no};

/// Sidecars report every few seconds; looking more often shows the same again.
const REFRESH: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    control_plane: ControlPlane,
    /// Go on until Ctrl-C, with a fresh table every 2 s
    #[arg(long)]
    watch: bool,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    match run(show(args)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => complain("stat", &error),
        Err(error) => complain("stat", &error),
    }
}

async fn show(args: &Args) -> Result<(), FetchError> {
    let address = &args.control_plane.admin;
    let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    loop {
        let stats: Stats = fetch::json(address, "/stats").await?;
        let text = text(&stats.edges).join("\n");
        if !args.watch {
            stdout::say(&text);
            return Ok(());
        }
        stdout::say(&format!("{clear}{text}\n\nevery 2 s; Ctrl-C ends"));
        tokio::time::sleep(REFRESH).await;
    }
}

/// What both sides of an edge agree on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    source: String,
    destination: String,
    protocol: String,
}

fn text(edges: &[Edge]) -> Vec<String> {
    if edges.is_empty() {
        return vec!["No traffic was reported in the last ten seconds.".to_owned()];
    }
    let mut rows: BTreeMap<Name, Vec<&Edge>> = BTreeMap::new();
    for edge in edges {
        let name = Name {
            source: format!("{}.{}", edge.source_workload, edge.source_namespace),
            destination: edge.destination_service.clone(),
            protocol: edge.protocol.clone(),
        };
        rows.entry(name).or_default().push(edge);
    }
    let mut table = Table::new(&[
        ("FROM", Align::Left),
        ("TO", Align::Left),
        ("PROTOCOL", Align::Left),
        ("REQ/S", Align::Right),
        ("SUCCESS", Align::Right),
        ("P50", Align::Right),
        ("P99", Align::Right),
        ("MTLS", Align::Left),
    ]);
    for (name, sides) in &rows {
        table.row(row(name, sides));
    }
    table.lines()
}

/// The caller's view where there is one: it knows also what never arrived. Mutual TLS only when every side says so.
fn row(name: &Name, sides: &[&Edge]) -> [String; 8] {
    let of = |direction| sides.iter().copied().filter(|edge| edge.direction == direction).collect::<Vec<_>>();
    let outbound = of(Direction::Outbound);
    let seen = if outbound.is_empty() { of(Direction::Inbound) } else { outbound };
    let rate: f64 = seen.iter().map(|edge| edge.requests_per_second).sum();
    // By requests over the destination's workloads; a quantile of the slowest of them.
    let failed: f64 =
        seen.iter().filter_map(|edge| Some((100.0 - edge.success_percent?) * edge.requests_per_second)).sum();
    let slowest = |quantile: fn(&Edge) -> Option<f64>| seen.iter().filter_map(|edge| quantile(edge)).reduce(f64::max);
    [
        name.source.clone(),
        // What was refused at once never said where it wanted to go.
        if name.destination.is_empty() { "(unknown)".to_owned() } else { name.destination.clone() },
        name.protocol.clone(),
        format!("{rate:.1}"),
        percent((rate > 0.0).then(|| (100.0 - failed / rate).clamp(0.0, 100.0))),
        seconds(slowest(|edge| edge.p50)),
        seconds(slowest(|edge| edge.p99)),
        yes_no(sides.iter().all(|edge| edge.mtls)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(direction: Direction, success: f64, mtls: bool) -> Edge {
        Edge {
            source_workload: "web".into(),
            source_namespace: "shop".into(),
            source_identity: String::new(),
            destination_service: "cart.shop".into(),
            destination_workload: "cart".into(),
            destination_namespace: "shop".into(),
            destination_identity: String::new(),
            direction,
            protocol: "http1".into(),
            mtls,
            requests_per_second: 20.0,
            success_percent: Some(success),
            p50: Some(0.002),
            p99: Some(0.02),
            sent_bytes_per_second: 0.0,
            received_bytes_per_second: 0.0,
        }
    }

    #[test]
    fn both_sides_are_one_row_as_the_caller_saw_it() {
        let lines = text(&[edge(Direction::Inbound, 100.0, true), edge(Direction::Outbound, 99.5, true)]);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1], "web.shop  cart.shop  http1      20.0   99.5 %  2.00 ms  20.0 ms  yes");
        let lines = text(&[edge(Direction::Inbound, 100.0, false), edge(Direction::Outbound, 100.0, true)]);
        assert!(lines[1].ends_with("100.0 %  2.00 ms  20.0 ms  no"), "{lines:?}");
        let odd = Edge { requests_per_second: 99.068_832_496_155_05, ..edge(Direction::Outbound, 100.0, true) };
        assert!(text(&[odd])[1].contains("100.0 %"), "nothing failed");
        assert_eq!(text(&[]).len(), 1);
        // More failures than requests, and a rate that is no number.
        let odd = serde_json::json!({
            "source_workload": "x".repeat(100_000), "source_namespace": "shop", "source_identity": "",
            "destination_service": "", "destination_workload": "", "destination_namespace": "",
            "destination_identity": "", "direction": "outbound", "protocol": "tcp", "mtls": false,
            "requests_per_second": null, "success_percent": -700.0, "p50": null, "p99": null,
            "sent_bytes_per_second": null, "received_bytes_per_second": 1.0,
        });
        let odd: Edge = serde_json::from_value(odd).unwrap();
        let failing = Edge { requests_per_second: 1.0, ..odd.clone() };
        assert!(text(&[odd, edge(Direction::Outbound, 99.5, true)])[1].contains("99.5 %"));
        assert!(text(&[failing])[1].contains(" 0.0 %"));
    }
}
