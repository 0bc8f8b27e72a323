//! What the demo says while it runs: on a terminal a table that is drawn anew each second, elsewhere a line every few
//! seconds and the table at the end. Makes text from samples; measures nothing.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

use outrigger_runtime::stdout;

use super::edge::CALLS;
use super::mesh::Mesh;
use super::scrape::Sample;
use super::{Options, Report, services};
use crate::table::{Align, Table, cut, percent, seconds, yes_no};

/// Where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    Nothing,
    /// A log file or a pipe.
    Lines,
    Terminal,
}

impl Show {
    pub(super) fn on_stdout() -> Show {
        if std::io::stdout().is_terminal() { Show::Terminal } else { Show::Lines }
    }
}

/// One edge over some time.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub from: &'static str,
    pub to: &'static str,
    pub protocol: &'static str,
    /// TCP: connections.
    pub requests_per_second: f64,
    pub success_percent: Option<f64>,
    /// Seconds.
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    /// On both sides, ever since the start.
    pub mtls: bool,
    /// Who called, as it was proved to the service's sidecar.
    pub caller_identity: String,
    /// Who was called, as the caller's sidecar demanded it.
    pub service_identity: String,
}

/// Every edge between two moments.
pub(super) fn rows(earlier: &Sample, now: &Sample) -> Vec<Row> {
    let time = now.at.duration_since(earlier.at).as_secs_f64().max(f64::EPSILON);
    let rows = CALLS.iter().zip(earlier.edges.iter().zip(&now.edges)).map(|(call, (before, edge))| {
        let window = edge.since(before);
        let names = |identities: &std::collections::BTreeSet<String>| {
            identities.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
        };
        Row {
            from: call.from,
            to: call.to,
            protocol: call.spoken,
            requests_per_second: window.ended as f64 / time,
            success_percent: window.success_percent(),
            p50: window.latency.quantile(0.5),
            p99: window.latency.quantile(0.99),
            mtls: edge.mutual(),
            caller_identity: names(&edge.inbound.principals),
            service_identity: names(&edge.demanded),
        }
    });
    rows.collect()
}

/// The table shows the last few seconds: a single one has too few requests for a p99.
const WINDOW: usize = 5;
/// Lines of progress come once in so many samples.
const PROGRESS: u64 = 5;

/// What has been shown so far.
pub(super) struct Screen {
    show: Show,
    recent: VecDeque<Sample>,
    shown: u64,
    /// Lines to go up before the table is drawn again.
    drawn: usize,
    /// Columns that the terminal had then.
    columns: usize,
}

impl Screen {
    pub(super) fn new(show: Show) -> Screen {
        Screen { show, recent: VecDeque::new(), shown: 0, drawn: 0, columns: 0 }
    }

    /// Once, when the traffic begins: where everything can be found.
    pub(super) fn begin(&mut self, mesh: &Mesh, options: &Options, startup: Duration, first: &Sample) {
        self.recent.push_back(first.clone());
        if self.show != Show::Nothing {
            stdout::say(&introduction(mesh, options, startup).join("\n"));
        }
    }

    /// Once a second.
    pub(super) fn show(&mut self, sample: Sample, load: &services::Report) {
        self.recent.push_back(sample);
        if self.recent.len() > WINDOW + 1 {
            self.recent.pop_front();
        }
        self.shown += 1;
        let progress = format!("{} requests answered, {} failed", load.ok, load.failed);
        match (self.show, self.recent.front(), self.recent.back()) {
            (Show::Terminal, Some(first), Some(last)) => {
                let mut lines = table(&rows(first, last));
                lines.extend([String::new(), format!("{progress}; Ctrl-C ends")]);
                self.draw(&lines);
            }
            (Show::Lines, ..) if self.shown.is_multiple_of(PROGRESS) => {
                stdout::say(&format!("{} s: {progress}", self.shown));
            }
            _ => {}
        }
    }

    /// Once: the whole time in one table, and the verdict.
    pub(super) fn end(&mut self, report: &Report) {
        if self.show == Show::Nothing {
            return;
        }
        let mut lines = table(&report.rows);
        lines.extend([String::new(), summary(report)]);
        // Nothing is drawn over it any more: long lines may wrap, and nothing of them is missing.
        let text = lines.join("\n");
        if self.show == Show::Terminal {
            return stdout::say(&format!("{}{text}", self.over(columns())));
        }
        stdout::say(&format!("\n{text}"));
    }

    /// Over what was drawn before. Lines that are too long for the terminal are cut, because lines that wrap would not be
    /// drawn over.
    fn draw(&mut self, lines: &[String]) {
        let columns = columns();
        let over = self.over(columns);
        let fitting: Vec<String> = lines.iter().map(|line| cut(line.clone(), columns)).collect();
        stdout::say(&format!("{over}{}", fitting.join("\n")));
        self.drawn = lines.len();
        self.columns = columns;
    }

    /// Goes to where the table begins. A terminal whose width has changed has moved the old table about: it begins anew.
    fn over(&self, columns: usize) -> String {
        match self.drawn {
            0 => "\n".to_owned(),
            _ if columns != self.columns => "\x1b[2J\x1b[H".to_owned(),
            drawn => format!("\x1b[{drawn}A\r\x1b[J"),
        }
    }
}

/// How wide the terminal is; as wide as most where it does not say.
fn columns() -> usize {
    const MOST_COMMON: usize = 80;
    rustix::termios::tcgetwinsize(std::io::stdout())
        .map(|size| usize::from(size.ws_col))
        .ok()
        .filter(|columns| *columns > 0)
        .unwrap_or(MOST_COMMON)
}

