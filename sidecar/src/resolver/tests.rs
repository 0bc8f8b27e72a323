//! Forwarding to upstreams that lie, are silent, gone or unwilling, and the bounds; on loopback, with short waits.

use std::cell::RefCell;
use std::future::Future;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};

use super::*;
use crate::tls::Clock;

const QR: u8 = 0x80;

fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// The upstream's answer to what came: the same with another code, and a byte of its own at the end.
fn answer(asked: &[u8], code: u8) -> Vec<u8> {
    let mut bytes = asked.to_vec();
    bytes[2] |= QR;
    bytes[3] = code;
    bytes.push(42);
    bytes
}

fn resolver(upstreams: &[SocketAddr], change: impl FnOnce(&mut Limits)) -> Rc<Resolver> {
    let mut limits = Limits {
        dns_first_answer: Duration::from_millis(1),
        dns_server_timeout: Duration::from_millis(200),
        dns_budget: Duration::from_millis(300),
        ..Limits::default()
    };
    change(&mut limits);
    let settings = Settings {
        namespace: "shop".to_owned(),
        // With none at all it would be those of this machine.
        upstreams: upstreams.to_vec(),
        mark: None,
        own: vec!["127.0.0.1:9".parse().unwrap()],
    };
    let telemetry = Telemetry::new(crate::telemetry::Own::default());
    Rc::new(Resolver::new(settings, Directory::new(Clock::system()), telemetry, limits))
}

/// Runs on one thread, as the resolver does.
fn run<T>(body: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, body)
}

/// A server that says what `say` makes of each datagram.
async fn server(say: impl Fn(&[u8]) -> Vec<Vec<u8>> + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        let mut buffer = [0; 2048];
        while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
            for said in say(&buffer[..count]) {
                socket.send_to(&said, from).await.unwrap();
            }
        }
    });
    address
}

async fn nobody() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn counted(resolver: &Resolver, outcome: &str) -> String {
    let text = resolver.telemetry.encode();
    let line = format!("outrigger_dns_queries_total{{outcome=\"{outcome}\"}} ");
    text.lines().find_map(|row| row.strip_prefix(&line)).unwrap().to_owned()
}

#[test]
fn only_the_answer_to_what_was_asked_counts_and_comes_back_as_it_is() {
    run(async {
        let seen: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
        let asked = seen.clone();
        let liar = server(move |bytes| {
            asked.borrow_mut().push(bytes.to_vec());
            let right = answer(bytes, 3);
            let change = |at: usize| {
                let mut wrong = right.clone();
                wrong[at] ^= 1;
                wrong
            };
            let echo = bytes.to_vec();
            vec![change(0), change(13), echo, vec![], vec![0; 5], right]
        })
        .await;
        let resolver = resolver(&[liar], |_| {});
        for name in ["WWW.example.COM", "a.b.c.example.com", "catalog"] {
            let said = resolver.resolve(&question(name), Transport::Udp).await;
            assert_eq!(said, answer(&question(name), 3), "{name}");
        }
        let seen = seen.borrow();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0][2..], question("WWW.example.COM")[2..], "all but the id is the client's");
        assert!(seen.iter().any(|bytes| bytes[..2] != [0x12, 0x34]));
        assert_eq!((counted(&resolver, "forwarded"), counted(&resolver, "mesh")), ("3".into(), "0".into()));
        assert!(resolver.forwarder.nothing_is_out());
    });
}

#[test]
fn another_upstream_is_asked_when_one_is_gone_silent_or_unwilling() {
    run(async {
        let (gone, silent) = (nobody().await, server(|_| Vec::new()).await);
        let unwilling = server(|bytes| vec![answer(bytes, 5)]).await;
        let willing = server(|bytes| vec![answer(bytes, 0)]).await;
        for first in [gone, silent, unwilling] {
            let resolver = resolver(&[first, willing], |_| {});
            assert_eq!(resolver.resolve(&question("a.b.c"), Transport::Udp).await, answer(&question("a.b.c"), 0));
        }
        // What an unwilling one said is better than nothing.
        let resolver = resolver(&[gone, unwilling, gone], |_| {});
        assert_eq!(resolver.resolve(&question("a.b.c"), Transport::Udp).await, answer(&question("a.b.c"), 5));
    });
}

