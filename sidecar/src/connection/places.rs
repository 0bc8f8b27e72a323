//! The places of the whole process: how many downstream connections may be open at once, over all workers. Each direction
//! has a share that the other one cannot take, so that strangers who fill the inbound side do not close the application's
//! own way out, and no identity and no source address has all of the inbound share (`holders.rs`). When places are short,
//! inbound connections on which nothing runs make room, over all workers: those of strangers first.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::holders::{Holder, Holders, Idle, first_to_go};
use super::{Direction, Entry, Table};
use crate::outcome::Reason;

/// A bound over all workers.
#[derive(Debug)]
pub struct Places {
    limit: usize,
    /// By direction.
    open: [AtomicUsize; 2],
    /// Of the inbound ones.
    holders: Holders,
    /// Memory is short.
    refused: AtomicBool,
    /// The last connection could not be accepted for want of descriptors or memory.
    starved: AtomicBool,
    tables: Mutex<Vec<Weak<Table>>>,
    /// Tables on which something moves.
    awake: AtomicUsize,
    /// Told when one of them wakes.
    begun: Notify,
}

/// This many connections of each direction are accepted even when memory is short: they are not what uses it, and an
/// allocator that gives nothing back must not close a sidecar for ever.
pub(super) const ALWAYS: usize = 16;

/// One of this many places is kept for the other direction.
const KEPT: usize = 5;

/// One of this many inbound places is kept from whoever has most of them.
const OTHERS: usize = 4;

/// One of this many places is made free at once: looking for the longest idle connection reads every worker's table.
const BATCH: usize = 64;

impl Places {
    pub fn new(limit: usize) -> Arc<Places> {
        Arc::new(Places {
            limit,
            open: Default::default(),
            holders: Holders::default(),
            refused: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            tables: Mutex::default(),
            awake: AtomicUsize::new(0),
            begun: Notify::new(),
        })
    }

    pub fn open(&self) -> usize {
        self.open.iter().map(|open| open.load(Relaxed)).sum()
    }

    /// Waits for `busy`, or while all workers rest for `idle`, at most until one wakes.
    pub async fn pause(&self, busy: Duration, idle: Duration) {
        if self.awake.load(Relaxed) > 0 {
            return tokio::time::sleep(busy).await;
        }
        // Told of an earlier one it looks once more, which harms nobody.
        let _ = tokio::time::timeout(idle, self.begun.notified()).await;
    }

    pub(super) fn rests(&self) {
        self.awake.fetch_sub(1, Relaxed);
    }

    pub(super) fn wakes(&self) {
        self.awake.fetch_add(1, Relaxed);
    }

    pub(super) fn begins(&self) {
        self.begun.notify_one();
    }

    /// Whether connections are refused beyond a few; open ones go on.
    pub fn refuse(&self, refused: bool) {
        self.refused.store(refused, Relaxed);
    }

    /// Every place of a direction is taken: its next connection is refused, unless an idle stranger's makes room.
    pub fn are_taken(&self) -> bool {
        self.open() >= self.limit || self.open.iter().any(|open| open.load(Relaxed) >= self.share())
    }

    /// The places that one direction may have.
    fn share(&self) -> usize {
        self.limit - self.limit / KEPT
    }

    /// The inbound places that one identity, or one source of strangers, may have.
    fn most_of_one(&self) -> usize {
        self.share() - self.share() / OTHERS
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Whether the kernel gives no descriptor, or no memory, for the next connection.
    pub fn is_starved(&self) -> bool {
        self.starved.load(Relaxed)
    }

    pub fn starve(&self, starved: bool) {
        if self.starved.load(Relaxed) != starved {
            self.starved.store(starved, Relaxed);
        }
    }

    pub(super) fn watch(&self, table: &Arc<Table>) {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(table));
    }

    /// Takes a place of `direction`'s share, an inbound one for `holder`; false when there is none, also after idle
    /// connections were closed for it.
    pub(super) fn take(&self, direction: Direction, holder: Option<&Holder>) -> bool {
        if !holder.is_none_or(|holder| self.claim(holder)) {
            return false;
        }
        let taken = self.try_take(direction) || (self.evict(None) && self.try_take(direction));
        if let Some(holder) = holder.filter(|_| !taken) {
            self.holders.leave(holder);
        }
        taken
    }

    /// One more inbound connection is `holder`'s; false when it has too many, and none of them is idle and can go for it.
    pub(super) fn claim(&self, holder: &Holder) -> bool {
        let most = self.most_of_one();
        self.holders.claim(holder, most) || (self.evict(Some(holder)) && self.holders.claim(holder, most))
    }

    /// An inbound connection is not `holder`'s any more.
    pub(super) fn leave(&self, holder: &Holder) {
        self.holders.leave(holder);
    }

    fn try_take(&self, direction: Direction) -> bool {
        let (own, other) = match direction {
            Direction::Inbound => (&self.open[0], &self.open[1]),
            Direction::Outbound => (&self.open[1], &self.open[0]),
        };
        let before = own.fetch_add(1, Relaxed);
        let fits = if self.refused.load(Relaxed) {
            before < ALWAYS.min(self.limit)
        } else {
            before < self.share() && before + other.load(Relaxed) < self.limit
        };
        if !fits {
            own.fetch_sub(1, Relaxed);
        }
        fits
    }

    pub(super) fn give_back(&self, direction: Direction) {
        self.open[direction as usize].fetch_sub(1, Relaxed);
    }

    /// Closes idle inbound connections, of `holder` alone if there is one, and gives their places back at once. True when
    /// there were any.
    fn evict(&self, holder: Option<&Holder>) -> bool {
        // Memory that is short is not helped by closing one connection for another.
        if self.refused.load(Relaxed) {
            return false;
        }
        let tables: Vec<Arc<Table>> = {
            let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
            tables.retain(|table| table.strong_count() > 0);
            tables.iter().filter_map(Weak::upgrade).collect()
        };
        let mut idle: Vec<Idle<Arc<Entry>>> = tables.iter().flat_map(|table| table.idle_inbound()).collect();
        idle.retain(|one| holder.is_none_or(|holder| one.holder == *holder));
        let gone = first_to_go(idle, (self.limit / BATCH).max(1));
        // Two workers may have found the same one.
        gone.iter().filter(|entry| entry.give_place_back(self)).for_each(|entry| entry.close(Reason::Overloaded));
        !gone.is_empty()
    }
}
