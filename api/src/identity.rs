//! SPIFFE ids: who a workload is. Parsed strictly once, from a certificate or from a grant; everything behind that
//! compares values. The grammar is the SPIFFE-ID standard's, narrowed to `/ns/<namespace>/sa/<service-account>`.

use std::fmt;
use std::sync::Arc;

use crate::name::is_label;
use crate::peer_text::cut;

/// The namespace of the mesh's own parts. No token and no CSR obtains an identity in it.
pub const ROOT_NAMESPACE: &str = "outrigger-system";
/// The service account with which the control plane presents itself, in [`ROOT_NAMESPACE`].
pub const CONTROL_PLANE_ACCOUNT: &str = "control-plane";
/// The trust domain when nobody says otherwise.
pub const DEFAULT_TRUST_DOMAIN: &str = "outrigger.local";

/// Why a text is not an identity of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("{0:?} is not a trust domain: 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    #[error("{0:?} is not a SPIFFE id of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
    Form(String),
    #[error("a SPIFFE id is at most 2048 bytes, this one has {0}")]
    TooLong(usize),
}

/// A trust domain, checked: lower case, at most 255 bytes (SPIFFE-ID section 2.1).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn new(text: &str) -> Result<TrustDomain, IdentityError> {
        let fits = (1..=255).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'));
        if fits { Ok(TrustDomain(text.into())) } else { Err(IdentityError::TrustDomain(cut(text))) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<TrustDomain, IdentityError> {
        TrustDomain::new(text)
    }
}

/// `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`. Cheap to clone; equality is that of the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where in `text` the trust domain ends; the namespace and the account follow from it.
    trust_domain_end: u16,
    namespace_end: u16,
}

const SCHEME: &str = "spiffe://";
const NS: &str = "/ns/";
const SA: &str = "/sa/";

impl SpiffeId {
    pub fn new(trust_domain: &TrustDomain, namespace: &str, account: &str) -> Result<SpiffeId, IdentityError> {
        SpiffeId::parse(&format!("{SCHEME}{trust_domain}{NS}{namespace}{SA}{account}"))
    }

    /// The identity that a control plane presents and that sidecars insist on.
    pub fn control_plane(trust_domain: &TrustDomain) -> SpiffeId {
        let text = format!("{SCHEME}{trust_domain}{NS}{ROOT_NAMESPACE}{SA}{CONTROL_PLANE_ACCOUNT}");
        let trust_domain_end = (SCHEME.len() + trust_domain.as_str().len()) as u16;
        let namespace_end = trust_domain_end + (NS.len() + ROOT_NAMESPACE.len()) as u16;
        SpiffeId { text: text.into(), trust_domain_end, namespace_end }
    }

    /// Accepts the one spelling: no query, no port, no percent-encoding, no dot segments, nothing behind the account.
    pub fn parse(text: &str) -> Result<SpiffeId, IdentityError> {
        if text.len() > 2048 {
            return Err(IdentityError::TooLong(text.len()));
        }
        let wrong = || IdentityError::Form(cut(text));
        let rest = text.strip_prefix(SCHEME).ok_or_else(wrong)?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(wrong)?;
        TrustDomain::new(trust_domain)?;
        let (namespace, account) = path.strip_prefix("ns/").and_then(|path| path.split_once(SA)).ok_or_else(wrong)?;
        if !is_label(namespace) || !is_account(account) {
            return Err(wrong());
        }
        let trust_domain_end = (SCHEME.len() + trust_domain.len()) as u16;
        let namespace_end = trust_domain_end + (NS.len() + namespace.len()) as u16;
        Ok(SpiffeId { text: text.into(), trust_domain_end, namespace_end })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.trust_domain_end as usize]
    }

    pub fn namespace(&self) -> &str {
        &self.text[self.trust_domain_end as usize + NS.len()..self.namespace_end as usize]
    }

    pub fn account(&self) -> &str {
        &self.text[self.namespace_end as usize + SA.len()..]
    }
}

/// A service account's name: a DNS subdomain of labels, as in Kubernetes.
pub fn is_account(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back() {
        let id = SpiffeId::parse("spiffe://outrigger.local/ns/shop/sa/cart").unwrap();
        assert_eq!((id.trust_domain(), id.namespace(), id.account()), ("outrigger.local", "shop", "cart"));
        let domain = TrustDomain::new("outrigger.local").unwrap();
        assert_eq!(SpiffeId::new(&domain, "shop", "cart").unwrap(), id);
        let own = SpiffeId::control_plane(&domain);
        assert_eq!(SpiffeId::parse(own.as_str()).unwrap(), own);
        assert_eq!(own.namespace(), ROOT_NAMESPACE);
    }

    #[test]
    fn one_spelling_only() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe://td/",
            "spiffe:///ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://u@td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a/sa/b#x",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td//ns/a/sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a/sa/..",
            "spiffe://td/ns/a%2fb/sa/c",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/sa/b/ns/a",
            "spiffe://td/ns/a/sa/b\0",
            " spiffe://td/ns/a/sa/b",
        ] {
            assert!(SpiffeId::parse(text).is_err(), "{text:?}");
        }
        assert!(SpiffeId::parse(&format!("spiffe://td/ns/a/sa/{}", "b.".repeat(2000))).is_err());
    }
}
