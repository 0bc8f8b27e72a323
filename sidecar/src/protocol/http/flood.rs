//! Watches the frames that a downstream HTTP/2 connection sends, below the library, for floods that the library does
//! not see: resets of requests that were already taken up (rapid reset at a pace), and control frames without end.
//! Called by `downstream_io` with every piece that is read. It parses frame heads only, and how much padding a DATA frame
//! has, and never changes a byte.
//!
//! Three allowances, each of which time gives back: one for control frames, two for resets. What a busy and honest
//! connection does earns more than it costs: a request pays for its own flow control and pings, bytes that are sent pay
//! for the window updates that let them go, two requests pay for one reset. A reset soon after its request is what a
//! flood is made of, and has the small allowance; a client may end all its long streams at once.
//!
//! Payload costs nothing, in however small pieces it comes and for however long: windows and the library's budget for small
//! frames hold the client to what the upstream takes. Padding is not payload: no window holds it back, because the library
//! gives its part of the window back at once.

use crate::config::limits::Limits;
use crate::connect::http2::Allowance;

const PREFACE: usize = 24;
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;

/// What a request earns for the control frames around it.
const PER_REQUEST: i64 = 4;
/// What a DATA frame costs that has more padding than payload: a request may have one for nothing.
const PADDING: i64 = PER_REQUEST;
/// So many bytes sent pay for one control frame: nobody updates windows more often than that for a reason.
const PER_CONTROL_FRAME: u64 = 512;
/// Resets are counted in halves, so that one request pays for half a reset.
const RESET: i64 = 2;

pub struct Flood {
    /// The head of a frame, as far as it was read, and behind it the length of its padding, of a DATA frame that has some.
    head: [u8; HEAD + 1],
    head_read: usize,
    /// Bytes of the preface or of the current frame that are still to come.
    left: usize,
    control: Allowance,
    /// Resets of streams that are younger than a second.
    early_resets: Allowance,
    resets: Allowance,
    ages: Ages,
    sent: u64,
    /// An allowance is spent; the stream of frames ends behind the current frame.
    over: bool,
}

/// Which streams are no longer young, by the coarse clock of the connection table.
#[derive(Default)]
struct Ages {
    /// The newest stream.
    newest: u32,
    /// The newest stream when `marked_at` was taken.
    at_mark: u32,
    marked_at: u64,
    /// Streams up to this one are at least a second old.
    old: u32,
}

impl Ages {
    const YOUNG: u64 = 1_000;

    fn at(&mut self, now: u64) {
        let passed = now.saturating_sub(self.marked_at);
        if passed >= Ages::YOUNG {
            // What came after the mark came within a second of it.
            self.old = if passed >= 2 * Ages::YOUNG { self.newest } else { self.at_mark };
            self.at_mark = self.newest;
            self.marked_at = now;
        }
    }
}

impl Flood {
    /// For a connection on which at most `streams` requests run at once, of which `early_resets` may be reset within a
    /// second.
    pub fn new(limits: &Limits, streams: u32, early_resets: u32) -> Flood {
        let control = i64::try_from(limits.h2_control_frames).unwrap_or(i64::MAX);
        Flood {
            head: [0; HEAD + 1],
            head_read: 0,
            left: PREFACE,
            control: Allowance::new(control, control),
            early_resets: resets(early_resets),
            resets: resets(streams),
            ages: Ages::default(),
            sent: 0,
            over: false,
        }
    }

