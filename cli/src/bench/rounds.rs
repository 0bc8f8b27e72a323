//! The run itself: starts the application and the contenders, lets them take turns, and hands what was seen to the
//! report. Who begins a round changes from round to round, so that no contender always has the quiet moment.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use super::child::{Child, Layout, cpu_nanos};
use super::haproxy::{self, Haproxy};
use super::histogram::Histogram;
use super::load::{LONGEST, Mode, Seen, Settings as LoadSettings};
use super::mesh::Mesh;
use super::nginx::{self, Nginx};
use super::report::{Measure, Report, Section};
use super::{Settings, idle};

pub const DIRECT: &str = "direct";
pub const SIDECARS: &str = "sidecars";
pub const NGINX: &str = "nginx";
pub const HAPROXY: &str = "haproxy";

/// Downloads at once. One alone would measure how quickly the ends take turns.
const DOWNLOADS: u16 = 4;

/// What all parts of one run share.
pub struct Bench<'a> {
    settings: &'a Settings,
    directory: &'a Path,
    layout: Layout,
}

/// A way to the application.
pub struct Contender {
    pub name: &'static str,
    pub address: SocketAddr,
    pub proxies: Vec<Proxy>,
}

/// A process whose time and memory are counted.
#[derive(Clone)]
pub struct Proxy {
    pub name: &'static str,
    pub pid: u32,
}

pub fn run(settings: &Settings) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("outrigger-bench").tempdir()?;
    let layout = Layout::choose(!settings.no_pin);
    let bench = Bench { settings, directory: directory.path(), layout };
    let program = std::env::current_exe()?;
    let application =
        Child::start("application", &program, ["bench", "serve"], layout.others, directory.path())?.ready()?;
    let mesh = Mesh::start(&application, directory.path(), layout, settings.wrap.as_deref())
        .context("the mesh did not start")?;
    let sidecars = vec![
        Proxy { name: "client sidecar", pid: mesh.client.pid() },
        Proxy { name: "server sidecar", pid: mesh.server.pid() },
    ];
    if settings.tcp {
        return bench.bulk(&application, &mesh, sidecars);
    }
    let nginx = match nginx::find().filter(|_| !settings.no_nginx) {
        Some(program) => Some(Nginx::start(&program, application.address("http1")?, directory.path(), layout)?),
        None => None,
    };
    let direct = Contender { name: DIRECT, address: application.address("http1")?, proxies: Vec::new() };
    let mut http1 = vec![direct, Contender { name: SIDECARS, address: mesh.http1, proxies: sidecars.clone() }];
    if let Some(nginx) = &nginx {
        let proxies = vec![
            Proxy { name: "client nginx", pid: nginx::worker(&nginx.client)? },
            Proxy { name: "server nginx", pid: nginx::worker(&nginx.server)? },
        ];
        http1.push(Contender { name: NGINX, address: nginx.address, proxies });
    }
    let mut report = Report::new(settings, layout, nginx.is_some());
    bench.weigh(&http1, Contender { name: SIDECARS, address: mesh.opaque, proxies: sidecars.clone() }, &mut report)?;
    let closed = LoadSettings { requests: settings.requests, ..bench.load(Mode::Closed) };
    let title = format!("HTTP/1.1, closed loop, {} connections", settings.connections);
    report.sections.push(bench.turns(title, &http1, &closed)?);
    if settings.seconds > 0 {
        let open = LoadSettings { rate: settings.rate, seconds: settings.seconds, ..bench.load(Mode::Open) };
        let title = format!("HTTP/1.1, open loop, {} requests/s", settings.rate);
        report.sections.push(bench.turns(title, &http1, &open)?);
    }
    if settings.http2 {
        let http2 = [
            Contender { name: DIRECT, address: application.address("http2")?, proxies: Vec::new() },
            Contender { name: SIDECARS, address: mesh.http2, proxies: sidecars },
        ];
        let streams = LoadSettings { requests: settings.requests, ..bench.load(Mode::Streams) };
        let title = format!("HTTP/2, closed loop, {} streams", settings.connections);
        report.sections.push(bench.turns(title, &http2, &streams)?);
    }
    report.finish()
}

