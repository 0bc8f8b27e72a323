//! What the control plane sends: a message that is taken says the same when it is written and read again, and everything
//! else is refused with words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_api::identity::TrustDomain;
use outrigger_api::snapshot::{Destination, Key, Workload};
use outrigger_api::wire::{self, ResourceKey, WatchResponse, watch_response::Resource};
use outrigger_sidecar::tls::Bundle;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(response) = WatchResponse::decode(bytes) else { return };
    if let Some(key) = &response.key
        && let Ok(key) = Key::try_from(key)
    {
        let again = ResourceKey::from(&key);
        assert_eq!(Key::try_from(&again).as_ref(), Ok(&key));
        let _ = key.to_string();
    }
    match &response.resource {
        Some(Resource::Workload(message)) => {
            if let Ok(workload) = message.decode() {
                let again = wire::Workload::encode(&workload, wire::TrustBundle::default());
                assert_eq!(again.decode().as_ref(), Ok::<&Workload, _>(&workload));
            }
            if let (Some(bundle), Ok(domain)) = (&message.trust_bundle, TrustDomain::new("outrigger.local")) {
                let _ = Bundle::from_wire(bundle, &domain).map_err(|error| error.to_string());
            }
        }
        Some(Resource::Destination(message)) => {
            if let Ok(destination) = Destination::try_from(message) {
                let again = wire::Destination::from(&destination);
                assert_eq!(Destination::try_from(&again).as_ref(), Ok(&destination));
            }
        }
        Some(Resource::ServiceAddresses(message)) => {
            if let Ok(addresses) = Vec::try_from(message) {
                let again = wire::ServiceAddresses::from(addresses.as_slice());
                assert_eq!(Vec::try_from(&again).as_ref(), Ok(&addresses));
            }
        }
        Some(Resource::Unregistered(_)) | None => {}
    }
});
