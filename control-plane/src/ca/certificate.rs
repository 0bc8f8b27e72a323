//! The three shapes of certificates that this authority signs: root, intermediate and leaf. Every field is set
//! here; nothing is taken over from what a caller sent but its public key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use outrigger_api::identity::SpiffeId;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SigningKey,
};

use super::AuthorityError;

/// Certificates begin this long before they are made, for peers whose clock is behind.
pub const BACKDATE: Duration = Duration::from_secs(5 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// An intermediate's lifetime; it is replaced at half of it.
pub const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(90 * DAY.as_secs());

/// From `not_before` to `not_after`, both inclusive (RFC 5280 section 4.1.2.5), whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Validity {
    pub fn contains(&self, now: SystemTime) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }

    /// The moment from which a successor is due.
    pub fn half(&self) -> SystemTime {
        let length = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + length / 2
    }
}

/// Seconds since 1970; 0 for what is before.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(super) fn root(key: &KeyPair, trust_domain: &str, now: SystemTime) -> Result<Certificate, AuthorityError> {
    let validity = Validity { not_before: now - BACKDATE, not_after: now + ROOT_LIFETIME };
    let params = authority(&format!("Outrigger root {trust_domain}"), BasicConstraints::Unconstrained, validity)?;
    params.self_signed(key).map_err(AuthorityError::Signing)
}

pub(super) fn intermediate(
    key: &KeyPair,
    trust_domain: &str,
    issuer: &Issuer<'_, impl SigningKey>,
    issuer_end: SystemTime,
    now: SystemTime,
) -> Result<Certificate, AuthorityError> {
    let not_after = (now + INTERMEDIATE_LIFETIME).min(issuer_end);
    let validity = Validity { not_before: now - BACKDATE, not_after };
    let name = format!("Outrigger intermediate {trust_domain} {}", unix_seconds(now));
    let params = authority(&name, BasicConstraints::Constrained(0), validity)?;
    params.signed_by(key, issuer).map_err(AuthorityError::Signing)
}

/// A SPIFFE X.509-SVID leaf (X509-SVID sections 2 to 4): one URI SAN, digitalSignature, both EKUs, not a CA.
pub(super) fn leaf(
    public_key: &impl PublicKeyData,
    identity: &SpiffeId,
    workload: &str,
    validity: Validity,
    issuer: &Issuer<'_, impl SigningKey>,
) -> Result<Certificate, AuthorityError> {
    let mut params = empty(workload, validity)?;
    let uri = identity.as_str().try_into().map_err(AuthorityError::Signing)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.signed_by(public_key, issuer).map_err(AuthorityError::Signing)
}

fn authority(
    name: &str,
    constraints: BasicConstraints,
    validity: Validity,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = empty(name, validity)?;
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn empty(common_name: &str, validity: Validity) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(unix_seconds(validity.not_before));
    params.not_after = epoch + Duration::from_secs(unix_seconds(validity.not_after));
    params.serial_number = Some(random_serial()?);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// 16 random bytes, positive and of constant length (RFC 5280 section 4.1.2.2): no counter to lose.
fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| AuthorityError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
