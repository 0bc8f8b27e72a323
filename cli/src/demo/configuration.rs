//! The YAML that the demo gives to its control plane: what a user would write for the same mesh. Pure.

use outrigger_api::resource::{SourceFile, parse};

use super::edge::NAMESPACE;
use super::mesh::PORTS;

/// `applications` are the ports at which web, catalog and ledger really listen.
pub(super) fn yaml(applications: [u16; 3], otlp: Option<&str>) -> String {
    let mut documents = vec![mesh_config(otlp), STRICT.to_owned()];
    for (((name, port), application), protocol) in PORTS.iter().zip(applications).zip(["http", "grpc", "tcp"]) {
        documents.push(format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  selector: \
             {{app: {name}}}\n  ports:\n  - {{name: {protocol}, port: {port}, targetPort: {application}}}\n"
        ));
    }
    documents.join("---\n")
}

/// Whether traces can be sent there.
pub(super) fn is_valid(otlp: &str) -> bool {
    let text = mesh_config(Some(otlp));
    parse(&[SourceFile { name: "demo.yaml".to_owned(), text }]).errors.is_empty() && !otlp.is_empty()
}

const STRICT: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict, namespace: outrigger-system}
spec:
  mtls: {mode: STRICT}
";

/// The refused plaintext of the demo is no news for the access log; what fails is in the verdict.
fn mesh_config(otlp: Option<&str>) -> String {
    let mut text = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: outrigger-system}
spec:
  accessLog: Off
"
    .to_owned();
    if let Some(endpoint) = otlp {
        // JSON is YAML, and quotes whatever the flag holds.
        let endpoint = serde_json::Value::from(endpoint);
        text.push_str(&format!("  tracing:\n    otlpEndpoint: {endpoint}\n    randomSamplingPercentage: 100\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_valid_and_says_what_it_should() {
        for otlp in [None, Some("http://127.0.0.1:4317")] {
            let text = yaml([8001, 8002, 8003], otlp);
            let parsed = parse(&[SourceFile { name: "demo.yaml".into(), text: text.clone() }]);
            assert!(parsed.errors.is_empty() && parsed.warnings.is_empty(), "{:?}\n{text}", parsed);
            assert_eq!(parsed.resources.services.len(), 3);
            assert_eq!(parsed.resources.peer_authentications.len(), 1);
            assert_eq!(parsed.resources.mesh.tracing.otlp_endpoint.as_deref(), otlp);
        }
        for wrong in ["", "jaeger", "http://", "ftp://jaeger:4317"] {
            assert!(!is_valid(wrong), "{wrong}");
        }
    }
}
