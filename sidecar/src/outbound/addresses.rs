//! A name of the outside that the forward proxy is asked for: its addresses, as one destination. They are tried in the order
//! of RFC 8305 (happy eyeballs): families in turn, the next address beside one that has not connected within 250 ms, or at
//! once behind one that failed, and who connects first is used.

use std::net::SocketAddr;
use std::rc::Rc;

use outrigger_api::snapshot::Key;

use crate::connect::backend::Backend;
use crate::connect::worker::Worker;
use crate::outcome::{Error, Reason, Stage};

/// Asks the system's resolver.
pub(super) async fn resolve(worker: &Worker, host: &str, port: u16) -> Result<Rc<Backend>, Error> {
    let unknown = |detail: String| Error::own(Stage::Lookup, Reason::UnknownDestination, detail);
    let budget = worker.limits.connect_budget;
    let resolving = tokio::time::timeout(budget, tokio::net::lookup_host((host, port)));
    let resolved = resolving.await.map_err(|_| unknown(format!("{host}: no answer within {budget:?}")))?;
    let resolved = resolved.map_err(|error| unknown(format!("{host}: {error}")))?;
    match *in_turn(resolved, worker.limits.name_addresses) {
        [] => Err(unknown(format!("{host} has no address"))),
        [address] => Ok(worker.backend(&Key::Address(address))),
        ref addresses => {
            let each = addresses.iter().map(|address| worker.backend(&Key::Address(*address))).collect();
            Ok(Rc::new(Backend::of_name(worker, each)))
        }
    }
}

/// The families in turn, beginning with that of the first address, and within each the order in which they came (RFC 8305
/// section 4): the resolver has put first what suits this machine (RFC 6724).
fn in_turn(resolved: impl Iterator<Item = SocketAddr>, most: usize) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in resolved {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    let first = all.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<SocketAddr>, Vec<SocketAddr>) =
        all.into_iter().partition(|address| address.is_ipv6() == first);
    let longest = one.len().max(other.len());
    let pairs = (0..longest).flat_map(|place| [one.get(place), other.get(place)]);
    pairs.flatten().take(most).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let cases: [(&[&str], &[&str]); 7] = [
            (&[], &[]),
            (&["1.1.1.1"], &["1.1.1.1"]),
            (&["1.1.1.1", "1.1.1.1", "1.1.1.2"], &["1.1.1.1", "1.1.1.2"]),
            (&["::1", "::2", "1.1.1.1"], &["::1", "1.1.1.1", "::2"]),
            (&["1.1.1.1", "1.1.1.2", "1.1.1.3", "::1"], &["1.1.1.1", "::1", "1.1.1.2", "1.1.1.3"]),
            (&["::1", "1.1.1.1", "::2", "1.1.1.2", "::3", "1.1.1.3"], &["::1", "1.1.1.1", "::2", "1.1.1.2", "::3"]),
            (&["::1", "::2", "::3", "::4", "::5", "::6", "1.1.1.1"], &["::1", "1.1.1.1", "::2", "::3", "::4"]),
        ];
        for (resolved, expected) in cases {
            let address = |text: &&str| SocketAddr::new(text.parse().unwrap(), 80);
            let expected: Vec<SocketAddr> = expected.iter().map(address).collect();
            assert_eq!(in_turn(resolved.iter().map(address), 5), expected, "{resolved:?}");
        }
    }
}
