//! What a failed exchange with an upstream means, for both framings as far as they have it in common.

use std::io;

use super::Lane;
use crate::connect::http1::Fault;
use crate::connect::http2::Broke;
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
        let told = Error::upstream(Stage::Forward, reason, retry, format!("{}: {error}", self.target.address));
        // NO_ERROR would look like an end.
        let code = error.reason().filter(|code| error.is_reset() && error.is_remote() && *code != h2::Reason::NO_ERROR);
        Error { reset: code.map(u32::from), ..told }
    }

    /// An upstream's head or trailers that the library took and we do not.
    pub(super) fn unacceptable(&self, wrong: &Broke, retry: Retry) -> Error {
        let reason = broke(wrong).unwrap_or(Reason::UpstreamProtocol);
        Error::upstream(Stage::Forward, reason, retry, format!("{}: {wrong}", self.target.address))
    }
}

/// What an upstream's message is that breaks a rule of ours.
pub(super) fn broke(broke: &Broke) -> Option<Reason> {
    match broke {
        Broke::Library(_) => None,
        Broke::Malformed(_) => Some(Reason::UpstreamProtocol),
        Broke::TooLarge(_) => Some(Reason::UpstreamHeadTooLarge),
    }
}

/// The request's own body ended it; the endpoint is not to blame.
pub fn request_broke(broke: &RequestBroke) -> Error {
    let reason = match broke {
        RequestBroke::Http1(Fault::Malformed(_)) | RequestBroke::Http2(Broke::Malformed(_)) => Reason::BadRequest,
        RequestBroke::Http2(Broke::TooLarge(_)) => Reason::RequestHeadTooLarge,
        RequestBroke::Http1(_) | RequestBroke::Http2(Broke::Library(_)) => Reason::ClientClosed,
    };
    Error::downstream(Stage::Forward, reason, broke.to_string())
}

/// The peer promises that it did nothing with the request (RFC 9113 section 8.7): REFUSED_STREAM, or a GOAWAY that did
/// not cover the stream. A stream that a GOAWAY did cover ends with another error when the connection does.
pub(super) fn is_refused_stream(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}
