//! The access log: one JSON object per line, written by one thread so that a slow reader of stderr never holds a
//! worker. The records hand over an [`Entry`]; when the queue is full the entry is dropped and counted. Every value
//! goes through serde_json, so that no byte a peer sent can break a line. Of strangers that are refused there is one line
//! per reason and second, which says how many there were.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrigger_runtime::logging::escape_json;
use serde::Serialize;
use tokio::sync::oneshot;

use crate::outcome::Reason;

use super::edge::Edge;
use super::labels::Direction;

/// Entries that may wait for the writer.
const QUEUE: usize = 4096;
/// Bytes of one field.
const LONGEST_TEXT: usize = 2048;
/// Bytes that are gathered for one write.
const BATCH: usize = 32 * 1024;

/// What is known of a request or connection at its end. Owned by the writer from the moment it is sent.
pub(super) struct Entry {
    pub at: SystemTime,
    pub edge: Arc<Edge>,
    pub method: Option<http::Method>,
    pub path: String,
    pub authority: String,
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    pub reason: Option<Reason>,
    pub policy: Option<Box<PolicyFacts>>,
    /// The route and which of its rules the request follows.
    pub route: Option<(Arc<str>, usize)>,
    pub duration: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// 0: none.
    pub trace_id: u128,
    pub downstream: Option<SocketAddr>,
    pub upstream: Option<SocketAddr>,
    pub detail: Option<String>,
    /// The server name that the client of an application's own TLS asked for.
    pub sni: Option<String>,
    /// Lines of the same reason that were not written before this one.
    pub suppressed: Option<u64>,
}

/// Which policy decided, and by which of its rules.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyFacts {
    pub policy: String,
    pub rule: String,
}

impl Entry {
    /// An entry that knows its edge only; the rest is filled in by the record.
    pub(super) fn of(edge: Arc<Edge>) -> Entry {
        Entry {
            at: SystemTime::now(),
            edge,
            method: None,
            path: String::new(),
            authority: String::new(),
            status: None,
            grpc_status: None,
            reason: None,
            policy: None,
            route: None,
            duration: Duration::ZERO,
            request_bytes: 0,
            response_bytes: 0,
            trace_id: 0,
            downstream: None,
            upstream: None,
            detail: None,
            sni: None,
            suppressed: None,
        }
    }

    /// The reason for which a caller without an identity was refused: a connection that was ended, or a request that is
    /// the caller's fault. Anybody can cause as many of these as he likes.
    pub(super) fn refused_stranger(&self) -> Option<&'static str> {
        let labels = self.edge.labels();
        let reason = self.reason?;
        let stranger = labels.direction == Direction::Inbound && labels.source_principal.is_empty();
        let refused = self.method.is_none() || (400..500).contains(&reason.row().status);
        (stranger && refused).then(|| reason.word())
    }
}

/// The line's fields, in their order.
#[derive(Serialize)]
struct Line<'e> {
    timestamp: String,
    log: &'static str,
    direction: &'static str,
    protocol: &'static str,
    method: &'e str,
    path: &'e str,
    authority: &'e str,
    sni: &'e str,
    status: Option<u16>,
    grpc_status: Option<u8>,
    reason: &'static str,
    policy: &'e str,
    rule: &'e str,
    route: String,
    duration: f64,
    request_bytes: u64,
    response_bytes: u64,
    source_workload: &'e str,
    source_namespace: &'e str,
    source_principal: &'e str,
    destination_service: &'e str,
    destination_workload: &'e str,
    destination_namespace: &'e str,
    destination_principal: &'e str,
    mtls: bool,
    trace_id: String,
    downstream: Option<SocketAddr>,
    upstream: Option<SocketAddr>,
    detail: &'e str,
    #[serde(skip_serializing_if = "Option::is_none")]
    suppressed: Option<u64>,
}

