//! Counts gRPC messages in a body of length-prefixed frames (one flag byte, four length bytes, the message), chunk by
//! chunk. Called by the data path for each DATA chunk of either direction. It never copies, buffers or judges bytes.

/// The state between two chunks: eight bytes, no heap.
#[derive(Clone, Copy, Default, Debug)]
pub struct GrpcFrames {
    /// Bytes of the current message that are still to come.
    remaining: u32,
    /// How many of the five prefix bytes are there; 0 between messages.
    prefix: u8,
    /// True while the bytes of a message are awaited.
    in_message: bool,
}

const PREFIX: u8 = 5;

impl GrpcFrames {
    pub const fn new() -> GrpcFrames {
        GrpcFrames { remaining: 0, prefix: 0, in_message: false }
    }

    /// Takes the next chunk and returns how many messages ended in it.
    pub fn feed(&mut self, mut chunk: &[u8]) -> u64 {
        let mut ended = 0;
        while !chunk.is_empty() {
            chunk = if self.in_message { self.take_message(chunk) } else { self.take_prefix(chunk) };
            if self.in_message && self.remaining == 0 {
                ended += 1;
                *self = GrpcFrames::new();
            }
        }
        ended
    }

    fn take_message<'c>(&mut self, chunk: &'c [u8]) -> &'c [u8] {
        let taken = chunk.len().min(self.remaining as usize);
        self.remaining -= taken as u32;
        &chunk[taken..]
    }

    fn take_prefix<'c>(&mut self, chunk: &'c [u8]) -> &'c [u8] {
        let taken = chunk.len().min((PREFIX - self.prefix) as usize);
        for byte in &chunk[..taken] {
            // The first byte is the compression flag; the four behind it are the length, big endian.
            if self.prefix > 0 {
                self.remaining = (self.remaining << 8) | u32::from(*byte);
            }
            self.prefix += 1;
        }
        self.in_message = self.prefix == PREFIX;
        &chunk[taken..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((length as u32).to_be_bytes());
        bytes.extend(std::iter::repeat_n(0x2a, length));
        bytes
    }

    #[test]
    fn any_chunk_size_counts_the_same() {
        let body: Vec<u8> = [0, 1, 5, 300, 0, 0, 70_000, 4].iter().flat_map(|length| message(*length)).collect();
        for size in [1, 2, 3, 4, 5, 6, 7, 255, 16_384, body.len()] {
            let mut frames = GrpcFrames::new();
            let count: u64 = body.chunks(size).map(|chunk| frames.feed(chunk)).sum();
            assert_eq!(count, 8, "chunks of {size}");
        }
    }

    #[test]
    fn an_unfinished_message_is_not_counted() {
        let mut frames = GrpcFrames::new();
        assert_eq!(frames.feed(&[]), 0);
        assert_eq!(frames.feed(&[0, 0, 0, 0]), 0);
        assert_eq!(frames.feed(&[2]), 0);
        assert_eq!(frames.feed(&[9]), 0);
        assert_eq!(frames.feed(&[9, 0, 0, 0, 0, 0]), 2);
    }

    #[test]
    fn the_largest_length_does_not_overflow() {
        let mut frames = GrpcFrames::new();
        assert_eq!(frames.feed(&[1, 0xff, 0xff, 0xff, 0xff]), 0);
        assert_eq!(frames.feed(&[0; 1 << 16]), 0);
        assert_eq!(frames.remaining, u32::MAX - (1 << 16));
    }
}
