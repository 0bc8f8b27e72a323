//! Logs of a process.

/// How to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// `--log-level` and `--log-format`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Filter directives, as in `info,outrigger_sidecar=debug`.
    pub level: String,
    pub format: Format,
}
