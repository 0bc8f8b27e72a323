//! `outrigger stat`: the golden signals of every edge over the last ten seconds, and what it has counted in all, from the
//! sidecars' own reports. Reads `/stats` of the control plane's admin address; both sides of an edge become one row.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use outrigger_control_plane::admin::view::{Direction, Edge, Stats, Total};
use outrigger_runtime::stdout;

use crate::fetch::{self, FetchError};
use crate::status::{ControlPlane, complain, run};
use crate::table::{Align, Table, percent, seconds, span, yes_no};

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
        let text = text(&stats).join("\n");
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

fn text(stats: &Stats) -> Vec<String> {
    let mut lines = Vec::new();
    if stats.edges.is_empty() {
        lines.push(format!("No traffic was reported in the last ten seconds. {}", why_nothing(stats)));
    }
    if stats.edges.is_empty() && stats.totals.is_empty() {
        return lines;
    }
    let mut rows: BTreeMap<Name, (Vec<&Edge>, Vec<&Total>)> = BTreeMap::new();
    for edge in &stats.edges {
        let name = name(&edge.source_workload, &edge.source_namespace, &edge.destination_service, &edge.protocol);
        rows.entry(name).or_default().0.push(edge);
    }
    for total in &stats.totals {
        let name = name(&total.source_workload, &total.source_namespace, &total.destination_service, &total.protocol);
        rows.entry(name).or_default().1.push(total);
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
        ("TOTAL", Align::Right),
        ("FAILED", Align::Right),
    ]);
    for (name, (edges, totals)) in &rows {
        table.row(row(name, edges, totals));
    }
    lines.extend(table.lines());
    lines
}

fn name(workload: &str, namespace: &str, destination: &str, protocol: &str) -> Name {
    Name {
        source: format!("{workload}.{namespace}"),
        destination: destination.to_owned(),
        protocol: protocol.to_owned(),
    }
}

/// The most likely reason for an empty table.
fn why_nothing(stats: &Stats) -> String {
    match (stats.sidecars, stats.reporting) {
        (0, _) => "No sidecar is connected to this control plane; a sidecar's /ready says why it is not.".to_owned(),
        (1, 0) => "One sidecar is connected and has not reported yet, which takes some seconds.".to_owned(),
        (sidecars, 0) => {
            format!("{sidecars} sidecars are connected and have not reported yet, which takes some seconds.")
        }
        (_, reporting) if stats.totals.is_empty() => format!(
            "{reporting} sidecars report, and none of them has carried anything since this control plane started, {} ago.",
            span(stats.uptime)
        ),
        (_, reporting) => {
            let quiet = stats.totals.iter().map(|total| total.quiet).min().unwrap_or_default();
            format!("{reporting} sidecars report; the last traffic was {} ago.", span(quiet))
        }
    }
}

/// The caller's view where there is one: it knows also what never arrived. Mutual TLS only when every side says so.
fn row(name: &Name, sides: &[&Edge], totals: &[&Total]) -> [String; 10] {
    let of = |direction| sides.iter().copied().filter(|edge| edge.direction == direction).collect::<Vec<_>>();
    let outbound = of(Direction::Outbound);
    let seen = if outbound.is_empty() { of(Direction::Inbound) } else { outbound };
    let (requests, failures, ever) = sum(totals);
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
        // The sum of nothing is -0.0.
        format!("{:.1}", rate + 0.0),
        percent((rate > 0.0).then(|| (100.0 - failed / rate).clamp(0.0, 100.0))),
        seconds(slowest(|edge| edge.p50)),
        seconds(slowest(|edge| edge.p99)),
        yes_no(if sides.is_empty() { ever } else { sides.iter().all(|edge| edge.mtls) }),
        requests.to_string(),
        failures.to_string(),
    ]
}

/// Requests, failures and whether all of it was mutual TLS, by the same rule.
fn sum(totals: &[&Total]) -> (u64, u64, bool) {
    let of = |direction| totals.iter().copied().filter(|total| total.direction == direction).collect::<Vec<_>>();
    let outbound = of(Direction::Outbound);
    let seen = if outbound.is_empty() { of(Direction::Inbound) } else { outbound };
    let requests = seen.iter().fold(0_u64, |sum, total| sum.saturating_add(total.requests));
    let failures = seen.iter().fold(0_u64, |sum, total| sum.saturating_add(total.failures));
    (requests, failures, totals.iter().all(|total| total.mtls))
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

    fn total(direction: Direction, destination: &str, requests: u64) -> Total {
        Total {
            source_workload: "web".into(),
            source_namespace: "shop".into(),
            destination_service: destination.into(),
            direction,
            protocol: "http1".into(),
            mtls: true,
            requests,
            failures: 1,
            quiet: 75,
        }
    }

    fn of(edges: Vec<Edge>) -> Stats {
        Stats { edges, totals: Vec::new(), sidecars: 2, reporting: 2, uptime: 600 }
    }

    #[test]
    fn both_sides_are_one_row_as_the_caller_saw_it() {
        let lines = text(&of(vec![edge(Direction::Inbound, 100.0, true), edge(Direction::Outbound, 99.5, true)]));
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1], "web.shop  cart.shop  http1      20.0   99.5 %  2.00 ms  20.0 ms  yes       0       0");
        let lines = text(&of(vec![edge(Direction::Inbound, 100.0, false), edge(Direction::Outbound, 100.0, true)]));
        assert!(lines[1].contains("100.0 %  2.00 ms  20.0 ms  no "), "{lines:?}");
        let odd = Edge { requests_per_second: 99.068_832_496_155_05, ..edge(Direction::Outbound, 100.0, true) };
        assert!(text(&of(vec![odd]))[1].contains("100.0 %"), "nothing failed");
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
        assert!(text(&of(vec![odd, edge(Direction::Outbound, 99.5, true)]))[1].contains("99.5 %"));
        assert!(text(&of(vec![failing]))[1].contains(" 0.0 %"));
    }

    #[test]
    fn totals_stay_when_traffic_rests_and_an_empty_table_says_why() {
        let mut stats = of(vec![edge(Direction::Outbound, 100.0, true)]);
        let (out, back) = (total(Direction::Outbound, "cart.shop", 500), total(Direction::Inbound, "cart.shop", 499));
        stats.totals = vec![out, back, total(Direction::Outbound, "pay.shop", 7)];
        let lines = text(&stats);
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(cells(&lines[1])[10..], ["yes", "500", "1"], "{lines:?}");
        assert_eq!(cells(&lines[2]), ["web.shop", "pay.shop", "http1", "0.0", "-", "-", "-", "yes", "7", "1"]);
        stats.edges.clear();
        let lines = text(&stats);
        assert!(lines[0].ends_with("2 sidecars report; the last traffic was 1m 15s ago."), "{lines:?}");
        assert_eq!(lines.len(), 4);
        stats.totals.clear();
        assert!(text(&stats)[0].ends_with("since this control plane started, 10m 0s ago."), "{:?}", text(&stats));
        stats.reporting = 0;
        assert!(text(&stats)[0].contains("have not reported yet"), "{:?}", text(&stats));
        stats.sidecars = 0;
        assert_eq!(text(&stats).len(), 1);
        assert!(text(&stats)[0].contains("No sidecar is connected"), "{:?}", text(&stats));
    }
}
