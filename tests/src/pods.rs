//! Two pods as an operator makes them, for programs that know nothing of a mesh: `cart` calls `catalog`. Each is a
//! machine of a [`TransparentMesh`] with `redirect apply` and a sidecar under uid 1337; the whole mesh is STRICT. A test
//! starts a server in catalog and a client in cart, and asks [`Pods::http`] and [`Pods::tcp`] what both sidecars have
//! counted. Needs root: the sidecar has a user of its own, and so have servers that refuse to be root.

use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::eventually::{PATIENCE, eventually, within};
use crate::mesh::STRICT;
use crate::metrics::Samples;
use crate::namespace::{Families, Namespace, refused};
use crate::process::{Process, Program, command};
use crate::transparent::{self, TransparentMesh};
use crate::wire::Response;

/// The sidecar's user.
const SIDECAR: u32 = 1337;
/// The user of servers that refuse to be root.
pub const NOBODY: u32 = 65534;
/// Of one program, start to end, on a busy machine with binaries that are not optimised.
pub const LONG: Duration = Duration::from_secs(120);
const NAMES: [&str; 2] = ["cart", "catalog"];

/// A port of the service, and where the application listens. Its protocol is not declared.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    pub service: u16,
    pub app: u16,
}

/// The mesh of one test. Ends with everything in it when it is dropped.
pub struct Pods {
    sidecars: Vec<Process>,
    mesh: TransparentMesh,
    family: Families,
    under_test: &'static str,
}

impl Pods {
    /// Everything is up and knows of each other. `under_test` is `under_test!()`, `needs` names the programs of the test,
    /// `python` being the one of MESH_TEST_PYTHON. None where this machine lacks one of them, network namespaces or users
    /// for us, which has then been said.
    pub async fn start(under_test: &'static str, family: Families, ports: &[Port], needs: &[&str]) -> Option<Pods> {
        for need in needs {
            refused(find(need))?;
        }
        let yaml = format!("{STRICT}---\n{}", service(virtual_address(family), ports));
        let mesh = TransparentMesh::start(under_test, family, &NAMES, &yaml).await?;
        let other_users = mesh.at("cart").command_as(SIDECAR, "true").output().unwrap();
        let said = String::from_utf8_lossy(&other_users.stderr).trim().to_owned();
        refused(if other_users.status.success() { Ok(()) } else { Err(format!("no user but root: {said}")) })?;
        std::fs::set_permissions(mesh.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut pods = Pods { sidecars: Vec::new(), mesh, family, under_test };
        for name in NAMES {
            pods.at(name).hosts(&[(pods.service(), "catalog.shop"), (pods.service(), "catalog")]);
            // Names come from there alone: what is not in it is unknown at once.
            pods.at(name).file("/etc/nsswitch.conf", "hosts: files\n");
            pods.at(name).file("/etc/resolv.conf", "");
            pods.redirect(name, "apply");
            let sidecar = pods.sidecar(name);
            pods.sidecars.push(sidecar);
        }
        for sidecar in &mut pods.sidecars {
            sidecar.ready().await;
        }
        for name in NAMES {
            eventually(&format!("{name}'s sidecar is ready"), async || {
                (pods.get(name, 15021, "/ready").await.status == 200).then_some(())
            })
            .await;
        }
        eventually("both are registered", async || {
            let status = transparent::get(pods.mesh.network.hub(), "127.0.0.1:15014", "/status").await;
            let status: serde_json::Value = serde_json::from_slice(&status.body).unwrap();
            (status["leases"] == NAMES.len()).then_some(())
        })
        .await;
        Some(pods)
    }

    /// Runs `redirect apply` or `redirect remove` in a pod.
    pub fn redirect(&self, pod: &str, verb: &str) {
        let mut redirect = command(self.under_test, Program::Sidecar);
        redirect.args(["redirect", verb]);
        let output = self.at(pod).inside(&redirect).output().unwrap();
        assert!(output.status.success(), "{pod}: redirect {verb}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn sidecar(&self, name: &str) -> Process {
        let run = self.mesh.sidecar_command(self.at(name), name);
        let home = self.path(&format!("home-{name}"));
        for path in [home.clone(), home.join("token"), home.join("trust-bundle.pem")] {
            chown(path, Some(SIDECAR), Some(SIDECAR)).unwrap();
        }
        // The binary may lie where only root can go; here it has a place that everybody can.
        let binary = self.path("sidecar");
        std::fs::write(&binary, "").unwrap();
        self.at(name).run(&format!("mount --bind {} {}", run.get_program().display(), binary.display()));
        let mut open = Command::new(binary);
        open.args(run.get_args());
        run.get_envs().filter(|(_, value)| value.is_none()).for_each(|(name, _)| {
            open.env_remove(name);
        });
        if let Ok(level) = std::env::var("OUTRIGGER_TEST_LOG") {
            open.args(["--log-level", &level]);
        }
        Process::spawn(self.at(name).inside_as(Some(SIDECAR), &open))
    }

    pub fn at(&self, pod: &str) -> &Namespace {
        self.mesh.at(pod)
    }

    /// Where the service is found: the name `catalog.shop` stands for it in both pods.
    pub fn service(&self) -> IpAddr {
        virtual_address(self.family)
    }

    /// Where a server of catalog has to listen: every address of the family.
    pub fn everywhere(&self) -> &'static str {
        if self.family == Families::V6 { "::" } else { "0.0.0.0" }
    }

    /// A pod's own address.
    pub fn address(&self, pod: &str) -> IpAddr {
        self.mesh.address(pod)
    }

    /// A path of the mesh's directory, which every user may enter.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mesh.path(name)
    }

