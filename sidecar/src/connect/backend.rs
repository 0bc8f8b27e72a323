//! One destination as one worker sees it: its endpoints with their lanes, built anew when a snapshot arrives. A
//! request keeps the view that it began with.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use outrigger_api::name::{Protocol, ServiceName, ServicePort};
use outrigger_api::route::{self, Routes};
use outrigger_api::snapshot::{Destination, Endpoint, EndpointTls, Key, LoadBalancer};
use outrigger_api::virtual_address::is_virtual;
use rustls_pki_types::ServerName;
use tokio::sync::watch;

use super::bound::Bound;
use super::dial::{MutualTls, Target};
use super::lane::{Framing, Lane};
use super::request_body::RequestBody;
use super::worker::Worker;
use crate::balance::{Balancer, Endpoints, Kind, Nanos};
use crate::discovery::Known;
use crate::outcome::{Error, Reason, Stage};
use crate::telemetry::{Direction, Edge, EdgeLabels, UNKNOWN, WireProtocol};

/// A destination that the application uses. Lives as long as the worker remembers it.
pub struct Backend {
    key: Key,
    /// Of a name of the outside: its addresses, in the order in which they are tried. Its key is that of the first.
    addresses: Vec<Rc<Backend>>,
    known: RefCell<watch::Receiver<Known>>,
    view: RefCell<Option<Rc<View>>>,
    /// When the watchdog saw last that it is used.
    used: Cell<Instant>,
    /// Used since then.
    touched: Cell<bool>,
}

/// One version of it.
pub struct View {
    /// Empty for an address that nobody registered.
    pub service: Option<ServicePort>,
    protocol: Option<Protocol>,
    /// Why there are no endpoints, as the control plane says.
    pub why_empty: String,
    pub endpoints: Arc<Endpoints>,
    /// What binds it: where there are routes, they say where its requests go.
    pub routes: Option<Arc<Routes>>,
    slots: Vec<Rc<Slot>>,
    balancer: RefCell<Balancer>,
    /// The endpoints are the addresses of one host, to be tried in their order.
    one_host: bool,
    /// For what ends before an endpoint is picked.
    unpicked: Edges,
}

/// One endpoint: how to reach it, and its metrics.
pub struct Slot {
    pub endpoint: Endpoint,
    pub target: Target,
    http1: Rc<Lane>,
    http2: Rc<Lane>,
    edges: Edges,
}

type Edges = RefCell<[Option<Arc<Edge>>; 5]>;

impl Backend {
    /// The Service that was asked for, whether there is one or not.
    pub fn service(&self) -> Option<&ServicePort> {
        match &self.key {
            Key::Service(service) => Some(service),
            Key::Address(_) | Key::Name(_) | Key::Own => None,
        }
    }

    pub fn new(worker: &Worker, key: Key) -> Backend {
        let known = RefCell::new(worker.directory.destination(&key));
        let addresses = Vec::new();
        let (used, touched) = (Cell::new(Instant::now()), Cell::new(true));
        Backend { key, addresses, known, view: RefCell::default(), used, touched }
    }

    /// A name of the outside with several addresses, for as long as one request or connection needs it: what is pooled
    /// belongs to the addresses.
    pub fn of_name(worker: &Worker, addresses: Vec<Rc<Backend>>) -> Backend {
        let key = addresses.first().map_or(Key::Own, |first| first.key.clone());
        Backend { addresses, ..Backend::new(worker, key) }
    }

    pub fn key(&self) -> &Key {
        &self.key
    }

    /// What is known now. Waits, bounded, for the control plane's first answer.
    pub async fn view(&self, worker: &Worker) -> Result<Rc<View>, Error> {
        if !self.addresses.is_empty() {
            return Box::pin(self.view_of_name(worker)).await;
        }
        self.touched.set(true);
        let current = self.view.borrow().clone();
        let changed = self.known.borrow().has_changed().unwrap_or(false);
        // Passing through is allowed by the mesh's settings, which may have changed since.
        let revoked = |view: &View| view.service.is_none() && worker.registry_only();
        if let Some(view) = current
            && !changed
            && !revoked(&view)
        {
            return Ok(view);
        }
        let known = Box::pin(self.first_answer(worker)).await?;
        let previous = self.view.borrow().clone();
        let view = match &known {
            Known::Registered(destination) if destination.no_such_port => {
                Err(Error::own(Stage::Lookup, Reason::NotRegistered, destination.why_empty.clone()))
            }
            Known::Registered(destination) => Ok(View::registered(worker, destination, previous.as_deref())),
            // A name is known by its addresses, and nobody dials a name.
            Known::Unregistered | Known::Named(_) => View::passthrough(worker, &self.key, previous.as_deref()),
            Known::Pending => {
                let detail = if *worker.directory.connected().borrow() {
                    format!("the control plane has not said yet who {} is", self.key)
                } else {
                    format!("the control plane cannot be reached, and {} was never met before", self.key)
                };
                Err(Error::own(Stage::Lookup, Reason::NotReady, detail))
            }
            Known::Untold => {
                let detail = format!("too many destinations are in use to look up {}", self.key);
                Err(Error::own(Stage::Lookup, Reason::Overloaded, detail))
            }
        };
        // A destination that is gone takes its endpoints with it.
        let view = view.inspect_err(|_| *self.view.borrow_mut() = None)?;
        let view = Rc::new(view);
        *self.view.borrow_mut() = Some(view.clone());
        Ok(view)
    }

