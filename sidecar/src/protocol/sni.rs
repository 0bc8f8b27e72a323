//! Reads the server name out of an application's own TLS, which otherwise passes unparsed: for `/connections` and the
//! access log, and for TLSRoutes, which choose a backend by it. The bytes stay in the stream; who may is never decided by them.

use std::io;
use std::task::Poll;
use std::time::Duration;

use super::opaque::CopyError;
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
pub async fn somebody_spoke(
    downstream: &mut Stream,
    upstream: &mut Stream,
    patience: Duration,
) -> Result<(), CopyError> {
    let spoken = std::future::poll_fn(|cx| {
        let client = downstream.poll_read_ahead(cx).map_err(CopyError::Downstream)?;
        let server = upstream.poll_read_ahead(cx).map_err(CopyError::Upstream)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use tokio::io::AsyncWriteExt;

    fn hello(name: &'static str) -> Vec<u8> {
        let config = ClientConfig::builder_with_provider(crate::tls::provider().clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut client = ClientConnection::new(std::sync::Arc::new(config), name.try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_found_in_the_first_bytes() {
        let wait = Duration::from_millis(50);
        let (db, address) = (hello("db.test"), hello("192.0.2.1"));
        let named = Sniffed::Tls(Some("db.test".to_owned()));
        for (sent, expected) in [
            (vec![&db[..]], named.clone()),
            (vec![&db[..1], &db[1..40], &db[40..]], named),
            (vec![&address[..]], Sniffed::Tls(None)),
            (vec![&db[..100]], Sniffed::Other),
            (vec![b"GET / HTTP/1.1\r\n"], Sniffed::Other),
            (vec![b"\x16"], Sniffed::Other),
            (vec![], Sniffed::Other),
        ] {
            let (mut stream, mut client) = Stream::pipe();
            let whole = sent.concat();
            let sending = async {
                for part in sent {
                    client.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let (sniffed, ()) = tokio::join!(sniff(&mut stream, wait), sending);
            assert_eq!(sniffed.unwrap(), expected, "{whole:?}");
            while stream.ahead().len() < whole.len() {
                assert_ne!(stream.read_ahead().await.unwrap(), 0);
            }
            assert_eq!(stream.ahead(), whole, "nothing is lost");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn somebody_speaks_or_ends_or_nobody_does() {
        let patience = Duration::from_secs(3600);
        let ((mut near, client), (mut far, mut server)) = (Stream::pipe(), Stream::pipe());
        let before = tokio::time::Instant::now();
        somebody_spoke(&mut near, &mut far, patience).await.unwrap();
        assert!(before.elapsed() >= patience, "nobody did");
        server.write_all(b"220").await.unwrap();
        somebody_spoke(&mut near, &mut far, patience).await.unwrap();
        assert_eq!((near.ahead(), far.ahead()), (&b""[..], &b"220"[..]));
        client.reset_on_close();
        drop(client);
        let error = somebody_spoke(&mut near, &mut far, patience).await;
        assert!(matches!(error, Err(CopyError::Downstream(_))), "{error:?}");
    }
}
