//! Frames that RFC 9113 forbids and heads that would become something else on an HTTP/1 hop: the stream or the
//! connection ends, nothing of it reaches the application, and the next connection works.

use crate::field::{Field, PLACES};
use crate::frames::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ends {
    Connection,
    /// At least this stream.
    Stream(u32),
    /// Nothing happens, a request behind it is answered.
    Nothing,
}

fn open(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, request("POST", "/echo"))
}

fn head(flags: u8, stream: u32, block: impl AsRef<[u8]>) -> Vec<u8> {
    frame(HEADERS, flags, stream, block)
}

/// A frame whose length says more than fits.
fn oversized(kind: u8, stream: u32) -> Vec<u8> {
    frame(kind, 0, stream, vec![0; 16 * 1024 + 1])
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_be_bytes()).collect()
}

fn invalid_frames() -> Vec<(&'static str, Vec<u8>, Ends)> {
    use Ends::{Connection, Nothing, Stream};
    let whole = END_STREAM | END_HEADERS;
    let fine = request("GET", "/invalid");
    vec![
        // DATA, section 6.1
        ("DATA on stream 0", frame(DATA, 0, 0, b"x"), Connection),
        ("DATA on an idle stream", frame(DATA, 0, 1, b"x"), Connection),
        ("DATA with more padding than payload", [open(1), frame(DATA, PADDED, 1, [9, 0])].concat(), Connection),
        ("padded DATA without a pad length", [open(1), frame(DATA, PADDED, 1, [])].concat(), Connection),
        ("DATA larger than the frame size", [open(1), oversized(DATA, 1)].concat(), Connection),
        // HEADERS, section 6.2
        ("HEADERS on stream 0", head(whole, 0, &fine), Connection),
        ("HEADERS on an even stream", head(whole, 2, &fine), Connection),
        (
            "HEADERS with a smaller stream than before",
            [head(whole, 5, &fine), head(whole, 3, &fine)].concat(),
            Connection,
        ),
        ("HEADERS with more padding than payload", head(whole | PADDED, 1, [200, 0]), Connection),
        ("HEADERS larger than the frame size", oversized(HEADERS, 1), Connection),
        (
            "HEADERS that depend on themselves",
            head(whole | 0x20, 1, [&[0, 0, 0, 1, 16][..], &fine].concat()),
            Stream(1),
        ),
        (
            "a second HEADERS without END_STREAM",
            [open(1), head(END_HEADERS, 1, block(&[("a", "b")]))].concat(),
            Stream(1),
        ),
        // The library drops them.
        ("pseudo-headers in trailers", [open(1), head(whole, 1, &fine)].concat(), Nothing),
        // PRIORITY, section 6.3
        ("PRIORITY of 4 bytes", frame(PRIORITY, 0, 1, [0; 4]), Connection),
        ("PRIORITY on stream 0", frame(PRIORITY, 0, 0, [0; 5]), Connection),
        // RST_STREAM, section 6.4
        ("RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, [0; 4]), Connection),
        ("RST_STREAM on an idle stream", frame(RST_STREAM, 0, 1, [0; 4]), Connection),
        ("RST_STREAM of 3 bytes", [open(1), frame(RST_STREAM, 0, 1, [0; 3])].concat(), Connection),
        // SETTINGS, section 6.5
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, []), Connection),
        ("SETTINGS of 5 bytes", frame(SETTINGS, 0, 0, [0; 5]), Connection),
        ("SETTINGS ACK with a payload", frame(SETTINGS, ACK, 0, setting(3, 1)), Connection),
        ("ENABLE_PUSH 2", frame(SETTINGS, 0, 0, setting(2, 2)), Connection),
        ("INITIAL_WINDOW_SIZE beyond 2^31-1", frame(SETTINGS, 0, 0, setting(4, 1 << 31)), Connection),
        ("MAX_FRAME_SIZE below 2^14", frame(SETTINGS, 0, 0, setting(5, 1000)), Connection),
        ("MAX_FRAME_SIZE beyond 2^24-1", frame(SETTINGS, 0, 0, setting(5, 1 << 24)), Connection),
        ("an unknown setting", frame(SETTINGS, 0, 0, setting(0xfafa, 1)), Nothing),
        // PUSH_PROMISE, section 6.6: a client must not
        (
            "PUSH_PROMISE",
            [open(1), frame(PUSH_PROMISE, END_HEADERS, 1, [&u32s(&[2])[..], &fine].concat())].concat(),
            Connection,
        ),
        // PING, section 6.7
        ("PING on a stream", frame(PING, 0, 1, [0; 8]), Connection),
        ("PING of 7 bytes", frame(PING, 0, 0, [0; 7]), Connection),
        ("PING ACK that nobody asked for", frame(PING, ACK, 0, [9; 8]), Nothing),
        // GOAWAY, section 6.8
        ("GOAWAY on a stream", frame(GOAWAY, 0, 1, u32s(&[0, 0])), Connection),
        ("GOAWAY of 7 bytes", frame(GOAWAY, 0, 0, [0; 7]), Connection),
        // WINDOW_UPDATE, section 6.9
        ("WINDOW_UPDATE 0 of the connection", frame(WINDOW_UPDATE, 0, 0, [0; 4]), Connection),
        ("WINDOW_UPDATE 0 of a stream", [open(1), frame(WINDOW_UPDATE, 0, 1, [0; 4])].concat(), Stream(1)),
        ("WINDOW_UPDATE of 3 bytes", frame(WINDOW_UPDATE, 0, 0, [0; 3]), Connection),
        ("WINDOW_UPDATE on an idle stream", frame(WINDOW_UPDATE, 0, 1, u32s(&[1])), Connection),
        ("WINDOW_UPDATE beyond the largest window", frame(WINDOW_UPDATE, 0, 0, u32s(&[0x7fff_ffff])), Connection),
        // CONTINUATION, section 6.10
        ("CONTINUATION after nothing", frame(CONTINUATION, END_HEADERS, 1, &fine), Connection),
        ("CONTINUATION on stream 0", frame(CONTINUATION, END_HEADERS, 0, &fine), Connection),
        ("a PING within a header block", [head(END_STREAM, 1, &fine), frame(PING, 0, 0, [0; 8])].concat(), Connection),
        (
            "CONTINUATION of another stream",
            [head(END_STREAM, 1, &fine), frame(CONTINUATION, END_HEADERS, 3, [])].concat(),
            Connection,
        ),
        // HPACK, RFC 7541
        ("an index beyond the tables", head(whole, 1, [0xff, 0x7f]), Connection),
        ("index 0", head(whole, 1, [0x80]), Connection),
        ("a string longer than its block", head(whole, 1, [0, 0x7f, 0xff, 0x7f]), Connection),
        ("a table size beyond the limit", head(whole, 1, [&[0x3f, 0xff, 0xff, 0x7f][..], &fine].concat()), Connection),
        // An unknown frame is ignored, section 4.1
        ("an unknown frame", frame(0xbe, 0xff, 7, b"whatever"), Nothing),
    ]
}

