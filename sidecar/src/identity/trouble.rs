//! What is wrong and what to do: turns every way in which a certificate can fail to come into one word and one
//! sentence for people, for `/ready` and for stderr.

use std::time::SystemTime;

use outrigger_api::peer_text::PeerText;
use tonic::Code;

use super::channel::{DialError, answered};
use super::request::IssueError;
use super::{IdentitySettings, Trouble};
use crate::tls::clock::show;
use crate::tls::{PeerFault, TlsError};

/// What a failure means for what is tried next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Nobody answered, or not sensibly: it may pass by itself.
    Passing,
    /// Somebody or something said no: it passes when a person has changed something.
    Refused,
    /// The control plane is of another authority than our certificate, or does not take it any more.
    OtherAuthority,
}

pub(super) fn kind(error: &IssueError) -> Kind {
    match error {
        IssueError::Dial(DialError::Tls { error: TlsError::Peer(PeerFault::Untrusted), .. }) => Kind::OtherAuthority,
        IssueError::CertificateRefused(_) => Kind::OtherAuthority,
        IssueError::Refused(status) if passing(status.code()) => Kind::Passing,
        // A clock is set right by itself, soon after the machine has started.
        IssueError::Clock(_)
        | IssueError::Dial(DialError::Tls {
            error: TlsError::Peer(PeerFault::Expired { .. } | PeerFault::NotYetValid { .. }),
            ..
        }) => Kind::Passing,
        IssueError::Dial(DialError::Tls { error: TlsError::Peer(_), .. }) => Kind::Refused,
        IssueError::Dial(_) | IssueError::Late(_) => Kind::Passing,
        IssueError::TrustBundle { .. }
        | IssueError::Token { .. }
        | IssueError::Refused(_)
        | IssueError::Answer(_)
        | IssueError::Key(_) => Kind::Refused,
    }
}

fn passing(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Internal)
}

/// The word and the sentence.
pub(super) fn explain(error: &IssueError, settings: &IdentitySettings, now: SystemTime) -> Trouble {
    let (reason, advice) = match error {
        IssueError::TrustBundle { .. } => (
            "trust_bundle",
            "write the control plane's STATE/trust-bundle.pem there; the file is read again at each try".to_owned(),
        ),
        IssueError::Token { .. } => (
            "token_missing",
            "make one with `outrigger token create` and write it there; the file is read again at each try".to_owned(),
        ),
        IssueError::Dial(DialError::Tls { error: TlsError::Peer(fault), .. }) => unbelieved(fault, settings, now),
        IssueError::Dial(_) | IssueError::Late(_) => unreachable(),
        IssueError::Refused(status) => return refused(status, settings, now),
        IssueError::CertificateRefused(_) => {
            ("certificate_refused", format!("a new join token in the token file replaces it; {}", clock_advice(now)))
        }
        IssueError::Answer(_) => (
            "certificate_unusable",
            "check --name, --namespace, --service-account and --trust-domain against the token and the control plane"
                .to_owned(),
        ),
        IssueError::Clock(_) => ("clock_skew", clock_advice(now)),
        IssueError::Key(_) => ("key", "the system gave no randomness or the key algorithm is not supported".to_owned()),
    };
    Trouble { reason: reason.to_owned(), hint: format!("{error}; {advice}") }
}

fn unreachable() -> (&'static str, String) {
    ("control_plane_unreachable", "check that the control plane runs and that --control-plane names it".to_owned())
}

fn clock_advice(now: SystemTime) -> String {
    format!("this machine's clock says {}: if that is wrong, set it (here or at the control plane)", show(now))
}

/// The control plane's own certificate does not convince us.
fn unbelieved(fault: &PeerFault, settings: &IdentitySettings, now: SystemTime) -> (&'static str, String) {
    match fault {
        PeerFault::Expired { .. } | PeerFault::NotYetValid { .. } => ("clock_skew", clock_advice(now)),
        PeerFault::Untrusted => (
            "control_plane_untrusted",
            format!(
                "no root in {} or in the trust bundle in use signed it: copy STATE/trust-bundle.pem of the control \
                 plane that this sidecar belongs to",
                settings.trust_bundle.display()
            ),
        ),
        PeerFault::Unexpected { .. } | PeerFault::TrustDomain { .. } => (
            "control_plane_identity",
            "something else than the control plane of this trust domain answers at --control-plane".to_owned(),
        ),
        PeerFault::Malformed(_)
        | PeerFault::Purpose
        | PeerFault::Authority
        | PeerFault::UriNames(_)
        | PeerFault::Identity(_)
        | PeerFault::Chain(_) => (
            "control_plane_identity",
            "what answers at --control-plane does not present a control plane's certificate".to_owned(),
        ),
    }
}

/// The control plane's refusal: its messages begin with a word and a colon.
fn refused(status: &tonic::Status, settings: &IdentitySettings, now: SystemTime) -> Trouble {
    let message = &PeerText(status.message()).to_string();
    let word = message.split_once(':').map(|(word, _)| word).filter(|word| is_reason(word));
    let Some(word) = word else {
        let (reason, advice) = if passing(status.code()) {
            unreachable()
        } else {
            ("issue_refused", "see the control plane's log".into())
        };
        return Trouble { reason: reason.to_owned(), hint: format!("{}; {advice}", answered(status)) };
    };
    let file = settings.token_file.as_deref().map_or_else(|| "--token-file".into(), |path| path.to_string_lossy());
    let advice = match word {
        "token_expired" => format!("write a new one from `outrigger token create` to {file}; {}", clock_advice(now)),
        "token_missing" | "token_malformed" | "token_audience" | "token_signature" | "token_replayed" => {
            format!("write a new one from `outrigger token create` of this control plane to {file}")
        }
        "certificate_expired" | "certificate_unknown" | "certificate_proof" => {
            format!("write a new join token from `outrigger token create` of this control plane to {file}")
        }
        "csr_identity" => format!(
            "this sidecar is told --namespace {}, --service-account {} and --trust-domain {}: correct what is wrong of them, \
             or write a token that was made for them to {file}; this token is not spent",
            settings.namespace, settings.service_account, settings.trust_domain
        ),
        "token_namespace" => {
            format!(
                "the token must be made for namespace {} and service account {}",
                settings.namespace, settings.service_account
            )
        }
        "namespace_reserved" => "that namespace belongs to the mesh itself: choose another --namespace".to_owned(),
        "workload_name" => "choose another --name".to_owned(),
        "state_write" => "the control plane cannot write its --state; it is tried again".to_owned(),
        _ => "see the control plane's log".to_owned(),
    };
    Trouble { reason: word.to_owned(), hint: format!("{message}; {advice}") }
}

fn is_reason(word: &str) -> bool {
    (1..=40).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}
