//! The door: whether who knocks is a sidecar, before anything is decided. On a port that takes plaintext too, nobody may be
//! kept waiting for a ClientHello that will not come.

use outrigger_api::name::Protocol;
use rustls::server::Accepted;

use crate::connection::Arrival;
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};
use crate::policy;
use crate::protocol::peek;
use crate::protocol::silence::{self, First, Moment};
use crate::tls::{self, Hello};

use super::Walk;

/// Who was behind the first bytes.
pub(super) enum Arrived {
    Mesh(Box<Accepted>),
    ForeignTls,
    Plaintext,
    Left,
}

impl Walk {
    /// On a port that takes plaintext too, a silent client may be a sidecar that is slow, or somebody who waits for the
    /// application: it is opened where it may speak first.
    pub(super) async fn knock(&self, stream: &mut Stream) -> Result<First<Stream>, Error> {
        let open = async || self.dial(policy::admit(self.mode, Arrival::Plaintext)?).await;
        match self.declared {
            // Bytes alone can tell who it is, where the answer may be no.
            Some(Protocol::Tcp | Protocol::Tls) | None if !self.may_speculate() => self.begins(stream).await,
            Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => self.begins(stream).await,
            Some(Protocol::Tcp | Protocol::Tls) => silence::first_of_opaque(&self.worker, stream, open).await,
            None => silence::first(&self.worker, &self.key(), self.registered.id, stream, Moment::Always, open).await,
        }
    }

    /// Waits for the client's first byte and opens nothing.
    pub(super) async fn begins(&self, stream: &mut Stream) -> Result<First<Stream>, Error> {
        match peek::begins(stream, self.worker.limits.first_byte_timeout).await? {
            Some(_) => Ok(First::Nobody),
            None => Ok(First::Client(None)),
        }
    }

    /// Reads until it is known whether this is a sidecar's ClientHello.
    pub(super) async fn hello(&self, stream: &mut Stream) -> Result<Arrived, Error> {
        let whole = async {
            loop {
                match tls::read_hello(stream.ahead()) {
                    Hello::Mesh(hello) => return Ok(Arrived::Mesh(hello)),
                    Hello::Foreign { .. } => return Ok(Arrived::ForeignTls),
                    Hello::Invalid => return Ok(Arrived::Plaintext),
                    Hello::Incomplete => match stream.read_ahead().await {
                        Ok(0) if stream.ahead().is_empty() => return Ok(Arrived::Left),
                        Ok(0) => return Ok(Arrived::Plaintext),
                        Ok(_) => {}
                        Err(error) => return Err(peek::left(&error)),
                    },
                }
            }
        };
        let done = tokio::time::timeout(self.worker.limits.handshake_timeout, whole).await;
        done.unwrap_or_else(|_| {
            if stream.ahead().is_empty() {
                Err(Error::downstream(Stage::Detect, Reason::MtlsRequired, "no ClientHello in time"))
            } else {
                Err(Error::downstream(Stage::Detect, Reason::TlsHandshake, "the ClientHello did not end in time"))
            }
        })
    }
}
