//! `web`: the shop, over HTTP/1.1. `GET /shop?item=NAME` looks the item up in `catalog` (gRPC, unary and streaming), adds
//! its price to `ledger` (TCP) and answers with JSON; it hands the trace headers on and tells who called whom.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};

use super::catalog::proto::catalog_client::CatalogClient;
use super::catalog::proto::{GetRequest, ListRequest};
use super::ledger;

/// What the shop answers. Identities are SPIFFE ids as the sidecars told them, `None` without a sidecar.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShopAnswer {
    pub item: String,
    pub price_cents: u64,
    /// The names of all that the catalog has.
    pub catalog: Vec<String>,
    /// What the ledger holds after this sale.
    pub total_cents: u64,
    /// Who called web.
    pub caller: Option<String>,
    /// Who called the catalog, by its own account.
    pub catalog_caller: Option<String>,
}

/// No call of the demo takes longer unless something hangs.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Shop {
    catalog: CatalogClient<Channel>,
    ledger: SocketAddr,
}

/// `catalog` and `ledger` are where those are called: the outbound listeners of web's sidecar.
pub async fn serve(listener: TcpListener, catalog: SocketAddr, ledger: SocketAddr, shutdown: impl Future<Output = ()>) {
    let endpoint = match Endpoint::from_shared(format!("http://{catalog}")) {
        Ok(endpoint) => endpoint.connect_timeout(PATIENCE),
        Err(error) => return tracing::error!(%error, %catalog, "the catalog's address is not a URI's authority"),
    };
    let shop = Shop { catalog: CatalogClient::new(endpoint.connect_lazy()), ledger };
    super::accept(listener, shutdown, move |stream| {
        let shop = shop.clone();
        async move {
            let service = service_fn(move |request| {
                let shop = shop.clone();
                async move { Ok::<_, std::convert::Infallible>(shop.answer(request).await) }
            });
            let http = hyper::server::conn::http1::Builder::new();
            if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a client of the demo's web left");
            }
        }
    })
    .await;
}

impl Shop {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != "/shop" {
            return refusal(&Refusal::NoPage(request.uri().path().to_owned()));
        }
        if request.method() != Method::GET {
            return refusal(&Refusal::Method(request.method().clone()));
        }
        match tokio::time::timeout(PATIENCE, self.sell(item(request.uri().query()), request.headers())).await {
            Ok(Ok(answer)) => json(StatusCode::OK, &answer),
            Ok(Err(refused)) => refusal(&refused),
            Err(_) => refusal(&Refusal::Slow),
        }
    }

    async fn sell(&self, item: &str, incoming: &HeaderMap) -> Result<ShopAnswer, Refusal> {
        let traced = super::propagated(incoming);
        let get = self.catalog.clone().get(traced_request(&traced, GetRequest { name: item.to_owned() })).await;
        let got = get.map_err(Refusal::catalog)?.into_inner();
        let item = got.item.ok_or(Refusal::NoItem)?;
        let list = self.catalog.clone().list(traced_request(&traced, ListRequest {})).await;
        let mut listed = list.map_err(Refusal::catalog)?.into_inner();
        let mut catalog = Vec::new();
        while let Some(item) = listed.message().await.map_err(Refusal::catalog)? {
            catalog.push(item.name);
        }
        let total_cents = ledger::add(self.ledger, item.price_cents).await?;
        Ok(ShopAnswer {
            item: item.name,
            price_cents: item.price_cents,
            catalog,
            total_cents,
            caller: super::caller(incoming),
            catalog_caller: Some(got.caller).filter(|caller| !caller.is_empty()),
        })
    }
}

fn traced_request<T>(traced: &HeaderMap, message: T) -> tonic::Request<T> {
    tonic::Request::from_parts(MetadataMap::from_headers(traced.clone()), Default::default(), message)
}

/// The item asked for; names need no escaping.
fn item(query: Option<&str>) -> &str {
    query.unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("item=")).unwrap_or("rope")
}

/// Why nothing was sold.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there is nothing at {0:?}; try /shop?item=rope")]
    NoPage(String),
    #[error("{0} is not for /shop; use GET")]
    Method(Method),
    #[error("{0}")]
    UnknownItem(String),
    #[error("the catalog answered without an item")]
    NoItem,
    #[error("the catalog could not be asked: {0}")]
    Catalog(tonic::Status),
    #[error(transparent)]
    Ledger(#[from] ledger::LedgerError),
    #[error("catalog and ledger did not answer within {PATIENCE:?}")]
    Slow,
}

impl Refusal {
    fn catalog(status: tonic::Status) -> Refusal {
        match status.code() {
            tonic::Code::NotFound => Refusal::UnknownItem(status.message().to_owned()),
            _ => Refusal::Catalog(status),
        }
    }
}

#[derive(Serialize)]
struct RefusalBody {
    error: String,
}

fn refusal(why: &Refusal) -> Response<Full<Bytes>> {
    let status = match why {
        Refusal::NoPage(_) | Refusal::UnknownItem(_) => StatusCode::NOT_FOUND,
        Refusal::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
        Refusal::NoItem | Refusal::Catalog(_) | Refusal::Ledger(_) => StatusCode::BAD_GATEWAY,
        Refusal::Slow => StatusCode::GATEWAY_TIMEOUT,
    };
    json(status, &RefusalBody { error: why.to_string() })
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let (status, body) = match serde_json::to_vec(body) {
        Ok(body) => (status, body),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    };
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET"));
    }
    response
}
