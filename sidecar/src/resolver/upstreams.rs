//! Whom questions are forwarded to: `--dns-upstream`, or the name servers of `/etc/resolv.conf`, which is read again when it
//! changes. The resolver itself is never among them.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

/// Where machines have their name servers.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// As many as C libraries take from there.
const MOST: usize = 3;
/// It is looked at no more often than this.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Upstreams {
    /// None: they are given, and stay.
    file: Option<PathBuf>,
    own: Vec<SocketAddr>,
    servers: RefCell<Rc<[SocketAddr]>>,
    looked: Cell<Option<Instant>>,
    state: Cell<Option<State>>,
}

/// By which a change is noticed: another file may have the same time.
type State = (SystemTime, u64, u64);

impl Upstreams {
    pub(super) fn new(given: Vec<SocketAddr>, file: PathBuf, own: Vec<SocketAddr>) -> Upstreams {
        let file = given.is_empty().then_some(file);
        let servers = RefCell::new(without(given, &own));
        Upstreams { file, own, servers, looked: Cell::default(), state: Cell::default() }
    }

    /// Those to ask, best first; empty when there are none but ourselves.
    pub(super) fn now(&self) -> Rc<[SocketAddr]> {
        if let Some(file) = &self.file
            && self.looked.get().is_none_or(|looked| looked.elapsed() >= PAUSE)
        {
            self.looked.set(Some(Instant::now()));
            self.look(file);
        }
        self.servers.borrow().clone()
    }

    /// What to do when there are none.
    pub(super) fn advice(&self) -> String {
        match &self.file {
            Some(file) => format!(
                "{} names no name server but this resolver itself; give one with --dns-upstream ADDR[:PORT]",
                file.display()
            ),
            None => "--dns-upstream names this resolver itself; give another server".to_owned(),
        }
    }

    /// What cannot be read leaves what was read before.
    fn look(&self, file: &PathBuf) {
        use std::os::unix::fs::MetadataExt;
        let Ok(about) = std::fs::metadata(file) else { return };
        let state = about.modified().ok().map(|modified| (modified, about.len(), about.ino()));
        if state.is_some() && state == self.state.get() {
            return;
        }
        if let Ok(text) = std::fs::read_to_string(file) {
            self.state.set(state);
            *self.servers.borrow_mut() = without(name_servers(&text), &self.own);
        }
    }
}

fn without(servers: Vec<SocketAddr>, own: &[SocketAddr]) -> Rc<[SocketAddr]> {
    let is_own = |server: &SocketAddr| {
        own.iter().any(|own| {
            own.port() == server.port()
                && (own.ip() == server.ip() || own.ip().is_unspecified() && crate::net::is_local(server.ip()))
        })
    };
    servers.into_iter().filter(|server| !is_own(server)).collect()
}

/// The servers that a text such as resolv.conf(5) names, with port 53.
fn name_servers(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().and_then(address)).flatten()
    };
    text.lines().filter_map(server).take(MOST).collect()
}

/// A link-local address has its interface behind a percent sign, by name or by number.
fn address(text: &str) -> Option<SocketAddr> {
    let Some((ip, scope)) = text.split_once('%') else {
        return text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 53));
    };
    let scope = scope.parse().ok().or_else(|| interface(scope))?;
    Some(SocketAddrV6::new(ip.parse::<Ipv6Addr>().ok()?, 53, 0, scope).into())
}

/// The number of an interface with IPv6. /sys would tell that of another network namespace.
fn interface(name: &str) -> Option<u32> {
    let all = std::fs::read_to_string("/proc/self/net/if_inet6").ok()?;
    // Address, number, prefix, scope, flags, name; numbers in hexadecimal.
    let number = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(5) == Some(&name)).then(|| u32::from_str_radix(words.get(1)?, 16).ok()).flatten()
    };
    all.lines().find_map(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(servers: &[SocketAddr]) -> Vec<String> {
        servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn name_servers_of_a_file() {
        let text = "# nameserver 192.0.2.9\nsearch shop.svc\n  nameserver 10.0.0.2 ; theirs\nnameserver\nnameserver x\n\
                    nameserver fe80::1%7\nnameserver\tfd00::53\nnameserver 10.0.0.4\n";
        assert_eq!(texts(&name_servers(text)), ["10.0.0.2:53", "[fe80::1%7]:53", "[fd00::53]:53"]);
        assert_eq!(texts(&name_servers("nameserver fe80::1%lo")), ["[fe80::1%1]:53"]);
        for text in ["", "nameserver fe80::1%no-such", "nameserver fe80::1%../x", "nameservers 10.0.0.2"] {
            assert!(name_servers(text).is_empty(), "{text}");
        }
    }

    #[test]
    fn we_are_no_upstream_of_ourselves() {
        let own: Vec<SocketAddr> = vec!["127.0.0.1:53".parse().unwrap(), "0.0.0.0:54".parse().unwrap()];
        let given = ["127.0.0.1:53", "127.0.0.1:54", "192.0.2.1:54", "127.0.0.53:53"];
        let upstreams = Upstreams::new(given.map(|text| text.parse().unwrap()).into(), RESOLV_CONF.into(), own.clone());
        assert_eq!(texts(&upstreams.now()), ["192.0.2.1:54", "127.0.0.53:53"]);
        let lone = Upstreams::new(own[..1].to_vec(), RESOLV_CONF.into(), own);
        assert!(lone.now().is_empty() && lone.advice().contains("--dns-upstream"));
    }

    #[test]
    fn a_file_is_read_again_when_it_changes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nameserver 10.0.0.2\n").unwrap();
        let upstreams = Upstreams::new(Vec::new(), file.path().into(), Vec::new());
        assert_eq!(texts(&upstreams.now()), ["10.0.0.2:53"]);
        std::fs::write(file.path(), "nameserver 10.0.0.33\n").unwrap();
        assert_eq!(texts(&upstreams.now()), ["10.0.0.2:53"], "not at each question");
        upstreams.looked.set(None);
        assert_eq!(texts(&upstreams.now()), ["10.0.0.33:53"]);
        std::fs::remove_file(file.path()).unwrap();
        upstreams.looked.set(None);
        assert_eq!(texts(&upstreams.now()), ["10.0.0.33:53"], "the last good ones stay");
    }
}
