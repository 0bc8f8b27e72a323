//! Logs of a process: `tracing` events as text or JSON on stderr, and lines that others have already formatted (the
//! access log). `main` starts it once; everybody else holds a [`Logs`]. Logging never waits for stderr: see `writer`. An
//! event is one line whatever stands in it; what strangers cause goes through a [`Throttle`].

mod throttle;
mod writer;

pub use throttle::{Admitted, Throttle};
pub use writer::escape_json;

use std::fmt;
use std::io;
use std::time::Duration;

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt as format, reload};

use writer::Lines;

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// `--log-level` and `--log-format`, to be flattened into a command's arguments.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Settings {
    /// Level, or levels by target: info,outrigger_sidecar=debug
    #[arg(long = "log-level", value_name = "LEVEL", default_value = "info", value_parser = parse_level)]
    pub level: String,
    /// Shape of log lines on stderr
    #[arg(long = "log-format", value_name = "FORMAT", default_value = "text")]
    pub format: Format,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { level: "info".to_owned(), format: Format::Text }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("{0:?} is not a log level: expected off, error, warn, info, debug or trace, or a list of TARGET=LEVEL")]
    Level(String),
    #[error("the thread that writes logs cannot be started: {0}")]
    Thread(io::Error),
    #[error("logging was started twice in one process")]
    Twice,
}

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Checks filter directives. The filter itself would take a misspelt level for the name of a target and log nothing.
pub fn parse_level(text: &str) -> Result<String, LoggingError> {
    let wrong = || LoggingError::Level(text.to_owned());
    let is_level = |word: &str| LEVELS.contains(&word.to_ascii_lowercase().as_str());
    let is_target = |word: &str| {
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':' | b'-'))
    };
    for directive in text.split(',') {
        let right = match directive.split_once('=') {
            None => is_level(directive),
            Some((target, level)) => is_target(target) && is_level(level),
        };
        if !right {
            return Err(wrong());
        }
    }
    EnvFilter::try_new(text).map_err(|_| wrong())?;
    Ok(text.to_owned())
}

/// A hold on the process's logs; cheap to clone, the same for all threads.
#[derive(Clone)]
pub struct Logs {
    filter: Option<reload::Handle<EnvFilter, Registry>>,
    lines: Lines,
}

/// Starts logging for the process. Ends the last lines with [`Logs::flush`] before exit.
pub fn start(settings: &Settings) -> Result<Logs, LoggingError> {
    let level = parse_level(&settings.level)?;
    let json = settings.format == Format::Json;
    let lines = Lines::start(io::stderr(), json).map_err(LoggingError::Thread)?;
    let (filter, handle) = reload::Layer::new(EnvFilter::new(level));
    tracing_subscriber::registry()
        .with(filter)
        .with(layer(lines.clone(), json))
        .try_init()
        .map_err(|_| LoggingError::Twice)?;
    Ok(Logs { filter: Some(handle), lines })
}

fn layer<S>(lines: Lines, json: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let plain = format::layer().with_writer(lines).with_ansi(false);
    if json { plain.json().flatten_event(true).with_span_list(false).boxed() } else { plain.boxed() }
}

impl Logs {
    /// For tests and for parts that run without a log: whole lines are dropped, levels are accepted.
    pub fn nowhere() -> Logs {
        Logs { filter: None, lines: Lines::nowhere() }
    }

    /// Other levels from now on; for `/log-level`.
    pub fn set_level(&self, text: &str) -> Result<(), LoggingError> {
        let level = parse_level(text)?;
        if let Some(filter) = &self.filter {
            // The only failure is a subscriber that is gone, which then logs nothing at any level.
            let _ = filter.reload(EnvFilter::new(level));
        }
        Ok(())
    }

    /// The levels in force.
    pub fn level(&self) -> String {
        let current = self.filter.as_ref().and_then(|filter| filter.with_current(ToString::to_string).ok());
        current.unwrap_or_else(|| "off".to_owned())
    }

    /// Writes one line as it is, without the line end; for logs with a format of their own.
    pub fn line(&self, line: impl Into<Vec<u8>>) {
        self.lines.push(line.into());
    }

    /// Lines dropped so far because stderr did not take them fast enough.
    pub fn dropped(&self) -> u64 {
        self.lines.dropped()
    }

    /// Waits until what was logged is written, at most this long: before the process exits.
    pub fn flush(&self, longest: Duration) {
        self.lines.flush(longest);
    }
}

impl fmt::Debug for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logs").field("level", &self.level()).field("dropped", &self.dropped()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn levels_are_checked() {
        for text in ["info", "INFO", "off", "debug,hyper=warn", "outrigger_sidecar::tls=trace,info", "a-b=info"] {
            assert_eq!(parse_level(text).unwrap(), text);
        }
        for text in ["", "inof", "info,", "hyper", "=info", "hyper=", "hyper=loud", "hyper[x]=info", "a b=info", "5"] {
            assert!(parse_level(text).is_err(), "{text:?}");
        }
    }

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_and_foreign_lines_share_the_writer_and_levels_change() {
        let captured = Captured::default();
        let lines = Lines::start(captured.clone(), true).unwrap();
        let (filter, handle) = reload::Layer::new(EnvFilter::new("info"));
        let logs = Logs { filter: Some(handle), lines: lines.clone() };
        let subscriber = tracing_subscriber::registry().with(filter).with(layer(lines, true));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(port = 80, "first");
            tracing::debug!("hidden");
            logs.set_level("debug").unwrap();
            tracing::debug!("second");
            logs.line("{\"access\":true}");
            assert_eq!(logs.level(), "debug");
        });
        assert!(logs.set_level("loud").is_err());
        logs.flush(Duration::from_secs(10));
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        let parsed: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(parsed.len(), 3, "{text}");
        assert_eq!((&parsed[0]["message"], &parsed[0]["port"]), (&"first".into(), &80.into()));
        assert_eq!(parsed[1]["message"], "second");
        assert_eq!(parsed[2]["access"], true);
    }
}
