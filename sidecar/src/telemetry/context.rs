//! Trace context in headers: W3C traceparent and tracestate, B3 single and B3 multi. The records read it and write it
//! back when tracing is on; when it is off nothing here runs. In order of trust: traceparent, `b3`, `x-b3-*`; a value
//! that breaks its grammar counts as absent, and a trace is then started anew.

use http::header::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Sampled and random: the flags of version 00 that pass on.
const KNOWN_FLAGS: u8 = 0b11;
const SAMPLED: u8 = 0b01;

/// A trace and a span in it; neither is zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ids {
    pub trace: u128,
    pub span: u64,
}

/// What a request's headers say about its trace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Incoming {
    pub ids: Option<Ids>,
    /// None: whoever goes on decides.
    pub sampled: Option<bool>,
    /// The flags of a valid traceparent.
    flags: u8,
    /// True when ids and flags stand in a valid traceparent already.
    pub traceparent: bool,
    b3_single: bool,
    b3_multi: bool,
    /// B3 came with a trace id of 64 bits and is written so.
    short_trace_id: bool,
}

impl Incoming {
    pub fn read(headers: &HeaderMap) -> Incoming {
        let w3c = single(headers, &TRACEPARENT).and_then(parse_traceparent);
        let b3_single = single(headers, &B3).and_then(parse_b3);
        let b3_multi = read_b3_multi(headers);
        let formats = Incoming {
            traceparent: w3c.is_some(),
            b3_single: b3_single.is_some(),
            b3_multi: b3_multi.is_some(),
            short_trace_id: [&b3_single, &b3_multi].into_iter().flatten().any(|b3| b3.short),
            ..Incoming::default()
        };
        if let Some((ids, flags)) = w3c {
            return Incoming { ids: Some(ids), sampled: Some(flags & SAMPLED != 0), flags, ..formats };
        }
        match b3_single.or(b3_multi) {
            Some(b3) => Incoming { ids: b3.ids, sampled: b3.sampled, ..formats },
            None => formats,
        }
    }

    /// The trace id alone, for a log line when no spans are made; 0 without one.
    pub fn trace_id(headers: &HeaderMap) -> u128 {
        // One walk costs less than a search, and mostly there is none.
        if !headers.keys().any(|name| *name == TRACEPARENT) {
            return 0;
        }
        single(headers, &TRACEPARENT).and_then(parse_traceparent).map_or(0, |(ids, _)| ids.trace)
    }

    /// Says that the trace is not sampled, where that is not said already; what came in stays as it is.
    pub fn write_unsampled(&self, headers: &mut HeaderMap, ids: Ids) {
        if self.traceparent {
            return;
        }
        set(headers, TRACEPARENT, &traceparent(ids, 0));
        drop_orphaned_tracestate(headers);
        if self.sampled.is_some() {
            return;
        }
        if self.b3_single {
            let trace = self.b3_trace_id(ids.trace);
            set(headers, B3, format!("{trace}-{:016x}-0", ids.span).as_bytes());
        }
        if self.b3_multi {
            set(headers, B3_SAMPLED, b"0");
        }
    }

    /// Writes a sampled span as traceparent and in the B3 formats that came in.
    pub fn write_sampled(&self, headers: &mut HeaderMap, span: Ids) {
        set(headers, TRACEPARENT, &traceparent(span, (self.flags & KNOWN_FLAGS) | SAMPLED));
        if !self.traceparent {
            drop_orphaned_tracestate(headers);
        }
        if !self.b3_single && !self.b3_multi {
            return;
        }
        let trace = self.b3_trace_id(span.trace);
        let parent = self.ids.map(|ids| ids.span);
        if self.b3_single {
            let parent = parent.map(|parent| format!("-{parent:016x}")).unwrap_or_default();
            set(headers, B3, format!("{trace}-{:016x}-1{parent}", span.span).as_bytes());
        }
        if self.b3_multi {
            set(headers, B3_TRACE, trace.as_bytes());
            set(headers, B3_SPAN, format!("{:016x}", span.span).as_bytes());
            match parent {
                Some(parent) => set(headers, B3_PARENT, format!("{parent:016x}").as_bytes()),
                None => drop(headers.remove(&B3_PARENT)),
            }
            // The debug flag says sampled by itself and stays as it came.
            if !headers.contains_key(&B3_FLAGS) {
                set(headers, B3_SAMPLED, b"1");
            }
        }
    }

