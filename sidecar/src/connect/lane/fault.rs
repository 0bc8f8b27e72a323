//! What a failed exchange with an upstream means: the HTTP library's errors are looked at once, here.

use super::Lane;
use crate::outcome::{Error, Reason, Retry, Stage};

impl Lane {
    /// What a failed exchange means. The library's error is looked at once, here.
    pub(super) fn closed(&self, error: &hyper::Error, retry: Retry) -> Error {
        if error.is_user() {
            return request_broke(error);
        }
        let reason = if error.is_parse() || error.is_parse_too_large() {
            Reason::UpstreamProtocol
        } else if has_reset(error) {
            Reason::UpstreamReset
        } else {
            Reason::UpstreamClosed
        };
        Error::upstream(Stage::Forward, reason, retry, format!("{}: {}", self.target.address, Chain(error)))
    }
}

/// The request's own body ended it; the endpoint is not to blame.
fn request_broke(error: &hyper::Error) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput};
    let unreadable =
        source::<std::io::Error>(error).is_some_and(|error| matches!(error.kind(), InvalidData | InvalidInput));
    let reason = if unreadable { Reason::BadRequest } else { Reason::ClientClosed };
    Error::downstream(Stage::Forward, reason, Chain(error).to_string())
}

/// REFUSED_STREAM, or a GOAWAY that did not cover the stream: the peer promises that it did nothing (RFC 9113 8.7).
pub(super) fn is_refused_stream(error: &hyper::Error) -> bool {
    source::<h2::Error>(error).is_some_and(|error| error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

fn has_reset(error: &hyper::Error) -> bool {
    source::<h2::Error>(error).is_some_and(h2::Error::is_reset)
        || source::<std::io::Error>(error).is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

fn source<T: std::error::Error + 'static>(error: &hyper::Error) -> Option<&T> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// An error with everything behind it, for a log line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}
