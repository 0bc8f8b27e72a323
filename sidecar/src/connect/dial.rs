//! Opens one connection to one endpoint: TCP, then mutual TLS where the endpoint was registered with an identity.
//! There is no way from here to plaintext when TLS fails.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use outrigger_api::identity::SpiffeId;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::http2::Ledger;
use super::own_dials::OwnDials;
use crate::config::limits::Limits;
use crate::connection::Proof;
use crate::net::{self, Cut, SocketOptions, Stream};
use crate::outcome::{Error, Reason, Retry, Stage};
use crate::tls::{MeshAlpn, Peer, Purpose, Tls, TlsError};

/// Where and how to connect.
#[derive(Clone, Debug)]
pub struct Target {
    pub address: SocketAddr,
    pub tls: Option<MutualTls>,
    /// The workload's own endpoint: the application behind it, which is reached through the inbound walk of this very
    /// process, without a socket and without TLS through itself.
    pub own: Option<SocketAddr>,
    /// The workload's own application, which may take longer: nobody else can serve its requests.
    pub application: bool,
    /// The client in whose name it is opened: its address is where the connection comes from (`--keep-source-address`).
    pub source: Option<IpAddr>,
}

impl Target {
    /// The workload's own application, for a client whose address it is to see, or none.
    pub fn application(address: SocketAddr, source: Option<IpAddr>) -> Target {
        Target { address, tls: None, own: None, application: true, source }
    }

    /// Whether a sidecar is at the other end, this one itself perhaps, and nobody else can be.
    pub fn is_mesh(&self) -> bool {
        self.tls.is_some() || self.own.is_some()
    }

    /// Whether a connection to either leads to the same application, by the same proof.
    pub fn is_same(&self, other: &Target) -> bool {
        let (one, two) = (self.tls.as_ref().map(|tls| &tls.expected), other.tls.as_ref().map(|tls| &tls.expected));
        self.address == other.address && self.own == other.own && self.source == other.source && one == two
    }
}

/// Takes a connection of the workload to itself into the inbound walk: the application, the framing, the stream.
pub type Door = Box<dyn Fn(SocketAddr, MeshAlpn, Stream) -> Result<(), Error>>;

/// What the peer must prove, and the hint that it is given.
#[derive(Clone, Debug)]
pub struct MutualTls {
    pub expected: SpiffeId,
    pub sni: ServerName<'static>,
}

/// A fresh connection and, on mutual TLS, who is at the other end.
#[derive(Debug)]
pub struct Dialled {
    pub stream: Stream,
    /// Boxed: a connection's task holds this in several of its phases.
    pub peer: Option<Box<Peer>>,
    /// When the certificate that we showed ends.
    own_not_after: Option<SystemTime>,
}

/// One worker's way out. Bounds the handshakes that run at once.
pub struct Dialer {
    tls: Tls,
    socket: SocketOptions,
    probe_timeout: Duration,
    connect_budget: Duration,
    application_budget: Duration,
    handshake_timeout: Duration,
    handshakes: Semaphore,
    own_listeners: OwnListeners,
    own_dials: OwnDials,
    way_back: WayBack,
    /// What the HTTP/2 connections hold.
    ledger: Rc<Ledger>,
    door: OnceCell<Door>,
    /// Every connection to another sidecar, pooled ones and those in use, with what its peer proved.
    proved: RefCell<Vec<(Cut, Proof)>>,
    /// Ended ones are looked for when there are so many.
    clean_at: Cell<usize>,
}

/// Whether what the application answers to a client's address comes back to this sidecar. None: it is not asked to, since
/// connections to the application are made from this machine's own address.
pub type WayBack = Option<Arc<AtomicBool>>;

/// The addresses on which this sidecar itself listens; known once all are open.
#[derive(Clone, Debug, Default)]
pub struct OwnListeners(std::sync::Arc<std::sync::RwLock<Vec<SocketAddr>>>);

impl OwnListeners {
    pub fn add(&self, address: SocketAddr) {
        self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner).push(address);
    }

    fn has_port(&self, port: u16) -> bool {
        let listeners = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        listeners.iter().any(|own| own.port() == port)
    }

    /// True when a connection to `target` would end at this sidecar: a loop, or a way to its admin port.
    fn contain(&self, target: SocketAddr) -> bool {
        let listeners = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        // An IPv4 address in IPv6 clothes leads to the same socket.
        let ip = target.ip().to_canonical();
        listeners.iter().any(|own| {
            own.port() == target.port()
                && (own.ip().to_canonical() == ip
                    || ip.is_unspecified()
                    || (own.ip().is_unspecified() && net::is_local(ip)))
        })
    }
}

