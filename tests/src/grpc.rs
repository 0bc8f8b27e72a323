//! HTTP/2 and gRPC clients on raw h2, and a server, so that tests see streams, trailers and resets as they are.

use std::net::SocketAddr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::application::{Backend, write};
use crate::eventually::soon;

/// One message in gRPC's length-prefixed framing.
pub fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("a message below 4 GiB"));
    framed.put_slice(message);
    framed.freeze()
}

/// Cuts messages out of the bytes of a body.
#[derive(Default)]
pub struct Messages(BytesMut);

impl Messages {
    pub fn feed(&mut self, data: &[u8]) -> Vec<Bytes> {
        self.0.extend_from_slice(data);
        let mut found = Vec::new();
        while self.0.len() >= 5 {
            let length = u32::from_be_bytes([self.0[1], self.0[2], self.0[3], self.0[4]]) as usize;
            if self.0.len() < 5 + length {
                break;
            }
            self.0.advance(5);
            found.push(self.0.split_to(length).freeze());
        }
        found
    }
}

/// An HTTP/2 connection with prior knowledge.
#[derive(Clone)]
pub struct Http2 {
    sender: SendRequest<Bytes>,
}

/// One stream: what is sent and what comes back.
pub struct Stream {
    pub send: SendStream<Bytes>,
    response: h2::client::ResponseFuture,
}

/// The answer of one stream.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: RecvStream,
}

/// An answer read to its end.
#[derive(Debug)]
pub struct Whole {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: HeaderMap,
}

impl Http2 {
    pub async fn open(address: SocketAddr) -> Http2 {
        let stream = soon("connect", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Http2::over(stream).await
    }

    /// On a stream that is open already: inside mutual TLS, or behind CONNECT.
    pub async fn over(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static) -> Http2 {
        let mut builder = h2::client::Builder::new();
        // A connection window that streams which are not read do not use up.
        builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 28);
        let (sender, connection) = soon("the HTTP/2 preface", builder.handshake(stream)).await.unwrap();
        tokio::spawn(async move {
            // Its end is seen by the streams.
            let _ = connection.await;
        });
        Http2 { sender }
    }

    /// Opens a stream. `end` sends no body.
    pub async fn begin(&self, request: Request<()>, end: bool) -> Result<Stream, h2::Error> {
        let mut sender = soon("room for a stream", self.sender.clone().ready()).await?;
        let (response, send) = sender.send_request(request, end)?;
        Ok(Stream { send, response })
    }

    /// A whole exchange.
    pub async fn ask(&self, request: Request<()>, body: &[u8]) -> Result<Whole, h2::Error> {
        let mut stream = self.begin(request, body.is_empty()).await?;
        if !body.is_empty() {
            stream.write(Bytes::copy_from_slice(body), true).await?;
        }
        stream.answer().await?.whole().await
    }

    pub async fn get(&self, path: &str) -> Result<Whole, h2::Error> {
        self.ask(Request::get(format!("http://test{path}")).body(()).expect("a request"), b"").await
    }

