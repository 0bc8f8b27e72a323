//! Copies of requests for another backend, whose answers nobody reads. A copy is bounded in every way: so many at once on a
//! worker, so many bytes of a body, so long. The request itself never waits for one.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use outrigger_api::route::{Mirror, To};

use super::route::destination;
use super::tried::{blame, unavailable};
use crate::balance::{Kind, Outcome};
use crate::connect::backend::View;
use crate::connect::lane::{Answered, Framing, copy_head};
use crate::connect::request_body::RequestBody;
use crate::connect::tap::Tap;
use crate::connect::worker::Worker;
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::protocol::http::exchange::Exchange;
use crate::telemetry::{HttpRecord, WireProtocol};

/// Copies under way on one worker; more are not made.
const MOST: usize = 64;
/// How long one may take, its body and its answer included.
const LONGEST: Duration = Duration::from_secs(15);

/// Sends a copy of `request` as well, where its turn has come.
pub(super) fn send(exchange: &Exchange, front: &Rc<View>, mirror: &Mirror, request: &mut Request<RequestBody>) {
    let worker = &exchange.session.worker;
    let chosen = || worker.rng.borrow_mut().u32(0..mirror.of.max(1)) < mirror.share;
    let (Some(to), None) = (&mirror.backend.to, &mirror.backend.invalid) else { return };
    if worker.mirrors.get() >= MOST || !chosen() {
        return;
    }
    let head = Request::from_parts(copy_head(request), ());
    let stream = worker.streams.begin(&exchange.session.entry, false);
    let alone = request.body().alone(stream.progress());
    let tap = request.body_mut().tap();
    let framing = if exchange.session.http2 { Framing::Http2 } else { Framing::Http1 };
    let (worker, front, to) = (worker.clone(), front.clone(), to.clone());
    let copy = Copy { worker: worker.clone(), front, to, framing, protocol: exchange.protocol };
    worker.mirrors.set(worker.mirrors.get() + 1);
    tokio::task::spawn_local(async move {
        let worker = copy.worker.clone();
        let _ = tokio::time::timeout(LONGEST, copy.deliver(head, alone, tap)).await;
        drop(stream);
        worker.mirrors.set(worker.mirrors.get() - 1);
    });
}

struct Copy {
    worker: Rc<Worker>,
    front: Rc<View>,
    to: To,
    framing: Framing,
    protocol: WireProtocol,
}

impl Copy {
    async fn deliver(self, head: Request<()>, alone: RequestBody, tap: Option<Rc<Tap>>) {
        let frames = match tap {
            // Too much, or broken off.
            Some(tap) => match tap.whole().await {
                Some(frames) => frames,
                None => return,
            },
            None => VecDeque::new(),
        };
        let record = HttpRecord::begin(&self.worker.telemetry, None, head.method(), Instant::now());
        match self.ask(head, alone, frames, &record).await {
            Ok(()) => record.response_ended(),
            Err(error) => record.failed(error.reason, || error.to_string()),
        }
    }

    async fn ask(
        &self,
        head: Request<()>,
        mut body: RequestBody,
        frames: VecDeque<Bytes>,
        record: &HttpRecord,
    ) -> Result<(), Error> {
        let worker = &self.worker;
        let view = destination(worker, &self.front, &self.to).await?;
        let (mut parts, ()) = head.into_parts();
        let length: usize = frames.iter().map(Bytes::len).sum();
        if !frames.is_empty() {
            // What came in chunks goes on as one whole.
            parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            record.add_request_bytes(length as u64);
        }
        body.give(frames);
        let now = worker.now();
        let picked = view.pick(worker, Kind::Http, now, &[]);
        let (index, slot) = picked.ok_or_else(|| unavailable(&view))?;
        record.set_edge(&view.edge(worker, &slot, self.protocol));
        let load = view.endpoints.start(index).ok_or_else(|| unavailable(&view))?;
        let sent = slot.lane(self.framing).send(Request::from_parts(parts, body)).await;
        let Answered { response, at, latency, .. } = match sent {
            Ok(answered) => answered,
            Err(unsent) => {
                load.finish(worker.now(), Duration::ZERO, blame(&unsent.error));
                return Err(unsent.error);
            }
        };
        record.answered(response.status().as_u16());
        let outcome = if response.status().is_server_error() { Outcome::Failure5xx } else { Outcome::Success };
        load.finish(worker.nanos(at), latency, outcome);
        let mut body = response.into_body();
        while let Some(frame) = std::future::poll_fn(|cx| body.poll_frame(cx)).await {
            let frame = frame.map_err(|broke| {
                Error::upstream(Stage::Forward, Reason::UpstreamTruncated, Retry::Never, broke.to_string())
            })?;
            record.add_response_bytes(frame.data_ref().map_or(0, |data| data.len() as u64));
        }
        body.release();
        Ok(())
    }
}
