//! A mesh in network namespaces, of the real binaries: the control plane on the hub, on each machine a transparent sidecar
//! with redirect rules, and applications that know nothing of it. The rules exempt the sidecar by mark, so that the tests
//! run where there is no other user than root, too.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tokio::io::AsyncReadExt;

use crate::application::Application;
use crate::eventually::eventually;
use crate::metrics::Samples;
use crate::namespace::{Families, Namespace, Network};
use crate::process::{Process, Program, command};
use crate::wire::{Connection, Response};

/// The mark of sidecars' own sockets.
pub const MARK: &str = "1337";
const CONTROL_PLANE_PORT: u16 = 15012;

/// The mesh. Ends with all its processes and namespaces when it is dropped.
pub struct TransparentMesh {
    pub network: Network,
    families: Families,
    directory: tempfile::TempDir,
    under_test: String,
    control_plane: Process,
    written: std::cell::Cell<usize>,
}

/// A sidecar in one of the namespaces.
pub struct TransparentSidecar<'m> {
    pub machine: &'m Namespace,
    pub process: Process,
    under_test: String,
    family: Families,
}

impl TransparentMesh {
    /// None where there are no network namespaces, which has then been said. `under_test` is `under_test!()`.
    pub async fn start(under_test: &str, families: Families, names: &[&'static str], yaml: &str) -> Option<Self> {
        let network = Network::with(families, names)?;
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("config")).unwrap();
        std::fs::write(directory.path().join("config/mesh.yaml"), yaml).unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let listen = SocketAddr::new(address(network.hub(), families), CONTROL_PLANE_PORT).to_string();
        let mut run = command(under_test, Program::ControlPlane);
        run.args(["--config", &path("config"), "--state", &path("state"), "--listen", &listen]);
        run.args(["--admin-listen", "127.0.0.1:15014"]);
        let mut control_plane = Process::spawn(network.hub().inside(&run));
        control_plane.ready().await;
        let under_test = under_test.to_owned();
        Some(TransparentMesh { network, families, directory, under_test, control_plane, written: Default::default() })
    }

    pub fn at(&self, name: &str) -> &Namespace {
        self.network.at(name)
    }

    /// The address of a machine in the family of this mesh: IPv4 when there are both.
    pub fn address(&self, name: &str) -> IpAddr {
        address(self.at(name), self.families)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file of the control plane's directory and waits until it was read.
    pub async fn write(&self, file: &str, text: &str) {
        let put = |file: &str, text: &str| {
            let hidden = self.path("config").join(format!(".{file}.new"));
            std::fs::write(&hidden, text).unwrap();
            std::fs::rename(hidden, self.path("config").join(file)).unwrap();
        };
        put(file, text);
        // A file that is no document comes after it, and is complained about when it was read.
        let number = self.written.get();
        self.written.set(number + 1);
        let settled = format!("settled-{number}.yaml");
        put(&settled, "no: document\n");
        eventually("the control plane reads its directory", async || {
            let answer = get(self.network.hub(), "127.0.0.1:15014", "/status").await;
            answer.text().contains(&settled).then_some(())
        })
        .await;
        std::fs::remove_file(self.path("config").join(settled)).unwrap();
    }

    /// A Service whose selector is `app: NAME`; without a cluster IP it is headless.
    pub async fn service(&self, name: &str, cluster_ip: Option<&str>, port: u16, target_port: u16, more: &str) {
        let cluster_ip = cluster_ip.unwrap_or("None");
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  clusterIP: \
             \"{cluster_ip}\"\n  selector: {{app: {name}}}\n  ports:\n  - {{name: main, port: {port}, targetPort: \
             {target_port}{more}}}\n"
        );
        self.write(&format!("service-{name}.yaml"), &text).await;
    }

