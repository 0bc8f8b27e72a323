//! How large the windows of a connection's streams should be: they begin small, and follow what the path carries. With one
//! window per round trip under way a sender waits for most of a long round trip, so a PING measures it: when nearly
//! a window's worth of DATA comes between a PING and its answer, the window is what limits the sender, and grows. Not when
//! that DATA only piles up: the first windows of many streams that nobody reads come at once, and larger ones would be
//! filled as well. No clock and no I/O of its own: `KeepAlive` sends the PINGs and passes the time in.
//!
//! A measuring PING is sent only behind DATA that came after the last one's answer. Servers that count PINGs, such as
//! grpc-go, forget the count whenever they send DATA, so that ours never ends a connection.

use std::time::{Duration, Instant};

use crate::config::limits::Limits;

/// What a path is taken to carry before anything else is known, bytes in a second: a gigabit. Doubling a window once per
/// round trip would take longer than a usual message.
const TAKEN_FOR_GRANTED: u128 = 125_000_000;
/// DATA before a PING, and again after each PING whose answer did not make the window grow, up to `MOST_PATIENT` times that.
const BEFORE_A_PING: u64 = 16 * 1024;
const MOST_PATIENT: u64 = 64;

pub struct Windows {
    window: u32,
    first: u32,
    most: u32,
    measuring: Option<Measuring>,
    /// DATA since the last answer to a PING ...
    data: u64,
    /// ... and at the last look.
    last: u64,
    patience: u64,
}

/// A PING is under way.
struct Measuring {
    since: Instant,
    data: u64,
    /// What has gone on meanwhile, to whom it is for.
    went: u64,
}

impl Windows {
    pub fn new(limits: &Limits) -> Windows {
        Windows {
            window: limits.h2_stream_window,
            first: limits.h2_stream_window,
            most: limits.h2_stream_window_most,
            measuring: None,
            data: 0,
            last: 0,
            patience: 1,
        }
    }

    /// The window of a stream.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// With which it began.
    pub fn first(&self) -> u32 {
        self.first
    }

    pub fn is_measuring(&self) -> bool {
        self.measuring.is_some()
    }

    /// So much DATA came; whether a PING should be sent now, which [`Windows::asked`] confirms.
    pub fn came(&mut self, data: u64) -> bool {
        if let Some(measuring) = &mut self.measuring {
            measuring.data += data;
            return false;
        }
        self.data += data;
        self.last = data;
        self.window < self.most && self.data >= BEFORE_A_PING * self.patience
    }

    /// So much DATA has gone on.
    pub fn went(&mut self, data: u64) {
        if let Some(measuring) = &mut self.measuring {
            measuring.went += data;
        }
    }

    /// A PING was sent. What has just come counts: it came in one piece as far as we can tell, and the PING leaves before
    /// the window updates for it.
    pub fn asked(&mut self, now: Instant) {
        self.measuring = Some(Measuring { since: now, data: self.last, went: 0 });
    }

    /// Its answer came.
    pub fn answered(&mut self, now: Instant) {
        let Some(measuring) = self.measuring.take() else { return };
        self.data = 0;
        // The sender fills a window, waits for updates, which come for half a window at a time, and fills it again.
        // What came last may have had no time to go on, and what came before it had.
        let part = u64::from(self.window) / 8;
        if measuring.data < part * 3 || measuring.went < part {
            self.patience = (self.patience * 2).min(MOST_PATIENT);
            return;
        }
        self.patience = 1;
        let path = bytes_on_the_way(now.duration_since(measuring.since));
        self.window = self.window.saturating_mul(2).max(path).min(self.most);
    }

    /// No larger than this, as far as it is worth telling the peer.
    pub fn limit(&mut self, most: u32) {
        if self.window / 2 >= most {
            self.window = most.max(self.first);
        }
    }

    /// Memory is short.
    pub fn shrink(&mut self) {
        self.window = self.first;
        self.measuring = None;
        self.patience = MOST_PATIENT;
        self.data = 0;
    }
}

/// Twice what is on the way in this time: updates come for half a window at a time.
fn bytes_on_the_way(round_trip: Duration) -> u32 {
    u32::try_from(round_trip.as_micros() * TAKEN_FOR_GRANTED * 2 / 1_000_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    /// Windows after a transfer over a path that carries so many bytes per second with this round trip, and how many PINGs
    /// were sent. The sender always has something to send.
    fn after(bytes: u64, per_second: u64, round_trip: Duration) -> (u32, u64, u32) {
        let mut windows = Windows::new(&Limits::default());
        let mut now = Instant::now();
        let (mut left, mut pings, mut trips) = (bytes, 0, 0);
        while left > 0 {
            let carried = per_second * u64::try_from(round_trip.as_micros()).unwrap() / 1_000_000;
            let came = carried.min(windows.window().into()).min(left);
            // It comes in pieces.
            for piece in [came / 4; 4] {
                if windows.came(piece) {
                    windows.asked(now);
                    pings += 1;
                }
                windows.went(piece);
            }
            left -= came;
            now += round_trip;
            trips += 1;
            if windows.is_measuring() {
                windows.answered(now);
            }
        }
        (windows.window(), pings, trips)
    }

    #[test]
    fn a_long_fat_path_gets_a_large_window_at_once() {
        for milliseconds in [1, 10, 50, 200] {
            let (window, pings, trips) = after(20 * MIB, 10_000_000_000, Duration::from_millis(milliseconds));
            assert!(window >= 512 * 1024, "{milliseconds} ms: {window}");
            let most = if milliseconds == 1 { 60 } else { 10 };
            assert!(trips <= most && pings <= 8, "{milliseconds} ms: {trips} round trips, {pings} PINGs");
        }
    }

    #[test]
    fn a_path_that_carries_little_keeps_its_window_and_is_seldom_asked() {
        // 1 MB/s over 10 ms are 10 KB on the way.
        let (window, pings, _) = after(20 * MIB, 1_000_000, Duration::from_millis(10));
        assert_eq!(window, Limits::default().h2_stream_window);
        assert!(pings < 40, "{pings}");
    }

    #[test]
    fn what_nobody_takes_makes_no_window_grow() {
        let mut windows = Windows::new(&Limits::default());
        let mut now = Instant::now();
        for _ in 0..250 {
            if windows.came(64 * KIB) {
                windows.asked(now);
            }
            now += Duration::from_millis(1);
            if windows.is_measuring() {
                windows.answered(now);
            }
        }
        assert_eq!(u64::from(windows.window()), 64 * KIB);
    }

    #[test]
    fn a_window_shrinks_and_is_not_asked_for_soon() {
        let mut windows = Windows::new(&Limits::default());
        assert!(windows.came(64 * KIB));
        let now = Instant::now();
        windows.asked(now);
        windows.went(64 * KIB);
        assert!(!windows.came(64 * KIB), "one PING at a time");
        windows.answered(now + Duration::from_millis(50));
        assert_eq!(u64::from(windows.window()), 4 * MIB);
        assert!(!windows.came(100 * MIB), "there is nothing more to be had");
        windows.shrink();
        assert_eq!(u64::from(windows.window()), 64 * KIB);
        assert!(!windows.came(64 * KIB));
    }
}
