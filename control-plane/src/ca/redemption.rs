//! Which tokens were redeemed, by whom, and what they granted. A redemption is on disk before a certificate is
//! issued for it; when the disk refuses, so do we. The same key that asks again gets its answer again (its reply was
//! lost); anybody else who comes with a spent token is a replay.

use std::collections::HashMap;
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
/// Rewriting the file pays when this many of its lines, and half of all, are of no use.
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
    journal: Journal<Redemption>,
    /// Oldest first. What is of no use any more is dropped when the file is rewritten.
    all: Vec<Redemption>,
    by_token: HashMap<String, Vec<usize>>,
    last_of: HashMap<Holder, usize>,
}

impl Redemptions {
    pub fn open(state: &State) -> Result<Redemptions, JournalError> {
        let (journal, all) = Journal::open(state, FILE)?;
        let mut redemptions =
            Redemptions { journal, all: Vec::new(), by_token: HashMap::new(), last_of: HashMap::new() };
        for redemption in all {
            redemptions.index(redemption);
        }
        Ok(redemptions)
    }

    /// Spends one use of a verified token on a workload and its key; durable when it returns.
    pub fn redeem(
        &mut self,
        claims: &Claims,
        workload: &str,
        key: &RequestedKey,
        now: SystemTime,
    ) -> Result<(), RedeemError> {
        let key = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, &key.spki));
        let spent = self.by_token.get(&claims.id).map_or(&[][..], Vec::as_slice);
        let mut same_key = spent.iter().map(|index| &self.all[*index]).filter(|redemption| redemption.key == key);
        if let Some(redemption) = same_key.next() {
            let repeated = redemption.workload == workload;
            return if repeated { Ok(()) } else { Err(RedeemError::Replayed { uses: claims.uses }) };
        }
        if spent.len() >= claims.uses as usize {
            return Err(RedeemError::Replayed { uses: claims.uses });
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
        self.journal.append(&redemption)?;
        self.index(redemption);
        self.compact_when_worth_it(now);
        Ok(())
    }

    /// What a workload may register; nothing when it never redeemed a token here.
    pub fn grant(&self, namespace: &str, service_account: &str, workload: &str) -> Option<&Grant> {
        let holder = (namespace.to_owned(), service_account.to_owned(), workload.to_owned());
        self.last_of.get(&holder).map(|index| &self.all[*index].labels)
    }

    fn index(&mut self, redemption: Redemption) {
        let position = self.all.len();
        self.by_token.entry(redemption.token.clone()).or_default().push(position);
        self.last_of.insert(redemption.holder(), position);
        self.all.push(redemption);
    }

    fn compact_when_worth_it(&mut self, now: SystemTime) {
        // Counting costs a look at each, so not at each redemption.
        if !self.all.len().is_multiple_of(COMPACT_FROM) {
            return;
        }
        let now = unix_seconds(now);
        let keep = |index: usize, redemption: &Redemption| {
            redemption.expiry.saturating_add(MEMORY_SECONDS) > now
                || self.last_of.get(&redemption.holder()) == Some(&index)
        };
        let useful = self.all.iter().enumerate().filter(|(index, redemption)| keep(*index, redemption)).count();
        let useless = self.all.len() - useful;
        if useless < COMPACT_FROM || useless < useful {
            return;
        }
        let kept: Vec<Redemption> = self
            .all
            .iter()
            .enumerate()
            .filter(|(index, redemption)| keep(*index, redemption))
            .map(|(_, redemption)| redemption.clone())
            .collect();
        // A failure leaves a longer file than needed, and nothing else.
        if let Err(error) = self.journal.rewrite(kept.iter()) {
            tracing::warn!("cannot shorten {FILE}: {error}");
            return;
        }
        self.all.clear();
        self.by_token.clear();
        self.last_of.clear();
        for redemption in kept {
            self.index(redemption);
        }
    }
}
