//! Chat messages and the prompt that the double's template makes of them.

use serde_json::{Map, Value, json};

use super::{
    body::Checks,
    refusal::Refusal,
    tokens::{BOS, EOS},
};

/// What `/props` and the model's card show as the chat template.
pub(super) const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// One message.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) role: String,
    pub(super) content: Option<String>,
    /// Calls of the assistant, as they were sent.
    calls: Option<Value>,
}

/// Reads the messages of a field, and notes what is wrong with them.
pub(super) fn read(body: &Map<String, Value>, field: &str, checks: &mut Checks) -> Vec<Turn> {
    let Some(value) = body.get(field) else {
        checks.missing(&[field], body);
        return Vec::new();
    };
    let Some(items) = value.as_array() else {
        checks.wrong("list_type", &[field], "Input should be a valid list", value);
        return Vec::new();
    };
    let mut turns = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let Some(message) = item.as_object() else {
            let message = "Input should be a valid dictionary or object to extract fields from";
            checks.wrong_at("model_attributes_type", json!(["body", field, index]), message, item);
            continue;
        };
        let role = match message.get("role") {
            None => "user",
            Some(Value::String(role)) => role,
            Some(other) => {
                let loc = json!(["body", field, index, "role"]);
                checks.wrong_at("string_type", loc, "Input should be a valid string", other);
                continue;
            }
        };
        let content =
            content(message.get("content"), &json!(["body", field, index, "content"]), checks);
        let calls = message.get("tool_calls").filter(|calls| calls.is_array()).cloned();
        turns.push(Turn { role: role.into(), content, calls });
    }
    turns
}

/// The text of a message; images are left out, as without a vision model.
fn content(value: Option<&Value>, loc: &Value, checks: &mut Checks) -> Option<String> {
    let under = |steps: &[Value]| {
        let mut loc = loc.as_array().cloned().unwrap_or_default();
        loc.extend_from_slice(steps);
        Value::Array(loc)
    };
    match value? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                let at = |field: &str| under(&["list".into(), index.into(), field.into()]);
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(part)) => text.push_str(part),
                    (Some("image_url"), _) => {}
                    (Some("text"), None) => checks.wrong_at(
                        "string_type",
                        at("text"),
                        "Input should be a valid string",
                        &part["text"],
                    ),
                    _ => checks.wrong_at(
                        "literal_error",
                        at("type"),
                        "Input should be 'text' or 'image_url'",
                        &part["type"],
                    ),
                }
            }
            Some(text)
        }
        other @ (Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            let loc = under(&["str".into()]);
            checks.wrong_at("string_type", loc, "Input should be a valid string", other);
            None
        }
    }
}

/// The prompt of messages, without what opens an answer.
pub(super) fn render(turns: &[Turn]) -> Result<String, Refusal> {
    let mut prompt = String::new();
    for Turn { role, content, calls } in turns {
        let content = match (content, calls) {
            (Some(content), _) => content.as_str(),
            // A template that knows tools writes the calls instead.
            (None, Some(_)) => "",
            (None, None) => {
                let text = "TemplateError: can only concatenate str (not \"NoneType\") to str";
                return Err(Refusal::bad(text));
            }
        };
        let calls = calls.as_ref().map(Value::to_string).unwrap_or_default();
        prompt.push_str(&format!("{BOS}{role}\n{content}{calls}{EOS}\n"));
    }
    Ok(prompt)
}
