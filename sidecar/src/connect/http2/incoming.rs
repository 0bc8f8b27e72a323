//! A body that is received on an HTTP/2 stream.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, header};
use http_body::{Frame, SizeHint};

pub struct Incoming {
    stream: RecvStream,
    /// What is still to come of a length that was announced. The library holds the peer to it.
    left: Option<u64>,
    /// Bytes of the frame that was handed out last: their window is not given back yet.
    held: usize,
    data_ended: bool,
}

impl Incoming {
    /// The body behind a head with these fields.
    pub fn new(stream: RecvStream, headers: &HeaderMap) -> Incoming {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        Incoming { stream, left: length, held: 0, data_ended: false }
    }

    /// A reset is an error whatever its code, unless the end of the body came before.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        self.release();
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.held = data.len();
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.data_ended = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::trailers)).transpose())
    }

    pub fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    fn release(&mut self) {
        if self.held > 0 {
            // It fails for a stream that has ended, whose bytes count no more.
            let _ = self.stream.flow_control().release_capacity(std::mem::take(&mut self.held));
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // The other half of the stream may live on, and with it what the library has not got back.
        self.release();
    }
}
