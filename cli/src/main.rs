//! The binary `outrigger`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut argv = std::env::args_os().skip(1);
    match argv.next().as_ref().and_then(|word| word.to_str()) {
        Some("bench") => outrigger::bench::main(argv),
        Some("sidecar") => outrigger_sidecar::app::process::main("outrigger sidecar", argv),
        Some("control-plane") => {
            outrigger_control_plane::app::command("outrigger control-plane", argv, std::env::vars_os())
        }
        _ => ExitCode::from(2),
    }
}
