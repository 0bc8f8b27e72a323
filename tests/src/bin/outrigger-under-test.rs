//! The `outrigger` binary as tests of this package run it: cargo builds it with them and tells them where it is.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_ref().and_then(|first| first.to_str()) {
        Some("sidecar") => outrigger_sidecar::app::process::main("outrigger-sidecar", arguments),
        Some("control-plane") => {
            outrigger_control_plane::app::command("outrigger control-plane", arguments, std::env::vars_os())
        }
        _ => ExitCode::from(2),
    }
}