    /// Opens a gRPC call of `/echo.Echo/METHOD`.
    pub async fn call(&self, method: &str, headers: &[(&str, &str)]) -> Result<Stream, h2::Error> {
        let mut request = Request::post(format!("http://test/echo.Echo/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.begin(request.body(()).expect("a request"), false).await
    }

    /// A unary call of `/echo.Echo/METHOD`.
    pub async fn unary(&self, method: &str, message: &[u8]) -> Result<Whole, h2::Error> {
        let mut stream = self.call(method, &[]).await?;
        stream.write(frame(message), true).await?;
        stream.answer().await?.whole().await
    }
}

impl Stream {
    pub async fn write(&mut self, data: Bytes, end: bool) -> Result<(), h2::Error> {
        soon("room to send", write(&mut self.send, data, end)).await
    }

    /// The next interim answer; `None` when the final one is there.
    pub async fn interim(&mut self) -> Result<Option<Response<()>>, h2::Error> {
        let interim = std::future::poll_fn(|cx| self.response.poll_informational(cx));
        soon("an interim answer or the final one", interim).await.transpose()
    }

    /// Waits for the answer's head.
    pub async fn answer(self) -> Result<Answer, h2::Error> {
        self.answer_keeping().await.map(|(answer, _)| answer)
    }

    /// As [`Stream::answer`], and the sending side goes on.
    pub async fn answer_keeping(self) -> Result<(Answer, SendStream<Bytes>), h2::Error> {
        let response: Response<RecvStream> = soon("the head of an answer", self.response).await?;
        let (parts, body) = response.into_parts();
        Ok((Answer { status: parts.status, headers: parts.headers, body }, self.send))
    }

    /// RST_STREAM with CANCEL.
    pub fn cancel(mut self) {
        self.send.send_reset(h2::Reason::CANCEL);
    }
}

/// A GET of this path without a body.
pub fn get(path: &str) -> Request<()> {
    Request::get(format!("http://catalog{path}")).body(()).expect("a request")
}

/// A POST to this path; the body is written afterwards.
pub fn post(path: &str) -> Request<()> {
    Request::post(format!("http://catalog{path}")).body(()).expect("a request")
}

/// The server's end of one HTTP/2 connection: a test answers each stream itself.
pub struct Http2Server {
    streams: mpsc::UnboundedReceiver<(Request<RecvStream>, SendResponse<Bytes>)>,
}

impl Http2Server {
    /// Takes the next connection to `backend`.
    pub async fn accept(backend: &Backend, set: impl FnOnce(&mut h2::server::Builder)) -> Http2Server {
        Http2Server::over(backend.accept().await, set).await
    }

    /// On a connection that was taken already.
    pub async fn over(connection: crate::Connection, set: impl FnOnce(&mut h2::server::Builder)) -> Http2Server {
        let mut builder = h2::server::Builder::new();
        set(&mut builder);
        let (stream, ahead) = connection.into_parts();
        assert!(ahead.is_empty());
        let handshake = builder.handshake::<_, Bytes>(stream.expect("plain TCP"));
        let mut connection = soon("the HTTP/2 preface", handshake).await.unwrap();
        let (sender, streams) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            // Driven on when nobody waits for streams any more.
            while let Some(Ok(stream)) = connection.accept().await {
                let _ = sender.send(stream);
            }
        });
        Http2Server { streams }
    }

    /// The next request; `None` when the connection has ended.
    pub async fn try_next(&mut self) -> Option<(Request<RecvStream>, SendResponse<Bytes>)> {
        self.streams.recv().await
    }

    /// The next request.
    pub async fn next(&mut self) -> (Request<RecvStream>, SendResponse<Bytes>) {
        soon("a request", self.streams.recv()).await.expect("the connection is open")
    }
}

/// Answers a request of [`Http2Server`] with 200 and this body.
pub fn reply_with(reply: &mut SendResponse<Bytes>, body: &'static str) {
    let mut sending = reply.send_response(Response::new(()), false).unwrap();
    sending.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
}

impl Answer {
    /// The next piece of the body; `None` at its end.
    pub async fn data(&mut self) -> Result<Option<Bytes>, h2::Error> {
        let Some(data) = soon("a piece of the body", self.body.data()).await else { return Ok(None) };
        let data = data?;
        self.body.flow_control().release_capacity(data.len())?;
        Ok(Some(data))
    }

    pub async fn whole(mut self) -> Result<Whole, h2::Error> {
        let mut body = Vec::new();
        while let Some(data) = self.data().await? {
            body.extend_from_slice(&data);
        }
        let trailers = soon("trailers", self.body.trailers()).await?.unwrap_or_default();
        Ok(Whole { status: self.status, headers: self.headers, body, trailers })
    }
}

impl Whole {
    /// In trailers, or in the head of a trailers-only answer.
    pub fn grpc_status(&self) -> Option<&str> {
        self.trailers.get("grpc-status").or_else(|| self.headers.get("grpc-status"))?.to_str().ok()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn messages(&self) -> Vec<Bytes> {
        Messages::default().feed(&self.body)
    }
}
