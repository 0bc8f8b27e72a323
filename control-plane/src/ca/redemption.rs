//! Which tokens were redeemed, with which key, and what they granted. A redemption is on disk before a certificate is
//! issued for it; when the disk refuses, so do we. The same key that asks again gets its answer again (its reply was
//! lost); anybody else who comes with a spent token is a replay.
//!
//! A grant belongs to the key that redeemed the token, and never to a name: another holder of the name has another key.
//! A renewal hands the grant on to the key of the new certificate. The records are also what the control plane knows of
//! the certificates that it issued, which a renewal after the certificate's end asks for.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

use ipnet::IpNet;
use outrigger_api::resource::{LONGEST_RENEW_GRACE_SECONDS, Labels};
use serde::{Deserialize, Serialize};

use super::certificate::unix_seconds;
use super::csr::RequestedKey;
use super::token::Claims;
use crate::config::{Journal, JournalError, State};

const FILE: &str = "redemptions.jsonl";
/// Spent tokens are remembered this long past their end, so that a clock that is set back revives none.
const MEMORY_SECONDS: u64 = 7 * 24 * 60 * 60;
/// How often, in records, to see whether most lines of the file are of no use.
const COMPACT_FROM: usize = 1_000;

#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    #[error("the join token was redeemed already, {uses} of {uses} times; make another with `outrigger token create`")]
    Replayed { uses: u32 },
    #[error("the redemption could not be made durable, so nothing was issued: {0}")]
    State(#[from] JournalError),
}

impl RedeemError {
    pub fn word(&self) -> &'static str {
        match self {
            RedeemError::Replayed { .. } => "token_replayed",
            RedeemError::State(_) => "state_write",
        }
    }
}

/// What the holder of a token may register besides itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    pub labels: Labels,
    /// Besides the address from which it connects.
    pub addresses: Vec<IpNet>,
}

/// A key and the identity for which it has a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// [`super::key_fingerprint`]
    pub key: String,
    pub namespace: String,
    pub service_account: String,
}

/// What is on record of a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    pub grant: Grant,
    /// The redemption from which its certificates come, the same over all renewals.
    pub lineage: String,
}

/// One line of the file: a redemption, or with `from` a renewal.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    #[serde(rename = "jti")]
    token: String,
    /// End of the token, Unix seconds.
    #[serde(rename = "exp")]
    expiry: u64,
    #[serde(rename = "ns")]
    namespace: String,
    #[serde(rename = "sa")]
    service_account: String,
    workload: String,
    /// Fingerprint of the public key.
    key: String,
    labels: Labels,
    #[serde(rename = "addr", default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<IpNet>,
    /// The latest end that the certificate can have, Unix seconds; 0: not known.
    #[serde(default)]
    end: u64,
    /// The key with which the token was redeemed; absent when it is this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first: Option<String>,
    /// The key whose certificate was renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<String>,
}

impl Record {
    fn subject(&self) -> Subject {
        self.subject_with(&self.key)
    }

    fn subject_with(&self, key: &str) -> Subject {
        let (namespace, service_account) = (self.namespace.clone(), self.service_account.clone());
        Subject { key: key.to_owned(), namespace, service_account }
    }

    fn predecessor(&self) -> Option<Subject> {
        let from = self.from.as_deref().filter(|from| *from != self.key)?;
        Some(self.subject_with(from))
    }

    fn lineage(&self) -> String {
        format!("{}.{}", self.token, self.first.as_ref().unwrap_or(&self.key))
    }
}

/// Every record that still matters.
#[derive(Debug)]
pub struct Redemptions {
    /// One record at a time, from its check to the disk.
    journal: Mutex<Journal<Record>>,
    /// Apart, so that a slow disk delays redemptions and nobody who only reads a grant.
    index: RwLock<Index>,
}

impl Redemptions {
    pub fn open(state: &State) -> Result<Redemptions, JournalError> {
        let (journal, all) = Journal::open(state, FILE)?;
        Ok(Redemptions { journal: Mutex::new(journal), index: RwLock::new(Index::of(all)) })
    }

