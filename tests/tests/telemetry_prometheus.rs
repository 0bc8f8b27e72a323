//! Promise: the text of the metrics and the rules that read it are what Prometheus expects. promtool says so, where it is
//! installed.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use outrigger_tests::counted::{CLOSED, MESSAGES, REQUESTS, counts, pair};
use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, eventually};

#[tokio::test]
async fn promtool_finds_nothing_to_complain_of() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    // A sample of everything.
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    Http2::open(pair.near.outbound()).await.unary("Unary", b"hello").await.unwrap();
    let mut opaque = Connection::open(pair.near.outbound()).await;
    opaque.send(b"\xff\xff\xff\xff\r\n\r\n").await;
    opaque.take_to_end().await;
    drop(opaque);
    for (_, sidecar) in pair.sides() {
        counts(sidecar, &[], &[(REQUESTS, 2.0), (CLOSED, 1.0), (MESSAGES, 2.0)]).await;
    }
    let addresses = [
        ("cart-1", pair.near.address("metrics")),
        ("catalog-1", pair.far.address("metrics")),
        ("control plane", pair.mesh.admin()),
    ];
    for (name, address) in addresses {
        let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let answer = wire::ask(address, request).await;
        let kind = answer.header("content-type").unwrap_or_default();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{name}: {kind}");
        let Some((clean, said)) = promtool(&["check", "metrics"], &answer.text()) else { return };
        assert!(clean && said.trim().is_empty(), "{name}: {said}");
    }
}

#[test]
fn promtool_takes_the_rules() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/prometheus");
    for entry in std::fs::read_dir(directory).unwrap() {
        let file = entry.unwrap().path();
        let Some((clean, said)) = promtool(&["check", "rules", file.to_str().unwrap()], "") else { return };
        assert!(clean && said.contains("SUCCESS"), "{file:?}: {said}");
    }
}

/// Runs promtool. None, and a line that says so, where it is not installed; CI has it.
fn promtool(arguments: &[&str], input: &str) -> Option<(bool, String)> {
    let mut command = Command::new("promtool");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "promtool: {error}; apt-get install prometheus");
            println!("not run: promtool {arguments:?}: {error}; it is in Debian's package prometheus");
            return None;
        }
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// Each metric of the mesh that a rule reads exists, with the labels that the rule names.
#[tokio::test]
async fn the_rules_read_what_is_there() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    counts(&pair.near, &[], &[(REQUESTS, 1.0)]).await;
    let text = wire::get(pair.near.address("metrics"), "/metrics").await.text();
    let known: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let rules = include_str!("../../k8s/prometheus/outrigger-rules.yaml");
    let rules: String = rules.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
    let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    for word in words.filter(|word| word.starts_with("outrigger_")) {
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        // Opaque connections have not been seen by this sidecar.
        assert!(known.contains(name) || name.starts_with("outrigger_tcp_"), "{word} is in no exposition: {known:?}");
    }
    eventually("the standard names of a process", async || {
        let samples = pair.near.metrics().await;
        let cpu = samples.select("process_cpu_seconds_total", &[]).count();
        let memory = samples.sum("process_resident_memory_bytes", &[]);
        (cpu == 1 && memory > 1e6).then_some(())
    })
    .await;
}
