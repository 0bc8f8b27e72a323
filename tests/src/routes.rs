//! Services behind a sidecar for tests of HTTPRoutes and GRPCRoutes. One call is made in three ways, and all three must
//! agree: of the live mesh, of `explain`, and as a case of a PolicyTest that `outrigger test` runs.

use std::cell::RefCell;
use std::fmt::Write;
use std::net::SocketAddr;

use outrigger_api::compile::load;
use outrigger_api::explain::{Asked, Explanation, Outcome, Question, explain};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::name::ServicePort;
use outrigger_api::resource::SourceFile;

use crate::application::Application;
use crate::mesh::{Mesh, MeshOptions, TRUST_DOMAIN};
use crate::process::{Program, command};
use crate::sidecar::Sidecar;
use crate::wire::{Connection, Response};

/// Services `echo-v1` and `echo-v2` with a workload each, and `echo` with both, as in Gateway API's conformance tests.
pub struct Echo {
    yaml: String,
    /// Of `echo-v1` and of `echo-v2`.
    pub apps: [Application; 2],
    _servers: [Sidecar; 2],
    pub client: Sidecar,
    /// The namespace of the client.
    namespace: String,
    pub mesh: Mesh,
    /// The cases of the PolicyTest so far.
    cases: RefCell<String>,
}

impl Echo {
    pub async fn start(routes: &str) -> Echo {
        Echo::start_in("shop", routes).await
    }

    /// With its client in that namespace.
    pub async fn start_in(namespace: &str, routes: &str) -> Echo {
        let apps = Application::replicas::<2>("echo").await;
        let yaml = services(apps[0].port()) + routes;
        let mesh = Mesh::start(MeshOptions { yaml: yaml.clone(), ..MeshOptions::default() }).await;
        let server = async |index: usize, version: &str| {
            let builder = mesh.sidecar(&format!("echo-{version}")).label("app", "echo").label("version", version);
            builder.inbound(apps[index].address()).start().await
        };
        let servers = [server(0, "v1").await, server(1, "v2").await];
        let client = mesh.sidecar("client-1").namespace(namespace).http_proxy();
        let client =
            client.outbound("echo.shop:80").outbound("echo.shop:8080").outbound("echo.shop:7070").start().await;
        let namespace = namespace.to_owned();
        Echo { yaml, apps, _servers: servers, client, namespace, mesh, cases: RefCell::default() }
    }

    /// Where the client's application dials that port of `echo`.
    pub fn listener(&self, port: u16) -> SocketAddr {
        self.client.address(&format!("outbound:echo.shop:{port}"))
    }

    /// `GET /path name=value ...`, to port 80.
    pub async fn ask(&self, asked: &str) -> Response {
        self.ask_at(80, asked).await
    }

    pub async fn ask_at(&self, port: u16, asked: &str) -> Response {
        let Asked { method, target, headers } = request(asked);
        let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("{method} {target} HTTP/1.1\r\nHost: echo.shop\r\nConnection: close\r\n{fields}\r\n");
        Connection::open(self.listener(port)).await.ask(request).await
    }

    /// Asks in all three ways: `v1` or `v2` for the Service that gets it, else the status with reason or place. What was
    /// asked is a case of [`Echo::test`].
    pub async fn expect(&self, asked: &str, expected: &str) {
        self.expect_at(80, asked, expected).await;
    }

    pub async fn expect_at(&self, port: u16, asked: &str, expected: &str) {
        assert_eq!(said(&self.ask_at(port, asked).await), expected, "live: {asked}");
        self.expect_told(port, asked, expected);
    }

    /// The same without the live mesh.
    pub fn expect_told(&self, port: u16, asked: &str, expected: &str) {
        let request = request(asked);
        let told = self.explain(port, &request);
        assert_eq!(expectation(&told), expected, "explain: {asked} {told:?}");
        self.add_case(port, asked, &request, &told, expected);
    }

    fn explain(&self, port: u16, request: &Asked) -> Explanation {
        let files = [SourceFile { name: "mesh.yaml".to_owned(), text: self.yaml.clone() }];
        let parsed = load(&files);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        let domain = TrustDomain::new(TRUST_DOMAIN).unwrap();
        let question = Question {
            from: Some(SpiffeId::new(&domain, &self.namespace, "client").unwrap()),
            from_ip: None,
            to: ServicePort::parse("echo.shop:80", "shop").unwrap().service,
            port: Some(port),
            request: Some(request.clone()),
            sni: None,
            claims: None,
            token: None,
            at: 0,
        };
        explain(&parsed, &files, &domain, &question)
    }

