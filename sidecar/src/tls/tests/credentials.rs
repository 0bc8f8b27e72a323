//! The sidecar's own certificate and bundle: what makes none, when it is not used, and which bundle stays.

use super::attacks::bad_leaves;
use super::*;

#[test]
fn bad_certificates_make_no_credential_either() {
    let authority = Authority::new("outrigger.local");
    for (what, (chain, key), _) in bad_leaves(&authority) {
        // Time alone does not unmake a credential: it may be restored from disk, and says so when asked.
        let credential = Credential::new(chain, key, authority.bundle(1));
        match what {
            "expired" | "future" => assert!(credential.unwrap().check_time(SystemTime::now()).is_err(), "{what}"),
            _ => assert!(credential.is_err(), "{what}"),
        }
    }
    let (chain, _) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    let (_, key) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    assert!(matches!(Credential::new(chain, key, authority.bundle(1)), Err(CredentialError::KeyMismatch)));
    let (_, key) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    assert!(matches!(Credential::new(vec![], key, authority.bundle(1)), Err(CredentialError::NoChain)));
    assert!(Bundle::new(authority.trust_domain.clone(), vec![], 1).is_err());
    assert!(Bundle::new(authority.trust_domain.clone(), vec![vec![1, 2, 3].into()], 1).is_err());
    assert!(!bad_leaves(&authority).is_empty());
}

#[test]
fn no_key_is_ever_shown() {
    let authority = Authority::new("outrigger.local");
    let shown = format!("{:?}", authority.credential(&LeafSpec::valid("shop", "cart")));
    assert!(
        shown.contains("spiffe://outrigger.local/ns/shop/sa/cart") && !shown.to_lowercase().contains("key"),
        "{shown}"
    );
}

#[tokio::test]
async fn an_expired_own_certificate_fails_closed() {
    let authority = Authority::new("outrigger.local");
    let now = SystemTime::now();
    let expired = authority.credential(&LeafSpec::valid("shop", "cart").times(now, 60, 0));
    let late = Clock::new(move || now + Duration::from_secs(2));
    let server = Tls::new(late.clone());
    server.install(expired.clone()).unwrap();
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let (at_server, _) = pair(&server, &client, MeshAlpn::H1, &id("cart")).await;
    assert_eq!(at_server.unwrap_err().reason(), Reason::NotReady);
    let (_, at_client) = pair(&client, &server, MeshAlpn::H1, &id("web")).await;
    assert_eq!(at_client.unwrap_err().reason(), Reason::NotReady);
}

#[test]
fn the_later_bundle_stays_unless_it_disbelieves_the_new_leaf() {
    let (one, two) = (Authority::new("outrigger.local"), Authority::new("outrigger.local"));
    let tls = tls(one.credential(&LeafSpec::valid("shop", "cart")));
    assert!(tls.install_bundle(one.bundle(5)).unwrap());
    assert!(!tls.install_bundle(one.bundle(4)).unwrap(), "an older one is not taken");
    let with = |generation| {
        let roots = one.bundle(0).roots().iter().chain(two.bundle(0).roots()).cloned().collect();
        Bundle::new(one.bundle(0).trust_domain().clone(), roots, generation).unwrap()
    };
    for generation in [1, 4, 5] {
        let refused = tls.install_bundle(with(generation)).unwrap_err();
        assert!(matches!(refused, TlsError::OlderBundle { in_force: 5, .. }), "{generation}: {refused}");
    }
    tls.install(one.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    assert_eq!(tls.current().unwrap().credential().bundle().generation(), 5);
    tls.install(two.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    let installed = tls.current().unwrap();
    assert_eq!(installed.credential().bundle().generation(), 1, "of another authority");
    assert!(installed.credential().verifies());
    let foreign = Authority::new("other.local");
    assert!(tls.install_bundle(foreign.bundle(9)).is_err());
}
