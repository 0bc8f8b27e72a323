//! What is wrong with a file, and where: the result type of [`super::parse`]. Inside, a finding carries a path of
//! keys; `position` turns it into line and column once everything has been read.

use std::fmt;

use super::Resources;
use super::kind::Kind;
use super::load::Origins;

/// One file as read: its name is what problems are reported under.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SourceFile {
    pub name: String,
    pub text: String,
}

impl SourceFile {
    /// The text without the mark that some editors put in front; the parser would take it for a character.
    pub(super) fn body(&self) -> &str {
        self.text.strip_prefix('\u{feff}').unwrap_or(&self.text)
    }
}

/// Everything that a set of files says, and everything that is wrong with it. The resources are those of the
/// documents that have no error; a caller that must not act on half a configuration looks at `errors` first, and
/// finds in each the file whose last good text it may put in its place.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Parsed {
    pub resources: Resources,
    /// How many objects `resources` was made from.
    pub objects: usize,
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
    pub(super) origins: Origins,
}

impl Parsed {
    /// File and line of an object's name; `files` are those that were parsed.
    pub fn place(&self, files: &[SourceFile], object: &ObjectName) -> Option<(String, usize)> {
        self.origins.get(&object.key()?)?.place(files)
    }
}

/// An object by its kind and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectName {
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
}

impl ObjectName {
    pub(super) fn key(&self) -> Option<(Kind, String, String)> {
        let kind = Kind::of_name(self.kind)?;
        Some((kind, self.namespace.clone(), self.name.clone()))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// What somebody should know about an object that has no mistake in itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remark {
    pub object: ObjectName,
    /// Another object that it is about.
    pub other: Option<ObjectName>,
    /// [`Remark::PLACE`] in it becomes `FILE:LINE` of `other`.
    pub message: String,
}

impl Remark {
    pub const PLACE: &str = "{place}";
}

/// One error or warning. Line and column count from 1, the column in characters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    pub file: String,
    pub line: usize,
    pub column: usize,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)
    }
}
