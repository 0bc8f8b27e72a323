//! Whether the peer of a socket is there. A peer that acknowledges is, whatever its window: a reader that pauses, or a
//! suspended process, acknowledges each probe. TCP_USER_TIMEOUT cannot tell the two apart, so a worker's watchdog looks itself,
//! at those of its sockets to which something was written, and gives up what has been silent for too long.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

thread_local! {
    /// Sockets of this thread to which something was written that may not be acknowledged yet.
    static WRITTEN: RefCell<Vec<Weak<Liveness>>> = const { RefCell::new(Vec::new()) };
}

/// What is known of one socket's peer. Dropped with the socket.
#[derive(Debug)]
pub(super) struct Liveness {
    socket: RawFd,
    /// It is in [`WRITTEN`].
    written: AtomicBool,
    /// The peer was given up: whatever the socket says now means that.
    given_up: AtomicBool,
    /// Milliseconds since [`BEGUN`], plus one, when its silence began; 0: it is not silent.
    silent_since: AtomicU64,
}

static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Liveness {
    pub(super) fn of(tcp: &TcpStream) -> Arc<Liveness> {
        Arc::new(Liveness {
            socket: tcp.as_raw_fd(),
            written: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            silent_since: AtomicU64::new(0),
        })
    }

    /// Something was written.
    pub(super) fn wrote(self: &Arc<Liveness>) {
        if !self.written.load(Relaxed) {
            self.written.store(true, Relaxed);
            WRITTEN.with_borrow_mut(|written| written.push(Arc::downgrade(self)));
        }
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Relaxed)
    }

    /// Looks at the socket; false when nothing waits on it, so that it need not be looked at again before the next write.
    fn look(&self, limit: Duration) -> bool {
        if kernel::unacknowledged(self.socket) == 0 {
            self.silent_since.store(0, Relaxed);
            self.written.store(false, Relaxed);
            return false;
        }
        let Some(facts) = kernel::facts(self.socket) else { return true };
        let now = u64::try_from(BEGUN.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let since = silent_since(self.silent_since.load(Relaxed), now, facts);
        if since == 0 && facts.last_ack > 1_000 {
            // Its window is closed. Left alone, the kernel would ask ever less often, down to once in two minutes.
            kernel::ask_at_least_every(self.socket, limit / 3);
        }
        self.silent_since.store(since, Relaxed);
        if since != 0 && Duration::from_millis(now.saturating_sub(since)) >= limit {
            self.given_up.store(true, Relaxed);
            kernel::reset(self.socket);
            return false;
        }
        true
    }
}

/// Gives up this thread's sockets on which bytes wait and nothing at all was acknowledged for `limit`: they are reset, and
/// who reads or writes them gets an error. To be called at each tick.
pub fn give_up_silent_peers(limit: Duration) {
    let mut written = WRITTEN.take();
    written.retain(|liveness| liveness.upgrade().is_some_and(|liveness| liveness.look(limit)));
    if written.is_empty() {
        return;
    }
    WRITTEN.with_borrow_mut(|now| {
        written.append(now);
        *now = written;
    });
}

/// What the kernel says about a socket on which bytes wait, in milliseconds ago.
#[derive(Clone, Copy, Debug)]
struct Facts {
    /// Probes of a closed window that were not answered.
    probes: u8,
    last_sent: u64,
    last_ack: u64,
}

/// Since when the peer owes an answer and has given none of any kind; 0: it does not. `before` is what this said last.
fn silent_since(before: u64, now: u64, facts: Facts) -> u64 {
    // An ACK that came after what was sent last, be it one that acknowledges nothing new, answers it.
    let owes = facts.probes > 0 || facts.last_sent < facts.last_ack;
    if !owes {
        return 0;
    }
    // It may have been idle for long when something was sent at last, so what counts begins when it is first seen to owe.
    let before = if before == 0 { now } else { before };
    before.max(now.saturating_sub(facts.last_ack))
}

