//! `matches` of HTTPRoute and GRPCRoute.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::super::findings::Findings;
use super::super::path::{Path, Shortened};
use crate::path::NormalPath;
use crate::route::{HeaderMatch, Match, PathMatch, Pattern, QueryMatch, Text};

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawHttpMatch {
    path: Option<RawPath>,
    headers: Vec<RawPair>,
    query_params: Vec<RawPair>,
    method: Option<RawMethod>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPath {
    r#type: RawPathType,
    value: Option<String>,
}

#[derive(Clone, Copy, Deserialize, Default)]
enum RawPathType {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPair {
    r#type: RawTextType,
    name: Option<String>,
    value: Option<String>,
}

#[derive(Clone, Copy, Deserialize, Default, PartialEq, Eq)]
enum RawTextType {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawMethod {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct RawGrpcMatch {
    method: Option<RawGrpcMethod>,
    headers: Vec<RawPair>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawGrpcMethod {
    r#type: RawTextType,
    service: Option<String>,
    method: Option<String>,
}

impl RawMethod {
    fn as_str(self) -> &'static str {
        match self {
            RawMethod::Get => "GET",
            RawMethod::Head => "HEAD",
            RawMethod::Post => "POST",
            RawMethod::Put => "PUT",
            RawMethod::Delete => "DELETE",
            RawMethod::Connect => "CONNECT",
            RawMethod::Options => "OPTIONS",
            RawMethod::Trace => "TRACE",
            RawMethod::Patch => "PATCH",
        }
    }
}

impl RawHttpMatch {
    pub(super) fn check(self, path: &Path, findings: &mut Findings) -> Match {
        let at = path.key("path");
        let written = self.path.unwrap_or_default();
        let query = pairs(self.query_params, &path.key("queryParams"), false, findings);
        Match {
            path: written.check(&at, findings),
            method: self.method.map(|method| method.as_str().to_owned()),
            headers: headers(self.headers, path, findings),
            query: query.into_iter().map(|(name, value)| QueryMatch { name, value }).collect(),
            server_name: None,
        }
    }
}

impl RawPath {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<PathMatch> {
        let value = self.value.unwrap_or_else(|| "/".to_owned());
        let at = path.key("value");
        if matches!(self.r#type, RawPathType::RegularExpression) {
            return pattern(&value, &at, findings).map(PathMatch::Regex);
        }
        let normal = NormalPath::of(&value);
        let odd = |byte: u8| !(byte.is_ascii_alphanumeric() || b"-/._~!$&'()*+,;=:@%".contains(&byte));
        let wrong = if !value.starts_with('/') {
            Some("begins with `/`".to_owned())
        } else if let Some(byte) = value.bytes().find(|byte| odd(*byte)) {
            Some(format!("holds no {:?}: write it as %{byte:02X}", char::from(byte)))
        } else if value.contains("//") || value.split('/').any(|segment| matches!(segment, "." | "..")) {
            Some("holds no `//`, `/.` or `/..`: requests are matched without them".to_owned())
        } else {
            normal.ambiguous.map(|ambiguous| format!("can be read in one way: {}", ambiguous.as_str()))
        };
        if let Some(rule) = wrong {
            findings.error(&at, format!("{:?}: a path {rule}", Shortened(&value)));
            return None;
        }
        Some(match self.r#type {
            RawPathType::Exact => PathMatch::Exact(normal.text.as_ref().into()),
            RawPathType::PathPrefix | RawPathType::RegularExpression => {
                PathMatch::Prefix(normal.text.strip_suffix('/').unwrap_or(&normal.text).into())
            }
        })
    }
}

impl RawGrpcMatch {
    pub(super) fn check(self, path: &Path, findings: &mut Findings) -> Match {
        let at = path.key("method");
        let written = self.method;
        if written.as_ref().is_some_and(|method| method.service.is_none() && method.method.is_none()) {
            findings.error(&at, "names neither `service` nor `method`".to_owned());
        }
        let method = written.unwrap_or_default();
        let mut text = |value: Option<String>, field: &str| {
            let value = value?;
            let at = at.key(field);
            match method.r#type {
                RawTextType::RegularExpression => pattern(&value, &at, findings).map(Text::Regex),
                RawTextType::Exact if value.is_empty() || value.contains('/') => {
                    findings.error(&at, format!("{:?} is no name of gRPC's", Shortened(&value)));
                    None
                }
                RawTextType::Exact => Some(Text::Exact(value)),
            }
        };
        let (service, method) = (text(method.service, "service"), text(method.method, "method"));
        Match {
            path: Some(PathMatch::Grpc { service, method }),
            headers: headers(self.headers, path, findings),
            ..Match::default()
        }
    }
}

fn headers(written: Vec<RawPair>, path: &Path, findings: &mut Findings) -> Vec<HeaderMatch> {
    let pairs = pairs(written, &path.key("headers"), true, findings);
    pairs.into_iter().map(|(name, value)| HeaderMatch { name, value }).collect()
}

/// Names and values; `fold`: names are compared without regard to case.
fn pairs(written: Vec<RawPair>, path: &Path, fold: bool, findings: &mut Findings) -> Vec<(String, Text)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (index, pair) in written.into_iter().enumerate() {
        let at = path.index(index);
        let (Some(name), Some(value)) = (pair.name, pair.value) else {
            findings.error(&at, "`name` and `value` are needed".to_owned());
            continue;
        };
        if fold && !super::filters::is_field_name(&name) {
            findings.error(&at.key("name"), format!("{:?} is no name of a header", Shortened(&name)));
            continue;
        }
        let name = if fold { name.to_ascii_lowercase() } else { name };
        if !seen.insert(name.clone()) {
            findings.warning(&at, format!("{} stands there already: the first counts", Shortened(&name)));
            continue;
        }
        let value = match pair.r#type {
            RawTextType::Exact => Some(Text::Exact(value)),
            RawTextType::RegularExpression => pattern(&value, &at.key("value"), findings).map(Text::Regex),
        };
        found.extend(value.map(|value| (name, value)));
    }
    found
}

fn pattern(text: &str, path: &Path, findings: &mut Findings) -> Option<Pattern> {
    let wrong = |error: String| {
        let shown = Shortened(text);
        findings.error(path, format!("{shown:?} is no regular expression of RE2: {error}"));
    };
    Pattern::new(text).map_err(wrong).ok()
}
