//! Interim answers as they go on: without what belongs to the hop that they came on, and no more than a client that does
//! not read may make us hold.

use http::header;

use super::exchange::Session;
use super::headers::{self, Message, Strip};
use crate::connect::http1::{Downstream, head};
use crate::connect::interim::{Head, MOST_WAITING};

/// What was heard since this was asked last.
pub fn take(session: &Session) -> impl Iterator<Item = Head> {
    session.interim.take().into_iter().map(|mut interim| {
        headers::clean(&mut interim.headers, Strip::HopByHop, Message::Answer { upgrade: false });
        // It has no body.
        interim.headers.remove(header::CONTENT_LENGTH);
        interim
    })
}

/// Queues it on an HTTP/1.1 connection, behind what is there.
pub fn queue(session: &Session, downstream: &Downstream) {
    for Head { status, headers, spelling } in take(session) {
        let mut conn = downstream.conn();
        let out = conn.queue();
        let before = out.len();
        head::write_response(out, false, status, &headers, spelling.as_ref());
        out.extend_from_slice(b"\r\n");
        if out.len() > MOST_WAITING {
            out.truncate(before);
        }
    }
}
