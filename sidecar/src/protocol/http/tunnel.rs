//! After a 101 that was asked for: both connections have left HTTP, their bytes are copied as they are.

use std::rc::Rc;

use super::exchange::Session;
use crate::connection::State;
use crate::net::Stream;
use crate::protocol::opaque;
use crate::telemetry::HttpRecord;

/// Copies until both sides have ended; the record ends with it.
pub async fn switched(session: Rc<Session>, record: Rc<HttpRecord>, downstream: Stream, upstream: Stream) {
    let _hold = session.worker.drain.hold();
    session.entry.enter(State::Tunnel);
    let forth = |count| record.add_request_bytes(count);
    let back = |count| record.add_response_bytes(count);
    match opaque::copy(downstream, upstream, &session.entry, None, forth, back).await {
        Ok(()) => record.response_ended(),
        Err(error) => {
            let (reason, detail) = error.tell();
            record.failed(reason, || detail);
        }
    }
}