#[test]
fn failures_end_within_the_budget_and_say_so() {
    run(async {
        let (gone, silent) = (nobody().await, server(|_| Vec::new()).await);
        let own = "127.0.0.1:9".parse().unwrap();
        let asked = question("a.b.c");
        let Entry::Question(query) = message::read(&asked) else { panic!() };
        for (upstream, expected) in [(silent, Failure::Silence), (gone, Failure::Network), (own, Failure::NoUpstream)] {
            for transport in [Transport::Udp, Transport::Tcp].into_iter().filter(|_| upstream != silent) {
                assert_eq!(resolver(&[upstream], |_| {}).forwarder.ask(&query, transport).await, Err(expected));
            }
        }
        for upstreams in [&[silent, silent, silent][..], &[gone], &[own]] {
            let resolver = resolver(upstreams, |_| {});
            let begun = std::time::Instant::now();
            let said = resolver.resolve(&question("a.b.c"), Transport::Udp).await;
            assert!(begun.elapsed() < Duration::from_secs(10));
            let mut expected = question("a.b.c");
            expected[2] |= QR;
            expected[3] = 0x82;
            assert_eq!(said, expected, "SERVFAIL, and recursion is available");
            assert_eq!(counted(&resolver, "failed"), "1");
        }
    });
}

#[test]
fn by_tcp_as_it_came() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let asked = forward::read_message(&mut stream).await.unwrap();
            let mut long = answer(&asked, 0);
            long.resize(60_000, 7);
            forward::write_message(&mut stream, &long).await.unwrap();
        });
        let resolver = resolver(&[upstream], |limits| {
            limits.dns_server_timeout = Duration::from_secs(20);
            limits.dns_budget = Duration::from_secs(20);
        });
        let said = resolver.resolve(&question("a.b.c"), Transport::Tcp).await;
        assert_eq!((said.len(), &said[..2], said[59_999]), (60_000, &[0x12, 0x34][..], 7));
    });
}

#[test]
fn questions_in_flight_are_bounded_and_places_come_back() {
    run(async {
        let resolver = resolver(&[nobody().await], |limits| limits.dns_in_flight = 2);
        let client = "127.0.0.1:1".parse().unwrap();
        let admit = |bytes: &[u8]| resolver.admit(bytes, client, Transport::Udp);
        let (one, two) = (admit(&question("one.shop")), admit(&question("two.shop")));
        assert!(matches!((&one, &two), (Step::Wait(_), Step::Wait(_))));
        let Step::Say(third) = admit(&question("three.shop")) else { panic!("a third place") };
        assert!(resolver.directory.known().is_empty(), "nobody was asked yet, and about the third nobody will be");
        assert_eq!(third[3] & 0x0F, 2);
        assert!(matches!(admit(&[0; 5]), Step::Nothing));
        assert_eq!(counted(&resolver, "refused"), "2");
        drop(one);
        assert!(matches!(admit(&question("a.b.c")), Step::Wait(_)));
        drop(two);
        assert_eq!(resolver.in_flight.get(), 0);
    });
}

#[test]
fn own_questions_that_come_back_are_not_asked_again() {
    run(async {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let upstream = socket.local_addr().unwrap();
        let resolver = resolver(&[upstream], |limits| limits.dns_server_timeout = Duration::from_secs(20));
        let asking = resolver.clone();
        let asked = tokio::task::spawn_local(async move { asking.resolve(&question("a.b.c"), Transport::Udp).await });
        let mut buffer = [0; 512];
        let (count, from) = socket.recv_from(&mut buffer).await.unwrap();
        assert!(matches!(resolver.admit(&buffer[..count], from, Transport::Udp), Step::Nothing));
        let other = SocketAddr::new(from.ip(), from.port() ^ 1);
        assert!(matches!(resolver.admit(&buffer[..count], other, Transport::Udp), Step::Wait(_)));
        socket.send_to(&answer(&buffer[..count], 0), from).await.unwrap();
        assert_eq!(asked.await.unwrap(), answer(&question("a.b.c"), 0));
        assert!(matches!(resolver.admit(&buffer[..count], from, Transport::Udp), Step::Wait(_)));
    });
}
