//! Promise: an HTTP/2 peer that floods (RFC 9113 section 10.5) is told to calm down or is closed, whether it is the
//! application at the outbound listener or another workload with a good certificate at the inbound port. The
//! application never has more to do than the stream limit, memory stays, and everybody else is served meanwhile.

#[path = "hostile_http2/answers.rs"]
mod answers;
#[path = "hostile_http2/field.rs"]
mod field;
#[path = "hostile_http2/frames.rs"]
mod frames;
#[path = "hostile_http2/invalid.rs"]
mod invalid;

use std::time::{Duration, Instant};

use field::{Bystander, Field, PLACES, Place};
use frames::*;
use http::Request;
use outrigger_tests::grpc::Http2;
use tokio::sync::{Mutex, watch};

/// Floods come one at a time, so that what is measured is theirs.
static ALONE: Mutex<()> = Mutex::const_new(());

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const REFUSED_STREAM: u32 = 7;
const CANCEL: [u8; 4] = 8_u32.to_be_bytes();

/// How long a flood may go on before it must have been stopped; long, because a busy machine stops it late.
const FLOOD: Duration = Duration::from_secs(30);

/// Sends until the other side ends it or the time is over; says whether it ended.
async fn flood(field: &Field, client: &mut Client, time: Duration, mut next: impl FnMut() -> Vec<u8>) -> bool {
    let begun = Instant::now();
    let mut most = 0;
    while begun.elapsed() < time {
        if client.has(|heard| heard.ended || heard.goaway.is_some()) || !client.try_send(next()).await {
            return true;
        }
        most = most.max(field.in_flight());
        tokio::task::yield_now().await;
    }
    assert!(most <= Place::Mesh.streams(), "{most} requests in flight at the application");
    false
}

/// The frames of one stream.
type Attack<'a> = &'a dyn Fn(u32) -> Vec<u8>;

fn odd(count: &mut u32) -> u32 {
    let stream = *count;
    *count += 2;
    stream
}

#[tokio::test]
async fn rapid_reset_is_told_to_calm_down() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    for place in PLACES {
        for at_once in [5, 100] {
            let name = format!("{place:?}, {at_once} at once");
            let bystander = Bystander::start(&field).await;
            let mut client = field.client(place).await;
            let mut stream = 1;
            // A thousand a second, or as fast as it goes.
            let mut pace = tokio::time::interval(Duration::from_millis(5));
            let begun = Instant::now();
            let mut most = 0;
            while begun.elapsed() < FLOOD && client.has(|heard| heard.goaway.is_none()) {
                if at_once == 5 {
                    pace.tick().await;
                }
                let mut burst = Vec::new();
                for _ in 0..at_once {
                    let stream = odd(&mut stream);
                    burst.extend(get(stream, "/hold"));
                    burst.extend(frame(RST_STREAM, 0, stream, CANCEL));
                }
                if !client.try_send(burst).await {
                    break;
                }
                most = most.max(field.in_flight());
            }
            let heard = client.until(&format!("{name}: the end"), |heard| heard.ended).await;
            assert_eq!(heard.goaway, Some(ENHANCE_YOUR_CALM), "{name}: {heard:?}");
            assert!(most <= place.streams(), "{name}: {most} in flight");
            bystander.was_served(&name).await;
            field.still_serves(place, &name).await;
        }
    }
}

