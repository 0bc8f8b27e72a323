//! Signals of the operating system as what they ask for. `main` listens before it binds anything, so that no signal
//! meets the default action, and decides what follows; nothing here ends the process.

use std::io;

use tokio::signal::unix::{self, SignalKind};

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The first SIGTERM or SIGINT: finish what runs, then end.
    Drain,
    /// A further one: end at once.
    End,
    /// SIGHUP: read files again now.
    Reload,
}

/// The signals of this process.
#[derive(Debug)]
pub struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    hang_up: unix::Signal,
    draining: bool,
}

impl Signals {
    /// From now on signals are delivered here and have no other effect. Needs a tokio runtime.
    pub fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: unix::signal(SignalKind::terminate())?,
            interrupt: unix::signal(SignalKind::interrupt())?,
            hang_up: unix::signal(SignalKind::hangup())?,
            draining: false,
        })
    }

    /// The next one. Cancel safe. Signals of one kind that arrive together count once.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => self.end(),
            _ = self.interrupt.recv() => self.end(),
            _ = self.hang_up.recv() => Signal::Reload,
        }
    }

    fn end(&mut self) -> Signal {
        if std::mem::replace(&mut self.draining, true) { Signal::End } else { Signal::Drain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends to this process through a shell, which needs no unsafe call.
    fn send(signal: &str) {
        let me = std::process::id().to_string();
        let status = std::process::Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &me]).status();
        assert!(status.unwrap().success());
    }

    #[tokio::test]
    async fn first_drains_second_ends_and_hang_up_reloads() {
        let mut signals = Signals::listen().unwrap();
        for (signal, expected) in
            [("HUP", Signal::Reload), ("INT", Signal::Drain), ("HUP", Signal::Reload), ("TERM", Signal::End)]
        {
            send(signal);
            assert_eq!(signals.next().await, expected, "{signal}");
        }
    }
}
