//! `Telemetry.Report`: takes a sidecar's summary of its golden signals. A sidecar speaks for itself only: on its own
//! side of an edge everything is its certificate's.

use std::time::SystemTime;

use outrigger_api::wire::telemetry_server::Telemetry;
use outrigger_api::wire::{ReportRequest, ReportResponse};
use tonic::{Request, Response, Status};

use super::discovery::{client_certificate, instance_of};
use super::reports::{ReportError, Reporter};
use super::server::Shared;

#[tonic::async_trait]
impl Telemetry for Shared {
    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let (_, certificate) = client_certificate(&request)?;
        let mut report = request.into_inner();
        let shadow = std::mem::take(&mut report.shadow);
        let id = instance_of(&certificate, &report.instance)?;
        let reporter = Reporter { principal: certificate.identity.as_str(), workload: &certificate.workload };
        let now = tokio::time::Instant::now().into_std();
        self.0.reports.take(id, reporter, report, now).map_err(|error| match error {
            ReportError::Window => Status::invalid_argument(error.to_string()),
            ReportError::TooOften | ReportError::Instances | ReportError::Full => {
                Status::resource_exhausted(error.to_string())
            }
        })?;
        let resources = self.0.publisher.resources();
        self.0.shadows.take(&resources, &certificate.identity, &shadow, SystemTime::now());
        self.0.metrics.reports.inc();
        Ok(Response::new(ReportResponse {}))
    }
}
