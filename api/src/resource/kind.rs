//! Which documents are read, which are refused and which are passed over.

use super::nearest::{nearest, suggestion};
use super::path::Shortened;
use super::service;

/// The version of our own kinds.
pub(super) const OWN_API: &str = "outrigger.dev/v1alpha1";
const OWN_GROUP: &str = "outrigger.dev";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    MeshConfig,
    Workload,
    PeerAuthentication,
    AuthorizationPolicy,
    PolicyTest,
    Service,
    ServiceAccount,
}

impl Kind {
    pub(super) const ALL: [Kind; 7] = [
        Kind::MeshConfig,
        Kind::Workload,
        Kind::PeerAuthentication,
        Kind::AuthorizationPolicy,
        Kind::PolicyTest,
        Kind::Service,
        Kind::ServiceAccount,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::MeshConfig => "MeshConfig",
            Kind::Workload => "Workload",
            Kind::PeerAuthentication => "PeerAuthentication",
            Kind::AuthorizationPolicy => "AuthorizationPolicy",
            Kind::PolicyTest => "PolicyTest",
            Kind::Service => "Service",
            Kind::ServiceAccount => "ServiceAccount",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Kind::MeshConfig
            | Kind::Workload
            | Kind::PeerAuthentication
            | Kind::AuthorizationPolicy
            | Kind::PolicyTest => OWN_API,
            Kind::Service | Kind::ServiceAccount => "v1",
        }
    }

    /// Own kinds are strict: an unknown field is an error. In adopted ones it is a warning.
    pub(super) fn is_own(self) -> bool {
        self.api_version() == OWN_API
    }

    /// The `outrigger.dev/*` annotations that mean something on it.
    pub(super) fn annotations(self) -> &'static [&'static str] {
        match self {
            Kind::Service => service::ANNOTATIONS,
            Kind::MeshConfig
            | Kind::Workload
            | Kind::PeerAuthentication
            | Kind::AuthorizationPolicy
            | Kind::PolicyTest
            | Kind::ServiceAccount => &[],
        }
    }
}

/// Kinds of our group that have a meaning, but not yet. What a user wrote for safety must not be passed over.
const LATER: &[&str] = &[
    "ServiceEntry",
    "RequestAuthentication",
    "BackendTrafficPolicy",
    "RateLimitPolicy",
    "FaultInjection",
    "EgressPolicy",
    "TelemetryPolicy",
];
const ISTIO_SECURITY_GROUP: &str = "security.istio.io";
const ISTIO_READ: [Kind; 2] = [Kind::PeerAuthentication, Kind::AuthorizationPolicy];
const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
const GATEWAY_LATER: &[&str] = &["HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "ReferenceGrant"];

/// What to do with a document. `Refuse` and `Ignore` carry the message; `about_version` says that it is about the
/// apiVersion and not the kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Read(Kind),
    List,
    Refuse { about_version: bool, message: String },
    Ignore(String),
}

pub(super) fn classify(api_version: &str, kind: &str) -> Verdict {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    match group {
        "" => core(version, kind),
        // Istio's objects of these kinds are ours, field by field.
        ISTIO_SECURITY_GROUP
            if matches!(version, "v1" | "v1beta1") && ISTIO_READ.iter().any(|read| read.name() == kind) =>
        {
            let known = ISTIO_READ.into_iter().find(|read| read.name() == kind);
            known.map_or_else(|| foreign(api_version, kind), Verdict::Read)
        }
        OWN_GROUP => own(api_version, kind),
        GATEWAY_GROUP if GATEWAY_LATER.contains(&kind) => {
            refuse_kind(format!("kind {kind} is not acted on by this version: remove the document"))
        }
        // Istio's objects of these names would be read as protection and protect nothing.
        _ if own_word(kind).is_some() && group.ends_with("istio.io") => foreign(api_version, kind),
        _ if Kind::ALL.iter().any(|known| known.is_own() && known.name() == kind) => foreign(api_version, kind),
        _ => ignored(api_version, kind),
    }
}

fn core(version: &str, kind: &str) -> Verdict {
    if kind == "List" && version == "v1" {
        return Verdict::List;
    }
    if let Some(known) = Kind::ALL.into_iter().find(|known| known.name() == kind) {
        return match known.api_version() {
            expected if expected == version => Verdict::Read(known),
            expected => refuse_version(format!("{} has apiVersion {expected}, not {}", kind, Shortened(version))),
        };
    }
    if LATER.contains(&kind) {
        return foreign(version, kind);
    }
    ignored(version, kind)
}

fn own(api_version: &str, kind: &str) -> Verdict {
    if let Some(known) = Kind::ALL.into_iter().find(|known| known.name() == kind && !known.is_own()) {
        let expected = known.api_version();
        return refuse_version(format!("{kind} has apiVersion {expected}, not {}", Shortened(api_version)));
    }
    let Some(known) = own_word(kind) else {
        let mut all = own_words();
        all.extend(Kind::ALL.iter().filter(|kind| !kind.is_own()).map(|kind| kind.name()));
        return refuse_kind(format!("unknown kind {} in {OWN_GROUP}{}", Shortened(kind), suggestion(kind, &all)));
    };
    if api_version != OWN_API {
        return refuse_version(format!("{known} has apiVersion {OWN_API}, not {}", Shortened(api_version)));
    }
    match Kind::ALL.into_iter().find(|kind| kind.name() == known) {
        Some(kind) => Verdict::Read(kind),
        None => refuse_kind(format!("kind {known} is not enforced by this version: remove the document")),
    }
}

