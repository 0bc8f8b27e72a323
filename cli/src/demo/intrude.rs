//! Knocks at the mesh ports without an identity: plaintext straight to a STRICT inbound port must be closed or answered
//! 403 by the sidecar. Called once, before the traffic begins.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::verdict::Intrusion;

/// A sidecar closes at once; one that keeps the connection open and silent for so long has let nothing through either.
const PATIENCE: Duration = Duration::from_secs(2);
/// Enough of an answer to know who made it.
const ENOUGH: u64 = 512;

/// What a service would answer: all of them say something to these bytes when they get them.
const REQUEST: &[u8] = b"GET /shop?item=rope HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";

pub(super) async fn intrude(service: &'static str, address: SocketAddr) -> Intrusion {
    let mut answer = Vec::new();
    // However the connection ends, what was answered before counts.
    let _ = tokio::time::timeout(PATIENCE, knock(address, &mut answer)).await;
    Intrusion { service, admitted: admitted(&answer) }
}

async fn knock(address: SocketAddr, answer: &mut Vec<u8>) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(REQUEST).await?;
    stream.take(ENOUGH).read_to_end(answer).await?;
    Ok(())
}

fn admitted(answer: &[u8]) -> Option<String> {
    if answer.is_empty() || answer.starts_with(b"HTTP/1.1 403 ") {
        return None;
    }
    let text = String::from_utf8_lossy(answer);
    Some(text.lines().next().unwrap_or_default().chars().take(60).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn an_answer_is_an_admission() {
        for (says, admitted) in [
            (&b""[..], None),
            (b"HTTP/1.1 403 Forbidden\r\n\r\n", None),
            (b"HTTP/1.1 200 OK\r\n\r\n", Some("HTTP/1.1 200 OK")),
            (b"ERR expected ADD\n", Some("ERR expected ADD")),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; REQUEST.len()];
                stream.read_exact(&mut request).await.unwrap();
                stream.write_all(says).await.unwrap();
            });
            assert_eq!(intrude("web", address).await, Intrusion { service: "web", admitted: admitted.map(Into::into) });
            server.await.unwrap();
        }
    }
}
