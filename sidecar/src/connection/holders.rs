//! Who holds how many of the inbound places. One identity, however many replicas prove it, and one source of peers that
//! prove nothing, may each have three quarters of them: with fewer left for everybody else, one stolen certificate or one
//! address would keep all others out. Called when a connection is accepted, when it proves an identity, and when it ends;
//! never while requests flow.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use outrigger_api::identity::SpiffeId;
use outrigger_runtime::places::source_of;

/// Whose an inbound connection is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Holder {
    /// It proved to be this one.
    Principal(SpiffeId),
    /// It has proved nothing: an IPv4 address, or a /64 of IPv6.
    Source(IpAddr),
}

impl Holder {
    pub(super) fn source(client: IpAddr) -> Holder {
        Holder::Source(source_of(client))
    }

    pub(super) fn is_stranger(&self) -> bool {
        match self {
            Holder::Source(_) => true,
            Holder::Principal(_) => false,
        }
    }
}

/// Inbound connections by holder.
#[derive(Debug, Default)]
pub(super) struct Holders(Mutex<HashMap<Holder, usize>>);

impl Holders {
    fn held(&self) -> MutexGuard<'_, HashMap<Holder, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more for `holder`; false when it has `most` already.
    pub(super) fn claim(&self, holder: &Holder, most: usize) -> bool {
        let mut held = self.held();
        match held.get_mut(holder) {
            Some(count) if *count >= most => return false,
            Some(count) => *count += 1,
            None => drop(held.insert(holder.clone(), 1)),
        }
        true
    }

    /// One less.
    pub(super) fn leave(&self, holder: &Holder) {
        let mut held = self.held();
        let Some(count) = held.get_mut(holder) else { return };
        *count -= 1;
        if *count == 0 {
            held.remove(holder);
        }
    }
}

/// An inbound connection on which nothing runs.
pub(super) struct Idle<T> {
    pub(super) holder: Holder,
    /// Since when: the least is the longest idle.
    pub(super) since: (u64, std::time::SystemTime),
    pub(super) connection: T,
}

/// The `count` connections that make room: strangers' before those of anybody who proved an identity, of these the
/// holders' with the most idle ones, and of each holder the longest idle. So the old and rare connections of many do not
/// go for the new and many of one.
pub(super) fn first_to_go<T>(mut idle: Vec<Idle<T>>, count: usize) -> Vec<T> {
    idle.sort_by_key(|one| one.since);
    let mut left: HashMap<Holder, usize> = HashMap::new();
    for one in &idle {
        *left.entry(one.holder.clone()).or_default() += 1;
    }
    // Each with how many its holder would have without those that are idle for longer.
    let mut ranked: Vec<_> = idle
        .into_iter()
        .map(|one| {
            let left = left.entry(one.holder.clone()).or_default();
            let rank = (one.holder.is_stranger(), *left);
            *left -= 1;
            (rank, one.connection)
        })
        .collect();
    // Equals stay in the order of time.
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    ranked.into_iter().take(count).map(|(_, connection)| connection).collect()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn holder(name: &str) -> Holder {
        match name.parse() {
            Ok(address) => Holder::source(address),
            Err(_) => {
                Holder::Principal(SpiffeId::parse(&format!("spiffe://outrigger.local/ns/shop/sa/{name}")).unwrap())
            }
        }
    }

    #[test]
    fn who_has_most_gives_its_longest_idle_and_strangers_give_first() {
        // Who holds the idle connections, longest idle first, and which of these go, in this order.
        let cases: [(&[&str], &[usize]); 7] = [
            (&[], &[]),
            (&["cart", "10.0.0.1"], &[1, 0]),
            (&["10.0.0.1", "10.0.0.2"], &[0, 1]),
            (&["10.0.0.1", "10.0.0.2", "10.0.0.2"], &[1, 0, 2]),
            (&["cart", "web", "web", "cart", "web"], &[1, 0, 2, 3]),
            (&["cart", "cart", "cart", "10.0.0.1", "10.0.0.1"], &[3, 4, 0, 1]),
            (&["2001:db8::1", "10.0.0.1", "2001:db8::2"], &[0, 1, 2]),
        ];
        for (idle, expected) in cases {
            let idle = idle.iter().enumerate().map(|(index, name)| Idle {
                holder: holder(name),
                since: (index as u64, SystemTime::UNIX_EPOCH),
                connection: index,
            });
            assert_eq!(first_to_go(idle.collect(), expected.len()), expected);
        }
    }

    #[test]
    fn what_is_held_is_given_back() {
        let holders = Holders::default();
        let (cart, web) = (holder("cart"), holder("web"));
        assert!(holders.claim(&cart, 2) && holders.claim(&cart, 2) && !holders.claim(&cart, 2));
        assert!(holders.claim(&web, 2));
        holders.leave(&cart);
        assert!(holders.claim(&cart, 2));
        for one in [&cart, &cart, &web, &web] {
            holders.leave(one);
        }
        assert!(holders.held().is_empty());
    }
}
