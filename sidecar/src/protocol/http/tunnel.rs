//! After a 101 that was asked for: both connections have left HTTP, their bytes are copied as they are.

use std::rc::Rc;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::downstream_io::DownstreamIo;
use super::exchange::Session;
use crate::connect::UpstreamIo;
use crate::connect::lane::Held;
use crate::connection::State;
use crate::net::Stream;
use crate::outcome::Reason;
use crate::protocol::opaque::{self, CopyError};
use crate::telemetry::HttpRecord;

/// Copies until both sides have ended; the record ends with it.
pub fn spawn_switched(
    session: &Rc<Session>,
    record: Rc<HttpRecord>,
    downstream: OnUpgrade,
    upstream: OnUpgrade,
    held: Held,
) {
    let session = session.clone();
    tokio::task::spawn_local(async move {
        // The connection is no longer the lane's; it only counts as in use.
        let _held = held;
        let _hold = session.worker.drain.hold();
        let (Ok(downstream), Ok(upstream)) = (downstream.await, upstream.await) else {
            record.failed(Reason::ClientClosed, || "left before the protocol was switched".to_owned());
            return;
        };
        let (Some(downstream), Some(upstream)) = (downstream_stream(downstream), upstream_stream(upstream)) else {
            record.failed(Reason::Internal, || "an upgraded connection of an unknown type".to_owned());
            return;
        };
        session.entry.enter(State::Tunnel);
        let forth = |count| record.add_request_bytes(count);
        let back = |count| record.add_response_bytes(count);
        match opaque::copy(downstream, upstream, &session.entry, forth, back).await {
            Ok(()) => record.response_ended(),
            Err(CopyError::Downstream(error)) => record.failed(Reason::ClientClosed, || error.to_string()),
            Err(CopyError::Upstream(error)) => record.failed(Reason::UpstreamReset, || error.to_string()),
        }
    });
}

/// The stream below a downstream connection that left HTTP, with what the parser had read too far.
pub fn downstream_stream(upgraded: Upgraded) -> Option<Stream> {
    let parts = upgraded.downcast::<TokioIo<DownstreamIo>>().ok()?;
    let mut stream = parts.io.into_inner().into_stream();
    if !parts.read_buf.is_empty() {
        stream.unread(&parts.read_buf);
    }
    Some(stream)
}

fn upstream_stream(upgraded: Upgraded) -> Option<Stream> {
    let parts = upgraded.downcast::<TokioIo<UpstreamIo>>().ok()?;
    let mut stream = parts.io.into_inner().into_stream();
    if !parts.read_buf.is_empty() {
        stream.unread(&parts.read_buf);
    }
    Some(stream)
}
