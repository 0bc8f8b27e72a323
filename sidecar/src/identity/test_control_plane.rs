//! A control plane for tests: real TLS and real gRPC on loopback, answers by script, and a record of what it was
//! asked. It can be cut off, stopped, and started again on its port.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use outrigger_api::wire::discovery_server::{Discovery, DiscoveryServer};
use outrigger_api::wire::identity_server::{Identity, IdentityServer};
use outrigger_api::wire::registry_server::{Registry, RegistryServer};
use outrigger_api::wire::{
    IssueRequest, IssueResponse, LeaseRequest, LeaseResponse, ResourceKey, TrustBundle, WatchRequest, WatchResponse,
    lease_request, watch_request,
};
use rcgen::{CertificateSigningRequestParams, SanType};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt;

use crate::tls::provider;
use crate::tls::test_authority::{Authority, LeafSpec};

pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    pub(crate) script: Arc<Mutex<Script>>,
    /// Counts what happens, so that a test can wait for it.
    pub(crate) record: Arc<Record>,
    tasks: Arc<Mutex<Vec<AbortHandle>>>,
}

/// What it answers.
pub(crate) struct Script {
    pub(crate) authority: Arc<Authority>,
    pub(crate) generation: u64,
    /// Life of issued leaves, in seconds from now; and how far in the past or future now is for it.
    pub(crate) leaf_life: u64,
    pub(crate) clock_ahead: i64,
    pub(crate) refusal: Option<Status>,
    /// Certificates that have ended renew themselves.
    pub(crate) renews_late: bool,
    pub(crate) account: String,
    pub(crate) resources: HashMap<Vec<u8>, WatchResponse>,
    pub(crate) lease_refusal: String,
}

/// What it was asked.
pub(crate) struct Record {
    pub(crate) changed: watch::Sender<u64>,
    pub(crate) issued: Mutex<Vec<Issued>>,
    pub(crate) watched: Mutex<Vec<watch_request::Kind>>,
    pub(crate) leases: Mutex<Vec<lease_request::Kind>>,
    pub(crate) streams: Mutex<Vec<mpsc::Sender<Result<WatchResponse, Status>>>>,
}

#[derive(Clone)]
pub(crate) struct Issued {
    pub(crate) request: IssueRequest,
    pub(crate) by_certificate: bool,
}

/// Put into each request: whether its connection showed a client certificate.
#[derive(Clone, Copy)]
struct ByCertificate(bool);

impl Record {
    fn note(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Waits until what was recorded is so; the paused clock or a test's own limit ends a wait in vain.
    pub(crate) async fn until(&self, mut so: impl FnMut(&Record) -> bool) {
        let mut changed = self.changed.subscribe();
        let limit = Duration::from_secs(30);
        tokio::time::timeout(limit, async {
            while !so(self) {
                changed.changed().await.unwrap();
            }
        })
        .await
        .expect("what the test waits for did not happen");
    }
}

impl ControlPlane {
    pub(crate) async fn start(authority: Authority) -> ControlPlane {
        let script = Script {
            authority: Arc::new(authority),
            generation: 1,
            leaf_life: 3600,
            clock_ahead: 0,
            refusal: None,
            renews_late: false,
            account: "control-plane".to_owned(),
            resources: HashMap::new(),
            lease_refusal: String::new(),
        };
        let record = Record {
            changed: watch::Sender::new(0),
            issued: Mutex::default(),
            watched: Mutex::default(),
            leases: Mutex::default(),
            streams: Mutex::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let control_plane = ControlPlane {
            address,
            script: Arc::new(Mutex::new(script)),
            record: Arc::new(record),
            tasks: Arc::default(),
        };
        control_plane.serve(listener);
        control_plane
    }

    /// Ends all connections and goes on listening.
    pub(crate) fn cut(&self) {
        let mut tasks = self.tasks.lock().unwrap();
        tasks.drain(1..).for_each(|task| task.abort());
    }

    pub(crate) fn stop(&self) {
        self.tasks.lock().unwrap().drain(..).for_each(|task| task.abort());
    }

    /// Listens again after a stop.
    pub(crate) async fn restart(&self) {
        // The aborted listener is closed when its task is dropped.
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        self.serve(listener);
    }

    /// Sets a resource and pushes it to all open streams.
    pub(crate) fn push(&self, response: WatchResponse) {
        let key = prost::Message::encode_to_vec(response.key.as_ref().unwrap());
        self.script.lock().unwrap().resources.insert(key, response.clone());
        self.record.streams.lock().unwrap().retain(|stream| stream.try_send(Ok(response.clone())).is_ok());
    }

    pub(crate) fn trust_bundle(&self) -> TrustBundle {
        self.script.lock().unwrap().trust_bundle()
    }

    fn serve(&self, listener: TcpListener) {
        let (script, record, tasks) = (Arc::clone(&self.script), Arc::clone(&self.record), Arc::clone(&self.tasks));
        let accepting = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let connection = serve_connection(tcp, Arc::clone(&script), Arc::clone(&record));
                tasks.lock().unwrap().push(tokio::spawn(connection).abort_handle());
            }
        });
        self.tasks.lock().unwrap().insert(0, accepting.abort_handle());
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Script {
    fn trust_bundle(&self) -> TrustBundle {
        TrustBundle {
            trust_domain: self.authority.trust_domain.to_string(),
            root_der: vec![self.authority.root.to_vec()],
            generation: self.generation,
        }
    }

    fn now(&self) -> SystemTime {
        let now = SystemTime::now();
        let ahead = Duration::from_secs(self.clock_ahead.unsigned_abs());
        if self.clock_ahead < 0 { now - ahead } else { now + ahead }
    }

    fn config(&self) -> ServerConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.root.clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider()))
            .allow_unauthenticated()
            .build()
            .unwrap();
        let spec = LeafSpec::valid("outrigger-system", &self.account).times(self.now(), 300, 3600);
        let (chain, key) = self.authority.leaf(&spec);
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

