//! The settings file: a YAML mapping of flag names to values. Read into plain texts, because the flags' own parsers say
//! what a value means; called by `layers`, and knows nothing of which keys exist.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// What stands behind a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    One(String),
    List(Vec<Value>),
    /// `key:` with nothing behind it.
    Nothing,
    /// A mapping: no setting is one.
    Mapping,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::One(text) => f.write_str(text),
            Value::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
            Value::Nothing => f.write_str("(nothing)"),
            Value::Mapping => f.write_str("(a mapping)"),
        }
    }
}

/// The file's keys in its order, twice where one stands there twice. An empty file has none.
pub(super) fn parse(text: &str) -> Result<Vec<(String, Value)>, serde_yaml::Error> {
    if text.lines().all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Vec::new());
    }
    serde_yaml::from_str::<Entries>(text).map(|entries| entries.0)
}

/// The line (from 1) on which `key` stands, for the `occurrence`-th time (from 0).
pub(super) fn line_of(text: &str, key: &str, occurrence: usize) -> Option<usize> {
    let quotes = ['"', '\''];
    let spells = |line: &str| {
        let rest = line.strip_prefix(quotes).unwrap_or(line).strip_prefix(key);
        rest.is_some_and(|rest| rest.strip_prefix(quotes).unwrap_or(rest).trim_start().starts_with(':'))
    };
    text.lines().enumerate().filter(|(_, line)| spells(line)).nth(occurrence).map(|(index, _)| index + 1)
}

struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Mapping;
        impl<'de> Visitor<'de> for Mapping {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of settings, as in `admin-listen: 127.0.0.1:0`")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Mapping)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value or a list of values")
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
                Ok(Value::One(value.to_string()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
                Ok(Value::One(value.to_string()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
                Ok(Value::One(value.to_string()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
                Ok(Value::One(value.to_string()))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
                Ok(Value::One(value.to_owned()))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Nothing)
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Value, S::Error> {
                let mut values = Vec::new();
                while let Some(value) = seq.next_element()? {
                    values.push(value);
                }
                Ok(Value::List(values))
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Value, M::Error> {
                while map.next_entry::<de::IgnoredAny, de::IgnoredAny>()?.is_some() {}
                Ok(Value::Mapping)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
