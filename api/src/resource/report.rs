//! From findings to the problems that people read: lines are looked up, sorted, and cut where nobody would read on.

use super::findings::Severity;
use super::path::Path;
use super::position::{At, locate};
use super::{Problem, SourceFile};

/// What one file may report of each severity; the rest is counted.
const MAX_REPORTED: usize = 20;

/// A finding with its file, or something about a file as a whole.
pub(super) struct Found {
    pub(super) file: usize,
    pub(super) place: Place,
    pub(super) severity: Severity,
    pub(super) message: String,
}

pub(super) enum Place {
    Exact(usize, usize),
    In { document: usize, path: Path, at: At },
}

/// The problems of one file and one severity, each with its line, in the order of the lines.
pub(super) fn located(file: &SourceFile, found: Vec<Found>, what: &str) -> Vec<Problem> {
    let more = found.len().saturating_sub(MAX_REPORTED);
    let mut problems: Vec<Problem> = found
        .into_iter()
        .take(MAX_REPORTED)
        .map(|found| {
            let (line, column) = match found.place {
                Place::Exact(line, column) => (line, column),
                Place::In { document, path, at } => locate(file.body(), document, &path, at),
            };
            Problem { file: file.name.clone(), line, column, message: found.message }
        })
        .collect();
    problems.sort_by_key(|problem| (problem.line, problem.column));
    if let (true, Some(last)) = (more > 0, problems.last()) {
        let message = format!("and {more} more {what} in this file");
        problems.push(Problem { message, ..last.clone() });
    }
    problems
}

/// Line and column of a byte offset.
pub(super) fn position_of(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The parser's message without the position, which stands in front of it already, and without a path that is too
/// long to help.
pub(super) fn without_position(message: &str, (line, column): (usize, usize)) -> String {
    let message = message.replacen(&format!(" at line {line} column {column}"), "", 1);
    match message.split_once(": ") {
        Some((path, rest)) if path.len() > 120 => rest.to_owned(),
        Some(_) | None => message,
    }
}
