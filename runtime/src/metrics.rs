//! The Prometheus text of a registry, and the facts of a build. The metrics themselves belong to those who count.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus::{IntGaugeVec, Opts, Registry, TEXT_FORMAT, TextEncoder};

/// The version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// All metrics in the text format 0.0.4. A family that cannot be encoded is left out and logged: the others matter more.
pub fn encode(registry: &Registry) -> String {
    let encoder = TextEncoder::new();
    let mut text = String::new();
    for family in registry.gather() {
        let before = text.len();
        if let Err(error) = encoder.encode_utf8(std::slice::from_ref(&family), &mut text) {
            text.truncate(before);
            tracing::error!(%error, metric = family.name(), "a metric cannot be encoded");
        }
    }
    text
}

/// The answer to `GET /metrics`.
pub fn answer(registry: &Registry) -> Response {
    ([(CONTENT_TYPE, TEXT_FORMAT)], encode(registry)).into_response()
}

/// Registers the gauge `name` (as in `outrigger_build_info`) with the label `version` and the value 1.
pub fn build_info(registry: &Registry, name: &str) -> Result<(), prometheus::Error> {
    let info = IntGaugeVec::new(Opts::new(name, "The build that runs, always 1"), &["version"])?;
    info.with_label_values(&[VERSION]).set(1);
    registry.register(Box::new(info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_info_is_encoded() {
        let registry = Registry::new();
        build_info(&registry, "outrigger_build_info").unwrap();
        assert!(build_info(&registry, "outrigger_build_info").is_err());
        assert_eq!(
            encode(&registry),
            format!(
                "# HELP outrigger_build_info The build that runs, always 1\n# TYPE outrigger_build_info gauge\n\
                 outrigger_build_info{{version=\"{VERSION}\"}} 1\n"
            )
        );
        assert_eq!(answer(&registry).headers()[CONTENT_TYPE], "text/plain; version=0.0.4");
    }
}
