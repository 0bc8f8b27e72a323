//! The key sets' copy in `--state`: with it a sidecar that restarts while an issuer is away still knows whom to believe,
//! for as long as it would have without the restart.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrigger_api::policy::jwt::{KeySet, KeySetUrl};
use serde::{Deserialize, Serialize};

use crate::identity::replace_file;

const FILE: &str = "key-sets.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    url: KeySetUrl,
    /// Seconds since the Unix epoch.
    fetched: u64,
    keys: KeySet,
}

/// Empty when there is none, or it is of no use, which is told.
pub(super) async fn load(state: &Path) -> Vec<(KeySetUrl, KeySet, SystemTime)> {
    let path = state.join(FILE);
    let reading = path.clone();
    let bytes = match tokio::task::spawn_blocking(move || std::fs::read(reading)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Ok(Err(error)) => {
            tracing::warn!(path = %path.display(), %error, "the kept key sets are not used");
            return Vec::new();
        }
        Err(_) => return Vec::new(),
    };
    match serde_json::from_slice::<Vec<Kept>>(&bytes) {
        Ok(kept) => {
            let now = SystemTime::now();
            let all = kept.into_iter().map(|one| (one.url, one.keys, UNIX_EPOCH + Duration::from_secs(one.fetched)));
            // One of the future would never be too old.
            all.map(|(url, keys, fetched)| (url, keys, fetched.min(now))).collect()
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the kept key sets are not used");
            Vec::new()
        }
    }
}

pub(super) async fn save<'k>(state: &Path, known: impl Iterator<Item = (&'k KeySetUrl, &'k KeySet, SystemTime)>) {
    let kept: Vec<Kept> = known
        .map(|(url, keys, fetched)| Kept {
            url: url.clone(),
            fetched: fetched.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            keys: keys.clone(),
        })
        .collect();
    let path: PathBuf = state.join(FILE);
    let written = tokio::task::spawn_blocking(move || {
        let bytes = serde_json::to_vec(&kept).map_err(|error| error.to_string())?;
        replace_file(&path, &bytes).map_err(|error| error.to_string())
    });
    if let Ok(Err(error)) = written.await {
        tracing::warn!("the key sets would not survive a restart now: {error}");
    }
}
