//! Which tokens were redeemed, by whom, and what they granted. A redemption is on disk before a certificate is
//! issued for it; when the disk refuses, so do we. The same key that asks again gets its answer again (its reply was
//! lost); anybody else who comes with a spent token is a replay.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_api::resource::Labels;
use serde::{Deserialize, Serialize};

use super::certificate::unix_seconds;
use super::csr::RequestedKey;
use super::token::Claims;
use crate::config::{Journal, JournalError, State};

const FILE: &str = "redemptions.jsonl";
/// Spent tokens are remembered this long past their end, so that a clock that is set back revives none.
const MEMORY_SECONDS: u64 = 7 * 24 * 60 * 60;
/// How often, in redemptions, to see whether most lines of the file are of no use.
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

/// What a workload may register: remembered from its last redemption, kept by renewals.
pub type Grant = Labels;

/// One line of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Redemption {
    #[serde(rename = "jti")]
    token: String,
    #[serde(rename = "exp")]
    expiry: u64,
    #[serde(rename = "ns")]
    namespace: String,
    #[serde(rename = "sa")]
    service_account: String,
    workload: String,
    /// Hash of the public key.
    key: String,
    labels: Labels,
}

type Holder = (String, String, String);

impl Redemption {
    fn holder(&self) -> Holder {
        (self.namespace.clone(), self.service_account.clone(), self.workload.clone())
    }
}

/// Every redemption that still matters.
#[derive(Debug)]
pub struct Redemptions {
    /// One redemption at a time, from its check to the disk.
    journal: Mutex<Journal<Redemption>>,
    /// Apart, so that a slow disk delays redemptions and nobody who only reads a grant.
    index: RwLock<Index>,
}

impl Redemptions {
    pub fn open(state: &State) -> Result<Redemptions, JournalError> {
        let (journal, all) = Journal::open(state, FILE)?;
        Ok(Redemptions { journal: Mutex::new(journal), index: RwLock::new(Index::of(all)) })
    }

