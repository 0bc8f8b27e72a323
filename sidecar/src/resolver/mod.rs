//! The resolver of `--dns-listen`: answers the names of the mesh's services from the directory, and forwards every other
//! question as it came, by UDP or TCP as it came. It has a thread of its own, so that neither a flood of questions nor a
//! silent upstream holds up the data path or the certificate's renewal. A name that the mesh knows is never forwarded.

mod forward;
pub mod message;
mod serve;
mod upstreams;

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use outrigger_api::name::ServiceName;
use outrigger_api::snapshot::Key;
use outrigger_api::virtual_address::is_virtual;

use crate::config::Limits;
use crate::discovery::{Directory, Known};
use crate::telemetry::{Resolved, Telemetry};
use forward::{Failure, Forwarder};
use message::{Code, Entry, Extended, Query, Transport};
pub use serve::{Listener, run};
pub use upstreams::RESOLV_CONF;

/// Seconds for which virtual addresses may be remembered: they are kept, and not given to another service for a day.
const VIRTUAL_TTL: u32 = 30;
/// Seconds for all other answers: endpoints of a headless service come and go.
const TTL: u32 = 5;
/// Seconds for which it may be remembered that a service has no record of some kind.
const DENIAL_TTL: u32 = 5;

/// What the resolver has to know besides what its sidecar knows.
#[derive(Clone, Debug)]
pub struct Settings {
    /// That of short names.
    pub namespace: String,
    /// `--dns-upstream`; with none those of [`RESOLV_CONF`].
    pub upstreams: Vec<SocketAddr>,
    /// SO_MARK of the sockets towards them.
    pub mark: Option<u32>,
    /// Where the resolver itself listens: never an upstream.
    pub own: Vec<SocketAddr>,
}

/// All that an answer takes. Lives on the resolver's thread, as long as that.
struct Resolver {
    namespace: String,
    directory: Directory,
    telemetry: Arc<Telemetry>,
    limits: Limits,
    forwarder: Forwarder,
    in_flight: Cell<usize>,
    /// The control plane was waited for in vain and has not come back since: nobody waits for it again.
    given_up: Cell<bool>,
}

/// What becomes of a message.
enum Step {
    /// Nothing is said.
    Nothing,
    Say(Vec<u8>),
    /// It takes a while: to be finished with [`Resolver::resolve`].
    Wait(Place),
}

/// One of the questions in flight.
struct Place(Rc<Resolver>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

impl Resolver {
    fn new(settings: Settings, directory: Directory, telemetry: Arc<Telemetry>, limits: Limits) -> Resolver {
        let forwarder = Forwarder::new(settings.upstreams, settings.own, settings.mark, &limits);
        Resolver {
            namespace: settings.namespace,
            directory,
            telemetry,
            limits,
            forwarder,
            in_flight: Cell::new(0),
            given_up: Cell::new(false),
        }
    }

    /// Answers at once what can be. Names that are known never wait for those that are not, and what finds no place is not
    /// asked of the control plane either.
    fn admit(self: &Rc<Self>, bytes: &[u8], client: SocketAddr, transport: Transport) -> Step {
        if self.forwarder.is_own(client.port(), message::id(bytes)) {
            self.forwarder.complain_of_loop();
            self.telemetry.resolved(Resolved::Refused);
            return Step::Nothing;
        }
        let query = match message::read(bytes) {
            Entry::Question(query) => query,
            Entry::Refusal(refusal) => {
                self.telemetry.resolved(Resolved::Refused);
                return Step::Say(refusal);
            }
            Entry::Noise => {
                self.telemetry.resolved(Resolved::Refused);
                return Step::Nothing;
            }
        };
        if let Some(name) = self.service(&query)
            && let Some(Known::Named(ips)) = self.directory.remembered(&Key::Name(name))
        {
            return Step::Say(self.answer(&query, &ips, transport));
        }
        if self.in_flight.get() >= self.limits.dns_in_flight {
            self.telemetry.resolved(Resolved::Refused);
            return Step::Say(query.failure(Code::ServFail, None));
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Step::Wait(Place(self.clone()))
    }

    /// Finishes what [`Resolver::admit`] let wait; `bytes` are the same.
    async fn resolve(&self, bytes: &[u8], transport: Transport) -> Vec<u8> {
        let Entry::Question(query) = message::read(bytes) else { return Vec::new() };
        if let Some(name) = self.service(&query)
            && let Some(ips) = self.first_answer(Key::Name(name)).await
        {
            return self.answer(&query, &ips, transport);
        }
        match self.forwarder.ask(&query, transport).await {
            Ok(answer) => {
                self.telemetry.resolved(Resolved::Forwarded);
                answer
            }
            Err(failure) => {
                self.telemetry.resolved(Resolved::Failed);
                let why = match failure {
                    Failure::NoUpstream | Failure::Silence => Extended::NoReachableAuthority,
                    Failure::Network => Extended::NetworkError,
                };
                query.failure(Code::ServFail, Some(why))
            }
        }
    }

    /// The service that a question may mean. Whether there is one, the directory knows.
    fn service(&self, query: &Query<'_>) -> Option<ServiceName> {
        ServiceName::parse(&query.name()?, &self.namespace).ok()
    }

    /// None when the mesh knows no such name, or cannot be asked in time.
    async fn first_answer(&self, key: Key) -> Option<Arc<[IpAddr]>> {
        let mut known = self.directory.destination(&key);
        let connected = *self.directory.connected().borrow();
        if connected {
            self.given_up.set(false);
        }
        if matches!(*known.borrow(), Known::Pending) && !self.given_up.get() {
            let told = known.wait_for(|known| !matches!(known, Known::Pending));
            let waited = tokio::time::timeout(self.limits.dns_first_answer, told).await;
            if waited.is_err() {
                // Before it has ever told anything it is on its way.
                let was_there = self.directory.snapshot_age().is_some();
                self.given_up.set(was_there && !*self.directory.connected().borrow());
            }
        }
        match &*known.borrow() {
            Known::Named(ips) => Some(ips.clone()),
            Known::Pending | Known::Unregistered | Known::Untold | Known::Registered(_) => None,
        }
    }

    /// In a new order each time: clients take the first.
    fn answer(&self, query: &Query<'_>, ips: &[IpAddr], transport: Transport) -> Vec<u8> {
        self.telemetry.resolved(Resolved::Mesh);
        let mut ips = ips.to_vec();
        fastrand::shuffle(&mut ips);
        let ttl = if ips.iter().all(|ip| is_virtual(*ip)) { VIRTUAL_TTL } else { TTL };
        query.answer(&ips, ttl, DENIAL_TTL, transport)
    }
}

#[cfg(test)]
mod tests;
