use super::*;

/// A question of these labels.
fn ask(labels: &[&str], kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in labels {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(IN.to_be_bytes());
    bytes
}

fn with_edns(mut bytes: Vec<u8>, udp: u16, version: u8) -> Vec<u8> {
    bytes[11] += 1;
    bytes.extend([0, 0, 41]);
    bytes.extend(udp.to_be_bytes());
    bytes.extend([0, version, 0x80, 0, 0, 0]);
    bytes
}

fn question(bytes: &[u8]) -> Query<'_> {
    match read(bytes) {
        Entry::Question(query) => query,
        other => panic!("{other:?}"),
    }
}

/// The code of what is said to this, in its header.
fn refusal(bytes: &[u8]) -> u8 {
    match read(bytes) {
        Entry::Refusal(said) => {
            assert_eq!(said[..2], bytes[..2]);
            assert!(said[2] & QR != 0 && said.len() >= HEADER);
            said[3] & 0x0F
        }
        other => panic!("{other:?}"),
    }
}

fn counts(message: &[u8]) -> [u8; 4] {
    [message[5], message[7], message[9], message[11]]
}

fn v4(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

#[test]
fn a_question_is_read_and_answered_in_its_own_spelling() {
    let bytes = ask(&["CaTalog", "shop"], A);
    let query = question(&bytes);
    assert_eq!((query.id(), query.kind, query.name().as_deref()), (0x1234, A, Some("CaTalog.shop")));
    let answer = query.answer(&[v4(7), "fd00::1".parse().unwrap()], 30, 5, Transport::Udp);
    assert_eq!(answer[..4], [0x12, 0x34, 0x85, 0x80], "an answer, authoritative; RD is repeated, AD is not");
    assert_eq!(counts(&answer), [1, 1, 0, 0]);
    let end = bytes.len();
    assert_eq!(answer[HEADER..end], bytes[HEADER..]);
    assert_eq!(answer[end..], [0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 0, 0, 7]);
    assert_eq!(question(&ask(&[], A)).name().as_deref(), Some(""));
    assert_eq!(question(&ask(&["_http", "shop"], 33)).name(), None, "no service is called so");
}

#[test]
fn families_and_kinds() {
    let ips = [v4(1), v4(2), "fd00::1".parse().unwrap()];
    for (kind, records) in [(A, 2), (AAAA, 1), (ANY, 3), (15, 0), (33, 0), (65, 0)] {
        let answer = question(&ask(&["catalog"], kind)).answer(&ips, 30, 5, Transport::Udp);
        // What is not there is denied for a while.
        assert_eq!(counts(&answer), [1, records, u8::from(records == 0), 0], "{kind}");
        assert_eq!(answer[3] & 0x0F, 0);
    }
    let none = question(&ask(&["catalog"], A)).answer(&[], 30, 5, Transport::Udp);
    assert_eq!(counts(&none), [1, 0, 1, 0]);
    assert_eq!(none[none.len() - 4..], [0, 0, 0, 5]);
}

#[test]
fn what_does_not_fit_is_truncated_and_whole_over_tcp() {
    let many: Vec<IpAddr> = (0..200).map(v4).collect();
    let plain = ask(&["catalog"], A);
    for (bytes, most) in [
        (plain.clone(), 512),
        (with_edns(plain.clone(), 100, 0), 512),
        (with_edns(plain.clone(), 1000, 0), 1000),
        (with_edns(plain.clone(), 65_000, 0), 1232),
    ] {
        let answer = question(&bytes).answer(&many, 5, 5, Transport::Udp);
        assert!(answer.len() <= most && answer.len() > most - 16 && answer[2] & TC != 0, "{}", answer.len());
        let whole = question(&bytes).answer(&many, 5, 5, Transport::Tcp);
        assert_eq!((whole[2] & TC, counts(&whole)[1]), (0, 200));
    }
    let endless: Vec<IpAddr> = many.iter().cycle().take(9_000).copied().collect();
    let answer = question(&plain).answer(&endless, 5, 5, Transport::Tcp);
    assert!(
        answer.len() <= usize::from(u16::MAX) && answer[2] & TC == 0,
        "TCP has no more room: nothing to come back for"
    );
}

#[test]
fn edns_is_answered_where_it_was_spoken() {
    let bytes = with_edns(ask(&["catalog"], A), 4096, 0);
    let answer = question(&bytes).answer(&[v4(1)], 30, 5, Transport::Udp);
    assert_eq!(answer[answer.len() - 11..], [0, 0, 41, 0x04, 0xD0, 0, 0, 0x80, 0, 0, 0], "1232, DO repeated");
    let failed = question(&bytes).failure(Code::ServFail, Some(Extended::NoReachableAuthority));
    assert_eq!(failed[3] & 0x0F, 2);
    assert_eq!(failed[failed.len() - 8..], [0, 6, 0, 15, 0, 2, 0, 22]);
    let plain = ask(&["catalog"], A);
    let failed = question(&plain).failure(Code::ServFail, Some(Extended::NetworkError));
    assert_eq!((failed.len(), counts(&failed)), (plain.len(), [1, 0, 0, 0]));
}

#[test]
fn what_is_no_question_for_us() {
    let plain = ask(&["catalog"], A);
    let changed = |at: usize, to: u8| {
        let mut bytes = plain.clone();
        bytes[at] = to;
        bytes
    };
    assert_eq!(read(&plain[..11]), Entry::Noise);
    assert_eq!(read(&[]), Entry::Noise);
    assert_eq!(read(&changed(2, 0x81)), Entry::Noise, "an answer");
    for opcode in 1..16 {
        assert_eq!(refusal(&changed(2, opcode << 3)), 4, "opcode {opcode}");
    }
    for count in [0, 2, 255] {
        assert_eq!(refusal(&changed(5, count)), 1, "{count} questions");
    }
    let mut both = changed(5, 2);
    both.extend_from_slice(&plain[HEADER..]);
    assert_eq!(refusal(&both), 1, "two questions that are there");
    for end in HEADER..plain.len() {
        assert_eq!(refusal(&plain[..end]), 1, "ends at {end}");
    }
    assert_eq!(refusal(&[plain.clone(), vec![0]].concat()), 1, "and more behind it");
    for record in [7, 9, 11] {
        assert_eq!(refusal(&changed(record, 1)), 1, "a record that is not there");
    }
    assert_eq!(refusal(&changed(plain.len() - 1, 3)), 4, "class CHAOS");
    for kind in [AXFR, IXFR] {
        assert_eq!(refusal(&ask(&["shop"], kind)), 5, "a whole zone");
    }
    // Pointers: to itself, forward, and behind a label.
    for name in [&[0xC0, 12][..], &[0xC0, 40], &[1, b'a', 0xC0, 12], &[0x40, 1], &[0x80]] {
        let bytes = [&plain[..HEADER], name, &[0, 1, 0, 1]].concat();
        assert_eq!(refusal(&bytes), 1, "{name:x?}");
    }
    let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(62)];
    let labels: Vec<&str> = long.iter().map(String::as_str).collect();
    assert_eq!(refusal(&ask(&labels, A)), 1, "256 bytes of name");
    assert_eq!(refusal(&ask(&[&"a".repeat(64)], A)), 1);
    let edns = with_edns(plain.clone(), 1232, 1);
    let Entry::Refusal(said) = read(&edns) else { panic!() };
    assert_eq!((said[3] & 0x0F, said[said.len() - 6]), (0, 1), "BADVERS is 16, of which OPT has the upper part");
    assert_eq!(refusal(&with_edns(with_edns(plain.clone(), 1232, 0), 1232, 0)), 1, "two OPT");
}