async fn serve_connection(tcp: TcpStream, script: Arc<Mutex<Script>>, record: Arc<Record>) {
    let config = script.lock().unwrap().config();
    let Ok(tls) = TlsAcceptor::from(Arc::new(config)).accept(tcp).await else { return };
    let by_certificate = ByCertificate(tls.get_ref().1.peer_certificates().is_some());
    let services = Services { script, record };
    let routes = tonic::service::Routes::new(IdentityServer::new(services.clone()))
        .add_service(DiscoveryServer::new(services.clone()))
        .add_service(RegistryServer::new(services))
        .prepare();
    let service = routes.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(by_certificate);
        request
    });
    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(tls), TowerToHyperService::new(service))
        .await;
}

#[derive(Clone)]
struct Services {
    script: Arc<Mutex<Script>>,
    record: Arc<Record>,
}

#[tonic::async_trait]
impl Identity for Services {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let by_certificate = request.extensions().get::<ByCertificate>().unwrap().0;
        let request = request.into_inner();
        let script = self.script.lock().unwrap();
        if request.late.is_some() && !script.renews_late {
            return Err(Status::permission_denied("certificate_unknown: it is not on record here"));
        }
        let issued = Issued { request: request.clone(), by_certificate };
        self.record.issued.lock().unwrap().push(issued);
        self.record.note();
        if let Some(refusal) = &script.refusal {
            return Err(refusal.clone());
        }
        let csr = CertificateSigningRequestParams::from_der(&request.csr_der.as_slice().into()).unwrap();
        let expected = SanType::URI("spiffe://outrigger.local/ns/shop/sa/cart".try_into().unwrap());
        assert_eq!(csr.params.subject_alt_names, [expected], "a CSR has its key and the identity that is expected");
        let mut spec = LeafSpec::valid("shop", "cart").times(script.now(), 300, script.leaf_life);
        spec.common_name = Some(request.workload);
        Ok(Response::new(IssueResponse {
            chain_der: vec![script.authority.sign(&spec, &csr.public_key).to_vec()],
            trust_bundle: Some(script.trust_bundle()),
            not_before: 0,
            not_after: 0,
        }))
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn responses<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Response<Responses<T>> {
    Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)))
}

#[tonic::async_trait]
impl Discovery for Services {
    type WatchStream = Responses<WatchResponse>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        if !request.extensions().get::<ByCertificate>().unwrap().0 {
            return Err(Status::unauthenticated("a client certificate is required"));
        }
        let (sender, receiver) = mpsc::channel(20_000);
        let mut requests = request.into_inner();
        let (script, record) = (Arc::clone(&self.script), Arc::clone(&self.record));
        record.streams.lock().unwrap().push(sender.clone());
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let kind = request.kind.unwrap();
                if let watch_request::Kind::Subscribe(key) = &kind {
                    let key: &ResourceKey = key;
                    let known = script.lock().unwrap().resources.get(&prost::Message::encode_to_vec(key)).cloned();
                    if let Some(known) = known {
                        let _ = sender.send(Ok(known)).await;
                    }
                }
                record.watched.lock().unwrap().push(kind);
                record.note();
            }
        });
        Ok(responses(receiver))
    }
}

#[tonic::async_trait]
impl Registry for Services {
    type LeaseStream = Responses<LeaseResponse>;

    async fn lease(&self, request: Request<Streaming<LeaseRequest>>) -> Result<Response<Self::LeaseStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let mut requests = request.into_inner();
        let (script, record) = (Arc::clone(&self.script), Arc::clone(&self.record));
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let refusal = script.lock().unwrap().lease_refusal.clone();
                let services = if refusal.is_empty() { vec!["cart.shop".to_owned()] } else { vec![] };
                let _ = sender.send(Ok(LeaseResponse { refusal, services })).await;
                record.leases.lock().unwrap().push(request.kind.unwrap());
                record.note();
            }
        });
        Ok(responses(receiver))
    }
}
