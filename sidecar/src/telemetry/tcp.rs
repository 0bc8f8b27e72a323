//! The record of one opaque connection: opened at once, bytes counted as they move, closed when it is dropped. The
//! data path makes one per TCP or TLS connection that it forwards or refuses, on one worker.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::outcome::Reason;

use super::Telemetry;
use super::access_log::{Entry, PolicyFacts};
use super::edge::Edge;

pub struct TcpRecord {
    telemetry: Arc<Telemetry>,
    edge: Arc<Edge>,
    started: Instant,
    sent: Cell<u64>,
    received: Cell<u64>,
    reason: Cell<Option<Reason>>,
    detail: RefCell<Option<String>>,
    sni: RefCell<Option<String>>,
    policy: RefCell<Option<Box<PolicyFacts>>>,
    downstream: Cell<Option<SocketAddr>>,
    upstream: Cell<Option<SocketAddr>>,
    closed: Cell<bool>,
}

impl TcpRecord {
    /// Counts the connection as opened. On the outbound side that is when its endpoint is known or given up.
    pub fn begin(telemetry: &Arc<Telemetry>, edge: &Arc<Edge>, now: Instant) -> TcpRecord {
        edge.tcp.opened.fetch_add(1, Ordering::Relaxed);
        TcpRecord {
            telemetry: telemetry.clone(),
            edge: edge.clone(),
            started: now,
            sent: Cell::new(0),
            received: Cell::new(0),
            reason: Cell::new(None),
            detail: RefCell::new(None),
            sni: RefCell::new(None),
            policy: RefCell::new(None),
            downstream: Cell::new(None),
            upstream: Cell::new(None),
            closed: Cell::new(false),
        }
    }

    /// Bytes from the service to the caller, on either side of the mesh.
    pub fn add_sent(&self, n: u64) {
        self.sent.set(self.sent.get() + n);
        self.edge.tcp.sent_bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// Bytes from the caller to the service, on either side of the mesh.
    pub fn add_received(&self, n: u64) {
        self.received.set(self.received.get() + n);
        self.edge.tcp.received_bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// Where the connection came from, for the access log.
    pub fn downstream(&self, address: SocketAddr) {
        self.downstream.set(Some(address));
    }

    /// Where the connection went, for the access log.
    pub fn upstream(&self, address: SocketAddr) {
        self.upstream.set(Some(address));
    }

    /// The server name in the application's own TLS, for the access log.
    pub fn sni(&self, name: Option<String>) {
        self.sni.replace(name);
    }

    /// Which policy decided, and by which rule, for the access log.
    pub fn set_policy(&self, policy: &str, rule: Option<usize>) {
        if self.telemetry.logs(true) {
            let rule = rule.map(|rule| rule.to_string()).unwrap_or_default();
            self.policy.replace(Some(Box::new(PolicyFacts { policy: policy.to_owned(), rule })));
        }
    }

    /// The connection ends because of this; the first reason stays. `detail` is for the log and made for it alone.
    pub fn failed(&self, reason: Reason, detail: impl FnOnce() -> String) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
            if self.telemetry.logs(true) {
                self.detail.replace(Some(detail()));
            }
        }
    }

    /// Closes with the caller's time; dropping does the same with its own.
    pub fn finish(&self, now: Instant) {
        if self.closed.replace(true) {
            return;
        }
        let duration = now.saturating_duration_since(self.started);
        let reason = self.reason.get();
        self.edge.tcp.duration.observe(duration);
        self.telemetry.edges().count_closed(&self.edge, reason);
        if self.telemetry.logs(reason.is_some()) {
            self.telemetry.log(Entry {
                reason,
                duration,
                request_bytes: self.received.get(),
                response_bytes: self.sent.get(),
                downstream: self.downstream.get(),
                upstream: self.upstream.get(),
                detail: self.detail.take(),
                sni: self.sni.take(),
                policy: self.policy.take(),
                ..Entry::of(self.edge.clone())
            });
        }
    }
}

impl Drop for TcpRecord {
    fn drop(&mut self) {
        if !self.closed.get() {
            self.finish(Instant::now());
        }
    }
}