    /// Spends one use of a verified token on a workload and its key; durable when it returns. Waits for the disk.
    pub fn redeem(
        &self,
        claims: &Claims,
        workload: &str,
        key: &RequestedKey,
        now: SystemTime,
    ) -> Result<(), RedeemError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let key = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, &key.spki));
        match self.read().look(claims, workload, &key) {
            Spent::Repeated => return Ok(()),
            Spent::Replayed => return Err(RedeemError::Replayed { uses: claims.uses }),
            Spent::No => {}
        }
        let redemption = Redemption {
            token: claims.id.clone(),
            expiry: claims.expiry,
            namespace: claims.namespace.clone(),
            service_account: claims.service_account.clone(),
            workload: workload.to_owned(),
            key,
            labels: claims.labels.clone(),
        };
        journal.append(&redemption)?;
        let count = self.write().add(redemption);
        // Counting what is useless costs a look at each, so not at each redemption.
        if count.is_multiple_of(COMPACT_FROM) {
            self.compact(&mut journal, unix_seconds(now));
        }
        Ok(())
    }

    /// What a workload may register; None when it never redeemed a token here.
    pub fn grant(&self, namespace: &str, service_account: &str, workload: &str) -> Option<Grant> {
        let holder = (namespace.to_owned(), service_account.to_owned(), workload.to_owned());
        let index = self.read();
        index.last_of.get(&holder).map(|position| index.all[*position].labels.clone())
    }

    fn compact(&self, journal: &mut Journal<Redemption>, now: u64) {
        let Some(kept) = self.read().without_the_useless(now) else { return };
        // A failure leaves a longer file than needed, and nothing else.
        match journal.rewrite(kept.iter()) {
            Ok(()) => *self.write() = Index::of(kept),
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
    all: Vec<Redemption>,
    by_token: HashMap<String, Vec<usize>>,
    last_of: HashMap<Holder, usize>,
}

impl Index {
    fn of(all: Vec<Redemption>) -> Index {
        let mut index = Index::default();
        for redemption in all {
            index.add(redemption);
        }
        index
    }

    /// Returns how many there are now.
    fn add(&mut self, redemption: Redemption) -> usize {
        let position = self.all.len();
        self.by_token.entry(redemption.token.clone()).or_default().push(position);
        self.last_of.insert(redemption.holder(), position);
        self.all.push(redemption);
        self.all.len()
    }

    fn look(&self, claims: &Claims, workload: &str, key: &str) -> Spent {
        let spent = self.by_token.get(&claims.id).map_or(&[][..], Vec::as_slice);
        let same_key = spent.iter().map(|position| &self.all[*position]).find(|redemption| redemption.key == key);
        match same_key {
            Some(redemption) if redemption.workload == workload => Spent::Repeated,
            Some(_) => Spent::Replayed,
            None if spent.len() >= claims.uses as usize => Spent::Replayed,
            None => Spent::No,
        }
    }

    /// What is to be kept, when leaving out the rest is worth a rewrite: tokens that could still be replayed, and the
    /// last grant of each workload.
    fn without_the_useless(&self, now: u64) -> Option<Vec<Redemption>> {
        let useful = |(position, redemption): &(usize, &Redemption)| {
            redemption.expiry.saturating_add(MEMORY_SECONDS) > now
                || self.last_of.get(&redemption.holder()) == Some(position)
        };
        let kept: Vec<Redemption> =
            self.all.iter().enumerate().filter(useful).map(|(_, redemption)| redemption.clone()).collect();
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

    fn key() -> RequestedKey {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let der = params.serialize_request(&key).unwrap();
        csr::check(der.der(), &SpiffeId::parse("spiffe://td/ns/shop/sa/cart").unwrap()).unwrap()
    }

    fn claims(id: &str, uses: u32) -> Claims {
        Claims {
            audience: "outrigger".into(),
            trust_domain: None,
            namespace: "shop".into(),
            service_account: "cart".into(),
            labels: Labels::from([("token".to_owned(), id.to_owned())]),
            uses,
            expiry: 3600,
            id: id.into(),
        }
    }

    fn word(result: Result<(), RedeemError>) -> &'static str {
        result.map_or_else(|error| error.word(), |()| "issued")
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
            assert_eq!(word(redemptions.redeem(claims, workload, key, NOW)), expected, "{name}");
        }
        let redemptions = Redemptions::open(&state).unwrap();
        assert_eq!(redemptions.grant("shop", "cart", "cart-1").unwrap()["token"], "double");
        assert_eq!(redemptions.grant("shop", "cart", "cart-3"), None);
        assert_eq!(redemptions.grant("shop", "pay", "cart-1"), None);
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
        assert_eq!(word(full.redeem(&claims("a", 1), "cart-1", &key(), NOW)), "state_write");
        assert_eq!(full.grant("shop", "cart", "cart-1"), None);
        assert_eq!(word(redemptions.redeem(&claims("a", 1), "cart-1", &key(), NOW)), "issued");
    }

    #[test]
    fn the_file_does_not_grow_for_ever_and_forgets_nothing_that_matters() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (journal, _) = Journal::open(&state, FILE).unwrap();
        let key = key();
        let old = |number: usize| Redemption {
            token: format!("old-{number}"),
            expiry: 1,
            namespace: "shop".into(),
            service_account: "cart".into(),
            workload: format!("cart-{}", number % 10),
            key: String::new(),
            labels: Labels::from([("number".to_owned(), number.to_string())]),
        };
        let index = Index::of((0..COMPACT_FROM - 1).map(old).collect());
        let redemptions = Redemptions { journal: Mutex::new(journal), index: RwLock::new(index) };
        let later = NOW + Duration::from_secs(2 + MEMORY_SECONDS);
        let mut current = claims("current", 1);
        current.expiry = MEMORY_SECONDS + 3600;
        redemptions.redeem(&current, "cart-x", &key, later).unwrap();
        let redemptions = Redemptions::open(&state).unwrap();
        assert_eq!(redemptions.read().all.len(), 11, "the last grant of ten workloads and the live token");
        assert_eq!(redemptions.grant("shop", "cart", "cart-3").unwrap()["number"], "993");
        assert_eq!(word(redemptions.redeem(&current, "cart-y", &key, later)), "token_replayed");
    }
}
