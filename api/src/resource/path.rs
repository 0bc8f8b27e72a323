//! The place of something inside a document: a path of keys and indexes. Messages show it, `position` finds it in
//! the text.

use std::fmt;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

/// From the document's root; the root itself is the empty path.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Path(Vec<Segment>);

impl Path {
    pub(super) fn key(&self, key: &str) -> Path {
        self.with(Segment::Key(key.to_owned()))
    }

    pub(super) fn index(&self, index: usize) -> Path {
        self.with(Segment::Index(index))
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// The path without its last step, and that step.
    pub(super) fn split_last(&self) -> Option<(&[Segment], &Segment)> {
        self.0.split_last().map(|(last, parent)| (parent, last))
    }

    pub(super) fn push(&mut self, segment: Segment) {
        self.0.push(segment);
    }

    pub(super) fn pop(&mut self) {
        self.0.pop();
    }

    fn with(&self, segment: Segment) -> Path {
        let mut path = Vec::with_capacity(self.0.len() + 1);
        path.extend_from_slice(&self.0);
        path.push(segment);
        Path(path)
    }

    /// `spec.ports[].name`: the path from `object` on, every index left out. What tables of field names use.
    pub(super) fn shape_below(&self, object: &Path) -> String {
        let mut shape = String::new();
        for segment in self.0.iter().skip(object.0.len()) {
            match segment {
                Segment::Key(key) if shape.is_empty() => shape.push_str(key),
                Segment::Key(key) => {
                    shape.push('.');
                    shape.push_str(key);
                }
                Segment::Index(_) => shape.push_str("[]"),
            }
        }
        shape
    }
}

/// `spec.ports[0].name`; nothing for the root.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) => {
                    let dot = if nth == 0 { "" } else { "." };
                    let plain =
                        !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
                    if plain { write!(f, "{dot}{key}")? } else { write!(f, "[{:?}]", Shortened(key))? }
                }
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// A text from a file as messages show it: quoted, control characters escaped, cut after 60 characters.
pub(super) struct Shortened<'t>(pub(super) &'t str);

impl fmt::Debug for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 60;
        match self.0.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(f, "{:?}...", &self.0[..end]),
            None => write!(f, "{:?}", self.0),
        }
    }
}

/// The same between backticks, for names of fields.
impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = format!("{self:?}");
        let shown = quoted.strip_prefix('"').map_or(quoted.as_str(), |rest| rest);
        match shown.strip_suffix('"') {
            Some(inner) => write!(f, "`{inner}`"),
            None => write!(f, "`{}`", shown.replacen("\"...", "...", 1)),
        }
    }
}
