//! Reads the server name out of an application's own TLS, which otherwise passes unparsed: for `/connections` and the
//! access log. The bytes stay in the stream; nobody waits long for them, and nothing is decided by what they say.

use std::io;
use std::task::Poll;
use std::time::Duration;

use crate::net::Stream;
use crate::tls::{Hello, read_hello};

/// What the first bytes of a client are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Sniffed {
    /// A ClientHello, with the name that it asks for.
    Tls(Option<String>),
    Other,
}

/// Waits until either side has sent something or has ended, at most `patience`. What came is read ahead.
pub async fn somebody_spoke(downstream: &mut Stream, upstream: &mut Stream, patience: Duration) -> io::Result<()> {
    let spoken = std::future::poll_fn(|cx| {
        let client = downstream.poll_read_ahead(cx)?;
        let server = upstream.poll_read_ahead(cx)?;
        if client.is_ready() || server.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    });
    tokio::time::timeout(patience, spoken).await.unwrap_or(Ok(()))
}

/// Looks at what the client has sent, and while that is the beginning of a ClientHello waits for more, at most `wait`.
pub async fn sniff(stream: &mut Stream, wait: Duration) -> io::Result<Sniffed> {
    let whole = async {
        loop {
            match read_hello(stream.ahead()) {
                Hello::Foreign { sni } => return Ok(Sniffed::Tls(sni)),
                Hello::Mesh(hello) => return Ok(Sniffed::Tls(hello.client_hello().server_name().map(str::to_owned))),
                Hello::Invalid => return Ok(Sniffed::Other),
                Hello::Incomplete => {
                    if stream.read_ahead().await? == 0 {
                        return Ok(Sniffed::Other);
                    }
                }
            }
        }
    };
    tokio::time::timeout(wait, whole).await.unwrap_or(Ok(Sniffed::Other))
}
