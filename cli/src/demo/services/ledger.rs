//! `ledger`: adds up numbers over a plain TCP line protocol. `ADD n` is answered with `OK total`, anything else with
//! `ERR reason`; a client may send as many lines as it likes and half-close behind the last one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Far more than the longest line that makes sense.
const LONGEST_LINE: u64 = 64;

pub async fn serve(listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let total = Arc::new(AtomicU64::new(0));
    super::accept(listener, shutdown, move |stream| {
        let total = total.clone();
        async move {
            if let Err(error) = converse(stream, &total).await {
                tracing::debug!(%error, "a client of the demo's ledger left");
            }
        }
    })
    .await;
}

async fn converse(mut stream: TcpStream, total: &AtomicU64) -> std::io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    loop {
        line.clear();
        if (&mut reader).take(LONGEST_LINE).read_line(&mut line).await? == 0 {
            return writer.shutdown().await;
        }
        let answer = match line.strip_suffix('\n') {
            Some(line) => answer(line, total),
            None => "ERR a line ends in \\n within 64 bytes\n".to_owned(),
        };
        writer.write_all(answer.as_bytes()).await?;
        if !line.ends_with('\n') {
            return writer.shutdown().await;
        }
    }
}

fn answer(line: &str, total: &AtomicU64) -> String {
    let amount = line.strip_prefix("ADD ").and_then(|amount| amount.trim_end().parse::<u64>().ok());
    let Some(amount) = amount else {
        return "ERR expected ADD and a whole number\n".to_owned();
    };
    match total.fetch_update(Relaxed, Relaxed, |total| total.checked_add(amount)) {
        Ok(before) => format!("OK {}\n", before + amount),
        Err(_) => "ERR the ledger is full\n".to_owned(),
    }
}

/// Why the ledger did not give a total.
#[derive(Debug, thiserror::Error)]
pub(super) enum LedgerError {
    #[error("the ledger could not be asked: {0}")]
    Io(#[from] std::io::Error),
    #[error("the ledger answered {0:?} instead of OK and a total")]
    Answer(String),
}

/// Adds to the ledger at `address`, over a connection of its own, and returns the new total.
pub(super) async fn add(address: SocketAddr, amount: u64) -> Result<u64, LedgerError> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("ADD {amount}\n").as_bytes()).await?;
    // Half-closed, and the answer is read to its end: the mesh must carry both.
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.take(LONGEST_LINE).read_to_string(&mut answer).await?;
    let total = answer.strip_prefix("OK ").and_then(|rest| rest.strip_suffix('\n')?.parse().ok());
    total.ok_or(LedgerError::Answer(answer))
}
