//! Watches the frames that a downstream HTTP/2 connection sends, below the library, for floods that the library does
//! not see: resets of requests that were already taken up (rapid reset at a pace), and control frames without end.
//! Called by `downstream_io` with every piece that is read. It parses frame heads only, and never changes a byte.
//!
//! Two budgets, each of which time gives back: one for control frames, one for resets. What a busy and honest
//! connection does earns more than it costs: a request pays for its own flow control and pings, bytes that are sent pay
//! for the window updates that let them go, two requests pay for one reset.

use std::time::Instant;

use crate::config::limits::Limits;

const PREFACE: usize = 24;
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;

/// What a request earns for the control frames around it.
const PER_REQUEST: i64 = 4;
/// So many bytes sent pay for one control frame: nobody updates windows more often than that for a reason.
const PER_CONTROL_FRAME: u64 = 512;
/// Resets are counted in halves, so that one request pays for half a reset.
const RESET: i64 = 2;

pub struct Flood {
    /// The head of a frame, as far as it was read.
    head: [u8; HEAD],
    head_read: usize,
    /// Bytes of the preface or of the current frame that are still to come.
    left: usize,
    control: Budget,
    resets: Budget,
    sent: u64,
    /// A budget is spent; the stream of frames ends behind the current frame.
    over: bool,
}

impl Flood {
    /// For a connection on which at most `streams` requests run at once.
    pub fn new(limits: &Limits, streams: u32) -> Flood {
        let control = i64::try_from(limits.h2_control_frames).unwrap_or(i64::MAX);
        let resets = i64::from(streams).max(1) * RESET;
        Flood {
            head: [0; HEAD],
            head_read: 0,
            left: PREFACE,
            control: Budget::new(control, control),
            resets: Budget::new(resets, (resets / 8).max(1)),
            sent: 0,
            over: false,
        }
    }

    /// Reads on. When there is too much, says after how many of these bytes, which end with a whole frame, it is enough.
    pub fn heard(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.left > 0 {
                let count = self.left.min(bytes.len() - at);
                self.left -= count;
                at += count;
            } else {
                let count = (HEAD - self.head_read).min(bytes.len() - at);
                self.head[self.head_read..self.head_read + count].copy_from_slice(&bytes[at..at + count]);
                self.head_read += count;
                at += count;
                if self.head_read == HEAD {
                    self.head_read = 0;
                    self.frame();
                }
            }
            if self.over && self.left == 0 && self.head_read == 0 {
                return Some(at);
            }
        }
        None
    }

    /// So many bytes were sent to the peer.
    pub fn sent(&mut self, count: usize) {
        self.sent += count as u64;
        if self.sent >= PER_CONTROL_FRAME {
            self.control.earn(i64::try_from(self.sent / PER_CONTROL_FRAME).unwrap_or(i64::MAX));
            self.sent %= PER_CONTROL_FRAME;
        }
    }

    fn frame(&mut self) {
        let [a, b, c, kind, flags, ..] = self.head;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.left = length;
        let enough = match kind {
            // The library bounds small and empty DATA, and CONTINUATION, by itself.
            DATA if length > 0 || flags & END_STREAM != 0 => true,
            CONTINUATION => true,
            HEADERS => {
                self.control.earn(PER_REQUEST);
                self.resets.earn(1);
                true
            }
            RST_STREAM => self.resets.spend(RESET),
            _ => self.control.spend(1),
        };
        self.over |= !enough;
    }
}

/// An amount that is spent, earned, and given back by time, never above where it began.
struct Budget {
    left: i64,
    most: i64,
    per_second: i64,
    /// When it was last looked at. Clocks are read only when it is spent: honest connections pay nothing for this.
    since: Option<Instant>,
}

impl Budget {
    fn new(most: i64, per_second: i64) -> Budget {
        Budget { left: most, most, per_second, since: None }
    }

