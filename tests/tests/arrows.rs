//! Promise: imports run one way. See `outrigger_tests::arrows` for the rows.

use std::fs;
use std::io;
use std::path::Path;

use outrigger_tests::arrows::faults;

#[test]
fn no_arrow_of_this_workspace_runs_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests stand in a workspace");
    let faults = faults(root).unwrap();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// The faults of a made-up workspace.
fn faults_of(files: &[(&str, &str)]) -> io::Result<Vec<String>> {
    let root = tempfile::tempdir()?;
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap_or(root.path()))?;
        fs::write(path, text)?;
    }
    let mut faults = faults(root.path())?;
    faults.sort();
    Ok(faults)
}

#[test]
fn what_runs_forward_is_right() {
    let right = faults_of(&[
        (
            "sidecar/Cargo.toml",
            "[dependencies]\noutrigger-api.workspace = true\noutrigger-runtime = { path = \"x\" }\n",
        ),
        ("cli/Cargo.toml", "[dependencies]\noutrigger-sidecar.workspace = true\nkube = \"5\"\n"),
        ("sidecar/src/lib.rs", "pub mod app;\npub use inbound::Serve;\n"),
        ("sidecar/src/main.rs", "fn main() { outrigger_sidecar::app::run() }"),
        ("sidecar/src/connection.rs", "use crate::outcome::Error;\nuse std::io;"),
        (
            "sidecar/src/tls/mod.rs",
            "//! crate::app is only mentioned\nmod verify;\nuse crate::{config::{self, Limits}, net};\n\
             const A: &str = \"crate::app\"; const B: &str = r#\"\" crate::app\"#; const C: char = '\"';\n\
             /* crate::app */ fn f<'a>(_: &'a u8) { verify::x() }\n\
             mod tests { use super::*; use super::super::config; mod deep { use super::super::verify; } }\n",
        ),
        ("sidecar/src/tls/verify.rs", "use super::Config;\nuse crate::tls::Other;\nuse super::super::net::Stream;"),
        ("control-plane/src/ca/mod.rs", "use crate::config::Config;"),
    ]);
    assert_eq!(right.unwrap(), Vec::<String>::new());
}

#[test]
fn what_runs_back_or_sideways_is_found() {
    let wrong = faults_of(&[
        ("extra/Cargo.toml", ""),
        ("sidecar/Cargo.toml", "[dev-dependencies]\noutrigger-control-plane.workspace = true\n"),
        ("control-plane/Cargo.toml", "[dependencies.outrigger-sidecar]\npath = \"x\"\n"),
        ("runtime/Cargo.toml", "[target.'cfg(unix)'.dependencies]\nmesh = { package = \"outrigger\" }\nkube = \"5\"\n"),
        ("sidecar/src/net.rs", "use std::io;\nuse crate::config::Limits;"),
        ("sidecar/src/tls/mod.rs", "use crate::{\n    config,\n    inbound::{accept, app},\n    Root,\n};"),
        ("sidecar/src/tls/verify.rs", "fn f() { super::super::app::run() }"),
        ("sidecar/src/tls.rs", "mod tests { use super::super::connect; }"),
        ("sidecar/src/balance/ewma.rs", "fn f(c: char) { if c == '\\'' { crate::route::x() } }"),
        ("sidecar/src/shortcut.rs", ""),
        ("control-plane/src/registry/mod.rs", "pub(in crate::registry) use crate::distribute::X;"),
        ("runtime/src/string_utils.rs", "mod helper {}"),
        ("tests/tests/common/mod.rs", ""),
    ]);
    let expected = [
        "control-plane/Cargo.toml:1: control-plane must not depend on outrigger-sidecar",
        "control-plane/src/registry/mod.rs:1: registry must not import distribute: the arrow runs back",
        "extra/Cargo.toml: the crate has no place among the arrows; add it to tests/src/arrows.rs",
        "runtime/Cargo.toml:2: runtime must not depend on outrigger",
        "runtime/Cargo.toml:3: runtime must not depend on kube, only [\"control-plane\", \"cli\"] do",
        "runtime/src/string_utils.rs: \"string_utils\" is a name that says nothing",
        "runtime/src/string_utils.rs:1: \"helper\" is a name that says nothing",
        "sidecar/Cargo.toml:2: sidecar must not depend on outrigger-control-plane",
        "sidecar/src/balance/ewma.rs:1: balance must not import route, which stands in the same row",
        "sidecar/src/net.rs:2: net must not import config, which stands in the same row",
        "sidecar/src/shortcut.rs: the module shortcut stands in no row; give it a place in tests/src/arrows.rs",
        "sidecar/src/tls.rs:1: tls must not import connect: the arrow runs back",
        "sidecar/src/tls/mod.rs:3: tls must not import inbound: the arrow runs back",
        "sidecar/src/tls/mod.rs:4: tls imports \"Root\" of the crate's root; import it from its own module",
        "sidecar/src/tls/verify.rs:1: tls must not import app: the arrow runs back",
        "tests/tests/common/mod.rs: \"common\" is a name that says nothing",
    ];
    assert_eq!(wrong.unwrap(), expected);
}
