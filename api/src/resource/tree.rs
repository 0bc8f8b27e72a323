//! A YAML document as a tree, read in one pass by the one parser. A tree keeps what a map would lose (a key that
//! stands twice) and is bounded: aliases make a small text large, so what they expand to counts against a budget.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, Visitor};

use super::path::{Path, Segment, Shortened};

/// Nodes that one file may expand to. A file at the size limit without aliases stays below it.
const MAX_NODES: usize = 600_000;
/// Bytes of text that cannot be borrowed from the file (escapes, folded lines) and that one file may expand to.
const MAX_COPIED: usize = 4 << 20;
/// Levels of lists and maps. Schemas of Kubernetes, the deepest texts that people keep beside our kinds, have 40.
const MAX_DEPTH: usize = 100;

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Node<'t> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(Cow<'t, str>),
    List(Vec<Node<'t>>),
    /// In the order of the file; a key may stand twice, see [`Node::repeated_keys`].
    Map(Vec<(Cow<'t, str>, Node<'t>)>),
}

impl<'t> Node<'t> {
    /// The value of a key of a map; of a repeated key the first.
    pub(super) fn field(&self, key: &str) -> Option<&Node<'t>> {
        match self {
            Node::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// What a message calls it.
    pub(super) fn described(&self) -> String {
        match self {
            Node::Null => "nothing".to_owned(),
            Node::Bool(value) => format!("the boolean {value}"),
            Node::Unsigned(value) => format!("the number {value}"),
            Node::Signed(value) => format!("the number {value}"),
            Node::Float(value) => format!("the number {value}"),
            Node::Text(text) => format!("the text {:?}", Shortened(text)),
            Node::List(_) => "a list".to_owned(),
            Node::Map(_) => "a map".to_owned(),
        }
    }

    /// The path of every key that stands a second time in its map.
    pub(super) fn repeated_keys(&self) -> Vec<Path> {
        let mut found = Vec::new();
        self.collect_repeated(&mut Path::default(), &mut found);
        found
    }

    fn collect_repeated(&self, here: &mut Path, found: &mut Vec<Path>) {
        match self {
            Node::Map(entries) => {
                let mut seen = BTreeSet::new();
                for (key, value) in entries {
                    if !seen.insert(key.as_ref()) {
                        found.push(here.key(key));
                    }
                    if value.is_container() {
                        here.push(Segment::Key(key.as_ref().to_owned()));
                        value.collect_repeated(here, found);
                        here.pop();
                    }
                }
            }
            Node::List(items) => {
                for (index, item) in items.iter().enumerate().filter(|(_, item)| item.is_container()) {
                    here.push(Segment::Index(index));
                    item.collect_repeated(here, found);
                    here.pop();
                }
            }
            Node::Null | Node::Bool(_) | Node::Unsigned(_) | Node::Signed(_) | Node::Float(_) | Node::Text(_) => {}
        }
    }

    fn is_container(&self) -> bool {
        matches!(self, Node::List(_) | Node::Map(_))
    }
}

/// The part of a text that is safe to give to the parser whole, whose work grows with the square of how deep brackets
/// nest: all of it, or a part that has the text's first error in it. A text with many brackets is tried in growing
/// parts, so that each try meets only a little that the tries before have not been through.
pub(super) fn safe_prefix(text: &str) -> &str {
    const STEP: usize = 16 << 10;
    /// An error this near to the end of a part may come from the cut.
    const MARGIN: usize = 1 << 10;
    let brackets = text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    if brackets <= MARGIN {
        return text;
    }
    for end in (STEP..text.len()).step_by(STEP) {
        let part = &text[..text.floor_char_boundary(end)];
        let budget = Budget::new();
        let mut documents = serde_yaml::Deserializer::from_str(part);
        let error = documents.find_map(|document| TreeSeed::new(&budget).deserialize(document).err());
        let location = error.and_then(|error| error.location());
        if location.is_some_and(|location| location.index() + MARGIN < part.len()) {
            return part;
        }
    }
    text
}

/// What is left of the bounds of one file.
pub(super) struct Budget {
    nodes: Cell<usize>,
    copied: Cell<usize>,
}

impl Budget {
    pub(super) fn new() -> Budget {
        Budget { nodes: Cell::new(MAX_NODES), copied: Cell::new(MAX_COPIED) }
    }

