//! Promise: a sidecar whose memory is nearly used up refuses new connections and says so; what is open goes on, and it
//! accepts again when there is enough.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use outrigger_tests::metrics::Samples;
use outrigger_tests::process::{self, Process, Program};
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, under_test};

/// A control group with a limit of memory, of version 2 or 1; taken away when it is dropped.
struct Group {
    directory: PathBuf,
    limit: PathBuf,
}

impl Group {
    fn new() -> Option<Group> {
        let name = format!("outrigger-test-{}", std::process::id());
        for (root, limit) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            let directory = Path::new(root).join(&name);
            if fs::create_dir(&directory).is_err() {
                continue;
            }
            let group = Group { limit: directory.join(limit), directory };
            if group.limit.exists() && fs::write(&group.limit, (1_u64 << 40).to_string()).is_ok() {
                return Some(group);
            }
        }
        // Past the test runner, which keeps to itself what a passing test prints.
        let why = "no control group with a limit of memory can be made here, as root it can";
        let _ = writeln!(std::io::stderr(), "memory DID NOT RUN: {why}");
        None
    }

    fn limit(&self, bytes: u64) {
        fs::write(&self.limit, bytes.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once its processes are gone, which takes the kernel a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// A sidecar as a process in that group.
async fn sidecar_in(group: &Group, mesh: &Mesh) -> Process {
    let token = mesh.path("cart-1.token");
    fs::write(&token, mesh.token("shop", "cart", &[])).unwrap();
    let program = process::command(under_test!(), Program::Sidecar);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.directory.display())).arg("sh");
    command.arg(program.get_program()).args(program.get_args());
    command.arg("run").args(["--name", "cart-1", "--namespace", "shop", "--service-account", "cart"]);
    command.args(["--control-plane", &mesh.control_plane().to_string(), "--workers", "1"]);
    command.arg("--trust-bundle").arg(mesh.trust_bundle()).arg("--token-file").arg(token);
    command.args(["--outbound", "127.0.0.1:0=catalog:80"]);
    for port in ["--admin-listen", "--metrics-listen", "--health-listen"] {
        command.args([port, "127.0.0.1:0"]);
    }
    let mut process = Process::spawn(command);
    process.ready().await;
    process
}

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

#[tokio::test]
async fn when_memory_is_short_what_is_open_goes_on_and_nothing_new_comes_in() {
    let Some(group) = Group::new() else { return };
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = sidecar_in(&group, &mesh).await;
    let door = near.address("outbound:catalog.shop:80").await;
    let metrics = near.address("metrics").await;
    let value = async |name: &str| Samples::parse(&wire::get(metrics, "/metrics").await.text()).sum(name, &[]);
    let mut open = Vec::new();
    for _ in 0..30 {
        let mut client = Connection::open(door).await;
        assert_eq!(client.ask(GET).await.status, 200);
        open.push(client);
    }
    assert_eq!(value("outrigger_memory_pressure").await, 0.0);

    let resident = value("process_resident_memory_bytes").await as u64;
    group.limit(resident / 95 * 100);
    eventually("memory is short", async || (value("outrigger_memory_pressure").await == 1.0).then_some(())).await;
    for _ in 0..10 {
        Connection::open(door).await.expect_end().await;
    }
    assert_eq!(value("outrigger_connections_refused_total").await, 10.0);
    for client in &mut open {
        assert_eq!(client.ask(GET).await.status, 200);
    }
    near.says("memory is short").await;

    group.limit(2 * resident);
    eventually("there is enough again", async || (value("outrigger_memory_pressure").await == 0.0).then_some(())).await;
    assert_eq!(wire::get(door, "/").await.status, 200);
    near.says("memory is no longer short").await;
    assert_eq!(near.stderr().matches("memory is short").count(), 1, "{}", near.stderr());
}
