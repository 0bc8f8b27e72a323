//! Values of expressions, and the facts that they come from.

use std::borrow::Cow;

use super::syntax::{Field, Map};

/// What a part of an expression is.
#[derive(Clone, PartialEq, Debug)]
pub enum Value<'f> {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(Cow<'f, str>),
    List(Vec<Value<'f>>),
    /// A variable with entries, which are asked for one by one.
    Map(Map),
    /// A list or an object of a token's claims.
    Json(&'f serde_json::Value),
    /// Seconds since the Unix epoch.
    Timestamp(i64),
    /// Seconds.
    Duration(i64),
}

/// What an expression is evaluated on.
pub trait Facts {
    /// None: it is absent.
    fn field(&self, field: Field) -> Option<Value<'_>>;

    /// None: there is no such entry. The error says why it has no single value.
    fn entry(&self, map: Map, key: &str) -> Result<Option<Value<'_>>, String>;

    /// Calls `each` with every key. Headers and queries are never asked so.
    fn keys<'f>(&'f self, map: Map, each: &mut dyn FnMut(Cow<'f, str>));
}

impl<'f> Value<'f> {
    pub fn text(text: &'f str) -> Value<'f> {
        Value::Text(Cow::Borrowed(text))
    }

    pub fn json(value: &'f serde_json::Value) -> Value<'f> {
        match value {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(*value),
            serde_json::Value::String(text) => Value::text(text),
            serde_json::Value::Number(number) => match number.as_i64() {
                Some(number) => Value::Int(number),
                None => Value::Double(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::Array(_) | serde_json::Value::Object(_) => Value::Json(value),
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Int(_) => "an integer",
            Value::Double(_) => "a double",
            Value::Text(_) => "a text",
            Value::List(_) | Value::Json(serde_json::Value::Array(_)) => "a list",
            Value::Map(_) | Value::Json(_) => "a map",
            Value::Timestamp(_) => "a time",
            Value::Duration(_) => "a duration",
        }
    }
}
