//! `bench serve`: the application. It answers each request head with the same 1 KiB, and does no more than that, so
//! that what is measured is the way to it. It understands HTTP/1.1 without request bodies, HTTP/2 on a
//! port of its own, and sends bytes in bulk on another.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_runtime::stdout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Bytes of every answer's body.
pub const BODY: usize = 1024;
const END_OF_HEAD: &[u8] = b"\r\n\r\n";

/// Listens on four ports and serves until somebody ends the process.
pub fn run() -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let http1 = TcpListener::bind("127.0.0.1:0").await?;
        let opaque = TcpListener::bind("127.0.0.1:0").await?;
        let http2 = TcpListener::bind("127.0.0.1:0").await?;
        let bulk = TcpListener::bind("127.0.0.1:0").await?;
        stdout::listening("http1", http1.local_addr()?);
        stdout::listening("http2", http2.local_addr()?);
        stdout::listening("opaque", opaque.local_addr()?);
        stdout::listening("bulk", bulk.local_addr()?);
        stdout::ready();
        tokio::spawn(async move {
            while let Ok((stream, _)) = http2.accept().await {
                // Without it the load would measure delayed acknowledgements; failing only makes the numbers worse.
                let _ = stream.set_nodelay(true);
                tokio::spawn(serve_http2(stream));
            }
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = bulk.accept().await {
                tokio::spawn(super::bulk::serve(stream));
            }
        });
        // The same behind a port that the mesh is told to carry unparsed.
        loop {
            let (stream, _) = tokio::select! {
                accepted = http1.accept() => accepted?,
                accepted = opaque.accept() => accepted?,
            };
            stream.set_nodelay(true)?;
            tokio::spawn(serve_http1(stream));
        }
    })
}

pub async fn serve_http1(mut stream: TcpStream) {
    let answer = answer();
    let mut buffer = Vec::with_capacity(16 * 1024);
    loop {
        match stream.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        while let Some(end) = end_of_head(&buffer) {
            buffer.drain(..end);
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

/// Behind the empty line that ends a head.
pub fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == END_OF_HEAD).map(|at| at + 4)
}

fn answer() -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {BODY}\r\n\r\n");
    [head.as_bytes(), &[b'x'; BODY]].concat()
}

async fn serve_http2(stream: TcpStream) {
    let body = Bytes::from_static(&[b'x'; BODY]);
    let service = service_fn(move |_| {
        let mut response = http::Response::new(Full::new(body.clone()));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("text/plain"));
        async move { Ok::<_, Infallible>(response) }
    });
    // How it ended is seen by the load.
    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(1_000)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_end_at_the_empty_line() {
        let cases: &[(&[u8], Option<usize>)] = &[
            (b"", None),
            (b"GET / HTTP/1.1\r\n", None),
            (b"A\r\n\r\n", Some(5)),
            (b"A\r\n\r\nB\r\n\r\n", Some(5)),
            (b"A\r\n\r\nB", Some(5)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(end_of_head(bytes), *expected);
        }
    }
}