#[test]
fn what_else_a_question_carries_is_passed_over() {
    // A record whose name is a pointer to itself: nobody follows it.
    let mut bytes = ask(&["catalog"], A);
    let at = bytes.len() as u8;
    bytes[11] = 1;
    bytes.extend([0xC0, at, 0, 250, 0, 255, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
    assert_eq!(question(&bytes).name().as_deref(), Some("catalog"));
    assert_eq!(question(&with_edns(bytes, 1232, 0)).edns.unwrap().udp, 1232);
}

#[test]
fn answers_of_upstreams() {
    let asked = ask(&["Catalog", "shop"], A);
    let question = &asked[HEADER..];
    let answer = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = asked.clone();
        bytes[2] |= QR;
        change(&mut bytes);
        answers(&bytes, 0x1234, question)
    };
    assert_eq!(answer(&|_| {}), Answered::Yes);
    assert_eq!(answer(&|bytes| bytes[3] = 3), Answered::Yes, "a name that does not exist is an answer");
    assert_eq!(answer(&|bytes| bytes[13] = b'c'), Answered::Yes, "in another spelling");
    for code in [1, 2, 4, 5] {
        assert_eq!(answer(&|bytes| bytes[3] = code), Answered::Unwilling);
        let headers_alone = |bytes: &mut Vec<u8>| {
            bytes[3] = code;
            bytes[5] = 0;
            bytes.truncate(HEADER);
        };
        assert_eq!(answer(&headers_alone), Answered::Unwilling);
    }
    for (what, change) in [
        ("another id", &(|bytes: &mut Vec<u8>| bytes[0] = 0) as &dyn Fn(&mut Vec<u8>)),
        ("another name", &|bytes| bytes[14] = b'x'),
        ("another type", &|bytes| bytes[27] = 28),
        ("a question", &|bytes| bytes[2] = 0),
        ("no question", &|bytes| bytes[5] = 0),
        ("cut off", &|bytes| bytes.truncate(20)),
        ("nothing", &|bytes| bytes.clear()),
    ] {
        assert_eq!(answer(change), Answered::No, "{what}");
    }
    assert_eq!(with_id(asked.clone(), 7)[..3], [0, 7, 1]);
    assert_eq!((with_id(vec![1], 7), id(&[1])), (vec![1], 0));
}

/// Whatever comes: it is read without a panic, and what is said to it is a message that fits.
#[test]
fn mutations_of_questions() {
    let seeds = [
        ask(&["catalog"], A),
        with_edns(ask(&["catalog", "shop", "svc", "cluster", "local"], AAAA), 4096, 0),
        with_edns(ask(&["x".repeat(63).as_str(), "y"], ANY), 512, 0),
        vec![0; 40],
    ];
    let ips: Vec<IpAddr> = (0..100).map(v4).collect();
    let mut random = fastrand::Rng::with_seed(53);
    let mut questions = 0;
    for round in 0..200_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..random.usize(1..5) {
            let at = random.usize(..bytes.len().max(1));
            match random.u8(..4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at.min(bytes.len()), random.u8(..)),
                _ if bytes.is_empty() => {}
                2 => bytes[at] = random.u8(..),
                _ => bytes[at] = [0, 1, 0x3F, 0x40, 0xC0, 0xFF][random.usize(..6)],
            }
        }
        match read(&bytes) {
            Entry::Noise => {}
            Entry::Refusal(said) => assert!(said.len() >= HEADER && said[2] & QR != 0),
            Entry::Question(query) => {
                questions += 1;
                let _ = query.name();
                for transport in [Transport::Udp, Transport::Tcp] {
                    let said = query.answer(&ips, 5, 5, transport);
                    assert!(transport == Transport::Tcp || said.len() <= 1232);
                    assert_eq!(answers(&said, query.id(), query.question), Answered::Yes);
                }
                let failed = query.failure(Code::ServFail, Some(Extended::NetworkError));
                assert_eq!(answers(&failed, query.id(), query.question), Answered::Unwilling);
            }
        }
    }
    assert!(questions > 10_000, "{questions}");
}
