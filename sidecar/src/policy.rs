//! Asks policy. What comes back is a [`Permit`], and forwarding demands one: bytes cannot reach an application or an
//! endpoint on a path that forgot to ask. In this version the inbound rule is the mTLS mode.

use outrigger_api::snapshot::MtlsMode;

use crate::connection::Arrival;
use crate::outcome::{Error, Reason, Stage};

/// The proof that policy was asked and agreed. Only this module makes one.
#[derive(Clone, Copy, Debug)]
#[must_use = "forwarding needs it"]
pub struct Permit(());

/// May this connection come in?
pub fn admit(mode: MtlsMode, arrival: Arrival) -> Result<Permit, Error> {
    match (mode, arrival) {
        // Nothing is on a wire, so no mode has anything to ask of it.
        (MtlsMode::Strict | MtlsMode::Permissive | MtlsMode::Disable, Arrival::Own) => Ok(Permit(())),
        (MtlsMode::Strict | MtlsMode::Permissive, Arrival::Mutual) => Ok(Permit(())),
        (MtlsMode::Permissive | MtlsMode::Disable, Arrival::Plaintext | Arrival::ForeignTls | Arrival::Undecided) => {
            Ok(Permit(()))
        }
        (MtlsMode::Strict, Arrival::Plaintext) => Err(refuse("plaintext on a STRICT port")),
        (MtlsMode::Strict, Arrival::Undecided) => {
            Err(refuse("the port became STRICT before the client had said anything"))
        }
        (MtlsMode::Strict, Arrival::ForeignTls) => Err(refuse("TLS that is not the mesh's on a STRICT port")),
        (MtlsMode::Disable, Arrival::Mutual) => Err(refuse("mutual TLS on a port where it is disabled")),
    }
}

/// What the application itself sends out is not restricted in this version.
pub fn admit_outbound() -> Permit {
    Permit(())
}

fn refuse(detail: &'static str) -> Error {
    Error::downstream(Stage::Policy, Reason::MtlsRequired, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_mutual_tls_only() {
        for arrival in [Arrival::Mutual, Arrival::Plaintext, Arrival::ForeignTls, Arrival::Undecided] {
            assert_eq!(admit(MtlsMode::Strict, arrival).is_ok(), arrival == Arrival::Mutual, "{arrival:?}");
            assert!(admit(MtlsMode::Permissive, arrival).is_ok(), "{arrival:?}");
            assert_eq!(admit(MtlsMode::Disable, arrival).is_ok(), arrival != Arrival::Mutual, "{arrival:?}");
        }
    }
}
