//! `redirect apply|print|check|remove`: which was asked for, its flags, its exit code. Called by `app::process`.
//! Exit codes: 0 done, 1 it failed, 2 the line is wrong; those of `check` are in `check`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args as _;
use outrigger_runtime::settings::{self, Stop, VARIABLE_PREFIX};
use outrigger_runtime::stdout;

use super::args::{Args, PrintArgs};
use super::{INBOUND_PORT, OUTBOUND_PORT, RESOLVER_PORT, Rules, apply, check, iptables, nft};
use crate::config;

const VERBS: &str = "
  apply    put the rules in force, instead of those that are there; needs NET_ADMIN
  print    show what apply would do; with --iptables a script for machines without nftables
  check    see whether they work: 0 yes, 3 rules absent, 4 sidecar absent, 5 they do not fit
  remove   take away what apply did";

type Variables = Vec<(OsString, OsString)>;

/// Runs `redirect VERB ...`; `argv` begins with the verb, `program` is what stood before `redirect`.
pub fn main(
    program: &str,
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let mut argv = argv.into_iter();
    let verb = argv.next();
    let environment = variables(environment, Verb::Redirect);
    let rules = |name, argv| rules(name, argv, environment.clone());
    let done = match verb.as_ref().and_then(|verb| verb.to_str()) {
        Some("apply") => rules("outrigger-sidecar redirect apply", argv).map(|rules| {
            let names = if rules.dns { format!(", questions about names to {RESOLVER_PORT}") } else { String::new() };
            let back = if rules.keep_source_address { ", answers to clients' addresses to the sidecar" } else { "" };
            let said = format!(
                "applied: outbound TCP goes to {OUTBOUND_PORT}, inbound TCP to {INBOUND_PORT}{names}{back} (nftables, table {}); \
                 `{program} redirect check` asks whether a sidecar answers",
                nft::TABLE
            );
            told(program, apply::apply(&rules), &said)
        }),
        Some("remove") => rules("outrigger-sidecar redirect remove", argv)
            .map(|_| told(program, apply::remove(), &format!("removed: table {} of nftables", nft::TABLE))),
        Some("print") => print(argv, environment.clone()),
        Some("check") => rules("outrigger-sidecar redirect check", argv).map(|_| checked(program)),
        Some("--help" | "-h") => {
            stdout::say(&usage(program));
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            stdout::complain(&usage(program));
            Ok(ExitCode::from(2))
        }
    };
    done.unwrap_or_else(|stop| stop.report())
}

fn usage(program: &str) -> String {
    format!("usage: {program} redirect VERB [FLAGS]\n{VERBS}\n\n`{program} redirect apply --help` lists the flags.\n")
}

fn rules(name: &'static str, argv: impl Iterator<Item = OsString>, environment: Variables) -> Result<Rules, Stop> {
    settings::parse_checked(name, argv, environment, |args: Args, mistakes| args.check(mistakes))
}

fn print(argv: impl Iterator<Item = OsString>, environment: Variables) -> Result<ExitCode, Stop> {
    let name = "outrigger-sidecar redirect print";
    let text = settings::parse_checked(name, argv, environment, |args: PrintArgs, mistakes| {
        let script = if args.iptables { iptables::script } else { nft::script };
        args.rules.check(mistakes).map(|rules| script(&rules))
    })?;
    stdout::say(&text);
    Ok(ExitCode::SUCCESS)
}

fn told(program: &str, done: Result<(), apply::Error>, said: &str) -> ExitCode {
    match done {
        Ok(()) => {
            stdout::say(said);
            ExitCode::SUCCESS
        }
        Err(error) => {
            stdout::complain(&format!("{program} redirect: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn checked(program: &str) -> ExitCode {
    match check::check() {
        Ok(report) => {
            stdout::say(&report.to_string());
            ExitCode::from(report.code())
        }
        Err(error) => {
            stdout::complain(&format!("{program} redirect check: cannot ask on loopback: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Which of the two verbs that share an environment reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Run,
    Redirect,
}

/// The variables of a process that runs a sidecar, without those that are settings of `redirect` alone: one pod has one
/// environment for the container that applies the rules and for the sidecar.
pub fn variables_of_run(environment: impl IntoIterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    variables(environment, Verb::Run)
}

/// The variables without those that are settings of the other verb alone. `--mark` belongs to both.
fn variables(environment: impl IntoIterator<Item = (OsString, OsString)>, verb: Verb) -> Variables {
    let redirect = names(PrintArgs::augment_args(clap::Command::new("redirect")));
    let mut run = names(config::Args::augment_args(clap::Command::new("run")));
    // The file that it names is the sidecar's.
    run.insert(format!("{VARIABLE_PREFIX}SETTINGS"));
    let (own, others) = if verb == Verb::Run { (run, redirect) } else { (redirect, run) };
    environment
        .into_iter()
        .filter(|(name, _)| name.to_str().is_none_or(|name| own.contains(name) || !others.contains(name)))
        .collect()
}

fn names(command: clap::Command) -> BTreeSet<String> {
    let longs = command.get_arguments().filter_map(|arg| arg.get_long());
    longs.map(|long| format!("{VARIABLE_PREFIX}{}", long.replace('-', "_").to_ascii_uppercase())).collect()
}
