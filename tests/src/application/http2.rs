//! The HTTP/2 side of an application. gRPC (by content-type) is answered by method name: `Unary` and `Bidi` give each
//! message back, `Collect` counts the messages and answers with the last, `Repeat` sends the first message three times,
//! `Fail` is trailers-only with status 5, `Wait` never answers. Other requests by path: `/echo` gives the body back
//! as it comes, `/hold` waits for the test, `/unread` reads no body and never answers, `/discard` records none, `/bytes/N`, `/status/N`, `/trailers`, and everything else `METHOD TARGET
//! LENGTH`.

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::TcpStream;

use super::{Seen, Shared};
use crate::grpc;

pub(super) async fn serve(shared: &Shared, connection: usize, stream: TcpStream, first: Vec<u8>) {
    let io = Replay { first, stream };
    let Ok(mut accepted) = h2::server::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 28)
        .handshake::<_, Bytes>(io)
        .await
    else {
        return;
    };
    while let Some(Ok((request, respond))) = accepted.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move {
            let (parts, body) = request.into_parts();
            let place = shared.seen(seen(connection, &parts));
            let request = Request::from_parts(parts, body);
            if answer(&shared, place, request, respond).await.is_err() {
                shared.change(place, |seen| seen.cancelled = true);
            }
        });
    }
}

fn seen(connection: usize, parts: &http::request::Parts) -> Seen {
    Seen {
        connection,
        version: format!("{:?}", parts.version),
        method: parts.method.to_string(),
        target: parts.uri.to_string(),
        headers: fields(&parts.headers),
        ..Seen::default()
    }
}

fn fields(headers: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

type Respond = SendResponse<Bytes>;

async fn answer(
    shared: &Shared,
    place: usize,
    request: Request<RecvStream>,
    mut respond: Respond,
) -> Result<(), h2::Error> {
    let (parts, mut body) = request.into_parts();
    let is_grpc =
        parts.headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        let method = parts.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        return call(shared, place, &method, body, respond).await;
    }
    let path = parts.uri.path().to_owned();
    let (first, number) = match path[1..].split_once('/') {
        Some((first, number)) => (first, number.parse::<usize>().unwrap_or_default()),
        None => (&path[1..], 0),
    };
    let head = || Response::builder().header("x-app", &shared.name);
    if first == "echo" {
        let mut send = respond.send_response(head().body(()).expect("a head"), false)?;
        while let Some(data) = next(shared, place, &mut body).await? {
            write(&mut send, data, false).await?;
        }
        return write(&mut send, Bytes::new(), true).await;
    }
    if first == "unread" {
        let gone = std::future::poll_fn(|cx| respond.poll_reset(cx)).await?;
        return Err(gone.into());
    }
    if first == "discard" {
        while let Some(data) = body.data().await {
            body.flow_control().release_capacity(data?.len())?;
        }
    }
    while next(shared, place, &mut body).await?.is_some() {}
    match first {
        "status" => {
            let status = u16::try_from(number).expect("a status");
            respond.send_response(head().status(status).body(()).expect("a head"), true)?;
        }
        "bytes" => {
            let mut send = respond.send_response(head().body(()).expect("a head"), false)?;
            write_many(&mut send, number).await?;
        }
        "trailers" => {
            let mut send = respond.send_response(head().body(()).expect("a head"), false)?;
            write(&mut send, Bytes::from_static(b"hello"), false).await?;
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("5d41402a"));
            send.send_trailers(trailers)?;
        }
        _ => {
            if first == "hold" {
                tokio::select! {
                    () = shared.held() => {}
                    gone = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return Err(gone?.into()),
                }
            }
            let mut length = 0;
            shared.change(place, |seen| length = seen.body.len());
            let text = format!("{} {} {length}\n", parts.method, path);
            let mut send = respond.send_response(head().body(()).expect("a head"), false)?;
            write(&mut send, Bytes::from(text), true).await?;
        }
    }
    Ok(())
}

/// The next piece of the body, recorded; trailers are recorded at the end.
async fn next(shared: &Shared, place: usize, body: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    match body.data().await {
        Some(data) => {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            shared.change(place, |seen| seen.body.extend_from_slice(&data));
            Ok(Some(data))
        }
        None => {
            let trailers = body.trailers().await?;
            shared.change(place, |seen| {
                seen.trailers = trailers.as_ref().map(fields).unwrap_or_default();
                seen.whole = true;
            });
            Ok(None)
        }
    }
}

/// So many bytes to the end. All answers share what they are made of, so that those that wait hold nothing.
async fn write_many(send: &mut SendStream<Bytes>, mut left: usize) -> Result<(), h2::Error> {
    static BLOCK: LazyLock<Bytes> = LazyLock::new(|| vec![b'x'; 1 << 20].into());
    while left > BLOCK.len() {
        left -= BLOCK.len();
        write(send, BLOCK.clone(), false).await?;
    }
    write(send, BLOCK.slice(..left), true).await
}

/// Sends as the peer's window allows.
pub async fn write(send: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), h2::Error> {
    if data.is_empty() {
        return send.send_data(data, end);
    }
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await;
        let room = room.unwrap_or_else(|| Err(h2::Error::from(h2::Reason::STREAM_CLOSED)))?;
        let piece = data.split_to(room.min(data.len()));
        send.send_data(piece, end && data.is_empty())?;
    }
    Ok(())
}

// --- gRPC -------------------------------------------------------------------------------------------------------

async fn call(
    shared: &Shared,
    place: usize,
    method: &str,
    mut body: RecvStream,
    mut respond: Respond,
) -> Result<(), h2::Error> {
    let head = || Response::builder().header("content-type", "application/grpc").header("x-app", &shared.name);
    if method == "Fail" {
        let only = head().header("grpc-status", "5").header("grpc-message", "no such thing").body(());
        respond.send_response(only.expect("a head"), true)?;
        return Ok(());
    }
    if method == "Wait" {
        let gone = std::future::poll_fn(|cx| respond.poll_reset(cx)).await?;
        return Err(gone.into());
    }
    let mut send = respond.send_response(head().body(()).expect("a head"), false)?;
    let mut messages = grpc::Messages::default();
    let (mut count, mut last) = (0_u32, Bytes::new());
    while let Some(data) = next(shared, place, &mut body).await? {
        for message in messages.feed(&data) {
            count += 1;
            last = message.clone();
            if matches!(method, "Unary" | "Bidi") {
                write(&mut send, grpc::frame(&message), false).await?;
            }
        }
    }
    match method {
        "Collect" => write(&mut send, grpc::frame(&last), false).await?,
        "Repeat" => {
            for _ in 0..3 {
                write(&mut send, grpc::frame(&last), false).await?;
            }
        }
        _ => {}
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers.insert("x-messages", HeaderValue::from(count));
    send.send_trailers(trailers)
}

// --- what was read to find the preface ------------------------------------------------------------------------------

struct Replay {
    first: Vec<u8>,
    stream: TcpStream,
}

impl tokio::io::AsyncRead for Replay {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if self.first.is_empty() {
            return std::pin::Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.first.len().min(buffer.remaining());
        buffer.put_slice(&BytesMut::from(&self.first[..count]));
        self.first.drain(..count);
        std::task::Poll::Ready(Ok(()))
    }
}

impl tokio::io::AsyncWrite for Replay {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
