//! From measures to a table and a JSON file. A ratio is the median of the rounds' ratios: in one round the contenders
//! met the same machine, in different ones perhaps not. Pure but for the last step.

use std::fmt::Write;

use anyhow::Context;
use outrigger_runtime::stdout;
use serde::Serialize;

use super::Settings;
use super::child::Layout;
use super::idle::Weight;
use super::rounds::{DIRECT, HAPROXY, NGINX, SIDECARS};

/// One contender in one round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measure {
    pub requests_per_second: f64,
    pub p50_micros: f64,
    pub p99_micros: f64,
    /// Of each proxy, per request.
    pub cpu_micros: Vec<f64>,
    pub failed: u64,
}

impl Measure {
    fn cpu(&self) -> f64 {
        // Not `sum`, which makes -0 of nothing.
        self.cpu_micros.iter().fold(0.0, |sum, cpu| sum + cpu)
    }
}

/// One kind of load.
#[derive(Debug, Serialize)]
pub struct Section {
    title: String,
    #[serde(skip)]
    columns: &'static [Column],
    contenders: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    name: &'static str,
    rounds: Vec<Measure>,
}

#[derive(Debug, Serialize)]
pub struct Report {
    requests: u64,
    rounds: u16,
    pinned: bool,
    pub weights: Vec<Weight>,
    pub opaque_weights: Vec<Weight>,
    pub sections: Vec<Section>,
    #[serde(skip)]
    json: Option<std::path::PathBuf>,
    /// What is downloaded; 0 when requests are measured.
    mib: u32,
    /// Who is missing among the contenders.
    #[serde(skip)]
    missing: Option<&'static str>,
}

