//! The applications of the demo: `load` calls `web` (HTTP/1.1), `web` calls `catalog` (gRPC) and `ledger` (plain TCP).
//! Ordinary services that know nothing of the mesh but the header in which a sidecar names the caller: they take their
//! listener and the addresses to call from `outrigger demo`, which gives them their sidecars' addresses. Each runs until
//! its `shutdown` completes and then drops its connections.

mod catalog;
mod ledger;
mod load;
mod web;

pub use catalog::serve as serve_catalog;
pub use ledger::serve as serve_ledger;
pub use load::{Report, Tally, run as run_load};
pub use web::{ShopAnswer, serve as serve_web};

use std::pin::pin;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// In which the sidecar tells its application who calls.
const IDENTITY_HEADER: &str = "x-outrigger-identity";

/// What an application hands on so that a trace hangs together: W3C trace context and baggage, B3, request id.
const PROPAGATED: [HeaderName; 10] = [
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("baggage"),
    HeaderName::from_static("b3"),
    HeaderName::from_static("x-b3-traceid"),
    HeaderName::from_static("x-b3-spanid"),
    HeaderName::from_static("x-b3-parentspanid"),
    HeaderName::from_static("x-b3-sampled"),
    HeaderName::from_static("x-b3-flags"),
    HeaderName::from_static("x-request-id"),
];

/// The headers of an incoming call that belong on the calls it causes.
fn propagated(incoming: &HeaderMap) -> HeaderMap {
    PROPAGATED
        .iter()
        .flat_map(|name| incoming.get_all(name).iter().map(move |value| (name.clone(), value.clone())))
        .collect()
}

fn caller(incoming: &HeaderMap) -> Option<String> {
    Some(incoming.get(IDENTITY_HEADER)?.to_str().ok()?.to_owned())
}

/// After an error of `accept`, which is most often a lack of file descriptors: one is free again soon.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves each connection in a task of its own until `shutdown`.
async fn accept<F>(listener: TcpListener, shutdown: impl Future<Output = ()>, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut shutdown = pin!(shutdown);
    // Dropped on return, and the connections with it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let _delayed_at_worst = stream.set_nodelay(true);
                    connections.spawn(serve(stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "a service of the demo could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

#[cfg(test)]
mod tests;