fn own_words() -> Vec<&'static str> {
    let read = Kind::ALL.iter().filter(|kind| kind.is_own()).map(|kind| kind.name());
    read.chain(LATER.iter().copied()).collect()
}

fn own_word(kind: &str) -> Option<&'static str> {
    own_words().into_iter().find(|word| *word == kind)
}

fn foreign(api_version: &str, kind: &str) -> Verdict {
    refuse_version(format!("{kind} of {} is not read: this mesh's has apiVersion {OWN_API}", Shortened(api_version)))
}

fn ignored(api_version: &str, kind: &str) -> Verdict {
    let is_core = !api_version.contains('/');
    let hint = match nearest(kind, &Kind::ALL.map(Kind::name)) {
        Some((name, true)) if is_core => format!("; did you mean `{name}`?"),
        Some(_) | None => String::new(),
    };
    Verdict::Ignore(format!("kind {} of {} is ignored{hint}", Shortened(kind), Shortened(api_version)))
}

fn refuse_kind(message: String) -> Verdict {
    Verdict::Refuse { about_version: false, message }
}

fn refuse_version(message: String) -> Verdict {
    Verdict::Refuse { about_version: true, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_has_a_verdict() {
        let read = |kind: Kind| format!("read {}", kind.name());
        let cases = [
            ("v1", "Service", read(Kind::Service)),
            ("v1", "ServiceAccount", read(Kind::ServiceAccount)),
            ("v1", "List", "list".to_owned()),
            (OWN_API, "MeshConfig", read(Kind::MeshConfig)),
            (OWN_API, "Workload", read(Kind::Workload)),
            (OWN_API, "PeerAuthentication", read(Kind::PeerAuthentication)),
            ("v2", "Service", "refuse Service has apiVersion v1, not `v2`".to_owned()),
            (OWN_API, "Service", "refuse Service has apiVersion v1, not `outrigger.dev/v1alpha1`".to_owned()),
            (
                "outrigger.dev/v1",
                "Workload",
                "refuse Workload has apiVersion outrigger.dev/v1alpha1, not `outrigger.dev/v1`".to_owned(),
            ),
            ("v1", "Workload", "refuse Workload has apiVersion outrigger.dev/v1alpha1, not `v1`".to_owned()),
            (
                OWN_API,
                "PeerAuthentications",
                "refuse unknown kind `PeerAuthentications` in outrigger.dev; did you mean `PeerAuthentication`?"
                    .to_owned(),
            ),
            (OWN_API, "AuthorizationPolicy", read(Kind::AuthorizationPolicy)),
            (
                OWN_API,
                "RequestAuthentication",
                "refuse kind RequestAuthentication is not enforced by this version: remove the document".to_owned(),
            ),
            (
                "gateway.networking.k8s.io/v1",
                "HTTPRoute",
                "refuse kind HTTPRoute is not acted on by this version: remove the document".to_owned(),
            ),
            (
                "gateway.networking.k8s.io/v1",
                "Gateway",
                "ignore kind `Gateway` of `gateway.networking.k8s.io/v1` is ignored".to_owned(),
            ),
            ("security.istio.io/v1", "AuthorizationPolicy", read(Kind::AuthorizationPolicy)),
            ("security.istio.io/v1beta1", "PeerAuthentication", read(Kind::PeerAuthentication)),
            (
                "security.istio.io/v2",
                "AuthorizationPolicy",
                "refuse AuthorizationPolicy of `security.istio.io/v2` is not read: this mesh's has apiVersion \
                 outrigger.dev/v1alpha1"
                    .to_owned(),
            ),
            ("apps/v1", "Deployment", "ignore kind `Deployment` of `apps/v1` is ignored".to_owned()),
            (
                "serving.knative.dev/v1",
                "Service",
                "ignore kind `Service` of `serving.knative.dev/v1` is ignored".to_owned(),
            ),
            ("v1", "Servce", "ignore kind `Servce` of `v1` is ignored; did you mean `Service`?".to_owned()),
            ("v1", "ConfigMap", "ignore kind `ConfigMap` of `v1` is ignored".to_owned()),
        ];
        for (api_version, kind, expected) in cases {
            let verdict = match classify(api_version, kind) {
                Verdict::Read(kind) => read(kind),
                Verdict::List => "list".to_owned(),
                Verdict::Refuse { message, .. } => format!("refuse {message}"),
                Verdict::Ignore(message) => format!("ignore {message}"),
            };
            assert_eq!(verdict, expected, "{api_version} {kind}");
        }
        for kind in LATER {
            assert!(matches!(classify(OWN_API, kind), Verdict::Refuse { .. }), "{kind}");
        }
    }
}
