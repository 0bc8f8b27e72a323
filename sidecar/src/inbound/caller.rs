//! Who calls: what is proved about it, what the application is told about it, and the metrics of what it does.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, HeaderValue};
use outrigger_api::identity::SpiffeId;

use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::outcome::Error;
use crate::policy::Judgement;
use crate::protocol::http::headers::{CLIENT_CERTIFICATE, IDENTITY};
use crate::telemetry::{Direction, Edge, EdgeLabels, NoteKey, NoteKind, TcpRecord, Telemetry, UNKNOWN, WireProtocol};

/// Who calls.
pub(super) struct Caller {
    pub(super) peer: Option<Box<Proved>>,
    pub(super) destination_service: String,
}

/// A caller of whom it is known who it is.
pub(super) struct Proved {
    pub(super) identity: SpiffeId,
    pub(super) workload: Arc<str>,
    /// By mutual TLS; else it is the workload itself.
    pub(super) mtls: bool,
}

impl Caller {
    pub(super) fn refused(&self, worker: &Worker, registered: &Registered, error: &Error) {
        let edge = self.edge(worker, WireProtocol::Tcp);
        let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
        record.downstream(registered.client);
        record.failed(error.reason, || error.to_string());
        if let Some(by) = &error.by {
            record.set_policy(&by.object, by.rule);
        }
    }

    pub(super) fn edge(&self, worker: &Worker, protocol: WireProtocol) -> Arc<Edge> {
        let (workload, namespace, principal) = match &self.peer {
            Some(peer) => (peer.workload.to_string(), peer.identity.namespace().to_owned(), peer.identity.to_string()),
            None => (UNKNOWN.to_owned(), UNKNOWN.to_owned(), String::new()),
        };
        worker.telemetry.edge(&EdgeLabels {
            direction: Direction::Inbound,
            source_workload: workload,
            source_namespace: namespace,
            source_principal: principal,
            destination_service: self.destination_service.clone(),
            destination_workload: worker.own.workload.clone(),
            destination_namespace: worker.own.namespace.clone(),
            protocol,
            mtls: self.peer.as_ref().is_some_and(|peer| peer.mtls),
            destination_principal: worker.own.principal.to_string(),
        })
    }
}

/// Counts what Shadow and AUDIT policies said of a request, or of opaque bytes.
pub(super) fn note_policies(
    telemetry: &Telemetry,
    judgement: &Judgement,
    identity: Option<&SpiffeId>,
    shape: impl Fn() -> String,
) {
    let kinds = [
        (NoteKind::WouldDeny, &judgement.shadow),
        (NoteKind::WouldLimit, &judgement.limited),
        (NoteKind::Audit, &judgement.audit),
    ];
    for (kind, noted) in kinds {
        for noted in noted {
            let principal = identity.map(ToString::to_string).unwrap_or_default();
            let key = NoteKey { kind, policy: noted.object.clone(), principal, shape: shape() };
            telemetry.verdicts().note(key, SystemTime::now());
        }
    }
}

/// What the application is told about the caller; made once per connection.
pub(super) struct Claims {
    client_certificate: HeaderValue,
    identity: HeaderValue,
}

impl Claims {
    pub(super) fn new(own: &SpiffeId, caller: &SpiffeId) -> Option<Claims> {
        Some(Claims {
            client_certificate: HeaderValue::from_str(&format!("By={own};URI={caller}")).ok()?,
            identity: HeaderValue::from_str(caller.as_str()).ok()?,
        })
    }

    /// Into a head from which whatever the caller sent under these names was removed.
    pub(super) fn insert(&self, headers: &mut HeaderMap) {
        headers.insert(CLIENT_CERTIFICATE, self.client_certificate.clone());
        headers.insert(IDENTITY, self.identity.clone());
    }
}
