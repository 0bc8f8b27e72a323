//! Who gets a place and who has to go, and what the watchdog asks of whom.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::SpiffeId;

use super::places::ALWAYS;
use super::*;
use crate::outcome::Reason;

fn client() -> SocketAddr {
    ([127, 0, 0, 1], 40000).into()
}

/// Each at another address: no source has all places.
fn clients() -> impl Iterator<Item = SocketAddr> {
    (0..=u8::MAX).map(|number| ([10, 0, 0, number], 40000).into())
}

fn principal(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://outrigger.local/ns/shop/sa/{account}")).unwrap()
}

#[test]
fn places_are_bounded_and_given_back() {
    let table = Table::new(Places::new(1));
    let first = table.enter(Direction::Outbound, client()).unwrap();
    assert!(table.enter(Direction::Outbound, client()).is_none());
    drop(first);
    assert!(table.enter(Direction::Outbound, client()).is_some());
    assert!(table.is_empty());
}

fn facts(arrival: Arrival) -> Facts {
    Facts {
        application: client(),
        arrival,
        proof: None,
        caller: None,
        client: client().ip(),
        opaque: false,
        sni: None,
        head: None,
    }
}

#[test]
fn neither_direction_takes_the_places_of_the_other() {
    for (greedy, other) in [(Direction::Inbound, Direction::Outbound), (Direction::Outbound, Direction::Inbound)] {
        let table = Table::new(Places::new(100));
        let fill = |direction| -> Vec<Registered> {
            let entered = clients().map_while(|client| table.enter(direction, client));
            entered.inspect(|entry| entry.enter(State::Busy)).take(200).collect()
        };
        let taken = fill(greedy);
        assert_eq!(taken.len(), 80, "{greedy:?}");
        let others = fill(other);
        assert_eq!(others.len(), 20, "{other:?}");
        assert!(taken.iter().all(|entry| entry.command() == Command::Run), "what runs is not closed for others");
    }
}

#[test]
fn the_longest_idle_strangers_make_room_over_all_workers() {
    let places = Places::new(7);
    let tables = [Table::new(places.clone()), Table::new(places.clone())];
    // The inbound share of 7 is 6. Each case: how it came, what it does.
    let cases = [
        (Some(Arrival::Mutual), State::Idle, false),
        (Some(Arrival::Plaintext), State::Busy, false),
        (Some(Arrival::Plaintext), State::Tunnel, false),
        (Some(Arrival::Plaintext), State::Idle, true),
        (Some(Arrival::Undecided), State::Opening, true),
        (None, State::Opening, true),
    ];
    let open: Vec<_> = cases
        .iter()
        .enumerate()
        .zip(clients())
        .map(|((index, (arrival, state, _)), client)| {
            let entry = tables[index % 2].enter(Direction::Inbound, client).unwrap();
            arrival.iter().for_each(|arrival| entry.let_in(facts(*arrival)));
            if *arrival == Some(Arrival::Mutual) {
                assert!(entry.prove(&principal("cart")));
            }
            entry.enter(*state);
            entry.since.store(index as u64, Relaxed);
            entry
        })
        .collect();
    let mut later = Vec::new();
    for expected in [3, 4, 5] {
        let entry = tables[0].enter(Direction::Inbound, client()).expect("room was made");
        entry.enter(State::Busy);
        later.push(entry);
        let closed = |entry: &&Registered| entry.closed_for() == Some(Reason::Overloaded);
        let closed: Vec<_> = open.iter().filter(closed).map(|entry| entry.since()).collect();
        assert_eq!(closed, (3..=expected).collect::<Vec<u64>>());
    }
    let entry = tables[0].enter(Direction::Inbound, client()).expect("no stranger is left");
    entry.enter(State::Busy);
    later.push(entry);
    assert_eq!(open[0].closed_for(), Some(Reason::Overloaded));
    assert!(tables[1].enter(Direction::Inbound, client()).is_none(), "nothing idle is left");
    assert_eq!(places.open(), 6);
    drop(open);
    assert_eq!(places.open(), 4, "the place of an evicted connection is given back once");
    // The application's own connections make strangers go as well.
    let stranger = tables[0].enter(Direction::Inbound, client()).unwrap();
    let outbound: Vec<_> = (0..3).map(|_| tables[1].enter(Direction::Outbound, client()).unwrap()).collect();
    assert_eq!((stranger.command(), outbound.len(), later.len()), (Command::Close, 3, 4));
}

#[test]
fn neither_one_identity_nor_one_source_has_all_places() {
    // Of 100 the inbound share is 80, and three quarters of that are 60.
    for proved in [true, false] {
        let table = Table::new(Places::new(100));
        let mut next = clients();
        let mut enter = |state: State| {
            let client = if proved { next.next().unwrap() } else { client() };
            let entry = table.enter(Direction::Inbound, client)?;
            (!proved || entry.prove(&principal("cart"))).then_some(())?;
            entry.enter(state);
            Some(entry)
        };
        let busy: Vec<_> = (0..59).map(|_| enter(State::Busy).unwrap()).collect();
        let idle = enter(State::Idle).unwrap();
        let last = enter(State::Busy).expect("its own idle one makes room");
        assert_eq!(idle.closed_for(), Some(Reason::Overloaded));
        assert!(enter(State::Busy).is_none(), "{proved}");
        // Somebody else, whose identity is another, or none.
        let others: Vec<_> = (1..=20)
            .map(|number| {
                let entry = table.enter(Direction::Inbound, ([192, 0, 2, number], 1).into()).expect("a place");
                assert!(number % 2 == 0 || entry.prove(&principal("web")));
                entry.enter(State::Busy);
                entry
            })
            .collect();
        assert!(table.enter(Direction::Inbound, ([192, 0, 2, 77], 1).into()).is_none(), "all are taken");
        assert!(busy.iter().chain(&others).all(|entry| entry.command() == Command::Run));
        drop((idle, last, busy, others));
        assert_eq!(table.places().open(), 0);
    }
}

