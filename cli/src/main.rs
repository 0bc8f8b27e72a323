//! `outrigger ...`. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    outrigger::command::main(std::env::args_os().skip(1), std::env::vars_os())
}
