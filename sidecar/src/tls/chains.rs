//! The certificate chains of peers whose connections are open, each kept once however many connections its peer has: they
//! are verified again when the roots change.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustls_pki_types::CertificateDer;

type Chain = [CertificateDer<'static>];

/// Chains by a hash of them; an entry whose connections have all ended is dead.
#[derive(Default)]
pub(super) struct Chains {
    known: Mutex<Known>,
    hasher: RandomState,
}

#[derive(Default)]
struct Known {
    chains: HashMap<u64, Weak<Chain>>,
    /// Dead entries are looked for when there are so many.
    clean_at: usize,
}

impl Chains {
    /// The chain as the connections of this peer share it.
    pub(super) fn share(&self, chain: &Chain) -> Arc<Chain> {
        let key = self.hasher.hash_one(chain);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = known.chains.get(&key).and_then(Weak::upgrade).filter(|shared| **shared == *chain) {
            return shared;
        }
        if known.chains.len() >= known.clean_at {
            known.chains.retain(|_, chain| chain.strong_count() > 0);
            known.clean_at = (2 * known.chains.len()).max(16);
        }
        let shared: Arc<Chain> = chain.into();
        known.chains.insert(key, Arc::downgrade(&shared));
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(number: usize) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(number.to_be_bytes().to_vec())]
    }

    #[test]
    fn one_peer_has_one_chain_and_ended_ones_are_forgotten() {
        let chains = Chains::default();
        let first = chains.share(&chain(0));
        assert!(Arc::ptr_eq(&first, &chains.share(&chain(0))));
        assert!(!Arc::ptr_eq(&first, &chains.share(&chain(1))));
        (0..10_000).for_each(|number| drop(chains.share(&chain(number))));
        assert!(chains.known.lock().unwrap().chains.len() <= 32);
        assert!(Arc::ptr_eq(&first, &chains.share(&chain(0))));
    }
}
