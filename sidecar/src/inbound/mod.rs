//! The inbound walk: what others send to the application. The mTLS accept, detect, policy, connect, forward. The
//! upstream is always the application's own address, never loopback in its place. What is over when bytes flow is
//! boxed: a connection's task is as large as its largest part for as long as it lives.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use outrigger_api::identity::SpiffeId;
use outrigger_api::name::Protocol;
use outrigger_api::snapshot::{MtlsMode, Workload};
use rustls::server::Accepted;
use tokio::io::AsyncWriteExt;

use crate::connect::worker::Worker;
use crate::connection::{Arrival, Command, Facts, Proof, Registered, State};
use crate::net::Stream;
use crate::outcome::{Error, Reason, Stage};
use crate::policy::{self, Permit};
use crate::protocol::detect::Detected;
use crate::protocol::http::serve;
use crate::protocol::peek::{self, Peeked};
use crate::protocol::silence::{self, First};
use crate::telemetry::{self, Unproved, WireProtocol};
use crate::tls::{self, MeshAlpn};

mod caller;
mod door;
mod opaque;
mod redirected;
mod requests;
mod undeclared;

pub use redirected::serve_redirected;

use caller::{Caller, Proved};
use door::Arrived;

/// Serves one connection of a peer to the application at `application`.
pub async fn serve(worker: Rc<Worker>, application: SocketAddr, stream: Stream, registered: Rc<Registered>) {
    registered.describe(|about| about.destination = application.to_string());
    let Some(own) = worker.own_workload() else {
        // Nobody has said yet who may come in: nobody may.
        return stream.reset_on_close();
    };
    let mut walk = Walk::new(&worker, &own, application, &registered);
    let served = Watched { arriving: walk.arrive(stream), registered: &registered }.await;
    if let Err(refused) = served {
        let (error, stream) = *refused;
        walk.refuse(stream, &error).await;
    }
}

pin_project_lite::pin_project! {
    /// Obeys the watchdog for as long as nothing else of the connection does: until it is known what is served on it.
    struct Watched<'a, F> {
        #[pin]
        arriving: F,
        registered: &'a Registered,
    }
}

impl<F: Future<Output = Result<(), Refused>>> Future for Watched<'_, F> {
    type Output = Result<(), Refused>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        let this = self.project();
        let arriving = this.arriving.poll(cx);
        if arriving.is_pending() && this.registered.state() == State::Opening {
            this.registered.listen(cx.waker());
            if this.registered.command() == Command::Close {
                let reason = this.registered.closed_for().unwrap_or(Reason::Draining);
                let detail = "closed before it was known what it carries";
                return Poll::Ready(Err(Box::new((Error::downstream(Stage::Accept, reason, detail), None))));
            }
        }
        arriving
    }
}

/// Serves one connection of the workload to itself, which its own outbound side made within this process.
pub async fn serve_own(
    worker: Rc<Worker>,
    application: SocketAddr,
    alpn: MeshAlpn,
    stream: Stream,
    registered: Rc<Registered>,
) {
    registered.describe(|about| {
        about.destination = application.to_string();
        about.principal = Some(worker.own.principal.to_string());
    });
    let Some(own) = worker.own_workload() else { return stream.reset_on_close() };
    let mut walk = Walk::new(&worker, &own, application, &registered);
    walk.let_in(Arrival::Own, None, Some(worker.own.principal.clone()));
    let (identity, workload) = (worker.own.principal.clone(), worker.own.workload.as_str().into());
    walk.caller.peer = Some(Box::new(Proved { identity, workload, mtls: false }));
    let served = match policy::admit(walk.mode, Arrival::Own) {
        Ok(permit) => walk.framed(stream, alpn, permit).await,
        Err(error) => Err(Box::new((error, Some(stream)))),
    };
    if let Err(refused) = served {
        let (error, stream) = *refused;
        walk.refuse(stream, &error).await;
    }
}

/// What is known of one inbound connection on its way.
struct Walk {
    worker: Rc<Worker>,
    registered: Rc<Registered>,
    application: SocketAddr,
    mode: MtlsMode,
    declared: Option<Protocol>,
    caller: Caller,
}

/// Boxed, because every level of the walk has room for it for as long as its connection lives.
type Refused = Box<(Error, Option<Stream>)>;

