//! How many connections with a client certificate are open at once: of one sidecar, by the join token that was redeemed for
//! it, and of one source address, which any number of sidecars may share. A newcomer always gets in: where there are too
//! many, one that carries no Watch and no lease goes for it, the oldest first. So who loses a connection is who hoards
//! them, and never a sidecar that uses its own.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_runtime::places::{Eviction, source_of};
use tokio::sync::Notify;

/// A sidecar has one, and for a while another after each renewal of its certificate and each connection that vanished.
const OF_ONE_SIDECAR: usize = 16;
/// As many sidecars as there are may come from one address, behind a gateway that translates addresses.
const OF_ONE_SOURCE: usize = 4_096;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Holder {
    /// By what was redeemed.
    Sidecar(String),
    Source(IpAddr),
}

#[derive(Debug, Default)]
pub struct Members {
    /// Oldest first.
    open: Mutex<HashMap<Holder, Vec<Arc<Seat>>>>,
}

#[derive(Debug)]
struct Seat {
    holders: [Holder; 2],
    /// Watch and lease streams on the connection.
    streams: AtomicUsize,
    evicted: Arc<Notify>,
}

/// One connection's; dropping it gives the place back.
#[derive(Debug)]
pub struct Member {
    members: Arc<Members>,
    seat: Arc<Seat>,
}

/// A stream on a connection.
pub struct InUse(Arc<Seat>);

impl Members {
    /// One more connection of a sidecar; another one may go for it, see [`Member::eviction`].
    pub fn enter(self: &Arc<Self>, lineage: &str, address: IpAddr) -> Arc<Member> {
        let holders = [Holder::Sidecar(lineage.to_owned()), Holder::Source(source_of(address))];
        let seat = Arc::new(Seat { holders: holders.clone(), streams: AtomicUsize::new(0), evicted: Arc::default() });
        let mut open = self.open();
        for (holder, most) in holders.iter().zip([OF_ONE_SIDECAR, OF_ONE_SOURCE]) {
            let seats = open.get(holder).map_or(&[][..], Vec::as_slice);
            let first = seats.iter().min_by_key(|seat| seat.streams.load(Relaxed) > 0);
            if let Some(first) = first.filter(|_| seats.len() >= most).cloned() {
                leave(&mut open, &first);
                first.evicted.notify_one();
            }
        }
        for holder in holders {
            open.entry(holder).or_default().push(seat.clone());
        }
        drop(open);
        Arc::new(Member { members: self.clone(), seat })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Holder, Vec<Arc<Seat>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn leave(open: &mut HashMap<Holder, Vec<Arc<Seat>>>, seat: &Arc<Seat>) {
    for holder in &seat.holders {
        let Some(seats) = open.get_mut(holder) else { continue };
        seats.retain(|one| !Arc::ptr_eq(one, seat));
        if seats.is_empty() {
            open.remove(holder);
        }
    }
}

impl Member {
    /// Completes when another connection takes the place of this one. One waiter only.
    pub fn eviction(&self) -> Eviction {
        Eviction::by(&self.seat.evicted)
    }

    /// A Watch or a lease begins on it.
    pub fn in_use(&self) -> InUse {
        self.seat.streams.fetch_add(1, Relaxed);
        InUse(self.seat.clone())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        leave(&mut self.members.open(), &self.seat);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    async fn evicted(member: &Member) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, member.eviction()).await.is_ok()
    }

    #[tokio::test]
    async fn the_oldest_that_carries_nothing_goes_and_each_has_its_own_bound() {
        let members = Arc::<Members>::default();
        let other = members.enter("web", address(1));
        let open: Vec<_> = (0..OF_ONE_SIDECAR).map(|_| members.enter("cart", address(1))).collect();
        let used = [0, 2].map(|index| open[index].in_use());
        let mut gone = Vec::new();
        for _ in 0..3 {
            gone.push(members.enter("cart", address(2)));
        }
        for (index, member) in open.iter().enumerate() {
            assert_eq!(evicted(member).await, [1, 3, 4].contains(&index), "{index}");
        }
        // Where all carry something, the oldest goes.
        let all: Vec<_> = open.iter().chain(&gone).map(|member| member.in_use()).collect();
        let last = members.enter("cart", address(1));
        assert!(evicted(&open[0]).await && !evicted(&last).await && !evicted(&other).await);
        drop((used, all, open, gone, last, other));
        assert!(members.open().is_empty(), "an evicted one gives nothing back a second time");
    }

    #[tokio::test]
    async fn a_source_has_a_bound_over_all_its_sidecars() {
        let members = Arc::<Members>::default();
        let first = members.enter("0", address(1));
        let used = members.enter("1", address(1));
        let _stream = used.in_use();
        let elsewhere = members.enter("2", address(2));
        let _rest: Vec<_> = (2..OF_ONE_SOURCE).map(|number| members.enter(&number.to_string(), address(1))).collect();
        assert!(!evicted(&first).await);
        let _last = members.enter("last", address(1));
        assert!(evicted(&first).await && !evicted(&used).await && !evicted(&elsewhere).await);
    }
}
