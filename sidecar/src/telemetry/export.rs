//! Sends spans to the collector over OTLP/gRPC, from one thread with a runtime of its own: a tonic channel lives on
//! the runtime that drives it, and neither the workers nor the control thread may wait for a collector. The records
//! hand spans over through a bounded queue; what does not fit, or is not taken within [`EXPORT_TIMEOUT`], is counted
//! and dropped.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use opentelemetry::KeyValue;
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tonic::transport::Endpoint;

use super::collect::Metrics;
use super::span::SCHEMA_URL;
use crate::net;

/// Spans that may wait for the thread.
const QUEUE: usize = 4096;
/// A batch is sent when it has so many spans,
const BATCH: usize = 512;
/// or when its first span has waited so long.
const BATCH_DELAY: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where spans go and in whose name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Target {
    /// `http://host:port`
    pub endpoint: String,
    pub service_name: String,
    pub service_namespace: String,
    pub service_instance_id: String,
}

/// Why there is no exporter for an endpoint.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("tracing.otlpEndpoint {endpoint:?} is not usable: {message}; write it as http://host:port")]
    Endpoint { endpoint: String, message: String },
    #[error("the thread that exports spans could not be started: {0}; spans are dropped")]
    Thread(#[from] std::io::Error),
}

enum Message {
    Span(Box<SpanData>),
    /// Answered when every span before it was sent or dropped.
    Flush(oneshot::Sender<()>),
}

/// The way to the exporting thread, which sends what it has and ends when this is dropped.
pub(super) struct SpanQueue {
    sender: mpsc::Sender<Message>,
    target: watch::Sender<Option<Target>>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl SpanQueue {
    /// `mark` keeps the connection to the collector out of the sidecar's own redirect rules.
    pub(super) fn start(metrics: Arc<Metrics>, mark: Option<u32>) -> Result<SpanQueue, ExportError> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (target, targets) = watch::channel(None);
        let trouble = Arc::<Mutex<Option<String>>>::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let exporting = Exporting {
            receiver,
            targets,
            metrics,
            mark,
            exporter: None,
            batch: Vec::new(),
            failing: false,
            trouble: trouble.clone(),
        };
        std::thread::Builder::new().name("span-export".to_owned()).spawn(move || runtime.block_on(exporting.run()))?;
        Ok(SpanQueue { sender, target, trouble })
    }

    /// Sends what comes from now on to `target`; None drops it.
    pub(super) fn retarget(&self, target: Option<Target>) {
        self.target.send_if_modified(|current| {
            let changed = *current != target;
            *current = target;
            changed
        });
    }

    /// What is wrong with the collector now.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// False when the queue is full and the span is lost.
    pub(super) fn send(&self, span: SpanData) -> bool {
        self.sender.try_send(Message::Span(Box::new(span))).is_ok()
    }

    /// Resolves when what was sent before has left, or was dropped.
    pub(super) async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.sender.send(Message::Flush(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// Checks an endpoint as the exporter will.
pub(super) fn check_endpoint(endpoint: &str) -> Result<Endpoint, ExportError> {
    let wrong = |message: String| ExportError::Endpoint { endpoint: endpoint.to_owned(), message };
    let parsed = Endpoint::from_shared(endpoint.to_owned()).map_err(|error| wrong(error.to_string()))?;
    match (parsed.uri().scheme_str(), parsed.uri().authority()) {
        (Some("http"), Some(_)) => Ok(parsed.connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT)),
        (Some("http") | None, _) => Err(wrong("scheme or host is missing".to_owned())),
        (Some(scheme), _) => Err(wrong(format!("the scheme {scheme} is not supported"))),
    }
}

/// The thread's state: one batch at a time, so that a slow collector fills the queue and not the memory.
struct Exporting {
    receiver: mpsc::Receiver<Message>,
    targets: watch::Receiver<Option<Target>>,
    metrics: Arc<Metrics>,
    mark: Option<u32>,
    exporter: Option<opentelemetry_otlp::SpanExporter>,
    batch: Vec<SpanData>,
    /// True after a failed export, so that each outage is logged once.
    failing: bool,
    /// The same for `outrigger status`.
    trouble: Arc<Mutex<Option<String>>>,
}

impl Exporting {
    async fn run(mut self) {
        let mut due = None;
        loop {
            let wait = async move {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Ok(()) = self.targets.changed() => {
                    self.export().await;
                    self.retarget();
                }
                message = self.receiver.recv() => match message {
                    Some(Message::Span(span)) => self.batch.push(*span),
                    Some(Message::Flush(done)) => {
                        self.export().await;
                        let _ = done.send(());
                    }
                    None => return self.export().await,
                },
                () = wait => self.export().await,
            }
            if self.batch.len() >= BATCH {
                self.export().await;
            }
            due = match due {
                _ if self.batch.is_empty() => None,
                None => Some(Instant::now() + BATCH_DELAY),
                waiting => waiting,
            };
        }
    }

    fn tell(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    fn retarget(&mut self) {
        let target = self.targets.borrow_and_update().clone();
        self.failing = false;
        self.tell(None);
        self.exporter = target.and_then(|target| match exporter(&target, self.mark) {
            Ok(exporter) => Some(exporter),
            Err(error) => {
                tracing::warn!("no traces: {error}");
                None
            }
        });
    }

    async fn export(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        let count = batch.len() as u64;
        if count == 0 {
            return;
        }
        let Some(exporter) = &self.exporter else {
            self.metrics.spans_dropped.fetch_add(count, Ordering::Relaxed);
            return;
        };
        let failure = match tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(batch)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {EXPORT_TIMEOUT:?}")),
        };
        match failure {
            None => {
                if std::mem::take(&mut self.failing) {
                    self.tell(None);
                }
                self.metrics.spans_exported.fetch_add(count, Ordering::Relaxed);
            }
            Some(error) => {
                self.metrics.spans_dropped.fetch_add(count, Ordering::Relaxed);
                if !std::mem::replace(&mut self.failing, true) {
                    let endpoint = self.targets.borrow().as_ref().map(|target| target.endpoint.clone());
                    let endpoint = endpoint.unwrap_or_default();
                    tracing::warn!("the collector at {endpoint} does not take spans, {count} dropped: {error}");
                    self.tell(Some(format!("the collector at {endpoint} does not take spans: {error}")));
                }
            }
        }
    }
}

async fn connect(uri: http::Uri, mark: u32) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host((host, uri.port_u16().unwrap_or(80))).await? {
        match net::connect_marked(address, Some(mark)).await {
            Ok(stream) => return Ok(TokioIo::new(stream)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Built inside the thread's runtime, which then drives its channel.
fn exporter(target: &Target, mark: Option<u32>) -> Result<opentelemetry_otlp::SpanExporter, ExportError> {
    let endpoint = check_endpoint(&target.endpoint)?;
    let channel = match mark {
        None => endpoint.connect_lazy(),
        Some(mark) => endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| connect(uri, mark))),
    };
    let mut exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_channel(channel)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|error| ExportError::Endpoint { endpoint: target.endpoint.clone(), message: error.to_string() })?;
    let attributes = [
        KeyValue::new("service.name", target.service_name.clone()),
        KeyValue::new("service.namespace", target.service_namespace.clone()),
        KeyValue::new("service.instance.id", target.service_instance_id.clone()),
    ];
    exporter.set_resource(&Resource::builder_empty().with_schema_url(attributes, SCHEMA_URL).build());
    Ok(exporter)
}
