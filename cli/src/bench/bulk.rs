//! Bytes in bulk: the application sends as many as it is asked for, the load reads and forgets them. Opaque to every
//! proxy on the way. What is counted is MiB.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::load::{LONGEST, Seen, Settings, wait_for_end, wait_for_word};

const MIB: u64 = 1024 * 1024;
const CHUNK: usize = 256 * 1024;
const PATIENCE: Duration = Duration::from_secs(20);

/// The application's side: reads how many bytes are wanted, sends them, and waits to be asked again.
pub async fn serve(mut stream: TcpStream) {
    let chunk = vec![b'x'; CHUNK];
    while let Ok(mut left) = stream.read_u64().await {
        while left > 0 {
            let count = left.min(CHUNK as u64);
            let bytes = usize::try_from(count).unwrap_or(CHUNK);
            if stream.write_all(&chunk[..bytes]).await.is_err() {
                return;
            }
            left -= count;
        }
    }
}

/// The load: `--requests` MiB, shared by its connections.
pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for _ in 0..settings.connections {
        all.push(working(settings).await?);
    }
    wait_for_word()?;
    let begun = Instant::now();
    let each = settings.requests / u64::from(settings.connections);
    let loading: Vec<_> =
        all.into_iter().map(|stream| tokio::task::spawn_local(download(stream, each * MIB))).collect();
    let mut open = Vec::new();
    for one in loading {
        open.push(tokio::time::timeout(LONGEST, one).await.context("the download did not end in time")???);
    }
    let seconds = begun.elapsed().as_secs_f64();
    Seen { answered: each * u64::from(settings.connections), seconds, ..Seen::default() }.tell()?;
    wait_for_end();
    Ok(())
}

async fn working(settings: &Settings) -> anyhow::Result<TcpStream> {
    let until = Instant::now() + PATIENCE;
    loop {
        let tried = async {
            let stream = TcpStream::connect(settings.target).await?;
            stream.set_nodelay(true)?;
            download(stream, MIB).await
        };
        match tried.await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > until => bail!("{} sends nothing: {error:#}", settings.target),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn download(mut stream: TcpStream, bytes: u64) -> anyhow::Result<TcpStream> {
    stream.write_u64(bytes).await?;
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            bail!("it ended with {left} of {bytes} bytes missing");
        }
        left = left.saturating_sub(count as u64);
    }
    Ok(stream)
}
