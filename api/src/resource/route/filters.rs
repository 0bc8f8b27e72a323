//! `filters` of a rule and of a backend.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::path::{Path, Shortened};
use super::super::syntax::{Port, is_subdomain};
use super::backends::RawBackendRef;
use crate::route::{Cors, Filters, HeaderEdits, Kind, Match, Mirror, NewPath, PathMatch, Redirect, Rewrite, can_edit};

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawFilter {
    r#type: Option<RawType>,
    request_header_modifier: Option<RawEdits>,
    response_header_modifier: Option<RawEdits>,
    request_mirror: Option<RawMirror>,
    request_redirect: Option<RawRedirect>,
    url_rewrite: Option<RawRewrite>,
    cors: Option<RawCors>,
    external_auth: Option<IgnoredAny>,
    extension_ref: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum RawType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    RequestMirror,
    RequestRedirect,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    #[serde(rename = "CORS")]
    Cors,
    ExternalAuth,
    ExtensionRef,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawEdits {
    set: Vec<RawHeader>,
    add: Vec<RawHeader>,
    remove: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawHeader {
    name: Option<String>,
    value: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawMirror {
    backend_ref: RawBackendRef,
    percent: Option<u32>,
    fraction: Option<RawFraction>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawFraction {
    numerator: Option<u32>,
    denominator: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawRedirect {
    scheme: Option<RawScheme>,
    hostname: Option<String>,
    path: Option<RawNewPath>,
    port: Option<Port>,
    status_code: Option<u16>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawScheme {
    Http,
    Https,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRewrite {
    hostname: Option<String>,
    path: Option<RawNewPath>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawNewPath {
    r#type: Option<RawNewPathType>,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum RawNewPathType {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawCors {
    allow_origins: Vec<String>,
    allow_credentials: Option<bool>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    max_age: Option<u32>,
}

/// `path` is that of the list.
pub(super) fn check(
    written: Vec<RawFilter>,
    kind: Kind,
    metadata: &Metadata,
    path: &Path,
    findings: &mut Findings,
) -> Filters {
    let mut filters = Filters::default();
    let mut seen: Vec<RawType> = Vec::new();
    for (index, filter) in written.into_iter().enumerate() {
        let at = path.index(index);
        let Some(of) = filter.r#type else {
            findings.error(&at, "`type` is missing".to_owned());
            continue;
        };
        if seen.contains(&of) && of != RawType::RequestMirror {
            findings.error(&at, "is a second filter of its type in one rule".to_owned());
            continue;
        }
        seen.push(of);
        filter.check(of, kind, metadata, &at, &mut filters, findings);
    }
    if filters.redirect.is_some() && filters.rewrite.is_some() {
        findings.error(path, "RequestRedirect and URLRewrite cannot stand in one rule".to_owned());
    }
    filters
}

/// What replaces a prefix needs one: `matches` of the rule at `path`.
pub(super) fn check_prefix(filters: &Filters, matches: &[Match], path: &Path, findings: &mut Findings) {
    let paths = [
        filters.redirect.as_ref().and_then(|redirect| redirect.path.as_ref()),
        filters.rewrite.as_ref().and_then(|rewrite| rewrite.path.as_ref()),
    ];
    let replaces = paths.into_iter().flatten().any(|path| matches!(path, NewPath::Prefix(_)));
    let prefixes = matches.iter().all(|one| matches!(one.path, Some(PathMatch::Prefix(_))));
    if replaces && !prefixes {
        let message = "ReplacePrefixMatch needs matches of type PathPrefix alone".to_owned();
        findings.error(&path.key("filters"), message);
    }
}

impl RawFilter {
    fn check(
        self,
        of: RawType,
        kind: Kind,
        metadata: &Metadata,
        path: &Path,
        filters: &mut Filters,
        findings: &mut Findings,
    ) {
        let sections = [
            (RawType::RequestHeaderModifier, "requestHeaderModifier", self.request_header_modifier.is_some()),
            (RawType::ResponseHeaderModifier, "responseHeaderModifier", self.response_header_modifier.is_some()),
            (RawType::RequestMirror, "requestMirror", self.request_mirror.is_some()),
            (RawType::RequestRedirect, "requestRedirect", self.request_redirect.is_some()),
            (RawType::UrlRewrite, "urlRewrite", self.url_rewrite.is_some()),
            (RawType::Cors, "cors", self.cors.is_some()),
            (RawType::ExternalAuth, "externalAuth", self.external_auth.is_some()),
            (RawType::ExtensionRef, "extensionRef", self.extension_ref.is_some()),
        ];
        for (section, field, there) in sections {
            if section == of && !there {
                findings.error(path, format!("`{field}` is missing, which its type needs"));
            } else if section != of && there {
                findings.error_at_key(&path.key(field), "belongs to another type of filter".to_owned());
            }
        }
        let of_http = [RawType::RequestRedirect, RawType::UrlRewrite, RawType::Cors, RawType::ExternalAuth];
        if kind == Kind::Grpc && of_http.contains(&of) {
            findings.error(path, "is no filter of GRPCRoute".to_owned());
            return;
        }
        if matches!(of, RawType::ExternalAuth | RawType::ExtensionRef) {
            findings.error(path, "filters of others are not supported: leave it out".to_owned());
            return;
        }
        if let Some(edits) = self.request_header_modifier {
            filters.request_headers = edits.check(&path.key("requestHeaderModifier"), findings);
        }
        if let Some(edits) = self.response_header_modifier {
            filters.response_headers = edits.check(&path.key("responseHeaderModifier"), findings);
        }
        if let Some(mirror) = self.request_mirror {
            filters.mirrors.extend(mirror.check(kind, metadata, &path.key("requestMirror"), findings));
        }
        if let Some(redirect) = self.request_redirect {
            filters.redirect = redirect.check(&path.key("requestRedirect"), findings);
        }
        if let Some(rewrite) = self.url_rewrite {
            filters.rewrite = Some(rewrite.check(&path.key("urlRewrite"), findings));
        }
        if let Some(cors) = self.cors {
            filters.cors = Some(cors.check(&path.key("cors"), findings));
        }
    }
}

/// A token of RFC 9110.
pub(super) fn is_field_name(name: &str) -> bool {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.len() <= 256 && name.bytes().all(token)
}

impl RawEdits {
    fn check(self, path: &Path, findings: &mut Findings) -> HeaderEdits {
        if self.set.is_empty() && self.add.is_empty() && self.remove.is_empty() {
            findings.warning(path, "changes nothing".to_owned());
        }
        let mut name_of = |name: Option<String>, at: &Path| {
            let Some(name) = name.map(|name| name.to_ascii_lowercase()).filter(|name| is_field_name(name)) else {
                findings.error(at, "`name` is missing, or no name of a header".to_owned());
                return None;
            };
            match can_edit(&name) {
                Ok(()) => Some(name),
                Err(why) => {
                    findings.error(at, format!("{name} {why}"));
                    None
                }
            }
        };
        let mut pairs = |written: Vec<RawHeader>, field: &str| -> Vec<(String, String)> {
            let at = path.key(field);
            let written = written.into_iter().enumerate();
            written
                .filter_map(|(index, header)| {
                    let value = header.value.unwrap_or_default();
                    Some((name_of(header.name, &at.index(index))?, value))
                })
                .collect()
        };
        let (set, add) = (pairs(self.set, "set"), pairs(self.add, "add"));
        let at = path.key("remove");
        let remove = self.remove.into_iter().enumerate();
        let remove = remove.filter_map(|(index, name)| name_of(Some(name), &at.index(index))).collect();
        let edits = HeaderEdits { set, add, remove };
        for (_, value) in edits.set.iter().chain(&edits.add) {
            if value.bytes().any(|byte| byte < b' ' && byte != b'\t' || byte == 0x7f) {
                findings.error(path, format!("{:?} cannot stand in a header", Shortened(value)));
            }
        }
        edits
    }
}

impl RawMirror {
    fn check(self, kind: Kind, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Mirror> {
        let backend = self.backend_ref.check(kind, metadata, &path.key("backendRef"), findings)?;
        let (share, of) = match (self.percent, self.fraction) {
            (Some(_), Some(_)) => {
                findings.error(path, "`percent` and `fraction` cannot stand together".to_owned());
                (0, 1)
            }
            (Some(percent), None) => (percent, 100),
            (None, Some(RawFraction { numerator, denominator })) => {
                (numerator.unwrap_or_default(), denominator.unwrap_or(100))
            }
            (None, None) => (1, 1),
        };
        if of == 0 || share > of {
            findings.error(path, format!("{share} of {of} is no share"));
        }
        Some(Mirror { backend, share, of })
    }
}

impl RawRedirect {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<Redirect> {
        let status = self.status_code.unwrap_or(302);
        if ![301, 302, 303, 307, 308].contains(&status) {
            findings.error(&path.key("statusCode"), format!("{status} is none of 301, 302, 303, 307, 308"));
        }
        let scheme = self.scheme.map(|scheme| match scheme {
            RawScheme::Http => "http".to_owned(),
            RawScheme::Https => "https".to_owned(),
        });
        let hostname = hostname(self.hostname, path, findings);
        let new = self.path.and_then(|new| new.check(&path.key("path"), findings));
        Some(Redirect { scheme, hostname, path: new, port: self.port.map(|port| port.0), status })
    }
}

fn hostname(written: Option<String>, path: &Path, findings: &mut Findings) -> Option<String> {
    let hostname = written?;
    if !is_subdomain(&hostname) {
        let message = format!("{:?} is no name of a host in lower case", Shortened(&hostname));
        findings.error(&path.key("hostname"), message);
        return None;
    }
    Some(hostname)
}

impl RawRewrite {
    fn check(self, path: &Path, findings: &mut Findings) -> Rewrite {
        let hostname = hostname(self.hostname, path, findings);
        Rewrite { hostname, path: self.path.and_then(|new| new.check(&path.key("path"), findings)) }
    }
}

impl RawNewPath {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<NewPath> {
        let new = match (self.r#type, self.replace_full_path, self.replace_prefix_match) {
            (Some(RawNewPathType::ReplaceFullPath), Some(text), None) => NewPath::Full(text),
            (Some(RawNewPathType::ReplacePrefixMatch), None, Some(text)) => NewPath::Prefix(text),
            _ => {
                let message = "`type` is ReplaceFullPath or ReplacePrefixMatch, with `replaceFullPath` or \
                               `replacePrefixMatch` beside it";
                findings.error(path, message.to_owned());
                return None;
            }
        };
        let (NewPath::Full(text) | NewPath::Prefix(text)) = &new;
        let may_be_empty = matches!(new, NewPath::Prefix(_));
        let starts = text.starts_with('/') || (may_be_empty && text.is_empty());
        if !starts || text.bytes().any(|byte| !byte.is_ascii_graphic() || matches!(byte, b'?' | b'#')) {
            findings.error(path, format!("{:?} is no path: it begins with `/`, without query", Shortened(text)));
            return None;
        }
        Some(new)
    }
}

impl RawCors {
    fn check(self, path: &Path, findings: &mut Findings) -> Cors {
        let at = path.key("allowOrigins");
        for (index, origin) in self.allow_origins.iter().enumerate() {
            let is_origin = origin == "*" || origin.split_once("://").is_some_and(|(_, host)| !host.is_empty());
            if !is_origin || origin.matches('*').count() > 1 {
                let message = format!("{:?} is no origin: scheme://host[:port], or `*`", Shortened(origin));
                findings.error(&at.index(index), message);
            }
        }
        Cors {
            allow_origins: self.allow_origins.iter().map(|origin| origin.to_ascii_lowercase()).collect(),
            allow_credentials: self.allow_credentials.unwrap_or_default(),
            allow_methods: self.allow_methods,
            allow_headers: self.allow_headers,
            expose_headers: self.expose_headers,
            max_age: self.max_age.unwrap_or(5),
        }
    }
}
