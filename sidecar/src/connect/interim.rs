//! Interim answers (1xx, RFC 9110 section 15.2) on their way from an upstream to the client, the same on HTTP/1.1 and
//! HTTP/2: the lane that hears one leaves it here, and who serves the request sends it on, within one poll of the same
//! task. So there is one of these per downstream connection, and what is in it belongs to the request that runs.

use std::cell::RefCell;

use http::response::Parts;
use http::{HeaderMap, Response, StatusCode};

use super::http1::Spelling;

/// How many interim answers a request may get: endless ones would be held for a client that does not read.
pub const MOST: u32 = 64;
/// Bytes of interim answers that may wait for a client to read them; the largest head fits. What comes when there is no
/// room is left out.
pub const MOST_WAITING: usize = 64 * 1024;

/// One interim answer as it was received.
pub struct Head {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// How an HTTP/1 upstream spelled it.
    pub spelling: Option<Spelling>,
}

#[derive(Default)]
pub struct Interim(RefCell<Vec<Head>>);

impl Interim {
    pub fn push(&self, response: Response<()>, spelling: Option<Spelling>) {
        let Parts { status, headers, .. } = response.into_parts().0;
        self.0.borrow_mut().push(Head { status, headers, spelling });
    }

    /// Takes what waits; nothing, most of the time.
    pub fn take(&self) -> Vec<Head> {
        self.0.take()
    }
}

/// What an interim answer takes, roughly as HPACK counts it (RFC 7541 section 4.1).
pub fn size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}