impl Walk {
    fn new(worker: &Rc<Worker>, own: &Workload, application: SocketAddr, registered: &Rc<Registered>) -> Walk {
        let port = own.ports.get(&application.port());
        let service = port.and_then(|port| port.service.as_ref()).map(ToString::to_string).unwrap_or_default();
        Walk {
            worker: worker.clone(),
            registered: registered.clone(),
            application,
            mode: own.mtls_mode(application.port()),
            declared: own.protocol(application.port()),
            caller: Caller { peer: None, destination_service: service },
        }
    }

    /// From where the application is to see connections of this client; none: from this machine.
    fn source(&self) -> Option<IpAddr> {
        let is_own = self.caller.peer.as_ref().is_some_and(|peer| !peer.mtls);
        if is_own { None } else { self.worker.source(self.registered.client.ip(), self.application) }
    }

    /// Who is there, and how do they come?
    async fn arrive(&mut self, mut stream: Stream) -> Result<(), Refused> {
        let opened = match self.mode {
            MtlsMode::Disable => return self.plaintext(stream, None).await,
            MtlsMode::Strict => None,
            MtlsMode::Permissive => {
                self.let_in(Arrival::Undecided, None, None);
                let first = Box::pin(self.knock(&mut stream)).await;
                // That may have taken long.
                if let Some(own) = self.worker.own_workload() {
                    self.mode = own.mtls_mode(self.application.port());
                }
                match first {
                    Ok(First::Client(opened)) => opened,
                    Ok(First::Server(opened)) => {
                        return match self.admit(Arrival::Plaintext, Unproved::Plaintext) {
                            Ok(_) => self.server_first(stream, opened).await,
                            Err(error) => Err(Box::new((error, Some(stream)))),
                        };
                    }
                    Ok(First::Nobody) => return Ok(()),
                    Err(error) => return Err(Box::new((error, Some(stream)))),
                }
            }
        };
        let arrived =
            match Box::pin(silence::undecided(&self.worker, self.registered.id, self.hello(&mut stream))).await {
                Ok(arrived) => arrived,
                Err(error) => return Err(Box::new((error, Some(stream)))),
            };
        match arrived {
            Arrived::Mesh(hello) => {
                opened.into_iter().for_each(silence::leave);
                self.mutual(stream, hello).await
            }
            Arrived::ForeignTls => {
                let permit = match self.admit(Arrival::ForeignTls, Unproved::ForeignTls) {
                    Ok(permit) => permit,
                    Err(error) => {
                        // The close is what counts; the alert tells a person what was missing.
                        let _ = stream.write_all(tls::no_application_protocol_alert()).await;
                        return Err(Box::new((error, Some(stream))));
                    }
                };
                self.count_detected(telemetry::Detected::Tls);
                self.opaque(stream, opened, WireProtocol::Tls, permit).await
            }
            Arrived::Plaintext => self.plaintext(stream, opened).await,
            Arrived::Left => Ok(()),
        }
    }

    /// Asks policy about a caller that proves nothing, and notes who it is.
    fn admit(&self, arrival: Arrival, how: Unproved) -> Result<Permit, Error> {
        let admitted = policy::admit(self.mode, arrival);
        self.note(if admitted.is_ok() { how } else { Unproved::Refused });
        if admitted.is_ok() {
            self.let_in(arrival, None, None);
        }
        admitted
    }

    /// Records on which facts the connection was let in: they are judged again when policy or the trust bundle moves.
    fn let_in(&self, arrival: Arrival, proof: Option<Proof>, caller: Option<SpiffeId>) {
        let (application, client) = (self.application, self.registered.client.ip());
        self.registered.let_in(Facts {
            application,
            arrival,
            proof,
            caller,
            client,
            opaque: false,
            sni: None,
            head: None,
        });
    }

    fn note(&self, how: Unproved) {
        let callers = self.worker.telemetry.plaintext_callers();
        callers.note(self.registered.client, self.application.port(), how, SystemTime::now());
    }

    /// A sidecar: prove who it is, then serve what its ALPN id says, as far as the port allows.
    async fn mutual(&mut self, stream: Stream, hello: Box<Accepted>) -> Result<(), Refused> {
        let (stream, alpn, permit) = Box::pin(self.prove(stream, hello)).await?;
        self.framed(stream, alpn, permit).await
    }

