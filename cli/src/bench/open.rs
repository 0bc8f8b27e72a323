//! The open loop: requests begin at fixed times, spread over connections with a thread each. A latency runs from the
//! time at which the request should have begun, so that a target that stalls cannot hide it by holding up the load.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::histogram::Histogram;
use super::load::{self, LONGEST, REQUEST, Seen, Settings, nanos};

/// What one thread saw.
struct Share {
    latencies: Histogram,
    answered: u64,
    failed: u64,
}

pub fn run(settings: &Settings) -> anyhow::Result<()> {
    // Threads inherit it: sleep to the microsecond. Without it the numbers are only coarser.
    let _ = std::fs::write("/proc/self/timerslack_ns", "1");
    let streams = (0..settings.connections).map(|_| open(settings.target)).collect::<io::Result<Vec<_>>>()?;
    load::wait_for_word()?;
    let begun = Instant::now();
    let shares: Vec<Share> = std::thread::scope(|scope| {
        let running: Vec<_> = streams
            .into_iter()
            .enumerate()
            .map(|(index, stream)| {
                let turns = turns(index as u64, settings);
                scope.spawn(move || ask(stream, settings.target, begun, turns))
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let mut seen = Seen { seconds: begun.elapsed().as_secs_f64(), ..Seen::default() };
    let mut latencies = Histogram::default();
    for share in &shares {
        seen.answered += share.answered;
        seen.failed += share.failed;
        latencies.merge(&share.latencies);
    }
    seen.latencies = latencies.sparse();
    seen.tell()?;
    load::wait_for_end();
    Ok(())
}

/// When the requests of one connection begin, after the start.
fn turns(index: u64, settings: &Settings) -> impl Iterator<Item = Duration> + use<> {
    let rate = u64::from(settings.rate);
    let total = rate * settings.seconds;
    (index..total)
        .step_by(usize::from(settings.connections))
        .map(move |n| Duration::from_nanos(n.saturating_mul(1_000_000_000) / rate))
}

fn ask(mut stream: TcpStream, target: SocketAddr, begun: Instant, turns: impl Iterator<Item = Duration>) -> Share {
    let mut share = Share { latencies: Histogram::default(), answered: 0, failed: 0 };
    let mut buffer = Vec::with_capacity(4096);
    for turn in turns {
        let intended = begun + turn;
        std::thread::sleep(intended.saturating_duration_since(Instant::now()));
        if begun.elapsed() > LONGEST {
            share.failed += 1;
        } else if exchange(&mut stream, &mut buffer).is_ok() {
            share.answered += 1;
            share.latencies.record(nanos(intended.elapsed()));
        } else {
            share.failed += 1;
            if let Ok(fresh) = open(target) {
                stream = fresh;
            }
        }
    }
    share
}

fn open(target: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // The first request on a connection is no measure of the others.
    exchange(&mut stream, &mut Vec::new())?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(REQUEST)?;
    buffer.clear();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.extend_from_slice(&chunk[..count]);
        if load::whole_answer(buffer)?.is_some_and(|length| buffer.len() >= length) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::Mode;
    use super::*;

    #[test]
    fn every_request_has_one_turn_on_one_connection() {
        let settings = Settings {
            target: ([127, 0, 0, 1], 1).into(),
            mode: Mode::Open,
            connections: 7,
            requests: 0,
            rate: 100,
            seconds: 2,
        };
        let mut all: Vec<Duration> = (0..7).flat_map(|index| turns(index, &settings)).collect();
        all.sort();
        let expected: Vec<Duration> = (0..200).map(|n| Duration::from_millis(n * 10)).collect();
        assert_eq!(all, expected);
    }
}