#[tokio::test]
async fn made_you_reset_is_told_to_calm_down() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    let open = |stream| frame(HEADERS, END_HEADERS, stream, request("POST", "/hold"));
    // Of two of them the library ends the connection at the first.
    let attacks: [(&str, u32, Attack); 4] = [
        ("WINDOW_UPDATE 0", PROTOCOL_ERROR, &|stream| [open(stream), frame(WINDOW_UPDATE, 0, stream, [0; 4])].concat()),
        ("WINDOW_UPDATE overflow", ENHANCE_YOUR_CALM, &|stream| {
            [open(stream), frame(WINDOW_UPDATE, 0, stream, 0x7fff_ffff_u32.to_be_bytes())].concat()
        }),
        ("DATA after END_STREAM", PROTOCOL_ERROR, &|stream| {
            [get(stream, "/hold"), frame(DATA, 0, stream, b"more")].concat()
        }),
        ("malformed heads", ENHANCE_YOUR_CALM, &|stream| {
            let fields = [request("GET", "/hold"), literal(b"connection", b"close")].concat();
            frame(HEADERS, END_STREAM | END_HEADERS, stream, fields)
        }),
    ];
    for place in PLACES {
        for (name, code, attack) in attacks {
            let bystander = Bystander::start(&field).await;
            let mut client = field.client(place).await;
            let mut stream = 1;
            let ended = flood(&field, &mut client, FLOOD, || attack(odd(&mut stream))).await;
            assert!(ended, "{place:?}: {name} goes on after {stream}");
            let heard = client.until(&format!("{place:?} {name}: the end"), |heard| heard.ended).await;
            assert_eq!(heard.goaway, Some(code), "{place:?} {name}: {heard:?}");
            assert!(field.in_flight() <= place.streams());
            bystander.was_served(name).await;
            field.still_serves(place, name).await;
        }
    }
}

#[tokio::test]
async fn endless_header_blocks_end_the_connection() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    let before = field.app.count();
    for place in PLACES {
        for (name, piece) in [("empty", 0), ("small", 1), ("16 KiB", 16 * 1024)] {
            let bystander = Bystander::start(&field).await;
            let mut client = field.client(place).await;
            client.send(frame(HEADERS, END_STREAM, 1, request("GET", "/endless"))).await;
            // A literal whose value is always still to come.
            let piece = vec![0x40; piece];
            let next = || frame(CONTINUATION, 0, 1, &piece);
            assert!(flood(&field, &mut client, FLOOD, next).await, "{place:?}: {name}");
            client.until(&format!("{place:?} {name}: closed"), |heard| heard.ended).await;
            bystander.was_served(name).await;
        }
        field.still_serves(place, "endless header blocks").await;
    }
    let seen = field.app.requests();
    assert!(seen.iter().skip(before).all(|seen| !seen.target.contains("endless")));
}

#[tokio::test]
async fn control_frames_without_end_are_bounded() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    let floods: [(&str, Vec<u8>); 8] = [
        ("SETTINGS", frame(SETTINGS, 0, 0, setting(3, 100))),
        ("PING", frame(PING, 0, 0, [1; 8])),
        ("PRIORITY", frame(PRIORITY, 0, 5, [0, 0, 0, 3, 16])),
        ("WINDOW_UPDATE", frame(WINDOW_UPDATE, 0, 0, 1_u32.to_be_bytes())),
        ("empty DATA", frame(DATA, 0, 1, [])),
        ("padded empty DATA", frame(DATA, PADDED, 1, [3, 0, 0, 0])),
        ("one byte of DATA in 256", frame(DATA, PADDED, 1, [&[254, b'x'][..], &[0; 254]].concat())),
        ("an unknown frame", frame(0xbe, 0, 0, [1; 8])),
    ];
    for place in PLACES {
        for (name, frames) in &floods {
            for hears in [true, false] {
                let bystander = Bystander::start(&field).await;
                let mut client = Client::raw(field.connect(place).await, hears);
                client.send(PREFACE).await;
                client.send(frame(SETTINGS, 0, 0, [])).await;
                client.send(frame(SETTINGS, ACK, 0, [])).await;
                client.send(frame(HEADERS, END_HEADERS, 1, request("POST", "/hold"))).await;
                let burst = frames.repeat(64);
                let ended = flood(&field, &mut client, FLOOD, || burst.clone()).await;
                assert!(ended, "{place:?}: {name} goes on, {:?}", client.heard());
                if hears {
                    let heard = client.until(&format!("{place:?} {name}: closed"), |heard| heard.ended).await;
                    // A flood of DATA runs over its window first.
                    let codes = [ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR];
                    let goaway = heard.goaway.is_some_and(|code| codes.contains(&code));
                    assert!(goaway, "{place:?} {name}: {heard:?}");
                }
                drop(client);
                bystander.was_served(name).await;
            }
        }
        field.still_serves(place, "control frames").await;
    }
}