impl Dialer {
    pub fn new(
        tls: Tls,
        socket: SocketOptions,
        limits: &Limits,
        own_listeners: OwnListeners,
        own_dials: OwnDials,
        way_back: WayBack,
        ledger: Rc<Ledger>,
    ) -> Rc<Dialer> {
        Rc::new(Dialer {
            tls,
            socket,
            probe_timeout: limits.connect_beside,
            connect_budget: limits.connect_budget,
            application_budget: limits.application_connect,
            handshake_timeout: limits.handshake_timeout.min(limits.connect_budget),
            handshakes: Semaphore::new(limits.handshakes_in_flight),
            own_listeners,
            own_dials,
            way_back,
            ledger,
            door: OnceCell::new(),
            proved: RefCell::default(),
            clean_at: Cell::new(64),
        })
    }

    /// What this worker's HTTP/2 connections hold.
    pub fn ledger(&self) -> &Rc<Ledger> {
        &self.ledger
    }

    /// Says where connections of the workload to itself go. The first one counts.
    pub fn set_door(&self, door: Door) {
        let _ = self.door.set(door);
    }

    fn enter(&self, application: SocketAddr, alpn: MeshAlpn) -> Result<Dialled, Error> {
        let door =
            self.door.get().ok_or_else(|| Error::own(Stage::Connect, Reason::NotReady, "no inbound side yet"))?;
        let (stream, inner) = Stream::pipe();
        door(application, alpn, inner)?;
        Ok(Dialled { stream, peer: None, own_not_after: None })
    }

    /// Whether this sidecar listens on a port of that number, at whatever address.
    pub fn is_own_port(&self, port: u16) -> bool {
        self.own_listeners.has_port(port)
    }

    /// Whether a redirected connection is one that this sidecar opened: the rules do not exempt it.
    pub fn has_opened(&self, client: SocketAddr, original: SocketAddr) -> bool {
        self.own_dials.contain(client, original)
    }

    /// Whether the rules bring this sidecar's own connections back to it, found out at an address where nobody listens.
    pub async fn comes_back(&self, exempt_target: SocketAddr) -> bool {
        let connecting = tokio::time::timeout(self.probe_timeout, net::connect(exempt_target, &self.socket));
        matches!(connecting.await, Ok(Ok(_)))
    }

    /// The number of the certificate and trust bundle in force; pooled connections that were made with earlier ones carry
    /// nothing new.
    pub fn material(&self) -> u64 {
        self.tls.current().map_or(0, |material| material.number())
    }

    fn keep_proof(&self, stream: &mut Stream, peer: &Peer) {
        let Some(cut) = stream.cut() else { return };
        let mut proved = self.proved.borrow_mut();
        if proved.len() >= self.clean_at.get() {
            proved.retain(|(cut, _)| cut.is_open());
            self.clean_at.set((2 * proved.len()).max(64));
        }
        proved.push((cut, peer.proof.clone()));
    }

    /// Cuts the connections whose peers' chains the roots in force do not verify any more; says how many. `bundles` is
    /// [`Tls::bundles`], read before.
    pub fn judge(&self, bundles: u64) -> usize {
        let mut cut = 0;
        self.proved.borrow_mut().retain_mut(|(stream, proof)| {
            if stream.is_open() && proof.bundle != bundles && !self.tls.believes(proof, Purpose::Server) {
                stream.now();
                cut += 1;
                return false;
            }
            proof.bundle = bundles;
            stream.is_open()
        });
        cut
    }

    /// Whether an application sees its clients' addresses.
    pub fn keeps_source(&self) -> bool {
        self.way_back.is_some()
    }

    async fn connect(&self, target: &Target) -> std::io::Result<TcpStream> {
        match target.source {
            Some(source) => net::connect_from(source, target.address, &self.socket).await,
            None => net::connect(target.address, &self.socket).await,
        }
    }