    /// Reads on; `now` is the connection table's clock. When there is too much, says after how many of these bytes, which
    /// end with a whole frame, it is enough.
    pub fn heard(&mut self, bytes: &[u8], now: u64) -> Option<usize> {
        self.ages.at(now);
        let mut at = 0;
        while at < bytes.len() {
            if self.left > 0 {
                let count = self.left.min(bytes.len() - at);
                self.left -= count;
                at += count;
            } else {
                let count = (self.head_length() - self.head_read).min(bytes.len() - at);
                self.head[self.head_read..self.head_read + count].copy_from_slice(&bytes[at..at + count]);
                self.head_read += count;
                at += count;
                let head = self.head_length();
                if self.head_read == head {
                    self.head_read = 0;
                    self.frame(head);
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

    /// How much is read of a frame before it is known what it is.
    fn head_length(&self) -> usize {
        let [a, b, c, kind, flags, ..] = self.head;
        let padded = self.head_read >= HEAD && kind == DATA && flags & PADDED != 0 && [a, b, c] != [0; 3];
        HEAD + usize::from(padded)
    }

    fn frame(&mut self, head: usize) {
        let [a, b, c, kind, flags, stream @ .., padding] = self.head;
        let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.left = length - (head - HEAD);
        let padding = if head > HEAD { usize::from(padding) } else { 0 };
        let enough = match kind {
            DATA if padding > self.left.saturating_sub(padding) => self.control.spend(PADDING),
            // The library bounds small and empty DATA, and CONTINUATION, by itself.
            DATA if length > 0 || flags & END_STREAM != 0 => true,
            CONTINUATION => true,
            HEADERS => {
                self.control.earn(PER_REQUEST);
                self.early_resets.earn(1);
                self.resets.earn(1);
                self.ages.newest = self.ages.newest.max(stream);
                true
            }
            RST_STREAM if stream > self.ages.old => self.early_resets.spend(RESET) && self.resets.spend(RESET),
            RST_STREAM => self.resets.spend(RESET),
            _ => self.control.spend(1),
        };
        self.over |= !enough;
    }
}

/// What a peer may reset that may have so many streams.
fn resets(streams: u32) -> Allowance {
    let resets = i64::from(streams).max(1) * RESET;
    Allowance::new(resets, (resets / 8).max(1))
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
        let mut flood = Flood::new(&Limits::default(), 1_000, 100);
        assert_eq!(flood.heard(&[b'P'; PREFACE], 0), None);
        flood
    }

    /// After how many repetitions it is enough.
    fn repeated(flood: &mut Flood, frames: &[u8], most: usize) -> Option<usize> {
        (0..most).find(|_| flood.heard(frames, 0).is_some())
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
            assert_eq!(download.heard(&sixteen, 0), None, "bytes pay for their window updates");
        }
    }

    #[test]
    fn the_cut_is_behind_a_whole_frame_wherever_the_pieces_end() {
        let pings = frame(PING, 0, 8).repeat(3_000);
        for piece in [1, 7, 9, 17, 1_000, pings.len()] {
            let mut flood = begun();
            let mut taken = 0;
            let cut = pings.chunks(piece).find_map(|piece| {
                let cut = flood.heard(piece, 0);
                taken += cut.unwrap_or(piece.len());
                cut
            });
            assert!(cut.is_some(), "{piece}");
            assert_eq!(taken % 17, 0, "{piece}");
        }
    }

    #[test]
    fn payload_is_free_in_any_pieces_and_padding_is_not() {
        // Padding, payload, whether it goes on for ever.
        let cases = [
            (None, 1, true),
            (None, 100, true),
            (Some(0), 1, true),
            (Some(1), 1, true),
            (Some(100), 100, true),
            (Some(250), 1, false),
            (Some(2), 1, false),
            (Some(1), 0, false),
            (Some(3), 0, false),
        ];
        for (padding, payload, goes_on) in cases {
            let data = match padding {
                None => frame(DATA, 0, payload),
                Some(padding) => {
                    let mut data = frame(DATA, PADDED, 1 + payload + padding);
                    data[HEAD] = padding;
                    data
                }
            };
            for piece in [1, 8, HEAD, HEAD + 1, 1_000] {
                let mut flood = begun();
                let mut all = std::iter::repeat_n(&data, 5_000);
                let over = all.any(|data| data.chunks(piece).any(|piece| flood.heard(piece, 0).is_some()));
                assert_eq!(over, !goes_on, "{padding:?}, {payload}, in pieces of {piece}");
            }
        }
        let padded =
            [frame(HEADERS, 4, 40), vec![0, 0, 9, DATA, PADDED | END_STREAM, 0, 0, 0, 1, 8], vec![0; 8]].concat();
        assert_eq!(repeated(&mut begun(), &padded, 20_000), None, "one for each request");
    }

    fn framed(kind: u8, flags: u8, stream: u32) -> Vec<u8> {
        let mut frame = vec![0, 0, 0, kind, flags];
        frame.extend(stream.to_be_bytes());
        frame
    }

    #[test]
    fn long_streams_may_all_end_at_once_and_young_ones_may_not() {
        for (opened, reset, ended) in
            [(0, 0, true), (0, 999, true), (5_000, 5_900, true), (5_000, 7_100, false), (5_999, 9_000, false)]
        {
            let mut flood = begun();
            let streams = || (0..900_u32).map(|number| 2 * number + 1);
            for stream in streams() {
                assert_eq!(flood.heard(&framed(HEADERS, END_STREAM, stream), opened), None);
            }
            let over = streams().any(|stream| flood.heard(&framed(RST_STREAM, 0, stream), reset).is_some());
            assert_eq!(over, ended, "opened at {opened}, reset at {reset}");
        }
    }
}
