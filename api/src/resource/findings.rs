//! What the checks of one object find. Each finding names the path that it is about; nothing here knows lines.

use super::path::Path;
use super::position::At;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Severity {
    Error,
    Warning,
}

#[derive(Debug)]
pub(super) struct Finding {
    pub(super) path: Path,
    pub(super) at: At,
    pub(super) severity: Severity,
    pub(super) message: String,
}

#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    /// The value at `path` is wrong. The message gets the path in front.
    pub(super) fn error(&mut self, path: &Path, message: String) {
        self.add(path, At::Value, Severity::Error, prefixed(path, message));
    }

    /// The key at the end of `path` is wrong.
    pub(super) fn error_at_key(&mut self, path: &Path, message: String) {
        self.add(path, At::Key, Severity::Error, prefixed(path, message));
    }

    /// The field at `path` is no mistake but does not do what one may think.
    pub(super) fn warning(&mut self, path: &Path, message: String) {
        self.add(path, At::Key, Severity::Warning, prefixed(path, message));
    }

    /// Takes the message as it is.
    pub(super) fn add(&mut self, path: &Path, at: At, severity: Severity, message: String) {
        self.0.push(Finding { path: path.clone(), at, severity, message });
    }

    pub(super) fn has_errors(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Error)
    }

    pub(super) fn into_vec(self) -> Vec<Finding> {
        self.0
    }
}

pub(super) fn prefixed(path: &Path, message: String) -> String {
    if path.segments().is_empty() { message } else { format!("{path}: {message}") }
}
