//! The original destination: what the kernel remembers of a connection that redirect rules led to a listener.

use std::io;
use std::net::{SocketAddr, SocketAddrV6};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::outcome::{Error, Reason, Stage};

/// Where the client of a redirected connection wanted to go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDst(SocketAddr);

impl OriginalDst {
    /// Asks the kernel (SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST). A connection that was not redirected has none and is
    /// refused: its client dialled the listener itself. Where connections are tracked the kernel then answers with the
    /// listener's own address; where they are not it knows of none (ENOENT), and without any rules not even of the
    /// question (ENOPROTOOPT).
    pub fn of(stream: &TcpStream) -> Result<OriginalDst, Error> {
        let failed = |error: io::Error| {
            Error::own(Stage::Accept, Reason::Internal, format!("the original destination cannot be read: {error}"))
        };
        let own = plain(stream.local_addr().map_err(failed)?);
        let socket = SockRef::from(stream);
        let asked = if own.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
        let original = match asked {
            Ok(original) => original.as_socket().map_or(own, plain),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => own,
            Err(error) => return Err(failed(error)),
        };
        if original == own {
            let detail = format!(
                "not redirected: the client connected to {own} itself, which takes redirected \
                                  connections only"
            );
            return Err(Error::downstream(Stage::Accept, Reason::OwnPort, detail));
        }
        Ok(OriginalDst(original))
    }

    pub fn address(self) -> SocketAddr {
        self.0
    }
}

/// One spelling for one destination: without what a socket address of IPv6 may carry besides.
fn plain(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(v6) => SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[tokio::test]
    async fn a_connection_that_was_not_redirected_has_no_original_destination() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let own = listener.local_addr().unwrap();
            let (_client, accepted) = tokio::join!(TcpStream::connect(own), listener.accept());
            let error = OriginalDst::of(&accepted.unwrap().0).unwrap_err();
            assert_eq!(error.reason, Reason::OwnPort, "{error}");
            assert!(error.to_string().contains(&own.to_string()), "{error}");
        }
    }
}
