//! A bounded number of places for connections of peers that nobody has authenticated, with a smaller bound for each
//! source address. A newcomer always gets a place: when none is free, the connection that has made no progress for
//! longest loses its own. So idle connections never keep out a client that speaks, however many of them arrive. Used by
//! the admin listeners and by the control plane's gRPC listener. No clock: progress is an order, not a time.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// How many connections have a place at once.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub total: usize,
    /// Of one IPv4 address, or of one /64 of IPv6, which is what one machine can choose from.
    pub per_source: usize,
}

/// All places of one listener. Cloning shares them.
#[derive(Clone)]
pub struct Places(Arc<Shared>);

struct Shared {
    bounds: Bounds,
    /// The number of the next connection, and of the next progress: one counter orders both.
    next: AtomicU64,
    taken: Mutex<HashMap<u64, Arc<Seat>>>,
}

struct Seat {
    source: IpAddr,
    progressed: AtomicU64,
    evicted: Arc<Notify>,
}

/// One connection's place, given back when it is dropped.
pub struct Place {
    places: Arc<Shared>,
    number: u64,
    seat: Arc<Seat>,
}

impl Places {
    pub fn new(bounds: Bounds) -> Places {
        Places(Arc::new(Shared { bounds, next: AtomicU64::new(0), taken: Mutex::default() }))
    }

    /// Takes a place for a connection from `address`. The connection that loses its place is to end at once: see
    /// [`Place::eviction`].
    pub fn take(&self, address: IpAddr) -> Place {
        let number = self.0.tick();
        let source = source_of(address);
        let seat = Arc::new(Seat { source, progressed: AtomicU64::new(number), evicted: Arc::default() });
        let mut taken = self.0.taken();
        let of_source = taken.values().filter(|seat| seat.source == source).count();
        let victim = if of_source >= self.0.bounds.per_source {
            idle_for_longest(&taken, |seat| seat.source == source)
        } else if taken.len() >= self.0.bounds.total {
            idle_for_longest(&taken, |_| true)
        } else {
            None
        };
        if let Some(evicted) = victim.and_then(|number| taken.remove(&number)) {
            evicted.evicted.notify_one();
        }
        taken.insert(number, seat.clone());
        drop(taken);
        Place { places: self.0.clone(), number, seat }
    }

    /// Places that are taken now.
    pub fn taken(&self) -> usize {
        self.0.taken().len()
    }
}

impl Shared {
    fn tick(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<u64, Arc<Seat>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn idle_for_longest(taken: &HashMap<u64, Arc<Seat>>, concerns: impl Fn(&Seat) -> bool) -> Option<u64> {
    let candidates = taken.iter().filter(|(_, seat)| concerns(seat));
    let longest = candidates.min_by_key(|(_, seat)| seat.progressed.load(Ordering::Relaxed));
    longest.map(|(number, _)| *number)
}

/// What counts as one source: an IPv4 address, or a /64 of IPv6.
pub fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        // The loopback address is a network of its own.
        IpAddr::V6(address) if address.is_loopback() => IpAddr::V6(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

impl Place {
    /// The connection did something that an idle or a stalling peer does not do.
    pub fn progress(&self) {
        self.seat.progressed.store(self.places.tick(), Ordering::Relaxed);
    }

    /// Completes when another connection took this place. One waiter only.
    pub fn eviction(&self) -> Eviction {
        Eviction::by(&self.seat.evicted)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().remove(&self.number);
    }
}

/// See [`Place::eviction`].
pub struct Eviction(Pin<Box<OwnedNotified>>);

impl Eviction {
    /// Completes when this is notified, for places of another kind than these.
    pub fn by(evicted: &Arc<Notify>) -> Eviction {
        Eviction(Box::pin(evicted.clone().notified_owned()))
    }
}

impl Future for Eviction {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    async fn evicted(place: &Place) -> bool {
        let waited = tokio::time::timeout(std::time::Duration::ZERO, place.eviction()).await;
        waited.is_ok()
    }

    #[tokio::test]
    async fn the_one_without_progress_for_longest_goes() {
        let places = Places::new(Bounds { total: 3, per_source: 3 });
        let (first, second, third) =
            (places.take(ip("10.0.0.1")), places.take(ip("10.0.0.2")), places.take(ip("10.0.0.3")));
        first.progress();
        let fourth = places.take(ip("10.0.0.4"));
        assert!(evicted(&second).await && !evicted(&first).await && !evicted(&third).await);
        drop(third);
        let fifth = places.take(ip("10.0.0.5"));
        assert!(!evicted(&first).await && !evicted(&fourth).await, "a place was free");
        let _sixth = places.take(ip("10.0.0.6"));
        assert!(evicted(&first).await && !evicted(&fifth).await);
        assert_eq!(places.taken(), 3);
        // One that was evicted gives nothing back a second time.
        drop((first, second));
        assert_eq!(places.taken(), 3);
    }

    #[tokio::test]
    async fn a_source_that_takes_too_many_loses_its_own() {
        let places = Places::new(Bounds { total: 100, per_source: 2 });
        let other = places.take(ip("10.0.0.1"));
        for (one, same) in [
            ("10.0.0.2", "::ffff:10.0.0.2"),
            ("2001:db8::1", "2001:db8::ffff:1"),
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
        ] {
            let (first, second) = (places.take(ip(one)), places.take(ip(same)));
            let third = places.take(ip(one));
            assert!(evicted(&first).await && !evicted(&second).await && !evicted(&third).await, "{one}");
        }
        let (_a, b) = (places.take(ip("2001:db8:0:1::1")), places.take(ip("2001:db8:0:2::1")));
        let _c = places.take(ip("2001:db8:0:1::2"));
        assert!(!evicted(&b).await && !evicted(&other).await);
    }
}