    /// The addresses that nobody registered, as one. One that somebody did register says who is meant: it is never dialled
    /// in plaintext, and so neither are the others in its place.
    async fn view_of_name(&self, worker: &Worker) -> Result<Rc<View>, Error> {
        let asked = futures_util::future::join_all(self.addresses.iter().map(|address| address.view(worker))).await;
        let (mut views, mut refused) = (Vec::new(), None);
        for view in asked {
            match view {
                Ok(view) if view.service.is_some() => return Ok(view),
                Ok(view) => views.push(view),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        if let (true, Some(error)) = (views.is_empty(), refused) {
            return Err(error);
        }
        let view = Rc::new(View::one_host(worker, &views));
        *self.view.borrow_mut() = Some(view.clone());
        Ok(view)
    }

    async fn first_answer(&self, worker: &Worker) -> Result<Known, Error> {
        if *self.known.borrow().borrow() == Known::Untold {
            let again = worker.directory.destination(&self.key);
            *self.known.borrow_mut() = again;
        }
        let mut known = self.known.borrow().clone();
        let budget = worker.limits.first_answer;
        // An elapsed wait leaves `Pending`, which the caller turns into an answer.
        let _ = tokio::time::timeout(budget, known.wait_for(|known| !matches!(known, Known::Pending))).await;
        Ok(self.known.borrow_mut().borrow_and_update().clone())
    }

    /// The version that was used last.
    pub fn last_view(&self) -> Option<Rc<View>> {
        self.view.borrow().clone()
    }

    /// As exact as the watchdog's tick.
    pub fn last_used(&self) -> Instant {
        if self.touched.get() { Instant::now() } else { self.used.get() }
    }

    /// Nothing is pooled.
    pub fn is_idle(&self) -> bool {
        let view = self.view.borrow();
        view.as_ref().is_none_or(|view| view.slots.iter().all(|slot| slot.http1.is_idle() && slot.http2.is_idle()))
    }

    /// The watchdog's tick. True when nothing is pooled.
    pub fn sweep(&self, now: Instant) -> bool {
        if self.touched.take() {
            self.used.set(now);
        }
        let wall = std::time::SystemTime::now();
        let Some(view) = self.view.borrow().clone() else { return true };
        let mut idle = true;
        for slot in &view.slots {
            slot.http1.sweep(now, wall);
            slot.http2.sweep(now, wall);
            idle &= slot.http1.is_idle() && slot.http2.is_idle();
        }
        idle
    }
}

impl View {
    fn registered(worker: &Worker, destination: &Destination, previous: Option<&View>) -> View {
        let service = ServicePort { service: destination.service.clone(), port: destination.port };
        View::new(worker, Some(service), destination, previous)
    }

    /// A destination that nobody registered: its own address, plaintext, if the mesh allows that.
    fn passthrough(worker: &Worker, key: &Key, previous: Option<&View>) -> Result<View, Error> {
        let address = match key {
            // Nobody is there, and what somebody remembers of it must not go astray.
            Key::Address(address) if is_virtual(address.ip()) => {
                let detail = format!(
                    "{key} is a virtual address whose service is gone, or never had it: resolve the service's name again"
                );
                return Err(Error::own(Stage::Lookup, Reason::NotRegistered, detail));
            }
            Key::Address(address) if !worker.registry_only() => *address,
            Key::Address(_) => {
                let detail = format!("{key} is not registered and outbound.mode is RegistryOnly");
                return Err(Error::own(Stage::Lookup, Reason::NotRegistered, detail));
            }
            Key::Service(_) | Key::Name(_) | Key::Own => {
                let detail = format!("no Service {key} exists; apply one, or check its name, namespace and port");
                return Err(Error::own(Stage::Lookup, Reason::NotRegistered, detail));
            }
        };
        Ok(View::new(worker, None, &unregistered(vec![unregistered_endpoint(address)]), previous))
    }

    /// The addresses of one name, each a view of its own.
    fn one_host(worker: &Worker, addresses: &[Rc<View>]) -> View {
        let slots: Vec<Rc<Slot>> = addresses.iter().flat_map(|view| view.slots.iter().cloned()).collect();
        let destination = unregistered(slots.iter().map(|slot| slot.endpoint.clone()).collect());
        let endpoints = Arc::new(Endpoints::new(&destination, None, &worker.loads));
        View { slots, endpoints, one_host: true, ..View::new(worker, None, &unregistered(Vec::new()), None) }
    }

    fn new(worker: &Worker, service: Option<ServicePort>, destination: &Destination, previous: Option<&View>) -> View {
        let set = Endpoints::new(destination, previous.map(|view| &*view.endpoints), &worker.loads);
        let slots = destination
            .endpoints
            .iter()
            .map(|endpoint| {
                let kept = previous.and_then(|view| view.slots.iter().find(|slot| slot.endpoint == *endpoint));
                kept.cloned().unwrap_or_else(|| Rc::new(Slot::new(worker, service.as_ref(), endpoint)))
            })
            .collect();
        View {
            service,
            protocol: destination.protocol,
            why_empty: destination.why_empty.clone(),
            endpoints: Arc::new(set),
            routes: destination.routes.clone(),
            slots,
            balancer: RefCell::default(),
            one_host: false,
            unpicked: Edges::default(),
        }
    }

    /// What is declared about the port; of an address that nobody registered only the mesh's settings say anything.
    pub fn declared(&self, worker: &Worker) -> Option<Protocol> {
        match (&self.service, self.slots.first()) {
            (None, Some(slot)) => worker.own_workload()?.mesh.protocol(slot.endpoint.address.port()),
            // What a TLSRoute binds is TLS, and its name is needed before anybody is dialled.
            (Some(_), _) if self.routes.as_ref().is_some_and(|routes| routes.kind == route::Kind::Tls) => {
                self.protocol.or(Some(Protocol::Tls))
            }
            (Some(_) | None, _) => self.protocol,
        }
    }

    /// The endpoint to use, none of those in `tried`.
    pub fn pick(&self, worker: &Worker, kind: Kind, now: Nanos, tried: &[usize]) -> Option<(usize, Rc<Slot>)> {
        let mut balancer = self.balancer.borrow_mut();
        let index = if self.one_host {
            balancer.first(&self.endpoints, now, tried)
        } else {
            balancer.pick(&self.endpoints, kind, now, &mut worker.rng.borrow_mut(), tried)
        }?;
        Some((index, self.slots.get(index)?.clone()))
    }

    /// The endpoint at which a login of this downstream connection has begun: it knows nobody elsewhere.
    pub fn bound(&self, bound: &Bound, tried: &[usize]) -> Option<(usize, Rc<Slot>)> {
        if bound.is_empty() {
            return None;
        }
        let begun = |(index, slot): &(usize, &Rc<Slot>)| !tried.contains(index) && bound.has(&slot.target);
        self.slots.iter().enumerate().find(begun).map(|(index, slot)| (index, slot.clone()))
    }

    /// Of the addresses of one host the first with a connection on which a request need not wait.
    pub fn waiting(
        &self,
        framing: Framing,
        body: &RequestBody,
        tried: &[usize],
        cx: &mut Context<'_>,
    ) -> Option<(usize, Rc<Slot>)> {
        if !self.one_host {
            return None;
        }
        let mut slots = self.slots.iter().enumerate();
        let waiting = slots.find(|(index, slot)| !tried.contains(index) && slot.lane(framing).is_warm(body, cx));
        waiting.map(|(index, slot)| (index, slot.clone()))
    }

    /// How long one of its endpoints is dialled alone.
    pub fn dialled_beside(&self, worker: &Worker) -> Duration {
        if self.one_host { worker.limits.name_beside } else { worker.limits.connect_beside }
    }

    /// How many of its endpoints one request or connection may try.
    pub fn tries(&self, worker: &Worker) -> usize {
        if self.one_host { worker.limits.name_addresses } else { worker.limits.connect_tries as usize }
    }

    /// The edge of what ends before an endpoint is picked.
    pub fn unpicked_edge(&self, worker: &Worker, protocol: WireProtocol) -> Arc<Edge> {
        edge(&self.unpicked, worker, protocol, || outbound_labels(worker, self.service.as_ref(), None, protocol))
    }

    pub fn edge(&self, worker: &Worker, slot: &Slot, protocol: WireProtocol) -> Arc<Edge> {
        edge(&slot.edges, worker, protocol, || EdgeLabels {
            mtls: slot.target.tls.is_some(),
            ..outbound_labels(worker, self.service.as_ref(), Some(&slot.endpoint), protocol)
        })
    }

    /// What stands in for a missing Host or :authority.
    pub fn authority(&self) -> String {
        match (&self.service, self.slots.first()) {
            (Some(service), _) => service.to_string(),
            (None, Some(slot)) => slot.endpoint.address.to_string(),
            (None, None) => "localhost".to_owned(),
        }
    }
}

impl Slot {
    fn new(worker: &Worker, service: Option<&ServicePort>, endpoint: &Endpoint) -> Slot {
        let tls = match &endpoint.tls {
            EndpointTls::Mutual(expected) => {
                // The name is a hint only; an address does as well.
                let address = || ServerName::from(endpoint.address.ip());
                let sni = service.map_or_else(address, crate::tls::sni);
                Some(MutualTls { expected: expected.clone(), sni })
            }
            EndpointTls::Plaintext => None,
        };
        let own = worker.own_application(endpoint);
        let idle = match (&tls, own) {
            (Some(_), _) | (None, Some(_)) => worker.limits.mesh_pool_idle,
            (None, None) => worker.limits.application_pool_idle,
        };
        // No TLS through itself: who the workload is needs no proof in its own process.
        let target = Target {
            address: endpoint.address,
            tls: tls.filter(|_| own.is_none()),
            own,
            application: false,
            source: None,
        };
        let lane = |framing| Lane::new(target.clone(), framing, worker.dialer.clone(), worker.limits.clone(), idle);
        Slot {
            endpoint: endpoint.clone(),
            http1: lane(Framing::Http1),
            http2: lane(Framing::Http2),
            target,
            edges: Edges::default(),
        }
    }

    pub fn lane(&self, framing: Framing) -> &Rc<Lane> {
        match framing {
            Framing::Http1 => &self.http1,
            Framing::Http2 => &self.http2,
        }
    }
}

/// The edge of what ends before anything is known of its destination.
pub fn lost_edge(worker: &Worker, protocol: WireProtocol) -> Arc<Edge> {
    let mut labels = outbound_labels(worker, None, None, protocol);
    labels.destination_workload = UNKNOWN.to_owned();
    worker.telemetry.edge(&labels)
}

fn unregistered(endpoints: Vec<Endpoint>) -> Destination {
    Destination {
        service: ServiceName { name: "".into(), namespace: "".into() },
        port: endpoints.first().map_or(0, |endpoint| endpoint.address.port()),
        protocol: None,
        load_balancer: LoadBalancer::LeastRequest,
        endpoints,
        stale: false,
        why_empty: String::new(),
        no_such_port: false,
        routes: None,
    }
}

fn unregistered_endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address,
        tls: EndpointTls::Plaintext,
        workload: UNKNOWN.to_owned(),
        namespace: UNKNOWN.to_owned(),
        instance: String::new(),
        weight: 1,
        application_port: address.port(),
    }
}

