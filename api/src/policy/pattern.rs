//! Patterns of rules, with Istio's meaning: `x` exactly, `x*` a beginning, `*x` an end, `*` anything that is there, and
//! for paths templates in which `{*}` stands for one segment and `{**}` for any number of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A text pattern. It travels as the text that the user wrote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// `*`: whatever is there.
    Any,
    /// Only where paths are compared, see [`Pattern::for_path`].
    Template(Template),
}

/// A path template: `/users/{*}/orders/{**}`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Template {
    text: String,
    segments: Vec<Segment>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Segment {
    Literal(String),
    One,
    Rest,
}

impl Pattern {
    /// A pattern of names, hosts and the like; never fails.
    pub fn new(text: &str) -> Pattern {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            _ if text == "*" => Pattern::Any,
            (Some(end), _) => Pattern::Suffix(end.to_owned()),
            (None, Some(beginning)) => Pattern::Prefix(beginning.to_owned()),
            (None, None) => Pattern::Exact(text.to_owned()),
        }
    }

    /// A pattern of paths. The error says what is wrong with a template.
    pub fn for_path(text: &str) -> Result<Pattern, String> {
        if !text.contains(['{', '}']) {
            return Ok(Pattern::new(text));
        }
        let body = text.strip_prefix('/').ok_or("a template begins with `/`")?;
        let mut segments = Vec::new();
        for segment in body.split('/') {
            let parsed = match segment {
                "{*}" => Segment::One,
                "{**}" => Segment::Rest,
                other if other.contains(['{', '}', '*']) => {
                    return Err(format!("`{other}` is no segment of a template: write a whole `{{*}}` or `{{**}}`"));
                }
                other => Segment::Literal(other.to_owned()),
            };
            if parsed == Segment::Rest && segments.contains(&Segment::Rest) {
                return Err("`{**}` may stand once".to_owned());
            }
            segments.push(parsed);
        }
        Ok(Pattern::Template(Template { text: text.to_owned(), segments }))
    }

    pub fn matches(&self, value: &str) -> bool {
        match self {
            Pattern::Exact(text) => value == text,
            Pattern::Prefix(beginning) => value.starts_with(beginning.as_str()),
            Pattern::Suffix(end) => value.ends_with(end.as_str()),
            Pattern::Any => true,
            Pattern::Template(template) => template.matches(value),
        }
    }

    /// The same for the bytes of a field, which may be anything.
    pub fn matches_bytes(&self, value: &[u8]) -> bool {
        match self {
            Pattern::Exact(text) => value == text.as_bytes(),
            Pattern::Prefix(beginning) => value.starts_with(beginning.as_bytes()),
            Pattern::Suffix(end) => value.ends_with(end.as_bytes()),
            Pattern::Any => true,
            Pattern::Template(template) => std::str::from_utf8(value).is_ok_and(|value| template.matches(value)),
        }
    }
}

impl Template {
    fn matches(&self, path: &str) -> bool {
        let Some(body) = path.strip_prefix('/') else { return false };
        let one = |segment: &Segment, value: &str| match segment {
            Segment::Literal(text) => text == value,
            Segment::One => !value.is_empty(),
            Segment::Rest => false,
        };
        let count = body.split('/').count();
        let first =
            |segments: &[Segment]| segments.iter().zip(body.split('/')).all(|(segment, value)| one(segment, value));
        match self.segments.iter().position(|segment| *segment == Segment::Rest) {
            None => count == self.segments.len() && first(&self.segments),
            Some(rest) => {
                let behind = &self.segments[rest + 1..];
                count >= rest + behind.len()
                    && first(&self.segments[..rest])
                    && behind.iter().rev().zip(body.rsplit('/')).all(|(segment, value)| one(segment, value))
            }
        }
    }

    /// With what every path that matches begins.
    pub fn beginning(&self) -> &str {
        let mut end = 0;
        for segment in &self.segments {
            let Segment::Literal(text) = segment else { break };
            end += 1 + text.len();
        }
        self.text.get(..end.max(1)).unwrap_or("/")
    }
}

impl From<String> for Pattern {
    /// What was checked before it was sent; a text that is no template is taken literally.
    fn from(text: String) -> Pattern {
        Pattern::for_path(&text).unwrap_or(Pattern::Exact(text))
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.to_string()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Exact(text) => f.write_str(text),
            Pattern::Prefix(beginning) => write!(f, "{beginning}*"),
            Pattern::Suffix(end) => write!(f, "*{end}"),
            Pattern::Any => f.write_str("*"),
            Pattern::Template(template) => f.write_str(&template.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let cases: [(&str, &[&str], &[&str]); 10] = [
            ("/a", &["/a"], &["/a/", "/ab", "a", ""]),
            ("/a*", &["/a", "/a/b", "/ab"], &["/b", "/A"]),
            ("*/a", &["/a", "/b/a"], &["/a/", "a"]),
            ("*", &["", "/", "x"], &[]),
            ("/u/{*}", &["/u/1"], &["/u/", "/u", "/u/1/2", "/v/1"]),
            ("/u/{*}/o", &["/u/1/o"], &["/u/1/p", "/u//o", "/u/1/2/o"]),
            ("/u/{**}", &["/u/", "/u/1", "/u/1/2"], &["/v/1", "/"]),
            ("/{**}/o", &["/o", "/1/o", "/1/2/o"], &["/o/1"]),
            ("/{*}/{**}", &["/a", "/a/", "/a/b"], &["/", "//b"]),
            ("/{**}", &["/", "/a", "/a/b/c"], &[""]),
        ];
        for (pattern, yes, no) in cases {
            let parsed = Pattern::for_path(pattern).unwrap();
            assert_eq!(parsed.to_string(), pattern);
            yes.iter().for_each(|value| assert!(parsed.matches(value), "{pattern} {value:?}"));
            no.iter().for_each(|value| assert!(!parsed.matches(value), "{pattern} {value:?}"));
        }
        for wrong in ["{*}", "/{", "/a{*}", "/{x}", "/{**}/{**}", "/{*", "/*{*}"] {
            assert!(Pattern::for_path(wrong).is_err(), "{wrong}");
        }
    }
}
