//! A DNS message: what is answered repeats the question and parses as a message of one question, is no longer than its
//! transport takes, and an upstream's message is believed only when it repeats id and question.
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::resolver::message::{Answered, Code, Entry, Extended, HEADER, Transport, answers, id, read, with_id};

fuzz_target!(|input: (u8, u16, &[u8], &[u8])| {
    let (count, other_id, bytes, upstream) = input;
    match read(bytes) {
        Entry::Noise => {}
        Entry::Refusal(said) => assert!(is_answer(&said, bytes), "{said:x?} to {bytes:x?}"),
        Entry::Question(query) => {
            let _ = query.name();
            let ips: Vec<IpAddr> =
                (0..count).flat_map(|one| [IpAddr::from([10, 0, 0, one]), IpAddr::from([u16::from(one); 8])]).collect();
            for transport in [Transport::Udp, Transport::Tcp] {
                let said = query.answer(&ips, 30, 5, transport);
                assert!(is_answer(&said, bytes), "{said:x?} to {bytes:x?}");
                assert!(said.len() <= if transport == Transport::Udp { 1232 } else { 65535 }, "{}", said.len());
                assert!(said[HEADER..].starts_with(query.question));
                assert_eq!(answers(&said, query.id(), query.question), Answered::Yes);
                let moved = with_id(said, other_id);
                assert_eq!(answers(&moved, query.id(), query.question) == Answered::Yes, other_id == query.id());
            }
            let failed = query.failure(Code::ServFail, Some(Extended::NetworkError));
            assert_eq!(answers(&failed, query.id(), query.question), Answered::Unwilling);
            if answers(upstream, other_id, query.question) != Answered::No {
                assert_eq!(id(upstream), other_id);
            }
        }
    }
});

/// It has the id of what it answers, and nobody would answer it.
fn is_answer(said: &[u8], to: &[u8]) -> bool {
    said.len() >= HEADER && id(said) == id(to) && read(said) == Entry::Noise
}
