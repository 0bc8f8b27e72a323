//! From a tree to typed values: a serde deserializer over [`Node`] that knows the path of everything. It differs
//! from reading the text directly in two ways: a field that a struct does not have is noted and skipped, so that all
//! of them are reported at once, and numbers do not pass as text.

use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

use super::nearest::suggestion;
use super::path::{Path, Shortened};
use super::position::At;
use super::tree::Node;

/// A field that the struct at `parent` does not have.
#[derive(Clone, Debug)]
pub(super) struct UnknownField<'n> {
    pub(super) parent: Path,
    pub(super) field: &'n str,
    pub(super) value: &'n Node<'n>,
    pub(super) known: &'static [&'static str],
}

/// Where a value is not what its type demands. `place` is None only until the nearest value fills it in.
#[derive(Debug)]
pub(super) struct Mismatch {
    pub(super) place: Option<(Path, At)>,
    pub(super) message: String,
}

/// Reads the node at `path` as a `T`.
pub(super) fn decode<'n, T: Deserialize<'n>>(
    node: &'n Node<'n>,
    path: &Path,
    unknown: &RefCell<Vec<UnknownField<'n>>>,
) -> Result<T, Mismatch> {
    T::deserialize(Value { node, path: path.clone(), unknown })
}

struct Value<'n, 'u> {
    node: &'n Node<'n>,
    path: Path,
    unknown: &'u RefCell<Vec<UnknownField<'n>>>,
}

impl<'n> Value<'n, '_> {
    /// Does `read`, and says of an error without a place that it happened here.
    fn here<T>(self, read: impl FnOnce(&Self) -> Result<T, Mismatch>) -> Result<T, Mismatch> {
        read(&self).map_err(|mismatch| mismatch.at(self.path, At::Value))
    }

    fn visit_any<V: Visitor<'n>>(&self, visitor: V) -> Result<V::Value, Mismatch> {
        match self.node {
            Node::Null => visitor.visit_unit(),
            Node::Bool(value) => visitor.visit_bool(*value),
            Node::Unsigned(value) => visitor.visit_u64(*value),
            Node::Signed(value) => visitor.visit_i64(*value),
            Node::Float(value) => visitor.visit_f64(*value),
            Node::Text(text) => visitor.visit_borrowed_str(text),
            Node::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate(), list: self }),
            Node::Map(entries) => {
                visitor.visit_map(Entries { entries: entries.iter(), next: None, map: self, fields: None })
            }
        }
    }
}

impl<'n> de::Deserializer<'n> for Value<'n, '_> {
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.here(|value| value.visit_any(visitor))
    }

    fn deserialize_option<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        if *self.node == Node::Null { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_struct<V: Visitor<'n>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.here(|value| {
            let entries = match value.node {
                Node::Map(entries) => entries.iter(),
                // `spec:` with nothing behind it is a spec that says nothing, as in Kubernetes.
                Node::Null => [].iter(),
                other => {
                    let known = fields.join(", ");
                    return Err(Mismatch::new(format!("expected a map with {known}, got {}", other.described())));
                }
            };
            visitor.visit_map(Entries { entries, next: None, map: value, fields: Some(fields) })
        })
    }

    fn deserialize_enum<V: Visitor<'n>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.here(|value| match value.node {
            Node::Text(text) if variants.contains(&text.as_ref()) => {
                visitor.visit_enum(StrDeserializer::<Mismatch>::new(text))
            }
            Node::Text(text) => {
                let choice = variants.join(", ");
                let wrong = Shortened(text);
                let hint = match super::nearest::nearest(text, variants) {
                    Some((near, true)) => format!("; did you mean `{near}`?"),
                    Some((_, false)) | None => String::new(),
                };
                Err(Mismatch::new(format!("{wrong} is none of {choice}{hint}")))
            }
            other => Err(Mismatch::new(format!("expected one of {}, got {}", variants.join(", "), other.described()))),
        })
    }

    fn deserialize_str<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.here(|value| match value.node {
            Node::Text(text) => visitor.visit_borrowed_str(text),
            Node::Bool(_) | Node::Unsigned(_) | Node::Signed(_) | Node::Float(_) => {
                Err(Mismatch::new(format!("expected text, got {}: put it in quotes", value.node.described())))
            }
            other => Err(Mismatch::new(format!("expected text, got {}", other.described()))),
        })
    }

    fn deserialize_string<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.deserialize_str(visitor)
    }

    fn deserialize_map<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.here(|value| match value.node {
            Node::Map(_) => value.visit_any(visitor),
            Node::Null => visitor.visit_map(Entries { entries: [].iter(), next: None, map: value, fields: None }),
            other => Err(Mismatch::new(format!("expected a map, got {}", other.described()))),
        })
    }

    fn deserialize_seq<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.here(|value| match value.node {
            Node::List(_) => value.visit_any(visitor),
            Node::Null => visitor.visit_seq(Items { items: [].iter().enumerate(), list: value }),
            other => Err(Mismatch::new(format!("expected a list, got {}", other.described()))),
        })
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_ignored_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'n>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
        identifier
    }
}

