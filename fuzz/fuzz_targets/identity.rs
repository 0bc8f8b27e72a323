//! A SPIFFE id: what parses is spelled in one way only, and is made of its parts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_api::identity::{SpiffeId, TrustDomain, is_account};

fuzz_target!(|text: &str| {
    let _ = is_account(text);
    if let Ok(domain) = TrustDomain::new(text) {
        assert_eq!(domain.as_str(), text);
    }
    let Ok(id) = SpiffeId::parse(text) else { return };
    assert_eq!(id.as_str(), text);
    let domain = TrustDomain::new(id.trust_domain()).expect("the trust domain of an id is one");
    let again = SpiffeId::new(&domain, id.namespace(), id.account()).expect("an id is made of its parts");
    assert_eq!(again.as_str(), text);
    let path = &text["spiffe://".len() + id.trust_domain().len()..];
    assert!(is_account(id.account()) && !text.contains(['?', '#', '%', '\\', ' ', '@']) && !path.contains(".."));
});
