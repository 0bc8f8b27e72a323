//! The rules of [`super::leaf`] in the shape that rustls asks for: clients prove any identity of the trust domain,
//! a server proves the one that its endpoint was registered with. DNS names and OCSP are not consulted.

use outrigger_api::identity::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::clock::from_unix_seconds;
use super::credential::Bundle;
use super::error::PeerFault;
use super::leaf::{Purpose, verify};
use super::material::provider;

/// Believes a server that proves exactly one identity.
#[derive(Debug)]
pub struct ExpectedServer {
    bundle: Bundle,
    expected: SpiffeId,
}

impl ExpectedServer {
    pub fn new(bundle: Bundle, expected: SpiffeId) -> ExpectedServer {
        ExpectedServer { bundle, expected }
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let now = from_unix_seconds(now.as_secs());
        let found =
            verify(leaf, intermediates, &self.bundle, Purpose::Server, now).map_err(PeerFault::into_rustls)?.identity;
        if found != self.expected {
            return Err(PeerFault::Unexpected { found, expected: self.expected.clone() }.into_rustls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Believes every client of the trust domain; what it may do is policy's business.
#[derive(Debug)]
pub(super) struct AnyMember {
    bundle: Bundle,
}

impl AnyMember {
    pub(super) fn new(bundle: Bundle) -> AnyMember {
        AnyMember { bundle }
    }
}

impl ClientCertVerifier for AnyMember {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let now = from_unix_seconds(now.as_secs());
        verify(leaf, intermediates, &self.bundle, Purpose::Client, now).map_err(PeerFault::into_rustls)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