#[tokio::test]
async fn forbidden_frames_end_what_they_concern() {
    let field = Field::new().await;
    for place in PLACES {
        for (name, frames, ends) in invalid_frames() {
            let name = format!("{place:?}, {name}");
            let mut client = field.client(place).await;
            client.try_send(frames).await;
            match ends {
                Ends::Connection => {
                    let heard = client.until(&format!("{name}: closed"), |heard| heard.ended).await;
                    assert_ne!(heard.goaway, Some(0), "{name}: {heard:?}");
                }
                Ends::Stream(stream) => {
                    let ended = |heard: &Heard| heard.ended || heard.reset(stream).is_some();
                    client.until(&format!("{name}: reset"), ended).await;
                }
                Ends::Nothing => {
                    client.send(get(101, "/fine")).await;
                    let heard = client.until(&format!("{name}: goes on"), |heard| heard.is_settled(101)).await;
                    assert!(heard.answered_200(101), "{name}: {heard:?}");
                }
            }
        }
        field.still_serves(place, "forbidden frames").await;
    }
    for seen in field.app.requests() {
        assert!(!seen.target.contains("invalid"), "{seen:?}");
        assert!(seen.trailers.is_empty(), "{seen:?}");
    }
}

/// Heads that must not become lines of HTTP/1 (CVE-2023-27491, CVE-2023-27493), and heads that are malformed (RFC 9113
/// sections 8.2 and 8.3).
fn injections() -> Vec<(&'static str, Vec<u8>)> {
    let with = |name: &[u8], value: &[u8]| [request("POST", "/injected"), literal(name, value)].concat();
    let pseudo = |fields: &[(&str, &str)]| block(fields);
    let (method, scheme, authority, path) =
        ((":method", "GET"), (":scheme", "http"), (":authority", "catalog"), (":path", "/injected"));
    vec![
        ("CRLF in a value", with(b"x-a", b"b\r\nx-injected: 1")),
        ("LF in a value", with(b"x-a", b"b\nx-injected: 1")),
        ("CR in a value", with(b"x-a", b"b\rc")),
        ("NUL in a value", with(b"x-a", b"b\0c")),
        ("CRLF in a name", with(b"x-a: b\r\nx-injected", b"1")),
        ("a colon in a name", with(b"x-a:b", b"1")),
        ("a space in a name", with(b"x a", b"1")),
        ("NUL in a name", with(b"x\0a", b"1")),
        ("an upper case name", with(b"X-Injected", b"1")),
        ("an empty name", with(b"", b"1")),
        ("connection", with(b"connection", b"close")),
        ("keep-alive", with(b"keep-alive", b"timeout=5")),
        ("proxy-connection", with(b"proxy-connection", b"close")),
        ("transfer-encoding", with(b"transfer-encoding", b"chunked")),
        ("upgrade", with(b"upgrade", b"h2c")),
        ("te that is not trailers", with(b"te", b"gzip")),
        ("content-length that is no number", with(b"content-length", b"1x")),
        ("content-length twice", [with(b"content-length", b"1"), literal(b"content-length", b"2")].concat()),
        ("an unknown pseudo-header", with(b":injected", b"1")),
        ("a response's pseudo-header", with(b":status", b"200")),
        ("a pseudo-header behind a field", [with(b"x-a", b"b"), literal(b":path", b"/injected")].concat()),
        (":path twice", pseudo(&[method, scheme, authority, path, path])),
        (":method twice", pseudo(&[method, method, scheme, authority, path])),
        ("no :path", pseudo(&[method, scheme, authority])),
        ("no :method", pseudo(&[scheme, authority, path])),
        ("no :scheme", pseudo(&[method, authority, path])),
        ("an empty :path", pseudo(&[method, scheme, authority, (":path", "")])),
        (":path that is a query alone", pseudo(&[method, scheme, authority, (":path", "?injected")])),
        (":path that is no path", pseudo(&[method, scheme, authority, (":path", "injected")])),
        (":path that is a URI", pseudo(&[method, scheme, authority, (":path", "http://catalog/injected")])),
        ("the asterisk without OPTIONS", pseudo(&[method, scheme, authority, (":path", "*")])),
        ("a fragment in :path", pseudo(&[method, scheme, authority, (":path", "/injected#a")])),
        ("a fragment behind a query", pseudo(&[method, scheme, authority, (":path", "/injected?a=b#")])),
        ("a fragment in a path by its name", {
            let path = literal(b":path", b"/injected#a");
            [pseudo(&[method, scheme, authority]), path].concat()
        }),
        ("another scheme", pseudo(&[method, (":scheme", "file"), authority, path])),
        ("another scheme and no authority", {
            [pseudo(&[method, (":scheme", "ftp"), path]), literal(b"host", b"catalog")].concat()
        }),
        ("an empty scheme", pseudo(&[method, (":scheme", ""), authority, path])),
        ("a blank before a value", with(b"x-a", b" b")),
        ("a blank behind a value", with(b"x-a", b"b ")),
        ("a tab before a value", with(b"x-a", b"\tb")),
        ("a tab behind a value", with(b"x-a", b"b\t")),
        ("a blank for a value", with(b"x-a", b" ")),
        ("an empty :authority", pseudo(&[method, scheme, (":authority", ""), path])),
        ("userinfo in :authority", pseudo(&[method, scheme, (":authority", "user@catalog"), path])),
        ("userinfo with a % in :authority", pseudo(&[method, scheme, (":authority", "a%40@catalog"), path])),
        (":authority twice", pseudo(&[method, scheme, authority, authority, path])),
        (":scheme twice", pseudo(&[method, scheme, scheme, authority, path])),
        (":protocol without CONNECT", pseudo(&[method, scheme, authority, path, (":protocol", "websocket")])),
        ("CRLF in :path", pseudo(&[method, scheme, authority, (":path", "/injected HTTP/1.1\r\nx-injected: 1\r\n")])),
        ("a space in :path", pseudo(&[method, scheme, authority, (":path", "/injected HTTP/1.1")])),
        ("NUL in :path", pseudo(&[method, scheme, authority, (":path", "/injected\0")])),
        ("CRLF in :method", pseudo(&[(":method", "GET /injected HTTP/1.1\r\n"), scheme, authority, path])),
        ("a space in :method", pseudo(&[(":method", "GET /injected"), scheme, authority, path])),
        ("CRLF in :authority", pseudo(&[method, scheme, (":authority", "catalog\r\nx-injected: 1"), path])),
        ("a space in :authority", pseudo(&[method, scheme, (":authority", "a b"), path])),
        ("userinfo and path in :authority", pseudo(&[method, scheme, (":authority", "a/injected"), path])),
        ("CRLF in :scheme", pseudo(&[method, (":scheme", "http\r\n"), authority, path])),
        ("another host", [pseudo(&[method, scheme, authority, path]), literal(b"host", b"elsewhere")].concat()),
        ("CONNECT", pseudo(&[(":method", "CONNECT"), authority])),
        ("extended CONNECT", pseudo(&[(":method", "CONNECT"), (":protocol", "websocket"), scheme, authority, path])),
    ]
}