    /// Every failure is safe to retry: no byte of a request has been sent.
    pub async fn dial(&self, target: &Target, alpn: MeshAlpn) -> Result<Dialled, Error> {
        let address = target.address;
        if let Some(application) = target.own {
            return self.enter(application, alpn);
        }
        if target.tls.is_none() && self.own_listeners.contain(address) {
            return Err(Error::own(Stage::Connect, Reason::OwnPort, format!("{address} is this sidecar's own")));
        }
        if target.source.is_some() && !self.way_back.as_ref().is_some_and(|holds| holds.load(Ordering::Relaxed)) {
            // From its own address instead, the application would take the client for this machine.
            let detail = "--keep-source-address: what the application answers would not come back; run `redirect apply \
                          --keep-source-address` here, and `redirect check`";
            return Err(Error::own(Stage::Connect, Reason::NotReady, detail));
        }
        // A lost first packet is sent again after 1 s and 3 s.
        let patience = if target.application { self.application_budget } else { self.connect_budget };
        let connecting = tokio::time::timeout(patience, self.connect(target));
        let tcp = match connecting.await {
            Ok(Ok(tcp)) => {
                self.own_dials.opened(&tcp, address);
                tcp
            }
            Ok(Err(error)) => return Err(refused(address, &error)),
            Err(_) => {
                let from = target.source.map(|source| format!(" a connection from {source}")).unwrap_or_default();
                let detail = format!("{address} did not answer{from} within {patience:?}");
                return Err(failure(Reason::ConnectTimeout, detail));
            }
        };
        let Some(mutual) = &target.tls else {
            return Ok(Dialled { stream: tcp.into(), peer: None, own_not_after: None });
        };
        let material = self.tls.current().ok_or_else(|| Error {
            by: None,
            retry: Retry::Never,
            ..Error::own(Stage::Connect, Reason::NotReady, "no certificate yet")
        })?;
        // Waiting for a place counts: endpoints that never finish a handshake must not hold up the others for ever.
        let handshake = async {
            // The semaphore is never closed; a closed one would only mean no bound.
            let _place = self.handshakes.acquire().await.ok();
            crate::tls::connect(
                &material,
                Stream::from(tcp).below_tls(),
                alpn,
                mutual.sni.clone(),
                &mutual.expected,
                address,
            )
            .await
        };
        match tokio::time::timeout(self.handshake_timeout, handshake).await {
            Ok(Ok((stream, peer))) => {
                let own_not_after = Some(material.credential().not_after());
                let mut stream = Stream::from(stream);
                self.keep_proof(&mut stream, &peer);
                Ok(Dialled { stream, peer: Some(Box::new(peer)), own_not_after })
            }
            Ok(Err(error)) => {
                // An endpoint that proves nothing is not the one that was meant: no fault of the caller's.
                let reason = match error.reason() {
                    Reason::PeerCertificate => Reason::IdentityMismatch,
                    Reason::MtlsRequired => Reason::TlsHandshake,
                    reason => reason,
                };
                let detail = if matches!(error, TlsError::Plaintext) {
                    format!(
                        "{address} answered in plaintext: is its sidecar's redirect in place? run `redirect check` there"
                    )
                } else {
                    format!("{address}: {error}")
                };
                Err(failure(reason, detail))
            }
            Err(_) => {
                let detail = format!("{address}: the TLS handshake took longer than {:?}", self.handshake_timeout);
                Err(failure(Reason::ConnectTimeout, detail))
            }
        }
    }
}

impl Dialled {
    /// Compared with [`Dialer::material`]; 0 without TLS.
    pub fn material(&self) -> u64 {
        self.peer.as_ref().map_or(0, |peer| peer.material)
    }

    /// When a pooled connection must no longer be used: the end of the peer's certificate or of our own, with which
    /// the peer knows us, whichever is first.
    pub fn retire_at(&self) -> Option<SystemTime> {
        self.peer.as_ref().map(|peer| self.own_not_after.map_or(peer.not_after, |own| own.min(peer.not_after)))
    }
}

fn failure(reason: Reason, detail: String) -> Error {
    Error::upstream(Stage::Connect, reason, Retry::Safe, detail)
}

fn refused(address: SocketAddr, error: &std::io::Error) -> Error {
    use std::io::ErrorKind;
    // What this machine has run out of, descriptors or memory, says nothing about the endpoint.
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) {
        return Error::own(Stage::Connect, Reason::Overloaded, format!("{address}: {error}"));
    }
    let reason = match error.kind() {
        ErrorKind::ConnectionRefused => Reason::ConnectionRefused,
        ErrorKind::TimedOut => Reason::ConnectTimeout,
        _ => Reason::ConnectFailed,
    };
    failure(reason, format!("{address}: {error}"))
}
