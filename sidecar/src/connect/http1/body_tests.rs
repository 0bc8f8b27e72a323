use super::*;

/// What a chunked body of these bytes says, or what is wrong with it.
fn chunked(bytes: &[u8], step: usize) -> Result<(Vec<u8>, Option<HeaderMap>, usize), &'static str> {
    decoded(Decoder::new(Length::Chunked, &Limits::default()), bytes, step)
}

fn decoded(
    mut decoder: Decoder,
    bytes: &[u8],
    step: usize,
) -> Result<(Vec<u8>, Option<HeaderMap>, usize), &'static str> {
    let (mut received, mut data, mut trailers) = (BytesMut::new(), Vec::new(), None);
    let mut pieces = bytes.chunks(step);
    loop {
        match decoder.decode(&mut received)? {
            Decoded::Data(piece) => data.extend_from_slice(&piece),
            Decoded::Trailers(section) => trailers = Some(section),
            Decoded::Ended => return Ok((data, trailers, received.len() + pieces.map(<[u8]>::len).sum::<usize>())),
            Decoded::Incomplete => match pieces.next() {
                Some(piece) => received.extend_from_slice(piece),
                None => return Err("incomplete"),
            },
        }
    }
}

#[test]
fn chunks_are_read_however_they_are_split() {
    let body = b"5\r\nhello\r\n00a;ext=\"1\"\r\n, worlds!!\r\n0\r\nX-Sum: 1\r\nx-two: 2\r\n\r\nnext";
    for step in 1..body.len() {
        let (data, trailers, left) = chunked(body, step).unwrap_or_else(|wrong| panic!("{step}: {wrong}"));
        assert_eq!(data, b"hello, worlds!!", "{step}");
        let trailers = trailers.unwrap();
        assert_eq!((trailers.len(), trailers["x-sum"].as_bytes()), (2, &b"1"[..]));
        assert_eq!(left, 4, "{step}");
    }
    assert_eq!(chunked(b"0\r\n\r\n", 1).map(|(data, ..)| data), Ok(Vec::new()));
}

#[test]
fn what_is_no_chunk_is_refused() {
    let bodies: &[&[u8]] = &[
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r\n0\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"5\r\nhell\r\n0\r\n\r\n",
        b"5\r\nhello!\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"5 x\r\nhello\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"5;a\0b\r\nhello\r\n0\r\n\r\n",
        b"5\r\r\nhello\r\n0\r\n\r\n",
        b"10000000000000005\r\nhello\r\n0\r\n\r\n",
        b"0\r\nNo colon\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\nA: b\n\r\n",
    ];
    for body in bodies {
        for step in [1, body.len()] {
            let got = chunked(body, step);
            assert!(got.is_err() && got != Err("incomplete"), "{}: {got:?}", String::from_utf8_lossy(body));
        }
    }
}

#[test]
fn extensions_and_trailers_are_bounded_over_the_message() {
    let limits = Limits::default();
    let many = |piece: &str, count: usize| piece.repeat(count).into_bytes();
    let extension = format!("1;{}\r\nx\r\n", "e".repeat(1000));
    assert_eq!(chunked(&many(&extension, 20), 4096), Err("endless chunk extensions"));
    assert_eq!(chunked(&vec![b'1'; 100_000], 4096), Err("endless chunk extensions"));
    let trailers = [b"0\r\n".to_vec(), many("a: b\r\n", limits.trailer_bytes)].concat();
    assert_eq!(chunked(&trailers, 4096), Err("trailers without end"));
    let fields = [b"0\r\n".to_vec(), many("a: b\r\n", 101), b"\r\n".to_vec()].concat();
    assert_eq!(chunked(&fields, 4096), Err("too many trailers"));
}

#[test]
fn the_largest_trailers_are_read_however_they_are_split() {
    let limits = Limits::default();
    for more in [0, 1] {
        let field = format!("a: {}\r\n", "b".repeat(limits.trailer_bytes - "a: \r".len() + more));
        let body = [b"0\r\n".to_vec(), field.into_bytes(), b"\r\n".to_vec()].concat();
        for step in [1, 7, body.len() - 1, body.len()] {
            assert_eq!(chunked(&body, step).is_ok(), more == 0, "{more} by {step}");
        }
    }
}

#[test]
fn other_lengths() {
    let limits = Limits::default();
    let mut exact = Decoder::new(Length::Exact(3), &limits);
    let mut received = BytesMut::from(&b"abcd"[..]);
    assert!(matches!(exact.decode(&mut received), Ok(Decoded::Data(data)) if data == "abc"));
    assert!(exact.has_ended() && matches!(exact.decode(&mut received), Ok(Decoded::Ended)));
    assert_eq!(&received[..], b"d");
    assert!(!Decoder::new(Length::Exact(1), &limits).end_of_stream());
    let mut until_end = Decoder::new(Length::UntilEnd, &limits);
    assert!(matches!(until_end.decode(&mut received), Ok(Decoded::Data(data)) if data == "d"));
    assert!(matches!(until_end.decode(&mut received), Ok(Decoded::Incomplete)));
    assert!(until_end.end_of_stream() && until_end.has_ended());
}

