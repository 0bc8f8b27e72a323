//! `outrigger demo`: a whole mesh in one process, with services that call each other through it under STRICT mutual
//! TLS, and a live table of what its sidecars measure. [`run`] starts it, watches it, ends it and judges; tests call
//! it too. It needs no root, opens ports on loopback only and leaves nothing behind.

mod configuration;
mod edge;
mod exposition;
mod intrude;
mod mesh;
mod scrape;
mod screen;
pub mod services;
mod verdict;

pub use screen::{Row, Show};
pub use verdict::Fault;

use std::num::NonZeroU32;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use outrigger_api::resource::duration;
use outrigger_control_plane::app::StartError;
use outrigger_control_plane::ca::token;
use outrigger_runtime::logging::{self, Logs};
use outrigger_runtime::signals::Signals;
use outrigger_runtime::stdout;

use crate::fetch::FetchError;
use mesh::Mesh;
use scrape::Sample;
use screen::Screen;
use verdict::{Facts, verdict};

#[derive(clap::Args)]
#[command(
    after_help = "Ends with 0 when every request was answered and every edge was mutually authenticated, with 1 \
                        and the reason otherwise. Ctrl-C ends it with 0; nothing is left behind."
)]
pub(crate) struct Args {
    /// End by itself after so many seconds [default: runs until Ctrl-C]
    #[arg(long = "for", value_name = "SECONDS", value_parser = how_long)]
    duration: Option<Duration>,
    /// Send traces of every request to an OTLP collector, Jaeger say: http://127.0.0.1:4317
    #[arg(long, value_name = "URL", value_parser = collector)]
    otlp: Option<String>,
    /// What the control plane and the sidecars log to stderr
    #[arg(long, value_name = "LEVEL", default_value = "error", value_parser = logging::parse_level)]
    log_level: String,
}

/// `10`, or as Go writes durations.
fn how_long(text: &str) -> Result<Duration, String> {
    let duration = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => duration::parse(text).map_err(|error| error.to_string())?,
    };
    if duration < SHORTEST {
        return Err(format!("the demo needs at least {}s to tell something", SHORTEST.as_secs()));
    }
    Ok(duration)
}

/// Checked as MeshConfig's `otlpEndpoint`, which it becomes.
fn collector(text: &str) -> Result<String, String> {
    if configuration::is_valid(text) { Ok(text.to_owned()) } else { Err("expected http://HOST:PORT".to_owned()) }
}

const SHORTEST: Duration = Duration::from_secs(1);
const SECOND: Duration = Duration::from_secs(1);
/// Requests a second that the customer sends: enough for a p99, and no load for a laptop.
const RATE: NonZeroU32 = NonZeroU32::new(50).unwrap();
/// Both sides of an edge count a request when its response has ended, the one a moment before the other.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);

/// What the demo should do.
pub struct Options {
    /// None: until a signal.
    pub duration: Option<Duration>,
    /// Where traces go: `http://host:port` of an OTLP collector over gRPC.
    pub otlp: Option<String>,
    /// Requests a second.
    pub rate: NonZeroU32,
    /// Where the sidecars' whole log lines go.
    pub logs: Logs,
    pub show: Show,
    /// The first one ends the demo in order, a further one at once.
    pub signals: Option<Signals>,
}

