//! `outrigger-sidecar run ...`. Everything is in the library, which the `outrigger` command links too.

use std::process::ExitCode;

fn main() -> ExitCode {
    outrigger_sidecar::app::process::main("outrigger-sidecar", std::env::args_os().skip(1))
}
