//! The outbound walk: what the application sends to others. Lookup, detect, policy, route, balance, connect, forward.
//! What is over when bytes flow is boxed: a connection's task is as large as its largest part for as long as it lives.

use std::rc::Rc;

use outrigger_api::name::Protocol;
use outrigger_api::snapshot::Key;

use crate::connect::backend::Backend;
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};
use crate::policy;
use crate::protocol::detect::Detected;
use crate::protocol::opaque::Declared;
use crate::protocol::peek::{self, Peeked};
use crate::telemetry::WireProtocol;

mod addresses;
mod cors;
mod edits;
mod mirror;
mod opaque;
mod proxy;
mod race;
mod redirected;
mod refusal;
mod requests;
mod route;
mod tried;
mod undeclared;

pub use proxy::serve_proxy;
pub use redirected::serve_redirected;

use opaque::opaque;
use refusal::{refuse_connection, refuse_head};
use requests::{http1, http2};
use undeclared::undeclared;

/// Serves one connection of the application to one destination.
pub async fn serve(worker: Rc<Worker>, key: Key, stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.destination = key.to_string());
    let backend = worker.backend(&key);
    walk(&worker, &backend, stream, &registered).await;
}

async fn walk(worker: &Rc<Worker>, backend: &Rc<Backend>, mut stream: Stream, registered: &Rc<Registered>) {
    // A lookup that failed is told to an HTTP client in its own protocol, so detection goes on without it.
    let view = backend.view(worker).await;
    let declared = view.as_ref().ok().and_then(|view| view.declared(worker));
    let permit = policy::admit_outbound();
    let limits = &worker.limits;
    let peeked = match declared {
        Some(Protocol::Tcp) => {
            return opaque(worker, view, stream, registered, WireProtocol::Tcp, Declared::Opaque, permit).await;
        }
        Some(Protocol::Tls) => {
            return opaque(worker, view, stream, registered, WireProtocol::Tls, Declared::Opaque, permit).await;
        }
        Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => {
            peek::speaks_or_waits(&mut stream, limits.first_byte_timeout, limits.head_timeout).await
        }
        None => return undeclared(worker, backend, view, stream, registered, permit).await,
    };
    let known = view.as_deref().ok();
    match peeked {
        Ok(Peeked::Speaks(Detected::Http2)) => Box::pin(http2(worker, backend, stream, registered, permit)).await,
        Ok(Peeked::Speaks(Detected::Tls)) => {
            let error = Error::downstream(Stage::Detect, Reason::ProtocolMismatch, "TLS on a port declared as HTTP");
            refuse_connection(worker, known, &stream, &error);
        }
        // What is not HTTP at all is told by the parser what is wrong with it.
        Ok(Peeked::Speaks(Detected::Http1 | Detected::Opaque)) => {
            http1(worker, backend, known, stream, registered, permit).await;
        }
        Ok(Peeked::Silent | Peeked::Left) => {}
        Err(error) => refuse_head(worker, known, stream, &error).await,
    }
}

#[cfg(test)]
mod tests {
    fn size<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// What every connection costs for as long as it lives, before any library's part.
    #[test]
    fn a_connections_task_is_small() {
        let bytes = size(super::serve);
        assert!(bytes <= 3500, "{bytes} bytes");
    }
}
