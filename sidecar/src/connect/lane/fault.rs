//! What a failed exchange with an upstream means, for both framings as far as they have it in common.

use std::io;

use super::Lane;
use crate::connect::http1::Fault;
use crate::connect::request_body::RequestBroke;
use crate::outcome::{Error, Reason, Retry, Stage};

impl Lane {
    /// What the library's error means, which is looked at here and nowhere else.
    pub(super) fn closed(&self, error: &h2::Error, retry: Retry) -> Error {
        let reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
        let reason = if error.is_reset() || error.get_io().is_some_and(reset) {
            Reason::UpstreamReset
        } else {
            Reason::UpstreamClosed
        };
        Error::upstream(Stage::Forward, reason, retry, format!("{}: {error}", self.target.address))
    }
}

/// The request's own body ended it; the endpoint is not to blame.
pub(super) fn request_broke(broke: &RequestBroke) -> Error {
    let unreadable = matches!(broke, RequestBroke::Http1(Fault::Malformed(_)));
    let reason = if unreadable { Reason::BadRequest } else { Reason::ClientClosed };
    Error::downstream(Stage::Forward, reason, broke.to_string())
}

/// The peer promises that it did nothing with the request (RFC 9113 section 8.7): REFUSED_STREAM, or a GOAWAY that did
/// not cover the stream. A stream that a GOAWAY did cover ends with another error when the connection does.
pub(super) fn is_refused_stream(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}
