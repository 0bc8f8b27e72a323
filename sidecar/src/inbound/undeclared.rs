//! Ports whose protocol nobody declared: who speaks first, and what.

use outrigger_api::snapshot::Key;

use crate::net::Stream;
use crate::outcome::Error;
use crate::policy::Permit;
use crate::protocol::detect::Detected;
use crate::protocol::peek::Peeked;
use crate::protocol::silence::{self, First, Moment};
use crate::telemetry::{self, WireProtocol};

use super::{Refused, Walk, mismatch};

impl Walk {
    /// A port whose protocol nobody declared, in plaintext or inside what was announced as opaque: whoever speaks first
    /// decides, the client's bytes in any case.
    pub(super) async fn undeclared(
        &self,
        mut stream: Stream,
        opened: Option<Stream>,
        permit: Permit,
    ) -> Result<(), Refused> {
        // Boxed where they are made: what has a name keeps its place in the task for as long as its scope lives.
        let first = Box::pin(self.first(&mut stream, permit)).await;
        let opened = match first {
            Ok(First::Client(later)) => opened.or(later),
            Ok(First::Server(opened)) => return self.server_first(stream, opened).await,
            Ok(First::Nobody) => return Ok(()),
            Err(error) => return Err(Box::new((error, Some(stream)))),
        };
        match self.counted(Box::pin(silence::decide(&self.worker, self.registered.id, &mut stream)).await) {
            Ok(Peeked::Speaks(Detected::Http1 | Detected::Http2)) if self.caller.peer.is_some() => {
                Err(Box::new((mismatch("HTTP inside what was announced as opaque"), Some(stream))))
            }
            Ok(Peeked::Speaks(Detected::Http1)) => {
                opened.into_iter().for_each(silence::leave);
                self.http1(stream, permit).await
            }
            Ok(Peeked::Speaks(Detected::Http2)) => {
                opened.into_iter().for_each(silence::leave);
                Box::pin(self.http2(stream, permit)).await
            }
            Ok(Peeked::Speaks(Detected::Tls)) => self.opaque(stream, opened, WireProtocol::Tls, permit).await,
            Ok(Peeked::Speaks(Detected::Opaque)) => self.opaque(stream, opened, WireProtocol::Tcp, permit).await,
            Ok(Peeked::Silent | Peeked::Left) => Ok(()),
            Err(error) => Err(Box::new((error, Some(stream)))),
        }
    }

    /// Who speaks first: where policy lets opaque bytes in, the application may.
    async fn first(&self, stream: &mut Stream, permit: Permit) -> Result<First<Stream>, Error> {
        if !self.may_speculate() {
            return self.begins(stream).await;
        }
        let open = async || self.dial(permit).await;
        let (key, id) = (self.key(), self.registered.id);
        silence::first(&self.worker, &key, id, stream, Moment::AsRemembered, open).await
    }

    /// Under which it is remembered who speaks first.
    pub(super) fn key(&self) -> Key {
        Key::Address(self.application)
    }

    /// On a port whose protocol is not declared, how it was found.
    pub(super) fn count_detected(&self, detected: telemetry::Detected) {
        if self.declared.is_none() {
            self.worker.telemetry.detected(detected);
        }
    }

    fn counted(&self, peeked: Result<Peeked, Error>) -> Result<Peeked, Error> {
        if let Ok(Peeked::Speaks(detected)) = &peeked {
            self.count_detected((*detected).into());
        }
        peeked
    }
}
