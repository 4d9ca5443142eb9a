//! What the server tells about itself and its models; templates and sampling overrides.

use serde_json::{Map, Value, json};

use super::{
    Shared, auth::Permission, loading::Loaded, lock, messages::TEMPLATE, now, refusal::Refusal,
};

/// The name of the only template.
const TEMPLATE_NAME: &str = "chatml";

const MAX_BATCH_SIZE: usize = 256;

/// `GET /health`: whether a generation has ever failed, and nothing else.
pub(super) fn health(shared: &Shared) -> Result<Value, Value> {
    let issues = lock(&shared.issues);
    if issues.is_empty() {
        return Ok(json!({"status": "healthy", "issues": []}));
    }
    let kept = &issues[issues.len().saturating_sub(100)..];
    Err(json!({"status": "unhealthy", "issues": kept}))
}

/// `GET /.well-known/serviceinfo`.
pub(super) fn service() -> Value {
    let repository = "https://github.com/theroyallab/tabbyAPI";
    json!({"version": 0.1, "software": {"name": "TabbyAPI", "repository": repository,
        "homepage": repository},
        "api": {"openai": {"name": "OpenAI API", "relative_url": "/v1",
            "documentation": "https://theroyallab.github.io/tabbyAPI", "version": 1}}})
}

/// `GET /v1/models`: every folder to an admin, else what is loaded.
pub(super) fn models(shared: &Shared, permission: Permission) -> Value {
    let names = match permission {
        Permission::Admin => shared.options.models.clone(),
        Permission::Api => {
            shared.place.model().map(|model| model.name.clone()).into_iter().collect()
        }
    };
    list(names.iter().map(|name| card(name, &Value::Null)).collect())
}

/// `GET /v1/model/draft/list`: drafts are of the same folders, and none is ever loaded.
pub(super) fn drafts(shared: &Shared, permission: Permission) -> Value {
    match permission {
        Permission::Admin => models(shared, permission),
        Permission::Api => list(Vec::new()),
    }
}

/// A list of cards.
pub(super) fn list(cards: Vec<Value>) -> Value {
    json!({"object": "list", "data": cards})
}

/// `GET /v1/model`.
pub(super) fn model(model: &Loaded) -> Value {
    let mut parameters = json!({"max_seq_len": model.context, "cache_size": model.context,
        "cache_mode": "FP16", "rope_scale": 1.0, "rope_alpha": 1.0,
        "max_batch_size": MAX_BATCH_SIZE, "chunk_size": 2048, "prompt_template": null,
        "prompt_template_content": null, "use_vision": false, "draft": null});
    if has_template(model) {
        parameters["prompt_template"] = TEMPLATE_NAME.into();
        parameters["prompt_template_content"] = TEMPLATE.into();
    }
    for (key, value) in &model.set {
        parameters[*key] = value.clone();
    }
    card(&model.name, &parameters)
}

fn card(name: &str, parameters: &Value) -> Value {
    json!({"id": name, "object": "model", "created": now(), "owned_by": "tabbyAPI",
        "logging": null, "parameters": parameters})
}

/// `GET /props`.
pub(super) fn props(model: &Loaded) -> Value {
    let template = if has_template(model) { TEMPLATE } else { "" };
    json!({"total_slots": MAX_BATCH_SIZE, "chat_template": template,
        "default_generation_settings": {"n_ctx": model.context}})
}

fn has_template(model: &Loaded) -> bool {
    model.has_template.load(std::sync::atomic::Ordering::SeqCst)
}

/// `GET /v1/templates`: the files to an admin, else the active one.
pub(super) fn templates(shared: &Shared, permission: Permission) -> Value {
    let is_shown = match permission {
        Permission::Admin => true,
        Permission::Api => shared.place.model().is_ok_and(|model| has_template(&model)),
    };
    let names: Vec<&str> = is_shown.then_some(TEMPLATE_NAME).into_iter().collect();
    json!({"object": "list", "data": names})
}

/// Whether `POST /v1/template/switch` names the template that is there.
pub(super) fn check_template(body: &Map<String, Value>) -> Result<(), Refusal> {
    match body.get("prompt_template_name").and_then(Value::as_str) {
        None | Some("") => Err(Refusal::bad("New template name not found.")),
        Some(TEMPLATE_NAME) => Ok(()),
        Some(other) => Err(Refusal::bad(format!(
            "The template name {other} doesn't exist. Check the spelling?"
        ))),
    }
}

/// `GET /v1/sampling/overrides`.
pub(super) fn overrides(shared: &Shared) -> Value {
    let overrides = Value::Object(lock(&shared.overrides).clone());
    json!({"selected_preset": null, "overrides": overrides, "presets": []})
}

/// `POST /v1/sampling/override/switch`. There are no presets.
pub(super) fn set_overrides(shared: &Shared, body: &Map<String, Value>) -> Result<Value, Refusal> {
    if let Some(preset) = body.get("preset").and_then(Value::as_str).filter(|name| !name.is_empty())
    {
        return Err(Refusal::bad(format!(
            "Sampler override preset with name {preset} does not exist. Check the spelling?"
        )));
    }
    match body.get("overrides").and_then(Value::as_object).filter(|given| !given.is_empty()) {
        Some(given) => {
            lock(&shared.overrides).clone_from(given);
            Ok(Value::Null)
        }
        None => Err(Refusal::bad("A sampler override preset or dictionary wasn't provided.")),
    }
}

/// Sets what overrides force, and what the body leaves out. `additive` is not followed.
pub(super) fn apply_overrides(overrides: &Map<String, Value>, body: &mut Map<String, Value>) {
    for (key, rule) in overrides {
        let forced = rule["force"].as_bool().unwrap_or(false);
        if forced || !body.contains_key(key) {
            body.insert(key.clone(), rule["override"].clone());
        }
    }
}
