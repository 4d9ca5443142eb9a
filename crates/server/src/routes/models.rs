//! `/v1/models` and the effective configuration.

use std::sync::Arc;

use axum::{Json, extract::State};
use exrail_engine::{EngineOptions, FingerprintState, ModelFingerprint};
use exrail_wire::{ModelCard, ModelList};
use serde_json::{Value, json};

use crate::{
    AppState, StructuredLimits,
    error::ApiError,
    extract::{Name, Ready},
    otlp::SpanExport,
    state::{Services, kv_name},
    swap::{ModelStatus, Models},
};

pub(crate) async fn list(ready: Ready) -> Json<ModelList> {
    Json(ModelList { object: "list", data: cards(&ready.models) })
}

pub(crate) async fn one(ready: Ready, Name(model): Name) -> Result<Json<ModelCard>, ApiError> {
    let cards = cards(&ready.models);
    let known = cards.iter().map(|card| format!("`{}`", card.id)).collect::<Vec<_>>().join(", ");
    let card = cards.into_iter().find(|card| card.id == model);
    card.map(Json).ok_or(ApiError::UnknownModel { found: model, known })
}

/// What the server honours, read back; what belongs to a generator is that of the loaded one, and null where
/// none is.
pub(crate) async fn config(State(state): State<Arc<AppState>>, ready: Ready) -> Json<Value> {
    let (lineup, shelf) = (ready.models.lineup(), ready.models.shelf());
    let loaded = lineup.loaded.as_deref();
    let facts = loaded.map(|services| services.engine.facts());
    let options = facts.map(|facts| facts.options);
    let collections: Vec<_> =
        shelf.collections().iter().map(|(name, grounds)| grounds.describe(name)).collect();
    let swap = ready.models.limits();
    Json(json!({
        "engine_build": crate::ENGINE_BUILD,
        "model": loaded.map(|services| &services.model_name),
        "device": facts.map(|facts| &facts.backend),
        "context": facts.map(|facts| facts.context),
        "max_sequences": options.map(|options| options.max_sequences),
        "prefill_chunk": options.map(|options| options.prefill_chunk),
        "queue_limit": options.map(|options| options.queue_limit),
        "tenant_queue_limit": options.and_then(|options| options.tenant_queue_limit),
        "default_deadline_ms": state.limits.default_deadline.map(|deadline| deadline.as_millis()),
        "watchdog_s": state.limits.watchdog.as_secs(),
        "step_target_ms": options.and_then(|it| it.step_target).map(|target| target.as_millis()),
        "loop_guard": state.limits.loop_guard,
        "leak_guard": state.limits.leak_guard,
        "kv_dtype": facts.map(|facts| kv_name(facts.kv_dtype)),
        "kv_pages": facts.map(|facts| facts.kv_pages),
        "kv_bytes": facts.map(|facts| facts.kv_bytes),
        "kv_audit_every": options.map(|options| options.kv_audit_every),
        "prefix_cache": options.map(|options| options.prefix_cache),
        "kv_host_bytes": options.map(|options| options.kv_host_bytes),
        "sessions": state.sessions.get().is_some(),
        "otlp": state.spans.get().map(SpanExport::describe),
        "structured": structured(&state.limits.structured, loaded),
        "rotation": options.map(|EngineOptions { rotation, .. }| json!({
            "policy": rotation.policy.name(),
            "rotate_at": rotation.rotate_at,
            "window": rotation.window,
            "sink": rotation.sink,
        })),
        "swap": {
            "turn_s": swap.turn.as_secs_f64(),
            "linger_s": swap.linger.as_secs_f64(),
            "drain_s": swap.drain.as_secs_f64(),
            "cool_down_s": swap.cool_down.as_secs_f64(),
            "idle_unload_s": swap.idle_unload.map(|idle| idle.as_secs_f64()),
        },
        "collections": collections,
    }))
}

/// What structured answers may take; the family is that of the loaded generator.
fn structured(limits: &StructuredLimits, loaded: Option<&Services>) -> Value {
    let grammars = exrail_grammar::Limits::default();
    json!({
        "tools": limits.tools,
        "tool_calls": limits.tool_calls,
        "tool_call_bytes": limits.tool_call_bytes,
        "repairs": limits.repairs,
        "tool_circuit": limits.tool_circuit,
        "grammar_bytes": grammars.source_bytes,
        "grammar_depth": grammars.depth,
        "grammar_cache_bytes": grammars.cache_bytes,
        "tool_family": loaded.map(|services| services.tool_format().family().name()),
        "template_describes_tools":
            loaded.map(|services| services.tool_format().describes_tools()),
    })
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

fn cards(models: &Models) -> Vec<ModelCard> {
    let lineup = models.lineup();
    let generators = lineup.models.iter().map(|status| {
        let loaded = lineup.loaded.as_deref();
        generator(status, loaded.filter(|services| *services.model_name == *status.name))
    });
    let mut cards: Vec<_> = generators.collect();
    if let Some(served) = models.shelf().encoder() {
        let facts = served.encoder.facts();
        let exrail = json!({
            "kind": "encoder",
            "dim": facts.dim,
            "max_tokens": facts.max_tokens,
            "encoder_fp": served.encoder.fingerprint(),
        });
        cards.push(card(&served.name, models.started_at(), exrail));
    }
    cards
}

/// A generator: its state, and what is known of it while it is loaded.
fn generator(status: &ModelStatus, loaded: Option<&Services>) -> ModelCard {
    let mut exrail = json!({
        "kind": "generator",
        "state": status.state.name(),
        "reason": status.reason.as_deref(),
        "sha256": null,
        "sha256_status": { "status": "not_loaded" },
    });
    let Some(services) = loaded else { return card(&status.name, 0, exrail) };
    let facts = services.engine.facts();
    exrail["title"] = json!(facts.model_name);
    exrail["sha256"] = json!(facts.model_sha256.get());
    exrail["sha256_status"] = sha256_status(&facts.model_sha256);
    exrail["quant"] = json!(facts.quant);
    exrail["context"] = json!(facts.context);
    exrail["tok_fp"] = json!(services.engine.tokenizer().fingerprint());
    card(&status.name, services.loaded_at, exrail)
}

fn card(id: &str, created: i64, exrail: Value) -> ModelCard {
    ModelCard { id: id.into(), object: "model", created, owned_by: "exrail", exrail }
}
