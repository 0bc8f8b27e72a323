//! What a transparent pair of sidecars adds to the latency of a request, at 1,000 requests/s, against the same two
//! namespaces without the rules: `cargo bench -p outrigger-tests --bench transparent [-- ROUNDS SECONDS]`, as root. The
//! contenders take turns; only what is compared within one run means something. Bounded in count and time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use outrigger_tests::namespace::Families;
use outrigger_tests::pods::{Pods, Port};
use outrigger_tests::under_test;

/// Detected as HTTP, and known to be opaque.
const HTTP: Port = Port { service: 80, app: 8080 };
const OPAQUE: Port = Port { service: 6379, app: 6379 };
const RATE: u32 = 1_000;
const CONNECTIONS: u32 = 16;
const REQUEST: &[u8] = b"GET /bench HTTP/1.1\r\nHost: catalog.shop\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";
const BODY: usize = 1024;

fn main() {
    // `cargo bench` adds flags of its own.
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let (rounds, seconds) = (numbers.next().unwrap_or(5).clamp(1, 100), numbers.next().unwrap_or(4).clamp(1, 60));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Some(pods) = runtime.block_on(Pods::start(under_test!(), Families::V4, &[HTTP, OPAQUE], &[])) else { return };
    for port in [HTTP, OPAQUE] {
        serve(pods.at("catalog").enter(|| TcpListener::bind(("0.0.0.0", port.app)).unwrap()));
    }
    let contenders = [
        ("direct", SocketAddr::new(pods.address("catalog"), HTTP.app)),
        ("HTTP/1.1 through the pair", SocketAddr::new(pods.service(), HTTP.service)),
        ("opaque through the pair", SocketAddr::new(pods.service(), OPAQUE.service)),
    ];
    let mut seen = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (index, (_, target)) in contenders.iter().enumerate() {
            let verb = if index == 0 { "remove" } else { "apply" };
            ["cart", "catalog"].iter().for_each(|pod| pods.redirect(pod, verb));
            let streams = pods.at("cart").enter(|| (0..CONNECTIONS).map(|_| open(*target)).collect());
            seen[index].push(load(streams, seconds));
        }
    }
    println!("{RATE} requests/s, {CONNECTIONS} connections, {rounds} rounds of {seconds} s; medians over the rounds");
    println!("{:28} {:>9} {:>9} {:>12} {:>12}", "", "p50 ms", "p99 ms", "added p50", "added p99");
    let median = |index: usize, of: fn(&Latency) -> f64| {
        let mut all: Vec<f64> = seen[index].iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    for (index, (name, _)) in contenders.iter().enumerate() {
        let (p50, p99) = (median(index, |one| one.p50), median(index, |one| one.p99));
        let (added_p50, added_p99) = (p50 - median(0, |one| one.p50), p99 - median(0, |one| one.p99));
        println!("{name:28} {p50:9.3} {p99:9.3} {added_p50:12.3} {added_p99:12.3}");
    }
}

/// Milliseconds, from when a request should have begun.
#[derive(Clone)]
struct Latency {
    p50: f64,
    p99: f64,
}

/// Asks on each connection when the clock says so, whether or not the others were answered.
fn load(streams: Vec<TcpStream>, seconds: u32) -> Latency {
    let begun = Instant::now() + Duration::from_millis(10);
    let threads: Vec<_> = (0..)
        .zip(streams)
        .map(|(first, mut stream)| {
            std::thread::spawn(move || {
                let turns = (first..RATE * seconds).step_by(CONNECTIONS as usize);
                let mut buffer = Vec::new();
                let ask = |turn| {
                    let intended = begun + Duration::from_secs(1) / RATE * turn;
                    std::thread::sleep(intended.saturating_duration_since(Instant::now()));
                    exchange(&mut stream, &mut buffer);
                    intended.elapsed()
                };
                turns.map(ask).collect::<Vec<Duration>>()
            })
        })
        .collect();
    let mut all: Vec<Duration> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    all.sort();
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    Latency { p50: at(0.5), p99: at(0.99) }
}

/// A connection that has been used: the first request on it is no measure of the others.
fn open(target: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(target).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    exchange(&mut stream, &mut Vec::new());
    stream
}

fn exchange(stream: &mut TcpStream, buffer: &mut Vec<u8>) {
    stream.write_all(REQUEST).unwrap();
    buffer.clear();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk).unwrap();
        assert!(count > 0, "the answer ends early: {}", String::from_utf8_lossy(buffer));
        buffer.extend_from_slice(&chunk[..count]);
        let head = buffer.windows(4).position(|window| window == b"\r\n\r\n");
        if head.is_some_and(|head| buffer.len() >= head + 4 + BODY) {
            return assert!(buffer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(buffer));
        }
    }
}

/// Answers each request with the same, and does no more than that.
fn serve(listener: TcpListener) {
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {BODY}\r\n\r\n");
    let answer = [answer.as_bytes(), &[b'x'; BODY]].concat();
    let each = move |mut stream: TcpStream, answer: Vec<u8>| {
        stream.set_nodelay(true)?;
        let mut buffer = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let count = stream.read(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            buffer.extend_from_slice(&chunk[..count]);
            while let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                buffer.drain(..end + 4);
                stream.write_all(&answer)?;
            }
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            // A connection that breaks is the client's to notice.
            std::thread::spawn(move || -> std::io::Result<()> { each(stream, answer) });
        }
    });
}
