//! A GET of what a control plane or a sidecar serves over plain HTTP: status, stats, metrics. Called by the commands
//! that print them and by the demo. One connection per call, bounded in time and size.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(5);
const LARGEST: usize = 64 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("nobody listens at {address}: {source}")]
    Connect { address: String, source: std::io::Error },
    #[error("http://{address}{path} did not answer within {PATIENCE:?}")]
    Slow { address: String, path: String },
    #[error("http://{address}{path}: {source}")]
    Http { address: String, path: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("http://{address}{path} answered {status}: {body}")]
    Status { address: String, path: String, status: StatusCode, body: String },
}

/// The body of `http://ADDRESS/PATH`, which must be answered with 200. `address` is `host:port`.
pub(crate) async fn get(address: &str, path: &str) -> Result<Bytes, FetchError> {
    let slow = || FetchError::Slow { address: address.to_owned(), path: path.to_owned() };
    tokio::time::timeout(PATIENCE, ask(address, path, None)).await.map_err(|_| slow())?
}

/// The answer to a POST of JSON, as JSON of a type.
pub(crate) async fn post_json<T: serde::de::DeserializeOwned>(
    address: &str,
    path: &str,
    body: Vec<u8>,
) -> Result<T, FetchError> {
    let slow = || FetchError::Slow { address: address.to_owned(), path: path.to_owned() };
    let asked = tokio::time::timeout(PATIENCE, ask(address, path, Some(body))).await.map_err(|_| slow())?;
    serde_json::from_slice(&asked?).map_err(|error| failed(address, path)(error.into()))
}

/// The same, as JSON of a type.
pub(crate) async fn json<T: serde::de::DeserializeOwned>(address: &str, path: &str) -> Result<T, FetchError> {
    let body = get(address, path).await?;
    serde_json::from_slice(&body).map_err(|error| failed(address, path)(error.into()))
}

fn failed(address: &str, path: &str) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> FetchError {
    let (address, path) = (address.to_owned(), path.to_owned());
    move |source| FetchError::Http { address: address.clone(), path: path.clone(), source }
}

async fn ask(address: &str, path: &str, post: Option<Vec<u8>>) -> Result<Bytes, FetchError> {
    let failed = failed(address, path);
    let stream = TcpStream::connect(address)
        .await
        .map_err(|source| FetchError::Connect { address: address.to_owned(), source })?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(error.into()))?;
    // Ends with its sender, which hears of every failure too.
    tokio::spawn(async move {
        let _told_to_the_sender = connection.await;
    });
    let method = if post.is_some() { Method::POST } else { Method::GET };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, address)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(post.unwrap_or_default())))
        .map_err(|error| failed(error.into()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.into()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LARGEST).collect().await.map_err(failed)?.to_bytes();
    if status != StatusCode::OK {
        let body = String::from_utf8_lossy(&body).trim().to_owned();
        return Err(FetchError::Status { address: address.to_owned(), path: path.to_owned(), status, body });
    }
    Ok(body)
}
