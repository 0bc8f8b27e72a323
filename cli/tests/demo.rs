//! The demo as its user meets it: it ends by itself with a verdict, and Ctrl-C leaves nothing behind.

#![expect(clippy::unwrap_used, reason = "a test may say so by panicking")]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outrigger::demo::{self, Options};

#[tokio::test]
async fn every_request_is_answered_under_mutual_tls() {
    let options = Options { duration: Some(Duration::from_secs(3)), ..Options::default() };
    let report = demo::run(options).await.unwrap();
    assert_eq!(report.faults, []);
    assert!(report.answered > 20, "{report:?}");
    assert_eq!((report.failed, report.interrupted), (0, false));
    let edges: Vec<_> = report.rows.iter().map(|row| (row.from, row.to, row.protocol, row.mtls)).collect();
    let expected =
        [("load", "web", "HTTP/1.1", true), ("web", "catalog", "gRPC", true), ("web", "ledger", "TCP", true)];
    assert_eq!(edges, expected);
    for row in &report.rows {
        assert_eq!(row.caller_identity, format!("spiffe://outrigger.local/ns/demo/sa/{}", row.from));
        assert_eq!(row.service_identity, format!("spiffe://outrigger.local/ns/demo/sa/{}", row.to));
        assert_eq!(row.success_percent, Some(100.0));
        assert!(row.requests_per_second > 0.0 && row.p50 <= row.p99 && row.p50 > Some(0.0), "{row:?}");
    }
}

fn start(temporary: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.arg("demo").args(arguments).env("TMPDIR", temporary);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn left_in(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    for signal in ["INT", "TERM"] {
        let temporary = tempfile::tempdir().unwrap();
        let mut demo = start(temporary.path(), &[]);
        let mut stdout = BufReader::new(demo.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("/shop?item=") {
            line.clear();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "the demo ended before it began");
        }
        let shop = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        assert!(std::net::TcpStream::connect(&shop).is_ok());
        assert_eq!(left_in(temporary.path()), 1);
        let pid = demo.id().to_string();
        assert!(Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &pid]).status().unwrap().success());
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(demo.wait().unwrap().code(), Some(0), "{signal}: {rest}");
        assert_eq!(left_in(temporary.path()), 0, "{signal}");
        assert!(std::net::TcpStream::connect(&shop).is_err(), "{signal}");
    }
}

#[test]
fn it_ends_by_itself_and_says_so_within_a_hundred_columns() {
    let temporary = tempfile::tempdir().unwrap();
    let output = start(temporary.path(), &["--for", "2"]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("every edge mutually authenticated"), "{said}");
    assert!(said.lines().all(|line| line.chars().count() <= 100), "{said}");
    assert_eq!(left_in(temporary.path()), 0);
}

#[test]
fn what_stands_in_its_way_is_named() {
    let absent = Path::new("/nonexistent");
    let output = start(absent, &["--for", "2"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("temporary directory") && complaint.contains("/nonexistent"), "{complaint}");
}
