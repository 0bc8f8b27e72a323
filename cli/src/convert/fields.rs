//! A map of a document that is being converted. What is taken out of it was understood; what is left at the end is told,
//! so that nothing is dropped without a word.

use serde_json::{Map, Value};

/// What a conversion could not do, a line each, in the order in which it was found.
#[derive(Debug, Default)]
pub(super) struct Left(Vec<String>);

impl Left {
    pub(super) fn tell(&mut self, what: impl Into<String>) {
        self.0.push(what.into());
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A map, by the path at which it stands.
#[derive(Debug)]
pub(super) struct Fields {
    at: String,
    fields: Map<String, Value>,
}

impl Fields {
    /// Anything but a map counts as an empty one, and is told.
    pub(super) fn new(at: impl Into<String>, value: Value, left: &mut Left) -> Fields {
        let at = at.into();
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            _ => {
                left.tell(format!("{at} is no map"));
                Map::new()
            }
        };
        Fields { at, fields }
    }

    pub(super) fn path(&self, name: &str) -> String {
        format!("{}.{name}", self.at)
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn map(&mut self, name: &str, left: &mut Left) -> Option<Fields> {
        let path = self.path(name);
        self.take(name).map(|value| Fields::new(path, value, left))
    }

    pub(super) fn text(&mut self, name: &str, left: &mut Left) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            other => {
                left.tell(format!("{} is no text: {other}", self.path(name)));
                None
            }
        }
    }

    /// The elements of a list, each with its path.
    pub(super) fn list(&mut self, name: &str, left: &mut Left) -> Option<Vec<(String, Value)>> {
        let path = self.path(name);
        match self.take(name)? {
            Value::Array(all) => {
                Some(all.into_iter().enumerate().map(|(index, one)| (format!("{path}[{index}]"), one)).collect())
            }
            _ => {
                left.tell(format!("{path} is no list"));
                None
            }
        }
    }

    /// The same of maps.
    pub(super) fn maps(&mut self, name: &str, left: &mut Left) -> Option<Vec<Fields>> {
        let all = self.list(name, left)?;
        Some(all.into_iter().map(|(path, one)| Fields::new(path, one, left)).collect())
    }

    /// The same of texts; others are told.
    pub(super) fn texts(&mut self, name: &str, left: &mut Left) -> Option<Vec<String>> {
        let all = self.list(name, left)?;
        let mut texts = Vec::new();
        for (path, one) in all {
            match one {
                Value::String(text) => texts.push(text),
                other => left.tell(format!("{path} is no text: {other}")),
            }
        }
        Some(texts)
    }

    /// Moves a field on under another name, as it is.
    pub(super) fn rename(&mut self, from: &str, to: &str, into: &mut Map<String, Value>) {
        if let Some(value) = self.take(from) {
            into.insert(to.to_owned(), value);
        }
    }

    /// Tells what was not taken. True when there was nothing.
    pub(super) fn end(self, left: &mut Left) -> bool {
        let before = self.fields.len();
        for (name, value) in self.fields {
            if !value.is_null() {
                left.tell(format!("{}.{name} has no counterpart here", self.at));
            }
        }
        before == 0
    }
}

/// A Service that a host of Istio's means: `name`, `name.namespace` or the whole name within the cluster. None: a wildcard,
/// or a host outside.
pub(super) fn service_of(host: &str, namespace: &str) -> Option<(String, String)> {
    let labels: Vec<&str> = host.split('.').collect();
    let (name, namespace) = match labels[..] {
        [name] => (name, namespace),
        [name, namespace] | [name, namespace, "svc"] | [name, namespace, "svc", "cluster", "local"] => {
            (name, namespace)
        }
        _ => return None,
    };
    let is_label = |text: &str| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    (is_label(name) && is_label(namespace)).then(|| (name.to_owned(), namespace.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_are_services() {
        for (host, expected) in [
            ("reviews", Some(("reviews", "shop"))),
            ("reviews.books", Some(("reviews", "books"))),
            ("reviews.books.svc", Some(("reviews", "books"))),
            ("reviews.books.svc.cluster.local", Some(("reviews", "books"))),
            ("*.books", None),
            ("*", None),
            ("api.example.com", None),
            ("", None),
        ] {
            let expected = expected.map(|(name, namespace)| (name.to_owned(), namespace.to_owned()));
            assert_eq!(service_of(host, "shop"), expected, "{host}");
        }
    }
}
