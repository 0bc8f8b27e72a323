//! Interim answers (1xx, RFC 9110 section 15.2) on their way from an upstream to the client, the same on HTTP/1.1 and
//! HTTP/2: the lane that hears one leaves it here, and who serves the request sends it on, within one poll of the same
//! task. So there is one of these per downstream connection, and what is in it belongs to the request that runs.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use http::response::Parts;
use http::{HeaderMap, Response, StatusCode};

use super::http1::Spelling;

/// How many interim answers a request may get at once, and how many more with each second: a long operation may report as
/// long as it takes, and endless ones end their request.
const BURST: u64 = 1_000;
const PER_SECOND: u64 = 100;
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
pub struct Interim {
    heads: RefCell<Vec<Head>>,
    /// Bytes of those.
    waiting: Cell<usize>,
}

impl Interim {
    pub fn push(&self, response: Response<()>, spelling: Option<Spelling>) {
        let Parts { status, headers, .. } = response.into_parts().0;
        let waiting = self.waiting.get() + size(&headers);
        if waiting <= MOST_WAITING {
            self.waiting.set(waiting);
            self.heads.borrow_mut().push(Head { status, headers, spelling });
        }
    }

    /// Takes what waits; nothing, most of the time.
    pub fn take(&self) -> Vec<Head> {
        self.waiting.set(0);
        self.heads.take()
    }
}

/// The interim answers that one request has had.
#[derive(Default)]
pub struct Count {
    heard: u64,
    /// When the first came.
    since: Option<Instant>,
}

impl Count {
    /// Counts one more. False when there are too many.
    pub fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        self.heard += 1;
        self.heard <= BURST + PER_SECOND * now.saturating_duration_since(since).as_secs()
    }
}

/// What an interim answer takes, roughly as HPACK counts it (RFC 7541 section 4.1).
pub fn size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn as_many_as_an_operation_reports_and_not_endless_ones() {
        let begun = Instant::now();
        let mut count = Count::default();
        for second in 0..10_000 {
            for _ in 0..50 {
                assert!(count.take(begun + Duration::from_secs(second)), "{second}");
            }
        }
        let mut count = Count::default();
        let taken = (0..100_000).take_while(|number| count.take(begun + Duration::from_micros(10 * number))).count();
        assert_eq!(taken, 1_000);
    }
}
