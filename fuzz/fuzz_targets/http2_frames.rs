//! HTTP/2 as a client sends it, towards what reads it below the library: it is the same however the bytes are cut, and where
//! a head cannot be followed, nothing behind it is believed. Were it otherwise, the two would no longer read the same
//! heads, and what is behind could be forged.
#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::config::Limits;
use outrigger_sidecar::connect::http2::heads::{Heads, Marks, Sender};
use outrigger_sidecar::protocol::http::flood::Flood;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const TAKEN: u32 = 4096;
const STREAMS: usize = 300;

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    let bytes = [PREFACE, bytes].concat();
    let (whole, marked, begun) = follow(&[&bytes]);
    let (one, other) = bytes.split_at(usize::from(cut).min(bytes.len()));
    assert_eq!(follow(&[one, other]), (whole, marked, begun), "cut at {cut}: {bytes:x?}");
    // None that time gives back between the two: none at all, or more than is ever spent.
    for control_frames in [0, 1 << 40] {
        let limits = Limits { h2_control_frames: control_frames, ..Limits::default() };
        let (mut at_once, mut cut_up) = (Flood::new(&limits, 100_000, 20_000), Flood::new(&limits, 100_000, 20_000));
        let enough = at_once.heard(&bytes, 0);
        let in_parts = cut_up.heard(one, 0).or_else(|| cut_up.heard(other, 0).map(|at| one.len() + at));
        assert_eq!(enough, in_parts);
    }
    // An answer's side reads other rules, and must not break either.
    let mut answers = Heads::new(Sender::Server, TAKEN as usize, Marks::new(TAKEN));
    answers.heard(&bytes[PREFACE.len()..]);
    let taken = library(&bytes);
    assert!(!whole || taken <= begun, "the library has {taken} requests of {begun}: {bytes:x?}");
    assert!(whole || marked == STREAMS, "believed: {bytes:x?}");
});

/// Whether all of it was followed, how many streams are marked, how many requests there are.
fn follow(parts: &[&[u8]]) -> (bool, usize, usize) {
    let marks = Marks::new(TAKEN);
    let mut heads = Heads::new(Sender::Client, TAKEN as usize, marks.clone());
    let followed = parts.iter().all(|part| heads.heard(part));
    marks.set_drained(true);
    let marked = (0..STREAMS).filter(|stream| marks.take(u32::try_from(*stream).unwrap_or(0)).is_some()).count();
    (followed, marked, marks.refused())
}

/// How many requests the library gives out.
fn library(bytes: &[u8]) -> usize {
    let cx = &mut Context::from_waker(Waker::noop());
    let io = Sent { bytes: bytes.to_vec(), at: 0 };
    let mut handshake = std::pin::pin!(h2::server::Builder::new().max_header_list_size(TAKEN).handshake::<_, Bytes>(io));
    let Poll::Ready(Ok(mut connection)) = handshake.as_mut().poll(cx) else { return 0 };
    let mut taken = Vec::new();
    loop {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok(request))) => taken.push(request),
            Poll::Ready(None | Some(Err(_))) | Poll::Pending => return taken.len(),
        }
    }
}

/// What was sent, and then nothing for ever.
struct Sent {
    bytes: Vec<u8>,
    at: usize,
}

impl AsyncRead for Sent {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return Poll::Pending;
        }
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        self.at += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Sent {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
