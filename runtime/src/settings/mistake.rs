//! What is wrong with settings: every mistake with its key, its value and where it came from. Collected, never thrown
//! one by one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;

/// Where a setting was spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Variable,
    /// With the line of the key, where it was found.
    File(PathBuf, Option<usize>),
    /// Nobody spelled it.
    Nowhere,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// As spelled in its origin: `--workers`, `OUTRIGGER_WORKERS`, `workers`.
    pub key: String,
    pub value: Option<String>,
    pub origin: Origin,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let divider = if matches!(self.origin, Origin::File(..)) { ": " } else { "=" };
        f.write_str(&self.key)?;
        if let Some(value) = &self.value {
            write!(f, "{divider}{}", value.escape_debug())?;
        }
        match &self.origin {
            Origin::Flag => f.write_str(" (flag)")?,
            Origin::Variable => f.write_str(" (environment variable)")?,
            Origin::File(path, Some(line)) => write!(f, " ({}, line {line})", path.display())?,
            Origin::File(path, None) => write!(f, " ({})", path.display())?,
            Origin::Nowhere => {}
        }
        write!(f, ": {}", self.reason)
    }
}

/// The mistakes found so far, and where each setting in force came from.
#[derive(Debug, Default)]
pub struct Mistakes {
    found: Vec<Mistake>,
    origins: BTreeMap<String, Origin>,
}

impl Mistakes {
    /// Reports a value in force of the flag `long` (without dashes), as spelled wherever it came from. For checks that
    /// need more than one setting; for a value by itself a clap parser is the place.
    pub fn add(&mut self, long: &str, value: impl fmt::Display, reason: impl fmt::Display) {
        let origin = self.origin(long);
        self.push(long, Some(value.to_string()), origin, reason.to_string());
    }

    /// Reports a setting that nobody gave.
    pub fn missing(&mut self, long: &str, reason: impl fmt::Display) {
        self.push(long, None, Origin::Nowhere, reason.to_string());
    }

    /// Where the value in force came from.
    pub fn origin(&self, long: &str) -> Origin {
        self.origins.get(long).cloned().unwrap_or(Origin::Nowhere)
    }

    /// True when the flag was spelled anywhere, rightly or wrongly: what asks "was it given at all?" must not report
    /// as missing what was given and mistaken.
    pub fn was_given(&self, long: &str) -> bool {
        self.origins.contains_key(long)
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn push(&mut self, long: &str, value: Option<String>, origin: Origin, reason: String) {
        let key = match origin {
            Origin::Flag | Origin::Nowhere => format!("--{long}"),
            Origin::Variable => super::layers::variable(long),
            Origin::File(..) => long.to_owned(),
        };
        self.push_spelled(key, value, origin, reason);
    }

    /// For keys that are no setting.
    pub(super) fn push_spelled(&mut self, key: String, value: Option<String>, origin: Origin, reason: String) {
        self.found.push(Mistake { key, value, origin, reason });
    }

    /// Notes where a setting was spelled; called from the lowest layer to the highest.
    pub(super) fn note_origin(&mut self, long: &str, origin: Origin) {
        self.origins.insert(long.to_owned(), origin);
    }

    /// What clap says about several arguments at once, unless more precise mistakes explain it.
    pub(super) fn general_unless_any(&mut self, error: &clap::Error) {
        if self.found.is_empty() {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            let reason = first.strip_prefix("error: ").unwrap_or(first).to_owned();
            self.push_spelled("arguments".to_owned(), None, Origin::Nowhere, reason);
        }
    }

    pub(super) fn into_error(self, command: &'static str) -> UsageError {
        UsageError { command, mistakes: self.found }
    }
}

/// All mistakes of one start; the process ends with exit code 2.
#[derive(Debug)]
pub struct UsageError {
    pub command: &'static str,
    pub mistakes: Vec<Mistake>,
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.mistakes {
            writeln!(f, "error: {mistake}")?;
        }
        write!(f, "See `{} --help`.", self.command)
    }
}

impl std::error::Error for UsageError {}

/// The known word that is fewest edits away from `word`: what somebody probably meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known.into_iter().min_by_key(|known| edits(word, known))
}

/// Levenshtein's distance, one row at a time.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

/// A value for a message, whatever its bytes.
pub(super) fn shown(value: &OsStr) -> String {
    value.to_string_lossy().into_owned()
}
