//! Settings of a process: a YAML file < environment variables < flags, for any command whose arguments derive
//! [`clap::Args`]. Both binaries and the `outrigger` command parse through here, so that all of them report every
//! mistake at once, each with key, value and where it came from. Argument lines and variables are inputs; the only
//! thing read here is the file that `--settings` names. Life of a setting:
//!
//! spelled in a layer -> checked by its clap parser, in each layer -> the highest layer that has it wins -> the
//! command's own checks, which may add mistakes that concern several settings.

mod file;
mod layers;
mod mistake;

pub use layers::{OUTSIDE_VARIABLES, VARIABLE_PREFIX};
pub use mistake::{Mistake, Mistakes, Origin, UsageError, nearest};

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use layers::Layers;

/// Why there is no parsed command line: not always a mistake.
#[derive(Debug)]
pub enum Stop {
    /// `--help` or `--version` was asked for: the text for stdout.
    Said(String),
    Usage(UsageError),
}

impl Stop {
    /// Writes it where it belongs and gives the exit code: 0, or 2 for mistakes.
    pub fn report(&self) -> ExitCode {
        match self {
            Stop::Said(text) => {
                crate::stdout::say(text);
                ExitCode::SUCCESS
            }
            Stop::Usage(error) => {
                crate::stdout::complain(&error.to_string());
                ExitCode::from(2)
            }
        }
    }
}

/// Parses what stands behind the command `name` (as in `outrigger-sidecar run`) on its line, with the process's
/// variables. Flags must have long names; there are no positional arguments. A variable is named after its flag
/// (`OUTRIGGER_ADMIN_LISTEN`), a list in it is divided by commas; so is a key of the file, where lists are lists.
pub fn parse<A: clap::Args>(
    name: &'static str,
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<A, Stop> {
    parse_checked(name, argv, environment, |args: A, _| Some(args))
}

/// Like [`parse`], then lets `check` turn the arguments into what the program works with and add its own mistakes.
/// `check` is called even when others were found, without the values that were mistaken, so that one run reports all;
/// an argument may be `required` and yet an `Option` to make that possible.
pub fn parse_checked<A: clap::Args, C>(
    name: &'static str,
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    check: impl FnOnce(A, &mut Mistakes) -> Option<C>,
) -> Result<C, Stop> {
    parse_with(name, argv, environment, |path| std::fs::read_to_string(path), check)
}

/// The same without I/O: `read` answers with the text of the settings file.
pub fn parse_with<A: clap::Args, C>(
    name: &'static str,
    argv: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    read: impl FnOnce(&Path) -> std::io::Result<String>,
    check: impl FnOnce(A, &mut Mistakes) -> Option<C>,
) -> Result<C, Stop> {
    let command = command::<A>(name);
    let mut mistakes = Mistakes::default();
    let mut layers = Layers::new(&command, &mut mistakes);
    match layers.flags(argv) {
        Some(layers::Asked::Help) => return Err(Stop::Said(command.clone().render_help().to_string())),
        Some(layers::Asked::Version) => return Err(Stop::Said(command.render_version())),
        None => {}
    }
    layers.variables(environment);
    layers.file(read);
    let matches = layers.resolve();
    let args = matches.and_then(|matches| match A::from_arg_matches(&matches) {
        Ok(args) => Some(args),
        Err(error) => {
            mistakes.general_unless_any(&error);
            None
        }
    });
    let checked = args.and_then(|args| check(args, &mut mistakes));
    match checked {
        Some(checked) if mistakes.is_empty() => Ok(checked),
        _ => Err(Stop::Usage(mistakes.into_error(name))),
    }
}

/// The command as clap knows it, for help and completions.
pub fn command<A: clap::Args>(name: &'static str) -> clap::Command {
    A::augment_args(clap::Command::new(name).bin_name(name).version(env!("CARGO_PKG_VERSION")))
        .arg(
            clap::Arg::new(layers::SETTINGS)
                .long(layers::SETTINGS)
                .value_name("FILE")
                .value_parser(clap::value_parser!(std::path::PathBuf))
                .help("YAML file with settings: keys are the names of the flags"),
        )
        .after_help(
            "Each flag is also an environment variable (--admin-listen: OUTRIGGER_ADMIN_LISTEN, lists divided by \
             commas) and a key of the settings file (admin-listen: ...). A flag wins over the variable, the variable \
             over the file.",
        )
}

#[cfg(test)]
mod tests;
