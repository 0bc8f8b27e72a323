//! A mesh of one test: a control plane on a thread of its own, its directories, and the sidecars that a test starts.
//! The control plane can be stopped in order, killed, and started again on the same state and port.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use outrigger_api::resource::Labels;
use outrigger_control_plane::app::ControlPlane;
use outrigger_control_plane::ca::Grant;
use outrigger_control_plane::ca::token::{self, Asked};
use outrigger_control_plane::config::{Args, State};
use outrigger_runtime::logging;
use tokio::sync::{Notify, oneshot};

use crate::eventually::{eventually, soon};
use crate::sidecar::SidecarBuilder;

pub const TRUST_DOMAIN: &str = "outrigger.local";

/// STRICT for the whole mesh.
pub const STRICT: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: outrigger-system}
spec: {mtls: {mode: STRICT}}
";
/// PERMISSIVE for the whole mesh, which is the default, too.
pub const PERMISSIVE: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: outrigger-system}
spec: {mtls: {mode: PERMISSIVE}}
";

/// What a mesh begins with.
#[derive(Clone, Debug)]
pub struct MeshOptions {
    /// Documents that are there from the start.
    pub yaml: String,
    /// At least 10 s.
    pub leaf_lifetime: Option<Duration>,
}

impl Default for MeshOptions {
    /// STRICT, leaves of 24 h.
    fn default() -> MeshOptions {
        MeshOptions { yaml: STRICT.to_owned(), leaf_lifetime: None }
    }
}

impl MeshOptions {
    pub fn permissive() -> MeshOptions {
        MeshOptions { yaml: PERMISSIVE.to_owned(), ..MeshOptions::default() }
    }
}

/// A running mesh. Its directories go when it is dropped.
pub struct Mesh {
    directory: tempfile::TempDir,
    grpc: SocketAddr,
    running: Mutex<Option<Running>>,
    /// Files were written that the control plane may not have read.
    written: AtomicBool,
    settled: AtomicUsize,
}

/// The control plane's thread.
struct Running {
    admin: SocketAddr,
    stop: oneshot::Sender<Stop>,
    reload: Arc<Notify>,
    thread: std::thread::JoinHandle<()>,
}

enum Stop {
    InOrder,
    AtOnce,
}

