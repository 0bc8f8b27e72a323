//! After a 101 that was asked for: both connections have left HTTP, their bytes are copied as they are.

use std::rc::Rc;

use super::exchange::Session;
use crate::connection::State;
use crate::net::Stream;
use crate::protocol::opaque;
use crate::telemetry::HttpRecord;

/// A tunnel that ends because this sidecar closes its connection has the reason of that.
struct Cut<'a> {
    session: &'a Session,
    record: &'a HttpRecord,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Some(reason) = self.session.entry.closed_for() {
            self.record.cut(reason);
        }
    }
}

/// Copies until both sides have ended; the record ends with it.
pub async fn switched(session: Rc<Session>, record: Rc<HttpRecord>, downstream: Stream, upstream: Stream) {
    let _hold = session.worker.drain.hold();
    session.entry.enter(State::Tunnel);
    let _cut = Cut { session: &session, record: &record };
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
