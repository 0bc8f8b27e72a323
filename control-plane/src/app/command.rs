//! The process `outrigger-control-plane` (and `outrigger control-plane`): flags, logs, signals, stdout lines, exit code.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use outrigger_runtime::logging::{self, Logs};
use outrigger_runtime::signals::{Signal, Signals};
use outrigger_runtime::{open_files, settings, stdout};

use super::{ControlPlane, StartError};
use crate::config::Args;

const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs the control plane: certificate authority, registry and configuration of a mesh
#[derive(Debug, clap::Args)]
struct Line {
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    logging: logging::Settings,
}

/// Runs until SIGTERM or SIGINT. `name` is how the command was called, `argv` what stands behind it.
pub fn command(
    name: &'static str,
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let Line { args, logging } = match settings::parse::<Line>(name, argv, environment) {
        Ok(line) => line,
        Err(stop) => return stop.report(),
    };
    let logs = match logging::start(&logging) {
        Ok(logs) => logs,
        Err(error) => return complain(name, &error, 1),
    };
    if let Err(error) = open_files::raise() {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(name, &error, 1),
    };
    let code = match runtime.block_on(run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(RunError::Start(error)) => complain(name, &error, error.exit_code()),
        Err(error @ (RunError::Signals(_) | RunError::Ended)) => complain(name, &error, 1),
    };
    end(&logs);
    code
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("signals: {0}")]
    Signals(#[from] std::io::Error),
    #[error("a part of the control plane ended before its time; the log says why")]
    Ended,
}

async fn run(args: &Args) -> Result<(), RunError> {
    let mut signals = Signals::listen()?;
    let mut control_plane = ControlPlane::start(args).await?;
    stdout::listening("grpc", control_plane.grpc_address());
    stdout::listening("admin", control_plane.admin_address());
    stdout::ready();
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Reload => control_plane.reload(),
                Signal::Drain => break,
                Signal::End => return Ok(()),
            },
            // What started this process starts it again; without a listener it would only look alive.
            () = control_plane.broken() => return Err(RunError::Ended),
        }
    }
    tokio::select! {
        () = control_plane.shutdown() => {}
        () = second(&mut signals) => {}
    }
    Ok(())
}

/// Resolves when somebody insists.
async fn second(signals: &mut Signals) {
    while signals.next().await != Signal::End {}
}

fn complain(name: &str, error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    stdout::complain(&format!("{name}: {error}"));
    ExitCode::from(code)
}

fn end(logs: &Logs) {
    logs.flush(LAST_LINES);
}