/// What has no safe form.
mod kernel {
    use std::os::fd::RawFd;
    use std::time::Duration;

    use super::Facts;

    /// Linux 6.15 and later.
    const TCP_RTO_MAX_MS: libc::c_int = 44;

    /// Bytes that the peer's kernel has not acknowledged; 0 as well when that cannot be known.
    #[expect(unsafe_code, reason = "ioctl(2) with SIOCOUTQ, which Linux calls TIOCOUTQ too, has no safe form")]
    pub(in crate::net) fn unacknowledged(socket: RawFd) -> libc::c_int {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the kernel writes one int; a descriptor that is none is an error.
        let done = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &mut bytes) };
        if done == 0 { bytes } else { 0 }
    }

    #[expect(unsafe_code, reason = "getsockopt(2) with TCP_INFO has no safe form")]
    fn info(socket: RawFd) -> Option<libc::tcp_info> {
        let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
        let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes into `info`, whose every bit pattern, zeros among them, is valid.
        unsafe {
            let done = libc::getsockopt(socket, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut size);
            if done != 0 {
                return None;
            }
            Some(info.assume_init())
        }
    }

    /// Since the last segment of the peer, with or without bytes.
    pub(in crate::net) fn heard_ago(socket: RawFd) -> Option<Duration> {
        let info = info(socket)?;
        Some(Duration::from_millis(info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv).into()))
    }

    pub(super) fn facts(socket: RawFd) -> Option<Facts> {
        let info = info(socket)?;
        Some(Facts {
            probes: info.tcpi_probes,
            last_sent: info.tcpi_last_data_sent.into(),
            last_ack: info.tcpi_last_ack_recv.into(),
        })
    }

    /// Bounds the pause between two probes or two retransmissions, where the kernel can.
    #[expect(unsafe_code, reason = "setsockopt(2) with TCP_RTO_MAX_MS has no safe form")]
    pub(super) fn ask_at_least_every(socket: RawFd, pause: Duration) {
        let pause = libc::c_int::try_from(pause.as_millis()).unwrap_or(libc::c_int::MAX).clamp(1_000, 120_000);
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the kernel reads one int. A kernel that does not know the option says so, and asks as it always did.
        unsafe { libc::setsockopt(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, (&raw const pause).cast(), size) };
    }

    /// Ends the connection with a reset, as an error that wakes whoever waits on the socket; the descriptor stays.
    #[expect(unsafe_code, reason = "connect(2) with AF_UNSPEC has no safe form")]
    pub(super) fn reset(socket: RawFd) {
        let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
        let size = size_of::<libc::sockaddr>() as libc::socklen_t;
        // SAFETY: the kernel reads one address of that size. What fails leaves the connection to the next tick.
        unsafe { libc::connect(socket, &raw const nowhere, size) };
    }
}

pub(super) use kernel::{heard_ago, unacknowledged};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_what_was_sent_and_not_answered_by_any_ack() {
        let facts = |probes, last_sent, last_ack| Facts { probes, last_sent, last_ack };
        for (what, before, now, facts, since) in [
            ("acknowledged after it was sent", 0, 90_000, facts(0, 500, 400), 0),
            ("its window is closed, and the last probe was answered", 0, 90_000, facts(0, 80_000, 50_000), 0),
            ("a retransmission was answered by a duplicate", 60_000, 90_000, facts(0, 40_000, 40_000), 0),
            ("idle for long, then something was sent", 0, 90_000, facts(0, 100, 80_000), 90_000),
            ("and it is silent ever since", 90_000, 95_000, facts(0, 1_000, 85_000), 90_000),
            ("an ACK came meanwhile, and more was sent since", 90_000, 95_000, facts(0, 100, 2_000), 93_000),
            ("a probe was not answered", 0, 95_000, facts(1, 90_000, 60_000), 95_000),
            ("nor the next", 95_000, 99_000, facts(2, 94_000, 64_000), 95_000),
        ] {
            assert_eq!(silent_since(before, now, facts), since, "{what}");
        }
    }
}
