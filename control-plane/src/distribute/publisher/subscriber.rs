//! One sidecar's stream as the publisher sees it: what it subscribed to, what it has yet to be sent, and what it said
//! about what it got. A slow sidecar costs one mark per topic, however often the topic changes meanwhile.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use outrigger_api::peer_text::PeerText;
use tokio::sync::Notify;

use super::Topic;
use crate::registry::{Holder, InstanceId};

pub struct Subscriber {
    pub(super) number: u64,
    pub id: InstanceId,
    pub(super) holder: Holder,
    /// Keys to which all streams of its redemption are subscribed.
    subscribed: Arc<AtomicUsize>,
    connected: SystemTime,
    not_after: SystemTime,
    version: String,
    state: Mutex<State>,
    /// There is something to send.
    pub wake: Notify,
    /// A newer stream of the same sidecar took the place of this one.
    pub replaced: Notify,
}

#[derive(Default)]
struct State {
    topics: HashSet<Topic>,
    waiting: VecDeque<Topic>,
    marked: HashSet<Topic>,
    acknowledged: HashMap<Topic, u64>,
    refusals: BTreeMap<String, Refusal>,
}

/// An update that a sidecar did not take; it goes on with what it had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub version: u64,
    pub reason: String,
}

/// What `outrigger status` shows of a sidecar.
#[derive(Clone, Debug)]
pub struct SidecarStatus {
    pub(super) number: u64,
    pub id: InstanceId,
    pub version: String,
    pub connected: SystemTime,
    /// End of the certificate with which it connected.
    pub not_after: SystemTime,
    pub subscriptions: usize,
    /// Topics of which the newest version is not acknowledged yet.
    pub unacknowledged: usize,
    /// By key, as text.
    pub refusals: BTreeMap<String, Refusal>,
}

impl Subscriber {
    pub fn new(
        number: u64,
        id: InstanceId,
        holder: Holder,
        subscribed: Arc<AtomicUsize>,
        version: String,
        connected: SystemTime,
        not_after: SystemTime,
    ) -> Self {
        let (state, wake, replaced) = (Mutex::default(), Notify::new(), Notify::new());
        Subscriber { number, id, holder, subscribed, connected, not_after, version, state, wake, replaced }
    }

    /// The next topic to send.
    pub fn take(&self) -> Option<Topic> {
        let mut state = self.state();
        let topic = state.waiting.pop_front()?;
        state.marked.remove(&topic);
        Some(topic)
    }

    pub fn has_waiting(&self) -> bool {
        !self.state().waiting.is_empty()
    }

    /// Keys to which this stream and the others of its redemption are subscribed.
    pub fn subscribed(&self) -> usize {
        self.subscribed.load(Ordering::Relaxed)
    }

    /// Notes what the sidecar said to a version; true when it is a refusal that was not known.
    pub fn answered(&self, topic: &Topic, key: String, version: u64, refusal: &str) -> bool {
        let mut state = self.state();
        if !state.topics.contains(topic) {
            return false;
        }
        state.acknowledged.insert(topic.clone(), version);
        if refusal.is_empty() {
            state.refusals.remove(&key);
            return false;
        }
        let refusal = Refusal { version, reason: PeerText(refusal).to_string() };
        state.refusals.insert(key, refusal.clone()) != Some(refusal)
    }

    pub(super) fn mark(&self, topic: &Topic) {
        let mut state = self.state();
        if state.marked.insert(topic.clone()) {
            state.waiting.push_back(topic.clone());
        }
        drop(state);
        self.wake.notify_one();
    }

    pub(super) fn joined(&self, topic: &Topic) {
        if self.state().topics.insert(topic.clone()) {
            self.subscribed.fetch_add(1, Ordering::Relaxed);
        }
        self.mark(topic);
    }

    pub(super) fn has(&self, topic: &Topic) -> bool {
        self.state().topics.contains(topic)
    }

    /// False when it was not subscribed.
    pub(super) fn left(&self, topic: &Topic) -> bool {
        let mut state = self.state();
        let subscribed = state.topics.remove(topic);
        if subscribed {
            self.subscribed.fetch_sub(1, Ordering::Relaxed);
        }
        state.acknowledged.remove(topic);
        if state.marked.remove(topic) {
            state.waiting.retain(|waiting| waiting != topic);
        }
        subscribed
    }

    /// Leaves everything, and says what that was.
    pub(super) fn leave_all(&self) -> Vec<Topic> {
        let State { topics, .. } = std::mem::take(&mut *self.state());
        self.subscribed.fetch_sub(topics.len(), Ordering::Relaxed);
        topics.into_iter().collect()
    }

    pub(super) fn status(&self) -> SidecarStatus {
        let state = self.state();
        SidecarStatus {
            number: self.number,
            id: self.id.clone(),
            version: self.version.clone(),
            connected: self.connected,
            not_after: self.not_after,
            subscriptions: state.topics.len(),
            unacknowledged: state.topics.iter().filter(|topic| !state.acknowledged.contains_key(topic)).count(),
            refusals: state.refusals.clone(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
