//! What faults do to JSON.

use serde_json::{Map, Value};

/// The field that makes a generation repeatable.
pub(super) const SEED: &[&str] = &["seed"];

/// Fields that say what form an answer has, in the dialects of llama.cpp, vLLM and TabbyAPI.
/// `tool_choice` goes with `tools`: without them it would be refused.
pub(super) const SCHEMA: &[&str] = &[
    "response_format",
    "json_schema",
    "grammar",
    "grammar_string",
    "regex",
    "regex_pattern",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "structured_outputs",
    "tools",
    "tool_choice",
];

/// Removes fields of a request.
pub(super) fn remove(request: &mut Value, fields: &[&str]) {
    if let Some(request) = request.as_object_mut() {
        // In order: the request is otherwise what the client wrote.
        request.retain(|name, _| !fields.contains(&name.as_str()));
    }
}

/// Makes a reply or an event name this model.
pub(super) fn rename(value: &mut Value, model: &str) {
    let Some(reply) = value.as_object_mut() else {
        return;
    };
    replace(reply, &["model"], model);
    // Where an event of /v1/messages has it.
    if let Some(message) = reply.get_mut("message").and_then(Value::as_object_mut) {
        replace(message, &["model"], model);
    }
}

/// Makes a list of models, or the description of one, name this model only.
pub(super) fn rename_listed(value: &mut Value, model: &str) {
    let Some(listing) = value.as_object_mut() else {
        return;
    };
    replace(listing, &["id", "model"], model);
    // llama.cpp lists its model a second time, under the names of another API.
    for (list, fields) in [("data", &["id", "model"][..]), ("models", &["id", "model", "name"])] {
        let entries = listing.get_mut(list).and_then(Value::as_array_mut);
        for entry in entries.into_iter().flatten().filter_map(Value::as_object_mut) {
            replace(entry, fields, model);
        }
    }
}

/// Turns every text of an answer into as many characters that are none.
pub(super) fn garble(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == "content" || name == "text" => {
                        *text = garbage(text.chars().count());
                    }
                    Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {}
                    Value::Array(_) | Value::Object(_) => garble(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(garble),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn garbage(len: usize) -> String {
    ['\u{fffd}', '\u{1}', '\u{fffd}', '\u{1b}'].into_iter().cycle().take(len).collect()
}

fn replace(fields: &mut Map<String, Value>, names: &[&str], text: &str) {
    for name in names {
        if let Some(value) = fields.get_mut(*name).filter(|value| value.is_string()) {
            *value = Value::from(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_fields_of_a_form_are_lost() {
        let mut request = json!({ "model": "m", "seed": 1, "temperature": 0.5, "stream": true });
        let whole = request.clone();
        for field in SCHEMA {
            request[*field] = json!({});
        }
        remove(&mut request, SCHEMA);
        assert_eq!(request, whole);
        remove(&mut request, SEED);
        assert_eq!(request.to_string(), r#"{"model":"m","temperature":0.5,"stream":true}"#);
    }

    #[test]
    fn a_model_is_renamed_wherever_an_api_has_it() {
        let mut event = json!({ "type": "message_start", "message": { "id": "a", "model": "m" } });
        rename(&mut event, "x");
        assert_eq!(event["message"], json!({ "id": "a", "model": "x" }));
        let mut described = json!({ "id": "m", "object": "model" });
        rename_listed(&mut described, "x");
        assert_eq!(described, json!({ "id": "x", "object": "model" }));
        let mut listed = json!({ "models": [{ "name": "m" }], "data": [{ "id": "m" }] });
        rename_listed(&mut listed, "x");
        assert_eq!(listed, json!({ "models": [{ "name": "x" }], "data": [{ "id": "x" }] }));
    }

    #[test]
    fn nothing_but_texts_is_garbled() {
        let mut reply = json!({ "id": "content", "content": [{ "type": "text", "text": "äb" }] });
        garble(&mut reply);
        let content = json!([{ "type": "text", "text": "\u{fffd}\u{1}" }]);
        assert_eq!(reply, json!({ "id": "content", "content": content }));
    }
}