type Column = (&'static str, fn(&Measure) -> f64);

const COLUMNS: [Column; 4] = [
    ("requests/s", |measure| measure.requests_per_second),
    ("p50 ms", |measure| measure.p50_micros / 1e3),
    ("p99 ms", |measure| measure.p99_micros / 1e3),
    ("CPU us/request", Measure::cpu),
];

/// The same of a download, whose requests are MiB.
const BYTE_COLUMNS: [Column; 2] =
    [("GiB/s", |measure| measure.requests_per_second / 1024.0), ("CPU s/GiB", |measure| measure.cpu() * 1024.0 / 1e6)];

impl Section {
    /// One whose requests are MiB.
    pub fn in_bytes(self) -> Section {
        Section { columns: &BYTE_COLUMNS, ..self }
    }

    pub fn new(title: String, names: impl Iterator<Item = &'static str>) -> Section {
        Section {
            title,
            columns: &COLUMNS,
            contenders: names.map(|name| Measured { name, rounds: Vec::new() }).collect(),
        }
    }

    pub fn add(&mut self, name: &str, measure: Measure) {
        if let Some(contender) = self.contenders.iter_mut().find(|contender| contender.name == name) {
            contender.rounds.push(measure);
        }
    }

    fn rounds(&self, name: &str) -> Option<&[Measure]> {
        self.contenders.iter().find(|contender| contender.name == name).map(|contender| &contender.rounds[..])
    }

    fn text(&self) -> String {
        let mut text = format!("\n{}\n{:24}", self.title, "");
        for (name, _) in self.columns {
            let _ = write!(text, "{name:>16}");
        }
        text.push('\n');
        for contender in &self.contenders {
            let _ = write!(text, "{:24}", contender.name);
            for (name, value) in self.columns {
                let value = median(contender.rounds.iter().map(value).collect());
                let digits = if *name == "requests/s" { 0 } else { 2 };
                let _ = write!(text, "{value:>16.digits$}");
            }
            let failed: u64 = contender.rounds.iter().map(|measure| measure.failed).sum();
            let _ = if failed > 0 { write!(text, "   {failed} failed") } else { Ok(()) };
            text.push('\n');
        }
        for (one, other) in
            [(SIDECARS, DIRECT), (NGINX, DIRECT), (SIDECARS, NGINX), (HAPROXY, DIRECT), (SIDECARS, HAPROXY)]
        {
            let (Some(of), Some(to)) = (self.rounds(one), self.rounds(other)) else { continue };
            let _ = write!(text, "{:24}", format!("{one} / {other}"));
            for (_, value) in self.columns {
                let _ = match ratio(of, to, *value) {
                    Some(ratio) => write!(text, "{ratio:>16.2}"),
                    None => write!(text, "{:>16}", "-"),
                };
            }
            text.push('\n');
        }
        text
    }
}

impl Report {
    pub fn new(settings: &Settings, layout: Layout, has_nginx: bool) -> Report {
        Report {
            requests: settings.requests,
            rounds: settings.rounds,
            pinned: layout.proxies.is_some(),
            weights: Vec::new(),
            opaque_weights: Vec::new(),
            sections: Vec::new(),
            mib: 0,
            json: settings.json.clone(),
            missing: (!has_nginx).then_some("without nginx: it is not installed, or --no-nginx was given\n"),
        }
    }

    pub fn of_bytes(settings: &Settings, layout: Layout, has_haproxy: bool) -> Report {
        let missing = (!has_haproxy).then_some("without haproxy: it is not installed\n");
        Report { requests: 0, mib: settings.mib, missing, ..Report::new(settings, layout, true) }
    }

    pub fn finish(&self) -> anyhow::Result<()> {
        stdout::say(&self.text());
        if let Some(file) = &self.json {
            let text = serde_json::to_string_pretty(self)?;
            std::fs::write(file, text).with_context(|| format!("--json {}", file.display()))?;
        }
        Ok(())
    }

    fn text(&self) -> String {
        let what = if self.mib > 0 {
            format!("{} MiB", self.mib)
        } else {
            format!("{} requests; answers of {} bytes", self.requests, super::serve::BODY)
        };
        let mut text = format!(
            "{} rounds of {what}; {}\n",
            self.rounds,
            if self.pinned { "proxies on one processor, load and application on another" } else { "not pinned" },
        );
        text.push_str(self.missing.unwrap_or_default());
        text.push_str("rows are medians over the rounds; a ratio is the median of the rounds' ratios\n");
        text.push_str(&weights("memory, with idle HTTP/1.1 connections at the client side", &self.weights));
        text.push_str(&weights("memory, with idle opaque connections through both sides", &self.opaque_weights));
        for section in &self.sections {
            text.push_str(&section.text());
        }
        text
    }
}

fn weights(title: &str, weights: &[Weight]) -> String {
    let Some(first) = weights.first() else { return String::new() };
    let with = format!("with {} MiB", first.connections);
    let mut text = format!("\n{title}\n{:24}", "");
    for name in ["RSS MiB", "private MiB", &with, "KiB/connection"] {
        let _ = write!(text, "{name:>16}");
    }
    text.push('\n');
    let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    for weight in weights {
        let _ = write!(text, "{:24}", weight.process);
        for bytes in [weight.idle, weight.idle_private, weight.with_connections] {
            let _ = write!(text, "{:>16.1}", mib(bytes));
        }
        let _ = writeln!(text, "{:>16.1}", weight.per_connection / 1024.0);
    }
    text
}

/// The median of the ratios round by round; none where there is nothing to divide by.
fn ratio(of: &[Measure], to: &[Measure], value: fn(&Measure) -> f64) -> Option<f64> {
    let ratios: Vec<f64> =
        of.iter().zip(to).filter(|(_, to)| value(to) > 0.0).map(|(of, to)| value(of) / value(to)).collect();
    if ratios.is_empty() { None } else { Some(median(ratios)) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        length if length % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(requests_per_second: f64, cpu: &[f64]) -> Measure {
        Measure { requests_per_second, cpu_micros: cpu.to_vec(), ..Measure::default() }
    }

    #[test]
    fn medians() {
        for (values, expected) in [(&[][..], 0.0), (&[3.0], 3.0), (&[9.0, 1.0, 2.0], 2.0), (&[4.0, 1.0, 2.0, 9.0], 3.0)]
        {
            assert_eq!(median(values.to_vec()), expected);
        }
    }

    /// One disturbed round does not decide.
    #[test]
    fn a_ratio_compares_what_met_the_same_machine() {
        let ours = [measure(100.0, &[10.0, 20.0]), measure(50.0, &[20.0, 40.0]), measure(1.0, &[1.0, 1.0])];
        let theirs = [measure(200.0, &[40.0, 20.0]), measure(100.0, &[120.0]), measure(100.0, &[60.0])];
        assert_eq!(ratio(&ours, &theirs, |measure| measure.requests_per_second), Some(0.5));
        assert_eq!(ratio(&ours, &theirs, Measure::cpu), Some(0.5));
        let nothing = [measure(1.0, &[]), measure(1.0, &[])];
        assert_eq!(ratio(&ours, &nothing, Measure::cpu), None);
    }

    #[test]
    fn a_section_is_a_table_with_ratios_of_what_ran() {
        let mut section = Section::new("title".to_owned(), [DIRECT, SIDECARS].into_iter());
        section.add(DIRECT, measure(200.0, &[]));
        section.add(SIDECARS, Measure { failed: 3, ..measure(100.0, &[1.0, 2.0]) });
        let text = section.text();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        assert_eq!(
            line("sidecars ").split_whitespace().collect::<Vec<_>>(),
            ["sidecars", "100", "0.00", "0.00", "3.00", "3", "failed"]
        );
        assert_eq!(
            line("sidecars /").split_whitespace().collect::<Vec<_>>(),
            ["sidecars", "/", "direct", "0.50", "-", "-", "-"]
        );
        assert!(!text.contains(NGINX));
    }
}
