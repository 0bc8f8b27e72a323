//! Whether the redirect rules leave the sidecar's own connections alone, asked for as long as it is not ready or has no
//! control plane: if they do not, the control plane cannot be reached, and no other reason would tell a person what to do. A
//! certificate in the state directory hides that no less than a missing one. Runs on the control thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::admin::Readiness;
use crate::net;
use crate::redirect::{PROBE_V4, PROBE_V6, exempt_target};

/// Between two looks; the rules may come after the sidecar.
const AGAIN: Duration = Duration::from_secs(2);
/// Between two looks at whether it is still connected.
const READY: Duration = Duration::from_secs(10);
/// On loopback an answer, either way, comes at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// Keeps `comes_back` true to the rules until the control plane is reached, and again whenever it is not.
pub(super) async fn watch(mark: Option<u32>, readiness: Readiness, comes_back: Arc<AtomicBool>) {
    loop {
        let ready = readiness.is_connected();
        let now = !ready && (returns(mark, PROBE_V4).await || returns(mark, PROBE_V6).await);
        if now && !comes_back.swap(now, Relaxed) {
            tracing::error!(
                "the redirect rules send this sidecar's own connections back to it, those to the control plane too: {}",
                crate::admin::EXEMPT_HINT
            );
        }
        comes_back.store(now, Relaxed);
        tokio::time::sleep(if ready { READY } else { AGAIN }).await;
    }
}

/// Nobody listens at that address but by the rules, which redirect it for everybody whom they do not exempt.
async fn returns(mark: Option<u32>, probe: std::net::SocketAddr) -> bool {
    let connecting = tokio::time::timeout(PATIENCE, net::connect_marked(exempt_target(probe), mark));
    matches!(connecting.await, Ok(Ok(_)))
}
