//! Whether what the application answers to a client's address comes back to this sidecar, looked at for as long as it runs: with
//! `--keep-source-address` and without the rules for it, a connection to the application would only time out, and the
//! answers would go to the clients. Runs on the control thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::redirect;

/// Between two looks while it does not hold; the rules may come after the sidecar.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks while it holds.
const HOLDS: Duration = Duration::from_secs(10);

/// Keeps `holds` true to the rules. Never ends.
pub(super) async fn watch(holds: Arc<AtomicBool>) {
    let mut reported = false;
    loop {
        let mut found = redirect::way_back().await;
        if found.is_err() && holds.load(Relaxed) {
            // One look that failed is no reason to refuse everybody.
            tokio::time::sleep(AGAIN).await;
            found = redirect::way_back().await;
        }
        holds.store(found.is_ok(), Relaxed);
        if let Err(why) = &found
            && !reported
        {
            tracing::error!(
                %why,
                "--keep-source-address: what the application answers does not come back to this sidecar, so no connection is made \
                 to it: {}",
                crate::admin::WAY_BACK_HINT
            );
        }
        reported = found.is_err();
        tokio::time::sleep(if found.is_ok() { HOLDS } else { AGAIN }).await;
    }
}
