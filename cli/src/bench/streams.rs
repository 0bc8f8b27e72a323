//! The closed loop over HTTP/2 with prior knowledge: as many requests at a time as there are connections in the
//! HTTP/1.1 loop, on an eighth of the connections.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::load::{self, LONGEST, Load, Settings};

/// Requests at a time on one connection.
const STREAMS: u16 = 8;
const PATIENCE: Duration = Duration::from_secs(20);

type Sender = SendRequest<Empty<Bytes>>;

pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut senders = Vec::new();
    for _ in 0..settings.connections.div_ceil(STREAMS) {
        senders.push(working(settings.target).await?);
    }
    let load = Rc::new(Load::default());
    load.begin(u64::from(settings.connections) * 20);
    drive(&load, &senders, settings.connections).await?;
    load.begin(settings.requests);
    load::wait_for_word()?;
    let begun = Instant::now();
    tokio::time::timeout(LONGEST, drive(&load, &senders, settings.connections))
        .await
        .context("the load did not end in time")??;
    load.tell(begun.elapsed())?;
    load::wait_for_end();
    Ok(())
}

async fn drive(load: &Rc<Load>, senders: &[Sender], at_a_time: u16) -> anyhow::Result<()> {
    let running: Vec<_> = senders
        .iter()
        .cycle()
        .take(usize::from(at_a_time))
        .cloned()
        .map(|mut sender| {
            let load = load.clone();
            tokio::task::spawn_local(async move {
                while load.take() {
                    let begun = Instant::now();
                    match exchange(&mut sender).await {
                        Ok(()) => load.answered(begun.elapsed()),
                        Err(_) => load.failed(),
                    }
                }
            })
        })
        .collect();
    for one in running {
        one.await?;
    }
    Ok(())
}

async fn working(target: SocketAddr) -> anyhow::Result<Sender> {
    let until = Instant::now() + PATIENCE;
    loop {
        match open(target).await {
            Ok(sender) => return Ok(sender),
            Err(error) if Instant::now() > until => return Err(error.context(format!("{target} does not answer"))),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn open(target: SocketAddr) -> anyhow::Result<Sender> {
    let stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    exchange(&mut sender).await?;
    Ok(sender)
}

async fn exchange(sender: &mut Sender) -> anyhow::Result<()> {
    let request = Request::get("http://app.bench/bench").body(Empty::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        bail!("answered with {}", response.status());
    }
    response.into_body().collect().await?;
    Ok(())
}