impl Bench<'_> {
    /// Opaque bytes in bulk.
    fn bulk(&self, application: &Child, mesh: &Mesh, sidecars: Vec<Proxy>) -> anyhow::Result<()> {
        let address = application.address("bulk")?;
        let haproxy = match haproxy::find() {
            Some(program) => Some(Haproxy::start(&program, address, self.directory, self.layout)?),
            None => None,
        };
        let mut contenders = vec![
            Contender { name: DIRECT, address, proxies: Vec::new() },
            Contender { name: SIDECARS, address: mesh.bulk, proxies: sidecars },
        ];
        if let Some(haproxy) = &haproxy {
            let proxies = vec![
                Proxy { name: "client haproxy", pid: haproxy.client.pid() },
                Proxy { name: "server haproxy", pid: haproxy.server.pid() },
            ];
            contenders.push(Contender { name: HAPROXY, address: haproxy.address, proxies });
        }
        let requests = u64::from(self.settings.mib);
        let load = LoadSettings { requests, connections: DOWNLOADS, ..self.load(Mode::Bulk) };
        let title = format!("opaque TCP, {DOWNLOADS} downloads, {requests} MiB in all");
        let mut report = Report::of_bytes(self.settings, self.layout, haproxy.is_some());
        report.sections.push(self.turns(title, &contenders, &load)?.in_bytes());
        report.finish()
    }

    fn load(&self, mode: Mode) -> LoadSettings {
        LoadSettings {
            target: ([127, 0, 0, 1], 0).into(),
            mode,
            connections: self.settings.connections,
            requests: 0,
            rate: 1,
            seconds: 0,
        }
    }

    /// Before anything else ran: memory that was used once is not given back.
    fn weigh(&self, http1: &[Contender], opaque: Contender, report: &mut Report) -> anyhow::Result<()> {
        if self.settings.idle == 0 {
            return Ok(());
        }
        for contender in http1.iter().filter(|contender| !contender.proxies.is_empty()) {
            report.weights.extend(idle::measure(contender, self.settings.idle, self)?);
        }
        report.opaque_weights = idle::measure(&opaque, self.settings.idle, self)?;
        Ok(())
    }

    fn turns(&self, title: String, contenders: &[Contender], load: &LoadSettings) -> anyhow::Result<Section> {
        let mut section = Section::new(title, contenders.iter().map(|contender| contender.name));
        for round in 0..usize::from(self.settings.rounds) {
            for turn in 0..contenders.len() {
                let contender = &contenders[(round + turn) % contenders.len()];
                let measure = self.measure(contender, load).with_context(|| format!("load on {}", contender.name))?;
                section.add(contender.name, measure);
            }
        }
        Ok(section)
    }

    fn measure(&self, contender: &Contender, load: &LoadSettings) -> anyhow::Result<Measure> {
        let mut child = start_load(&LoadSettings { target: contender.address, ..load.clone() }, self)?;
        let spent = || contender.proxies.iter().map(|proxy| cpu_nanos(proxy.pid)).collect::<Vec<_>>();
        let before = spent();
        child.say("\n")?;
        let line = child.line(LONGEST + Duration::from_secs(20))?;
        let after = spent();
        let seen: Seen = serde_json::from_str(&line).with_context(|| format!("the load said {line:?}"))?;
        child.end();
        if seen.answered == 0 {
            bail!("nothing was answered");
        }
        let latencies = Histogram::from(&seen.latencies);
        let per_request = |nanos: u64| nanos as f64 / 1e3 / seen.answered as f64;
        let cpu = after.iter().zip(&before).map(|(after, before)| per_request(after.saturating_sub(*before)));
        Ok(Measure {
            requests_per_second: seen.answered as f64 / seen.seconds,
            p50_micros: latencies.quantile(0.50) as f64 / 1e3,
            p99_micros: latencies.quantile(0.99) as f64 / 1e3,
            cpu_micros: cpu.collect(),
            failed: seen.failed,
        })
    }
}

/// Starts the load and waits until it is warm.
pub fn start_load(settings: &LoadSettings, bench: &Bench<'_>) -> anyhow::Result<Child> {
    let mode = match settings.mode {
        Mode::Closed => "closed",
        Mode::Open => "open",
        Mode::Streams => "streams",
        Mode::Idle => "idle",
        Mode::Bulk => "bulk",
    };
    let mut arguments: Vec<OsString> = ["bench", "load", "--mode", mode].map(OsString::from).to_vec();
    let mut flag = |flag: &str, value: String| arguments.extend([flag.into(), value.into()]);
    flag("--target", settings.target.to_string());
    flag("--connections", settings.connections.to_string());
    flag("--requests", settings.requests.to_string());
    flag("--rate", settings.rate.to_string());
    flag("--seconds", settings.seconds.to_string());
    Child::start("load", &std::env::current_exe()?, arguments, bench.layout.others, bench.directory)?.ready()
}