#[tokio::test]
async fn header_lists_beyond_the_limit_are_never_forwarded() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    let mut bomb = request("GET", "/bomb");
    bomb.push(0x40);
    for (text, byte) in [(5, b'n'), (4_000, b'v')] {
        integer(&mut bomb, 0, 7, text);
        bomb.extend(std::iter::repeat_n(byte, text));
    }
    bomb.extend(std::iter::repeat_n(0x80 | 62, 14_000));
    let list = |count: usize, size: usize| {
        let field = literal(b"x-large", &vec![b'v'; size]);
        [request("GET", "/bomb"), field.repeat(count)].concat()
    };
    let blocks = [
        ("HPACK bomb", bomb),
        ("1 MiB", list(64, 16 * 1024)),
        ("80 KiB", list(5, 16 * 1024)),
        ("200 fields", list(200, 1)),
    ];
    for place in PLACES {
        for (name, block) in &blocks {
            let bystander = Bystander::start(&field).await;
            let mut client = field.client(place).await;
            let mut pieces = block.chunks(16_000);
            let mut sending = frame(HEADERS, END_STREAM, 1, pieces.next().unwrap());
            for piece in pieces {
                sending.extend(frame(CONTINUATION, 0, 1, piece));
            }
            sending.extend(frame(CONTINUATION, END_HEADERS, 1, []));
            client.try_send(sending).await;
            let heard = client.until(&format!("{place:?} {name}: refused"), |heard| heard.is_settled(1)).await;
            assert!(!heard.answered_200(1), "{place:?} {name}: {heard:?}");
            bystander.was_served(name).await;
        }
        field.still_serves(place, "large header lists").await;
    }
    assert!(field.app.requests().iter().all(|seen| !seen.target.contains("bomb")), "forwarded");
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    for place in PLACES {
        let limit = place.streams();
        let mut client = field.client(place).await;
        let streams: Vec<u32> = (0..limit + 50).map(|index| u32::try_from(index).unwrap() * 2 + 1).collect();
        for chunk in streams.chunks(50) {
            client.send(chunk.iter().flat_map(|stream| get(*stream, "/hold")).collect::<Vec<_>>()).await;
        }
        let heard = client.until("the others are refused", |heard| heard.resets.len() >= 50).await;
        assert!(heard.resets.iter().all(|(_, code)| *code == REFUSED_STREAM), "{heard:?}");
        assert!(field.in_flight() <= limit, "{place:?}: {}", field.in_flight());
        drop(client);
        outrigger_tests::eventually("all are given up", async || (field.in_flight() == 0).then_some(())).await;
        field.still_serves(place, "too many streams").await;
    }
}

#[tokio::test]
async fn windows_that_never_open_hold_little_and_end() {
    let _alone = ALONE.lock().await;
    let field = Field::with(|limits| {
        limits.stream_idle = Duration::from_secs(2);
        limits.head_timeout = Duration::from_millis(400);
    })
    .await;
    for place in PLACES {
        for by_bytes in [false, true] {
            let name = format!("{place:?}, {}", if by_bytes { "one byte at a time" } else { "window 0" });
            let bystander = Bystander::start(&field).await;
            // SETTINGS_INITIAL_WINDOW_SIZE.
            let mut client = Client::open(field.connect(place).await, &setting(4, 0)).await;
            let streams: Vec<u32> = (0..250).map(|index| index * 2 + 1).collect();
            client.send(streams.iter().flat_map(|stream| get(*stream, "/bytes/1048576")).collect::<Vec<_>>()).await;
            client.until(&format!("{name}: answers begin"), |heard| heard.heads.len() >= 90 || heard.ended).await;
            if by_bytes {
                let one = |stream: &u32| frame(WINDOW_UPDATE, 0, *stream, 1_u32.to_be_bytes());
                let all: Vec<u8> = streams.iter().take(90).flat_map(one).collect();
                flood(&field, &mut client, Duration::from_secs(1), || all.clone()).await;
            }
            let settled = |heard: &Heard| heard.ended || heard.resets.len() >= 250;
            let heard = client.until(&format!("{name}: stalled streams end"), settled).await;
            let taken: usize = heard.data.iter().map(|(_, length)| length).sum();
            assert!(taken < 1 << 20, "{name}: {taken}");
            bystander.was_served(&name).await;
        }
        field.still_serves(place, "stalled windows").await;
    }
}

