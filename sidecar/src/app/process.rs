//! A sidecar as a process: command line, logs, signals, stdout, exit code. Called by `outrigger-sidecar` and by
//! `outrigger sidecar`.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;

use outrigger_runtime::logging::{self, Logs};
use outrigger_runtime::ownership::{self, Exposed};
use outrigger_runtime::signals::{Signal, Signals};
use outrigger_runtime::{open_files, stdout};

use super::Sidecar;
use crate::config::{Config, Limits};
use crate::redirect;

/// Runs `sidecar COMMAND ...`; `argv` begins with the command.
pub fn main(program: &'static str, argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut argv = argv.into_iter();
    let command = argv.next();
    match command.as_ref().and_then(|command| command.to_str()) {
        Some("run") => run(argv),
        Some("redirect") => redirect::main(program, argv, std::env::vars_os()),
        Some("--version" | "-V") => {
            stdout::say(&format!("{program} {}\n", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        Some("--help" | "-h") => {
            stdout::say(&usage(program));
            ExitCode::SUCCESS
        }
        _ => {
            stdout::complain(&usage(program));
            ExitCode::from(2)
        }
    }
}

fn usage(program: &str) -> String {
    format!(
        "usage: {program} run [FLAGS]\n       {program} redirect apply|print|check|remove [FLAGS]\n\n`{program} run --help` \
         and `{program} redirect --help` tell more.\n"
    )
}

fn run(argv: impl Iterator<Item = OsString>) -> ExitCode {
    let environment = redirect::variables_of_run(std::env::vars_os());
    let config = match Config::from_command_line("outrigger-sidecar run", argv, environment) {
        Ok(config) => config,
        Err(stop) => return stop.report(),
    };
    if let Some(state) = &config.state
        && let Err(error) = private(state)
    {
        stdout::complain(&format!("outrigger-sidecar: --state: {error}\n"));
        return ExitCode::from(2);
    }
    let logs = match logging::start(&config.log) {
        Ok(logs) => logs,
        Err(error) => {
            stdout::complain(&format!("outrigger-sidecar: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    let code = match serve(config, logs.clone()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    };
    logs.flush(std::time::Duration::from_secs(1));
    code
}

/// Makes the state directory when it is absent, readable by this user alone. What cannot be made is told when something is
/// to be written there; what another user can change is not used at all.
fn private(state: &Path) -> Result<(), Exposed> {
    let _ = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
    ownership::check(state, &[])
}

fn serve(config: Config, logs: Logs) -> anyhow::Result<()> {
    let limits = match open_files::raise() {
        Ok(files) => Limits::default().with_open_files(files),
        Err(error) => {
            tracing::warn!(%error, "the limit of open files cannot be read");
            Limits::default()
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let sidecar = Sidecar::start(config, limits, logs)?;
        for (name, address) in sidecar.listening() {
            stdout::listening(name, address);
        }
        let readiness = sidecar.readiness().clone();
        tokio::spawn(async move {
            readiness.reached().await;
            stdout::ready();
        });
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    // Nothing is read from files but the token and the trust bundle, which are read anew at each try.
                    Signal::Reload => tracing::info!("nothing to read again; the join token and the trust bundle are read at each use"),
                    Signal::Drain => break,
                    Signal::End => return Ok(()),
                },
                () = sidecar.asked_to_quit() => break,
                // What started this process starts it again; half a sidecar would only look alive.
                thread = sidecar.broken() => anyhow::bail!("the thread {thread} ended; the log says why"),
            }
        }
        tracing::info!("draining");
        let at_once = async { while signals.next().await == Signal::Reload {} };
        let cut = tokio::select! {
            cut = sidecar.drain() => cut,
            () = at_once => 0,
        };
        if cut > 0 {
            tracing::warn!(connections = cut, "ended before these were finished");
        }
        sidecar.stop();
        Ok(())
    })
}