    /// A directory of its own for a server that does not run as root.
    pub fn directory_of(&self, name: &str, user: u32) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        chown(&path, Some(user), Some(user)).unwrap();
        path
    }

    // --- programs -------------------------------------------------------------------------------------------------

    /// A program in a pod, by its name.
    pub fn program(&self, pod: &str, name: &str) -> Command {
        self.at(pod).command(find(name).unwrap())
    }

    /// The same for a user who is nobody; only in catalog.
    pub fn program_of_nobody(&self, name: &str) -> Command {
        self.at("catalog").command_as(NOBODY, find(name).unwrap())
    }

    /// A script of tests/clients in a pod.
    pub fn python(&self, pod: &str, script: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(find("python").unwrap());
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script)).args(arguments);
        without_proxies(&mut command);
        self.at(pod).inside(&command)
    }

    /// curl in cart, without the settings of whoever runs the test; `shown` is what it writes out at the end.
    pub async fn curl(&self, shown: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("curl");
        command.args(["-q", "-sS", "--max-time", "100", "-w", &format!("{shown}\n")]).args(arguments);
        without_proxies(&mut command);
        run(self.at("cart").inside(&command)).await
    }

    /// A server that says `ready` on stdout, as those of tests/clients do.
    pub async fn serve(&self, command: Command) -> Process {
        self.serve_until(command, "ready").await
    }

    /// A server that says so when it serves.
    pub async fn serve_until(&self, command: Command, sign: &str) -> Process {
        let line = format!("{command:?}");
        let mut process = Process::spawn(command);
        within(LONG, &format!("{sign:?} of {line}"), async || {
            let said = format!("{}\n{}", process.stdout(), process.stderr());
            if let Some(status) = process.try_wait() {
                panic!("{line}: {status}\n{said}");
            }
            said.contains(sign).then_some(())
        })
        .await;
        process
    }

    /// A server that says nothing: waits until it listens on a port of catalog, without connecting, which is counted.
    pub async fn serve_on(&self, command: Command, port: u16) -> Process {
        let line = format!("{command:?}");
        let mut process = Process::spawn(command);
        within(LONG, &format!("a listener on {port}"), async || {
            if let Some(status) = process.try_wait() {
                panic!("{line}: {status}\n{}\n{}", process.stdout(), process.stderr());
            }
            (!self.at("catalog").run(&format!("ss -Hltn sport = :{port}")).is_empty()).then_some(())
        })
        .await;
        process
    }

    // --- what was counted -----------------------------------------------------------------------------------------

    /// A GET as those from outside of the pod make it.
    async fn get(&self, pod: &str, port: u16, path: &str) -> Response {
        let address = std::net::SocketAddr::new(self.address(pod), port).to_string();
        transparent::get(self.mesh.network.hub(), &address, path).await
    }

    /// `/metrics` of a pod's sidecar, as Prometheus gets it.
    pub async fn metrics(&self, pod: &str) -> Samples {
        let answer = self.get(pod, 15020, "/metrics").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        Samples::parse(&answer.text())
    }

    /// Waits until both sides have counted `requests` of this protocol between cart and catalog with mutual TLS, and
    /// nothing else. `reasons` are the words that may stand beside some of them.
    pub async fn http(&self, protocol: &str, requests: u32, reasons: &[&str]) -> Both {
        let both = self.counted(Both::REQUESTS, protocol, requests).await;
        both.only(Both::REQUESTS, protocol, reasons, self);
        both
    }

    /// The same for `connections` that were closed, and their bytes. Nothing was taken for HTTP.
    pub async fn tcp(&self, protocol: &str, connections: u32, reasons: &[&str]) -> Both {
        let both = self.counted(Both::CONNECTIONS, protocol, connections).await;
        both.only(Both::CONNECTIONS, protocol, reasons, self);
        for side in [&both.cart, &both.catalog] {
            assert_eq!(side.sum(Both::REQUESTS, &[]), 0.0, "HTTP was found in it");
        }
        for name in ["outrigger_tcp_sent_bytes_total", "outrigger_tcp_received_bytes_total"] {
            let [near, far] = both.sums(name, &[("protocol", protocol), ("mtls", "true")]);
            // What a reset overtakes is lost on the way.
            let lost = if reasons.is_empty() { 0.0 } else { 1024.0 * f64::from(connections) };
            assert!((near - far).abs() <= lost && near > 0.0, "{name}: {near} at cart and {far} at catalog");
        }
        both
    }

    async fn counted(&self, name: &str, protocol: &str, count: u32) -> Both {
        let begun = Instant::now();
        loop {
            let both = Both { cart: self.metrics("cart").await, catalog: self.metrics("catalog").await };
            let sums = both.sums(name, &[("protocol", protocol), ("mtls", "true")]);
            if sums == [f64::from(count); 2] {
                return both;
            }
            let seen = [&both.cart, &both.catalog].map(|side| side.select(name, &[]).collect::<Vec<_>>());
            assert!(
                begun.elapsed() < PATIENCE,
                "{name} of {protocol}: {sums:?} at cart and catalog instead of {count}: {seen:#?}\n{}",
                self.logs()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What the mesh's processes said on stderr.
    pub fn logs(&self) -> String {
        let mut text = format!("control plane:\n{}", self.mesh.control_plane_log());
        for (name, sidecar) in NAMES.iter().zip(&self.sidecars) {
            text += &format!("\n{name}:\n{}", sidecar.stderr());
        }
        text
    }
}

/// The metrics of both sides.
pub struct Both {
    pub cart: Samples,
    pub catalog: Samples,
}

impl Both {
    const REQUESTS: &str = "outrigger_http_requests_total";
    const CONNECTIONS: &str = "outrigger_tcp_connections_closed_total";

    /// cart's sum as the caller, and catalog's as the called.
    pub fn sums(&self, name: &str, labels: &[(&str, &str)]) -> [f64; 2] {
        [("outbound", &self.cart), ("inbound", &self.catalog)].map(|(direction, side)| {
            let labels: Vec<_> = labels.iter().copied().chain([("direction", direction)]).collect();
            side.sum(name, &labels)
        })
    }

    /// Every sample is of this edge, with mutual TLS, of this protocol, and for no other reason.
    fn only(&self, name: &str, protocol: &str, reasons: &[&str], pods: &Pods) {
        for (direction, side) in [("outbound", &self.cart), ("inbound", &self.catalog)] {
            for sample in side.select(name, &[]) {
                for (label, value) in [
                    ("direction", direction),
                    ("mtls", "true"),
                    ("protocol", protocol),
                    ("source_workload", "cart"),
                    ("source_principal", "spiffe://outrigger.local/ns/shop/sa/cart"),
                    ("destination_service", "catalog.shop"),
                    ("destination_workload", "catalog"),
                ] {
                    assert_eq!(sample.label(label), value, "{label} of {sample:?}");
                }
                let reason = sample.label("reason");
                assert!(reason.is_empty() || reasons.contains(&reason), "{sample:?}\n{}", pods.logs());
            }
        }
    }

    /// How often both sides decided this of a connection on a port whose protocol is not declared.
    pub fn detected(&self, outcome: &str) -> [f64; 2] {
        [&self.cart, &self.catalog].map(|side| side.sum("outrigger_detect_total", &[("outcome", outcome)]))
    }
}

/// Runs to the end and gives what it said on stdout. Panics with what it complained of.
pub async fn run(command: Command) -> String {
    let line = format!("{command:?}");
    let (status, stdout, stderr) = Process::spawn(command).finish(LONG).await;
    assert!(status.success(), "{line}: {status}\n{stdout}\n{stderr}");
    stdout.trim_end().to_owned()
}

/// Where a program is: in PATH, or where Debian has those that are not for everybody.
pub fn find(name: &str) -> Result<PathBuf, String> {
    if name == "python" {
        let given = std::env::var_os("MESH_TEST_PYTHON").map(PathBuf::from).ok_or(
            "MESH_TEST_PYTHON is not set: python3 -m venv DIR, DIR/bin/pip install -r tests/clients/requirements.txt, \
             MESH_TEST_PYTHON=DIR; .ci/run does all that",
        )?;
        let file = if given.is_dir() { given.join("bin/python") } else { given };
        return std::path::absolute(file).map_err(|error| format!("MESH_TEST_PYTHON: {error}"));
    }
    // The rabbitmq-server in PATH wants to be root or rabbitmq; of several versions of PostgreSQL any will do.
    let mut places = vec![PathBuf::from("/usr/lib/rabbitmq/bin")];
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    places.extend(versions.map(|version| version.path().join("bin")));
    places.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    places.push(PathBuf::from("/usr/sbin"));
    let found = places.iter().map(|place| place.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format!("{name} is not installed: see the packages of .ci/run"))
}

/// The service's clusterIP: behind the gateway, where nobody is.
fn virtual_address(family: Families) -> IpAddr {
    if family == Families::V6 { "fd96::10".parse().unwrap() } else { [10, 96, 0, 10].into() }
}

fn service(address: IpAddr, ports: &[Port]) -> String {
    let ports: String = ports
        .iter()
        .map(|port| format!("  - {{name: p{}, port: {}, targetPort: {}}}\n", port.service, port.service, port.app))
        .collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: catalog, namespace: shop}}\nspec:\n  clusterIP: \
         \"{address}\"\n  selector: {{app: catalog}}\n  ports:\n{ports}"
    )
}

fn without_proxies(command: &mut Command) {
    for name in ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
}
