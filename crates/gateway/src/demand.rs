//! What a request demands of its answer, and what of it an upstream can honour.

use std::collections::BTreeMap;

use exrail_grammar::Validator;
use exrail_server::ApiError;
use exrail_wire::{NamedSchema, ResponseFormat, StructuredFields, ToolChoiceField, Unknown};
use serde_json::{Map, Value, json};

use crate::{kind::Api, probe};

/// A request as it came, and what the guards need of it.
#[derive(Debug)]
pub(crate) struct Demand {
    /// The request; fields that nobody here knows go through.
    pub(crate) body: Map<String, Value>,
    /// The model that is named.
    pub(crate) model: Option<String>,
    pub(crate) streams: bool,
    /// Choices that are asked for, of one prompt.
    pub(crate) n: u64,
    /// What keeps a conversation on one upstream.
    pub(crate) session: Option<String>,
    pub(crate) seed: Option<Value>,
    pub(crate) form: Form,
}

/// What an answer is held to.
#[derive(Debug, Default)]
pub(crate) struct Form {
    /// Of the text.
    pub(crate) schema: Option<(Value, Validator)>,
    /// Of the arguments, by function.
    pub(crate) tools: BTreeMap<String, Validator>,
    pub(crate) choice: Option<ToolChoiceField>,
}

impl Form {
    /// Whether anything is demanded of the text.
    pub(crate) fn is_of_text(&self) -> bool {
        self.schema.is_some()
    }

    /// Whether nothing of a stream may be told before its end.
    pub(crate) fn holds_from_the_start(&self) -> bool {
        let is_called =
            matches!(self.choice, Some(ToolChoiceField::Required | ToolChoiceField::Named(_)));
        self.is_of_text() || is_called
    }

    /// What is held to, in records.
    pub(crate) fn name(&self) -> Option<&'static str> {
        match (&self.schema, self.tools.is_empty()) {
            (Some(_), _) => Some("json_schema"),
            (None, false) => Some("tools"),
            (None, true) => None,
        }
    }
}

impl Demand {
    /// Reads a request.
    ///
    /// # Errors
    /// Fields of the wrong type, and schemas that cannot be checked: an answer to one could not be vouched for.
    pub(crate) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let bad = |problem: String| ApiError::BadJson { problem };
        let value: Value = serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
        let Value::Object(body) = value else { return Err(bad("expected an object".into())) };
        let text = |name: &str| match body.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(field(name, "expected a text")),
        };
        let streams = match body.get("stream") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(streams)) => *streams,
            Some(_) => return Err(field("stream", "expected true or false")),
        };
        for old in ["functions", "function_call"] {
            if body.get(old).is_some_and(|value| !value.is_null()) {
                let why = "calls of the older form are not checked; use `tools` and `tool_choice`";
                return Err(ApiError::UnsupportedField { field: old.to_owned(), why });
            }
        }
        let n = match body.get("n") {
            None | Some(Value::Null) => 1,
            Some(n) => n
                .as_u64()
                .filter(|n| (1..=128).contains(n))
                .ok_or_else(|| field("n", "expected a number from 1 to 128"))?,
        };
        let (model, session) = (text("model")?, text("user")?);
        let seed = body.get("seed").filter(|seed| !seed.is_null()).cloned();
        let form = form(&body)?;
        Ok(Self { model, streams, n, session, seed, form, body })
    }

    /// The request as an upstream of this kind takes it.
    pub(crate) fn for_upstream(&self, api: &Api, model: &str) -> Value {
        let mut body = Value::Object(self.body.clone());
        body["model"] = model.into();
        if let Some((schema, _)) = &self.form.schema {
            // Also for `json_object`, which one of the kinds takes and ignores.
            let written = api.schema == crate::kind::SchemaField::ResponseFormat;
            if !written || self.body.get("response_format").is_none() {
                remove(&mut body, "response_format");
                remove(&mut body, "json_schema");
                probe::put_schema(api, &mut body, schema);
            }
        }
        if api.usage_on_request && !self.streams {
            body["stream_options"] = json!({ "include_usage": true });
        }
        body
    }
}

fn remove(body: &mut Value, name: &str) {
    if let Some(fields) = body.as_object_mut() {
        fields.remove(name);
    }
}

fn field(name: &str, problem: &str) -> ApiError {
    ApiError::BadField { field: name.to_owned(), problem: problem.to_owned() }
}

fn form(body: &Map<String, Value>) -> Result<Form, ApiError> {
    // What the upstream's own constraints are called stays the upstream's.
    let ours = ["response_format", "tools", "tool_choice"];
    let mut fields: Unknown = ours
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), body.get(*name)?.clone())))
        .collect();
    let top = body.get("json_schema").filter(|schema| !schema.is_null());
    if top.is_some_and(|schema| !schema.is_object()) {
        return Err(field("json_schema", "expected an object"));
    }
    let fields = StructuredFields::take(&mut fields).map_err(ApiError::from)?;
    if top.is_some() && !matches!(fields.response_format, None | Some(ResponseFormat::Text {})) {
        // One of them would be held to, and the other ignored.
        return Err(field("json_schema", "expected one of `response_format` and `json_schema`"));
    }
    let named = match (fields.response_format, top) {
        (Some(ResponseFormat::JsonSchema { json_schema: NamedSchema { schema, .. } }), _) => {
            Some(("response_format.json_schema.schema", schema.unwrap_or_else(any_object)))
        }
        (Some(ResponseFormat::JsonObject {}), None) => Some(("response_format", any_object())),
        (_, Some(schema)) => Some(("json_schema", schema.clone())),
        (Some(ResponseFormat::Text {}) | None, None) => None,
    };
    let schema = match named {
        None => None,
        Some((name, schema)) => {
            let validator = validator(name, &schema)?;
            Some((schema, validator))
        }
    };
    let mut tools = BTreeMap::new();
    for (at, tool) in fields.tools.into_iter().flatten().enumerate() {
        let parameters = tool.function.parameters.unwrap_or_else(any_object);
        let name = format!("tools[{at}].function.parameters");
        tools.insert(tool.function.name, validator(&name, &parameters)?);
    }
    Ok(Form { schema, tools, choice: fields.tool_choice })
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

fn validator(name: &str, schema: &Value) -> Result<Validator, ApiError> {
    Validator::new(schema).map_err(|error| ApiError::Constraint { field: name.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(body: &Value) -> Option<&'static str> {
        Demand::read(body.to_string().as_bytes()).err().map(|error| error.code())
    }

    #[test]
    fn two_schemas_of_one_answer_are_refused() {
        let schema = json!({ "type": "object" });
        let named =
            json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
        assert_eq!(code(&json!({ "json_schema": schema })), None);
        assert_eq!(code(&json!({ "response_format": named })), None);
        let both = json!({ "json_schema": schema, "response_format": named });
        assert_eq!(code(&both), Some("invalid_value"));
        assert_eq!(code(&json!({ "json_schema": "object" })), Some("invalid_value"));
    }
}
