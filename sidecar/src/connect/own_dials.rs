//! The connections that this sidecar opened last, by both their ends. Redirect rules that do not exempt the sidecar bring
//! them back to its outbound listener, which would carry them on, and round and round; there they are known by this and
//! refused. One table for all workers, of fixed size and without locks: an entry is overwritten by a later one and counts
//! for a moment only, in which no application can have the same two ends.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tokio::net::TcpStream;

const SLOTS: usize = 1024;
/// What comes back comes back at once, or when a listener's queue was read.
const COUNTS_MS: u64 = 5_000;

/// Without a table where nothing is redirected.
#[derive(Clone, Default)]
pub struct OwnDials(Option<Arc<Recent>>);

struct Recent {
    began: Instant,
    hasher: RandomState,
    /// Upper half: what tells connections apart; lower half: milliseconds since `began`, plus one, so that 0 is empty.
    slots: [AtomicU64; SLOTS],
}

impl OwnDials {
    pub fn remembered() -> OwnDials {
        let slots = [const { AtomicU64::new(0) }; SLOTS];
        OwnDials(Some(Arc::new(Recent { began: Instant::now(), hasher: RandomState::new(), slots })))
    }

    pub(super) fn opened(&self, stream: &TcpStream, to: SocketAddr) {
        if let Some(recent) = &self.0
            && let Ok(from) = stream.local_addr()
        {
            recent.enter(from, to, recent.now());
        }
    }

    /// Whether a redirected connection, from this client to that original destination, is one of them.
    pub fn contain(&self, client: SocketAddr, original: SocketAddr) -> bool {
        self.0.as_ref().is_some_and(|recent| recent.has(client, original, recent.now()))
    }
}

impl Recent {
    /// Wraps after 49 days, when an old entry may count once more for a moment.
    fn now(&self) -> u64 {
        (self.began.elapsed().as_millis() as u64 + 1) & u64::from(u32::MAX)
    }

    fn enter(&self, from: SocketAddr, to: SocketAddr, now: u64) {
        let (slot, tag) = self.place(from, to);
        slot.store(tag | now, Relaxed);
    }

    fn has(&self, from: SocketAddr, to: SocketAddr, now: u64) -> bool {
        let (slot, tag) = self.place(from, to);
        let entry = slot.load(Relaxed);
        let (entered, when) = (entry & !u64::from(u32::MAX), entry & u64::from(u32::MAX));
        when != 0 && entered == tag && now.saturating_sub(when) < COUNTS_MS
    }

    fn place(&self, from: SocketAddr, to: SocketAddr) -> (&AtomicU64, u64) {
        let end = |address: SocketAddr| -> (IpAddr, u16) { (address.ip().to_canonical(), address.port()) };
        let hash = self.hasher.hash_one((end(from), end(to)));
        (&self.slots[hash as usize % SLOTS], hash & !u64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_have_to_be_the_same_and_for_a_moment_only() {
        let OwnDials(Some(recent)) = OwnDials::remembered() else { panic!("it is remembered") };
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (from, to) = (address("10.77.0.2:40000"), address("10.77.0.3:8080"));
        assert!(!recent.has(from, to, 1));
        recent.enter(from, to, 7);
        for (client, original, now, is) in [
            (from, to, 7, true),
            (address("[::ffff:10.77.0.2]:40000"), to, 7 + COUNTS_MS - 1, true),
            (from, to, 7 + COUNTS_MS, false),
            (address("10.77.0.2:40001"), to, 7, false),
            (from, address("10.77.0.3:8081"), 7, false),
            (to, from, 7, false),
        ] {
            assert_eq!(recent.has(client, original, now), is, "{client} {original} {now}");
        }
        assert!(!OwnDials::default().contain(from, to));
    }
}
