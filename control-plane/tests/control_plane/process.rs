//! The binary: stdout lines, signals and exit codes.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use super::support::Fixture;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-control-plane");

fn command(fixture: &Fixture) -> Command {
    let args = fixture.args();
    let mut command = Command::new(PROGRAM);
    command
        .arg("--config")
        .arg(args.config)
        .arg("--state")
        .arg(args.state)
        .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Reads stdout until `ready`.
fn until_ready(child: &mut Child) -> Vec<String> {
    let stdout = BufReader::new(child.stdout.as_mut().unwrap());
    let mut lines = Vec::new();
    for line in stdout.lines() {
        lines.push(line.unwrap());
        if lines.last().is_some_and(|line| line == "ready") {
            break;
        }
    }
    lines
}

fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &id]).status();
    assert!(sent.unwrap().success());
}

fn stderr(mut child: Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn it_says_what_it_listens_on_and_ends_cleanly() {
    let fixture = Fixture::new();
    fixture.write("broken.yaml", "kind: Service\n  x");
    let mut child = command(&fixture).spawn().unwrap();
    let lines = until_ready(&mut child);
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[0].starts_with("listening grpc 127.0.0.1:"), "{lines:?}");
    assert!(lines[1].starts_with("listening admin 127.0.0.1:"), "{lines:?}");
    assert!(fixture.args().state.join("trust-bundle.pem").exists());

    let second = command(&fixture).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(text.contains(&format!("process {}", child.id())) && text.contains("--state"), "{text}");

    signal(&child, "HUP");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let text = stderr(child);
    assert!(text.contains("broken.yaml:"), "the mistake in the file is told: {text}");
}

#[test]
fn mistakes_in_flags_and_files_end_it_with_two() {
    let fixture = Fixture::new();
    let unknown = command(&fixture).arg("--confg").output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    let args = fixture.args();
    let absent = Command::new(PROGRAM).arg("--config").arg("/nonexistent").arg("--state").arg(&args.state).output();
    let absent = absent.unwrap();
    assert_eq!(absent.status.code(), Some(2));
    assert!(String::from_utf8(absent.stderr).unwrap().contains("/nonexistent"));

    std::fs::create_dir_all(args.state.join("ca")).unwrap();
    std::fs::write(args.state.join("ca/root.pem"), "hello").unwrap();
    let unfit = command(&fixture).output().unwrap();
    assert_eq!(unfit.status.code(), Some(2));
    let text = String::from_utf8(unfit.stderr).unwrap();
    assert!(text.contains("root.pem cannot be used"), "{text}");
}

#[test]
fn a_port_in_use_and_another_trust_domain_are_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let fixture = Fixture::new();
    let address = taken.local_addr().unwrap().to_string();
    let mut first = command(&fixture);
    first.args(["--trust-domain", "a.test"]);
    let used = Command::new(PROGRAM)
        .arg("--config")
        .arg(fixture.args().config)
        .arg("--state")
        .arg(fixture.args().state)
        .args(["--listen", &address, "--trust-domain", "a.test"])
        .output()
        .unwrap();
    assert_eq!(used.status.code(), Some(1));
    let text = String::from_utf8(used.stderr).unwrap();
    assert!(text.contains(&address) && text.contains("--listen"), "{text}");
    let other = command(&fixture).args(["--trust-domain", "b.test"]).output().unwrap();
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8(other.stderr).unwrap().contains("belongs to trust domain a.test"));
}
