//! docs/metrics.md and the rules for Prometheus name what exists, and the former all of it.

use super::*;
use crate::outcome::Reason;

/// The documentation is the contract's printed form: nothing that can be seen is missing from it.
#[test]
fn the_documentation_names_every_metric_label_reason_and_outcome() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let has = |word: &str| assert!(text.contains(&format!("`{word}`")), "docs/metrics.md lacks `{word}`");
    for about in about::ALL {
        has(about.name);
        about.labels.iter().for_each(|label| has(label));
    }
    for reason in Reason::ALL {
        let row = reason.row();
        let line =
            format!("| `{}` | {} | {} | `{}` | {} |", row.word, row.status, row.grpc, row.proxy_status, row.title);
        assert!(text.contains(&line), "docs/metrics.md lacks the row\n{line}");
    }
    Detected::ALL.iter().for_each(|outcome| has(outcome.as_str()));
}

/// The names that the shipped rules read are names that exist.
#[test]
fn the_shipped_rules_use_metrics_and_labels_that_exist() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/prometheus/outrigger-rules.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    for name in text.split(word).filter(|name| name.starts_with("outrigger_")) {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let elsewhere = ["outrigger_build_info"];
        assert!(about::ALL.iter().any(|about| about.name == base) || elsewhere.contains(&base), "{name}");
    }
}
