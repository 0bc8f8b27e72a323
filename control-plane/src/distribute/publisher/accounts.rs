//! How many streams and subscriptions the instances of one service account have together, and no more than that.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;

use crate::registry::InstanceId;

/// Of one service account: far more replicas than one has, and what they know together. 60 MiB.
pub(super) const MAX_ACCOUNT_STREAMS: usize = 2_000;
pub(super) const MAX_ACCOUNT_SUBSCRIPTIONS: usize = 65_536;

/// What one service account may not have more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccountLimit {
    #[error("more than {MAX_ACCOUNT_STREAMS} streams of one service account")]
    Streams,
    #[error("more than {MAX_ACCOUNT_SUBSCRIPTIONS} subscriptions of one service account")]
    Subscriptions,
}

/// By namespace and service account.
#[derive(Default)]
pub(super) struct Accounts(HashMap<(String, String), Held>);

/// What the instances of one service account hold.
#[derive(Default)]
struct Held {
    streams: usize,
    subscriptions: usize,
}

impl Accounts {
    pub(super) fn take_stream(&mut self, id: &InstanceId) -> Result<(), AccountLimit> {
        let held = self.0.entry(account_of(id)).or_default();
        if held.streams >= MAX_ACCOUNT_STREAMS {
            return Err(AccountLimit::Streams);
        }
        held.streams += 1;
        Ok(())
    }

    pub(super) fn take_subscription(&mut self, id: &InstanceId) -> Result<(), AccountLimit> {
        let held = self.0.entry(account_of(id)).or_default();
        if held.subscriptions >= MAX_ACCOUNT_SUBSCRIPTIONS {
            return Err(AccountLimit::Subscriptions);
        }
        held.subscriptions += 1;
        Ok(())
    }

    /// Gives back what was taken.
    pub(super) fn give_back(&mut self, id: &InstanceId, streams: usize, subscriptions: usize) {
        let MapEntry::Occupied(mut entry) = self.0.entry(account_of(id)) else { return };
        let held = entry.get_mut();
        held.streams = held.streams.saturating_sub(streams);
        held.subscriptions = held.subscriptions.saturating_sub(subscriptions);
        if held.streams == 0 && held.subscriptions == 0 {
            entry.remove();
        }
    }

    /// Nobody holds anything.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn account_of(id: &InstanceId) -> (String, String) {
    (id.namespace.clone(), id.service_account.clone())
}
