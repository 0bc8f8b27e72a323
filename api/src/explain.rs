//! What would happen to a request or connection, and why: the decisions of the data path, asked by a person, over the
//! objects of a configuration. `outrigger explain` prints it, `outrigger test` compares it with what is expected.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::compile::{authorization, mtls_modes};
use crate::facts::{Connection, Moment, Request};
use crate::identity::{SpiffeId, TrustDomain};
use crate::name::{Protocol, ServiceName};
use crate::path::NormalPath;
use crate::policy::authorization::{Authorization, By, DefaultAction, Denial};
use crate::policy::mtls::{self, Arrival};
use crate::policy::trace::{Step, Trace};
use crate::resource::{
    Labels, ObjectName, Parsed, Resource, Resources, Service, ServicePort, SourceFile, TargetPort, Workload,
};
use crate::snapshot::{self, MtlsMode};

/// Who asks for what.
#[derive(Clone, PartialEq, Debug)]
pub struct Question {
    /// None: a caller without an identity, in plaintext.
    pub from: Option<SpiffeId>,
    pub from_ip: Option<IpAddr>,
    pub to: ServiceName,
    /// The Service's port; None where it has one only.
    pub port: Option<u16>,
    /// None: a connection whose bytes nobody parses.
    pub request: Option<Asked>,
    /// Seconds since the Unix epoch, for rules about the time.
    pub at: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

/// A question as it is sent to a sidecar's `/explain`, as JSON.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WrittenQuestion {
    /// A SPIFFE id; absent: plaintext.
    pub from: Option<String>,
    pub from_ip: Option<IpAddr>,
    /// `name.namespace`
    pub to: String,
    pub port: Option<u16>,
    pub request: Option<Asked>,
    /// Seconds since the Unix epoch.
    pub at: u64,
}

impl From<&Question> for WrittenQuestion {
    fn from(question: &Question) -> WrittenQuestion {
        WrittenQuestion {
            from: question.from.as_ref().map(ToString::to_string),
            from_ip: question.from_ip,
            to: question.to.to_string(),
            port: question.port,
            request: question.request.clone(),
            at: question.at,
        }
    }
}

impl TryFrom<WrittenQuestion> for Question {
    type Error = String;

    fn try_from(written: WrittenQuestion) -> Result<Question, String> {
        let from = written.from.map(|text| SpiffeId::parse(&text).map_err(|error| error.to_string())).transpose()?;
        let to = ServiceName::parse(&written.to, "default").map_err(|error| error.to_string())?;
        let WrittenQuestion { from_ip, port, request, at, .. } = written;
        Ok(Question { from, from_ip, to, port, request, at })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// An application gets it.
    Forwarded,
    /// A policy says no.
    Refused,
    Redirected,
    /// Nothing says no, and it does not arrive all the same.
    Failed,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Forwarded => "forwarded",
            Outcome::Refused => "refused",
            Outcome::Redirected => "redirected",
            Outcome::Failed => "failed",
        }
    }
}

/// The answer, in the form of `explain -o json`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explanation {
    pub verdict: Outcome,
    /// What an HTTP client sees of the mesh's own answer; of an application's own nothing is known but that it comes.
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    /// The word of metrics and logs.
    pub reason: Option<&'static str>,
    pub by: Option<Decider>,
    /// No routes are in this version.
    pub route: Option<()>,
    pub backends: Vec<BackendShare>,
    pub timeouts: BTreeMap<&'static str, String>,
    pub retry: Option<()>,
    pub steps: Vec<Step>,
    pub hint: String,
}

/// The object that decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Decider {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub rule: Option<usize>,
    pub file: Option<String>,
    pub line: Option<usize>,
}

impl std::fmt::Display for Decider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BackendShare {
    /// `name.namespace`
    pub service: String,
    pub port: u16,
    pub weight: u32,
    /// Those of Workload documents; sidecars that register themselves are not known offline.
    pub endpoints: usize,
    /// Of all requests, 0 to 1.
    pub share: f64,
}

/// One workload that may get it.
struct Candidate<'r> {
    labels: &'r Labels,
    /// The application's port; None where only a workload's own list of ports would say.
    port: Option<u16>,
    /// None: no Workload document, its sidecar registers itself.
    name: Option<&'r str>,
    ip: Option<IpAddr>,
    mesh: bool,
}

