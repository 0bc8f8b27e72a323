//! What texts inside resources must look like, where Kubernetes has a rule for it, and the small types that carry
//! such a rule into the specs: a value of one of them has been checked.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::Labels;
use super::findings::Findings;
use super::path::{Path, Shortened};
use crate::name::is_label;

/// A TCP port, 1 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Port(pub(super) u16);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Port, D::Error> {
        deserializer.deserialize_any(PortVisitor)
    }
}

struct PortVisitor;

impl Visitor<'_> for PortVisitor {
    type Value = Port;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Port, E> {
        let port = u16::try_from(number).ok().filter(|port| *port != 0);
        port.map(Port).ok_or_else(|| E::custom(format_args!("{number} is not a port: expected 1 to 65535")))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Port, E> {
        Err(E::custom(format_args!("{number} is not a port: expected 1 to 65535")))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Port, E> {
        Err(E::custom(format_args!("{number} is not a port: expected 1 to 65535")))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Port, E> {
        let hint = if text.parse::<u16>().is_ok() { " without quotes" } else { "" };
        Err(E::custom(format_args!("{:?} is not a port: expected a number from 1 to 65535{hint}", Shortened(text))))
    }
}

/// A port as the key of a map, where `8080` and `"8080"` are the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct PortKey(pub(super) u16);

impl<'de> Deserialize<'de> for PortKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        // One spelling only, or `08080` and `8080` would be two keys for one port.
        let port = text.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == text);
        port.map(PortKey)
            .ok_or_else(|| de::Error::custom(format_args!("{:?} is not a port: expected 1 to 65535", Shortened(&text))))
    }
}

/// Checks keys and values as Kubernetes does.
pub(super) fn check_labels(labels: &BTreeMap<String, String>, path: &Path, findings: &mut Findings) {
    for (key, value) in labels {
        check_key(key, path, findings);
        if !(value.is_empty() || is_name_part(value)) {
            findings.error(
                &path.key(key),
                format!(
                    "{:?} is not a label value: at most 63 of letters, digits, '-', '_' and '.', \
                     starting and ending with a letter or digit",
                    Shortened(value)
                ),
            );
        }
    }
}

/// Keys have the syntax of label keys; values are free.
pub(super) fn check_annotations(annotations: &Labels, path: &Path, findings: &mut Findings) {
    for key in annotations.keys() {
        check_key(key, path, findings);
    }
}

fn check_key(key: &str, path: &Path, findings: &mut Findings) {
    let valid = match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_name_part(name),
        None => is_name_part(key),
    };
    if !valid {
        findings.error_at_key(
            &path.key(key),
            format!(
                "{:?} is not a key: at most 63 of letters, digits, '-', '_' and '.', starting and ending with a \
                 letter or digit, behind an optional prefix such as `example.com/`",
                Shortened(key)
            ),
        );
    }
}

fn is_name_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// A DNS subdomain (RFC 1123): labels with dots between, at most 253 bytes.
pub(super) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}
