//! Looks at a certificate signing request that a stranger sent and takes one thing from it, the public key. Whoever
//! asks for more than the proof gives is refused, not corrected: it is either broken or an attack.

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_api::identity::SpiffeId;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

/// A request beyond this is refused before it is parsed.
pub const MAX_CSR: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    #[error("the certificate request is not a PKCS#10 request in DER ({0})")]
    Malformed(String),
    #[error("the certificate request is not signed by its own key")]
    Signature,
    #[error("the certificate request has a key of a kind that is not taken; make a P-256 or Ed25519 key")]
    Key,
    #[error("the certificate request asks for {0}, and the proof gives {1} and nothing else; ask for nothing")]
    Identity(String, String),
}

impl CsrError {
    /// The first word of the status message (identity.proto).
    pub fn word(&self) -> &'static str {
        match self {
            CsrError::Malformed(_) => "csr_malformed",
            CsrError::Signature => "csr_signature",
            CsrError::Key => "csr_key",
            CsrError::Identity(..) => "csr_identity",
        }
    }
}

/// The public key of a request that passed every check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestedKey {
    pub(super) key: SubjectPublicKeyInfo,
}

impl RequestedKey {
    /// What tells this key from others, as [`key_fingerprint`] of the certificate that it will be in.
    pub fn fingerprint(&self) -> String {
        key_fingerprint(&rcgen::PublicKeyData::subject_public_key_info(&self.key))
    }
}

/// SHA-256 of a SubjectPublicKeyInfo in DER.
pub fn key_fingerprint(spki: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, spki))
}

/// Checks a request against the identity that its sender proved.
pub fn check(der: &[u8], identity: &SpiffeId) -> Result<RequestedKey, CsrError> {
    if der.len() > MAX_CSR {
        return Err(CsrError::Malformed(format!("{} bytes, at most {MAX_CSR} are read", der.len())));
    }
    let (rest, csr) =
        X509CertificationRequest::from_der(der).map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed(format!("{} bytes follow it", rest.len())));
    }
    let spki = csr.certification_request_info.subject_pki.raw;
    let key = SubjectPublicKeyInfo::from_der(spki).map_err(|_| CsrError::Key)?;
    if !is_accepted(&key) {
        return Err(CsrError::Key);
    }
    csr.verify_signature().map_err(|_| CsrError::Signature)?;
    for attribute in csr.certification_request_info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() else { continue };
        for extension in &request.extensions {
            if let Some(excess) = excess(extension.parsed_extension(), identity) {
                return Err(CsrError::Identity(excess, identity.to_string()));
            }
        }
    }
    Ok(RequestedKey { key })
}

/// P-256 and Ed25519 as documented, and P-384, which costs nothing to take. Points must be uncompressed.
fn is_accepted(key: &SubjectPublicKeyInfo) -> bool {
    use rcgen::PublicKeyData;
    let (algorithm, length) = (key.algorithm(), key.der_bytes().len());
    (algorithm == &rcgen::PKCS_ED25519 && length == 32)
        || (algorithm == &rcgen::PKCS_ECDSA_P256_SHA256 && length == 65)
        || (algorithm == &rcgen::PKCS_ECDSA_P384_SHA384 && length == 97)
}