impl<'e> Line<'e> {
    fn of(entry: &'e Entry) -> Line<'e> {
        let labels = entry.edge.labels();
        Line {
            timestamp: rfc3339(entry.at),
            log: "access",
            direction: labels.direction.as_str(),
            protocol: labels.protocol.as_str(),
            method: entry.method.as_ref().map_or("", http::Method::as_str),
            path: cut(&entry.path),
            authority: cut(&entry.authority),
            sni: entry.sni.as_deref().unwrap_or_default(),
            status: entry.status,
            grpc_status: entry.grpc_status,
            reason: entry.reason.map_or("", Reason::word),
            policy: entry.policy.as_ref().map_or("", |facts| &facts.policy),
            rule: entry.policy.as_ref().map_or("", |facts| &facts.rule),
            route: entry.route.as_ref().map_or_else(String::new, |(route, rule)| format!("{route} rule {rule}")),
            duration: entry.duration.as_secs_f64(),
            request_bytes: entry.request_bytes,
            response_bytes: entry.response_bytes,
            source_workload: &labels.source_workload,
            source_namespace: &labels.source_namespace,
            source_principal: &labels.source_principal,
            destination_service: &labels.destination_service,
            destination_workload: &labels.destination_workload,
            destination_namespace: &labels.destination_namespace,
            destination_principal: &labels.destination_principal,
            mtls: labels.mtls,
            trace_id: if entry.trace_id == 0 { String::new() } else { format!("{:032x}", entry.trace_id) },
            downstream: entry.downstream,
            upstream: entry.upstream,
            detail: cut(entry.detail.as_deref().unwrap_or_default()),
            suppressed: entry.suppressed,
        }
    }
}

/// A peer's text may be 16 KiB long.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST_TEXT)]
}

enum Message {
    Entry(Box<Entry>),
    /// Answered when everything before it is written.
    Flush(oneshot::Sender<()>),
}

/// The way to the writer thread, which ends when this is dropped.
pub(super) struct AccessLogQueue(SyncSender<Message>);

impl AccessLogQueue {
    /// Starts the writer thread.
    pub(super) fn start(sink: impl Write + Send + 'static) -> std::io::Result<AccessLogQueue> {
        let (sender, receiver) = sync_channel(QUEUE);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write_all(&receiver, sink))?;
        Ok(AccessLogQueue(sender))
    }

    /// False when the queue is full and the entry is lost.
    pub(super) fn send(&self, entry: Entry) -> bool {
        self.0.try_send(Message::Entry(Box::new(entry))).is_ok()
    }

    /// Resolves when what was sent before is written, or at once when the writer is gone or too far behind.
    pub(super) async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.0.try_send(Message::Flush(done)).is_ok() {
            let _ = wait.await;
        }
    }
}

fn write_all(receiver: &Receiver<Message>, mut sink: impl Write) {
    let mut lines = Vec::with_capacity(1024);
    let mut flushed = Vec::new();
    while let Ok(first) = receiver.recv() {
        let mut next = Some(first);
        while let Some(message) = next.take() {
            match message {
                Message::Entry(entry) => append(&mut lines, &entry),
                Message::Flush(done) => flushed.push(done),
            }
            if lines.len() < BATCH && flushed.is_empty() {
                next = receiver.try_recv().ok();
            }
        }
        // Nobody is left to tell when stderr cannot be written.
        let _ = sink.write_all(&lines).and_then(|()| sink.flush());
        lines.clear();
        lines.shrink_to(BATCH);
        for done in flushed.drain(..) {
            let _ = done.send(());
        }
    }
}

fn append(lines: &mut Vec<u8>, entry: &Entry) {
    if let Ok(line) = serde_json::to_vec(&Line::of(entry)) {
        lines.extend(escape_json(line));
        lines.push(b'\n');
    }
}

/// UTC with milliseconds: `2026-11-20T12:38:36.123Z`. The calendar is the proleptic Gregorian one, counted in eras of
/// 400 years that begin on the first of March.
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468; // Days from 0000-03-01 to 1970-01-01.
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000Z"),
            (1_795_178_316, "2026-11-20T12:38:36.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert!(rfc3339(UNIX_EPOCH + Duration::from_millis(7)).ends_with(".007Z"));
    }
}
