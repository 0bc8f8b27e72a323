//! What policies that refuse nothing have to say: Shadow, what would have been refused, and AUDIT, what matched. Counted
//! per policy, caller and shape of the path for metrics and `outrigger policy report`. Written by workers, only when such
//! a policy speaks; bounded whatever callers send.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use outrigger_api::wire;
use prost::Message as _;

/// Callers and shapes of paths that are told apart; what comes beyond counts under `other`.
const MOST: usize = 1_000;
/// Of one report, beside its edges.
const MAX_REPORTED: usize = 40 * 1024;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NoteKind {
    /// A policy in Shadow mode would have refused it.
    WouldDeny,
    /// A limit in Shadow mode is used up.
    WouldLimit,
    /// An AUDIT policy matched.
    Audit,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NoteKey {
    pub kind: NoteKind,
    /// `KIND/NAMESPACE/NAME`
    pub policy: String,
    /// SPIFFE id; empty for a caller that proved none.
    pub principal: String,
    /// `GET /users/{*}`; empty for opaque bytes.
    pub shape: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note {
    pub count: u64,
    /// So many of them the control plane has taken a report of.
    reported: u64,
    pub first: SystemTime,
    pub last: SystemTime,
}

#[derive(Debug, Default)]
pub struct Verdicts(Mutex<BTreeMap<NoteKey, Note>>);

impl Verdicts {
    pub fn note(&self, mut key: NoteKey, now: SystemTime) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() >= MOST && !notes.contains_key(&key) {
            key = NoteKey { principal: OTHER.to_owned(), shape: OTHER.to_owned(), ..key };
        }
        let note = notes.entry(key).or_insert(Note { count: 0, reported: 0, first: now, last: now });
        note.count += 1;
        note.last = now;
    }

    pub fn all(&self) -> Vec<(NoteKey, Note)> {
        let notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().map(|(key, note)| (key.clone(), *note)).collect()
    }

    /// What policies in Shadow mode said and no report that was taken has told, as much as fits.
    pub(super) fn unreported(&self) -> Vec<wire::ShadowNote> {
        let notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = notes.iter().filter(|(key, note)| key.kind == NoteKind::WouldDeny && note.count > note.reported);
        let mut bytes = 0;
        let told = new.map(|(key, note)| wire::ShadowNote {
            policy: key.policy.clone(),
            would: "denied".to_owned(),
            principal: key.principal.clone(),
            shape: key.shape.clone(),
            count: note.count - note.reported,
        });
        told.take_while(|note| {
            bytes += note.encoded_len() + 8;
            bytes <= MAX_REPORTED
        })
        .collect()
    }

    /// The control plane has taken these.
    pub(super) fn reported(&self, told: &[wire::ShadowNote]) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for told in told {
            let key = NoteKey {
                kind: NoteKind::WouldDeny,
                policy: told.policy.clone(),
                principal: told.principal.clone(),
                shape: told.shape.clone(),
            };
            if let Some(note) = notes.get_mut(&key) {
                note.reported = note.count.min(note.reported + told.count);
            }
        }
    }

    /// Counts per policy and caller, for metrics.
    pub(super) fn counts(&self, kind: NoteKind) -> BTreeMap<(String, String), u64> {
        let mut counts = BTreeMap::new();
        for (key, note) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if key.kind == kind {
                *counts.entry((key.policy.clone(), key.principal.clone())).or_default() += note.count;
            }
        }
        counts
    }
}

const OTHER: &str = "other";

/// The shape of a path: segments that look like identifiers become `{*}`, long paths end in `{**}`.
pub fn shape(method: &str, path: &str) -> String {
    const SEGMENTS: usize = 5;
    let mut shape = format!("{method} ");
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/');
    for segment in segments.by_ref().take(SEGMENTS) {
        let digits = segment.bytes().filter(u8::is_ascii_digit).count();
        let plain = segment.len() <= 24
            && (digits == 0 || digits <= 2 && digits < segment.len())
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        shape.push('/');
        shape.push_str(if plain { segment } else { "{*}" });
    }
    if segments.next().is_some() {
        shape.push_str("/{**}");
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let cases = [
            ("/", "GET /"),
            ("/v1/charges", "GET /v1/charges"),
            ("/v1/charges/8371", "GET /v1/charges/{*}"),
            ("/u/3f2504e0-4f89-11d3-9a0c-0305e82c3301/x", "GET /u/{*}/x"),
            ("/a/b/c/d/e/f", "GET /a/b/c/d/e/{**}"),
            ("/a%20b", "GET /{*}"),
        ];
        for (path, expected) in cases {
            assert_eq!(shape("GET", path), expected);
        }
    }

    #[test]
    fn what_no_report_told_is_told_again() {
        let verdicts = Verdicts::default();
        let note = |kind, principal: &str| {
            let (policy, shape) = ("AuthorizationPolicy/a/b".to_owned(), "GET /".to_owned());
            verdicts.note(NoteKey { kind, policy, principal: principal.into(), shape }, SystemTime::UNIX_EPOCH);
        };
        let told = || verdicts.unreported().iter().map(|note| (note.principal.clone(), note.count)).collect::<Vec<_>>();
        note(NoteKind::WouldDeny, "x");
        note(NoteKind::WouldDeny, "x");
        note(NoteKind::Audit, "y");
        assert_eq!(told(), [("x".to_owned(), 2)]);
        // The report was lost.
        note(NoteKind::WouldDeny, "x");
        let lost = verdicts.unreported();
        assert_eq!(told(), [("x".to_owned(), 3)]);
        note(NoteKind::WouldDeny, "z");
        verdicts.reported(&lost);
        assert_eq!(told(), [("z".to_owned(), 1)]);
        for n in 0..MOST {
            note(NoteKind::WouldDeny, &format!("{n}{}", "x".repeat(200)));
        }
        let bytes: usize = verdicts.unreported().iter().map(|note| note.encoded_len()).sum();
        assert!(bytes <= MAX_REPORTED && bytes > MAX_REPORTED / 2, "{bytes}");
    }

    #[test]
    fn what_is_noted_is_bounded() {
        let verdicts = Verdicts::default();
        for n in 0..3 * MOST {
            let key = NoteKey {
                kind: NoteKind::WouldDeny,
                policy: "AuthorizationPolicy/a/b".into(),
                principal: n.to_string(),
                shape: String::new(),
            };
            verdicts.note(key, SystemTime::UNIX_EPOCH);
        }
        let all = verdicts.all();
        assert_eq!(all.len(), MOST + 1);
        assert_eq!(all.iter().map(|(_, note)| note.count).sum::<u64>(), 3 * MOST as u64);
    }
}
