//! What a client's first bytes are: what was decided on some of them is not changed by more, or the screen sees it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_sidecar::protocol::detect::{Detected, Sight, detect, speaks_http2};
use outrigger_sidecar::protocol::screen::Screen;
use outrigger_sidecar::tls::{Hello, read_hello};

#[derive(PartialEq, Eq, Debug)]
enum Said {
    Mesh(Option<String>),
    Foreign(Option<String>),
    Incomplete,
    Invalid,
}

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    let first = &bytes[..usize::from(cut).min(bytes.len())];
    let screened = Screen::default().client(bytes).is_err();
    let mut pieces = Screen::default();
    let early = pieces.client(first).and_then(|()| pieces.client(&bytes[first.len()..]));
    assert_eq!(early.is_err(), screened, "{} then {}", first.escape_ascii(), bytes.escape_ascii());
    match (detect(first), detect(bytes)) {
        (Sight::Is(Detected::Opaque), Sight::Is(Detected::Http1)) => assert!(screened, "{}", bytes.escape_ascii()),
        (Sight::Is(early), late) => {
            assert_eq!(late, Sight::Is(early), "{} then {}", first.escape_ascii(), bytes.escape_ascii());
        }
        (Sight::Begun | Sight::Short, _) => {}
    }
    if speaks_http2(first) {
        assert!(speaks_http2(bytes));
    }
    let (early, late) = (hello(first), hello(bytes));
    if early != Said::Incomplete {
        assert_eq!(early, late, "{} then {}", first.escape_ascii(), bytes.escape_ascii());
    }
});

fn hello(bytes: &[u8]) -> Said {
    match read_hello(bytes) {
        Hello::Mesh(hello) => Said::Mesh(hello.client_hello().server_name().map(str::to_owned)),
        Hello::Foreign { sni } => Said::Foreign(sni),
        Hello::Incomplete => Said::Incomplete,
        Hello::Invalid => Said::Invalid,
    }
}