    /// Starts a sidecar on the machine of that name, with `app` as its label, service account and workload, and applies the
    /// rules. Waits until it is ready.
    pub async fn sidecar(&self, machine: &str, app: &str, more: &[&str]) -> TransparentSidecar<'_> {
        let machine = self.at(machine);
        let mut sidecar = self.start_sidecar(machine, app, more);
        sidecar.process.ready().await;
        sidecar.redirect();
        sidecar.is_ready().await;
        sidecar
    }

    /// The same for one that connects to its application with its clients' addresses.
    pub async fn sidecar_that_keeps_source(&self, machine: &str, app: &str, more: &[&str]) -> TransparentSidecar<'_> {
        let more = [&["--keep-source-address"], more].concat();
        let mut sidecar = self.start_sidecar(self.at(machine), app, &more);
        let (code, said) = sidecar.redirect_command(&["apply", "--mark", MARK, "--keep-source-address"]);
        assert_eq!(code, 0, "{said}");
        sidecar.process.ready().await;
        sidecar.is_ready().await;
        sidecar
    }

    /// Starts a sidecar and waits for nothing.
    pub fn start_sidecar<'m>(&'m self, machine: &'m Namespace, app: &str, more: &[&str]) -> TransparentSidecar<'m> {
        let mut run = self.sidecar_command(machine, app);
        run.args(["--mark", MARK]).args(more);
        let process = Process::spawn(machine.inside(&run));
        TransparentSidecar { machine, process, under_test: self.under_test.clone(), family: self.families }
    }

    /// The same as another user, with no privilege and no mark.
    pub fn start_sidecar_as<'m>(&'m self, uid: u32, machine: &'m Namespace, app: &str) -> TransparentSidecar<'m> {
        let run = self.sidecar_command(machine, app);
        self.give_home(uid, machine);
        let process = Process::spawn(machine.inside_as(Some(uid), &run));
        TransparentSidecar { machine, process, under_test: self.under_test.clone(), family: self.families }
    }

    /// As another user that has one privilege, CAP_NET_ADMIN.
    pub fn start_sidecar_with_net_admin<'m>(
        &'m self,
        uid: u32,
        machine: &'m Namespace,
        app: &str,
        more: &[&str],
    ) -> TransparentSidecar<'m> {
        let run = self.sidecar_command(machine, app);
        self.give_home(uid, machine);
        let mut as_user = Command::new("setpriv");
        as_user.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()]);
        as_user.args([
            "--bounding-set=-all,+net_admin",
            "--inh-caps=-all,+net_admin",
            "--ambient-caps=-all,+net_admin",
            "--",
        ]);
        as_user.arg(run.get_program()).args(run.get_args()).args(more);
        let process = Process::spawn(machine.inside(&as_user));
        TransparentSidecar { machine, process, under_test: self.under_test.clone(), family: self.families }
    }

    /// What a sidecar on that machine reads and writes is in a directory of its own: makes it that user's.
    fn give_home(&self, uid: u32, machine: &Namespace) {
        let home = self.path(&format!("home-{}", machine.name()));
        std::os::unix::fs::chown(self.directory.path(), Some(uid), None).unwrap();
        std::os::unix::fs::chown(&home, Some(uid), None).unwrap();
        for file in std::fs::read_dir(&home).unwrap() {
            std::os::unix::fs::chown(file.unwrap().path(), Some(uid), None).unwrap();
        }
    }

    /// What starts a sidecar, without what exempts it from the rules. All that it reads and writes is in `home-MACHINE`.
    pub fn sidecar_command(&self, machine: &Namespace, app: &str) -> Command {
        let name = format!("{app}-{}", machine.name());
        let home = self.path(&format!("home-{}", machine.name()));
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join("token"), self.token(app)).unwrap();
        std::fs::copy(self.path("state/trust-bundle.pem"), home.join("trust-bundle.pem")).unwrap();
        let shown = |path: PathBuf| path.display().to_string();
        let control_plane = SocketAddr::new(address(self.network.hub(), self.families), CONTROL_PLANE_PORT);
        let mut run = command(&self.under_test, Program::Sidecar);
        run.args(["run", "--transparent", "--control-plane", &control_plane.to_string()]);
        run.args(["--trust-bundle", &shown(home.join("trust-bundle.pem")), "--token-file", &shown(home.join("token"))]);
        run.args(["--name", &name, "--namespace", "shop", "--service-account", app, "--workload", app]);
        run.args(["--label", &format!("app={app}"), "--drain-delay", "0s"]);
        run.args(["--state", &shown(home.join(format!("state-{name}")))]);
        run
    }

    fn token(&self, app: &str) -> String {
        let state = self.path("state").display().to_string();
        let mut create = command(&self.under_test, Program::Outrigger);
        create.args(["token", "create", "--state", &state, "--namespace", "shop", "--service-account", app]);
        let output = create.args(["--label", &format!("app={app}")]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn control_plane_log(&self) -> String {
        self.control_plane.stderr()
    }
}

impl TransparentSidecar<'_> {
    /// Waits until `/ready` is 200.
    pub async fn is_ready(&self) {
        eventually("the sidecar is ready", async || {
            let (status, body) = self.ready().await;
            if status != 200 {
                assert_ne!(body["reason"], "lease_refused", "{body}");
            }
            (status == 200).then_some(())
        })
        .await;
    }

    /// Makes the connections of this machine go through the sidecar, as a user would.
    pub fn redirect(&self) {
        let (code, said) = self.redirect_command(&["apply", "--mark", MARK]);
        assert_eq!(code, 0, "{said}");
    }

    /// `outrigger-sidecar redirect ...` on this machine: exit code, and what it said.
    pub fn redirect_command(&self, arguments: &[&str]) -> (i32, String) {
        let mut redirect = command(&self.under_test, Program::Sidecar);
        redirect.arg("redirect").args(arguments);
        let output = self.machine.inside(&redirect).output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        (output.status.code().expect("ended by itself"), said)
    }

    /// Rules of somebody's own, that leave out less: what is for this machine's own addresses and what is for somebody
    /// else's goes to the sidecar, too.
    pub fn redirect_by_hand(&self) {
        self.machine.run(&format!("nft delete table inet outrigger\nnft -f - <<'END'\n{RULES}END\n"));
    }

    /// An HTTP application on this machine, at its address on the link.
    pub fn application(&self, name: &str, port: u16) -> Application {
        let listener = self.machine.listen(SocketAddr::new(address(self.machine, self.family), port));
        Application::serve(name, listener)
    }

    /// `/ready`: status and JSON.
    pub async fn ready(&self) -> (u16, Value) {
        let answer = get(self.machine, &self.loopback(15021), "/ready").await;
        (answer.status, serde_json::from_slice(&answer.body).unwrap())
    }

    pub async fn metrics(&self) -> Samples {
        Samples::parse(&get(self.machine, &self.loopback(15020), "/metrics").await.text())
    }

    /// A GET on the admin port; JSON.
    pub async fn admin(&self, path: &str) -> Value {
        let answer = get(self.machine, "127.0.0.1:15000", path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// Waits until a counter has at least this value.
    pub async fn counts(&self, name: &str, labels: &[(&str, &str)], least: f64) {
        eventually(&format!("{name} {labels:?} >= {least}"), async || {
            (self.metrics().await.sum(name, labels) >= least).then_some(())
        })
        .await;
    }

    fn loopback(&self, port: u16) -> String {
        if self.family == Families::V6 { format!("[::1]:{port}") } else { format!("127.0.0.1:{port}") }
    }
}

/// A GET from that machine, as an application's own client would make it.
pub async fn get(from: &Namespace, address: &str, path: &str) -> Response {
    let mut connection = from.connect(address.parse().unwrap()).await;
    ask(&mut connection, path).await
}

pub async fn ask(connection: &mut Connection, path: &str) -> Response {
    connection.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await
}

/// Everything that comes until the other side ends, however it ends.
pub async fn everything(connection: Connection) -> Vec<u8> {
    let mut all = Vec::new();
    let mut tcp = connection.into_tcp();
    // A reset ends it as well; what came before counts.
    let _ = crate::eventually::soon("the end", tcp.read_to_end(&mut all)).await;
    all
}

fn address(machine: &Namespace, families: Families) -> IpAddr {
    if families == Families::V6 { machine.v6().into() } else { machine.v4().into() }
}

const RULES: &str = "\
table inet outrigger_by_hand {
  chain output {
    type nat hook output priority -100;
    meta mark 1337 return
    ip daddr 127.0.0.0/8 return
    ip6 daddr ::1 return
    meta l4proto tcp redirect to :15001
  }
  chain prerouting {
    type nat hook prerouting priority -100;
    iifname \"lo\" return
    tcp dport { 15020, 15021 } return
    meta l4proto tcp redirect to :15006
  }
}
";
