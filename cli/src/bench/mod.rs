//! `outrigger bench`: the same load through nothing, through a pair of sidecars with mutual TLS and, where nginx is
//! installed, through a pair of nginx with mutual TLS; or, with `--tcp`, a download of bytes that nobody parses, against a
//! pair of haproxy. The contenders take turns in one run, so that each number is a
//! ratio to the others of the same minutes on the same machine. Everything runs on loopback, is bounded in count and
//! time, and ends with this process.

mod bulk;
mod child;
mod haproxy;
mod histogram;
mod idle;
mod load;
mod mesh;
mod nginx;
mod open;
mod policies;
mod report;
mod rounds;
mod serve;
mod streams;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use outrigger_runtime::stdout;

/// Compares the cost of a pair of sidecars with no proxy and with a pair of nginx
#[derive(Parser, Clone, Debug)]
#[command(name = "outrigger bench")]
pub struct Settings {
    /// Requests of the closed loop, per contender and round
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    requests: u64,
    /// Connections of the load
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=512))]
    connections: u16,
    /// How often the contenders take turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Length of the open loop, per contender and round; 0 leaves it out
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(0..=600))]
    seconds: u64,
    /// Requests per second of the open loop
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    rate: u32,
    /// Idle connections whose memory is measured; 0 leaves it out
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(0..=5_000))]
    idle: u16,
    /// Measure HTTP/2 as well (closed loop, without nginx, which cannot speak it to an upstream)
    #[arg(long)]
    http2: bool,
    /// Measure a download of opaque bytes instead, where haproxy is installed against a pair of it in TCP mode with
    /// mutual TLS
    #[arg(long)]
    tcp: bool,
    /// Measure in this process what a decision costs with 10, 100 and 1,000 rules in force instead
    #[arg(long, conflicts_with = "tcp")]
    policies: bool,
    /// What is downloaded with --tcp, in MiB, per contender and round
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    mib: u32,
    /// Leave nginx out although it is installed
    #[arg(long)]
    no_nginx: bool,
    /// Leave it to the kernel on which processors what runs. Otherwise, where there are two, the proxies share one and
    /// the load and the application the other
    #[arg(long)]
    no_pin: bool,
    /// Start each sidecar with these words in front, `{}` being its name: a profiler, say
    #[arg(long, value_name = "COMMAND", hide = true)]
    wrap: Option<String>,
    /// Also write the numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs `bench ...`; `argv` is what stands behind that word.
pub fn main(argv: impl Iterator<Item = OsString>) -> ExitCode {
    let argv: Vec<OsString> = argv.collect();
    let hidden = argv.first().and_then(|word| word.to_str()).unwrap_or_default();
    let outcome = match hidden {
        "load" => parse(&argv).and_then(|settings: load::Settings| ended(load::run(&settings))),
        "serve" => ended(serve::run()),
        _ => parse(&argv).and_then(|settings: Settings| {
            ended(if settings.policies { policies::run() } else { rounds::run(&settings) })
        }),
    };
    outcome.err().unwrap_or(ExitCode::SUCCESS)
}

fn parse<S: Parser>(argv: &[OsString]) -> Result<S, ExitCode> {
    let hidden = argv.first().is_some_and(|word| word == "load");
    let name = std::iter::once(OsString::from("outrigger bench"));
    S::try_parse_from(name.chain(argv.iter().skip(usize::from(hidden)).cloned())).map_err(|error| {
        let asked = error.exit_code() == 0;
        if asked {
            stdout::say(&error.to_string())
        } else {
            stdout::complain(&error.to_string())
        }
        ExitCode::from(if asked { 0 } else { 2 })
    })
}

fn ended(outcome: anyhow::Result<()>) -> Result<(), ExitCode> {
    outcome.map_err(|error| {
        stdout::complain(&format!("outrigger bench: {error:#}"));
        ExitCode::FAILURE
    })
}
