//! `load`: a customer who calls `web` at a steady rate and checks every answer: the right item at the right price, the
//! whole catalog, and a ledger that holds at least what was paid. Counts what was right and keeps the first thing that
//! was not.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::catalog::ITEMS;
use super::web::ShopAnswer;

/// A request that took longer has failed.
const PATIENCE: Duration = Duration::from_secs(6);
/// A request that would be one more in flight is not sent and has failed.
const MOST_IN_FLIGHT: usize = 200;
const LONGEST_ANSWER: usize = 64 * 1024;
/// The timer's resolution, and so 1,000 calls a second at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// What has come of the calls so far. Written by [`run`], read by whoever shows it.
#[derive(Default, Debug)]
pub struct Tally(Mutex<Report>);

#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Report {
    pub ok: u64,
    pub failed: u64,
    /// What was wrong with the first that failed.
    pub first_failure: Option<String>,
    /// Who called web and the catalog, as those were told by their sidecars; from the latest answer.
    pub web_caller: Option<String>,
    pub catalog_caller: Option<String>,
    /// What all answered calls together have paid.
    pub paid_cents: u64,
}

impl Tally {
    pub fn report(&self) -> Report {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count(&self, outcome: Result<ShopAnswer, Failure>) {
        let mut report = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(answer) => {
                report.ok += 1;
                report.paid_cents += answer.price_cents;
                report.web_caller = answer.caller;
                report.catalog_caller = answer.catalog_caller;
            }
            Err(failure) => {
                report.failed += 1;
                report.first_failure.get_or_insert_with(|| failure.to_string());
            }
        }
    }
}

/// Why a call counts as failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("web could not be reached at {0}: {1}")]
    Connect(SocketAddr, std::io::Error),
    #[error("the call to web broke off: {0}")]
    Http(#[from] hyper::Error),
    #[error("web's answer broke off: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("web answered {0}: {1}")]
    Status(StatusCode, String),
    #[error("web's answer is not what it promises: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the request could not be made: {0}")]
    Request(#[from] http::Error),
    #[error("asked for {asked:?}, web answered {answer:?}")]
    Wrong { asked: &'static str, answer: Box<ShopAnswer> },
    #[error("the ledger holds {holds}, but {paid} were paid")]
    Lost { holds: u64, paid: u64 },
    #[error("no answer within {PATIENCE:?}")]
    Slow,
    #[error("not sent, because {MOST_IN_FLIGHT} others had no answer yet")]
    Crowded,
}

/// Calls the shop at `web` (the outbound listener of the customer's sidecar) `rate` times a second (at most 1,000) until `shutdown`,
/// then waits for the answers that are due.
pub async fn run(web: SocketAddr, rate: NonZeroU32, tally: Arc<Tally>, shutdown: impl Future<Output = ()>) {
    let mut shutdown = pin!(shutdown);
    let mut ticks = tokio::time::interval((Duration::from_secs(1) / rate.get()).max(SHORTEST_PAUSE));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let customer = Arc::new(Customer { web, idle: Mutex::default() });
    let mut calls: JoinSet<Result<ShopAnswer, Failure>> = JoinSet::new();
    let mut wishes = ITEMS.into_iter().cycle();
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(outcome) = calls.join_next() => count(&tally, outcome),
            _ = ticks.tick() => {
                let Some((item, price)) = wishes.next() else { break };
                if calls.len() >= MOST_IN_FLIGHT {
                    tally.count(Err(Failure::Crowded));
                    continue;
                }
                let paid_before = tally.report().paid_cents;
                let customer = customer.clone();
                calls.spawn(async move {
                    match tokio::time::timeout(PATIENCE, customer.buy(item)).await {
                        Ok(answer) => check(answer?, item, price, paid_before),
                        Err(_) => Err(Failure::Slow),
                    }
                });
            }
        }
    }
    while let Some(outcome) = calls.join_next().await {
        count(&tally, outcome);
    }
}

/// A call whose task was ended from outside did not fail.
fn count(tally: &Tally, outcome: Result<Result<ShopAnswer, Failure>, tokio::task::JoinError>) {
    if let Ok(outcome) = outcome {
        tally.count(outcome);
    }
}

/// `paid_before` is what had been answered when the call began; calls overtake each other, so the ledger may hold more.
fn check(answer: ShopAnswer, item: &'static str, price: u64, paid_before: u64) -> Result<ShopAnswer, Failure> {
    let right = answer.item == item && answer.price_cents == price;
    if !right || !answer.catalog.iter().eq(ITEMS.iter().map(|(name, _)| name)) {
        return Err(Failure::Wrong { asked: item, answer: Box::new(answer) });
    }
    let paid = paid_before + price;
    if answer.total_cents < paid {
        return Err(Failure::Lost { holds: answer.total_cents, paid });
    }
    Ok(answer)
}

struct Customer {
    web: SocketAddr,
    /// Connections to call over again, the last used one last.
    idle: Mutex<Vec<SendRequest<Empty<Bytes>>>>,
}

impl Customer {
    async fn buy(&self, item: &str) -> Result<ShopAnswer, Failure> {
        let mut connection = match self.reuse() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let request =
            Request::get(format!("/shop?item={item}")).header(header::HOST, "web").body(Empty::<Bytes>::new())?;
        let response = match connection.try_send_request(request).await {
            Ok(response) => response,
            Err(mut error) => match error.take_message() {
                // The other side closed the idle connection first; nothing of the request was sent.
                Some(request) => {
                    connection = self.connect().await?;
                    connection.send_request(request).await?
                }
                None => return Err(error.into_error().into()),
            },
        };
        let status = response.status();
        let body =
            Limited::new(response.into_body(), LONGEST_ANSWER).collect().await.map_err(Failure::Body)?.to_bytes();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        if status != StatusCode::OK {
            return Err(Failure::Status(status, String::from_utf8_lossy(&body).into_owned()));
        }
        Ok(serde_json::from_slice(&body)?)
    }

    fn reuse(&self) -> Option<SendRequest<Empty<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| !connection.is_closed());
        idle.pop_if(|connection| connection.is_ready())
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, Failure> {
        let stream = TcpStream::connect(self.web).await.map_err(|error| Failure::Connect(self.web, error))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends when its sender is dropped; what it has to tell, the sender's caller hears too.
        tokio::spawn(async move {
            let _told_to_the_sender = connection.await;
        });
        Ok(sender)
    }
}
