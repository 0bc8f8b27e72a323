//! How much: RateLimitPolicies as they are in force for one workload, and the arithmetic of a token bucket. Which bucket a
//! request is counted in is decided here, and whether one more fits; where the buckets are kept is the sidecar's affair.

mod bucket;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::authorization::Account;
use super::request_match::{RequestMatch, any_holds};
use crate::facts::{Connection, Request};
pub use bucket::{Full, Rate};

/// Every RateLimitPolicy that selects the workload.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    pub policies: Vec<Policy>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    /// `name.namespace` of the Services that its targetRefs name; empty: all ports of the workload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// `mode: Shadow`: it counts and refuses nothing.
    pub shadow: bool,
    pub limits: Vec<Limit>,
    /// Other rates for single callers, in limits by identity.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// What answers call it.
    pub name: String,
    pub by: By,
    pub rate: Rate,
    /// Empty: every request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<RequestMatch>,
}

/// Which requests share a bucket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum By {
    Total,
    /// The caller's proved identity.
    Identity,
    /// The value of a field; the name in lower case.
    Header(String),
    /// The value of a claim, one name per level.
    Claim(Vec<String>),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    pub identity: Account,
    pub rate: Rate,
}

/// What one request is counted in.
#[derive(Clone, Debug)]
pub struct Counted<'p> {
    pub policy: &'p Policy,
    /// Index of the policy, and of the limit in it.
    pub policy_index: usize,
    pub limit_index: usize,
    /// With what the override of a caller says.
    pub rate: Rate,
}

impl RateLimits {
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The policies that are about a connection.
    pub fn here<'p>(&'p self, connection: &Connection<'_>) -> impl Iterator<Item = (usize, &'p Policy)> {
        let connection = *connection;
        self.policies.iter().enumerate().filter(move |(_, policy)| connection.is_of(&policy.services))
    }

    /// A policy whose limits look at paths, which makes an ambiguous one a reason to refuse.
    pub fn looks_at_paths<'p>(&'p self, connection: &Connection<'_>) -> Option<&'p Policy> {
        let mut here = self.here(connection).map(|(_, policy)| policy).filter(|policy| !policy.shadow);
        here.find(|policy| policy.limits.iter().flat_map(|limit| &limit.matches).any(|one| one.path.is_some()))
    }

    /// The limits that a request is counted in, in their order.
    pub fn counted<'p>(
        &'p self,
        connection: &Connection<'_>,
        request: &Request<'_>,
        query: Option<&str>,
        each: &mut dyn FnMut(Counted<'p>),
    ) {
        for (policy_index, policy) in self.here(connection) {
            for (limit_index, limit) in policy.limits.iter().enumerate() {
                if any_holds(&limit.matches, request, query) {
                    let rate = policy.rate(limit, connection);
                    each(Counted { policy, policy_index, limit_index, rate });
                }
            }
        }
    }
}

impl Policy {
    pub fn full_name(&self) -> String {
        format!("RateLimitPolicy/{}/{}", self.namespace, self.name)
    }

    fn rate(&self, limit: &Limit, connection: &Connection<'_>) -> Rate {
        let (By::Identity, Some(id)) = (&limit.by, connection.identity) else { return limit.rate };
        let is = |own: &&Override| own.identity.namespace == id.namespace() && own.identity.name == id.account();
        self.overrides.iter().find(is).map_or(limit.rate, |own| own.rate)
    }
}

impl By {
    /// Gives the parts of the value by which requests are told apart. What has none of them (no identity, no such field or
    /// claim) shares one bucket with all others that have none.
    pub fn key(&self, connection: &Connection<'_>, request: &Request<'_>, part: &mut dyn FnMut(&[u8])) {
        match self {
            By::Total => {}
            By::Identity => part(connection.identity.map_or(&[], |id| id.as_str().as_bytes())),
            By::Header(name) => request.headers.each_value(name, &mut |value| {
                part(value);
                true
            }),
            By::Claim(path) => {
                if let Some(claims) = request.claims {
                    claims.each_text(path, &mut |text| {
                        part(text.as_bytes());
                        true
                    });
                }
            }
        }
    }

    /// The same for people.
    pub fn shown(&self, connection: &Connection<'_>, request: &Request<'_>) -> String {
        let mut parts = Vec::new();
        self.key(connection, request, &mut |part| {
            parts.push(String::from_utf8_lossy(part).chars().take(80).collect::<String>());
        });
        let value = if parts.is_empty() { "(none)".to_owned() } else { parts.join(", ") };
        match self {
            By::Total => "all requests".to_owned(),
            By::Identity if connection.identity.is_none() => "callers without an identity".to_owned(),
            By::Identity => format!("the caller {value}"),
            By::Header(name) => format!("header {name} {value}"),
            By::Claim(path) => format!("claim {} {value}", path.join(".")),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} per {:?}, burst {}", self.requests, std::time::Duration::from_millis(self.per_ms), self.burst)
    }
}
