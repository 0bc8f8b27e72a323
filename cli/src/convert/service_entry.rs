//! Istio's ServiceEntry: ours has its fields, and says TLS itself.

use serde_json::{Map, Value};

use super::fields::{Fields, Left};
use super::{Document, OURS};

pub(super) fn entry(document: &Document, left: &mut Left) -> Option<Value> {
    let mut spec = Fields::new("spec", document.spec(), left);
    let mut ours = Map::new();
    for name in ["hosts", "ports", "resolution", "endpoints", "location"] {
        spec.rename(name, name, &mut ours);
    }
    spec.end(left);
    Some(document.becomes(OURS, "ServiceEntry", ours))
}
