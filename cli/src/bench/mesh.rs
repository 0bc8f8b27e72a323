//! The mesh that is measured: a control plane and two sidecars under mesh-wide STRICT, each a process of this same
//! binary, as an operator would run them.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use outrigger_control_plane::ca::Grant;
use outrigger_control_plane::ca::token::{self, Asked};
use outrigger_control_plane::config::State;

use super::child::{Child, Layout};

const NAMESPACE: &str = "bench";

pub struct Mesh {
    pub client: Child,
    pub server: Child,
    pub http1: SocketAddr,
    pub http2: SocketAddr,
    pub opaque: SocketAddr,
    pub bulk: SocketAddr,
    _control_plane: Child,
}

impl Mesh {
    pub fn start(application: &Child, directory: &Path, layout: Layout, wrap: Option<&str>) -> anyhow::Result<Mesh> {
        let ports = Ports {
            http1: application.address("http1")?,
            http2: application.address("http2")?,
            opaque: application.address("opaque")?,
            bulk: application.address("bulk")?,
        };
        let program = std::env::current_exe()?;
        let (config, state) = (directory.join("config"), directory.join("state"));
        fs::create_dir_all(&config)?;
        fs::write(config.join("bench.yaml"), resources(&ports))?;
        let arguments: Vec<OsString> = vec![
            "control-plane".into(),
            "--config".into(),
            config.into(),
            "--state".into(),
            state.clone().into(),
            "--listen".into(),
            "127.0.0.1:0".into(),
            "--admin-listen".into(),
            "127.0.0.1:0".into(),
        ];
        let control_plane = Child::start("control-plane", &program, arguments, layout.others, directory)?.ready()?;
        let beside = |name: &'static str, more: Vec<String>| {
            let token = directory.join(format!("{name}.token"));
            fs::write(&token, join_token(&state, name)?)?;
            let mut arguments: Vec<OsString> = ["sidecar", "run", "--workers", "1"].map(OsString::from).to_vec();
            let mut flag = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
            flag("--control-plane", control_plane.address("grpc")?.to_string().into());
            flag("--trust-bundle", state.join("trust-bundle.pem").into());
            flag("--token-file", token.into());
            flag("--state", directory.join(format!("{name}.state")).into());
            flag("--name", name.into());
            flag("--namespace", NAMESPACE.into());
            flag("--service-account", name.into());
            flag("--label", format!("app={name}").into());
            flag("--workload-address", "127.0.0.1".into());
            // Nobody is left who would still connect.
            flag("--drain-delay", "0s".into());
            for listener in ["--admin-listen", "--metrics-listen", "--health-listen"] {
                flag(listener, "127.0.0.1:0".into());
            }
            arguments.extend(more.into_iter().map(OsString::from));
            let mut words = wrapped(wrap, name);
            words.push(program.clone().into());
            words.extend(arguments);
            let first = PathBuf::from(words.remove(0));
            Child::start(name, &first, words, layout.proxies, directory)?.ready()
        };
        let inbound = |address: SocketAddr| ["--inbound".to_owned(), format!("127.0.0.1:0={address}")];
        let outbound = |port: u16| ["--outbound".to_owned(), format!("127.0.0.1:0=server:{port}")];
        let server = beside("server", [ports.http1, ports.http2, ports.opaque, ports.bulk].map(inbound).concat())?;
        let client = beside("client", [80, 81, 82, 83].map(outbound).concat())?;
        let listener = |port: u16| client.address(&format!("outbound:server.{NAMESPACE}:{port}"));
        Ok(Mesh {
            http1: listener(80)?,
            http2: listener(81)?,
            opaque: listener(82)?,
            bulk: listener(83)?,
            client,
            server,
            _control_plane: control_plane,
        })
    }
}

fn wrapped(wrap: Option<&str>, name: &str) -> Vec<OsString> {
    wrap.unwrap_or_default().split_whitespace().map(|word| word.replace("{}", name).into()).collect()
}

struct Ports {
    http1: SocketAddr,
    http2: SocketAddr,
    opaque: SocketAddr,
    bulk: SocketAddr,
}

fn join_token(state: &Path, name: &str) -> anyhow::Result<String> {
    let labels = [("app".to_owned(), name.to_owned())].into_iter().collect();
    let hour = Duration::from_secs(3600);
    let grant = Grant { labels, addresses: Vec::new() };
    let asked = Asked { namespace: NAMESPACE, service_account: name, grant, uses: 1, ttl: hour };
    Ok(token::create(&State::open(state)?, &asked, SystemTime::now())?)
}

fn resources(ports: &Ports) -> String {
    let (http1, http2) = (ports.http1.port(), ports.http2.port());
    let (opaque, bulk) = (ports.opaque.port(), ports.bulk.port());
    format!(
        "apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata:
  name: strict
  namespace: outrigger-system
spec:
  mtls:
    mode: STRICT
---
apiVersion: v1
kind: Service
metadata:
  name: server
  namespace: {NAMESPACE}
spec:
  selector:
    app: server
  ports:
    - name: http
      port: 80
      targetPort: {http1}
    - name: http2
      port: 81
      targetPort: {http2}
    - name: tcp
      port: 82
      targetPort: {opaque}
    - name: tcp-bulk
      port: 83
      targetPort: {bulk}
"
    )
}

#[cfg(test)]
mod tests {
    use outrigger_api::resource::{SourceFile, parse};

    use super::*;

    #[test]
    fn the_resources_are_valid() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let text = resources(&Ports { http1: address(1), http2: address(2), opaque: address(3), bulk: address(4) });
        let parsed = parse(&[SourceFile { name: "bench.yaml".to_owned(), text }]);
        assert!(parsed.errors.is_empty() && parsed.warnings.is_empty(), "{:?} {:?}", parsed.errors, parsed.warnings);
    }
}