#[tokio::test]
async fn injected_heads_end_their_stream_and_reach_nobody() {
    let field = Field::new().await;
    for place in PLACES {
        for (name, fields) in injections() {
            let name = format!("{place:?}, {name}");
            let mut client = field.client(place).await;
            client.send(head(END_STREAM | END_HEADERS, 1, fields)).await;
            let heard = client.until(&format!("{name}: refused"), |heard| heard.is_settled(1)).await;
            assert!(!heard.answered_200(1), "{name}: {heard:?}");
            if heard.goaway.is_none() && !heard.ended {
                client.send(get(3, "/fine")).await;
                let heard = client.until(&format!("{name}: the others go on"), |heard| heard.is_settled(3)).await;
                assert!(heard.answered_200(3), "{name}: {heard:?}");
            }
        }
        // A body that is not as long as its head says, either way.
        for (name, body) in [("shorter", 3), ("longer", 9)] {
            let mut client = field.client(place).await;
            let fields = [request("POST", "/mismatch"), literal(b"content-length", b"5")].concat();
            client.send([head(END_HEADERS, 1, fields), frame(DATA, END_STREAM, 1, vec![b'x'; body])].concat()).await;
            let heard = client.until(&format!("{place:?}, {name}"), |heard| heard.is_settled(1)).await;
            assert!(!heard.answered_200(1), "{place:?}, {name}: {heard:?}");
        }
        field.still_serves(place, "injections").await;
    }
    for seen in field.app.requests() {
        let clean = seen.target.ends_with("/fine") || (seen.target.ends_with("/mismatch") && !seen.whole);
        assert!(clean, "reached the application: {seen:?}");
    }
}

