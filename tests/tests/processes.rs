//! Promise: the binaries do what their command lines say: a mesh of processes from `token create` to the first request,
//! stdout with nothing but listeners and `ready`, exit codes 0, 1 and 2, mistakes told all at once, a killed control
//! plane that comes back with what it had.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use outrigger_tests::process::{Process, Program, command};
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, under_test, wire};

const ENDS: Duration = Duration::from_secs(10);

/// Runs to the end: exit code, stdout, stderr.
fn run(program: Program, arguments: &[&str]) -> (i32, String, String) {
    finish(command(under_test!(), program).args(arguments))
}

fn finish(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("ended by itself"), text(output.stdout), text(output.stderr))
}

fn control_plane(directory: &Path, listen: &str) -> Process {
    let config = directory.join("config").display().to_string();
    let state = directory.join("state").display().to_string();
    let flags = ["--config", &config, "--state", &state, "--listen", listen, "--admin-listen", "127.0.0.1:0"];
    Process::run(under_test!(), Program::ControlPlane, flags)
}

fn token(directory: &Path, account: &str, labels: &[&str]) -> String {
    let state = directory.join("state").display().to_string();
    let mut arguments = vec!["token", "create", "--state", &state, "--namespace", "shop", "--service-account", account];
    labels.iter().for_each(|label| arguments.extend(["--label", label]));
    let (code, stdout, stderr) = run(Program::Outrigger, &arguments);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout.lines().count(), 1, "the token alone: {stdout:?}");
    stdout.trim().to_owned()
}

struct Side<'a> {
    directory: &'a Path,
    control_plane: String,
}

impl Side<'_> {
    fn run(&self, name: &str, account: &str, labels: &[&str], more: &[&str]) -> Process {
        let file = self.directory.join(format!("{name}.token"));
        std::fs::write(&file, token(self.directory, account, labels) + "\n").unwrap();
        let bundle = self.directory.join("state/trust-bundle.pem");
        let (file, bundle) = (file.display().to_string(), bundle.display().to_string());
        let mut flags = vec!["run", "--control-plane", &self.control_plane, "--trust-bundle", &bundle];
        flags.extend(["--token-file", &file, "--name", name, "--namespace", "shop", "--service-account", account]);
        flags.extend([
            "--admin-listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
            "--health-listen",
            "127.0.0.1:0",
        ]);
        labels.iter().for_each(|label| flags.extend(["--label", label]));
        flags.extend(more);
        Process::run(under_test!(), Program::Sidecar, flags)
    }
}

#[tokio::test]
async fn a_mesh_of_processes_survives_a_killed_control_plane() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("config")).unwrap();
    let app = Application::start("catalog").await;
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: catalog, namespace: shop}}\nspec:\n  selector: {{app: \
         catalog}}\n  ports: [{{port: 80, targetPort: {}}}]\n---\n{}",
        app.port(),
        outrigger_tests::mesh::STRICT
    );
    std::fs::write(directory.path().join("config/mesh.yaml"), service).unwrap();
    let mut plane = control_plane(directory.path(), "127.0.0.1:0");
    plane.ready().await;
    let grpc = plane.address("grpc").await.to_string();
    let side = Side { directory: directory.path(), control_plane: grpc.clone() };
    let inbound = format!("127.0.0.1:0={}", app.address());
    let mut far = side.run("catalog-1", "catalog", &["app=catalog"], &["--inbound", &inbound]);
    far.ready().await;
    let more = ["--outbound", "127.0.0.1:0=catalog:80", "--http-proxy", "127.0.0.1:0", "--drain-delay", "0s"];
    let mut near = side.run("cart-1", "cart", &[], &more);
    near.ready().await;
    let lines = near.stdout();
    assert!(lines.lines().all(|line| line == "ready" || line.starts_with("listening ")), "{lines}");
    assert_eq!(lines.lines().last(), Some("ready"), "{lines}");
    for name in ["admin", "metrics", "health", "outbound:catalog.shop:80", "http-proxy"] {
        assert!(near.addresses().contains_key(name), "{name} in {lines}");
    }
    let outbound = near.address("outbound:catalog.shop:80").await;
    assert_eq!(wire::get(outbound, "/").await.status, 200);

    let bundle = std::fs::read(directory.path().join("state/trust-bundle.pem")).unwrap();
    plane.signal("KILL");
    plane.wait(ENDS).await;
    assert_eq!(wire::get(outbound, "/").await.status, 200);
    // What is wrong is said in words that name it.
    near.says("the control plane closed the connection").await;
    assert!(!near.stderr().contains("h2 protocol error"), "{}", near.stderr());
    let unmet = "GET http://other.shop/ HTTP/1.1\r\nHost: other.shop\r\nConnection: close\r\n\r\n";
    let answer = wire::ask(near.address("http-proxy").await, unmet).await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "not_ready"));
    assert!(
        answer.text().contains("the control plane is away and this destination was never met"),
        "{}",
        answer.text()
    );
    near.says("the control plane cannot be reached, and other.shop:80 was never met before").await;
    let mut plane = control_plane(directory.path(), &grpc);
    plane.ready().await;
    assert_eq!(std::fs::read(directory.path().join("state/trust-bundle.pem")).unwrap(), bundle);
    let metrics = near.address("metrics").await;
    eventually("connected again", async || {
        let samples = outrigger_tests::metrics::Samples::parse(&wire::get(metrics, "/metrics").await.text());
        (samples.sum("outrigger_control_plane_connected", &[]) == 1.0).then_some(())
    })
    .await;
    let answer = wire::get(outbound, "/").await;
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), plane.stderr());

    // Killed without a word, a sidecar breaks its own connections only.
    far.signal("KILL");
    far.wait(ENDS).await;
    let answer = wire::get(outbound, "/").await;
    assert_eq!(answer.status, 503, "{}", answer.text());
    for process in [&mut near, &mut plane] {
        process.signal("TERM");
        assert_eq!(process.wait(ENDS).await.code(), Some(0), "{}", process.stderr());
    }
}