impl Default for Options {
    fn default() -> Options {
        Options { duration: None, otlp: None, rate: RATE, logs: Logs::nowhere(), show: Show::Nothing, signals: None }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// From the first listener to the first request.
    pub startup: Duration,
    /// From the first request to the last.
    pub duration: Duration,
    pub answered: u64,
    pub failed: u64,
    /// One per edge: load to web, web to catalog, web to ledger.
    pub rows: Vec<Row>,
    /// Empty when the mesh kept its promise.
    pub faults: Vec<Fault>,
    /// It was ended by a signal.
    pub interrupted: bool,
}

/// Why there was no demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error("the temporary directory: {0}; TMPDIR chooses another place")]
    Directory(std::io::Error),
    #[error("cannot listen on loopback: {0}")]
    Listen(std::io::Error),
    #[error("the control plane did not start: {0}")]
    ControlPlane(#[from] StartError),
    #[error("no join token: {0}")]
    Token(#[from] token::CreateError),
    #[error("the sidecar of {name} did not start: {source:#}")]
    Sidecar { name: &'static str, source: anyhow::Error },
    #[error("the sidecar of {sidecar} has no listener {listener}")]
    NoListener { sidecar: &'static str, listener: String },
    #[error("the sidecar of {name} did not become ready: {why}")]
    NotReady { name: &'static str, why: String },
    #[error("{0}")]
    Name(String),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("ended by a signal before it had begun")]
    Interrupted,
}

pub(crate) fn command(args: &Args) -> ExitCode {
    let settings = logging::Settings { level: args.log_level.clone(), ..logging::Settings::default() };
    let logs = match logging::start(&settings) {
        Ok(logs) => logs,
        Err(error) => return fail(&error),
    };
    let code = match crate::status::run(async {
        let signals = Signals::listen().map_err(DemoError::Listen)?;
        if let Some(endpoint) = &args.otlp {
            warn_of_absent(endpoint).await;
        }
        run(Options {
            duration: args.duration,
            otlp: args.otlp.clone(),
            logs: logs.clone(),
            show: Show::on_stdout(),
            signals: Some(signals),
            ..Options::default()
        })
        .await
    }) {
        Ok(Ok(report)) => judgement(&report),
        Ok(Err(DemoError::Interrupted)) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(&error),
        Err(error) => fail(&error),
    };
    logs.flush(SECOND);
    code
}

/// A collector that is not there is no reason not to begin: it may come later.
async fn warn_of_absent(endpoint: &str) {
    let address = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let connecting = tokio::time::timeout(SECOND, tokio::net::TcpStream::connect(address));
    let why = match connecting.await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {SECOND:?}"),
    };
    stdout::complain(&format!(
        "outrigger demo: nobody takes traces at {endpoint} ({why}): they are dropped until a collector listens there"
    ));
}

fn judgement(report: &Report) -> ExitCode {
    for fault in &report.faults {
        stdout::complain(&format!("outrigger demo: {fault}"));
    }
    if report.faults.is_empty() || report.interrupted { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    stdout::complain(&format!("outrigger demo: {error}"));
    ExitCode::FAILURE
}

/// Starts the mesh, sends traffic for as long as `options` say, ends everything and judges what was seen. Must run on
/// a tokio runtime with time and I/O.
pub async fn run(mut options: Options) -> Result<Report, DemoError> {
    let mut signals = options.signals.take();
    let began = Instant::now();
    let mesh = tokio::select! {
        mesh = Mesh::start(&options) => mesh?,
        () = signal(&mut signals) => return Err(DemoError::Interrupted),
    };
    let mut screen = Screen::new(options.show);
    let watched = watch(mesh, &options, &mut signals, &mut screen, began).await;
    let (mesh, seen) = match watched {
        (mesh, Ok(seen)) => (mesh, seen),
        (mesh, Err(error)) => {
            mesh.end().await?;
            return Err(error);
        }
    };
    // Dropped, the mesh ends at once.
    tokio::select! {
        ended = mesh.end() => ended?,
        () = signal(&mut signals) => {}
    }
    let report = seen.report();
    screen.end(&report);
    Ok(report)
}

/// The next one; never without signals.
async fn signal(signals: &mut Option<Signals>) {
    match signals {
        Some(signals) => {
            signals.next().await;
        }
        None => std::future::pending().await,
    }
}

/// Everything that the report is made from.
struct Seen {
    startup: Duration,
    first: Sample,
    last: Sample,
    load: services::Report,
    intrusions: Vec<verdict::Intrusion>,
    interrupted: bool,
}

impl Seen {
    fn report(&self) -> Report {
        let facts = Facts {
            load: &self.load,
            edges: &self.last.edges,
            intrusions: &self.intrusions,
            served_to_nobody: self.last.served_to_nobody,
        };
        Report {
            startup: self.startup,
            duration: self.last.at.duration_since(self.first.at),
            answered: self.load.ok,
            failed: self.load.failed,
            rows: screen::rows(&self.first, &self.last),
            faults: verdict(&facts),
            interrupted: self.interrupted,
        }
    }
}

/// The time of the demo in which something is to be seen. Gives the mesh back to be ended, whatever happened.
async fn watch(
    mut mesh: Mesh,
    options: &Options,
    signals: &mut Option<Signals>,
    screen: &mut Screen,
    began: Instant,
) -> (Mesh, Result<Seen, DemoError>) {
    let seen = observe(&mut mesh, options, signals, screen, began).await;
    (mesh, seen)
}

async fn observe(
    mesh: &mut Mesh,
    options: &Options,
    signals: &mut Option<Signals>,
    screen: &mut Screen,
    began: Instant,
) -> Result<Seen, DemoError> {
    let mut intrusions = Vec::new();
    for (service, address) in mesh.inbound().collect::<Vec<_>>() {
        intrusions.push(intrude::intrude(service, address).await);
    }
    let first = scrape::sample(&mesh.sidecars).await?;
    mesh.begin_load(options.rate);
    let startup = began.elapsed();
    screen.begin(mesh, options, startup, &first);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + SECOND, SECOND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let end = async {
        match options.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let mut end = std::pin::pin!(end);
    let interrupted = loop {
        tokio::select! {
            () = &mut end => break false,
            () = signal(signals) => break true,
            _ = ticks.tick() => screen.show(scrape::sample(&mesh.sidecars).await?, &mesh.tally.report()),
        }
    };
    tokio::select! {
        () = mesh.end_load() => {}
        () = signal(signals) => {}
    }
    let last = settled(mesh).await?;
    let load = mesh.tally.report();
    Ok(Seen { startup, first, last, load, intrusions, interrupted })
}

/// The last look: when both sides of every edge have counted the same, or have had the time to.
async fn settled(mesh: &Mesh) -> Result<Sample, DemoError> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let sample = scrape::sample(&mesh.sidecars).await?;
        if sample.agrees() || Instant::now() > deadline {
            return Ok(sample);
        }
        tokio::time::sleep(SETTLE_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_or_a_duration() {
        assert_eq!(how_long("10"), Ok(Duration::from_secs(10)));
        assert_eq!(how_long("1m30s"), Ok(Duration::from_secs(90)));
        for wrong in ["0", "10ms", "-1", "soon", ""] {
            assert!(how_long(wrong).is_err(), "{wrong}");
        }
    }
}
