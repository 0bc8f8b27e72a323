//! Sets of rules by the path that they look at: whole paths in a table, beginnings and ends in sorted lists in which each
//! entry knows the next shorter one that contains it, so that one search finds every pattern that matches.

use std::cmp::Ordering;
use std::collections::HashMap;

/// Rules of one set.
pub(super) const RULES: usize = 1_024;

/// A set of rules, by their number.
pub(super) type Bits = [u64; RULES / 64];

pub(super) fn set(bits: &mut Bits, number: usize) {
    if let Some(word) = bits.get_mut(number / 64) {
        *word |= 1 << (number % 64);
    }
}

pub(super) fn union(bits: &mut Bits, other: &Bits) {
    bits.iter_mut().zip(other).for_each(|(word, other)| *word |= other);
}

pub(super) fn intersects(bits: &mut Bits, other: &Bits) {
    bits.iter_mut().zip(other).for_each(|(word, other)| *word &= other);
}

/// Which part of a path a pattern says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Beginning,
    End,
}

#[derive(Debug, Default)]
pub(super) struct Affixes {
    exact: HashMap<String, Bits>,
    beginnings: Sorted,
    ends: Sorted,
}

/// Patterns in the order of their letters, those of ends read backwards.
#[derive(Debug, Default)]
struct Sorted {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    text: String,
    /// The longest other entry that this one begins (or ends) with.
    within: Option<usize>,
    /// Once settled with all that this one is within.
    bits: Bits,
}

impl Affixes {
    pub(super) fn push_exact(&mut self, number: usize, text: &str) {
        set(self.exact.entry(text.to_owned()).or_default(), number);
    }

    pub(super) fn push(&mut self, number: usize, end: End, text: &str) {
        let sorted = if end == End::Beginning { &mut self.beginnings } else { &mut self.ends };
        let mut entry = Entry { text: text.to_owned(), within: None, bits: Bits::default() };
        set(&mut entry.bits, number);
        sorted.entries.push(entry);
    }

    /// To be called when all patterns are there.
    pub(super) fn settle(&mut self) {
        self.beginnings.settle(End::Beginning);
        self.ends.settle(End::End);
    }

    /// The rules of every pattern that matches.
    pub(super) fn of(&self, path: &str) -> Bits {
        let mut found = Bits::default();
        let sets = [self.exact.get(path), self.beginnings.find(End::Beginning, path), self.ends.find(End::End, path)];
        sets.into_iter().flatten().for_each(|bits| union(&mut found, bits));
        found
    }

    pub(super) fn bytes(&self) -> usize {
        let entries = self.beginnings.entries.iter().chain(&self.ends.entries).map(|entry| &entry.text);
        let exact = self.exact.keys().map(|text| text.capacity() + size_of::<(String, Bits)>() + 8);
        exact.chain(entries.map(|text| text.capacity() + size_of::<Entry>())).sum()
    }
}

impl Sorted {
    fn settle(&mut self, end: End) {
        self.entries.sort_by(|one, other| compare(end, &one.text, &other.text));
        self.entries.dedup_by(|later, kept| {
            let same = later.text == kept.text;
            if same {
                union(&mut kept.bits, &later.bits);
            }
            same
        });
        self.entries.shrink_to_fit();
        for place in 0..self.entries.len() {
            let text = std::mem::take(&mut self.entries[place].text);
            // What contains this one stands before it, and so does what contains that.
            let mut within = place.checked_sub(1);
            while let Some(candidate) = within {
                if contains(end, &self.entries[candidate].text, &text) {
                    break;
                }
                within = self.entries[candidate].within;
            }
            let inherited = within.map(|within| self.entries[within].bits);
            let entry = &mut self.entries[place];
            entry.text = text;
            entry.within = within;
            inherited.iter().for_each(|bits| union(&mut entry.bits, bits));
        }
    }

    /// The longest pattern that the path begins (or ends) with; its set holds those of all shorter ones.
    fn find(&self, end: End, path: &str) -> Option<&Bits> {
        let after = self.entries.partition_point(|entry| compare(end, &entry.text, path) != Ordering::Greater);
        let mut place = after.checked_sub(1);
        while let Some(entry) = place.and_then(|place| self.entries.get(place)) {
            if contains(end, &entry.text, path) {
                return Some(&entry.bits);
            }
            place = entry.within;
        }
        None
    }
}

fn compare(end: End, one: &str, other: &str) -> Ordering {
    match end {
        End::Beginning => one.as_bytes().cmp(other.as_bytes()),
        End::End => one.bytes().rev().cmp(other.bytes().rev()),
    }
}

fn contains(end: End, part: &str, whole: &str) -> bool {
    match end {
        End::Beginning => whole.starts_with(part),
        End::End => whole.ends_with(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_that_matches_is_found() {
        let beginnings = ["", "/", "/a", "/a/b", "/ab", "/b/c", "/a/b/c/d"];
        let ends = ["", "c", "/c", "b/c", "/d", "x"];
        let exact = ["/a/b/c", "/x"];
        let mut affixes = Affixes::default();
        let mut patterns: Vec<(usize, &str, &str)> = Vec::new();
        for text in beginnings {
            affixes.push(patterns.len(), End::Beginning, text);
            patterns.push((patterns.len(), "beginning", text));
        }
        for text in ends {
            affixes.push(patterns.len(), End::End, text);
            patterns.push((patterns.len(), "end", text));
        }
        for text in exact {
            affixes.push_exact(patterns.len(), text);
            patterns.push((patterns.len(), "exact", text));
        }
        affixes.settle();
        for path in ["/", "/a", "/a/", "/a/b", "/a/b/c", "/a/b/c/d", "/a/b/c/d/e", "/abc", "/b/c", "/x", "", "/é/c"] {
            let found = affixes.of(path);
            for (number, kind, text) in &patterns {
                let expected = match *kind {
                    "beginning" => path.starts_with(text),
                    "end" => path.ends_with(text),
                    _ => path == *text,
                };
                assert_eq!(found[number / 64] >> (number % 64) & 1 == 1, expected, "{path} {kind} {text}");
            }
        }
    }
}
