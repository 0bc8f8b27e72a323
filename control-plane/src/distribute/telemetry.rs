//! `Telemetry.Report`: takes a sidecar's summary of its golden signals. A sidecar speaks for itself only: on its own
//! side of an edge the identity must be its certificate's.

use outrigger_api::wire::telemetry_server::Telemetry;
use outrigger_api::wire::{Edge, ReportRequest, ReportResponse};
use tonic::{Request, Response, Status};

use super::discovery::{client_certificate, instance_of};
use super::server::Shared;

#[tonic::async_trait]
impl Telemetry for Shared {
    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let (_, certificate) = client_certificate(&request)?;
        let mut report = request.into_inner();
        let id = instance_of(&certificate, &report.instance)?;
        if !(report.window_seconds > 0.0 && report.window_seconds.is_finite()) {
            return Err(Status::invalid_argument("window_seconds must be greater than 0"));
        }
        report.edges.retain(|edge| {
            let own = own_principal(edge);
            own.is_empty() || own == certificate.identity.as_str()
        });
        self.0.metrics.reports.inc();
        self.0.reports.take(id, report, tokio::time::Instant::now().into_std());
        Ok(Response::new(ReportResponse {}))
    }
}

fn own_principal(edge: &Edge) -> &str {
    if edge.inbound { &edge.destination_principal } else { &edge.source_principal }
}
