//! Finds out whether the peer of an HTTP/2 connection is still there: when nothing was heard for a while it is asked by a
//! PING, and given up when nothing comes then. Bytes of any kind are a sign of life, and reading them costs no clock.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use crate::config::limits::Limits;

pub struct KeepAlive {
    pings: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    /// Set by whoever reads from the connection.
    heard: Rc<Cell<bool>>,
    state: State,
    /// Half the time of silence after which the peer is asked.
    tick: Duration,
    timeout: Duration,
}

#[derive(Clone, Copy)]
enum State {
    /// Something was heard within the last tick, or nothing is expected.
    Alive,
    /// A tick has passed in silence.
    Silent,
    Asked,
}

impl KeepAlive {
    /// For a connection that asks by `pings`, and whose reader sets `heard`.
    pub fn new(pings: Option<PingPong>, heard: Rc<Cell<bool>>, limits: &Limits) -> KeepAlive {
        let tick = limits.keepalive / 2;
        let timer = Box::pin(tokio::time::sleep(tick));
        KeepAlive { pings, timer, heard, state: State::Alive, tick, timeout: limits.no_ack_timeout }
    }

    /// Ready when the peer is gone. To be polled before the connection, which writes the PING. `in_use`: somebody waits
    /// for the peer; else it is left alone.
    pub fn poll(&mut self, cx: &mut Context<'_>, in_use: bool) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let alive = self.heard.take() || !in_use;
            self.state = match self.state {
                _ if alive => State::Alive,
                State::Alive => State::Silent,
                State::Silent => {
                    self.ask();
                    State::Asked
                }
                State::Asked => return Poll::Ready(()),
            };
            let wait = if matches!(self.state, State::Asked) { self.timeout } else { self.tick };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
    }

    fn ask(&mut self) {
        let Some(pings) = &mut self.pings else { return };
        // The answer to the last PING has to be taken before there can be another; that it came was heard.
        let _ = pings.poll_pong(&mut Context::from_waker(Waker::noop()));
        // What is still under way asks just as well.
        let _ = pings.send_ping(Ping::opaque());
    }
}
