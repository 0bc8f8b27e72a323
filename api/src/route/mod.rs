//! Where to: the routes that bind one port of a Service, in the form in which they are in force for the callers of one
//! namespace, and the decision which rule a request or connection follows. The control plane makes the form (`compile`)
//! and sends it; the caller's sidecar decides with it, and so do `explain` and `test`.
//!
//! Semantics are those of Gateway API for a mesh: once a route is bound, what no rule matches goes nowhere.

mod decide;
mod filter;
mod matching;
mod order;
mod target;
mod text;

#[cfg(test)]
mod precedence_tests;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::name::{NameError, ServicePort};

pub use decide::{Asked, Chosen, choose};
pub use filter::{Cors, Filters, HeaderEdits, Mirror, NewPath, Redirect, Rewrite, can_edit};
pub use matching::{HeaderMatch, Match, PathMatch, QueryMatch};
pub use order::order;
pub use target::{location, rewritten};
pub use text::{Pattern, Text};

/// Everything that binds one port of a Service, for the callers of one namespace.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Routes {
    pub kind: Kind,
    pub rules: Vec<Rule>,
    /// The matches in the order in which they are tried: a rule and one of its matches.
    pub order: Vec<(usize, usize)>,
}

/// The kinds of routes; where several bind one port only the first of these is in force.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Kind {
    #[serde(rename = "GRPCRoute")]
    Grpc,
    #[serde(rename = "HTTPRoute")]
    Http,
    #[serde(rename = "TLSRoute")]
    Tls,
    #[serde(rename = "TCPRoute")]
    Tcp,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Grpc, Kind::Http, Kind::Tls, Kind::Tcp];

    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Grpc => "GRPCRoute",
            Kind::Http => "HTTPRoute",
            Kind::Tls => "TLSRoute",
            Kind::Tcp => "TCPRoute",
        }
    }

    /// Requests are routed, and not connections.
    pub const fn is_http(self) -> bool {
        matches!(self, Kind::Grpc | Kind::Http)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One rule of one route.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    /// `KIND/NAMESPACE/NAME` of the route.
    pub object: Arc<str>,
    /// Among the rules of its route, from 0.
    pub index: usize,
    /// What its author calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// One of them must hold.
    pub matches: Vec<Match>,
    #[serde(default, skip_serializing_if = "Filters::is_empty")]
    pub filters: Filters,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<Backend>,
    #[serde(default, skip_serializing_if = "Timeouts::is_empty")]
    pub timeouts: Timeouts,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
}

/// `KIND/NAMESPACE/NAME rule N`
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule {}", self.object, self.index)
    }
}

/// Where a rule sends its share of the traffic.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Backend {
    /// None for what is no Service.
    pub to: Option<To>,
    /// Why nothing can be sent there: a word of Gateway API, and what it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalid: Option<String>,
    pub weight: u32,
    #[serde(default, skip_serializing_if = "Filters::is_empty")]
    pub filters: Filters,
}

/// A Service's port. It travels as `name.namespace:port`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct To(pub ServicePort);

impl TryFrom<String> for To {
    type Error = NameError;

    fn try_from(text: String) -> Result<To, NameError> {
        ServicePort::parse(&text, "").map(To)
    }
}

impl From<To> for String {
    fn from(to: To) -> String {
        to.0.to_string()
    }
}

/// In milliseconds; None: no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Timeouts {
    /// From the request's head to the end of its answer, with all attempts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// Of one attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_request: Option<u64>,
}

impl Timeouts {
    pub fn is_empty(&self) -> bool {
        *self == Timeouts::default()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Retry {
    /// Beside the first.
    pub attempts: u32,
    /// Statuses of answers that are tried again; empty: only what got no answer.
    pub codes: Vec<u16>,
    /// The least time between two attempts, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<u64>,
}