    fn b3_trace_id(&self, trace: u128) -> String {
        if self.short_trace_id { format!("{:016x}", trace as u64) } else { format!("{trace:032x}") }
    }
}

/// A tracestate that belongs to no valid traceparent goes (W3C Trace Context section 3.2).
fn drop_orphaned_tracestate(headers: &mut HeaderMap) {
    if headers.contains_key(&TRACESTATE) {
        headers.remove(&TRACESTATE);
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &[u8]) {
    if let Ok(value) = HeaderValue::from_bytes(value) {
        headers.insert(name, value);
    }
}

/// The value of a field that may stand there once; twice is as bad as malformed.
fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h [u8]> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    if values.next().is_some() { None } else { Some(first.as_bytes()) }
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, and what later versions append behind another dash.
fn parse_traceparent(value: &[u8]) -> Option<(Ids, u8)> {
    if value.len() < 55 || [value[2], value[35], value[52]] != [b'-'; 3] {
        return None;
    }
    let version = hex(&value[..2], Case::Lower)?;
    let whole = match version {
        0 => value.len() == 55,
        0xff => false,
        _ => value.len() == 55 || value[55] == b'-',
    };
    let trace = hex(&value[3..35], Case::Lower)?;
    let span = hex(&value[36..52], Case::Lower)? as u64;
    let flags = hex(&value[53..55], Case::Lower)? as u8;
    (whole && trace != 0 && span != 0).then_some((Ids { trace, span }, flags))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct B3Context {
    ids: Option<Ids>,
    sampled: Option<bool>,
    short: bool,
}

/// `<trace>-<span>[-<state>[-<parent>]]`, or the state alone.
fn parse_b3(value: &[u8]) -> Option<B3Context> {
    if let [state] = value {
        return Some(B3Context { ids: None, sampled: Some(b3_state(&[*state])?), short: false });
    }
    let mut parts = value.split(|byte| *byte == b'-');
    let (trace, span, state, parent) = (parts.next()?, parts.next()?, parts.next(), parts.next());
    if parts.next().is_some() || parent.is_some_and(|parent| b3_id(parent, &[16]).is_none()) {
        return None;
    }
    let sampled = match state {
        Some(state) => Some(b3_state(state)?),
        None => None,
    };
    Some(B3Context { ids: Some(b3_ids(trace, span)?), sampled, short: trace.len() == 16 })
}

fn read_b3_multi(headers: &HeaderMap) -> Option<B3Context> {
    let debug = single(headers, &B3_FLAGS) == Some(b"1");
    let sampled = match single(headers, &B3_SAMPLED) {
        _ if debug => Some(true),
        Some(b"true") => Some(true),
        Some(b"false") => Some(false),
        Some(state) => Some(b3_state(state)?),
        None => None,
    };
    let trace = single(headers, &B3_TRACE);
    let ids = match (trace, single(headers, &B3_SPAN)) {
        (Some(trace), Some(span)) => Some(b3_ids(trace, span)?),
        (None, None) => None,
        _ => return None,
    };
    let found = ids.is_some() || sampled.is_some();
    found.then_some(B3Context { ids, sampled, short: trace.is_some_and(|trace| trace.len() == 16) })
}

fn b3_ids(trace: &[u8], span: &[u8]) -> Option<Ids> {
    Some(Ids { trace: b3_id(trace, &[16, 32])?, span: b3_id(span, &[16])? as u64 })
}

fn b3_id(text: &[u8], lengths: &[usize]) -> Option<u128> {
    let id = if lengths.contains(&text.len()) { hex(text, Case::Any)? } else { 0 };
    (id != 0).then_some(id)
}

fn b3_state(state: &[u8]) -> Option<bool> {
    match state {
        b"0" => Some(false),
        b"1" | b"d" => Some(true),
        _ => None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    /// W3C takes lower case only.
    Lower,
    Any,
}

fn hex(text: &[u8], case: Case) -> Option<u128> {
    let mut value = 0u128;
    for byte in text {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' if case == Case::Any => byte - b'A' + 10,
            _ => return None,
        };
        value = (value << 4) | u128::from(digit);
    }
    Some(value)
}

fn traceparent(ids: Ids, flags: u8) -> [u8; 55] {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    write_hex(&mut text[3..35], ids.trace);
    write_hex(&mut text[36..52], u128::from(ids.span));
    write_hex(&mut text[53..55], u128::from(flags));
    text
}

fn write_hex(text: &mut [u8], mut value: u128) {
    for byte in text.iter_mut().rev() {
        *byte = b"0123456789abcdef"[(value & 0xf) as usize];
        value >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x4bf92f3577b34da6a3ce929d0e0e4736;
    const SPAN: u64 = 0x00f067aa0ba902b7;
    const W3C: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const B3_VALUE: &str = "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90";

    type Fields<'f> = &'f [(&'f str, &'f str)];

    fn headers(fields: Fields) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        map
    }

    fn fields(map: &HeaderMap) -> Vec<(String, String)> {
        let mut fields: Vec<_> =
            map.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        fields.sort();
        fields
    }

    #[test]
    fn traceparents_are_parsed_strictly() {
        let ids = Ids { trace: TRACE, span: SPAN };
        for (value, expected) in [
            (W3C, Some((ids, 1))),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", Some((ids, 0))),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03", Some((ids, 3))),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Some((ids, 1))),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future", Some((ids, 1))),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.what", None),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra", None),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ", None),
            ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
            ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", None),
            ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", None),
            ("00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-011", None),
            ("00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x", None),
            ("", None),
            ("00", None),
        ] {
            assert_eq!(parse_traceparent(value.as_bytes()), expected, "{value:?}");
        }
    }

    #[test]
    fn b3_is_parsed_in_every_spelling() {
        let long = Ids { trace: 0x80f198ee56343ba864fe8b2a57d3eff7, span: 0xe457b5a2e4d86bd1 };
        let short = Ids { trace: 0x64fe8b2a57d3eff7, span: 0xe457b5a2e4d86bd1 };
        for (value, expected) in [
            (B3_VALUE, Some((Some(long), Some(true), false))),
            ("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1", Some((Some(long), None, false))),
            ("80F198EE56343BA864FE8B2A57D3EFF7-e457b5a2e4d86bd1-d", Some((Some(long), Some(true), false))),
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1-0", Some((Some(short), Some(false), true))),
            ("0", Some((None, Some(false), false))),
            ("1", Some((None, Some(true), false))),
            ("d", Some((None, Some(true), false))),
            ("x", None),
            ("", None),
            ("-", None),
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1-2", None),
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90-1", None),
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1-1-xyz", None),
            ("64fe8b2a57d3ef-e457b5a2e4d86bd1-1", None),
            ("0000000000000000-e457b5a2e4d86bd1-1", None),
        ] {
            let expected = expected.map(|(ids, sampled, short)| B3Context { ids, sampled, short });
            assert_eq!(parse_b3(value.as_bytes()), expected, "{value:?}");
        }
    }

    #[test]
    fn the_order_of_trust_is_traceparent_then_b3_then_the_many() {
        let single = ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-0");
        let multi = [
            ("x-b3-traceid", "463ac35c9f6413ad48485a3953bb6124"),
            ("x-b3-spanid", "a2fb4a1d1a96d312"),
            ("x-b3-sampled", "1"),
        ];
        let all = [&[("traceparent", W3C), single][..], &multi].concat();
        let read = |fields: &[(&str, &str)]| {
            let incoming = Incoming::read(&headers(fields));
            (incoming.ids.map(|ids| ids.trace), incoming.sampled)
        };
        assert_eq!(read(&all), (Some(TRACE), Some(true)));
        assert_eq!(read(&all[1..]), (Some(0x80f198ee56343ba864fe8b2a57d3eff7), Some(false)));
        assert_eq!(read(&all[2..]), (Some(0x463ac35c9f6413ad48485a3953bb6124), Some(true)));
        assert_eq!(read(&[]), (None, None));
        let bad = [&[("traceparent", "00-zz")][..], &all[1..2]].concat();
        assert_eq!(read(&bad), (Some(0x80f198ee56343ba864fe8b2a57d3eff7), Some(false)));
        assert_eq!(read(&[("traceparent", W3C), ("traceparent", W3C)]), (None, None));
        assert_eq!(read(&[("x-b3-flags", "1")]), (None, Some(true)));
        assert_eq!(read(&[("x-b3-sampled", "false")]), (None, Some(false)));
        assert_eq!(read(&multi[..1]), (None, None));
    }

    #[test]
    fn what_came_in_goes_out_and_traceparent_always() {
        let ids = Ids { trace: TRACE, span: 0xabc };
        let outgoing = "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-01";
        let cases: [(Fields, Fields); 5] = [
            (&[], &[("traceparent", outgoing)]),
            (
                &[("traceparent", W3C), ("tracestate", "a=1,b=2")],
                &[("traceparent", outgoing), ("tracestate", "a=1,b=2")],
            ),
            (&[("traceparent", "bad"), ("tracestate", "a=1")], &[("traceparent", outgoing)]),
            (
                &[("b3", "a3ce929d0e0e4736-e457b5a2e4d86bd1-1")],
                &[("b3", "a3ce929d0e0e4736-0000000000000abc-1-e457b5a2e4d86bd1"), ("traceparent", outgoing)],
            ),
            (
                &[
                    ("x-b3-traceid", "4bf92f3577b34da6a3ce929d0e0e4736"),
                    ("x-b3-spanid", "e457b5a2e4d86bd1"),
                    ("x-b3-parentspanid", "05e3ac9a4f6e3b90"),
                    ("x-b3-sampled", "1"),
                ],
                &[
                    ("traceparent", outgoing),
                    ("x-b3-parentspanid", "e457b5a2e4d86bd1"),
                    ("x-b3-sampled", "1"),
                    ("x-b3-spanid", "0000000000000abc"),
                    ("x-b3-traceid", "4bf92f3577b34da6a3ce929d0e0e4736"),
                ],
            ),
        ];
        for (came, went) in cases {
            let mut map = headers(came);
            Incoming::read(&map).write_sampled(&mut map, ids);
            let went: Vec<_> = went.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            assert_eq!(fields(&map), went);
        }
    }

    #[test]
    fn an_unsampled_trace_passes_unchanged_and_a_new_one_is_flagged() {
        let ids = Ids { trace: TRACE, span: 0xabc };
        let started = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-00");
        let unsampled = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");
        let b3 = ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-0-05e3ac9a4f6e3b90");
        let cases: [(Fields, Fields); 6] = [
            (&[], &[started]),
            (&[unsampled, ("tracestate", "a=1")], &[unsampled, ("tracestate", "a=1")]),
            (&[("traceparent", "bad"), ("tracestate", "a=1")], &[started]),
            (&[b3], &[b3, started]),
            (&[("b3", "0")], &[("b3", "0"), started]),
            (
                &[("b3", "4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc")],
                &[("b3", "4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-0"), started],
            ),
        ];
        for (came, went) in cases {
            let mut map = headers(came);
            Incoming::read(&map).write_unsampled(&mut map, ids);
            let went: Vec<_> = went.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            assert_eq!(fields(&map), went);
        }
    }

    #[test]
    fn the_random_flag_passes_and_unknown_flags_do_not() {
        for (came, went) in [("03", "03"), ("02", "03"), ("ff", "03"), ("01", "01")] {
            let mut map = headers(&[("traceparent", &format!("{}{came}", &W3C[..53]))]);
            let ids = Ids { trace: TRACE, span: SPAN };
            Incoming::read(&map).write_sampled(&mut map, ids);
            assert_eq!(map["traceparent"].to_str().unwrap(), format!("{}{went}", &W3C[..53]));
        }
    }
}
