//! Which documents are read, which are refused and which are passed over.

use super::nearest::{nearest, suggestion};
use super::path::Shortened;
use super::service;

/// The version of our own kinds.
pub(super) const OWN_API: &str = "outrigger.dev/v1alpha1";
const OWN_GROUP: &str = "outrigger.dev";

/// A kind that is read. To add one: a variant, its row in [`Kind::facts`], and an arm in `load::Sections::read_spec`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    MeshConfig,
    Workload,
    PeerAuthentication,
    AuthorizationPolicy,
    RequestAuthentication,
    RateLimitPolicy,
    PolicyTest,
    HttpRoute,
    GrpcRoute,
    TlsRoute,
    TcpRoute,
    ReferenceGrant,
    Service,
    ServiceAccount,
}

/// What is said of a kind before any of its documents is read.
pub(super) struct Facts {
    pub(super) name: &'static str,
    /// The apiVersions that are read; messages name the first.
    pub(super) api_versions: &'static [&'static str],
    /// An unknown field is an error; in other kinds it is a warning.
    pub(super) strict: bool,
    /// Its names are DNS labels; those of other kinds DNS names.
    pub(super) label: bool,
    /// It has a `spec`.
    pub(super) spec: bool,
    /// The `outrigger.dev/*` annotations that mean something on it.
    pub(super) annotations: &'static [&'static str],
    /// Fields that are not acted on and change nothing.
    pub(super) silent_fields: &'static [&'static str],
    /// The same for values: the field and its standard value.
    pub(super) silent_values: &'static [(&'static str, &'static str)],
}

/// A kind of our own group.
const OWN: Facts = Facts {
    name: "",
    api_versions: &[OWN_API],
    strict: true,
    label: false,
    spec: true,
    annotations: &[],
    silent_fields: &[],
    silent_values: &[],
};
/// A kind of Istio's that is ours, field by field.
const ISTIO: &[&str] = &[OWN_API, "security.istio.io/v1", "security.istio.io/v1beta1"];
/// A kind of Gateway API's, also in the versions in which it was tried out: what is read of it is the same.
const GATEWAY: &[&str] = &[
    "gateway.networking.k8s.io/v1",
    "gateway.networking.k8s.io/v1beta1",
    "gateway.networking.k8s.io/v1alpha3",
    "gateway.networking.k8s.io/v1alpha2",
];
/// A kind that is adopted from others.
const ADOPTED: Facts = Facts { api_versions: &["v1"], strict: false, ..OWN };

impl Kind {
    pub(super) const ALL: &[Kind] = &[
        Kind::MeshConfig,
        Kind::Workload,
        Kind::PeerAuthentication,
        Kind::AuthorizationPolicy,
        Kind::RequestAuthentication,
        Kind::RateLimitPolicy,
        Kind::PolicyTest,
        Kind::HttpRoute,
        Kind::GrpcRoute,
        Kind::TlsRoute,
        Kind::TcpRoute,
        Kind::ReferenceGrant,
        Kind::Service,
        Kind::ServiceAccount,
    ];

    pub(super) const fn facts(self) -> Facts {
        match self {
            Kind::MeshConfig => Facts { name: "MeshConfig", ..OWN },
            Kind::Workload => Facts { name: "Workload", label: true, ..OWN },
            Kind::PeerAuthentication => Facts { name: "PeerAuthentication", api_versions: ISTIO, ..OWN },
            Kind::AuthorizationPolicy => Facts { name: "AuthorizationPolicy", api_versions: ISTIO, ..OWN },
            Kind::RequestAuthentication => Facts { name: "RequestAuthentication", api_versions: ISTIO, ..OWN },
            Kind::RateLimitPolicy => Facts { name: "RateLimitPolicy", ..OWN },
            Kind::PolicyTest => Facts { name: "PolicyTest", ..OWN },
            Kind::HttpRoute => Facts {
                name: "HTTPRoute",
                api_versions: &["gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1beta1"],
                ..ADOPTED
            },
            Kind::GrpcRoute => Facts { name: "GRPCRoute", api_versions: GATEWAY, ..ADOPTED },
            Kind::TlsRoute => Facts { name: "TLSRoute", api_versions: GATEWAY, ..ADOPTED },
            Kind::TcpRoute => Facts { name: "TCPRoute", api_versions: GATEWAY, ..ADOPTED },
            Kind::ReferenceGrant => Facts { name: "ReferenceGrant", api_versions: GATEWAY, ..ADOPTED },
            Kind::Service => Facts {
                name: "Service",
                label: true,
                annotations: service::ANNOTATIONS,
                silent_fields: service::SILENT_FIELDS,
                silent_values: service::SILENT_VALUES,
                ..ADOPTED
            },
            Kind::ServiceAccount => Facts { name: "ServiceAccount", spec: false, ..ADOPTED },
        }
    }