    fn earn(&mut self, amount: i64) {
        self.left = self.left.saturating_add(amount).min(self.most);
    }

    /// False when there is not so much left.
    fn spend(&mut self, amount: i64) -> bool {
        if self.left < amount {
            let now = Instant::now();
            // The first time begins the count; what came before is what the whole amount was for.
            let since = *self.since.get_or_insert(now);
            let given =
                now.duration_since(since).as_millis().saturating_mul(u128::from(self.per_second.unsigned_abs()));
            let given = i64::try_from(given / 1000).unwrap_or(i64::MAX);
            if given > 0 {
                self.since = Some(now);
                self.earn(given);
            }
        }
        if self.left < amount {
            return false;
        }
        self.left -= amount;
        true
    }
}

/// Frames that no server accepts, and that make the library end the connection with ENHANCE_YOUR_CALM, which it offers
/// no call for: a header block that goes on and on without a byte.
pub fn make_it_calm() -> Vec<u8> {
    const ENDLESS: usize = 1_000;
    let head = |kind| [0, 0, 0, kind, 0, 0, 0, 0, 1];
    let mut frames = head(HEADERS).to_vec();
    for _ in 0..ENDLESS {
        frames.extend_from_slice(&head(CONTINUATION));
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.extend(std::iter::repeat_n(0, length.into()));
        frame
    }

    fn begun() -> Flood {
        let mut flood = Flood::new(&Limits::default(), 100);
        assert_eq!(flood.heard(&[b'P'; PREFACE]), None);
        flood
    }

    /// After how many repetitions it is enough.
    fn repeated(flood: &mut Flood, frames: &[u8], most: usize) -> Option<usize> {
        (0..most).find(|_| flood.heard(frames).is_some())
    }

    #[test]
    fn floods_end_and_honest_traffic_does_not() {
        let ping = frame(PING, 0, 8);
        let request = frame(HEADERS, 5, 40);
        let reset = [request.clone(), frame(RST_STREAM, 0, 4)].concat();
        assert!(repeated(&mut begun(), &ping, 5_000).is_some());
        assert!(repeated(&mut begun(), &frame(0xee, 0, 3), 5_000).is_some());
        assert!(repeated(&mut begun(), &frame(DATA, 0, 0), 5_000).is_some());
        assert!(repeated(&mut begun(), &reset, 1_000).is_some());
        let busy =
            [request.clone(), ping.clone(), ping.clone(), frame(DATA, 0, 200), frame(WINDOW_UPDATE, 0, 4)].concat();
        assert_eq!(repeated(&mut begun(), &busy, 20_000), None);
        let half = [request.clone(), reset].concat();
        assert_eq!(repeated(&mut begun(), &half, 20_000), None, "two requests pay for a reset");
        let mut download = begun();
        let sixteen = frame(WINDOW_UPDATE, 0, 4).repeat(16);
        for _ in 0..10_000 {
            download.sent(16 * 1024);
            assert_eq!(download.heard(&sixteen), None, "bytes pay for their window updates");
        }
    }

    #[test]
    fn the_cut_is_behind_a_whole_frame_wherever_the_pieces_end() {
        let pings = frame(PING, 0, 8).repeat(3_000);
        for piece in [1, 7, 9, 17, 1_000, pings.len()] {
            let mut flood = begun();
            let mut taken = 0;
            let cut = pings.chunks(piece).find_map(|piece| {
                let cut = flood.heard(piece);
                taken += cut.unwrap_or(piece.len());
                cut
            });
            assert!(cut.is_some(), "{piece}");
            assert_eq!(taken % 17, 0, "{piece}");
        }
    }

    #[test]
    fn time_gives_back() {
        let mut budget = Budget::new(1, 1_000);
        assert!(budget.spend(1));
        assert!(!budget.spend(1));
        let begun = Instant::now();
        while begun.elapsed().as_millis() < 3 {
            std::hint::spin_loop();
        }
        assert!(budget.spend(1));
    }
}