fn edge(edges: &Edges, worker: &Worker, protocol: WireProtocol, labels: impl FnOnce() -> EdgeLabels) -> Arc<Edge> {
    let mut edges = edges.borrow_mut();
    let place = &mut edges[protocol as usize];
    place.get_or_insert_with(|| worker.telemetry.edge(&labels())).clone()
}

fn outbound_labels(
    worker: &Worker,
    service: Option<&ServicePort>,
    endpoint: Option<&Endpoint>,
    protocol: WireProtocol,
) -> EdgeLabels {
    let identity = endpoint.and_then(|endpoint| match &endpoint.tls {
        EndpointTls::Mutual(identity) => Some(identity.to_string()),
        EndpointTls::Plaintext => None,
    });
    EdgeLabels {
        direction: Direction::Outbound,
        source_workload: worker.own.workload.clone(),
        source_namespace: worker.own.namespace.clone(),
        source_principal: worker.own.principal.to_string(),
        destination_service: service.map(|port| port.service.to_string()).unwrap_or_default(),
        destination_workload: endpoint.map(|endpoint| endpoint.workload.clone()).unwrap_or_default(),
        destination_namespace: endpoint.map(|endpoint| endpoint.namespace.clone()).unwrap_or_default(),
        protocol,
        mtls: identity.is_some(),
        destination_principal: identity.unwrap_or_default(),
    }
}
