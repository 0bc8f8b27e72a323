//! The binary `outrigger-control-plane`: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    outrigger_control_plane::app::command("outrigger-control-plane", std::env::args_os().skip(1), std::env::vars_os())
}
