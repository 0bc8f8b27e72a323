//! A request's head: it parses or not, however its bytes are cut, and what is written of it parses as the same request.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::config::Limits;
use outrigger_sidecar::connect::http1::head::{RequestHead, parse_request, write_request};

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    // How many empty lines are forgiven is counted anew at each look; the time for a head bounds them.
    if bytes.starts_with(&b"\r\n".repeat(8)) {
        return;
    }
    let limits = Limits { head_bytes: 1024, target_bytes: 256, header_count: 20, ..Limits::default() };
    let whole = parse(&[bytes], &limits);
    let (one, other) = bytes.split_at(usize::from(cut).min(bytes.len()));
    let parts = parse(&[one, other], &limits);
    match (&whole, &parts) {
        (Ok(Some(whole)), Ok(Some(parts))) => assert!(same(whole, parts), "{}", bytes.escape_ascii()),
        (Ok(None), Ok(None)) | (Err(()), Err(())) => {}
        _ => panic!("cut at {cut} it is not the same: {}", bytes.escape_ascii()),
    }
    let Ok(Some(head)) = whole else { return };
    // What has no path is put into origin form, or refused, before it is written.
    if !head.request.uri().path_and_query().is_none_or(|path| path.as_str().starts_with(['/', '*'])) {
        return;
    }
    for spelling in [None, Some(&head.spelling)] {
        let mut out = Vec::new();
        write_request(&mut out, &head.request, spelling);
        out.extend_from_slice(b"\r\n");
        let again = parse(&[&out], &Limits::default());
        let Ok(Some(again)) = again else { panic!("{} was written as {}", bytes.escape_ascii(), out.escape_ascii()) };
        assert_eq!(again.request.method(), head.request.method());
        assert_eq!(again.request.headers(), head.request.headers());
        if head.request.version() == again.request.version() {
            assert_eq!((again.length, again.keep_alive), (head.length, head.keep_alive), "{}", out.escape_ascii());
        }
    }
});

fn parse(parts: &[&[u8]], limits: &Limits) -> Result<Option<RequestHead>, ()> {
    let (mut received, mut seen) = (BytesMut::new(), 0);
    for part in parts {
        received.extend_from_slice(part);
        if let Some(head) = parse_request(&mut received, &mut seen, limits).map_err(|_| ())? {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

fn same(one: &RequestHead, other: &RequestHead) -> bool {
    let of = |head: &RequestHead| (head.length, head.keep_alive, head.request.uri().clone(), head.request.version());
    of(one) == of(other)
        && one.request.method() == other.request.method()
        && one.request.headers() == other.request.headers()
}
