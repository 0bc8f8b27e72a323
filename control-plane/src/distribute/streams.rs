//! How many streams and subscriptions one sidecar may have: what it costs is bounded by the join token that was redeemed
//! for it, however many connections and instance names it makes.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};

use super::members::InUse;

/// Watch and Lease streams that are open at once for one redemption: a sidecar has two, and for a while two more after
/// each renewal of its certificate and each connection that vanished.
const MAX_STREAMS: usize = 16;

#[derive(Debug, Default)]
pub struct Streams {
    open: Mutex<HashMap<String, Account>>,
}

#[derive(Debug, Default)]
struct Account {
    streams: usize,
    subscriptions: Arc<AtomicUsize>,
}

/// One stream's place; dropping it gives it back.
pub struct Place {
    streams: Arc<Streams>,
    lineage: String,
    /// Keys to which all streams of the redemption are subscribed.
    pub subscriptions: Arc<AtomicUsize>,
    /// The connection that carries the stream.
    pub in_use: Option<InUse>,
}

impl Streams {
    /// None: there are too many already.
    pub fn open(self: &Arc<Self>, lineage: &str) -> Option<Place> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let account = open.entry(lineage.to_owned()).or_default();
        if account.streams >= MAX_STREAMS {
            return None;
        }
        account.streams += 1;
        let subscriptions = account.subscriptions.clone();
        Some(Place { streams: self.clone(), lineage: lineage.to_owned(), subscriptions, in_use: None })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(account) = open.get_mut(&self.lineage) else { return };
        account.streams -= 1;
        if account.streams == 0 {
            open.remove(&self.lineage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_for_each_redemption_and_come_back() {
        let streams = Arc::new(Streams::default());
        let mut places: Vec<Place> = (0..MAX_STREAMS).map(|_| streams.open("one").unwrap()).collect();
        assert!(streams.open("one").is_none());
        let other = streams.open("two").unwrap();
        assert!(!Arc::ptr_eq(&other.subscriptions, &places[0].subscriptions));
        places.pop();
        let again = streams.open("one").unwrap();
        assert!(Arc::ptr_eq(&again.subscriptions, &places[0].subscriptions));
        drop((places, again, other));
        assert!(streams.open.lock().unwrap().is_empty());
    }
}
