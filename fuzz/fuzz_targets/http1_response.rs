//! An answer's head: the same however its bytes are cut, and what is written of it parses as the same answer.
#![no_main]

use bytes::BytesMut;
use http::Method;
use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::config::Limits;
use outrigger_sidecar::connect::http1::head::{ResponseHead, parse_response, write_response};

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (cut, head_only, bytes) = input;
    let method = if head_only { Method::HEAD } else { Method::GET };
    let limits = Limits { head_bytes: 1024, header_count: 20, ..Limits::default() };
    let whole = parse(&[bytes], &method, &limits);
    let (one, other) = bytes.split_at(usize::from(cut).min(bytes.len()));
    let parts = parse(&[one, other], &method, &limits);
    match (&whole, &parts) {
        (Ok(Some(whole)), Ok(Some(parts))) => {
            assert_eq!(whole.response.status(), parts.response.status());
            assert_eq!(whole.response.headers(), parts.response.headers());
            assert_eq!((whole.length, whole.keep_alive), (parts.length, parts.keep_alive));
        }
        (Ok(None), Ok(None)) | (Err(()), Err(())) => {}
        _ => panic!("cut at {cut} it is not the same: {}", bytes.escape_ascii()),
    }
    let Ok(Some(head)) = whole else { return };
    let old = head.response.version() == http::Version::HTTP_10;
    let mut out = Vec::new();
    write_response(&mut out, old, head.response.status(), head.response.headers(), Some(&head.spelling));
    out.extend_from_slice(b"\r\n");
    let again = parse(&[&out], &method, &Limits::default());
    let Ok(Some(again)) = again else { panic!("{} was written as {}", bytes.escape_ascii(), out.escape_ascii()) };
    assert_eq!(again.response.status(), head.response.status());
    assert_eq!(again.response.headers(), head.response.headers());
    assert_eq!((again.length, again.keep_alive), (head.length, head.keep_alive), "{}", out.escape_ascii());
});

fn parse(parts: &[&[u8]], method: &Method, limits: &Limits) -> Result<Option<ResponseHead>, ()> {
    let (mut received, mut seen) = (BytesMut::new(), 0);
    for part in parts {
        received.extend_from_slice(part);
        if let Some(head) = parse_response(&mut received, &mut seen, method, limits).map_err(|_| ())? {
            return Ok(Some(head));
        }
    }
    Ok(None)
}
