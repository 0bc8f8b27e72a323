//! Trace context of a request: what is written names the trace that was read, and is read as the same again.
#![no_main]

use http::header::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::telemetry::context::{Ids, Incoming};

const NAMES: [&str; 8] = [
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
];

fuzz_target!(|input: (u64, bool, Vec<(u8, &[u8])>)| {
    let (span, sampled, fields) = input;
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        let name = NAMES[usize::from(name) % NAMES.len()];
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(HeaderName::from_static(name), value);
        }
    }
    let incoming = Incoming::read(&headers);
    let trace = Incoming::trace_id(&headers);
    assert!(trace == 0 || incoming.ids.is_some_and(|ids| ids.trace == trace), "{headers:?}");
    assert!(incoming.ids.is_none_or(|ids| ids.trace != 0 && ids.span != 0), "{headers:?}");
    let ids = Ids { trace: incoming.ids.map_or(1, |ids| ids.trace), span: span.max(1) };
    let mut written = headers.clone();
    if sampled {
        incoming.write_sampled(&mut written, ids);
    } else {
        incoming.write_unsampled(&mut written, ids);
    }
    let again = Incoming::read(&written);
    let expected = if sampled || incoming.ids.is_none() || !incoming.traceparent { Some(ids) } else { incoming.ids };
    assert_eq!(again.ids, expected, "{headers:?} became {written:?}");
    if sampled || !incoming.traceparent {
        assert_eq!(again.sampled, Some(sampled), "{headers:?} became {written:?}");
    }
    let kept = written.contains_key("tracestate");
    assert!(!kept || incoming.traceparent, "a tracestate without its traceparent: {written:?}");
});
