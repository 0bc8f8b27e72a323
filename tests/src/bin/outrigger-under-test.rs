//! The `outrigger` binary as tests of this package run it: cargo builds it with them and tells them where it is.

use std::process::ExitCode;

fn main() -> ExitCode {
    outrigger::command::main(std::env::args_os().skip(1), std::env::vars_os())
}