    /// Spends one use of a verified token on a workload and its key; durable when it returns. Waits for the disk. `end`:
    /// the latest end of the certificate that is issued for it.
    pub fn redeem(
        &self,
        claims: &Claims,
        workload: &str,
        key: &RequestedKey,
        end: SystemTime,
        now: SystemTime,
    ) -> Result<(), RedeemError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key.fingerprint();
        match self.read().look(claims, workload, &key) {
            Spent::Repeated => return Ok(()),
            Spent::Replayed => return Err(RedeemError::Replayed { uses: claims.uses }),
            Spent::No => {}
        }
        let record = Record {
            token: claims.id.clone(),
            expiry: claims.expiry,
            namespace: claims.namespace.clone(),
            service_account: claims.service_account.clone(),
            workload: workload.to_owned(),
            key,
            labels: claims.labels.clone(),
            addresses: claims.addresses.clone(),
            end: unix_seconds(end),
            first: None,
            from: None,
        };
        self.append(&mut journal, record, now)?;
        Ok(())
    }

    /// Hands on what a subject was granted to the key of its next certificate; durable when it returns. A subject of which
    /// nothing is on record has nothing to hand on.
    pub fn renew(
        &self,
        from: &Subject,
        key: &RequestedKey,
        end: SystemTime,
        now: SystemTime,
    ) -> Result<(), JournalError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut record) = self.read().record(from).cloned() else { return Ok(()) };
        record.first.get_or_insert_with(|| from.key.clone());
        record.key = key.fingerprint();
        record.from = Some(from.key.clone());
        record.end = unix_seconds(end);
        self.append(&mut journal, record, now)?;
        // Whoever renews has what it renews from: its own predecessor is done with.
        self.saw(from);
        Ok(())
    }

    /// What is on record of a subject; None when it never redeemed a token here.
    pub fn certified(&self, subject: &Subject) -> Option<Certified> {
        let index = self.read();
        let record = index.record(subject)?;
        let grant = Grant { labels: record.labels.clone(), addresses: record.addresses.clone() };
        Some(Certified { grant, lineage: record.lineage() })
    }

    /// The subject has shown itself with its certificate, so that no answer with it was lost.
    pub fn saw(&self, subject: &Subject) {
        let known = {
            let index = self.read();
            index.seen.contains(subject) || index.record(subject).is_none()
        };
        if !known {
            self.write().seen.insert(subject.clone());
        }
    }

    /// A later certificate took the place of the subject's, and was used: an old copy of this key proves nothing.
    pub fn is_superseded(&self, subject: &Subject) -> bool {
        self.read().is_superseded(subject)
    }

    fn append(&self, journal: &mut Journal<Record>, record: Record, now: SystemTime) -> Result<(), JournalError> {
        journal.append(&record)?;
        let count = self.write().add(record);
        // Counting what is useless costs a look at each, so not at each record.
        if count.is_multiple_of(COMPACT_FROM) {
            self.compact(journal, unix_seconds(now));
        }
        Ok(())
    }

    fn compact(&self, journal: &mut Journal<Record>, now: u64) {
        let Some(kept) = self.read().without_the_useless(now) else { return };
        // A failure leaves a longer file than needed, and nothing else.
        match journal.rewrite(kept.iter()) {
            Ok(()) => {
                let mut index = self.write();
                let seen = std::mem::take(&mut index.seen);
                *index = Index::of(kept);
                index.seen = seen.into_iter().filter(|subject| index.record(subject).is_some()).collect();
            }
            Err(error) => tracing::warn!("cannot shorten {FILE}: {error}"),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a token was spent, from the point of view of who brings it now.
enum Spent {
    No,
    /// The same key and workload had it: its reply was lost.
    Repeated,
    Replayed,
}

#[derive(Debug, Default)]
struct Index {
    /// Oldest first.
    all: Vec<Record>,
    /// Redemptions alone.
    by_token: HashMap<String, Vec<usize>>,
    /// The last record of each.
    by_subject: HashMap<Subject, usize>,
    /// Whose renewals went to which keys.
    successors: HashMap<Subject, Vec<Subject>>,
    /// Subjects that showed themselves since the start.
    seen: HashSet<Subject>,
}

impl Index {
    fn of(all: Vec<Record>) -> Index {
        let mut index = Index::default();
        for record in all {
            index.add(record);
        }
        index
    }

    /// Returns how many there are now.
    fn add(&mut self, record: Record) -> usize {
        let position = self.all.len();
        match record.predecessor() {
            Some(from) => self.successors.entry(from).or_default().push(record.subject()),
            None if record.from.is_none() => self.by_token.entry(record.token.clone()).or_default().push(position),
            None => {}
        }
        self.by_subject.insert(record.subject(), position);
        self.all.push(record);
        self.all.len()
    }

    fn record(&self, subject: &Subject) -> Option<&Record> {
        self.by_subject.get(subject).map(|position| &self.all[*position])
    }

    fn is_superseded(&self, subject: &Subject) -> bool {
        let used = |successor: &Subject| self.seen.contains(successor) || self.successors.contains_key(successor);
        self.successors.get(subject).is_some_and(|successors| successors.iter().any(used))
    }

    fn look(&self, claims: &Claims, workload: &str, key: &str) -> Spent {
        let spent = self.by_token.get(&claims.id).map_or(&[][..], Vec::as_slice);
        let same_key = spent.iter().map(|position| &self.all[*position]).find(|record| record.key == key);
        match same_key {
            Some(record) if record.workload == workload => Spent::Repeated,
            Some(_) => Spent::Replayed,
            None if spent.len() >= claims.uses as usize => Spent::Replayed,
            None => Spent::No,
        }
    }

    /// What is to be kept, when leaving out the rest is worth a rewrite: tokens that could still be replayed, and subjects
    /// whose certificate is valid or may still be renewed.
    fn without_the_useless(&self, now: u64) -> Option<Vec<Record>> {
        let useful = |(position, record): &(usize, &Record)| {
            let replayable = record.from.is_none() && record.expiry.saturating_add(MEMORY_SECONDS) > now;
            let subject = record.subject();
            let grace = if self.is_superseded(&subject) { 0 } else { LONGEST_RENEW_GRACE_SECONDS };
            let current = self.by_subject.get(&subject) == Some(position);
            replayable || (current && (record.end == 0 || record.end.saturating_add(grace) > now))
        };
        let kept: Vec<Record> = self.all.iter().enumerate().filter(useful).map(|(_, record)| record.clone()).collect();
        (self.all.len() - kept.len() >= kept.len().max(COMPACT_FROM / 2)).then_some(kept)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use outrigger_api::identity::SpiffeId;
    use rcgen::{CertificateParams, DistinguishedName, KeyPair};

    use super::*;
    use crate::ca::csr;

    const NOW: SystemTime = UNIX_EPOCH;
    const DAY: Duration = Duration::from_secs(86_400);

    fn key() -> RequestedKey {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let der = params.serialize_request(&key).unwrap();
        csr::check(der.der(), &SpiffeId::parse("spiffe://td/ns/shop/sa/cart").unwrap()).unwrap()
    }

    fn subject(key: &RequestedKey) -> Subject {
        Subject { key: key.fingerprint(), namespace: "shop".into(), service_account: "cart".into() }
    }

    fn claims(id: &str, uses: u32) -> Claims {
        Claims {
            audience: "outrigger".into(),
            trust_domain: None,
            namespace: "shop".into(),
            service_account: "cart".into(),
            labels: Labels::from([("token".to_owned(), id.to_owned())]),
            addresses: vec!["10.0.0.0/24".parse().unwrap()],
            uses,
            expiry: 3600,
            id: id.into(),
        }
    }

    fn word(result: Result<(), RedeemError>) -> &'static str {
        result.map_or_else(|error| error.word(), |()| "issued")
    }

    fn label(redemptions: &Redemptions, key: &RequestedKey) -> Option<String> {
        redemptions.certified(&subject(key)).and_then(|known| known.grant.labels.get("token").cloned())
    }

    #[test]
    fn a_token_is_for_one_workload_and_one_key() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (one, other, third) = (key(), key(), key());
        let (single, double) = (claims("single", 1), claims("double", 2));
        type Step<'a> = (&'a str, &'a Claims, &'a str, &'a RequestedKey, &'a str);
        let steps: [Step<'_>; 10] = [
            ("first", &single, "cart-1", &one, "issued"),
            ("the reply was lost", &single, "cart-1", &one, "issued"),
            ("another key", &single, "cart-1", &other, "token_replayed"),
            ("another workload", &single, "cart-2", &one, "token_replayed"),
            ("both", &single, "cart-2", &other, "token_replayed"),
            ("first replica", &double, "cart-1", &one, "issued"),
            ("second replica", &double, "cart-2", &other, "issued"),
            ("first replica again", &double, "cart-1", &one, "issued"),
            ("first replica's key for the third", &double, "cart-3", &one, "token_replayed"),
            ("third replica", &double, "cart-3", &third, "token_replayed"),
        ];
        for (name, claims, workload, key, expected) in steps {
            // Each step after a restart.
            let redemptions = Redemptions::open(&state).unwrap();
            assert_eq!(word(redemptions.redeem(claims, workload, key, NOW + DAY, NOW)), expected, "{name}");
        }
        let redemptions = Redemptions::open(&state).unwrap();
        assert_eq!(label(&redemptions, &one).as_deref(), Some("double"));
        assert_eq!(label(&redemptions, &third), None);
        let elsewhere = Subject { service_account: "pay".into(), ..subject(&one) };
        assert_eq!(redemptions.certified(&elsewhere), None);
    }

    #[test]
    fn a_grant_follows_the_key_and_its_renewals_and_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (early, honest, next, last) = (key(), key(), key(), key());
        let redemptions = Redemptions::open(&state).unwrap();
        let mut bare = claims("bare", 1);
        (bare.labels, bare.addresses) = (Labels::new(), Vec::new());
        redemptions.redeem(&bare, "cart-1", &early, NOW + DAY, NOW).unwrap();
        redemptions.redeem(&claims("full", 1), "cart-1", &honest, NOW + DAY, NOW).unwrap();
        redemptions.renew(&subject(&honest), &next, NOW + 2 * DAY, NOW).unwrap();
        redemptions.renew(&subject(&next), &last, NOW + 3 * DAY, NOW).unwrap();
        for redemptions in [redemptions, Redemptions::open(&state).unwrap()] {
            assert_eq!(redemptions.certified(&subject(&early)).unwrap().grant, Grant::default());
            let [first, second, third] =
                [&honest, &next, &last].map(|key| redemptions.certified(&subject(key)).unwrap());
            assert_eq!(first.grant.labels["token"], "full");
            assert_eq!(third.grant.addresses.len(), 1);
            assert!(first == second && second == third, "one lineage with one grant");
            assert_ne!(redemptions.certified(&subject(&early)).unwrap().lineage, third.lineage);
        }
        // A later token for the name leaves the early one as it is, and takes nothing from the others.
        let redemptions = Redemptions::open(&state).unwrap();
        redemptions.renew(&subject(&early), &key(), NOW + DAY, NOW).unwrap();
        assert_eq!(label(&redemptions, &early), None);
        assert_eq!(label(&redemptions, &last).as_deref(), Some("full"));
    }

    #[test]
    fn a_key_is_superseded_once_its_successor_was_used() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let redemptions = Redemptions::open(&state).unwrap();
        let (one, lost, two, three) = (key(), key(), key(), key());
        redemptions.redeem(&claims("t", 1), "cart-1", &one, NOW + DAY, NOW).unwrap();
        assert!(!redemptions.is_superseded(&subject(&one)));
        redemptions.renew(&subject(&one), &lost, NOW + DAY, NOW).unwrap();
        assert!(!redemptions.is_superseded(&subject(&one)), "the answer may have been lost");
        redemptions.renew(&subject(&one), &two, NOW + DAY, NOW).unwrap();
        redemptions.saw(&subject(&two));
        assert!(redemptions.is_superseded(&subject(&one)));
        assert!(!redemptions.is_superseded(&subject(&two)));
        redemptions.renew(&subject(&two), &three, NOW + DAY, NOW).unwrap();
        // After a restart a renewal by the successor is what tells.
        let redemptions = Redemptions::open(&state).unwrap();
        assert!(redemptions.is_superseded(&subject(&one)));
        assert!(!redemptions.is_superseded(&subject(&two)) && !redemptions.is_superseded(&subject(&three)));
        assert!(!redemptions.is_superseded(&subject(&key())), "nobody knows it");
    }

    #[test]
    fn nothing_is_spent_when_the_disk_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let redemptions = Redemptions::open(&state).unwrap();
        let full = Redemptions {
            journal: Mutex::new(Journal::on_a_full_disk(&state, FILE)),
            index: RwLock::new(Index::default()),
        };
        let own = key();
        assert_eq!(word(full.redeem(&claims("a", 1), "cart-1", &own, NOW + DAY, NOW)), "state_write");
        assert_eq!(full.certified(&subject(&own)), None);
        assert_eq!(word(redemptions.redeem(&claims("a", 1), "cart-1", &key(), NOW + DAY, NOW)), "issued");
    }

    #[test]
    fn the_file_does_not_grow_for_ever_and_forgets_nothing_that_matters() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (journal, _) = Journal::open(&state, FILE).unwrap();
        let old = |number: usize| Record {
            token: "old".into(),
            expiry: 1,
            namespace: "shop".into(),
            service_account: "cart".into(),
            workload: "cart-1".into(),
            key: number.to_string(),
            labels: Labels::from([("token".to_owned(), number.to_string())]),
            addresses: Vec::new(),
            end: 2,
            first: (number > 0).then(|| "0".to_owned()),
            from: (number > 0).then(|| (number - 1).to_string()),
        };
        let index = Index::of((0..COMPACT_FROM - 1).map(old).collect());
        let redemptions = Redemptions { journal: Mutex::new(journal), index: RwLock::new(index) };
        let later = NOW + Duration::from_secs(2 + MEMORY_SECONDS);
        let mut current = claims("current", 1);
        current.expiry = MEMORY_SECONDS + 3600;
        redemptions.redeem(&current, "cart-x", &key(), later + DAY, later).unwrap();
        let redemptions = Redemptions::open(&state).unwrap();
        let kept: Vec<String> = redemptions.read().all.iter().map(|record| record.labels["token"].clone()).collect();
        // The last of them may still be renewed, also with the key before it: nobody has seen the last one's certificate.
        assert_eq!(kept, ["997", "998", "current"]);
        assert_eq!(word(redemptions.redeem(&current, "cart-y", &key(), later + DAY, later)), "token_replayed");
    }
}
