//! Who still calls without mutual TLS: one line per address and port of the application, so that an operator knows when a
//! port can become STRICT. Metrics have no addresses; this table has, and is bounded. The inbound side notes each
//! connection, the admin port shows the table.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// So many callers are listed; the connections of others are only counted.
const MOST: usize = 256;
/// A caller that was not seen for this long gives its line to another one when the table is full.
const GONE_AFTER: Duration = Duration::from_secs(3600);

/// How a caller came, and whether it was let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unproved {
    Plaintext,
    /// TLS of the application's own.
    ForeignTls,
    /// Either of them on a port that demands mutual TLS.
    Refused,
}

#[derive(Debug, Default)]
pub struct PlaintextCallers(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    callers: HashMap<(IpAddr, u16), Seen>,
    unlisted: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    plaintext: u64,
    foreign_tls: u64,
    refused: u64,
    last_port: u16,
    first: SystemTime,
    last: SystemTime,
}

/// One line of `/plaintext-callers`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CallerView {
    /// The caller.
    pub address: IpAddr,
    /// The port from which its last connection came.
    pub last_port: u16,
    /// The application's port.
    pub port: u16,
    /// Connections by kind.
    pub plaintext: u64,
    pub foreign_tls: u64,
    pub refused: u64,
    /// Seconds since 1970.
    pub first_seen: u64,
    pub last_seen: u64,
}

/// The whole table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CallersView {
    /// Latest first.
    pub callers: Vec<CallerView>,
    /// Connections of callers for which there was no line.
    pub unlisted: u64,
}

impl PlaintextCallers {
    /// Notes one connection of `caller` to the application's port.
    pub fn note(&self, caller: SocketAddr, port: u16, how: Unproved, now: SystemTime) {
        let key = (caller.ip().to_canonical(), port);
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.callers.len() >= MOST && !table.callers.contains_key(&key) && !table.make_room(now) {
            table.unlisted += 1;
            return;
        }
        let new = || Seen { plaintext: 0, foreign_tls: 0, refused: 0, last_port: 0, first: now, last: now };
        let seen = table.callers.entry(key).or_insert_with(new);
        match how {
            Unproved::Plaintext => seen.plaintext += 1,
            Unproved::ForeignTls => seen.foreign_tls += 1,
            Unproved::Refused => seen.refused += 1,
        }
        (seen.last_port, seen.last) = (caller.port(), now);
    }

    pub fn view(&self) -> CallersView {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut callers: Vec<CallerView> = table
            .callers
            .iter()
            .map(|((address, port), seen)| CallerView {
                address: *address,
                last_port: seen.last_port,
                port: *port,
                plaintext: seen.plaintext,
                foreign_tls: seen.foreign_tls,
                refused: seen.refused,
                first_seen: seconds(seen.first),
                last_seen: seconds(seen.last),
            })
            .collect();
        callers.sort_by(|one, other| {
            other.last_seen.cmp(&one.last_seen).then((one.address, one.port).cmp(&(other.address, other.port)))
        });
        CallersView { callers, unlisted: table.unlisted }
    }
}

impl Table {
    /// Forgets the caller that was not seen for the longest, if that is long enough.
    fn make_room(&mut self, now: SystemTime) -> bool {
        let oldest = self.callers.iter().min_by_key(|(_, seen)| seen.last).map(|(key, seen)| (*key, seen.last));
        match oldest {
            Some((key, last)) if now.duration_since(last).is_ok_and(|unseen| unseen >= GONE_AFTER) => {
                self.callers.remove(&key);
                true
            }
            Some(_) | None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(number: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, (number / 256) as u8, (number % 256) as u8], 40_000 + number))
    }

    #[test]
    fn one_line_per_caller_and_port_with_a_count_of_each_kind() {
        let callers = PlaintextCallers::default();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        callers.note(caller(1), 80, Unproved::Plaintext, at(10));
        callers.note("[::ffff:10.0.0.1]:7".parse().unwrap(), 80, Unproved::ForeignTls, at(20));
        callers.note(caller(1), 81, Unproved::Refused, at(15));
        let view = callers.view();
        let line = |nth: usize| {
            let CallerView { address, last_port, port, plaintext, foreign_tls, refused, .. } =
                view.callers[nth].clone();
            (address.to_string(), last_port, port, [plaintext, foreign_tls, refused])
        };
        assert_eq!(view.callers.len(), 2);
        assert_eq!(line(0), ("10.0.0.1".to_owned(), 7, 80, [1, 1, 0]));
        assert_eq!(line(1), ("10.0.0.1".to_owned(), 40_001, 81, [0, 0, 1]));
        assert_eq!((view.callers[0].first_seen, view.callers[0].last_seen), (10, 20));
    }

    #[test]
    fn a_full_table_counts_and_lists_again_when_somebody_is_gone() {
        let callers = PlaintextCallers::default();
        let most = u16::try_from(MOST).unwrap();
        for number in 0..most {
            callers.note(caller(number), 80, Unproved::Plaintext, UNIX_EPOCH + Duration::from_secs(number.into()));
        }
        let soon = UNIX_EPOCH + GONE_AFTER - Duration::from_secs(1);
        callers.note(caller(most), 80, Unproved::Plaintext, soon);
        callers.note(caller(0), 80, Unproved::Plaintext, soon);
        assert_eq!((callers.view().callers.len(), callers.view().unlisted), (MOST, 1));
        callers.note(caller(most), 80, Unproved::Plaintext, soon + Duration::from_secs(10));
        let view = callers.view();
        assert_eq!((view.callers.len(), view.unlisted), (MOST, 1));
        assert_eq!(view.callers[0].address, caller(most).ip());
        assert!(!view.callers.iter().any(|line| line.address == caller(1).ip()), "the one unseen for the longest went");
    }
}
