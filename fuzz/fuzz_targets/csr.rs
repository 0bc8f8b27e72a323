//! A certificate signing request from the network: refused with a reason, or a key and nothing else.
#![no_main]

use std::sync::OnceLock;
use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_control_plane::ca::Authority;
use outrigger_control_plane::config::State;

static AUTHORITY: OnceLock<(Authority, SpiffeId)> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let (authority, identity) = AUTHORITY.get_or_init(authority);
    if let Err(error) = authority.check(bytes, identity) {
        assert!(!error.word().is_empty() && !error.to_string().is_empty());
    }
});

/// One that is made for this process, in a directory that stays empty otherwise.
fn authority() -> (Authority, SpiffeId) {
    let directory = std::env::temp_dir().join(format!("outrigger-fuzz-{}", std::process::id()));
    let domain = TrustDomain::new("outrigger.local").expect("a trust domain");
    let state = State::open(&directory).expect("a directory");
    let authority = Authority::open(&state, &domain, SystemTime::now()).expect("an authority");
    let _ = std::fs::remove_dir_all(&directory);
    (authority, SpiffeId::new(&domain, "shop", "cart").expect("an identity"))
}