#[test]
fn what_does_not_end_when_its_certificate_does_is_closed() {
    let table = Table::new(Places::new(10));
    let long = Duration::from_secs(3600);
    let limits =
        IdleLimits { head: long, client_idle: long, stream_idle: long, stream_stalled: long, tunnel_idle: long };
    let end = SystemTime::now();
    let states = [State::Idle, State::Head, State::Busy, State::Tunnel];
    let open: Vec<_> = states
        .iter()
        .map(|state| {
            let entry = table.enter(Direction::Inbound, client()).unwrap();
            entry.retire_at(end);
            entry.enter(*state);
            entry
        })
        .collect();
    let commands = |seconds: f64| {
        table.sweep(&limits, end + Duration::from_secs_f64(seconds));
        open.iter().map(|entry| entry.command()).collect::<Vec<_>>()
    };
    use Command::{Close, Finish, Run};
    assert_eq!(commands(0.0), [Run, Run, Run, Run]);
    assert_eq!(commands(0.1), [Finish, Finish, Finish, Run]);
    assert_eq!(commands(3.1), [Close, Close, Close, Run], "opaque bytes live on");
    assert_eq!(open[0].closed_for(), Some(Reason::PeerCertificate));
}

#[test]
fn a_connection_that_does_not_acknowledge_the_end_is_ended() {
    let table = Table::new(Places::new(10));
    let (idle, busy) =
        (table.enter(Direction::Inbound, client()).unwrap(), table.enter(Direction::Inbound, client()).unwrap());
    idle.enter(State::Idle);
    busy.enter(State::Busy);
    table.ask_all(Command::Finish, |_| true);
    let mut now = 0;
    let mut after = |milliseconds: u64| {
        now += milliseconds;
        [&idle, &busy].map(|entry| {
            let idle = Duration::from_millis(now - entry.since());
            entry.hurry(now, idle);
            entry.command()
        })
    };
    assert_eq!(after(1_000), [Command::Finish; 2]);
    assert_eq!(after(1), [Command::Refuse; 2]);
    assert_eq!(after(500), [Command::Refuse; 2]);
    assert_eq!(after(500), [Command::Close, Command::Refuse], "what runs has until the end of the drain");
    busy.enter(State::Idle);
    assert_eq!(after(1)[1], Command::Close, "its last stream has ended");
}

#[test]
fn facts_are_judged_when_they_are_new_and_when_policy_changed() {
    let table = Table::new(Places::new(10));
    let entry = table.enter(Direction::Inbound, client()).unwrap();
    let mut asked = 0;
    let mut judge = |changed, verdict: Option<Reason>| {
        table.judge(changed, |_| {
            asked += 1;
            verdict
        });
        asked
    };
    assert_eq!(judge(true, None), 0, "not let in yet");
    entry.let_in(facts(Arrival::Plaintext));
    assert_eq!(judge(false, None), 1);
    assert_eq!(judge(false, None), 1);
    assert_eq!(judge(true, Some(Reason::MtlsRequired)), 2);
    assert_eq!((entry.command(), entry.closed_for()), (Command::Close, Some(Reason::MtlsRequired)));
}

#[test]
fn while_memory_is_short_few_come_in_and_none_has_to_go() {
    let places = Places::new(100);
    let table = Table::new(places.clone());
    let enter = || table.enter(Direction::Outbound, client());
    let mut open: Vec<_> = (0..50).map(|_| enter().unwrap()).collect();
    places.refuse(true);
    assert!(enter().is_none());
    assert_eq!(places.open(), 50, "what is open goes on");
    open.truncate(ALWAYS - 1);
    let last = enter().expect("a few are always let in");
    assert!(enter().is_none());
    places.refuse(false);
    assert!(enter().is_some());
    drop(last);
}

#[test]
fn the_watchdog_knows_a_limit_for_each_state() {
    let table = Table::new(Places::new(10));
    let zero = IdleLimits {
        head: Duration::ZERO,
        client_idle: Duration::ZERO,
        stream_idle: Duration::ZERO,
        stream_stalled: Duration::ZERO,
        tunnel_idle: Duration::ZERO,
    };
    let cases = [
        (State::Opening, Command::Run),
        (State::Idle, Command::Finish),
        (State::Head, Command::HeadTimeout),
        (State::Busy, Command::Close),
        // Its task is asked first.
        (State::Tunnel, Command::Run),
    ];
    let entries: Vec<_> = cases
        .iter()
        .map(|(state, _)| {
            let entry = table.enter(Direction::Inbound, client()).unwrap();
            entry.enter(*state);
            entry
        })
        .collect();
    while table.clock.begun.elapsed() < Duration::from_millis(2) {
        std::hint::spin_loop();
    }
    table.sweep(&zero, SystemTime::now());
    for (entry, (state, command)) in entries.iter().zip(cases) {
        assert_eq!(entry.command(), command, "{state:?}");
        assert_eq!(entry.take_doubt().is_some(), state == State::Tunnel, "{state:?}");
    }
}

#[test]
fn a_weaker_command_does_not_replace_a_stronger() {
    let table = Table::new(Places::new(1));
    let entry = table.enter(Direction::Inbound, client()).unwrap();
    entry.ask(Command::Close);
    entry.ask(Command::Finish);
    assert_eq!(entry.command(), Command::Close);
}
