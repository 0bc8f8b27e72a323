//! Bytes to others that are not parsed: an endpoint is picked and dialled for each connection, and both ways are copied.

use std::rc::Rc;
use std::time::Instant;

use outrigger_runtime::drain::Hold;

use crate::balance::{Kind, Open, Outcome};
use crate::connect::backend::{Slot, View};
use crate::connect::dial::Dialled;
use crate::connect::worker::Worker;
use crate::connection::{Registered, State};
use crate::net::Stream;
use crate::outcome::{Error, Reason};
use crate::policy::Permit;
use crate::protocol::opaque::{self, Declared};
use crate::protocol::peek;
use crate::protocol::sni::{self, Sniffed};
use crate::telemetry::{TcpRecord, WireProtocol};
use crate::tls::MeshAlpn;

use super::race::{self, Connected, Counted};
use super::refusal::refuse_connection;
use super::route;
use super::tried::{Tried, blame};

pub(super) async fn opaque(
    worker: &Rc<Worker>,
    view: Result<Rc<View>, Error>,
    mut stream: Stream,
    registered: &Rc<Registered>,
    protocol: WireProtocol,
    declared: Declared,
    permit: Permit,
) {
    let view = match view {
        Ok(view) => view,
        Err(error) => return refuse_connection(worker, None, &stream, &error),
    };
    let opened = match route::needs_name(&view) {
        true => Box::pin(dial_by_name(worker, &view, &mut stream, permit)).await,
        false => dial(worker, &view, permit).await,
    };
    match opened {
        Ok(opened) => copy(worker, stream, opened, registered, protocol, declared).await,
        Err(error) => refuse_connection(worker, Some(&view), &stream, &error),
    }
}

/// An open upstream. It counts as an opaque connection only when it turns out to be one: see [`copy`].
pub(super) struct Opened {
    pub(super) dialled: Dialled,
    view: Rc<View>,
    slot: Rc<Slot>,
    _load: Open,
    _hold: Hold,
}

impl Opened {
    /// Counts it as a connection that was carried.
    pub(super) fn record(&self, worker: &Worker, registered: &Registered, protocol: WireProtocol) -> TcpRecord {
        let edge = self.view.edge(worker, &self.slot, protocol);
        let record = TcpRecord::begin(&worker.telemetry, &edge, Instant::now());
        record.upstream(self.slot.target.address);
        record.downstream(registered.client);
        record
    }
}

impl AsMut<Stream> for Opened {
    fn as_mut(&mut self) -> &mut Stream {
        &mut self.dialled.stream
    }
}

impl Counted for Open {
    fn begin(view: &View, index: usize) -> Option<Open> {
        view.endpoints.open(index)
    }

    fn failed(self, worker: &Worker, _began: Instant, error: &Error) {
        self.connected(worker.now(), blame(error));
    }
}

/// A TLSRoute decides by the name that the application's ClientHello holds.
async fn dial_by_name(
    worker: &Rc<Worker>,
    view: &Rc<View>,
    stream: &mut Stream,
    permit: Permit,
) -> Result<Opened, Error> {
    let sniffed = sni::sniff(stream, worker.limits.head_timeout).await.map_err(|error| peek::left(&error))?;
    let name = match &sniffed {
        Sniffed::Tls(name) => name.as_deref(),
        Sniffed::Other => None,
    };
    dial_backend(worker, &route::of_connection(worker, view.clone(), name).await?, permit).await
}

/// An endpoint of the view, or of the backend to which a route leads from it.
pub(super) async fn dial(worker: &Rc<Worker>, view: &Rc<View>, permit: Permit) -> Result<Opened, Error> {
    match &view.routes {
        Some(_) => {
            let backend = Box::pin(route::of_connection(worker, view.clone(), None)).await?;
            dial_backend(worker, &backend, permit).await
        }
        None => dial_backend(worker, view, permit).await,
    }
}

async fn dial_backend(worker: &Rc<Worker>, view: &Rc<View>, _permit: Permit) -> Result<Opened, Error> {
    let mut tried = Tried::new(worker, view, Instant::now());
    let open = async |slot: Rc<Slot>| worker.dialer.dial(&slot.target, MeshAlpn::Tcp).await;
    let mut lost = Vec::new();
    let connecting = race::connect::<Open, Dialled>(worker, view, Kind::Tcp, None, &mut tried, &mut lost, open);
    let Connected { slot, guard, opened, .. } = Box::pin(connecting).await?;
    guard.connected(worker.now(), Outcome::Success);
    Ok(Opened { dialled: opened, view: view.clone(), slot, _load: guard, _hold: worker.drain.hold() })
}

pub(super) async fn copy(
    worker: &Rc<Worker>,
    mut stream: Stream,
    opened: Opened,
    registered: &Registered,
    protocol: WireProtocol,
    declared: Declared,
) {
    let sniffed = if protocol == WireProtocol::Tls {
        Box::pin(sni::sniff(&mut stream, worker.limits.detect_wait)).await
    } else {
        Ok(Sniffed::Other)
    };
    registered.describe(|about| {
        about.protocol = protocol.as_str();
        about.mtls = opened.dialled.peer.is_some();
    });
    registered.enter(State::Tunnel);
    let record = opened.record(worker, registered, protocol);
    match sniffed {
        Ok(Sniffed::Tls(name)) => {
            registered.describe(|about| about.sni = name.clone());
            record.sni(name);
        }
        Ok(Sniffed::Other) => {}
        Err(error) => {
            opened.dialled.stream.reset_on_close();
            if !opaque::is_close(&error) {
                record.failed(Reason::ClientClosed, || error.to_string());
            }
            return;
        }
    }
    let forth = |count| record.add_received(count);
    let back = |count| record.add_sent(count);
    let upstream = opened.dialled.stream;
    let screen = declared.screen(upstream.ahead());
    match opaque::copy(stream, upstream, registered, screen, forth, back).await {
        Ok(()) => {}
        Err(error) => {
            let (reason, detail) = error.tell();
            record.failed(reason, || detail);
        }
    }
}
