//! What scripts rely on: exit codes, and what goes to which stream.

#![expect(clippy::unwrap_used, reason = "a test may say so by panicking")]

use std::process::{Command, Output};

fn outrigger(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outrigger")).args(arguments).output().unwrap()
}

#[test]
fn exit_codes_and_streams() {
    // Arguments, exit code, what stdout and stderr contain ("" for nothing at all).
    let cases: &[(&[&str], i32, &str, &str)] = &[
        (&[], 0, "outrigger demo", ""),
        (&["--help"], 0, "First thing to try", ""),
        (&["--version"], 0, "outrigger ", ""),
        (&["demo", "--help"], 0, "--for", ""),
        (&["demo", "--for", "0"], 2, "", "--for"),
        (&["demo", "--otlp", "jaeger"], 2, "", "--otlp"),
        (&["tokn"], 2, "", "'token'"),
        (&["explain"], 2, "", "--from"),
        (&["explain", "/nonexistent", "--from", "a/b", "--to", "c"], 2, "", "/nonexistent"),
        (&["explain", "no-such-id", "--admin", "127.0.0.1:1"], 2, "", "nobody listens at 127.0.0.1:1"),
        (&["explain", "a", "b"], 2, "", "--from and --to are missing"),
        (&["explain", "/"], 2, "", "--from and --to are missing"),
        (&["explain", "--from", "a/b"], 2, "", "--to"),
        (&["policy"], 2, "", "report"),
        (&["policy", "report", "--control-plane-admin", "127.0.0.1:1"], 1, "", "nobody listens at 127.0.0.1:1"),
        (&["test"], 2, "", "PATH"),
        (&["check", "--all"], 2, "", "not in this version"),
        (&["token"], 2, "", "create"),
        (&["token", "create"], 2, "", "--state"),
        (&["validate"], 2, "", "PATH"),
        (&["validate", "/nonexistent"], 2, "", "/nonexistent"),
        (&["convert"], 2, "", "FILE"),
        (&["convert", "/nonexistent"], 2, "", "/nonexistent"),
        (&["sidecar", "--help"], 0, "outrigger sidecar run", ""),
        (&["sidecar", "run", "--help"], 0, "--token-file", ""),
        (&["sidecar", "run", "--nmae", "x"], 2, "", "--nmae"),
        (&["control-plane", "--help"], 0, "--config", ""),
        (&["control-plane", "--stat", "x"], 2, "", "--stat"),
        (&["status", "--control-plane-admin", "127.0.0.1:1"], 1, "", "--control-plane-admin"),
        (&["stat", "--control-plane-admin", "127.0.0.1:1"], 1, "", "nobody listens at 127.0.0.1:1"),
    ];
    for (arguments, code, out, err) in cases {
        let output = outrigger(arguments);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {stdout}{stderr}");
        for (expected, said) in [(out, &stdout), (err, &stderr)] {
            let right = if expected.is_empty() { said.is_empty() } else { said.contains(expected) };
            assert!(right, "{arguments:?}: expected {expected:?} in {said:?}");
        }
    }
    let overview = outrigger(&[]);
    let overview = String::from_utf8_lossy(&overview.stdout);
    assert!(overview.contains("explain") && !overview.contains("check "), "{overview}");
}

#[test]
fn a_token_is_alone_on_stdout() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().to_str().unwrap();
    // As a control plane leaves it.
    std::fs::write(state.path().join("trust-domain"), "outrigger.local\n").unwrap();
    let create = |namespace: &str| {
        let mut arguments = vec!["token", "create", "--state", path, "--namespace", namespace];
        arguments.extend(["--service-account", "web", "--label", "app=web", "--label", "version=2"]);
        arguments.extend([
            "--uses",
            "3",
            "--ttl",
            "10m",
            "--address",
            "10.0.0.7,fd00::/64",
            "--address",
            "10.1.0.0/16",
        ]);
        outrigger(&arguments)
    };
    let output = create("shop");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stdout.starts_with("outrigger1.") && stdout.ends_with('\n') && stdout.lines().count() == 1, "{stdout}");
    assert!(!stderr.contains("outrigger1."), "{stderr}");
    let refused = create("outrigger-system");
    assert_eq!((refused.status.code(), refused.stdout.len()), (Some(2), 0));
}

#[test]
fn what_is_converted_goes_to_stdout_and_the_rest_is_told() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("linkerd.yaml");
    let server = "apiVersion: policy.linkerd.io/v1beta3\nkind: Server\nmetadata: {name: stock, namespace: shop}\nspec: {podSelector: \
                  {matchLabels: {app: stock}}, port: PORT}\n";
    for (port, code, out, err) in [("8080", 0, "kind: AuthorizationPolicy", ""), ("http", 1, "", "spec.port is a name")]
    {
        std::fs::write(&path, server.replace("PORT", port)).unwrap();
        let output = outrigger(&["convert", path.to_str().unwrap()]);
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(output.status.code(), Some(code), "{said:?}");
        assert!(said[0].contains(out) && said[1].contains(err), "{said:?}");
        assert_eq!((said[0].is_empty(), said[1].is_empty()), (out.is_empty(), err.is_empty()), "{said:?}");
    }
}
