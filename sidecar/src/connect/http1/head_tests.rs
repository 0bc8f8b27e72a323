use super::*;

type Refusal = (Reason, &'static str);

fn request(bytes: &[u8]) -> Result<Option<RequestHead>, Refusal> {
    parse_request(&mut BytesMut::from(bytes), &mut 0, &Limits::default())
}

fn response(bytes: &[u8]) -> Result<Option<ResponseHead>, &'static str> {
    parse_response(&mut BytesMut::from(bytes), &mut 0, &Method::GET, &Limits::default())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_head_is_found_wherever_its_bytes_are_split() {
    let whole = b"\r\nPOST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi";
    for step in 1..whole.len() {
        let (mut received, mut seen) = (BytesMut::new(), 0);
        let mut found = None;
        for piece in whole.chunks(step) {
            received.extend_from_slice(piece);
            if found.is_none() {
                found =
                    parse_request(&mut received, &mut seen, &Limits::default()).unwrap_or_else(|_| panic!("{step}"));
            }
        }
        let head = found.unwrap_or_else(|| panic!("{step}"));
        assert_eq!(head.request.uri(), "/a?b=c");
        assert_eq!(head.length, Length::Exact(2));
        assert!(head.keep_alive);
        assert_eq!(&received[..], b"hi", "{step}");
    }
}

#[test]
fn heads_that_two_readers_could_read_differently_are_refused() {
    let heads: &[&[u8]] = &[
        b"GET / HTTP/1.1\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\rY: z\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\0\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.2\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1 \r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /# HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a?b#c HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x#a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x/#a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS *#a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80#a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 01\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 00\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: \r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 9223372036854775808\r\n\r\n",
        b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"\nGET / HTTP/1.1\r\n\r\n",
    ];
    for head in heads {
        match request(head) {
            Err((Reason::BadRequest, _)) => {}
            other => panic!("{}: {:?}", text(head), other.map(|head| head.is_some())),
        }
    }
}

#[test]
fn limits_of_a_head() {
    let limits = Limits { head_bytes: 300, header_count: 3, target_bytes: 50, ..Limits::default() };
    let refused = |bytes: Vec<u8>| match parse_request(&mut BytesMut::from(&bytes[..]), &mut 0, &limits) {
        Err((reason, _)) => Some(reason),
        Ok(_) => None,
    };
    let fields = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(count)).into_bytes();
    assert_eq!(refused(fields(3)), None);
    assert_eq!(refused(fields(4)), Some(Reason::RequestHeadTooLarge));
    assert_eq!(refused(fields(45)), Some(Reason::RequestHeadTooLarge));
    assert_eq!(refused(b"GET /".iter().copied().chain(vec![b'a'; 400]).collect()), Some(Reason::RequestTargetTooLong));
    assert_eq!(refused(format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(60)).into()), Some(Reason::RequestTargetTooLong));
    assert_eq!(refused(format!("GET / HTTP/1.1\r\nx: {}", "a".repeat(400)).into()), Some(Reason::RequestHeadTooLarge));
    assert_eq!(
        refused(format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(400)).into()),
        Some(Reason::RequestHeadTooLarge)
    );
    assert_eq!(refused(b"GET / HTTP/1.1\r\nx: ".to_vec()), None);
}

#[test]
fn who_keeps_the_connection() {
    let cases: &[(&str, &str, bool)] = &[
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: x, Close\r\n", false),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
        ("1.0", "Connection: keep-alive, close\r\n", false),
    ];
    for (version, fields, keeps) in cases {
        let head = request(format!("GET / HTTP/{version}\r\n{fields}\r\n").as_bytes()).ok().flatten().unwrap();
        assert_eq!(head.keep_alive, *keeps, "{version} {fields}");
    }
}

#[test]
fn answers_are_read_with_their_lengths() {
    let cases: &[(&str, Length)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Length::Exact(5)),
        ("HTTP/1.1 200 OK\nContent-Length: 5\n\n", Length::Exact(5)),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", Length::Chunked),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", Length::UntilEnd),
        ("HTTP/1.1 200\r\n\r\n", Length::UntilEnd),
        ("HTTP/1.0 200 OK\r\n\r\n", Length::UntilEnd),
        ("HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n", Length::Exact(0)),
        ("HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n", Length::Exact(0)),
        ("HTTP/1.1 101 Switching\r\n\r\n", Length::Exact(0)),
    ];
    for (bytes, length) in cases {
        let head = response(bytes.as_bytes()).unwrap_or_else(|wrong| panic!("{bytes}: {wrong}")).unwrap();
        assert_eq!(head.length, *length, "{bytes}");
    }
    for bytes in
        ["HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 099 x\r\n\r\n", "ICY 200 OK\r\n\r\n", "HTTP/1.1 200 O\0K\r\n\r\n"]
    {
        assert!(response(bytes.as_bytes()).is_err(), "{bytes}");
    }
}

#[test]
fn names_go_on_as_they_were_spelled() {
    let head =
        request(b"GET /p HTTP/1.1\r\nHOST: x\r\nX-a: 1\r\nx-A: 2\r\nDrop: 1\r\nUser-AGENT: u\r\n\r\n").ok().flatten();
    let RequestHead { mut request, spelling, .. } = head.unwrap();
    let mut headers = HeaderMap::new();
    for (name, value) in request.headers() {
        if name != "drop" {
            headers.append(name, value.clone());
        }
    }
    headers.insert("x-new", HeaderValue::from_static("n"));
    *request.headers_mut() = headers;
    let mut out = Vec::new();
    write_request(&mut out, &request, Some(&spelling));
    assert_eq!(text(&out), "GET /p HTTP/1.1\r\nHOST: x\r\nX-a: 1\r\nx-A: 2\r\nUser-AGENT: u\r\nx-new: n\r\n");
}

#[test]
fn the_reason_phrase_goes_on() {
    for (line, expected) in [
        ("HTTP/1.1 299 Rather Odd", "HTTP/1.1 299 Rather Odd\r\n"),
        ("HTTP/1.0 404 Nope", "HTTP/1.1 404 Nope\r\n"),
        ("HTTP/1.1 404 ", "HTTP/1.1 404 \r\n"),
        ("HTTP/1.1 404", "HTTP/1.1 404 \r\n"),
    ] {
        let head = response(format!("{line}\r\n\r\n").as_bytes()).unwrap().unwrap();
        let mut out = Vec::new();
        let (parts, ()) = head.response.into_parts();
        write_response(&mut out, false, parts.status, &parts.headers, Some(&head.spelling));
        assert_eq!(text(&out), expected, "{line}");
    }
}

#[test]
fn numbers_are_written() {
    let mut out = Vec::new();
    for size in [0, 1, 9, 15, 16, 255, 65536] {
        write_hex(&mut out, size);
    }
    for length in [0, 7, 10, u64::MAX] {
        write_length(&mut out, length);
    }
    let lengths =
        "content-length: 0\r\ncontent-length: 7\r\ncontent-length: 10\r\ncontent-length: 18446744073709551615\r\n";
    assert_eq!(text(&out), format!("0\r\n1\r\n9\r\nf\r\n10\r\nff\r\n10000\r\n{lengths}"));
}
