//! `GET /explain/ID`: a request that this sidecar refused or could not forward lately, by its x-request-id or trace id: the
//! verdict as it was with all steps, by the policy of that time, and what would be decided now.

use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use outrigger_api::explain::{Asked, Explanation, Question, explain_port};
use outrigger_api::name::ServiceName;
use outrigger_api::snapshot::Workload;
use serde_json::{Value, json};

use super::Admin;
use crate::telemetry::{Ended, Found, Inbound};

/// 404: no such request is known; the body says so in words.
pub(super) async fn lately(
    Path(id): Path<String>,
    Extract(admin): Extract<Admin>,
) -> Result<Json<Value>, (StatusCode, String)> {
    let lately = admin.telemetry.lately();
    let Some(found) = lately.find(&id) else {
        let why = format!(
            "none of the last {} requests that this sidecar refused or could not forward has this x-request-id or trace \
             id; what an application answered itself is not among them, and the other side's sidecar may know it",
            lately.len()
        );
        return Err((StatusCode::NOT_FOUND, why));
    };
    let now = admin.directory.own().borrow().clone();
    Ok(Json(told(&found, now.as_deref())))
}

fn told(found: &Found, now: Option<&Workload>) -> Value {
    let ended = &*found.ended;
    let inbound = ended.inbound.as_ref();
    let decided = |own: Option<&Workload>| own.zip(inbound).and_then(|(own, inbound)| decided(ended, inbound, own));
    // A token is not kept, so that a refusal about it cannot be decided once more: its detail says why.
    let by_token = matches!(ended.reason, "jwt_missing" | "jwt_invalid" | "jwks_unavailable");
    let was = if by_token { None } else { decided(found.own.as_deref()) };
    let mut answer =
        was.as_ref().and_then(|was| serde_json::to_value(was).ok()).unwrap_or_else(|| json!({"steps": []}));
    let by_policy = ended.by.is_some() && ended.reason != "jwks_unavailable"
        || matches!(ended.reason, "policy_denied" | "path_ambiguous" | "jwt_missing" | "jwt_invalid");
    if !by_policy || by_token {
        let step = json!({"stage": ended.stage, "object": "", "result": "failed", "why": ended.detail});
        if let Some(steps) = answer["steps"].as_array_mut() {
            steps.push(step);
        }
        answer["hint"] = ended.detail.clone().into();
    } else if was.is_none() {
        answer["hint"] = "the policy of that time is no longer known".into();
    }
    answer["verdict"] = if by_policy { "refused" } else { "failed" }.into();
    answer["status"] = ended.status.into();
    answer["grpc_status"] = ended.grpc_status.into();
    answer["reason"] = ended.reason.into();
    answer["by"] = ended.by.as_ref().map_or(Value::Null, |(object, rule)| {
        let mut parts = object.splitn(3, '/');
        let mut part = || parts.next().unwrap_or_default();
        json!({"kind": part(), "namespace": part(), "name": part(), "rule": rule, "file": null, "line": null})
    });
    answer["request"] = request(ended, found.others);
    answer["now"] = decided(now).filter(|_| by_policy && !by_token).map_or(Value::Null, |now| {
        let by = now.by.as_ref().map(|by| (by.to_string(), by.rule));
        let otherwise = now.reason != Some(ended.reason) || by != ended.by;
        json!({"verdict": now.verdict, "reason": now.reason, "by": now.by, "hint": now.hint, "otherwise": otherwise})
    });
    answer
}

/// What one state of policy says of the facts that were kept.
fn decided(ended: &Ended, inbound: &Inbound, own: &Workload) -> Option<Explanation> {
    let port = inbound.application.port();
    let named = || ServiceName::new(&own.name, &own.namespace).ok();
    let called = own.ports.get(&port).and_then(|port| port.service.clone()).or_else(named);
    let question = Question {
        from: inbound.identity.clone(),
        from_ip: Some(ended.client.ip()),
        to: called?,
        port: None,
        request: Some(Asked {
            method: ended.method.clone(),
            target: ended.target.clone(),
            headers: ended.headers.clone(),
        }),
        sni: None,
        claims: ended.claims.clone(),
        token: None,
        at: ended.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    };
    // Its token was not kept: what was verified of it stands in the question.
    Some(explain_port(own, &(), port, Some(inbound.application.ip()), &question))
}

fn request(ended: &Ended, others: usize) -> Value {
    let inbound = ended.inbound.as_ref();
    json!({
        "request_id": ended.request_id,
        "trace_id": (ended.trace_id != 0).then(|| format!("{:032x}", ended.trace_id)),
        "at": ended.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "direction": if inbound.is_some() { "inbound" } else { "outbound" },
        "from": inbound.and_then(|inbound| inbound.identity.as_ref()).map(ToString::to_string),
        "client": ended.client.to_string(),
        "method": ended.method,
        "target": ended.target,
        "headers": ended.headers,
        "earlier_ones": others,
    })
}