/// Asks and uploads on one HTTP/2 connection until it is told to stop; says how often.
async fn victim(field: &Field, stop: watch::Receiver<bool>) -> tokio::task::JoinHandle<usize> {
    let client = Http2::open(field.near.outbound()).await;
    tokio::spawn(async move {
        let (upload, mut count) = (vec![b'u'; 100_000], 0);
        while !*stop.borrow() || count < 20 {
            let answer = client.get("/bytes/100000").await.expect("an answer");
            assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 100_000), "request {count}");
            let request = Request::post("http://catalog.shop/count").body(()).unwrap();
            let answer = client.ask(request, &upload).await.expect("an answer");
            assert_eq!(answer.status, 200, "upload {count}");
            count += 1;
        }
        count
    })
}

/// Attacks that end their connections, one after the other.
async fn attacks_that_end(field: &Field, place: Place) {
    let open = |stream| frame(HEADERS, END_HEADERS, stream, request("POST", "/hold"));
    let attacks: [Attack; 4] = [
        &|stream| [get(stream, "/hold"), frame(RST_STREAM, 0, stream, CANCEL)].concat(),
        &|stream| [open(stream), frame(WINDOW_UPDATE, 0, stream, 0x7fff_ffff_u32.to_be_bytes())].concat(),
        &|stream| [get(stream, "/hold"), frame(DATA, 0, stream, b"more")].concat(),
        &|_| frame(PING, 0, 0, [1; 8]),
    ];
    for (number, attack) in attacks.into_iter().enumerate() {
        let mut client = field.client(place).await;
        let mut stream = 1;
        let burst = || (0..100).flat_map(|_| attack(odd(&mut stream))).collect();
        assert!(flood(field, &mut client, FLOOD, burst).await, "{place:?}: {number} goes on");
    }
}

/// Streams whose windows open by a byte, or by nothing but the connection's, beside the requests of others, between the same
/// two sidecars and after other attacks.
#[tokio::test]
async fn nobody_else_fails_while_one_client_takes_byte_by_byte() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    let (stop, stopped) = watch::channel(false);
    let mut victims = Vec::new();
    for _ in 0..3 {
        victims.push(victim(&field, stopped.clone()).await);
    }
    let bystander = Bystander::start(&field).await;
    let streams: Vec<u32> = (0..60).map(|index| index * 2 + 1).collect();
    for place in PLACES {
        attacks_that_end(&field, place).await;
        for window in [0, 1 << 20] {
            let mut client = Client::open(field.connect(place).await, &setting(4, window)).await;
            client.send(streams.iter().flat_map(|stream| get(*stream, "/bytes/100000")).collect::<Vec<_>>()).await;
            client.until("answers begin", |heard| heard.heads.len() == streams.len()).await;
            // One byte for each stream, or one for all.
            let opened = |stream: u32| frame(WINDOW_UPDATE, 0, stream, 1_u32.to_be_bytes());
            let opened = match window {
                0 => streams.iter().flat_map(|stream| opened(*stream)).collect(),
                _ => opened(0),
            };
            flood(&field, &mut client, Duration::from_secs(2), || opened.clone()).await;
            // It leaves in the middle of it.
        }
    }
    stop.send_replace(true);
    for victim in victims {
        victim.await.unwrap();
    }
    bystander.stop().await;
}