impl Mesh {
    pub async fn start(options: MeshOptions) -> Mesh {
        log();
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("config")).unwrap();
        let mut mesh = Mesh {
            directory,
            grpc: ([127, 0, 0, 1], 0).into(),
            running: Mutex::new(None),
            written: AtomicBool::new(false),
            settled: AtomicUsize::new(0),
        };
        mesh.write("mesh.yaml", &options.yaml);
        if let Some(lifetime) = options.leaf_lifetime {
            let text = format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: \
                 outrigger-system}}\nspec: {{leafLifetime: {}s}}\n",
                lifetime.as_secs()
            );
            mesh.write("mesh-config.yaml", &text);
        }
        mesh.grpc = mesh.run().await;
        mesh.written.store(false, Relaxed);
        mesh
    }

    /// Starts the control plane again, where it was and with what it had.
    pub async fn start_control_plane(&self) {
        self.run().await;
    }

    async fn run(&self) -> SocketAddr {
        let args = Args {
            config: self.path("config"),
            state: self.path("control-plane"),
            listen: self.grpc,
            admin_listen: ([127, 0, 0, 1], 0).into(),
            trust_domain: None,
        };
        let (started, addresses) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let reload = Arc::<Notify>::default();
        let reloads = reload.clone();
        let body = move || serve(&args, started, stopped, &reloads);
        let thread = std::thread::Builder::new().name("control-plane".to_owned()).spawn(body).unwrap();
        let (grpc, admin) = soon("the control plane starts", addresses).await.expect("the control plane started");
        *self.running.lock().unwrap() = Some(Running { admin, stop, reload, thread });
        grpc
    }

    /// Ends the control plane as SIGTERM would.
    pub async fn stop_control_plane(&self) {
        self.end_control_plane(Stop::InOrder).await;
    }

    /// Ends the control plane as SIGKILL would: nothing is written any more, every connection breaks.
    pub async fn kill_control_plane(&self) {
        self.end_control_plane(Stop::AtOnce).await;
    }

    async fn end_control_plane(&self, how: Stop) {
        let running = self.running.lock().unwrap().take().expect("the control plane runs");
        assert!(running.stop.send(how).is_ok(), "the control plane ended by itself");
        let thread = running.thread;
        soon("the control plane ends", tokio::task::spawn_blocking(move || thread.join())).await.unwrap().unwrap();
    }

    /// Has the control plane read its files again, the roots among them, as SIGHUP would.
    pub fn reload_control_plane(&self) {
        self.running.lock().unwrap().as_ref().expect("the control plane runs").reload.notify_one();
    }

    pub fn control_plane(&self) -> SocketAddr {
        self.grpc
    }

    /// The control plane's admin port: metrics, health, status.
    pub fn admin(&self) -> SocketAddr {
        self.running.lock().unwrap().as_ref().expect("the control plane runs").admin
    }

    /// A GET on the control plane's admin port.
    pub async fn control_plane_get(&self, path: &str) -> serde_json::Value {
        let admin = self.admin();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = crate::wire::ask(admin, request).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn trust_bundle(&self) -> PathBuf {
        self.path("control-plane/trust-bundle.pem")
    }

    /// Writes a file of the YAML directory, whole or not at all.
    pub fn write(&self, file: &str, text: &str) {
        let hidden = self.path("config").join(format!(".{file}.new"));
        std::fs::write(&hidden, text).unwrap();
        std::fs::rename(hidden, self.path("config").join(file)).unwrap();
        self.written.store(true, Relaxed);
    }

    /// Waits until the control plane has read what was written so far; a sidecar's start does so by itself. A file that
    /// is no YAML document comes last, and is then complained about.
    pub async fn settled(&self) {
        if !self.written.swap(false, Relaxed) || self.running.lock().unwrap().is_none() {
            return;
        }
        let file = format!("settled-{}.yaml", self.settled.fetch_add(1, Relaxed));
        self.write(&file, "no: document\n");
        eventually("the control plane reads its directory", async || {
            self.control_plane_get("/status").await["config"].to_string().contains(&file).then_some(())
        })
        .await;
        self.remove(&file);
        self.written.store(false, Relaxed);
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path("config").join(file)).unwrap();
    }

    /// Writes a Service whose selector is `app: NAME`. `service` is `name.namespace`.
    pub fn service(&self, service: &str, port: u16, target_port: u16, protocol: Option<&str>) {
        self.service_with(service, port, target_port, protocol, "");
    }

    /// As [`Mesh::service`], with annotations in YAML's flow style: `outrigger.dev/load-balancer: RoundRobin`.
    pub fn service_with(&self, service: &str, port: u16, target_port: u16, protocol: Option<&str>, annotations: &str) {
        let (name, namespace) = service.split_once('.').expect("name.namespace");
        let protocol = protocol.map(|protocol| format!(", appProtocol: {protocol}")).unwrap_or_default();
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}, annotations: \
             {{{annotations}}}}}\nspec:\n  selector: {{app: {name}}}\n  ports:\n  - {{name: main, port: {port}, \
             targetPort: {target_port}{protocol}}}\n"
        );
        self.write(&format!("service-{service}.yaml"), &text);
    }

    /// A fresh join token.
    pub fn token(&self, namespace: &str, service_account: &str, labels: &[(&str, &str)]) -> String {
        self.token_with(namespace, service_account, labels, 1, Duration::from_secs(3600))
    }

    pub fn token_with(
        &self,
        namespace: &str,
        service_account: &str,
        labels: &[(&str, &str)],
        uses: u32,
        ttl: Duration,
    ) -> String {
        self.token_for(namespace, service_account, labels, &[], uses, ttl)
    }

    /// As [`Mesh::token_with`], with addresses that its holder may register.
    pub fn token_for(
        &self,
        namespace: &str,
        service_account: &str,
        labels: &[(&str, &str)],
        addresses: &[&str],
        uses: u32,
        ttl: Duration,
    ) -> String {
        let labels: Labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let addresses = addresses.iter().map(|text| token::parse_address(text).expect("an address")).collect();
        let state = State::open(&self.path("control-plane")).unwrap();
        let asked = Asked { namespace, service_account, grant: Grant { labels, addresses }, uses, ttl };
        token::create(&state, &asked, SystemTime::now()).unwrap()
    }

    /// A sidecar to be started: instance `name`, in namespace `shop` and with the service account `name` up to its last
    /// dash unless said otherwise.
    pub fn sidecar(&self, name: &str) -> SidecarBuilder<'_> {
        SidecarBuilder::new(self, name)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Some(running) = self.running.lock().unwrap().take() {
            let _ = running.stop.send(Stop::AtOnce);
        }
    }
}

/// With OUTRIGGER_TEST_LOG set to levels, everything in this process logs to stderr.
fn log() {
    if let Ok(level) = std::env::var("OUTRIGGER_TEST_LOG") {
        // The second mesh of a process finds it started.
        let _ = logging::start(&logging::Settings { level, format: logging::Format::Text });
    }
}

fn serve(
    args: &Args,
    started: oneshot::Sender<(SocketAddr, SocketAddr)>,
    mut stopped: oneshot::Receiver<Stop>,
    reload: &Notify,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let control_plane = ControlPlane::start(args).await.unwrap_or_else(|error| panic!("control plane: {error}"));
        let _ = started.send((control_plane.grpc_address(), control_plane.admin_address()));
        let how = loop {
            tokio::select! {
                how = &mut stopped => break how,
                () = reload.notified() => control_plane.reload(),
            }
        };
        if let Ok(Stop::InOrder) = how {
            control_plane.shutdown().await;
        }
    });
    runtime.shutdown_background();
}
