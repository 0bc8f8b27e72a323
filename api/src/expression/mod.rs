//! Expressions of rules in CEL (the Common Expression Language): compiled when they arrive, with every mistake at its
//! position, and evaluated on the facts of one request or connection. An evaluator of our own, because what decides on the
//! data path has to be bounded: in source, in depth, and in steps whatever a caller sends.
//!
//! Of the language it has `?:`, `||`, `&&`, comparisons, `in`, arithmetic on integers and doubles, lists, `has()`, `size()`,
//! `startsWith`, `endsWith`, `contains`, `exists`, `all`, `int()`, `string()`, `timestamp()`, `duration()`, and the parts of a
//! time. It has no `matches`, no maps of one's own, no bytes: the error says so.

mod evaluate;
mod lex;
mod parse;
mod syntax;
mod value;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use evaluate::MAX_STEPS;
pub use parse::{MAX_DEPTH, MAX_SOURCE};
pub use syntax::{Field, Map};
pub use value::{Facts, Value};

use syntax::Node;

/// One expression. It travels as the text that the user wrote, and cloning shares it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Expression(Arc<Compiled>);

#[derive(Debug)]
struct Compiled {
    text: String,
    root: Node,
    looks_at: LooksAt,
}

/// What an expression looks at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LooksAt {
    /// What only a request has.
    pub request: bool,
    pub path: bool,
    pub now: bool,
    pub claims: bool,
    /// Names of headers in lower case, as far as they stand in the text.
    pub headers: Vec<String>,
    /// Keys of `source.labels`; `all_labels` where they are computed.
    pub labels: Vec<String>,
    pub all_labels: bool,
}

/// A mistake in the text.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("at {at}: {message}")]
pub struct Mistake {
    /// Characters from the beginning of the text, from 1.
    pub at: usize,
    pub message: String,
}

impl Expression {
    pub fn new(text: &str) -> Result<Expression, Mistake> {
        let root = parse::parse(text)?;
        let mut looks_at = LooksAt::default();
        syntax::look(&root, &mut looks_at);
        Ok(Expression(Arc::new(Compiled { text: text.to_owned(), root, looks_at })))
    }

    /// Whether it holds. The error says why it has no answer: a field that is not there, too many steps.
    pub fn holds(&self, facts: &dyn Facts) -> Result<bool, String> {
        evaluate::holds(&self.0.root, facts)
    }

    pub fn looks_at(&self) -> &LooksAt {
        &self.0.looks_at
    }

    pub fn as_str(&self) -> &str {
        &self.0.text
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Expression) -> bool {
        self.0.text == other.0.text
    }
}

impl Eq for Expression {}

impl TryFrom<String> for Expression {
    type Error = Mistake;

    fn try_from(text: String) -> Result<Expression, Mistake> {
        Expression::new(&text)
    }
}

impl From<Expression> for String {
    fn from(expression: Expression) -> String {
        expression.0.text.clone()
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