    /// The handshake, and what is known of the caller by it.
    async fn prove(&mut self, mut stream: Stream, hello: Box<Accepted>) -> Result<(Stream, MeshAlpn, Permit), Refused> {
        let permit = policy::admit(self.mode, Arrival::Mutual).map_err(|error| Box::new((error, None)))?;
        let Some(material) = self.worker.tls.current() else {
            return Err(Box::new((Error::own(Stage::Accept, Reason::NotReady, "no certificate yet"), Some(stream))));
        };
        drop(stream.take_ahead());
        let stream = stream.below_tls();
        let (stream, peer) = tls::accept_hello(&material, *hello, stream)
            .await
            .map_err(|error| Box::new((Error::downstream(Stage::Accept, error.reason(), error.to_string()), None)))?;
        let stream = Stream::from(stream);
        if !self.registered.prove(&peer.identity) {
            let detail = format!("{} has three quarters of this sidecar's inbound connections", peer.identity);
            return Err(Box::new((Error::downstream(Stage::Accept, Reason::Overloaded, detail), Some(stream))));
        }
        self.registered.describe(|about| {
            about.principal = Some(peer.identity.to_string());
            about.mtls = true;
        });
        self.let_in(Arrival::Mutual, Some(peer.proof), Some(peer.identity.clone()));
        // The caller stops using the connection by itself when its certificate ends; this is for one that does not.
        self.registered.retire_at(peer.not_after);
        let alpn = peer.alpn;
        self.caller.peer = Some(Box::new(Proved { identity: peer.identity, workload: peer.workload, mtls: true }));
        Ok((stream, alpn, permit))
    }

    /// Serves what the ALPN id of a caller says, as far as the port allows.
    async fn framed(&self, stream: Stream, alpn: MeshAlpn, permit: Permit) -> Result<(), Refused> {
        match alpn {
            MeshAlpn::H1 => self.count_detected(telemetry::Detected::Http1),
            MeshAlpn::H2 => self.count_detected(telemetry::Detected::Http2),
            MeshAlpn::Tcp => {}
        }
        match (alpn, self.declared) {
            (MeshAlpn::H1, _) => self.http1(stream, permit).await,
            (MeshAlpn::H2, _) => Box::pin(self.http2(stream, permit)).await,
            (MeshAlpn::Tcp, Some(Protocol::Tcp)) => self.opaque(stream, None, WireProtocol::Tcp, permit).await,
            (MeshAlpn::Tcp, Some(Protocol::Tls)) => self.opaque(stream, None, WireProtocol::Tls, permit).await,
            (MeshAlpn::Tcp, Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc)) => {
                Err(Box::new((mismatch("opaque bytes for a port declared as HTTP"), Some(stream))))
            }
            (MeshAlpn::Tcp, None) => self.undeclared(stream, None, permit).await,
        }
    }

    async fn plaintext(&self, mut stream: Stream, opened: Option<Stream>) -> Result<(), Refused> {
        let permit = match self.admit(Arrival::Plaintext, Unproved::Plaintext) {
            Ok(permit) => permit,
            Err(error) => return Err(Box::new((error, Some(stream)))),
        };
        let limits = &self.worker.limits;
        let peeked = match self.declared {
            Some(Protocol::Tcp) => return self.opaque(stream, opened, WireProtocol::Tcp, permit).await,
            Some(Protocol::Tls) => return self.opaque(stream, opened, WireProtocol::Tls, permit).await,
            Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc) => {
                peek::speaks_or_waits(&mut stream, limits.first_byte_timeout, limits.head_timeout).await
            }
            None => return self.undeclared(stream, opened, permit).await,
        };
        match peeked {
            Ok(Peeked::Speaks(Detected::Http2)) => Box::pin(self.http2(stream, permit)).await,
            Ok(Peeked::Speaks(Detected::Tls)) => {
                Err(Box::new((mismatch("TLS on a port declared as HTTP"), Some(stream))))
            }
            // What is not HTTP at all is told by the parser what is wrong with it.
            Ok(Peeked::Speaks(Detected::Http1 | Detected::Opaque)) => self.http1(stream, permit).await,
            Ok(Peeked::Silent | Peeked::Left) => Ok(()),
            Err(error) => Err(Box::new((error, Some(stream)))),
        }
    }
    /// Counts a connection that ends before a byte reached the application, and closes it.
    async fn refuse(&self, stream: Option<Stream>, error: &Error) {
        self.caller.refused(&self.worker, &self.registered, error);
        let Some(mut stream) = stream else { return };
        if error.reason == Reason::RequestHeadTimeout {
            serve::refuse_head(&mut stream, error.reason, &self.worker.own.instance).await;
        } else if error.reason != Reason::MtlsRequired {
            stream.reset_on_close();
        }
    }
}

fn mismatch(detail: &'static str) -> Error {
    Error::downstream(Stage::Detect, Reason::ProtocolMismatch, detail)
}
