//! Ports whose protocol nobody declared: who speaks first, and what.

use std::rc::Rc;

use outrigger_api::snapshot::Key;

use crate::connect::backend::{Backend, View};
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::Stream;
use crate::outcome::Error;
use crate::policy::Permit;
use crate::protocol::detect::Detected;
use crate::protocol::opaque::Declared;
use crate::protocol::peek::Peeked;
use crate::protocol::silence::{self, First, Moment};
use crate::telemetry::{self, WireProtocol};

use super::opaque::{copy, dial, opaque};
use super::refusal::{refuse_connection, refuse_head};
use super::requests::{http1, http2};

/// A port whose protocol nobody declared: whoever speaks first decides, the client's bytes in any case.
pub(super) async fn undeclared(
    worker: &Rc<Worker>,
    backend: &Rc<Backend>,
    view: Result<Rc<View>, Error>,
    mut stream: Stream,
    registered: &Rc<Registered>,
    permit: Permit,
) {
    let known = view.as_deref().ok();
    // It may be long before somebody speaks: what was known then is asked again.
    let open = async || dial(worker, &backend.view(worker).await?, permit).await;
    let key = known.and_then(|view| view.service.clone()).map_or_else(|| backend.key().clone(), Key::Service);
    let opened =
        match Box::pin(silence::first(worker, &key, registered.id, &mut stream, Moment::AsRemembered, open)).await {
            Ok(First::Client(opened)) => opened,
            Ok(First::Server(opened)) => {
                worker.telemetry.detected(telemetry::Detected::ServerFirst);
                return copy(worker, stream, opened, registered, WireProtocol::Tcp, Declared::Nothing).await;
            }
            Ok(First::Nobody) => return,
            Err(error) => return refuse_connection(worker, known, &stream, &error),
        };
    let protocol = match counted(worker, Box::pin(silence::decide(worker, registered.id, &mut stream)).await) {
        Ok(Peeked::Speaks(Detected::Http1)) => {
            opened.into_iter().for_each(silence::leave);
            return http1(worker, backend, known, stream, registered, permit).await;
        }
        Ok(Peeked::Speaks(Detected::Http2)) => {
            opened.into_iter().for_each(silence::leave);
            return Box::pin(http2(worker, backend, stream, registered, permit)).await;
        }
        Ok(Peeked::Speaks(Detected::Tls)) => WireProtocol::Tls,
        Ok(Peeked::Speaks(Detected::Opaque)) => WireProtocol::Tcp,
        Ok(Peeked::Silent | Peeked::Left) => return,
        Err(error) => return refuse_head(worker, known, stream, &error).await,
    };
    match opened {
        Some(opened) => copy(worker, stream, opened, registered, protocol, Declared::Nothing).await,
        None => {
            let view = backend.view(worker).await;
            opaque(worker, view, stream, registered, protocol, Declared::Nothing, permit).await;
        }
    }
}

/// Counts how the protocol of an undeclared port was found.
fn counted(worker: &Worker, peeked: Result<Peeked, Error>) -> Result<Peeked, Error> {
    if let Ok(Peeked::Speaks(detected)) = &peeked {
        worker.telemetry.detected((*detected).into());
    }
    peeked
}
