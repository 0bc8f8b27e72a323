//! Refusals that are no HTTP exchange: how a connection that is not carried is counted and closed.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;

use crate::connect::backend::{Backend, View, lost_edge};
use crate::connect::worker::Worker;
use crate::connection::Registered;
use crate::net::Stream;
use crate::outcome::{Error, Reason};
use crate::protocol::http::serve;
use crate::telemetry::{Edge, TcpRecord, WireProtocol};

/// Closes a connection that is nobody's to carry.
pub(super) fn turn_away(worker: &Worker, stream: TcpStream, registered: &Registered, error: &Error) {
    let record = TcpRecord::begin(&worker.telemetry, &lost_edge(worker, WireProtocol::Tcp), Instant::now());
    record.downstream(registered.client);
    record.failed(error.reason, || error.to_string());
    Stream::from(stream).reset_on_close();
}

/// Counts a connection that ends before anything was forwarded, and closes it so that it looks like an error.
pub(super) fn refuse_connection(worker: &Worker, view: Option<&View>, stream: &Stream, error: &Error) {
    let protocol = WireProtocol::Tcp;
    let edge = unpicked(worker, view, protocol);
    let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
    record.failed(error.reason, || error.to_string());
    stream.reset_on_close();
}

/// A first line that never ended: 408 in the protocol that it was the beginning of.
pub(super) async fn refuse_head(worker: &Worker, view: Option<&View>, mut stream: Stream, error: &Error) {
    if error.reason == Reason::RequestHeadTimeout {
        serve::refuse_head(&mut stream, error.reason, &worker.own.instance).await;
    }
    let protocol = WireProtocol::Http1;
    let edge = unpicked(worker, view, protocol);
    serve::count_refused_head(&worker.telemetry, &edge, error.reason);
}

/// Counts heads that the parser refused, for the service of the listener if it has one.
pub(super) fn head_refusals(worker: &Rc<Worker>, view: Option<&View>) -> serve::OnRefusal {
    let edge = unpicked(worker, view, WireProtocol::Http1);
    let telemetry = worker.telemetry.clone();
    Box::new(move |reason| serve::count_refused_head(&telemetry, &edge, reason))
}

/// Counts streams that the HTTP/2 library refused, for the service that the connection goes to.
pub(super) fn stream_refusals(worker: &Rc<Worker>, backend: &Rc<Backend>) -> serve::OnRefusal {
    let (worker, backend) = (worker.clone(), backend.clone());
    Box::new(move |reason| {
        let edge = unpicked(&worker, backend.last_view().as_deref(), WireProtocol::Http2);
        serve::count_refused_stream(&worker.telemetry, &edge, reason);
    })
}

/// The edge of what ends before an endpoint is picked.
pub(super) fn unpicked(worker: &Worker, view: Option<&View>, protocol: WireProtocol) -> Arc<Edge> {
    view.map_or_else(|| lost_edge(worker, protocol), |view| view.unpicked_edge(worker, protocol))
}