/// Answers over a configuration without errors. `files` are those that it was parsed from.
pub fn explain(parsed: &Parsed, files: &[SourceFile], trust_domain: &TrustDomain, question: &Question) -> Explanation {
    let mut answer = Explanation::begin();
    let resources = &parsed.resources;
    let Some((service, port)) = lookup(resources, question, &mut answer) else {
        answer.fail(question, Outcome::Failed, "not_registered", 502, 14);
        return answer;
    };
    let candidates = candidates(resources, service, port);
    let endpoints = candidates.iter().filter(|candidate| candidate.name.is_some()).count();
    answer.backends.push(BackendShare {
        service: question.to.to_string(),
        port: port.port,
        weight: 1,
        endpoints,
        share: 1.0,
    });
    if candidates.is_empty() {
        answer.steps.step(|| {
            let why = format!("no workload matches its selector {}", shown_labels(&service.spec.selector));
            Step::new("balance", service_object(service), "failed", why)
        });
        answer.hint = format!("start a workload with the labels {}", shown_labels(&service.spec.selector));
        answer.fail(question, Outcome::Failed, "destination_unavailable", 503, 14);
        return answer;
    }
    // Every candidate is asked: the one that refuses is what a user has to know about.
    let mut first = None;
    for candidate in &candidates {
        let judged = judge(resources, trust_domain, question, service, port, candidate);
        let refuses = judged.denied.is_some();
        if first.is_none() || refuses {
            first = Some(judged);
        }
        if refuses {
            break;
        }
    }
    let Some(judged) = first else { return answer };
    answer.conclude(question, judged, Some((parsed, files)));
    if answer.verdict == Outcome::Forwarded {
        let state = match endpoints {
            0 => "its endpoints register themselves".to_owned(),
            1 => "1 endpoint".to_owned(),
            many => format!("{many} endpoints"),
        };
        answer.steps.push(Step::new("balance", service_object(service), "forwarded", state));
    }
    answer
}

fn is_grpc(asked: &Asked) -> bool {
    let mut types = asked.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    types.any(|(_, value)| value.starts_with("application/grpc"))
}

fn service_object(service: &Resource<Service>) -> String {
    format!("Service/{}/{}", service.metadata.namespace, service.metadata.name)
}

fn lookup<'r>(
    resources: &'r Resources,
    question: &Question,
    answer: &mut Explanation,
) -> Option<(&'r Resource<Service>, &'r ServicePort)> {
    let to = &question.to;
    let Some(service) = resources.services.get(&(to.namespace.to_string(), to.name.to_string())) else {
        let known: Vec<String> =
            resources.services.keys().map(|(namespace, name)| format!("{name}.{namespace}")).collect();
        let near = nearest(&to.to_string(), &known).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        answer.steps.push(Step::new("lookup", format!("Service/{}/{}", to.namespace, to.name), "failed", {
            "no such Service".to_owned()
        }));
        answer.hint = format!("there is no Service {to}{near}");
        return None;
    };
    let listed = || {
        let ports = service.spec.ports.iter().map(|port| match &port.name {
            Some(name) => format!("{} ({name})", port.port),
            None => port.port.to_string(),
        });
        ports.collect::<Vec<_>>().join(", ")
    };
    let found = match question.port {
        Some(wanted) => service.spec.ports.iter().find(|port| port.port == wanted),
        None => service.spec.ports.first(),
    };
    let Some(port) = found else {
        let wanted = question.port.map_or_else(|| "no port".to_owned(), |port| format!("no port {port}"));
        answer.steps.push(Step::new("lookup", service_object(service), "failed", format!("it has {}", listed())));
        answer.hint = format!("{to} has {wanted}; it has {}", listed());
        return None;
    };
    let why = match &port.target_port {
        TargetPort::Number(number) => format!("port {}, targetPort {number}", port.port),
        TargetPort::Name(name) => format!("port {}, targetPort {name}", port.port),
    };
    answer.steps.push(Step::new("lookup", service_object(service), "found", why));
    Some((service, port))
}

