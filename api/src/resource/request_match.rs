//! The matches of a limit or fault as written: those of Gateway API's HTTPRoute. Regular expressions are an error: these
//! kinds compare texts exactly.

use serde::Deserialize;

use super::findings::Findings;
use super::path::{Path, Shortened};
use super::request_authentication::field_name;
use crate::path::NormalPath;
use crate::policy::request_match::{PathMatch, RequestMatch};

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawMatch {
    path: Option<RawPath>,
    method: Option<String>,
    headers: Vec<RawNamed>,
    query_params: Vec<RawNamed>,
}

#[derive(Deserialize)]
#[serde(default)]
struct RawPath {
    r#type: PathType,
    value: String,
}

impl Default for RawPath {
    fn default() -> RawPath {
        RawPath { r#type: PathType::PathPrefix, value: "/".to_owned() }
    }
}

#[derive(Deserialize, Clone, Copy)]
enum PathType {
    Exact,
    PathPrefix,
    RegularExpression,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNamed {
    r#type: ValueType,
    name: String,
    value: String,
}

#[derive(Deserialize, Clone, Copy, Default)]
enum ValueType {
    #[default]
    Exact,
    RegularExpression,
}

/// `path` is that of the list.
pub(super) fn check(matches: Vec<RawMatch>, path: &Path, findings: &mut Findings) -> Vec<RequestMatch> {
    matches.into_iter().enumerate().map(|(index, one)| one.check(&path.index(index), findings)).collect()
}

impl RawMatch {
    fn check(self, path: &Path, findings: &mut Findings) -> RequestMatch {
        if let Some(method) = self.method.as_ref().filter(|method| method.bytes().any(|b| b.is_ascii_lowercase())) {
            let message =
                format!("{}: methods are case-sensitive; write {}", Shortened(method), method.to_ascii_uppercase());
            findings.error(&path.key("method"), message);
        }
        let mut headers = Vec::new();
        for (index, header) in self.headers.into_iter().enumerate() {
            let path = path.key("headers").index(index);
            match field_name(&header.name) {
                Ok(name) => headers.extend(header.check(&path, findings).map(|value| (name, value))),
                Err(message) => findings.error(&path.key("name"), message),
            }
        }
        let mut query = Vec::new();
        for (index, parameter) in self.query_params.into_iter().enumerate() {
            let path = path.key("queryParams").index(index);
            let name = parameter.name.clone();
            if name.is_empty() {
                findings.error(&path.key("name"), "a parameter without a name".to_owned());
            }
            query.extend(parameter.check(&path, findings).map(|value| (name, value)));
        }
        let at = path.key("path");
        RequestMatch { path: self.path.and_then(|path| path.check(&at, findings)), method: self.method, headers, query }
    }
}

const EXACTLY: &str = "RegularExpression is not supported here: write Exact";

impl RawNamed {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<String> {
        match self.r#type {
            ValueType::Exact => Some(self.value),
            ValueType::RegularExpression => {
                findings.error(&path.key("type"), EXACTLY.to_owned());
                None
            }
        }
    }
}

impl RawPath {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<PathMatch> {
        let value = self.value;
        if !value.starts_with('/') {
            findings.error(&path.key("value"), format!("{}: a path begins with `/`", Shortened(&value)));
            return None;
        }
        let normal = NormalPath::of(&value);
        if normal.text != value || normal.ambiguous.is_some() {
            let message = format!(
                "{} is never seen: paths are compared in their normal form, here {}",
                Shortened(&value),
                Shortened(&normal.text)
            );
            findings.error(&path.key("value"), message);
            return None;
        }
        match self.r#type {
            PathType::Exact => Some(PathMatch::Exact(value)),
            PathType::PathPrefix => Some(PathMatch::Prefix(value.trim_end_matches('/').to_owned())),
            PathType::RegularExpression => {
                findings.error(&path.key("type"), format!("{EXACTLY} or PathPrefix"));
                None
            }
        }
    }
}
