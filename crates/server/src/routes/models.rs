//! `/v1/models` and the effective configuration.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use exrail_engine::{FingerprintState, ModelFingerprint};
use exrail_wire::{ModelCard, ModelList};
use serde_json::{Value, json};

use crate::{
    AppState,
    error::ApiError,
    extract::Ready,
    state::{Services, kv_name},
};

pub(crate) async fn list(Ready(services): Ready) -> Json<ModelList> {
    Json(ModelList { object: "list", data: cards(&services) })
}

pub(crate) async fn one(
    Ready(services): Ready,
    Path(model): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    let cards = cards(&services);
    let known = cards.iter().map(|card| format!("`{}`", card.id)).collect::<Vec<_>>().join(", ");
    let card = cards.into_iter().find(|card| card.id == model);
    card.map(Json).ok_or(ApiError::UnknownModel { found: model, known })
}

/// What the server honours, read back.
pub(crate) async fn config(
    State(state): State<Arc<AppState>>,
    Ready(services): Ready,
) -> Json<Value> {
    let facts = services.engine.facts();
    let collections: Vec<_> =
        services.collections.iter().map(|(name, asker)| asker.describe(name)).collect();
    Json(json!({
        "engine_build": crate::ENGINE_BUILD,
        "device": facts.backend,
        "context": facts.context,
        "max_sequences": facts.options.max_sequences,
        "prefill_chunk": facts.options.prefill_chunk,
        "queue_limit": facts.options.queue_limit,
        "tenant_queue_limit": facts.options.tenant_queue_limit,
        "default_deadline_ms": state.limits.default_deadline.map(|deadline| deadline.as_millis()),
        "watchdog_s": state.limits.watchdog.as_secs(),
        "step_target_ms": facts.options.step_target.map(|target| target.as_millis()),
        "loop_guard": state.limits.loop_guard,
        "kv_dtype": kv_name(facts.kv_dtype),
        "kv_pages": facts.kv_pages,
        "kv_bytes": facts.kv_bytes,
        "kv_audit_every": facts.options.kv_audit_every,
        "prefix_cache": facts.options.prefix_cache,
        "kv_host_bytes": facts.options.kv_host_bytes,
        "sessions": state.sessions.get().is_some(),
        "rotation": {
            "policy": facts.options.rotation.policy.name(),
            "rotate_at": facts.options.rotation.rotate_at,
            "window": facts.options.rotation.window,
        },
        "collections": collections,
    }))
}

/// What is known of the model's hash.
fn sha256_status(model: &ModelFingerprint) -> Value {
    match model.state() {
        FingerprintState::Known(_) => json!({ "status": "known" }),
        FingerprintState::Pending { hashed, total_bytes } => {
            json!({ "status": "pending", "hashed_bytes": hashed, "total_bytes": total_bytes })
        }
        FingerprintState::Failed(error) => {
            json!({ "status": "not_available", "reason": error.to_string() })
        }
    }
}

fn cards(services: &Services) -> Vec<ModelCard> {
    let facts = services.engine.facts();
    let card = |id: &str, exrail: Value| ModelCard {
        id: id.into(),
        object: "model",
        created: services.loaded_at,
        owned_by: "exrail",
        exrail,
    };
    let generator = json!({
        "kind": "generator",
        "title": facts.model_name,
        "sha256": facts.model_sha256.get(),
        "sha256_status": sha256_status(&facts.model_sha256),
        "quant": facts.quant,
        "context": facts.context,
        "tok_fp": services.engine.tokenizer().fingerprint(),
    });
    let mut cards = vec![card(&services.model_name, generator)];
    if let Some(served) = &services.encoder {
        let facts = served.encoder.facts();
        let exrail = json!({
            "kind": "encoder",
            "dim": facts.dim,
            "max_tokens": facts.max_tokens,
            "encoder_fp": served.encoder.fingerprint(),
        });
        cards.push(card(&served.name, exrail));
    }
    cards
}
