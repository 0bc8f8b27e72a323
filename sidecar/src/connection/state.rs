//! What a connection is doing, and what the watchdog or the drain asks of it.

use serde::Serialize;

/// What a connection is doing; the watchdog has one limit for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum State {
    /// Accepted: TLS handshake, detection, lookup. Bounded by timers of their own.
    Opening = 0,
    /// HTTP/1 between requests, or HTTP/2 without a stream.
    Idle = 1,
    /// The first byte of a request head has come, its end has not.
    Head = 2,
    /// At least one request is being served.
    Busy = 3,
    /// Bytes flow unparsed.
    Tunnel = 4,
}

impl State {
    pub(super) fn from_u8(value: u8) -> State {
        match value {
            1 => State::Idle,
            2 => State::Head,
            3 => State::Busy,
            4 => State::Tunnel,
            _ => State::Opening,
        }
    }
}

/// What the watchdog or the drain asks of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Command {
    Run = 0,
    /// Finish what runs, take nothing new.
    Finish = 1,
    /// The same for an HTTP/2 peer that had its time to acknowledge: refuse its new streams, and end when none runs.
    Refuse = 2,
    /// The head took too long: answer 408 and close.
    HeadTimeout = 3,
    /// Close now.
    Close = 4,
}

impl Command {
    pub(super) fn from_u8(value: u8) -> Command {
        match value {
            1 => Command::Finish,
            2 => Command::Refuse,
            3 => Command::HeadTimeout,
            4 => Command::Close,
            _ => Command::Run,
        }
    }
}
