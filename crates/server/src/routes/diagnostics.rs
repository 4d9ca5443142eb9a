//! `/v1/diagnostics`: the report of a diagnosis of what this server serves.

use std::sync::{Arc, atomic::AtomicBool, atomic::Ordering};

use axum::{Extension, Json, extract::State};
use exrail_wire::DiagnosticsRequest;
use serde_json::Value;

use crate::{
    AppState,
    auth::Caller,
    diagnostics::DiagnosticsError,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
};

/// Seconds in which a diagnosis may have ended.
const RETRY_AFTER_S: u64 = 60;

/// Set when it is dropped: with the handler, as soon as the client has gone.
struct HungUp(Arc<AtomicBool>);

impl Drop for HungUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub(crate) async fn diagnose(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    ready: Ready,
    Body(request): Body<DiagnosticsRequest>,
) -> Result<Json<Value>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    let diagnostics = state.diagnostics.get().ok_or(ApiError::NotAvailable {
        what: "diagnostics",
        why: "this program measures nothing; use exrail diagnose",
    })?;
    let running = Arc::clone(&state.diagnosing).try_acquire_owned();
    let running = running.map_err(|_| ApiError::DiagnosisRuns { retry_after_s: RETRY_AFTER_S })?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    pass.collection(request.collection.as_deref())?;
    let collection = request.collection.clone();
    let collection = collection.or_else(|| pass.collections.keys().next().cloned());
    let collection = collection.unwrap_or_default();
    let is_over = Arc::new(AtomicBool::new(false));
    let _waits = HungUp(Arc::clone(&is_over));
    let diagnostics = Arc::clone(diagnostics);
    let measured = tokio::task::spawn_blocking(move || {
        // Until it has ended, whoever waits for it.
        let _running = running;
        let over = || is_over.load(Ordering::Relaxed);
        let measured = diagnostics.report(&pass, &collection, &request, &over);
        (measured, pass, collection)
    });
    let (measured, pass, collection) =
        measured.await.map_err(|_| ApiError::Internal("diagnostics task"))?;
    let (trace_id, report) = measured.map_err(|error| match error {
        DiagnosticsError::Refused { field, problem } => {
            ApiError::BadField { field: field.into(), problem }
        }
        DiagnosticsError::Over => ApiError::HungUp,
        DiagnosticsError::Failed(reason) => ApiError::Diagnosis(reason),
    })?;
    let record = (trace_id.as_str(), report.clone());
    state.traces.append_probe(&pass, &collection, record).await?;
    Ok(Json(report))
}