    fn spend_node<E: de::Error>(&self) -> Result<(), E> {
        spend(&self.nodes, 1)
    }

    fn copy<E: de::Error>(&self, text: &str) -> Result<String, E> {
        spend(&self.copied, text.len())?;
        Ok(text.to_owned())
    }
}

fn spend<E: de::Error>(left: &Cell<usize>, amount: usize) -> Result<(), E> {
    let rest = left.get().checked_sub(amount).ok_or_else(|| {
        E::custom("the file expands to too much: write out fewer aliases (`*name`), or split the file")
    })?;
    left.set(rest);
    Ok(())
}

/// Reads one node and all below it.
#[derive(Clone, Copy)]
pub(super) struct TreeSeed<'b> {
    budget: &'b Budget,
    depth: usize,
}

impl<'b> TreeSeed<'b> {
    pub(super) fn new(budget: &'b Budget) -> TreeSeed<'b> {
        TreeSeed { budget, depth: 0 }
    }

    fn below<E: de::Error>(self) -> Result<TreeSeed<'b>, E> {
        if self.depth < MAX_DEPTH {
            return Ok(TreeSeed { depth: self.depth + 1, ..self });
        }
        Err(E::custom(format_args!("lists and maps nest deeper than {MAX_DEPTH} levels")))
    }
}

impl<'t> DeserializeSeed<'t> for TreeSeed<'_> {
    type Value = Node<'t>;

    fn deserialize<D: Deserializer<'t>>(self, deserializer: D) -> Result<Node<'t>, D::Error> {
        self.budget.spend_node()?;
        deserializer.deserialize_any(self)
    }
}

impl<'t> Visitor<'t> for TreeSeed<'_> {
    type Value = Node<'t>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Node<'t>, E> {
        Ok(Node::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Node<'t>, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node<'t>, E> {
        Ok(Node::Bool(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node<'t>, E> {
        Ok(Node::Unsigned(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node<'t>, E> {
        Ok(u64::try_from(value).map_or(Node::Signed(value), Node::Unsigned))
    }

    /// Beyond 64 bits nothing here has a use for the exact number.
    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Node<'t>, E> {
        Ok(Node::Float(value as f64))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Node<'t>, E> {
        Ok(Node::Float(value as f64))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node<'t>, E> {
        Ok(Node::Float(value))
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'t str) -> Result<Node<'t>, E> {
        Ok(Node::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Node<'t>, E> {
        Ok(Node::Text(Cow::Owned(self.budget.copy(text)?)))
    }

    fn visit_seq<A: SeqAccess<'t>>(self, mut items: A) -> Result<Node<'t>, A::Error> {
        let below = self.below()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(below)? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'t>>(self, mut entries: A) -> Result<Node<'t>, A::Error> {
        let below = self.below()?;
        let mut map = Vec::new();
        while let Some(key) = entries.next_key_seed(KeySeed(self.budget))? {
            map.push((key, entries.next_value_seed(below)?));
        }
        Ok(Node::Map(map))
    }

    fn visit_enum<A: EnumAccess<'t>>(self, _: A) -> Result<Node<'t>, A::Error> {
        Err(de::Error::custom("a YAML tag (`!name`) has no meaning here: remove it"))
    }
}

/// Reads a key as the text that stands there, so that `8080:` and `"8080":` are the same key.
struct KeySeed<'b>(&'b Budget);

impl<'t> DeserializeSeed<'t> for KeySeed<'_> {
    type Value = Cow<'t, str>;

    fn deserialize<D: Deserializer<'t>>(self, deserializer: D) -> Result<Cow<'t, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'t> Visitor<'t> for KeySeed<'_> {
    type Value = Cow<'t, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key: text or a number")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'t str) -> Result<Cow<'t, str>, E> {
        refuse_merge(text)?;
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Cow<'t, str>, E> {
        refuse_merge(text)?;
        Ok(Cow::Owned(self.0.copy(text)?))
    }
}

fn refuse_merge<E: de::Error>(key: &str) -> Result<(), E> {
    if key == "<<" { Err(E::custom("merge keys (`<<`) are not supported: write the fields out")) } else { Ok(()) }
}
