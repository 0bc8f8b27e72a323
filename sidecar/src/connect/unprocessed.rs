//! The word between two sidecars that no application has seen a request: the inbound side could not reach its own, and the
//! outbound side may send the request to another endpoint, whatever its method. It is a field of the inbound side's own
//! answer. Nobody else can say it: what an application sends under this name stays on its hop (`protocol/http/headers.rs`), as
//! does the field itself on its way to the caller, and it is believed of a peer that proved to be a sidecar alone.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::outcome::Reason;

/// Its value is the reason's word.
pub const UNPROCESSED: HeaderName = HeaderName::from_static("x-outrigger-unprocessed");

/// Says so to another sidecar.
pub fn mark(headers: &mut HeaderMap, reason: Reason) {
    headers.insert(UNPROCESSED, HeaderValue::from_static(reason.word()));
}

/// Why the request got no further, if that is said. A reason that only a later version knows is the plainest one.
pub fn read(headers: &HeaderMap) -> Option<Reason> {
    let (_, word) = headers.iter().find(|(name, _)| **name == UNPROCESSED)?;
    let known = Reason::ALL.into_iter().find(|reason| word == reason.word());
    Some(known.unwrap_or(Reason::ConnectFailed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_read_as_it_was_said() {
        assert_eq!(read(&HeaderMap::new()), None);
        for reason in Reason::ALL {
            let mut headers = HeaderMap::new();
            mark(&mut headers, reason);
            assert_eq!(read(&headers), Some(reason));
        }
        let mut headers = HeaderMap::new();
        headers.insert(UNPROCESSED, HeaderValue::from_static("of_tomorrow"));
        assert_eq!(read(&headers), Some(Reason::ConnectFailed));
    }
}
