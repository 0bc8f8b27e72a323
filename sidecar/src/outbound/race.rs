//! Connecting: an endpoint is dialled, and when it has not answered for a while another one beside it; who connects first
//! is used. The first SYN to an endpoint may only be lost, and its second goes out after a second: so nobody is given up
//! for being late, and nobody is waited for alone.

use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use futures_util::FutureExt;
use tokio::time::sleep_until;

use super::tried::Tried;
use crate::balance::Kind;
use crate::connect::backend::{Slot, View};
use crate::connect::worker::Worker;
use crate::outcome::{Error, Reason, Retry, Stage};

/// What an endpoint is counted by while it is dialled, and how.
pub(super) trait Counted: Sized {
    fn begin(view: &View, index: usize) -> Option<Self>;
    /// It did not connect, or only after another.
    fn failed(self, worker: &Worker, began: Instant, error: &Error);
}

/// An endpoint that connected.
pub(super) struct Connected<G, T> {
    pub(super) slot: Rc<Slot>,
    pub(super) guard: G,
    pub(super) opened: T,
    pub(super) began: Instant,
}

/// An endpoint that did not.
pub(super) struct Lost {
    pub(super) slot: Rc<Slot>,
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) reason: Reason,
}

struct Runner<'a, G, T> {
    slot: Rc<Slot>,
    guard: G,
    began: Instant,
    opening: Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>,
}

/// Dials until one has connected, `first` first, within what `tried` still allows. Those that did not are added to `lost`.
pub(super) async fn connect<G: Counted, T>(
    worker: &Worker,
    view: &View,
    kind: Kind,
    mut first: Option<(usize, Rc<Slot>)>,
    tried: &mut Tried,
    lost: &mut Vec<Lost>,
    open: impl AsyncFn(Rc<Slot>) -> Result<T, Error>,
) -> Result<Connected<G, T>, Error> {
    let beside = view.dialled_beside(worker);
    let mut running: Vec<Runner<'_, G, T>> = Vec::new();
    let mut next = tokio::time::Instant::now();
    let mut more = true;
    loop {
        if running.is_empty() || next <= tokio::time::Instant::now() {
            let began = Instant::now();
            next = tokio::time::Instant::now() + beside;
            let picked = match first.take() {
                None if tried.may_begin() => view.pick(worker, kind, worker.nanos(began), tried.indices()),
                first => first,
            };
            more = picked.is_some();
            if let Some((index, slot)) = picked
                && let Some(guard) = G::begin(view, index)
            {
                tried.begin(index);
                let opening = Box::pin(open(slot.clone()));
                running.push(Runner { slot, guard, began, opening });
            }
        }
        if running.is_empty() {
            return Err(tried.last_error(view));
        }
        let soonest = std::future::poll_fn(|cx| {
            let mut ready =
                running.iter_mut().enumerate().filter_map(|(place, runner)| match runner.opening.poll_unpin(cx) {
                    Poll::Ready(opened) => Some((place, opened)),
                    Poll::Pending => None,
                });
            ready.next().map_or(Poll::Pending, Poll::Ready)
        });
        tokio::select! {
            biased;
            (place, opened) = soonest => {
                let runner = running.swap_remove(place);
                match opened {
                    Ok(opened) => {
                        for other in running {
                            if other.began.elapsed() >= beside {
                                give_up(worker, other, lost);
                            }
                        }
                        let Runner { slot, guard, began, .. } = runner;
                        return Ok(Connected { slot, guard, opened, began });
                    }
                    Err(error) => {
                        let Runner { slot, guard, began, .. } = runner;
                        lost.push(Lost { slot, began, ended: Instant::now(), reason: error.reason });
                        guard.failed(worker, began, &error);
                        if error.retry != Retry::Safe {
                            return Err(error);
                        }
                        tried.failed(error);
                        // Another one at once.
                        next = tokio::time::Instant::now();
                    }
                }
            }
            () = sleep_until(next), if more => {}
            () = sleep_until(tried.until().into()) => {
                let late: Vec<SocketAddr> = running.iter().map(|runner| runner.slot.target.address).collect();
                running.into_iter().for_each(|runner| give_up(worker, runner, lost));
                return Err(timed_out(&late, worker));
            }
        }
    }
}

/// It may be reachable all the same. But who is late again and again is not.
fn give_up<G: Counted, T>(worker: &Worker, runner: Runner<'_, G, T>, lost: &mut Vec<Lost>) {
    let Runner { slot, guard, began, .. } = runner;
    let error = timed_out(&[slot.target.address], worker);
    lost.push(Lost { slot, began, ended: Instant::now(), reason: error.reason });
    guard.failed(worker, began, &error);
}

fn timed_out(late: &[SocketAddr], worker: &Worker) -> Error {
    let late: Vec<String> = late.iter().map(ToString::to_string).collect();
    let detail = format!("{} did not answer within {:?}", late.join(", "), worker.limits.connect_budget);
    Error::upstream(Stage::Connect, Reason::ConnectTimeout, Retry::Safe, detail)
}