/// Trailers that RFC 9113 forbids (sections 8.1, 8.2.1 and 8.2.2), behind a request whose `:path` is in the dynamic table.
fn trailers() -> Vec<(&'static str, Vec<u8>)> {
    let field = literal(b"x-sum", b"1");
    let behind = |fields: Vec<u8>| [field.clone(), fields].concat();
    vec![
        (":method", vec![0x82]),
        (":path", literal(b":path", b"/other")),
        (":path of the static table", vec![0x84]),
        (":path of the dynamic table", vec![0xbe]),
        (":path by its name in the dynamic table", vec![0x0f, 62 - 15, 2, b'/', b'x']),
        (":authority", literal(b":authority", b"other")),
        (":scheme", vec![0x86]),
        (":status", literal(b":status", b"200")),
        (":protocol", literal(b":protocol", b"websocket")),
        ("an unknown pseudo-header", literal(b":other", b"1")),
        (":method behind a field", behind(vec![0x82])),
        ("a blank before a value", literal(b"x-sum", b" 1")),
        ("a blank behind a value", literal(b"x-sum", b"1\t")),
        ("connection", literal(b"connection", b"close")),
        ("transfer-encoding", literal(b"transfer-encoding", b"chunked")),
        ("an upper case name", literal(b"X-Sum", b"1")),
    ]
}