    fn add_case(&self, port: u16, name: &str, request: &Asked, told: &Explanation, expected: &str) {
        let expect = match expected.split_once(' ') {
            None => {
                let backends =
                    told.backends.iter().map(|one| format!("'{}:{}': {}", one.service, one.port, one.weight));
                format!("verdict: forwarded, status: 200, backends: {{{}}}", backends.collect::<Vec<_>>().join(", "))
            }
            Some((status, _)) if told.verdict == Outcome::Redirected => {
                format!("verdict: redirected, status: {status}")
            }
            Some((status, reason)) => format!("verdict: failed, status: {status}, reason: {reason}"),
        };
        let Asked { method, target, headers } = request;
        let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value:?}, ")).collect();
        let namespace = &self.namespace;
        writeln!(
            self.cases.borrow_mut(),
            "  - {{name: {name:?}, from: {{serviceAccount: {namespace}/client}}, to: {{service: echo.shop, port: {port}}}, \
             request: {{method: {method}, path: {target:?}, headers: {{{fields}}}}}, expect: {{{expect}}}}}"
        )
        .unwrap();
    }

    /// Runs what was asked as a PolicyTest; `under_test` is `under_test!()`.
    pub fn test(&self, under_test: &str) {
        let directory = tempfile::tempdir().unwrap();
        let cases = self.cases.borrow();
        let test = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: PolicyTest\nmetadata: {{name: routes, namespace: shop}}\nspec:\n  \
             cases:\n{cases}"
        );
        std::fs::write(directory.path().join("mesh.yaml"), &self.yaml).unwrap();
        std::fs::write(directory.path().join("test.yaml"), &test).unwrap();
        let ran = command(under_test, Program::Outrigger).arg("test").arg(directory.path()).output().unwrap();
        let text = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{text}\n{test}");
    }

    /// How many of so many requests each Service got.
    pub async fn shares(&self, asked: &str, count: usize) -> [usize; 2] {
        let mut got = [0, 0];
        for _ in 0..count {
            match said(&self.ask(asked).await).as_str() {
                "v1" => got[0] += 1,
                "v2" => got[1] += 1,
                other => panic!("{other}"),
            }
        }
        got
    }
}

/// What an answer of the live mesh says, in the words of [`Echo::expect`].
pub fn said(answer: &Response) -> String {
    match answer.header("x-app") {
        Some("echo-1") => "v1".to_owned(),
        Some("echo-2") => "v2".to_owned(),
        Some(other) => other.to_owned(),
        None => format!("{} {}{}", answer.status, answer.reason(), answer.header("location").unwrap_or_default()),
    }
}

/// The same of an explanation. Several Services that share the calls are joined by `+`.
fn expectation(told: &Explanation) -> String {
    match told.verdict {
        Outcome::Forwarded => {
            let all = told.backends.iter().filter(|backend| backend.weight > 0);
            all.map(|backend| backend.service.replace("echo-", "").replace(".shop", "")).collect::<Vec<_>>().join("+")
        }
        Outcome::Redirected => format!("{} {}", told.status.unwrap(), told.hint.trim_start_matches("to ")),
        Outcome::Refused | Outcome::Failed => {
            format!("{} {}", told.status.unwrap(), told.reason.as_ref().unwrap())
        }
    }
}

/// Reads `GET /path name=value ...`.
fn request(asked: &str) -> Asked {
    let mut words = asked.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let field = |word: String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap();
    Asked { method, target, headers: words.map(field).collect() }
}

pub const V1: &str = "backendRefs: [{name: echo-v1, port: 80}]";
pub const V2: &str = "backendRefs: [{name: echo-v2, port: 8080}]";

/// An HTTPRoute that binds the Service `echo`.
pub fn route(rules: &str) -> String {
    route_of("shop", "echo", "name: echo", rules)
}

/// An HTTPRoute of namespace `namespace` that binds the Service of `parent`.
pub fn route_of(namespace: &str, name: &str, parent: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec: {{parentRefs: [{{group: '', kind: Service, {parent}}}], rules: {rules}}}\n"
    )
}

/// The Services, whose workloads serve at `port`.
pub fn services(port: u16) -> String {
    let service = |name: &str, selector: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  selector: \
             {{{selector}}}\n  ports:\n  - {{name: http, port: 80, targetPort: {port}, appProtocol: http}}\n  - {{name: \
             http-alt, port: 8080, targetPort: {port}, appProtocol: http}}\n  - {{name: grpc, port: 7070, targetPort: \
             {port}, appProtocol: grpc}}\n"
        )
    };
    service("echo", "app: echo")
        + &service("echo-v1", "app: echo, version: v1")
        + &service("echo-v2", "app: echo, version: v2")
}
