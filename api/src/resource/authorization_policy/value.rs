//! The texts in rules: lists of them with their negations, and what each kind of text has to look like.

use std::net::IpAddr;

use ipnet::IpNet;

use super::super::Metadata;
use super::super::findings::Findings;
use super::super::path::{Path, Shortened};
use crate::facts::Moment;
use crate::name::is_label;
use crate::path::NormalPath;
use crate::policy::authorization::{Account, Lists};
use crate::policy::pattern::Pattern;

pub(super) type Written = Option<Vec<String>>;

/// Reads a list and its negation, each value by `read`.
pub(super) fn lists<T>(
    (any_of, none_of): (Written, Written),
    path: &Path,
    [any_name, none_name]: [&str; 2],
    findings: &mut Findings,
    read: impl Fn(String) -> Result<T, String>,
) -> Lists<T> {
    let mut list = |written: Written, name: &str| {
        let path = path.key(name);
        if written.as_ref().is_some_and(Vec::is_empty) {
            findings.error_at_key(&path, "is empty and would match nothing: leave it out, or list values".to_owned());
        }
        let mut values = Vec::new();
        for (index, text) in written.into_iter().flatten().enumerate() {
            if text.is_empty() {
                findings.error(&path.index(index), "an empty text matches nothing".to_owned());
                continue;
            }
            match read(text) {
                Ok(value) => values.push(value),
                Err(message) => findings.error(&path.index(index), message),
            }
        }
        values
    };
    Lists { any_of: list(any_of, any_name), none_of: list(none_of, none_name) }
}

pub(super) fn principal(text: &str) -> Result<Pattern, String> {
    let bare = text.strip_prefix("spiffe://").unwrap_or(text);
    let pattern = Pattern::new(bare);
    match &pattern {
        Pattern::Exact(whole) if !whole.contains("/ns/") || !whole.contains("/sa/") => Err(format!(
            "{} can be nobody's: principals are TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT; for NAMESPACE/ACCOUNT there is \
             `serviceAccounts`",
            Shortened(text)
        )),
        _ => Ok(pattern),
    }
}

pub(super) fn account(text: &str, metadata: &Metadata) -> Result<Account, String> {
    let (namespace, name) = text.split_once('/').unwrap_or((metadata.namespace.as_str(), text));
    if text.contains('*') {
        return Err(format!("{}: no patterns here; use `namespaces` or `principals`", Shortened(text)));
    }
    if is_label(namespace) && crate::identity::is_account(name) {
        Ok(Account { namespace: namespace.to_owned(), name: name.to_owned() })
    } else {
        Err(format!("{} is not a service account: NAMESPACE/ACCOUNT, or ACCOUNT of this namespace", Shortened(text)))
    }
}

pub(super) fn block(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    parsed.map(|block| block.trunc()).ok_or_else(|| format!("{} is neither an IP address nor a CIDR", Shortened(text)))
}

pub(super) fn port(text: &str) -> Result<u16, String> {
    let port = text.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == text);
    port.ok_or_else(|| format!("{} is not a port: expected 1 to 65535", Shortened(text)))
}

pub(super) fn host(text: &str) -> Result<Pattern, String> {
    if text.contains([':', '/']) && !text.starts_with('[') {
        return Err(format!("{}: a host without port and path; for ports there is `ports`", Shortened(text)));
    }
    Ok(Pattern::new(text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase().as_str()))
}

pub(super) fn method(text: &str) -> Result<Pattern, String> {
    if text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err(format!("{}: methods are case-sensitive; write {}", Shortened(text), text.to_ascii_uppercase()));
    }
    Ok(Pattern::new(text))
}

pub(super) fn path_pattern(text: &str) -> Result<Pattern, String> {
    if !text.starts_with(['/', '*']) {
        return Err(format!("{}: a path begins with `/` (or is a pattern that begins with `*`)", Shortened(text)));
    }
    if text.contains(['?', '#']) {
        return Err(format!("{}: policy sees paths without query and fragment", Shortened(text)));
    }
    let pattern = Pattern::for_path(text)?;
    if let Pattern::Exact(path) = &pattern {
        let normal = NormalPath::of(path);
        if normal.text != *path || normal.ambiguous.is_some() {
            return Err(format!(
                "{} is never seen: paths are compared in their normal form, here {}",
                Shortened(text),
                Shortened(&normal.text)
            ));
        }
    }
    Ok(pattern)
}

pub(super) fn hour(text: &str) -> Result<Pattern, String> {
    let hour = text.parse::<u8>().ok().filter(|hour| *hour < 24 && hour.to_string() == text);
    hour.map(|_| Pattern::Exact(text.to_owned()))
        .ok_or_else(|| format!("{} is not an hour: 0 to 23, in UTC", Shortened(text)))
}

pub(super) fn weekday(text: &str) -> Result<Pattern, String> {
    if Moment::WEEKDAYS.contains(&text) {
        return Ok(Pattern::Exact(text.to_owned()));
    }
    Err(format!("{} is not a day: {}", Shortened(text), Moment::WEEKDAYS.join(", ")))
}