#[tokio::test]
async fn forbidden_trailers_end_their_stream() {
    let field = Field::new().await;
    let whole = END_STREAM | END_HEADERS;
    // As `request`, with :path as a literal that goes into the table.
    let begin = |stream| {
        let mut fields = block(&[(":method", "POST"), (":scheme", "http"), (":authority", "catalog.shop")]);
        fields.extend_from_slice(&[0x44, 8]);
        fields.extend_from_slice(b"/trailed");
        [frame(HEADERS, END_HEADERS, stream, fields), frame(DATA, 0, stream, b"body")].concat()
    };
    for place in PLACES {
        for (name, fields) in trailers() {
            let name = format!("{place:?}, {name} in trailers");
            for pieces in [1, 2] {
                let mut client = field.client(place).await;
                client.send(begin(1)).await;
                let half = if pieces == 1 { fields.len() } else { fields.len() / 2 };
                client
                    .send(frame(HEADERS, END_STREAM | if pieces == 1 { END_HEADERS } else { 0 }, 1, &fields[..half]))
                    .await;
                if pieces == 2 {
                    client.send(frame(CONTINUATION, END_HEADERS, 1, &fields[half..])).await;
                }
                let heard = client.until(&format!("{name}: refused"), |heard| heard.is_over(1)).await;
                assert!(!heard.answered_200(1), "{name}: {heard:?}");
                if heard.goaway.is_none() && !heard.ended {
                    client.send(get(3, "/fine")).await;
                    let heard = client.until(&format!("{name}: the others go on"), |heard| heard.is_settled(3)).await;
                    assert!(heard.answered_200(3), "{name}: {heard:?}");
                }
            }
        }
        let mut client = field.client(place).await;
        client.send([begin(1), frame(HEADERS, whole, 1, literal(b"x-sum", b"1"))].concat()).await;
        let heard = client.until("good trailers", |heard| heard.is_over(1)).await;
        assert!(heard.answered_whole(1), "{place:?}: {heard:?}");
    }
    let good = |seen: &&outrigger_tests::application::Seen| seen.target.ends_with("/trailed") && seen.whole;
    assert_eq!(field.app.requests().iter().filter(good).count(), PLACES.len(), "{:?}", field.app.requests());
}

/// The library resets such a stream by itself, and it stands in the metrics all the same.
#[tokio::test]
async fn what_the_library_refuses_is_counted() {
    let field = Field::new().await;
    let refused = async |reason: &str| {
        let labels = [("reason", reason)];
        let (near, far) = (field.near.metrics().await, field.far.metrics().await);
        [near, far].map(|samples| samples.sum("outrigger_http_requests_total", &labels))
    };
    for (index, place) in PLACES.into_iter().enumerate() {
        let mut client = field.client(place).await;
        let percent =
            block(&[(":method", "GET"), (":scheme", "http"), (":authority", "a%2fb"), (":path", "/injected")]);
        let twice = [request("GET", "/injected"), literal(b":path", b"/injected")].concat();
        client.send(head(END_STREAM | END_HEADERS, 1, percent)).await;
        client.send(head(END_STREAM | END_HEADERS, 3, twice)).await;
        client.until("both are reset", |heard| heard.reset(1).is_some() && heard.reset(3).is_some()).await;
        client.send(get(5, "/fine")).await;
        let heard = client.until("the next one", |heard| heard.is_over(5)).await;
        assert!(heard.answered_whole(5), "{heard:?}");
        assert!(!heard.resets.iter().any(|(_, code)| *code != 1), "PROTOCOL_ERROR: {heard:?}");
        assert_eq!(refused("bad_request").await[index], 2.0, "{place:?}");
        // Beyond what is announced, and behind it.
        let large = [request("GET", "/injected"), literal(b"x-large", &[b'v'; 10_000]).repeat(7)].concat();
        let mut pieces = large.chunks(16_000);
        let mut sending = frame(HEADERS, END_STREAM, 7, pieces.next().unwrap());
        pieces.for_each(|piece| sending.extend(frame(CONTINUATION, 0, 7, piece)));
        sending.extend(frame(CONTINUATION, END_HEADERS, 7, []));
        client.send(sending).await;
        client.until("431", |heard| heard.is_over(7)).await;
        assert_eq!(refused("request_head_too_large").await[index], 1.0, "{place:?}");
    }
    assert!(field.app.requests().iter().all(|seen| !seen.target.contains("injected")));
}
