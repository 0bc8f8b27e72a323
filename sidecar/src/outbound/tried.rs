//! Which endpoints one request or connection has tried, and whether it may try another.

use std::time::Instant;

use crate::balance::Outcome;
use crate::connect::backend::View;
use crate::connect::worker::Worker;
use crate::outcome::{Error, Reason, Retry, Side, Stage};

/// The endpoints that one request or connection has tried.
pub(super) struct Tried {
    indices: [usize; Tried::MOST],
    count: usize,
    tries: usize,
    until: Instant,
    last: Option<Error>,
}

impl Tried {
    const MOST: usize = 8;

    pub(super) fn new(worker: &Worker, view: &View, began: Instant) -> Tried {
        let tries = view.tries(worker).clamp(1, Tried::MOST);
        let until = began + worker.limits.connect_budget;
        Tried { indices: [0; Tried::MOST], count: 0, tries, until, last: None }
    }

    pub(super) fn indices(&self) -> &[usize] {
        &self.indices[..self.count]
    }

    /// The end of all tries together.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    pub(super) fn may_begin(&self) -> bool {
        self.count < self.tries && (self.count == 0 || Instant::now() < self.until)
    }

    /// Whether there is an endpoint that was not tried, and may be.
    pub(super) fn leaves_some(&self, view: &View) -> bool {
        self.count < self.tries && self.count < view.endpoints.len()
    }

    /// Notes that an endpoint is being tried.
    pub(super) fn begin(&mut self, index: usize) {
        if let Some(place) = self.indices.get_mut(self.count) {
            *place = index;
            self.count += 1;
        }
    }

    pub(super) fn failed(&mut self, error: Error) {
        self.last = Some(error);
    }

    /// Why nothing is left to be tried.
    pub(super) fn last_error(&mut self, view: &View) -> Error {
        self.last.take().unwrap_or_else(|| unavailable(view))
    }

    /// Whether another endpoint may be tried after this.
    pub(super) fn may_go_on(&self, error: &Error) -> bool {
        error.retry == Retry::Safe && self.may_begin()
    }

    /// Notes a failure of the one that was begun last; gives back what may be tried elsewhere.
    pub(super) fn again<T>(&mut self, error: Error, what: Option<T>) -> Result<T, Error> {
        match what {
            Some(what) if self.may_go_on(&error) => {
                self.last = Some(error);
                Ok(what)
            }
            _ => Err(error),
        }
    }
}

pub(super) fn unavailable(view: &View) -> Error {
    let detail = match &view.service {
        Some(service) if view.endpoints.is_empty() && view.why_empty.is_empty() => {
            format!("{service} has no endpoints")
        }
        Some(service) if view.endpoints.is_empty() => format!("{service} has no endpoints: {}", view.why_empty),
        Some(service) => {
            format!(
                "none of the {} endpoints of {service} can be used: each failed or is ejected",
                view.endpoints.len()
            )
        }
        None => "no endpoint".to_owned(),
    };
    Error::upstream(Stage::Balance, Reason::DestinationUnavailable, Retry::Never, detail)
}

/// Only what the endpoint did wrong counts against it.
pub(super) fn blame(error: &Error) -> Outcome {
    match error.side {
        Side::Upstream => Outcome::ConnectError,
        Side::Downstream | Side::Own => Outcome::Cancelled,
    }
}