#[test]
fn chunk_extensions_are_read_by_the_grammar() {
    let good: &[&[u8]] = &[
        b"",
        b";a",
        b";a;b",
        b" ;a",
        b"\t ; \ta",
        b";a=b",
        b";a = b",
        b";a\t=\tb ;c",
        b";a=\"\"",
        b";a=\"b c;d=e\"",
        b";a=\"\\\"\\\\\"",
        b";a=\"\xff\"",
        b";!#$%&'*+-.^_`|~1=1",
    ];
    for extension in good {
        assert!(is_extension(extension), "{}", extension.escape_ascii());
    }
    let bad: &[&[u8]] = &[
        b" ",
        b"\t",
        b";",
        b"; ",
        b";;",
        b";a;",
        b";a ",
        b";=b",
        b";a=",
        b";a=;b",
        b";a=b=c",
        b";a b",
        b"x",
        b"=a",
        b"\r;a",
        b"\r",
        b"\x0b;a",
        b"\x0c;a",
        b"\x0c",
        b"\x85;a",
        b"\xa0;a",
        b"\xc2\xa0;a",
        b"\0;a",
        b"\n;a",
        b";\x0ca",
        b";\xa0a",
        b";\ra",
        b";a\r",
        b";a\x0b=b",
        b";a=\x0cb",
        b";a=b\r;c",
        b";a=\"",
        b";a=\"b",
        b";a=\"b\\\"",
        b";a=\"b\"c",
        b";a=\"\x0b\"",
        b";a=\"\r\"",
        b";a=\"\\\r\"",
        b";a=\"\x7f\"",
        b";a=\"\0\"",
        b";a='b c'",
        b";(a)",
        b";\xe4",
    ];
    for extension in bad {
        assert!(!is_extension(extension), "{}", extension.escape_ascii());
        let line = [b"5", *extension, b"\r\nhello\r\n0\r\n\r\n"].concat();
        for step in [1, line.len()] {
            let got = chunked(&line, step);
            assert!(got.is_err() && got != Err("incomplete"), "{}: {got:?}", extension.escape_ascii());
        }
    }
}

#[test]
fn blanks_behind_the_names_of_an_answers_trailers_are_removed() {
    let limits = Limits::default();
    let body = b"0\r\nX-Sum : 1\r\nx-two\t : a : b\r\n\r\n";
    for step in 1..body.len() {
        assert!(chunked(body, step).is_err(), "a request's are refused");
        let got = decoded(Decoder::new(Length::Chunked, &limits).of_answer(), body, step);
        let trailers = got.unwrap().1.unwrap();
        assert_eq!((&trailers["x-sum"], &trailers["x-two"]), (&"1".parse().unwrap(), &"a : b".parse().unwrap()));
    }
    for wrong in ["0\r\n X: 1\r\n\r\n", "0\r\nX Y : 1\r\n\r\n", "0\r\n : 1\r\n\r\n", "0\r\nX: 1\r\n y : 2\r\n\r\n"] {
        let got = decoded(Decoder::new(Length::Chunked, &limits).of_answer(), wrong.as_bytes(), 1);
        assert!(got.is_err(), "{wrong:?}: {got:?}");
    }
}

/// Bodies of pieces that make sense one by one: however they are cut they say the same, and an answer's say what a
/// request's say where that is taken.
#[test]
fn random_bodies_are_read_the_same_however_they_are_split() {
    const PIECES: [&[u8]; 26] = [
        b"0",
        b"1",
        b"5",
        b"a",
        b"00",
        b"1f",
        b";",
        b";a",
        b"=",
        b"\"",
        b"\\",
        b" ",
        b"\t",
        b"\r\n",
        b"\r\n",
        b"\r\n0\r\n",
        b"\r",
        b"\n",
        b"hello",
        b"x: y",
        b"x : y",
        b":",
        b"\x0b",
        b"\x0c",
        b"\xa0",
        b"\r\n\r\n",
    ];
    let limits = Limits { chunk_extension_bytes: 40, trailer_bytes: 80, header_count: 4, ..Limits::default() };
    let mut random = fastrand::Rng::with_seed(9112);
    let (mut whole_bodies, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut body: Vec<u8> = if random.bool() { b"5\r\nhello\r\n".to_vec() } else { Vec::new() };
        for _ in 0..random.usize(1..8) {
            body.extend_from_slice(PIECES[random.usize(..PIECES.len())]);
        }
        if random.bool() {
            body.extend_from_slice(b"0\r\n\r\n");
        }
        let strict = || Decoder::new(Length::Chunked, &limits);
        let (whole, step) = (decoded(strict(), &body, body.len()), random.usize(1..body.len() + 1));
        // Which of two faults is found first may depend on the cut.
        let shown = body.escape_ascii();
        assert_eq!(whole.clone().ok(), decoded(strict(), &body, step).ok(), "{shown} by {step}");
        let answer = decoded(strict().of_answer(), &body, body.len());
        assert_eq!(answer.clone().ok(), decoded(strict().of_answer(), &body, step).ok(), "{shown} by {step}");
        match whole {
            Ok(_) => {
                assert_eq!(whole, answer, "{shown}");
                whole_bodies += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(whole_bodies > 200 && refused > 200, "{whole_bodies} {refused}");
}
