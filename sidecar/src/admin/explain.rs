//! `POST /explain`: what this sidecar would do with a request or connection, from what it knows now. For calls to its own
//! workload the inbound policy decides; for others it says what it knows of the destination.

use axum::Json;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use outrigger_api::explain::{Explanation, Question, WrittenQuestion, explain_own};
use outrigger_api::name::ServicePort;
use outrigger_api::snapshot::Key;

use super::Admin;
use crate::discovery::Known;

/// 400: the question is wrong; 404: this sidecar knows nothing about what is asked; the body says so in words.
pub(super) async fn explain(
    Extract(admin): Extract<Admin>,
    Json(written): Json<WrittenQuestion>,
) -> Result<Json<Explanation>, (StatusCode, String)> {
    let question = Question::try_from(written).map_err(|message| (StatusCode::BAD_REQUEST, message))?;
    let own = admin.directory.own().borrow().clone();
    let Some(own) = own else {
        return Err((StatusCode::NOT_FOUND, "the control plane has told this sidecar nothing yet".to_owned()));
    };
    if let Some(explanation) = explain_own(&own, &admin.key_sets, &question) {
        return Ok(Json(explanation));
    }
    let mut known = admin.directory.known().into_iter().filter_map(|(key, known)| match (key, known) {
        (Key::Service(ServicePort { service, port }), Known::Registered(destination)) if service == question.to => {
            (question.port.is_none_or(|wanted| wanted == port)).then_some(destination)
        }
        _ => None,
    });
    match known.next() {
        Some(destination) => {
            let known = |to: &ServicePort| match admin.directory.remembered(&Key::Service(to.clone())) {
                Some(Known::Registered(destination)) => Some(destination),
                _ => None,
            };
            Ok(Json(Explanation::outbound(&question, &destination, known)))
        }
        None => Err((
            StatusCode::NOT_FOUND,
            format!(
                "{} is not served by this sidecar, and its application has not asked for it yet; ask the sidecar of a \
                 workload of that Service, or give the YAML",
                question.to
            ),
        )),
    }
}