#[tokio::test]
async fn wrong_command_lines_end_with_2_and_name_every_mistake() {
    let (code, stdout, stderr) =
        run(Program::Sidecar, &["run", "--name", "A_B", "--inbound", "x", "--drain-delay", "5"]);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    for flag in [
        "--name",
        "--inbound",
        "--drain-delay",
        "--control-plane",
        "--trust-bundle",
        "--namespace",
        "--service-account",
    ] {
        assert!(stderr.contains(flag), "{flag} in {stderr}");
    }
    assert!(stderr.contains("A_B"), "with its value: {stderr}");
    let (code, _, stderr) =
        run(Program::ControlPlane, &["--config", "/nowhere/at/all", "--state", "/tmp", "--lisen", "x"]);
    assert_eq!(code, 2, "{stderr}");
    let unknown = finish(command(under_test!(), Program::Sidecar).args(["run"]).env("OUTRIGGER_NAMES", "x"));
    assert!(unknown.0 == 2 && unknown.2.contains("OUTRIGGER_NAMES"), "{}", unknown.2);
    let missing = run(Program::ControlPlane, &["--config", "/nowhere/at/all", "--state", "/tmp/x-outrigger-none"]);
    assert!(missing.0 == 2 && missing.2.contains("/nowhere/at/all"), "{missing:?}");
}

#[tokio::test]
async fn a_port_in_use_ends_with_1_and_names_the_address() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let builder = mesh.sidecar("cart-1").config(|config| config.admin_listen = taken);
    let mut sidecar = builder.spawn(under_test!()).await;
    assert_eq!(sidecar.wait(ENDS).await.code(), Some(1));
    sidecar.says(&taken.to_string()).await;
    assert_eq!(sidecar.stdout(), "");

    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("config")).unwrap();
    let mut plane = control_plane(directory.path(), &taken.to_string());
    assert_eq!(plane.wait(ENDS).await.code(), Some(1));
    plane.says(&taken.to_string()).await;
}

#[tokio::test]
async fn a_sidecar_without_a_control_plane_runs_unready_and_says_why() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.stop_control_plane().await;
    let mut sidecar = mesh.sidecar("cart-1").outbound("catalog:80").spawn(under_test!()).await;
    let health = sidecar.address("health").await;
    let hint = eventually("/ready tells", async || {
        let answer = wire::get(health, "/ready").await;
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        (answer.status == 503 && body["reason"] != "certificate_pending").then(|| body["hint"].to_string())
    })
    .await;
    assert!(hint.contains(&mesh.control_plane().to_string()), "{hint}");
    eventually("and so does stderr", async || {
        sidecar.stderr().contains(&mesh.control_plane().to_string()).then_some(())
    })
    .await;
    let answer = wire::get(sidecar.address("outbound:catalog.shop:80").await, "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "not_ready"));
    assert!(!sidecar.stdout().contains("ready"));
    mesh.start_control_plane().await;
    sidecar.ready().await;
    let begun = Instant::now();
    sidecar.signal("INT");
    assert_eq!(sidecar.wait(ENDS).await.code(), Some(0), "{}", sidecar.stderr());
    assert!(begun.elapsed() < Duration::from_secs(3));
}