struct Items<'v, 'n, 'u> {
    items: std::iter::Enumerate<std::slice::Iter<'n, Node<'n>>>,
    list: &'v Value<'n, 'u>,
}

impl<'n> de::SeqAccess<'n> for Items<'_, 'n, '_> {
    type Error = Mismatch;

    fn next_element_seed<T: DeserializeSeed<'n>>(&mut self, seed: T) -> Result<Option<T::Value>, Mismatch> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let item = Value { node, path: self.list.path.index(index), unknown: self.list.unknown };
        seed.deserialize(item).map(Some)
    }
}

type Entry<'n> = (std::borrow::Cow<'n, str>, Node<'n>);

/// The entries of a map; with `fields` (a struct) those that the struct has.
struct Entries<'v, 'n, 'u> {
    entries: std::slice::Iter<'n, Entry<'n>>,
    next: Option<&'n Entry<'n>>,
    map: &'v Value<'n, 'u>,
    fields: Option<&'static [&'static str]>,
}

impl<'n> de::MapAccess<'n> for Entries<'_, 'n, '_> {
    type Error = Mismatch;

    fn next_key_seed<K: DeserializeSeed<'n>>(&mut self, seed: K) -> Result<Option<K::Value>, Mismatch> {
        for entry in self.entries.by_ref() {
            let (key, value) = entry;
            if let Some(known) = self.fields
                && !known.contains(&key.as_ref())
            {
                let parent = self.map.path.clone();
                self.map.unknown.borrow_mut().push(UnknownField { parent, field: key, value, known });
                continue;
            }
            self.next = Some(entry);
            let key_deserializer: StrDeserializer<'n, Mismatch> = key.as_ref().into_deserializer();
            let read = seed.deserialize(key_deserializer);
            return read.map(Some).map_err(|mismatch| mismatch.at(self.map.path.key(key), At::Key));
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'n>>(&mut self, seed: V) -> Result<V::Value, Mismatch> {
        let Some((key, node)) = self.next.take() else { return Err(Mismatch::new("a value without a key".to_owned())) };
        seed.deserialize(Value { node, path: self.map.path.key(key), unknown: self.map.unknown })
    }
}

impl Mismatch {
    fn new(message: String) -> Mismatch {
        Mismatch { place: None, message }
    }

    fn at(mut self, path: Path, at: At) -> Mismatch {
        self.place.get_or_insert((path, at));
        self
    }
}

impl UnknownField<'_> {
    /// ``unknown field `mtlss`; did you mean `mtls`?``
    pub(super) fn message(&self) -> String {
        format!("unknown field {}{}", Shortened(self.field), suggestion(self.field, self.known))
    }
}

impl std::error::Error for Mismatch {}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl de::Error for Mismatch {
    fn custom<T: fmt::Display>(message: T) -> Mismatch {
        Mismatch::new(message.to_string())
    }
}
