//! `outrigger COMMAND ...`: which command was asked for, its flags, its help. Called by `main` alone. The sidecar and
//! the control plane parse their own flags: what stands behind their names goes to them as it is.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use outrigger_runtime::stdout;

use crate::{bench, convert, demo, explain, policy_report, policy_test, stat, status, token, validate};

/// Mistakes on the command line, as in every command of this project.
const USAGE: u8 = 2;

const FIRST_STEPS: &str = "\
First thing to try:
  outrigger demo             a mesh in one process: no root, no cluster, nothing to clean up

`outrigger COMMAND --help` shows a command's flags.";

#[derive(Parser)]
#[command(
    name = "outrigger",
    bin_name = "outrigger",
    version,
    about = "Outrigger is a service mesh: mutual TLS, policy and telemetry for your services, from a sidecar beside each",
    after_help = FIRST_STEPS,
    subcommand_required = true,
    disable_help_subcommand = true
)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole mesh with three services and watch it: mutual TLS, rates, latency
    Demo(demo::Args),
    /// Make the join token with which a new sidecar gets its first certificate
    #[command(subcommand)]
    Token(Token),
    /// Check YAML as a control plane would, without one
    Validate(Paths),
    /// Rewrite documents of Istio and Linkerd into this mesh's kinds, and say what could not be
    Convert(Converted),
    /// Say what would happen to a request or connection, by which policy, and what to do about it
    Explain(explain::Args),
    /// Run the PolicyTest documents of a configuration
    Test(policy_test::Args),
    /// Show what policies in Shadow mode would refuse
    #[command(subcommand)]
    Policy(Policy),
    /// Show who is connected to the control plane, and what is wrong
    Status(status::Args),
    /// Show requests/s, success and latency per edge of the mesh
    Stat(stat::Args),
    /// Compare a pair of sidecars with no proxy and with a pair of nginx
    #[command(disable_help_flag = true)]
    Bench(Rest),
    /// Run a sidecar, as `outrigger-sidecar` does; see `outrigger sidecar run --help`
    #[command(disable_help_flag = true)]
    Sidecar(Rest),
    /// Run a control plane, as `outrigger-control-plane` does
    #[command(disable_help_flag = true)]
    ControlPlane(Rest),
}

#[derive(Subcommand)]
enum Policy {
    /// Show what policies in Shadow mode would have refused, by caller, and what to do next
    Report(policy_report::Args),
}

#[derive(Subcommand)]
enum Token {
    /// Print a join token, alone on stdout
    Create(token::Args),
}

#[derive(clap::Args)]
#[command(
    after_help = "Reads VirtualService, DestinationRule and ServiceEntry of Istio and Server, AuthorizationPolicy and \
                        authentications of Linkerd; other documents pass as they are. What could not be rewritten is told on \
                        stderr. Ends with 0 when all was, 1 when something was not, 2 when a file cannot be read."
)]
struct Converted {
    /// Files; - is stdin. The result goes to stdout
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(clap::Args)]
#[command(
    after_help = "Errors go to stderr as FILE:LINE:COL: message. Ends with 0 when all is valid, 1 when something \
                        is not, 2 when a path cannot be read."
)]
struct Paths {
    /// Files, or a directory as for the control plane's --config; all are checked together
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Flags of a command that parses them itself.
#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
    rest: Vec<OsString>,
}

/// Runs what `argv` (without the program's name) asks for. Exit codes: 0 done, 1 it failed, 2 the line is wrong.
pub fn main(
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let mut argv: Vec<OsString> = argv.into_iter().collect();
    if argv.is_empty() {
        argv.push("--help".into());
    }
    let first = argv[0].to_str().unwrap_or_default();
    if let Some(later) = later(first) {
        stdout::complain(later);
        return ExitCode::from(USAGE);
    }
    // Before clap, which would take some of the flags for its own.
    match first {
        "bench" => return bench::main(argv.split_off(1).into_iter()),
        "sidecar" => return sidecar(argv.split_off(1)),
        "control-plane" => return control_plane(argv.split_off(1), environment),
        _ => {}
    }
    let line = match Line::try_parse_from(std::iter::once("outrigger".into()).chain(argv)) {
        Ok(line) => line,
        Err(said) => {
            // To stdout for help and version, to stderr for mistakes; a closed pipe is no reason to complain.
            let _ = said.print();
            return if said.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match line.command {
        Command::Demo(args) => demo::command(&args),
        Command::Token(Token::Create(args)) => token::command(&args),
        Command::Validate(Paths { paths }) => ExitCode::from(validate::validate(&paths)),
        Command::Convert(Converted { files }) => ExitCode::from(convert::convert(&files)),
        Command::Explain(args) => explain::command(&args),
        Command::Test(args) => policy_test::command(&args),
        Command::Policy(Policy::Report(args)) => policy_report::command(&args),
        Command::Status(args) => status::command(&args),
        Command::Stat(args) => stat::command(&args),
        Command::Bench(Rest { rest }) => bench::main(rest.into_iter()),
        Command::Sidecar(Rest { rest }) => sidecar(rest),
        Command::ControlPlane(Rest { rest }) => control_plane(rest, environment),
    }
}

fn sidecar(rest: Vec<OsString>) -> ExitCode {
    outrigger_sidecar::app::process::main("outrigger sidecar", rest)
}

fn control_plane(rest: Vec<OsString>, environment: impl IntoIterator<Item = (OsString, OsString)>) -> ExitCode {
    outrigger_control_plane::app::command("outrigger control-plane", rest, environment)
}

/// Commands that the documentation promises for later versions.
fn later(command: &str) -> Option<&'static str> {
    match command {
        "check" => Some(
            "outrigger: `check` is not in this version; `outrigger status` shows who is connected and what is wrong",
        ),
        _ => None,
    }
}
