//! The PINGs of an HTTP/2 connection. They find out whether the peer is still there: when nothing was heard for a while it
//! is asked, and given up when nothing comes then. Bytes of any kind are a sign of life, and reading them costs no clock.
//! And they measure how large windows have to be (`windows.rs`).

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use super::meter::Meter;
use super::windows::Windows;
use crate::config::limits::Limits;

pub struct KeepAlive {
    pings: Option<PingPong>,
    /// None: the peer is not asked whether it is there.
    timer: Option<Pin<Box<Sleep>>>,
    meter: Rc<Meter>,
    windows: Windows,
    /// What the windows of all streams may add up to.
    connection: u32,
    /// The library has been told of so large a window ...
    set: u32,
    /// ... and that so much is held.
    held: u32,
    state: State,
    /// Half the time of silence after which the peer is asked.
    tick: Duration,
    timeout: Duration,
}

/// What has changed on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Streams get this window.
    Window(u32),
    /// So many bytes are held, about: a connection that many share gets as much more window, so that who does not read stops
    /// nobody else.
    Held(u32),
}

/// A change of what is held that is worth telling.
const HELD_STEP: u32 = 1 << 20;

#[derive(Clone, Copy)]
enum State {
    /// Something was heard within the last tick, or nothing is expected.
    Alive,
    /// A tick has passed in silence.
    Silent,
    Asked,
}

impl KeepAlive {
    /// For a connection that asks by `pings`, and of which `meter` knows what comes. `asks`: whether the peer is still there;
    /// a server may take that for an attack, as grpc-go does.
    pub fn new(pings: Option<PingPong>, meter: Rc<Meter>, limits: &Limits, asks: bool) -> KeepAlive {
        let tick = limits.keepalive / 2;
        let timer = asks.then(|| Box::pin(tokio::time::sleep(tick)));
        let windows = Windows::new(limits);
        let (set, timeout) = (windows.window(), limits.no_ack_timeout);
        let connection = limits.h2_connection_window_most;
        KeepAlive { pings, timer, meter, windows, connection, set, held: 0, state: State::Alive, tick, timeout }
    }

    /// Ready when the peer is gone. To be polled before the connection, which writes the PING. `in_use`: somebody waits
    /// for the peer; else it is left alone.
    pub fn poll(&mut self, cx: &mut Context<'_>, in_use: bool) -> Poll<()> {
        loop {
            let Some(timer) = &mut self.timer else { return Poll::Pending };
            ready!(timer.as_mut().poll(cx));
            let alive = self.meter.take_heard() || !in_use;
            self.state = match self.state {
                _ if alive => State::Alive,
                State::Alive => State::Silent,
                State::Silent => {
                    // What is still under way asks just as well.
                    self.ask();
                    State::Asked
                }
                State::Asked => return Poll::Ready(()),
            };
            let wait = if matches!(self.state, State::Asked) { self.timeout } else { self.tick };
            if let Some(timer) = &mut self.timer {
                timer.as_mut().reset(Instant::now() + wait);
            }
        }
    }

    /// To be called whenever the connection was polled: measures, and gives each change to `set`, until that takes it. The
    /// library takes no new window while the last one is not acknowledged.
    pub fn follow(&mut self, cx: &mut Context<'_>, mut set: impl FnMut(Change) -> bool) {
        self.meter.rests();
        let data = self.meter.take_received();
        self.windows.went(self.meter.take_went());
        if self.windows.is_measuring()
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.windows.answered(Instant::now().into_std());
        }
        if data > 0 && self.windows.came(data) && self.meter.may_grow() && self.ask() {
            self.windows.asked(Instant::now().into_std());
        }
        if self.windows.window() > self.windows.first() {
            if self.meter.is_tight() {
                self.windows.shrink();
            } else {
                self.windows.limit(self.meter.window_share(self.connection));
            }
        }
        let held = self.meter.held();
        if held.abs_diff(self.held) >= HELD_STEP && set(Change::Held(held)) {
            self.held = held;
        }
        if self.windows.window() != self.set && set(Change::Window(self.windows.window())) {
            self.set = self.windows.window();
            // It is written when the connection is polled next.
            cx.waker().wake_by_ref();
        }
    }

    /// False when a PING is under way.
    fn ask(&mut self) -> bool {
        let Some(pings) = &mut self.pings else { return false };
        // The answer to the last PING has to be taken before there can be another; that it came was heard.
        let _ = pings.poll_pong(&mut Context::from_waker(Waker::noop()));
        pings.send_ping(Ping::opaque()).is_ok()
    }
}
