//! Reads ahead until it is known what a connection speaks. The bytes stay in the stream and are read again by whoever
//! serves it. What to do about clients that say nothing where the server may speak first is `silence.rs`'s.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::detect::{Detected, Sight, detect};
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};

/// What reading ahead found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peeked {
    Speaks(Detected),
    /// Not a byte within the wait.
    Silent,
    /// The client left without a byte.
    Left,
}

/// More than any decision needs; a line that is longer is decided without its end.
const ENOUGH: usize = 20 * 1024;

/// Peeks at a client that must speak first. A beginning that stays undecided for `patience` is an unfinished HTTP head.
pub async fn speaks(stream: &mut Stream, patience: Duration) -> Result<Peeked, Error> {
    match tokio::time::timeout(patience, decide(stream)).await {
        Ok(decided) => decided.map_err(|error| left(&error)),
        Err(_) => Err(unfinished()),
    }
}

/// Peeks at a client that has begun to speak on a port whose protocol nobody declared. What stops short for `short` is
/// opaque, what has begun like HTTP and does not go on for `patience` is an unfinished head.
pub async fn settles(stream: &mut Stream, short: Duration, patience: Duration) -> Result<Peeked, Error> {
    let begun = Instant::now();
    loop {
        let sight = detect(stream.ahead());
        let until = match sight {
            Sight::Is(detected) => return Ok(Peeked::Speaks(detected)),
            Sight::Begun => begun + patience,
            Sight::Short => begun + short,
        };
        if stream.ahead().len() > ENOUGH {
            return Ok(Peeked::Speaks(Detected::Http1));
        }
        match tokio::time::timeout_at(until, stream.read_ahead()).await {
            Ok(Ok(0)) if stream.ahead().is_empty() => return Ok(Peeked::Left),
            Ok(Ok(0)) => return Ok(Peeked::Speaks(at_the_end(stream.ahead()))),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(left(&error)),
            Err(_) if sight == Sight::Short => return Ok(Peeked::Speaks(Detected::Opaque)),
            Err(_) => return Err(unfinished()),
        }
    }
}

/// What bytes are that are all there is: some server takes the end for that of the line.
fn at_the_end(bytes: &[u8]) -> Detected {
    match detect(&[bytes, b"\n"].concat()) {
        Sight::Is(detected) => detected,
        Sight::Begun | Sight::Short => Detected::Opaque,
    }
}

/// Peeks at a client that may take `wait` to begin: [`Peeked::Silent`] when it has not by then. Once a byte has come,
/// time no longer decides.
pub async fn speaks_or_waits(stream: &mut Stream, wait: Duration, patience: Duration) -> Result<Peeked, Error> {
    match begins(stream, wait).await? {
        None => speaks(stream, patience).await,
        Some(nothing) => Ok(nothing),
    }
}

/// Waits for the first byte of a client that must speak first: None when it is there.
pub async fn begins(stream: &mut Stream, wait: Duration) -> Result<Option<Peeked>, Error> {
    if !stream.ahead().is_empty() {
        return Ok(None);
    }
    match tokio::time::timeout(wait, stream.read_ahead()).await {
        Err(_) => Ok(Some(Peeked::Silent)),
        Ok(Ok(0)) => Ok(Some(Peeked::Left)),
        Ok(Ok(_)) => Ok(None),
        Ok(Err(error)) => Err(left(&error)),
    }
}

async fn decide(stream: &mut Stream) -> io::Result<Peeked> {
    loop {
        if let Sight::Is(detected) = detect(stream.ahead()) {
            return Ok(Peeked::Speaks(detected));
        }
        if stream.ahead().len() > ENOUGH {
            return Ok(Peeked::Speaks(Detected::Opaque));
        }
        if stream.read_ahead().await? == 0 {
            // What came is all there is: it cannot become a request any more.
            return Ok(if stream.ahead().is_empty() { Peeked::Left } else { Peeked::Speaks(Detected::Opaque) });
        }
    }
}

fn unfinished() -> Error {
    Error::downstream(Stage::Detect, Reason::RequestHeadTimeout, "the first line did not end")
}

pub fn left(error: &io::Error) -> Error {
    Error::downstream(Stage::Detect, Reason::ClientClosed, error.to_string())
}