/// The static workloads that the Service selects; where there are none of them at all, one that registers itself with
/// the labels that the Service asks for.
fn candidates<'r>(resources: &'r Resources, service: &'r Resource<Service>, port: &ServicePort) -> Vec<Candidate<'r>> {
    let selects = |workload: &Resource<Workload>| {
        let wanted = &service.spec.selector;
        workload.metadata.namespace == service.metadata.namespace
            && !wanted.is_empty()
            && wanted.iter().all(|(key, value)| workload.spec.labels.get(key) == Some(value))
    };
    let target = |workload: Option<&Workload>| match &port.target_port {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload.and_then(|workload| workload.ports.get(name).copied()),
    };
    let of = |workload: &'r Resource<Workload>| Candidate {
        labels: &workload.spec.labels,
        port: target(Some(&workload.spec)),
        name: Some(&workload.metadata.name),
        ip: Some(workload.spec.address),
        mesh: workload.spec.mesh,
    };
    let mut found: Vec<Candidate<'_>> =
        resources.workloads.values().filter(|workload| selects(workload)).map(of).collect();
    if found.is_empty() && !service.spec.selector.is_empty() {
        let labels = &service.spec.selector;
        found.push(Candidate { labels, port: target(None), name: None, ip: None, mesh: true });
    }
    found
}

struct Judged {
    steps: Vec<Step>,
    /// The reason and a hint.
    denied: Option<(&'static str, String)>,
    by: Option<(String, Option<usize>)>,
}

/// What decides about one port of one workload.
struct Gate<'g> {
    /// What a step calls the workload.
    whom: String,
    mode: MtlsMode,
    authorization: &'g Authorization,
    labels: &'g Labels,
    ip: Option<IpAddr>,
    /// The application's port.
    port: u16,
    service: Option<&'g ServiceName>,
    protocol: Option<Protocol>,
}

fn judge(
    resources: &Resources,
    trust_domain: &TrustDomain,
    question: &Question,
    service: &Resource<Service>,
    port: &ServicePort,
    candidate: &Candidate<'_>,
) -> Judged {
    let namespace = &service.metadata.namespace;
    let whom =
        candidate.name.map_or_else(|| format!("any workload of {}", question.to), |name| format!("{name}.{namespace}"));
    if !candidate.mesh {
        let step = Step::new("mtls", whom, "plaintext", "it has no sidecar: no policy of its own".to_owned());
        return Judged { steps: vec![step], denied: None, by: None };
    }
    let policies = resources.peer_authentications.values().map(|policy| (&policy.metadata, &policy.spec));
    let modes = mtls_modes(policies, namespace, candidate.labels);
    let application = candidate.port.unwrap_or(port.port);
    let gate = Gate {
        whom,
        mode: modes.ports.get(&application).copied().unwrap_or(modes.default),
        authorization: &authorization(resources, trust_domain, namespace, candidate.labels),
        labels: candidate.labels,
        ip: candidate.ip,
        port: application,
        service: Some(&question.to),
        protocol: declared(resources, port),
    };
    gate.judge(question)
}