    pub(super) const fn name(self) -> &'static str {
        self.facts().name
    }

    fn api_version(self) -> &'static str {
        self.facts().api_versions.first().copied().unwrap_or_default()
    }

    /// Of our own group.
    fn is_own(self) -> bool {
        self.api_version() == OWN_API
    }

    pub(super) fn of_name(name: &str) -> Option<Kind> {
        Kind::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

/// Kinds of our group that have a meaning, but not yet. What a user wrote for safety must not be passed over.
const LATER: &[&str] = &["ServiceEntry", "BackendTrafficPolicy", "FaultInjection", "EgressPolicy", "TelemetryPolicy"];
const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

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
    if let Some(known) = Kind::of_name(kind).filter(|known| known.facts().api_versions.contains(&api_version)) {
        return Verdict::Read(known);
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    match group {
        "" => core(version, kind),
        OWN_GROUP => own(api_version, kind),
        GATEWAY_GROUP => gateway(api_version, kind),
        // Istio's objects of these names would be read as protection and protect nothing.
        _ if own_word(kind).is_some() && group.ends_with("istio.io") => foreign(api_version, kind),
        _ if Kind::of_name(kind).is_some_and(Kind::is_own) => foreign(api_version, kind),
        _ => ignored(api_version, kind),
    }
}

fn gateway(api_version: &str, kind: &str) -> Verdict {
    match Kind::of_name(kind).filter(|known| known.api_version().starts_with(GATEWAY_GROUP)) {
        Some(known) => {
            let expected = known.api_version();
            refuse_version(format!("{kind} has apiVersion {expected}, not {}", Shortened(api_version)))
        }
        None if kind == "UDPRoute" => {
            refuse_kind("kind UDPRoute is not acted on by this version: remove the document".to_owned())
        }
        None => ignored(api_version, kind),
    }
}

fn core(version: &str, kind: &str) -> Verdict {
    if kind == "List" && version == "v1" {
        return Verdict::List;
    }
    if let Some(known) = Kind::of_name(kind) {
        let expected = known.api_version();
        return refuse_version(format!("{} has apiVersion {expected}, not {}", kind, Shortened(version)));
    }
    if LATER.contains(&kind) {
        return foreign(version, kind);
    }
    ignored(version, kind)
}

fn own(api_version: &str, kind: &str) -> Verdict {
    if let Some(known) = Kind::of_name(kind).filter(|known| !known.is_own()) {
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
    refuse_kind(format!("kind {known} is not enforced by this version: remove the document"))
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
    let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
    let hint = match nearest(kind, &known) {
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
            (OWN_API, "RequestAuthentication", read(Kind::RequestAuthentication)),
            ("security.istio.io/v1", "RequestAuthentication", read(Kind::RequestAuthentication)),
            (
                OWN_API,
                "EgressPolicy",
                "refuse kind EgressPolicy is not enforced by this version: remove the document".to_owned(),
            ),
            ("gateway.networking.k8s.io/v1", "HTTPRoute", read(Kind::HttpRoute)),
            ("gateway.networking.k8s.io/v1alpha2", "TCPRoute", read(Kind::TcpRoute)),
            (
                "gateway.networking.k8s.io/v1alpha2",
                "HTTPRoute",
                "refuse HTTPRoute has apiVersion gateway.networking.k8s.io/v1, not \
                 `gateway.networking.k8s.io/v1alpha2`"
                    .to_owned(),
            ),
            (
                "gateway.networking.k8s.io/v1alpha2",
                "UDPRoute",
                "refuse kind UDPRoute is not acted on by this version: remove the document".to_owned(),
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
