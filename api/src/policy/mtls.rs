//! How a connection may come in: the mTLS mode of a port against how the caller arrived.

/// Whether a port takes mutual TLS only, both, or plaintext only.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MtlsMode {
    Strict,
    Permissive,
    Disable,
}

impl MtlsMode {
    pub fn as_str(self) -> &'static str {
        match self {
            MtlsMode::Strict => "STRICT",
            MtlsMode::Permissive => "PERMISSIVE",
            MtlsMode::Disable => "DISABLE",
        }
    }
}

/// How the downstream of an inbound connection came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// Mutual TLS with a proved identity.
    Mutual,
    Plaintext,
    /// TLS of the application's own, which passes unparsed.
    ForeignTls,
    /// On a port that takes plaintext, before the client has sent enough to tell.
    Undecided,
    /// The workload itself, from within the sidecar's process.
    Own,
}

/// May this connection come in? The error says why not.
pub fn admit(mode: MtlsMode, arrival: Arrival) -> Result<(), &'static str> {
    match (mode, arrival) {
        // Nothing is on a wire, so no mode has anything to ask of it.
        (MtlsMode::Strict | MtlsMode::Permissive | MtlsMode::Disable, Arrival::Own) => Ok(()),
        (MtlsMode::Strict | MtlsMode::Permissive, Arrival::Mutual) => Ok(()),
        (MtlsMode::Permissive | MtlsMode::Disable, Arrival::Plaintext | Arrival::ForeignTls | Arrival::Undecided) => {
            Ok(())
        }
        (MtlsMode::Strict, Arrival::Plaintext) => Err("plaintext on a STRICT port"),
        (MtlsMode::Strict, Arrival::Undecided) => Err("the port became STRICT before the client had said anything"),
        (MtlsMode::Strict, Arrival::ForeignTls) => Err("TLS that is not the mesh's on a STRICT port"),
        (MtlsMode::Disable, Arrival::Mutual) => Err("mutual TLS on a port where it is disabled"),
    }
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