impl Gate<'_> {
    fn judge(&self, question: &Question) -> Judged {
        let mut judged = Judged { steps: Vec::new(), denied: None, by: None };
        let arrival = match (&question.from, self.mode) {
            (Some(_), MtlsMode::Strict | MtlsMode::Permissive) => Arrival::Mutual,
            // The caller's sidecar knows that this port takes plaintext alone.
            (Some(_), MtlsMode::Disable) | (None, _) => Arrival::Plaintext,
        };
        if let Err(why) = mtls::admit(self.mode, arrival) {
            judged.steps.push(Step::new("mtls", self.whom.as_str(), "refused", why.to_owned()));
            let hint = format!("give the caller a sidecar, or make port {} PERMISSIVE", self.port);
            judged.denied = Some(("mtls_required", hint));
            return judged;
        }
        let identity = question.from.as_ref().filter(|_| arrival == Arrival::Mutual);
        let proved = identity
            .map_or_else(|| "nothing is proved about the caller".to_owned(), |id| format!("the caller is {id}"));
        judged.steps.push(Step::new("mtls", self.whom.as_str(), self.mode.as_str(), proved));
        let opaque = matches!(self.protocol, Some(Protocol::Tcp | Protocol::Tls));
        let asked = question.request.as_ref().filter(|_| !opaque);
        if opaque && question.request.is_some() {
            let why = "the port is declared as bytes that are not parsed: rules see the connection alone".to_owned();
            judged.steps.push(Step::new("detect", self.whom.as_str(), "opaque", why));
        }
        let path = asked.map(|asked| NormalPath::of(&asked.target));
        let host = |asked: &Asked| {
            let mut hosts = asked.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("host"));
            hosts.next().map_or_else(|| question.to.to_string(), |(_, value)| value.clone())
        };
        let host = asked.map(host).unwrap_or_default();
        let request = asked.zip(path.as_ref()).map(|(asked, path)| Request {
            method: &asked.method,
            path,
            host: &host,
            headers: &asked.headers,
        });
        let connection = Connection {
            identity,
            source_ip: question.from_ip,
            destination_ip: self.ip,
            destination_port: self.port,
            service: self.service,
            labels: self.labels,
            now: Moment::of_unix_time(question.at),
        };
        let verdict = self.authorization.decide(&connection, request.as_ref(), &mut judged.steps);
        if self.authorization.policies.is_empty() {
            let (result, why) = match self.authorization.default_action {
                DefaultAction::Allow => ("allowed", "no AuthorizationPolicy selects it and defaultAction is Allow"),
                DefaultAction::Deny => ("refused", "no AuthorizationPolicy selects it and defaultAction is Deny"),
            };
            judged.steps.push(Step::new("policy", By::Default.to_string(), result, why.to_owned()));
        }
        for shadow in &verdict.shadow {
            let why = "in Shadow mode: enforced it would refuse this".to_owned();
            judged.steps.push(Step::new("shadow", shadow.to_string(), "would refuse", why));
        }
        judged.by = verdict.by.map(|by| (by.to_string(), by.rule()));
        judged.denied = verdict.denied.map(|denial| match denial {
            Denial::PathAmbiguous => {
                ("path_ambiguous", "write the path in one way that every server reads alike".to_owned())
            }
            Denial::Policy => ("policy_denied", denied_hint(&judged.steps, verdict.by.as_ref(), question)),
        });
        judged
    }
}

/// The same of a sidecar, about its own workload: what it knows now decides. None when no port of the workload belongs to
/// the Service that is asked about.
pub fn explain_own(own: &snapshot::Workload, question: &Question) -> Option<Explanation> {
    let mut ports = own.ports.iter().filter(|(_, port)| port.service.as_ref() == Some(&question.to));
    let (port, inbound) = ports.next()?;
    let gate = Gate {
        whom: format!("{}.{}", own.name, own.namespace),
        mode: inbound.mtls_mode,
        authorization: &own.authorization,
        labels: &own.labels,
        ip: None,
        port: *port,
        service: inbound.service.as_ref(),
        protocol: inbound.protocol,
    };
    let mut answer = Explanation::begin();
    let backend = BackendShare { service: question.to.to_string(), port: *port, weight: 1, endpoints: 1, share: 1.0 };
    answer.backends.push(backend);
    let judged = gate.judge(question);
    answer.conclude(question, judged, None);
    Some(answer)
}

impl Explanation {
    /// What a caller's sidecar knows of a destination. Whether the called workload takes the request is for its own
    /// sidecar to say.
    pub fn outbound(question: &Question, destination: &snapshot::Destination) -> Explanation {
        let mut answer = Explanation::begin();
        let endpoints = destination.endpoints.len();
        let service = destination.service.to_string();
        let object = format!("Service/{}/{}", destination.service.namespace, destination.service.name);
        let backend = BackendShare { service, port: destination.port, weight: 1, endpoints, share: 1.0 };
        answer.backends.push(backend);
        for endpoint in &destination.endpoints {
            let how = match &endpoint.tls {
                snapshot::EndpointTls::Mutual(identity) => format!("mutual TLS, {identity} expected"),
                snapshot::EndpointTls::Plaintext => "plaintext".to_owned(),
            };
            let name = format!("{}.{}", endpoint.instance, endpoint.namespace);
            answer.steps.push(Step::new("balance", name, endpoint.address.to_string(), how));
        }
        if endpoints == 0 {
            answer.hint = format!("{} has no endpoints", destination.service);
            answer.steps.push(Step::new("balance", object, "failed", "it has no endpoints".to_owned()));
            answer.fail(question, Outcome::Failed, "destination_unavailable", 503, 14);
        } else {
            answer.hint = "whether the called workload takes it, its own sidecar says".to_owned();
        }
        answer
    }