/// The same by command lines: what `--config` refuses `validate` refuses, and both say what it means; `status` ends with 1.
#[tokio::test]
async fn a_broken_policy_is_told_by_validate_and_status_and_by_their_exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config");
    std::fs::create_dir(&config).unwrap();
    let file = config.join("mesh.yaml");
    std::fs::write(&file, outrigger_tests::mesh::STRICT.replace("mode:", "mod:")).unwrap();
    std::os::unix::fs::symlink("nowhere.yaml", config.join("link.yaml")).unwrap();
    let (code, _, stderr) = run(Program::Outrigger, &["validate", config.to_str().unwrap()]);
    assert_eq!(code, 1, "{stderr}");
    let strict = "mTLS is STRICT for the whole mesh";
    for part in ["mesh.yaml:4:", "link.yaml:1:1: cannot read", strict] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    let mut plane = control_plane(directory.path(), "127.0.0.1:0");
    plane.ready().await;
    let admin = plane.address("admin").await.to_string();
    let status = || run(Program::Outrigger, &["status", "--control-plane-admin", &admin]);
    let (code, stdout, _) = status();
    assert_eq!(code, 1, "{stdout}");
    for part in ["mesh.yaml:4:", "link.yaml:1:1: cannot read", strict] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
    plane.says("the configuration was read").await;
    std::fs::remove_file(config.join("link.yaml")).unwrap();
    std::fs::write(&file, outrigger_tests::mesh::STRICT).unwrap();
    eventually("status ends with 0", async || (status().0 == 0).then_some(())).await;
    let (code, stdout, stderr) = run(Program::Outrigger, &["validate", config.to_str().unwrap()]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    std::fs::write(&file, "kind: [\n").unwrap();
    eventually("status ends with 1", async || (status().0 == 1).then_some(())).await;
    assert!(!status().1.contains(strict), "the last good text is in force");
}

#[test]
fn a_state_that_others_can_change_is_refused_and_the_fix_is_named() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir(path("config")).unwrap();
    std::fs::write(path("bundle.pem"), "").unwrap();
    let (config, bundle) = (path("config").display().to_string(), path("bundle.pem").display().to_string());
    let open = |name: &str| {
        std::fs::create_dir(path(name)).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(0o777)).unwrap();
        path(name).display().to_string()
    };
    let given_away = |name: &str| {
        std::fs::create_dir(path(name)).unwrap();
        chown(path(name), Some(12_345), None).ok().map(|()| path(name).display().to_string())
    };
    let cases = [(Some(open("open")), "chmod go-w"), (given_away("away"), "chown -R 0")];
    for (state, fix) in cases {
        let Some(state) = state else {
            println!("DID NOT RUN: only root can give files away");
            continue;
        };
        let flags =
            ["--config", &config, "--state", &state, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
        let (code, stdout, stderr) = run(Program::ControlPlane, &flags);
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(&format!("{fix} {state}")), "{stderr}");
        let flags =
            ["run", "--control-plane", "127.0.0.1:1", "--trust-bundle", &bundle, "--name", "a", "--namespace", "b"];
        let (code, stdout, stderr) =
            run(Program::Sidecar, &[&flags[..], &["--service-account", "c", "--state", &state]].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(&format!("{fix} {state}")), "{stderr}");
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 0, "nothing is written to it");
    }
}

#[test]
fn a_token_for_a_state_that_is_none_is_refused_and_makes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let typo = directory.path().join("sate");
    for state in [&typo, &directory.path().to_owned()] {
        let state = state.display().to_string();
        let flags = ["token", "create", "--state", &state, "--namespace", "shop", "--service-account", "cart"];
        let (code, stdout, stderr) = run(Program::Outrigger, &flags);
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains("--state") && stderr.contains(&state), "{stderr}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// How many threads a process has, how often they waited for something, and how many reads there were.
fn wakes_and_reads(pid: u32) -> (usize, u64, u64) {
    let number = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
        line.trim().parse::<u64>().unwrap()
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // One may end meanwhile.
    let status = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok());
    let wakes: Vec<u64> = status.map(|status| number(&status, "voluntary_ctxt_switches:")).collect();
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    (wakes.len(), wakes.iter().sum(), number(&io, "syscr:"))
}

/// On a laptop it would cost battery, on a machine with 500 sidecars a core. How often it wakes does not depend on how fast
/// the machine is.
#[tokio::test]
async fn an_idle_sidecar_sleeps() {
    const WINDOW: Duration = Duration::from_secs(10);
    let app = Application::start("catalog").await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).outbound("catalog:80");
    let mut sidecar = builder.spawn(under_test!()).await;
    sidecar.ready().await;
    assert_eq!(wire::get(sidecar.address("outbound:catalog.shop:80").await, "/").await.status, 200);
    let mut seen = Vec::new();
    // What was in use settles first.
    for _ in 0..6 {
        let before = wakes_and_reads(sidecar.pid());
        tokio::time::sleep(WINDOW).await;
        let after = wakes_and_reads(sidecar.pid());
        // A thread that ends takes its count with it.
        if after.0 != before.0 {
            continue;
        }
        seen.push((after.1 - before.1, after.2 - before.2));
        // A wake is several of these. Looking at memory four times a second alone makes 96, with 160 reads.
        if seen.last().is_some_and(|(wakes, reads)| *wakes <= 75 && *reads <= 60) {
            assert_eq!(wire::get(sidecar.address("outbound:catalog.shop:80").await, "/").await.status, 200);
            return;
        }
    }
    panic!("wakes and reads in {WINDOW:?}: {seen:?}");
}
