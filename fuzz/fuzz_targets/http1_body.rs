//! A chunked body: the same bytes, the same trailers and the same end, however it is cut; and an answer's is a request's but
//! for blanks behind the names of trailers.
#![no_main]

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::config::Limits;
use outrigger_sidecar::connect::http1::body::Decoded;
use outrigger_sidecar::connect::http1::{Decoder, Length};

#[derive(PartialEq, Eq, Debug)]
enum End {
    Ended(Option<HeaderMap>),
    Incomplete,
    Wrong,
}

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (piece, of_answer, bytes) = input;
    let limits = Limits { chunk_extension_bytes: 40, trailer_bytes: 80, header_count: 4, ..Limits::default() };
    let whole = decode(bytes.chunks(bytes.len().max(1)), of_answer, &limits);
    let parts = decode(bytes.chunks(usize::from(piece).max(1)), of_answer, &limits);
    assert_eq!(whole, parts, "{}", bytes.escape_ascii());
    let strict = decode(bytes.chunks(bytes.len().max(1)), false, &limits);
    if strict.1 != End::Wrong {
        assert_eq!(whole, strict, "{}", bytes.escape_ascii());
    }
});

/// What is in it, how it ended, and what is left behind it when it did.
fn decode<'b>(pieces: impl Iterator<Item = &'b [u8]>, of_answer: bool, limits: &Limits) -> (Vec<u8>, End, Bytes) {
    let mut decoder = Decoder::new(Length::Chunked, limits);
    if of_answer {
        decoder = decoder.of_answer();
    }
    let (mut received, mut data, mut trailers) = (BytesMut::new(), Vec::new(), None);
    let mut end = End::Incomplete;
    for piece in pieces {
        received.extend_from_slice(piece);
        while end == End::Incomplete {
            match decoder.decode(&mut received) {
                Ok(Decoded::Data(bytes)) => data.extend_from_slice(&bytes),
                Ok(Decoded::Trailers(fields)) => trailers = Some(fields),
                Ok(Decoded::Incomplete) => break,
                Ok(Decoded::Ended) => end = End::Ended(trailers.take()),
                Err(_) => end = End::Wrong,
            }
        }
    }
    let rest = if matches!(end, End::Ended(_)) { received.freeze() } else { Bytes::new() };
    (data, end, rest)
}