    fn begin() -> Explanation {
        Explanation {
            verdict: Outcome::Forwarded,
            status: None,
            grpc_status: None,
            reason: None,
            by: None,
            route: None,
            backends: Vec::new(),
            timeouts: BTreeMap::from([("connect", "5s".to_owned())]),
            retry: None,
            steps: Vec::new(),
            hint: String::new(),
        }
    }

    fn fail(&mut self, question: &Question, outcome: Outcome, reason: &'static str, status: u16, grpc_status: u8) {
        self.verdict = outcome;
        self.reason = Some(reason);
        if let Some(asked) = &question.request {
            let grpc = is_grpc(asked);
            self.status = Some(if grpc { 200 } else { status });
            self.grpc_status = grpc.then_some(grpc_status);
        }
    }

    /// Takes over what was judged. `configuration`: where objects stand, if that is known.
    fn conclude(&mut self, question: &Question, judged: Judged, configuration: Option<(&Parsed, &[SourceFile])>) {
        self.steps.extend(judged.steps);
        self.by = judged.by.map(|(object, rule)| decider(configuration, object, rule));
        match judged.denied {
            Some(("mtls_required", why)) => {
                // The connection is closed before a byte reaches the application: there is no status.
                self.verdict = Outcome::Refused;
                self.reason = Some("mtls_required");
                self.hint = why;
            }
            Some((reason, hint)) => {
                let (status, grpc_status) = if reason == "path_ambiguous" { (400, 3) } else { (403, 7) };
                self.hint = hint;
                self.fail(question, Outcome::Refused, reason, status, grpc_status);
            }
            None => {
                let grpc = question.request.as_ref().is_some_and(is_grpc);
                self.status = question.request.is_some().then_some(200);
                self.grpc_status = grpc.then_some(0);
            }
        }
    }
}

/// What to do about it: a rule that says no is named; where none says yes, the one that came nearest.
fn denied_hint(steps: &[Step], by: Option<&By<'_>>, question: &Question) -> String {
    let whom = question
        .from
        .as_ref()
        .map_or_else(|| "a caller without an identity".to_owned(), |id| format!("{}/{}", id.namespace(), id.account()));
    match by {
        Some(by @ By::Policy { rule: Some(rule), .. }) => {
            format!("rule {rule} of {by} denies it: narrow that rule if {whom} shall get through")
        }
        Some(By::Default) => format!("write an AuthorizationPolicy with action ALLOW for {whom}"),
        Some(By::Policy { rule: None, .. }) | None => {
            let near = steps.iter().rev().find(|step| step.stage == "allow" && step.result == "no match");
            match near {
                Some(step) => format!("no rule allows {whom}; nearest: {}: {}", step.object, step.why),
                None => format!("no rule allows {whom}"),
            }
        }
    }
}

fn decider(configuration: Option<(&Parsed, &[SourceFile])>, object: String, rule: Option<usize>) -> Decider {
    let mut parts = object.splitn(3, '/').map(str::to_owned);
    let [kind, namespace, name] = std::array::from_fn(|_| parts.next().unwrap_or_default());
    let known = ["AuthorizationPolicy", "MeshConfig", "PeerAuthentication"];
    let kind_name = known.into_iter().find(|known| *known == kind);
    let place = kind_name.zip(configuration).and_then(|(kind, (parsed, files))| {
        parsed.place(files, &ObjectName { kind, namespace: namespace.clone(), name: name.clone() })
    });
    let (file, line) = place.map_or((None, None), |(file, line)| (Some(file), Some(line)));
    Decider { kind, namespace, name, rule, file, line }
}

fn declared(resources: &Resources, port: &ServicePort) -> Option<Protocol> {
    let by_name = || Protocol::from_port_name(port.name.as_deref()?);
    let named = port.app_protocol.as_deref().and_then(Protocol::from_app_protocol).or_else(by_name);
    let target = match &port.target_port {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(_) => None,
    };
    let opaque =
        [Some(port.port), target].into_iter().flatten().any(|port| resources.mesh.opaque_ports().contains(&port));
    named.or(opaque.then_some(Protocol::Tcp))
}

fn shown_labels(labels: &Labels) -> String {
    if labels.is_empty() {
        return "(none)".to_owned();
    }
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn nearest(word: &str, known: &[String]) -> Option<String> {
    let known: BTreeSet<&str> = known.iter().map(String::as_str).collect();
    let known: Vec<&str> = known.into_iter().collect();
    crate::resource::nearest_word(word, &known).map(str::to_owned)
}
