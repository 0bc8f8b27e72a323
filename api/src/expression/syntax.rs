//! The tree of an expression, in which names of the variables are resolved already.

use super::LooksAt;

/// A variable with one value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Field {
    Method,
    Path,
    Host,
    Principal,
    Namespace,
    ServiceAccount,
    SourceIp,
    Service,
    Port,
    Now,
}

/// A variable with entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Map {
    Headers,
    Query,
    SourceLabels,
    DestinationLabels,
    Claims,
}

/// What stands where in the text, for errors of evaluation.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Node {
    /// Characters from the beginning, from 1.
    pub(super) at: usize,
    pub(super) kind: Kind,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Kind {
    Literal(Literal),
    Field(Field),
    Map(Map),
    /// A variable of `exists` and the like, by how many of them were opened before it.
    Bound(usize),
    List(Vec<Node>),
    Select(Box<Node>, String),
    Index(Box<Node>, Box<Node>),
    Has(Box<Node>, String),
    Not(Box<Node>),
    Minus(Box<Node>),
    Binary(Operator, Box<Node>, Box<Node>),
    Choose(Box<Node>, Box<Node>, Box<Node>),
    Call(Function, Vec<Node>),
    Each(Quantifier, Box<Node>, Box<Node>),
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Literal {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operator {
    Or,
    And,
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    Plus,
    Minus,
    Times,
    Divided,
    Modulo,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Function {
    Size,
    StartsWith,
    EndsWith,
    Contains,
    Int,
    Text,
    Double,
    Timestamp,
    Duration,
    Hours,
    Minutes,
    DayOfWeek,
    DayOfMonth,
    Month,
    FullYear,
    LowerAscii,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Quantifier {
    Exists,
    All,
    ExistsOne,
}

impl Field {
    pub(super) const ALL: [(&'static str, &'static str, Field); 9] = [
        ("request", "method", Field::Method),
        ("request", "path", Field::Path),
        ("request", "host", Field::Host),
        ("source", "principal", Field::Principal),
        ("source", "namespace", Field::Namespace),
        ("source", "serviceAccount", Field::ServiceAccount),
        ("source", "ip", Field::SourceIp),
        ("destination", "service", Field::Service),
        ("destination", "port", Field::Port),
    ];

    pub(super) fn name(self) -> String {
        let named = Field::ALL.iter().find(|(_, _, field)| *field == self);
        named.map_or_else(|| "now".to_owned(), |(root, name, _)| format!("{root}.{name}"))
    }

    fn is_http(self) -> bool {
        matches!(self, Field::Method | Field::Path | Field::Host)
    }
}

impl Map {
    pub(super) const ALL: [(&'static str, &'static str, Map); 4] = [
        ("request", "headers", Map::Headers),
        ("request", "query", Map::Query),
        ("source", "labels", Map::SourceLabels),
        ("destination", "labels", Map::DestinationLabels),
    ];

    pub(super) fn name(self) -> String {
        let named = Map::ALL.iter().find(|(_, _, map)| *map == self);
        named.map_or_else(|| "claims".to_owned(), |(root, name, _)| format!("{root}.{name}"))
    }
}

/// Collects what a tree looks at.
pub(super) fn look(node: &Node, into: &mut LooksAt) {
    let mut key = |map: &Node, key: Option<&str>| match (&map.kind, key) {
        (Kind::Map(Map::Headers), Some(name)) => into.headers.push(name.to_ascii_lowercase()),
        (Kind::Map(Map::SourceLabels), Some(name)) => into.labels.push(name.to_owned()),
        (Kind::Map(Map::SourceLabels), None) => into.all_labels = true,
        _ => {}
    };
    let literal = |node: &Node| match &node.kind {
        Kind::Literal(Literal::Text(text)) => Some(text.clone()),
        _ => None,
    };
    match &node.kind {
        Kind::Literal(_) | Kind::Bound(_) => {}
        Kind::Field(field) => {
            into.request |= field.is_http();
            into.path |= *field == Field::Path;
            into.now |= *field == Field::Now;
        }
        Kind::Map(map) => {
            into.request |= matches!(map, Map::Headers | Map::Query);
            into.claims |= *map == Map::Claims;
            // Without a key, or with one that follows below: then it is counted once more and more precisely.
        }
        Kind::List(nodes) => nodes.iter().for_each(|node| look(node, into)),
        Kind::Select(of, name) | Kind::Has(of, name) => {
            key(of, Some(name));
            look(of, into);
        }
        Kind::Index(of, index) => {
            key(of, literal(index).as_deref());
            look(of, into);
            look(index, into);
        }
        Kind::Not(of) | Kind::Minus(of) => look(of, into),
        Kind::Binary(operator, one, other) => {
            if *operator == Operator::In {
                key(other, literal(one).as_deref());
            }
            look(one, into);
            look(other, into);
        }
        Kind::Choose(condition, one, other) => {
            look(condition, into);
            look(one, into);
            look(other, into);
        }
        Kind::Call(_, arguments) => {
            arguments.iter().for_each(|argument| key(argument, None));
            arguments.iter().for_each(|argument| look(argument, into));
        }
        Kind::Each(_, range, body) => {
            key(range, None);
            look(range, into);
            look(body, into);
        }
    }
}
