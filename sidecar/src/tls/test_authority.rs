//! A certificate authority for tests: makes good leaves and every bad one that the attack tables name.

use std::time::{Duration, SystemTime};

use outrigger_api::identity::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Bundle, Credential};

pub(crate) struct Authority {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a leaf is to say.
#[derive(Clone)]
pub(crate) struct LeafSpec {
    pub(crate) uris: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) common_name: Option<String>,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) authority: bool,
    pub(crate) key_algorithm: &'static rcgen::SignatureAlgorithm,
}

impl LeafSpec {
    /// A leaf of `spiffe://outrigger.local/ns/<namespace>/sa/<account>` that is valid now, for an hour.
    pub(crate) fn valid(namespace: &str, account: &str) -> LeafSpec {
        LeafSpec {
            uris: vec![format!("spiffe://outrigger.local/ns/{namespace}/sa/{account}")],
            dns: Vec::new(),
            common_name: Some(format!("{account}-1")),
            not_before: SystemTime::now() - Duration::from_secs(300),
            not_after: SystemTime::now() + Duration::from_secs(3600),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            authority: false,
            key_algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
        }
    }

    /// Valid from `before` seconds before `now` to `after` seconds after it.
    pub(crate) fn times(mut self, now: SystemTime, before: u64, after: u64) -> LeafSpec {
        self.not_before = now - Duration::from_secs(before);
        self.not_after = now + Duration::from_secs(after);
        self
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = &self.common_name {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        params.subject_alt_names = self
            .uris
            .iter()
            .map(|uri| SanType::URI(uri.as_str().try_into().unwrap()))
            .chain(self.dns.iter().map(|dns| SanType::DnsName(dns.as_str().try_into().unwrap())))
            .collect();
        params.is_ca = if self.authority { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if self.authority {
            params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        }
        params.extended_key_usages = self.usages.clone();
        params
    }
}

impl Authority {
    pub(crate) fn new(trust_domain: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "outrigger test root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).unwrap().der().clone();
        Authority { trust_domain: TrustDomain::new(trust_domain).unwrap(), root, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn bundle(&self, generation: u64) -> Bundle {
        Bundle::new(self.trust_domain.clone(), vec![self.root.clone()], generation).unwrap()
    }

    /// A leaf for somebody else's key, as Issue makes it.
    pub(crate) fn sign(&self, spec: &LeafSpec, key: &impl rcgen::PublicKeyData) -> CertificateDer<'static> {
        spec.params().signed_by(key, &self.issuer).unwrap().der().clone()
    }

    pub(crate) fn leaf(&self, spec: &LeafSpec) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate_for(spec.key_algorithm).unwrap();
        (vec![self.sign(spec, &key)], private(&key))
    }

    pub(crate) fn credential(&self, spec: &LeafSpec) -> Credential {
        let (chain, key) = self.leaf(spec);
        Credential::new(chain, key, self.bundle(1)).unwrap()
    }

    /// A leaf that is signed by another leaf of this authority.
    pub(crate) fn leaf_by_leaf(&self, spec: &LeafSpec) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let middle_key = KeyPair::generate().unwrap();
        let middle = self.sign(&LeafSpec::valid("shop", "middle"), &middle_key);
        let issuer = Issuer::new(LeafSpec::valid("shop", "middle").params(), middle_key);
        let key = KeyPair::generate().unwrap();
        let leaf = spec.params().signed_by(&key, &issuer).unwrap().der().clone();
        (vec![leaf, middle], private(&key))
    }
}

/// A leaf that is signed by itself.
pub(crate) fn self_signed(spec: &LeafSpec) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let leaf = spec.params().self_signed(&key).unwrap().der().clone();
    (vec![leaf], private(&key))
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}
