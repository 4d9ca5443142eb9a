//! `/livez`, `/readyz`, `/metrics`.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use exrail_engine::{EngineState, FingerprintState};
use serde_json::json;

use crate::{
    AppState,
    boot::{BootState, BootStatus},
};

/// How long an engine with work may go without a finished step.
const STALL: Duration = Duration::from_secs(30);

/// Alive: the process answers and, when there is work, the engine makes progress.
pub(crate) async fn livez(State(state): State<Arc<AppState>>) -> Response {
    let stalled =
        state.services.get().is_some_and(|services| services.engine.counters().is_stalled(STALL));
    let (status, text) = if stalled {
        (StatusCode::SERVICE_UNAVAILABLE, "stalled")
    } else {
        (StatusCode::OK, "alive")
    };
    (status, Json(json!({ "status": text }))).into_response()
}

/// Ready: real tokens were generated through the production path, the engine still runs, and the hash of
/// its model has not failed, without which no answer can be recorded.
pub(crate) async fn readyz(State(state): State<Arc<AppState>>) -> Response {
    let status = state.board.status();
    let trouble = trouble(&state);
    let phases: Vec<_> = status
        .phases
        .iter()
        .map(|record| {
            json!({
                "phase": record.phase.name(),
                "ok": record.ok,
                "ms": record.took.as_secs_f64() * 1e3,
                "detail": record.detail,
            })
        })
        .collect();
    let ready = status.is_ready() && trouble.is_none();
    let body = json!({
        "status": if ready { "ready" } else { "not_ready" },
        "phase": status.phase().name(),
        "reason": reason(&status, trouble),
        "phases": phases,
    });
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = (code, Json(body)).into_response();
    if let Some(seconds) = status.retry_after_s() {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Why services that were handed over do not answer, if they do not.
fn trouble(state: &AppState) -> Option<String> {
    const IDLE: &str = "the engine makes no progress";
    let Some(services) = state.services.get() else { return Some(IDLE.into()) };
    if let FingerprintState::Failed(error) = services.engine.facts().model_sha256.state() {
        return Some(error.to_string());
    }
    let counters = services.engine.counters();
    let running = counters.state == EngineState::Running && !counters.is_stalled(STALL);
    (!running).then(|| IDLE.into())
}

fn reason(status: &BootStatus, trouble: Option<String>) -> Option<String> {
    match &status.state {
        BootState::Failed { reason, .. } => Some(reason.clone()),
        BootState::Ready { .. } => trouble,
        BootState::Starting { .. } => None,
    }
}

/// Prometheus.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let counters = state.services.get().map(|services| services.engine.counters());
    let text = state.metrics.render(&state.board.status(), counters.as_ref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
