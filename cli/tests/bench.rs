//! `outrigger bench` as its user meets it: a short run without nginx ends by itself, with a table and a JSON file.

use std::process::Command;

#[test]
fn a_short_run_prints_a_table_and_writes_json() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bench.json");
    let short =
        "bench --requests 200 --connections 8 --rounds 1 --seconds 1 --rate 50 --idle 20 --http2 --no-nginx --no-pin";
    let output = Command::new(env!("CARGO_BIN_EXE_outrigger"))
        .args(short.split_whitespace())
        .arg("--json")
        .arg(&file)
        .output()
        .unwrap();
    let (told, complained) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{told}{complained}");
    for line in ["client sidecar", "direct", "sidecars / direct", "HTTP/1.1, closed loop", "open loop", "HTTP/2"] {
        assert!(told.contains(line), "{line} is not in\n{told}");
    }
    let seen: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for section in seen["sections"].as_array().unwrap() {
        let contenders = section["contenders"].as_array().unwrap();
        assert_eq!(contenders.len(), 2);
        for contender in contenders {
            assert_eq!(contender["rounds"][0]["failed"], 0, "{section}");
            assert!(contender["rounds"][0]["requests_per_second"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn a_mistake_is_told_before_anything_starts() {
    for line in ["bench --rounds 0", "bench --no-such-flag", "bench --connections 100000"] {
        let output = Command::new(env!("CARGO_BIN_EXE_outrigger")).args(line.split(' ')).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
    }
}
