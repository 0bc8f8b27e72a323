//! How a route compares a text: with another one, or with a regular expression that has to match all of it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A regular expression in the syntax of RE2, without a way to take more than linear time. It travels as its text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    text: String,
    compiled: regex::Regex,
}

impl Pattern {
    /// What a compiled expression may take: a `{1000}{1000}` is a mistake and no need.
    const MOST_BYTES: usize = 256 << 10;

    pub fn new(text: &str) -> Result<Pattern, String> {
        // Lines mean nothing in a path or a field: the flag is the only way to match all of it whatever it holds.
        let whole = format!("^(?s:{text})$");
        let compiled = regex::RegexBuilder::new(&whole).size_limit(Pattern::MOST_BYTES).build();
        // Of the library's drawing, which shows the expression with a mark below, the last line says what is wrong.
        let compiled = compiled.map_err(|error| {
            let shown = error.to_string();
            shown.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
        })?;
        // `a)(b` would be closed by what is put around it.
        regex_alone(text)?;
        Ok(Pattern { text: text.to_owned(), compiled })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn is_match(&self, value: &str) -> bool {
        self.compiled.is_match(value)
    }
}

fn regex_alone(text: &str) -> Result<(), String> {
    let alone = regex::RegexBuilder::new(text).size_limit(Pattern::MOST_BYTES).build();
    alone.map(drop).map_err(|_| "it is only whole together with the parentheses around it".to_owned())
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.text == other.text
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Pattern, String> {
        Pattern::new(&text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.text
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Text {
    Exact(String),
    Regex(Pattern),
}

impl Text {
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Text::Exact(text) => value == text,
            Text::Regex(pattern) => pattern.is_match(value),
        }
    }

    pub fn as_str(&self) -> &str {
        match self {
            Text::Exact(text) => text,
            Text::Regex(pattern) => pattern.as_str(),
        }
    }

    pub fn is_exact(&self) -> bool {
        matches!(self, Text::Exact(_))
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Text::Exact(text) => write!(f, "{text}"),
            Text::Regex(pattern) => write!(f, "what matches {}", pattern.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_matches_the_whole_or_nothing() {
        let cases: [(&str, &[&str], &[&str]); 6] = [
            ("a", &["a"], &["ab", "ba", "", "a\n"]),
            ("a|b", &["a", "b"], &["ab", "ax", "xb"]),
            ("/v[0-9]+/.*", &["/v1/", "/v12/x/y"], &["/v/x", "x/v1/", "/v1"]),
            (".*", &["", "x", "a\nb"], &[]),
            ("(?i)abc", &["ABC", "abc"], &["abcd"]),
            ("", &[""], &["a"]),
        ];
        for (text, yes, no) in cases {
            let pattern = Pattern::new(text).unwrap();
            yes.iter().for_each(|value| assert!(pattern.is_match(value), "{text} {value:?}"));
            no.iter().for_each(|value| assert!(!pattern.is_match(value), "{text} {value:?}"));
        }
        for wrong in ["(", ")", "a)(b", "[", "(?P<a", "(?=a)", "(?:.{1000}){1000}", "*"] {
            assert!(Pattern::new(wrong).is_err(), "{wrong}");
        }
    }
}
