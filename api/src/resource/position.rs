//! Line and column of a path in a file. The parser tells positions only with errors, so a path is found by reading
//! the file once more with a reader that fails exactly there: slow, exact, and done only when there is a problem.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::path::{Path, Segment};

/// Which part of a path's last step is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum At {
    Value,
    Key,
    /// The key where it stands for the second time.
    RepeatedKey,
}

/// Line and column, from 1. Falls back to the nearest thing around it that the text does have.
pub(super) fn locate(text: &str, document: usize, path: &Path, at: At) -> (usize, usize) {
    let found = match (at, path.split_last()) {
        (At::Value, _) | (_, None) => fail_at(text, document, Probe { steps: path.segments(), key: None }),
        (At::Key, Some((parent, last))) => fail_at_key(text, document, parent, last, 0),
        (At::RepeatedKey, Some((parent, last))) => fail_at_key(text, document, parent, last, 1),
    };
    let around = |length: usize| fail_at(text, document, Probe { steps: &path.segments()[..length], key: None });
    found.or_else(|| (0..path.segments().len()).rev().find_map(around)).unwrap_or((1, 1))
}

fn fail_at_key(
    text: &str,
    document: usize,
    parent: &[Segment],
    last: &Segment,
    before: usize,
) -> Option<(usize, usize)> {
    match last {
        Segment::Key(name) => fail_at(text, document, Probe { steps: parent, key: Some((name, before)) }),
        Segment::Index(_) => None,
    }
}

fn fail_at(text: &str, document: usize, probe: Probe<'_>) -> Option<(usize, usize)> {
    let document = serde_yaml::Deserializer::from_str(text).nth(document)?;
    let location = probe.deserialize(document).err()?.location()?;
    Some((location.line(), location.column()))
}

/// Follows `steps`, then fails at the value there, or in the map there at the `key` that comes after so many equal ones.
#[derive(Clone, Copy)]
struct Probe<'p> {
    steps: &'p [Segment],
    key: Option<(&'p str, usize)>,
}

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Whatever is not overridden here fails by itself: that is the position wanted when no steps are left, and
/// otherwise the last one that exists on the way.
impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the place to report")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Some((Segment::Index(wanted), rest)) = self.steps.split_first() else {
            return Err(de::Error::custom("here"));
        };
        for _ in 0..*wanted {
            items.next_element::<IgnoredAny>()?;
        }
        items.next_element_seed(Probe { steps: rest, key: self.key })?;
        // What is left unread would be an error of its own, elsewhere.
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        match (self.steps.split_first(), self.key) {
            (Some((Segment::Key(wanted), rest)), _) => {
                let mut descended = false;
                while let Some(found) = entries.next_key_seed(KeyProbe { name: wanted, fail: false })? {
                    if found && !descended {
                        descended = true;
                        entries.next_value_seed(Probe { steps: rest, key: self.key })?;
                    } else {
                        entries.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(())
            }
            (None, Some((name, mut before))) => {
                while let Some(found) = entries.next_key_seed(KeyProbe { name, fail: before == 0 })? {
                    before -= usize::from(found);
                    entries.next_value::<IgnoredAny>()?;
                }
                Ok(())
            }
            (Some((Segment::Index(_), _)), _) | (None, None) => Err(de::Error::custom("here")),
        }
    }
}

/// Reads a key: true when it is `name`, or an error there when it shall fail.
struct KeyProbe<'p> {
    name: &'p str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for KeyProbe<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyProbe<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<bool, E> {
        match text == self.name {
            true if self.fail => Err(E::custom("here")),
            found => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# a comment\n---\na: 1\nb:\n  - x: y\n    \"z\": ü\n  - [1, 2,\n     3]\n---\nä: {ö: 1, k: 2, ö: 3}\n\
                        empty:\nanchor: &a {q: 1}\nalias: *a\n";

    #[test]
    fn paths_are_found() {
        let root = Path::default();
        let b = root.key("b");
        let umlauts = root.key("ä");
        let cases = [
            (0, root.clone(), At::Value, (3, 1)),
            (0, root.key("a"), At::Value, (3, 4)),
            (0, root.key("a"), At::Key, (3, 1)),
            (0, b.index(0), At::Value, (5, 5)),
            (0, b.index(0).key("x"), At::Value, (5, 8)),
            (0, b.index(0).key("z"), At::Key, (6, 5)),
            (0, b.index(0).key("z"), At::Value, (6, 10)),
            (0, b.index(1).index(2), At::Value, (8, 6)),
            // What is not there: the thing that lacks it.
            (0, b.index(1).index(9), At::Value, (7, 5)),
            (0, b.index(0).key("none"), At::Key, (5, 5)),
            (0, root.key("a").key("b"), At::Value, (3, 4)),
            (1, umlauts.key("k"), At::Key, (10, 11)),
            (1, umlauts.key("ö"), At::Key, (10, 5)),
            (1, umlauts.key("ö"), At::RepeatedKey, (10, 17)),
            (1, root.key("empty"), At::Key, (11, 1)),
            (1, root.key("alias").key("q"), At::Key, (12, 13)),
            (7, root, At::Value, (1, 1)),
        ];
        for (document, path, at, expected) in cases {
            assert_eq!(locate(TEXT, document, &path, at), expected, "{document} {path} {at:?}");
        }
    }
}
