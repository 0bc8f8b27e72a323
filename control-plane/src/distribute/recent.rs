//! What went wrong or went away within the last hour, for `outrigger status`: each thing once, with how often and when.
//! Bounded, because strangers cause some of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

const KEPT: Duration = Duration::from_secs(60 * 60);
/// Of each kind; the one that is longest ago goes.
const MAX_EVENTS: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// Somebody asked for a certificate and got none.
    JoinRefused,
    /// An instance is not registered: its name is another's, for example.
    RegistrationRefused,
    /// The Watch stream of a sidecar ended and it has not come back.
    SidecarGone,
}

/// How often, and when for the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    pub count: u64,
    pub last: SystemTime,
}

#[derive(Default)]
pub struct Recent {
    events: Mutex<BTreeMap<(Event, String), Noted>>,
}

impl Recent {
    pub fn note(&self, event: Event, what: String, now: SystemTime) {
        let mut events = self.events();
        let of_kind = |events: &BTreeMap<(Event, String), Noted>| {
            events
                .iter()
                .filter(|((kind, _), _)| *kind == event)
                .map(|(key, noted)| (key.clone(), noted.last))
                .collect::<Vec<_>>()
        };
        let key = (event, what);
        if !events.contains_key(&key) {
            let all = of_kind(&events);
            if all.len() >= MAX_EVENTS
                && let Some((oldest, _)) = all.into_iter().min_by_key(|(_, last)| *last)
            {
                events.remove(&oldest);
            }
        }
        let noted = events.entry(key).or_insert(Noted { count: 0, last: now });
        noted.count += 1;
        noted.last = now;
    }

    /// It is well again.
    pub fn forget(&self, event: Event, what: &str) {
        self.events().remove(&(event, what.to_owned()));
    }

    /// The last first.
    pub fn all(&self, event: Event, now: SystemTime) -> Vec<(String, Noted)> {
        let mut events = self.events();
        events.retain(|_, noted| now.duration_since(noted.last).unwrap_or_default() <= KEPT);
        let of_kind = events.iter().filter(|((kind, _), _)| *kind == event);
        let mut all: Vec<(String, Noted)> = of_kind.map(|((_, what), noted)| (what.clone(), *noted)).collect();
        all.sort_by_key(|(_, noted)| std::cmp::Reverse(noted.last));
        all
    }

    fn events(&self) -> MutexGuard<'_, BTreeMap<(Event, String), Noted>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn an_hour_is_remembered_and_not_more_than_so_many() {
        let recent = Recent::default();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        recent.note(Event::SidecarGone, "web-1.shop".into(), at(0));
        recent.note(Event::SidecarGone, "web-1.shop".into(), at(100));
        recent.note(Event::SidecarGone, "web-2.shop".into(), at(200));
        let names = |now| -> Vec<String> {
            recent
                .all(Event::SidecarGone, now)
                .into_iter()
                .map(|(what, noted)| format!("{what} {}", noted.count))
                .collect()
        };
        assert_eq!(names(at(200)), ["web-2.shop 1", "web-1.shop 2"]);
        recent.forget(Event::SidecarGone, "web-2.shop");
        assert_eq!(names(at(3_700)), ["web-1.shop 2"]);
        assert!(names(at(3_701)).is_empty());
        for number in 0..10_000 {
            recent.note(Event::JoinRefused, format!("{number}"), at(number));
        }
        assert_eq!(recent.all(Event::JoinRefused, at(10_000)).len(), MAX_EVENTS);
    }
}
