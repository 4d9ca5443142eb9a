//! `/livez`, `/readyz`, `/metrics`.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use exrail_engine::{Counters, EngineState, FingerprintState};
use serde_json::{Value, json};

use crate::{
    AppState,
    boot::{BootState, BootStatus, Wait},
    observe::{injected, spans, tool_circuits},
    otlp::SpanExport,
    swap::{ModelStatus, Models},
};

/// Alive: the process answers, the engine has not given up and, when there is work, it finishes steps. Not
/// alive is what only a restart cures.
pub(crate) async fn livez(State(state): State<Arc<AppState>>) -> Response {
    if is_stuck(&state) {
        let body = json!({ "status": "stuck" });
        return (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    }
    let counters = state.services().map(|services| services.engine.counters());
    let (status, text) = match counters.map(|counters| dead(&counters, state.limits.watchdog)) {
        Some(Some(reason)) => (StatusCode::SERVICE_UNAVAILABLE, reason),
        Some(None) | None => (StatusCode::OK, "alive"),
    };
    (status, Json(json!({ "status": text }))).into_response()
}

/// Whether an engine that was to go hangs and holds its memory.
fn is_stuck(state: &AppState) -> bool {
    state.models().is_some_and(|models| models.lineup().stuck.is_some())
}

/// Why an engine is not alive, if it is not.
fn dead(counters: &Counters, watchdog: Duration) -> Option<&'static str> {
    match counters.state {
        EngineState::Faulted => Some("faulted"),
        EngineState::Stopped => Some("stopped"),
        EngineState::Running => counters.is_stalled(watchdog).then_some("stalled"),
    }
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
        "attempt": status.attempt,
        "running": running(&status),
        "waits": waits(&status),
        "open_tool_circuits": open_circuits(&state),
        "models": state.models().map(|models| models.lineup().models.iter().map(model).collect::<Vec<_>>()),
    });
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = (code, Json(body)).into_response();
    if let Some(seconds) = status.retry_after_s() {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Models whose tool calls cannot be read for now: only requests with tools are refused (G-29).
fn open_circuits(state: &AppState) -> Vec<String> {
    let states = state.tool_circuits.states().into_iter();
    states.filter(|(_, is_open)| *is_open).map(|(model, _)| model).collect()
}

/// What a model is doing, and how far its load is.
fn model(status: &ModelStatus) -> Value {
    let load = status.board.as_ref().map(|board| board.status());
    json!({
        "model": &*status.name,
        "state": status.state.name(),
        "reason": status.reason.as_deref(),
        "running": status.running,
        "waiting": status.waiting,
        "phase": load.as_ref().map(|load| load.phase().name()),
        "load": load.as_ref().and_then(running),
    })
}

/// How far the phase is that runs; null when none does.
fn running(status: &BootStatus) -> Option<Value> {
    let BootState::Starting { since, .. } = &status.state else { return None };
    Some(json!({
        "doing": status.doing,
        "s": since.elapsed().as_secs_f64(),
        "since_progress_s": status.quiet.as_secs_f64(),
        "stalled": status.is_stalled(),
        "heartbeats": status.heartbeats,
    }))
}

/// Who waits for whom (G-04).
fn waits(status: &BootStatus) -> Vec<Value> {
    let wait = |wait: &Wait| {
        let holders: Vec<_> = wait.holders.iter().map(|it| it.name()).collect();
        json!({ "waiter": wait.waiter.name(), "holders": holders })
    };
    status.waits().iter().map(wait).collect()
}

/// Why services that were handed over do not answer, if they do not.
fn trouble(state: &AppState) -> Option<String> {
    const IDLE: &str = "the engine makes no progress";
    let Some(models) = state.models() else { return Some(IDLE.into()) };
    let lineup = models.lineup();
    let Some(services) = &lineup.loaded else { return lineup.trouble() };
    if let FingerprintState::Failed(error) = services.engine.facts().model_sha256.state() {
        return Some(error.to_string());
    }
    dead(&services.engine.counters(), state.limits.watchdog).map(|_| IDLE.into())
}

fn reason(status: &BootStatus, trouble: Option<String>) -> Option<String> {
    match &status.state {
        BootState::Failed { reason, .. } | BootState::Retrying { reason, .. } => {
            Some(reason.clone())
        }
        BootState::Ready { .. } => trouble,
        BootState::Starting { .. } => None,
    }
}

/// Prometheus.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let lineup = state.models().map(Models::lineup);
    let mut text = state.metrics.render(&state.board.status(), lineup.as_deref());
    text.push_str(&tool_circuits(&state.tool_circuits.states()));
    text.push_str(&spans(state.spans.get().map(SpanExport::counts)));
    if let Some(services) = lineup.as_ref().and_then(|lineup| lineup.loaded.as_ref()) {
        text.push_str(&injected(&services.engine.faults().counts()));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
