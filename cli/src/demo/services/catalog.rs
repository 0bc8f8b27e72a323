//! `catalog`: what the shop sells, over gRPC with a unary and a server-streaming call (`proto/demo/v1/catalog.proto`).
//! HTTP/2 with prior knowledge, as gRPC without TLS is.

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tonic::codegen::{BoxStream, tokio_stream};
use tonic::{Request, Response, Status};

pub(super) mod proto {
    #![allow(clippy::all, clippy::unwrap_used, reason = "generated")]
    tonic::include_proto!("demo.v1");
}

use proto::catalog_server::{Catalog, CatalogServer};
use proto::{GetRequest, GetResponse, Item, ListRequest};

/// Name and price in cents.
pub(super) const ITEMS: [(&str, u64); 4] = [("paddle", 4900), ("rope", 1250), ("sail", 18900), ("float", 7300)];

pub async fn serve(listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let service = TowerToHyperService::new(CatalogServer::new(Shelf));
    super::accept(listener, shutdown, move |stream| {
        let service = service.clone();
        async move {
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a client of the demo's catalog left");
            }
        }
    })
    .await;
}

struct Shelf;

fn item((name, price_cents): (&str, u64)) -> Item {
    Item { name: name.to_owned(), price_cents }
}

#[tonic::async_trait]
impl Catalog for Shelf {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let caller = super::caller(request.metadata().as_ref()).unwrap_or_default();
        let wanted = &request.get_ref().name;
        match ITEMS.into_iter().find(|(name, _)| name == wanted) {
            Some(found) => Ok(Response::new(GetResponse { item: Some(item(found)), caller })),
            None => Err(Status::not_found(format!("the catalog has no {wanted:?}"))),
        }
    }

    type ListStream = BoxStream<Item>;

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<BoxStream<Item>>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::iter(ITEMS.map(item).map(Ok)))))
    }
}
