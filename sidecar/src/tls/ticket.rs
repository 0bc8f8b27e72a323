//! Session tickets of the server side: the session itself, sealed, so that no memory is held per client and all
//! workers resume each other's sessions. One key per [`super::Material`]: it dies with the leaf or the bundle.

use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use rustls::server::ProducesTickets;

use super::clock::{Clock, unix_seconds};

const NONCE: usize = 12;
const ISSUED: usize = 8;
/// More than a session with the longest chain that a handshake takes.
const MAX_TICKET: usize = 32 * 1024;

/// `issued (8 bytes, seconds) | nonce | sealed session and tag`; the issue time and the bundle's generation are
/// authenticated with it.
pub(super) struct Ticketer {
    key: RandomizedNonceKey,
    generation: u64,
    life: Duration,
    clock: Clock,
}

impl Ticketer {
    /// None when the system has no randomness to give: then nothing is resumed and all else works.
    pub(super) fn new(generation: u64, life: Duration, clock: Clock) -> Option<Ticketer> {
        let mut key = [0; 32];
        aws_lc_rs::rand::fill(&mut key).ok()?;
        let key = RandomizedNonceKey::new(&AES_256_GCM, &key).ok()?;
        Some(Ticketer { key, generation, life, clock })
    }

    fn associated(&self, issued: [u8; ISSUED]) -> Aad<[u8; 16]> {
        let mut associated = [0; 16];
        let (head, tail) = associated.split_at_mut(ISSUED);
        head.copy_from_slice(&issued);
        tail.copy_from_slice(&self.generation.to_be_bytes());
        Aad::from(associated)
    }
}

impl ProducesTickets for Ticketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.life.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let issued = unix_seconds(self.clock.now()).to_be_bytes();
        let mut sealed = plain.to_vec();
        let nonce = self.key.seal_in_place_append_tag(self.associated(issued), &mut sealed).ok()?;
        Some([&issued, nonce.as_ref().as_slice(), &sealed].concat())
    }

    /// rustls leaves the age of a ticket to us.
    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > MAX_TICKET {
            return None;
        }
        let (issued, rest) = ticket.split_first_chunk::<ISSUED>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE>()?;
        let age = unix_seconds(self.clock.now()).checked_sub(u64::from_be_bytes(*issued))?;
        if age > self.life.as_secs() {
            return None;
        }
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.key.open_in_place(nonce, self.associated(*issued), &mut sealed).ok()?.len();
        sealed.truncate(plain);
        Some(sealed)
    }
}

impl std::fmt::Debug for Ticketer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticketer").field("life", &self.life).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::SystemTime;

    fn ticketer(generation: u64, now: &Arc<AtomicU64>) -> Ticketer {
        let now = Arc::clone(now);
        let clock = Clock::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(now.load(Ordering::Relaxed)));
        Ticketer::new(generation, Duration::from_secs(60), clock).unwrap()
    }

    #[test]
    fn opens_its_own_tickets_while_they_live() {
        let now = Arc::new(AtomicU64::new(1_000));
        let ticketer = ticketer(1, &now);
        let ticket = ticketer.encrypt(b"session").unwrap();
        assert_eq!(ticketer.decrypt(&ticket).as_deref(), Some(b"session".as_slice()));
        now.store(1_060, Ordering::Relaxed);
        assert!(ticketer.decrypt(&ticket).is_some());
        now.store(1_061, Ordering::Relaxed);
        assert!(ticketer.decrypt(&ticket).is_none(), "too old");
        now.store(999, Ordering::Relaxed);
        assert!(ticketer.decrypt(&ticket).is_none(), "from the future");
    }

    #[test]
    fn refuses_what_it_did_not_seal() {
        let now = Arc::new(AtomicU64::new(1_000));
        let (ours, other) = (ticketer(1, &now), ticketer(1, &now));
        let ticket = ours.encrypt(b"session").unwrap();
        assert!(other.decrypt(&ticket).is_none(), "another key");
        for end in 0..ticket.len() {
            assert!(ours.decrypt(&ticket[..end]).is_none(), "cut at {end}");
        }
        for at in 0..ticket.len() {
            let mut forged = ticket.clone();
            forged[at] ^= 1;
            assert!(ours.decrypt(&forged).is_none(), "changed at {at}");
        }
        assert!(ours.decrypt(&vec![0; MAX_TICKET + 1]).is_none());
    }
}