/// What an extension asks for beyond the identity. Extensions that grant nothing are ignored: none is copied.
fn excess(extension: &ParsedExtension<'_>, identity: &SpiffeId) -> Option<String> {
    match extension {
        ParsedExtension::SubjectAlternativeName(names) => names
            .general_names
            .iter()
            .find(|name| !matches!(name, GeneralName::URI(uri) if *uri == identity.as_str()))
            .map(|name| format!("the name {name}")),
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
            Some("a certificate authority (CA:TRUE)".to_owned())
        }
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
            Some("the right to sign certificates".to_owned())
        }
        ParsedExtension::NameConstraints(_) => Some("name constraints".to_owned()),
        ParsedExtension::ParseError { .. } => Some("an extension that cannot be read".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
    };

    use super::*;

    fn identity() -> SpiffeId {
        SpiffeId::parse("spiffe://outrigger.local/ns/shop/sa/cart").unwrap()
    }

    fn csr(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn normal_requests_pass() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let plain = csr(&key, |_| {});
            let named = csr(&key, |params| {
                params.distinguished_name.push(DnType::CommonName, "root");
                params.subject_alt_names = vec![uri(identity().as_str())];
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
                params.is_ca = IsCa::ExplicitNoCa;
            });
            for der in [plain, named] {
                let requested = check(&der, &identity()).unwrap();
                assert_eq!(
                    requested.fingerprint(),
                    key_fingerprint(&rcgen::PublicKeyData::subject_public_key_info(&key))
                );
            }
        }
    }

    #[test]
    fn whoever_asks_for_more_is_refused() {
        let key = KeyPair::generate().unwrap();
        type Change = fn(&mut CertificateParams);
        let cases: [(&str, Change); 9] = [
            ("another identity", |p| p.subject_alt_names = vec![uri("spiffe://outrigger.local/ns/shop/sa/pay")]),
            ("the control plane's identity", |p| {
                p.subject_alt_names = vec![uri("spiffe://outrigger.local/ns/outrigger-system/sa/control-plane")];
            }),
            ("its own identity and another", |p| {
                p.subject_alt_names = vec![uri(identity().as_str()), uri("spiffe://outrigger.local/ns/shop/sa/pay")];
            }),
            ("a DNS name", |p| p.subject_alt_names = vec![SanType::DnsName("evil.test".try_into().unwrap())]),
            ("an address", |p| p.subject_alt_names = vec![SanType::IpAddress([10, 0, 0, 1].into())]),
            ("a CA", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            ("a CA of no depth", |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))),
            ("to sign certificates", |p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]),
            ("to sign revocations", |p| {
                p.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign];
            }),
        ];
        for (name, change) in cases {
            let error = check(&csr(&key, change), &identity()).unwrap_err();
            assert_eq!(error.word(), "csr_identity", "{name}: {error}");
        }
    }

    #[test]
    fn extensions_that_grant_nothing_are_ignored() {
        let key = KeyPair::generate().unwrap();
        let der = csr(&key, |params| {
            params.custom_extensions =
                vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![0x05, 0x00])];
        });
        assert!(check(&der, &identity()).is_ok());
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let key = KeyPair::generate().unwrap();
        let good = csr(&key, |_| {});
        let mut trailing = good.clone();
        trailing.push(0);
        let mut large = good.clone();
        large.resize(MAX_CSR + 1, 0);
        let cases: [(&str, Vec<u8>); 5] = [
            ("empty", Vec::new()),
            ("text", b"-----BEGIN CERTIFICATE REQUEST-----".to_vec()),
            ("cut off", good[..good.len() - 1].to_vec()),
            ("bytes behind it", trailing),
            ("too large", large),
        ];
        for (name, der) in cases {
            assert_eq!(check(&der, &identity()).unwrap_err().word(), "csr_malformed", "{name}");
        }
    }

    #[test]
    fn a_signature_by_another_key_is_refused() {
        let key = KeyPair::generate().unwrap();
        let mut der = csr(&key, |_| {});
        // The signature is the end of the request: a flipped bit there leaves a well-formed request.
        let last = der.len() - 1;
        der[last] ^= 1;
        assert_eq!(check(&der, &identity()).unwrap_err().word(), "csr_signature");
        let other = KeyPair::generate().unwrap();
        let (mine, theirs) = (csr(&key, |_| {}), rcgen::PublicKeyData::subject_public_key_info(&other));
        let own = rcgen::PublicKeyData::subject_public_key_info(&key);
        let at = mine.windows(own.len()).position(|window| window == own).unwrap();
        let mut swapped = mine.clone();
        swapped[at..at + own.len()].copy_from_slice(&theirs);
        assert_eq!(check(&swapped, &identity()).unwrap_err().word(), "csr_signature");
    }

    #[test]
    fn keys_of_other_kinds_are_refused() {
        for algorithm in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P521_SHA512] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            assert_eq!(check(&csr(&key, |_| {}), &identity()).unwrap_err().word(), "csr_key");
        }
    }
}