fn table(rows: &[Row]) -> Vec<String> {
    let mut table = Table::new(&[
        ("EDGE", Align::Left),
        ("PROTOCOL", Align::Left),
        ("REQ/S", Align::Right),
        ("SUCCESS", Align::Right),
        ("P50", Align::Right),
        ("P99", Align::Right),
        ("MTLS", Align::Left),
    ]);
    for row in rows {
        table.row([
            format!("{} -> {}", row.from, row.to),
            row.protocol.to_owned(),
            format!("{:.1}", row.requests_per_second),
            percent(row.success_percent),
            seconds(row.p50),
            seconds(row.p99),
            yes_no(row.mtls),
        ]);
    }
    let mut figures = table.lines().into_iter();
    let mut lines: Vec<String> = figures.next().into_iter().collect();
    for (figures, row) in figures.zip(rows) {
        lines.push(figures);
        lines.push(format!("  {} -> {}", named(&row.caller_identity), named(&row.service_identity)));
    }
    lines
}

fn named(identity: &str) -> &str {
    if identity.is_empty() { "(no identity)" } else { identity }
}

fn summary(report: &Report) -> String {
    let time = report.duration.as_secs_f64();
    let requests = format!("{} requests in {time:.1} s", report.answered + report.failed);
    match (report.failed, report.faults.len()) {
        (0, 0) => format!("{requests}, every one answered; every edge mutually authenticated; plaintext was refused"),
        (failed, 1) => format!("{requests}, {failed} failed; 1 promise was not kept, see stderr"),
        (failed, faults) => format!("{requests}, {failed} failed; {faults} promises were not kept, see stderr"),
    }
}

fn introduction(mesh: &Mesh, options: &Options, startup: Duration) -> Vec<String> {
    let admin = mesh.control_plane_admin();
    let mut lines = vec![
        format!("A mesh of its own runs in this process since {:.1} s ago: a control plane,", startup.as_secs_f64()),
        "four sidecars, and load -> web -> catalog, ledger behind them.".to_owned(),
        "STRICT mutual TLS is in force.".to_owned(),
        String::new(),
    ];
    lines.push("call the shop through the load's sidecar".to_owned());
    lines.push(format!("  curl 'http://{}/shop?item=rope'", mesh.shop));
    lines.push("ask the control plane, in another terminal".to_owned());
    lines.push(format!("  outrigger status --control-plane-admin {admin}"));
    lines.push(format!("  outrigger stat --watch --control-plane-admin {admin}"));
    lines.push("metrics for Prometheus".to_owned());
    for beside in &mesh.sidecars {
        lines.push(format!("  {:<8} http://{}/metrics", beside.name, beside.metrics));
    }
    match &options.otlp {
        Some(endpoint) => lines.push(format!("traces of every request go to {endpoint}")),
        None => {
            lines.push("traces in Jaeger (http://127.0.0.1:16686)".to_owned());
            lines.push("  docker run --rm -p 16686:16686 -p 4317:4317 jaegertracing/jaeger".to_owned());
            lines.push("  outrigger demo --otlp http://127.0.0.1:4317".to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            from: "web",
            to: "catalog",
            protocol: "gRPC",
            requests_per_second: 100.04,
            success_percent: Some(100.0),
            p50: Some(0.0018),
            p99: Some(0.0213),
            mtls: true,
            caller_identity: "spiffe://outrigger.local/ns/demo/sa/web".into(),
            service_identity: "spiffe://outrigger.local/ns/demo/sa/catalog".into(),
        }
    }

    #[test]
    fn the_table_fits_a_hundred_columns() {
        let unknown =
            Row { mtls: false, success_percent: None, p50: None, p99: None, caller_identity: "".into(), ..row() };
        let lines = table(&[row(), unknown]);
        assert_eq!(
            lines,
            [
                "EDGE            PROTOCOL  REQ/S  SUCCESS      P50      P99  MTLS",
                "web -> catalog  gRPC      100.0  100.0 %  1.80 ms  21.3 ms  yes",
                "  spiffe://outrigger.local/ns/demo/sa/web -> spiffe://outrigger.local/ns/demo/sa/catalog",
                "web -> catalog  gRPC      100.0        -        -        -  no",
                "  (no identity) -> spiffe://outrigger.local/ns/demo/sa/catalog",
            ]
        );
        assert!(lines.iter().all(|line| line.chars().count() <= 100));
    }

    #[test]
    fn a_narrow_terminal_shows_that_something_is_missing() {
        let lines: Vec<String> = table(&[row()]).into_iter().map(|line| cut(line, 80)).collect();
        assert_eq!(lines[2].chars().count(), 80);
        assert!(lines[2].ends_with('…'), "{}", lines[2]);
        let mut screen = Screen::new(Show::Terminal);
        assert_eq!(screen.over(80), "\n");
        (screen.drawn, screen.columns) = (9, 80);
        assert_eq!(screen.over(80), "\x1b[9A\r\x1b[J");
        assert_eq!(screen.over(60), "\x1b[2J\x1b[H", "the old table has wrapped");
    }

    #[test]
    fn the_summary_says_what_was_promised() {
        let mut report = Report {
            startup: Duration::ZERO,
            duration: Duration::from_secs(10),
            answered: 500,
            failed: 0,
            rows: Vec::new(),
            faults: Vec::new(),
            interrupted: false,
        };
        assert!(summary(&report).starts_with("500 requests in 10.0 s, every one answered"));
        assert!(summary(&report).len() <= 100);
        report.faults = vec![super::super::Fault::NoRequests];
        report.failed = 1;
        assert_eq!(summary(&report), "501 requests in 10.0 s, 1 failed; 1 promise was not kept, see stderr");
    }
}
