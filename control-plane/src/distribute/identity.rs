//! `Identity.Issue`: a certificate for whoever proves who it is, by a join token the first time, by its current
//! certificate afterwards, and by its last one when that has ended. Every refusal begins with a word from identity.proto.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::SpiffeId;
use outrigger_api::name;
use outrigger_api::peer_text::PeerText;
use outrigger_api::wire::identity_server::Identity;
use outrigger_api::wire::{IssueRequest, IssueResponse};
use tonic::{Code, Request, Response, Status};

use super::catalog::leaf_lifetime_seconds;
use super::late;
use super::recent::Event;
use super::server::{Control, Shared};
use super::tls::{Peer, PeerCertificate};
use crate::ca::token::{Claims, TokenError};
use crate::ca::{Issued, RedeemError, RequestedKey, Subject, unix_seconds};

/// Why nothing was issued: the gRPC code, the word, and a sentence for people.
pub(super) struct Refusal {
    code: Code,
    word: &'static str,
    message: String,
}

impl Refusal {
    pub(super) fn new(code: Code, word: &'static str, message: impl ToString) -> Refusal {
        Refusal { code, word, message: message.to_string() }
    }
}

impl From<TokenError> for Refusal {
    fn from(error: TokenError) -> Refusal {
        let code = if error == TokenError::Reserved { Code::PermissionDenied } else { Code::Unauthenticated };
        Refusal::new(code, error.word(), error)
    }
}

impl From<RedeemError> for Refusal {
    fn from(error: RedeemError) -> Refusal {
        let code = match error {
            RedeemError::Replayed { .. } => Code::PermissionDenied,
            RedeemError::State(_) => Code::Unavailable,
        };
        Refusal::new(code, error.word(), error)
    }
}

#[tonic::async_trait]
impl Identity for Shared {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let control = &self.0;
        let Some(peer) = request.extensions().get::<Peer>().cloned() else {
            return Err(Status::internal("internal: the connection has no peer"));
        };
        let by_token = !request.get_ref().proof.trim().is_empty();
        let workload = PeerText(&request.get_ref().workload).to_string();
        let issued = issue(control, &peer, request.into_inner(), SystemTime::now()).await;
        issued.map(Response::new).map_err(|refusal| {
            let Refusal { code, word, message } = refusal;
            control.metrics.issue_refused.with_label_values(&[word]).inc();
            let what = format!("{} ({workload}): {word}", peer.address.ip());
            control.recent.note(Event::JoinRefused, what, SystemTime::now());
            if let Some(line) = control.line(word) {
                let suppressed = line.suppressed;
                tracing::warn!(peer = %peer.address, by_token, reason = word, suppressed, "no certificate issued: {message}");
            }
            Status::new(code, format!("{word}: {message}"))
        })
    }
}

async fn issue(
    control: &Arc<Control>,
    peer: &Peer,
    request: IssueRequest,
    now: SystemTime,
) -> Result<IssueResponse, Refusal> {
    let workload = request.workload.clone();
    let malformed_name = |error| Refusal::new(Code::InvalidArgument, "workload_name", error);
    name::label(&workload).map_err(malformed_name)?;
    let Proved { identity, proof } = prove(control, peer, &request, now)?;
    let requested = control
        .authority
        .check(&request.csr_der, &identity)
        .map_err(|error| Refusal::new(Code::InvalidArgument, error.word(), error))?;
    let proof_kind = match &proof {
        Proof::Token(_) => "token",
        Proof::Certificate(_) => "mtls",
        Proof::Ended(_) => "late",
    };
    let lifetime = Duration::from_secs(leaf_lifetime_seconds(&control.publisher.resources()));
    let shared = control.clone();
    // The redemption waits for the disk, and signing takes a while: not on the thread that serves streams.
    let issued = tokio::task::spawn_blocking(move || {
        record_and_sign(&shared, proof, &requested, &identity, &workload, lifetime, now)
    })
    .await
    .map_err(|error| Refusal::new(Code::Internal, "internal", error))??;
    control.metrics.issued.with_label_values(&[proof_kind]).inc();
    Ok(IssueResponse {
        chain_der: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
        trust_bundle: Some(control.authority.bundle().to_wire()),
        not_before: unix_seconds(issued.validity.not_before) as i64,
        not_after: unix_seconds(issued.validity.not_after) as i64,
    })
}

/// Who is asking, and what shows it.
struct Proved {
    identity: SpiffeId,
    proof: Proof,
}

enum Proof {
    /// To be redeemed.
    Token(Claims),
    /// That of the connection.
    Certificate(Subject),
    /// One that has ended.
    Ended(Subject),
}

fn prove(control: &Control, peer: &Peer, request: &IssueRequest, now: SystemTime) -> Result<Proved, Refusal> {
    let trust_domain = control.authority.trust_domain();
    let is_renewal = request.proof.trim().is_empty();
    match (&peer.certificate, &request.late) {
        (Some(certificate), _) if is_renewal => {
            // It was valid in the handshake; the connection may be older than its end.
            if certificate.not_after <= now {
                let message = "the certificate of this connection has expired; connect again without it";
                return Err(Refusal::new(Code::Unauthenticated, "certificate_expired", message));
            }
            let subject = renewed(certificate, &request.workload)?;
            Ok(Proved { identity: certificate.identity.clone(), proof: Proof::Certificate(subject) })
        }
        (None, Some(ended)) if is_renewal => {
            let certificate = late::prove(control, peer, ended, &request.csr_der, now)?;
            let subject = renewed(&certificate, &request.workload)?;
            Ok(Proved { identity: certificate.identity, proof: Proof::Ended(subject) })
        }
        (certificate, _) => {
            let claims = control.tokens.verify(&request.proof, trust_domain.as_str(), now)?;
            let identity = SpiffeId::new(trust_domain, &claims.namespace, &claims.service_account)
                .map_err(|_| TokenError::Malformed)?;
            if let Some(certificate) = certificate
                && certificate.identity != identity
            {
                let message = format!("the token is for {identity}, and the connection is {}'s", certificate.identity);
                return Err(Refusal::new(Code::PermissionDenied, "token_namespace", message));
            }
            Ok(Proved { identity, proof: Proof::Token(claims) })
        }
    }
}

/// A renewal is for the name that the certificate has.
fn renewed(certificate: &PeerCertificate, workload: &str) -> Result<Subject, Refusal> {
    if certificate.workload == workload {
        return Ok(certificate.subject());
    }
    let message =
        format!("the certificate is of workload {:?}; a renewal cannot be for {workload:?}", certificate.workload);
    Err(Refusal::new(Code::InvalidArgument, "workload_name", message))
}

fn record_and_sign(
    control: &Control,
    proof: Proof,
    requested: &RequestedKey,
    identity: &SpiffeId,
    workload: &str,
    lifetime: Duration,
    now: SystemTime,
) -> Result<Issued, Refusal> {
    let end = now + lifetime;
    match proof {
        Proof::Token(claims) => control.redemptions.redeem(&claims, workload, requested, end, now)?,
        Proof::Certificate(subject) | Proof::Ended(subject) => {
            control.redemptions.renew(&subject, requested, end, now).map_err(RedeemError::from)?;
        }
    }
    control
        .authority
        .issue(requested, identity, workload, lifetime, now)
        .map_err(|error| Refusal::new(Code::Unavailable, "issuer", error))
}
