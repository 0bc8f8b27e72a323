//! Resource kinds: what users write as YAML. Own kinds (`outrigger.dev/v1alpha1`) are strict; adopted kinds (`v1`)
//! accept their upstream schema, and a field that is not acted on is a warning.
//!
//! [`parse`] reads files: text -> `tree` (one document, repeated keys kept) -> `kind` (read, refuse or pass over) ->
//! `decode` (typed, paths known) -> the kind's own checks -> checks between objects. Whatever is found on the way
//! carries a path, and `position` finds its line and column at the end.

mod attachment;
mod authorization_policy;
mod decode;
pub mod duration;
mod findings;
mod kind;
mod load;
mod mesh_config;
mod metadata;
mod nearest;
mod path;
mod peer_authentication;
mod policy_test;
mod position;
mod problem;
mod rate_limit_policy;
mod report;
mod request_authentication;
mod request_match;
mod route;
mod service;
mod service_account;
mod strictest;
mod syntax;
pub mod time;
mod tree;
mod workload;

pub use attachment::Attachment;
pub use authorization_policy::AuthorizationPolicy;
pub use load::{MAX_FILE_BYTES, parse, parse_and_check};
pub use mesh_config::{
    AccessLogMode, DEFAULT_RENEW_GRACE_SECONDS, Defaults, KeyAlgorithm, LONGEST_RENEW_GRACE_SECONDS, LoadBalancerType,
    MeshConfig, OutboundTraffic, Tracing,
};
pub use nearest::nearest_word;
pub use peer_authentication::{PeerAuthentication, Selector};
pub use policy_test::{Case, CaseRequest, Expect, From as CaseFrom, PolicyTest};
pub use problem::{ObjectName, Parsed, Problem, Remark, SourceFile};
pub use rate_limit_policy::RateLimitPolicy;
pub use request_authentication::RequestAuthentication;
pub use route::{GrantFrom, GrantTo, Parent, ReferenceGrant, Route};
pub use service::{LOAD_BALANCER, SERVICE_ACCOUNTS, Service, ServicePort, TargetPort};
pub use service_account::ServiceAccount;
pub use strictest::{Strictest, strictest, unreadable};
pub use workload::Workload;

use std::collections::BTreeMap;

/// Labels and annotations.
pub type Labels = BTreeMap<String, String>;

/// What every resource carries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    pub name: String,
    /// `default` when the document does not say.
    pub namespace: String,
    pub labels: Labels,
    pub annotations: Labels,
    /// `creationTimestamp`, in UTC and to the second, so that texts are in the order of times.
    pub created: Option<String>,
}

/// One resource: its metadata and its spec.
#[derive(Clone, PartialEq, Debug)]
pub struct Resource<S> {
    pub metadata: Metadata,
    pub spec: S,
}

/// Everything that a directory holds, by (namespace, name).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resources {
    /// The MeshConfig named `default` in `outrigger-system`; its default when there is none.
    pub mesh: MeshConfig,
    pub services: BTreeMap<(String, String), Resource<Service>>,
    pub service_accounts: BTreeMap<(String, String), Resource<ServiceAccount>>,
    pub workloads: BTreeMap<(String, String), Resource<Workload>>,
    pub peer_authentications: BTreeMap<(String, String), Resource<PeerAuthentication>>,
    pub policy_tests: BTreeMap<(String, String), Resource<PolicyTest>>,
    pub request_authentications: BTreeMap<(String, String), Resource<RequestAuthentication>>,
    pub rate_limit_policies: BTreeMap<(String, String), Resource<RateLimitPolicy>>,
    pub authorization_policies: BTreeMap<(String, String), Resource<AuthorizationPolicy>>,
    pub http_routes: BTreeMap<(String, String), Resource<Route>>,
    pub grpc_routes: BTreeMap<(String, String), Resource<Route>>,
    pub tls_routes: BTreeMap<(String, String), Resource<Route>>,
    pub tcp_routes: BTreeMap<(String, String), Resource<Route>>,
    pub reference_grants: BTreeMap<(String, String), Resource<ReferenceGrant>>,
}

impl Resources {
    /// Routes of all kinds.
    pub fn routes(&self) -> impl Iterator<Item = &Resource<Route>> {
        let all = [&self.grpc_routes, &self.http_routes, &self.tls_routes, &self.tcp_routes];
        all.into_iter().flat_map(BTreeMap::values)
    }

    /// Policies of the kinds that are attached by labels or Services.
    pub fn attached(&self) -> impl Iterator<Item = Attached<'_>> {
        let authorization = self.authorization_policies.values().map(|policy| {
            let Resource { metadata, spec } = policy;
            Attached { kind: "AuthorizationPolicy", metadata, attachment: &spec.attachment }
        });
        let authentication = self.request_authentications.values().map(|policy| {
            let Resource { metadata, spec } = policy;
            Attached { kind: "RequestAuthentication", metadata, attachment: &spec.attachment }
        });
        let limits = self.rate_limit_policies.values().map(|policy| {
            let Resource { metadata, spec } = policy;
            Attached { kind: "RateLimitPolicy", metadata, attachment: &spec.attachment }
        });
        authorization.chain(authentication).chain(limits)
    }
}

/// A policy, and what it is attached to.
#[derive(Clone, Copy, Debug)]
pub struct Attached<'r> {
    pub kind: &'static str,
    pub metadata: &'r Metadata,
    pub attachment: &'r Attachment,
}

impl Attached<'_> {
    /// Whether it is about a workload with these labels.
    pub fn selects(&self, namespace: &str, labels: &Labels) -> bool {
        self.attachment.selects(self.metadata, namespace, labels)
    }

    pub fn object(&self) -> ObjectName {
        let (namespace, name) = (self.metadata.namespace.clone(), self.metadata.name.clone());
        ObjectName { kind: self.kind, namespace, name }
    }

    /// Whether it was written, and does not stand in for a document that cannot be read.
    pub fn is_written(&self) -> bool {
        !self.metadata.name.starts_with('~')
    }
}
