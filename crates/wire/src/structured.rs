//! What an answer has to be: response formats, tools, and exrail's own constraints.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{FieldError, Unknown, sampling::field};

/// The constraints of a request; absent fields constrain nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StructuredFields {
    /// OpenAI's: text, any JSON object, or a value of a schema.
    pub response_format: Option<ResponseFormat>,
    /// exrail's: the answer is a value of this JSON Schema.
    pub json_schema: Option<Value>,
    /// exrail's: this regular expression matches the answer as a whole.
    pub regex: Option<String>,
    /// exrail's: the answer is a sentence of this grammar.
    pub grammar: Option<GrammarField>,
    /// Functions that may be called.
    pub tools: Option<Vec<ToolField>>,
    /// Whether and which of them.
    pub tool_choice: Option<ToolChoiceField>,
    /// Whether one answer may hold several calls; true when absent.
    pub parallel_tool_calls: Option<bool>,
}

/// The form of an answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Free text.
    Text {},
    /// Any JSON object.
    JsonObject {},
    /// A value of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
}

/// A schema as OpenAI's API writes it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedSchema {
    /// `[A-Za-z0-9_-]`, 1 to 64 of them.
    pub name: String,
    /// For the reader; the model is not told.
    pub description: Option<String>,
    /// The schema; any JSON object when absent.
    pub schema: Option<Value>,
    /// `false` leaves objects open that do not say whether they are.
    pub strict: Option<bool>,
}

/// A grammar and its language.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrammarField {
    /// The language.
    #[serde(rename = "type")]
    pub kind: GrammarKind,
    /// The grammar.
    pub text: String,
}

/// The language of a grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrammarKind {
    /// Lark in llguidance's dialect, rule `start`.
    Lark,
    /// llama.cpp's, rule `root`.
    Gbnf,
}

/// Something that may be called.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolField {
    /// `function` is the only kind served.
    #[serde(rename = "type")]
    pub kind: ToolKind,
    /// The function.
    pub function: FunctionField,
}

/// What can be called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolKind {
    /// A function of the client.
    #[default]
    Function,
}

/// A function of the client.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionField {
    /// `[A-Za-z0-9_-]`, 1 to 64 of them.
    pub name: String,
    /// What it does; the model reads it.
    pub description: Option<String>,
    /// Schema of its arguments, of type object; none when absent.
    pub parameters: Option<Value>,
    /// `false` leaves objects open that do not say whether they are.
    pub strict: Option<bool>,
    /// What the client takes the contract's hash for; another one is refused.
    pub contract_hash: Option<String>,
}

/// Whether and which functions are called.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub enum ToolChoiceField {
    /// The model decides.
    Auto,
    /// None is called.
    None,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
}

/// A choice by name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedChoice {
    #[serde(rename = "type")]
    _kind: ToolKind,
    function: ChosenFunction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChosenFunction {
    name: String,
}

impl TryFrom<Value> for ToolChoiceField {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value.as_str() {
            Some("auto") => return Ok(Self::Auto),
            Some("none") => return Ok(Self::None),
            Some("required") => return Ok(Self::Required),
            Some(found) => {
                return Err(format!(
                    "expected auto, none, required or a function, found `{found}`"
                ));
            }
            None => {}
        }
        if !value.is_object() {
            return Err(format!("expected a word or an object, found {value}"));
        }
        let named: NamedChoice =
            serde_json::from_value(value).map_err(|error| error.to_string())?;
        Ok(Self::Named(named.function.name))
    }
}

impl StructuredFields {
    /// Takes these fields out of a request's undeclared ones.
    ///
    /// # Errors
    /// The first field of the wrong type or form.
    pub fn take(unknown: &mut Unknown) -> Result<Self, FieldError> {
        Ok(Self {
            response_format: field(unknown, "response_format")?,
            json_schema: field(unknown, "json_schema")?,
            regex: field(unknown, "regex")?,
            grammar: field(unknown, "grammar")?,
            tools: field(unknown, "tools")?,
            tool_choice: field(unknown, "tool_choice")?,
            parallel_tool_calls: field(unknown, "parallel_tool_calls")?,
        })
    }

    /// The first field that is there.
    #[must_use]
    pub fn first(&self) -> Option<&'static str> {
        let fields = [
            ("response_format", self.response_format.is_some()),
            ("json_schema", self.json_schema.is_some()),
            ("regex", self.regex.is_some()),
            ("grammar", self.grammar.is_some()),
            ("tools", self.tools.is_some()),
            ("tool_choice", self.tool_choice.is_some()),
            ("parallel_tool_calls", self.parallel_tool_calls.is_some()),
        ];
        fields.into_iter().find(|(_, is_there)| *is_there).map(|(name, _)| name)
    }
}

/// A call in a message of a request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RequestCall {
    /// Which a `tool` message answers.
    pub id: String,
    /// `function`.
    #[serde(rename = "type", default)]
    pub kind: ToolKind,
    /// What was called.
    pub function: RequestCallFunction,
    /// Of an answer that comes back as it was told; it means nothing in a request.
    pub exrail_tainted: Option<Vec<String>>,
    /// The same.
    pub exrail_dedupe_key: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The function of a call, and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RequestCallFunction {
    /// The function.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// A call in an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCallMessage {
    /// Names it in the messages that follow.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: ToolKind,
    /// What is called.
    pub function: CalledFunction,
    /// JSON pointers of the arguments that were copied from the results of tools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exrail_tainted: Vec<String>,
    /// The same for the same call, whatever the order of its arguments: whoever runs tools runs it once (G-29).
    pub exrail_dedupe_key: String,
}

/// The function of a call, and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CalledFunction {
    /// The function.
    pub name: String,
    /// A JSON object as text, whole and valid against the function's parameters.
    pub arguments: String,
}

/// A call, or a part of it, in an event of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCallDelta {
    /// Which call of the choice, from 0.
    pub index: usize,
    /// In the call's first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// In the call's first event.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<ToolKind>,
    /// Its name in the first event, its arguments after that.
    pub function: FunctionDelta,
    /// JSON pointers of the arguments that were copied from the results of tools; in the call's first event.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exrail_tainted: Vec<String>,
    /// [`ToolCallMessage::exrail_dedupe_key`]; in the call's first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail_dedupe_key: Option<String>,
}

/// What is new of a called function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FunctionDelta {
    /// In the call's first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of the JSON object's text.
    pub arguments: String,
}

/// What the structured answers of a request were held to, in its trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StructuredRecord {
    /// SHA-256 of the constraint, 64 hexadecimal digits.
    pub schema_hash: String,
    /// The functions that could be called.
    pub contracts: Vec<ContractRecord>,
    /// Whether every choice is a whole answer.
    pub is_complete: bool,
    /// Calls that were released.
    pub n_tool_calls: usize,
    /// The calls that were released, in order.
    pub tool_calls: Vec<CallRecord>,
    /// Answers that did not conform and were generated once more.
    pub n_repairs: usize,
}

/// A call that was released (G-29).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CallRecord {
    /// The function.
    pub name: String,
    /// SHA-256 of the function, its arguments whatever the order of their keys, and the memory's revision, 64
    /// hexadecimal digits.
    pub dedupe_key: String,
}

/// What a function is called by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContractRecord {
    /// The function.
    pub name: String,
    /// SHA-256 of its parameters and the version of their reading, 64 hexadecimal digits.
    pub contract_hash: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(fields: Value) -> Result<StructuredFields, FieldError> {
        let mut unknown: Unknown = serde_json::from_value(fields).unwrap();
        StructuredFields::take(&mut unknown)
    }

    /// B8: a field at the wrong level is named, never dropped.
    #[test]
    fn b8_a_misplaced_field_is_refused_by_name() {
        let cases = [
            (json!({"response_format": {"type": "json_object", "schema": {}}}), "`schema`"),
            (json!({"response_format": {"type": "text", "strict": true}}), "`strict`"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "json_schema": {}}}}),
                "`json_schema`",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}, "strict": true}}),
                "`strict`",
            ),
            (json!({"response_format": {"type": "yaml"}}), "`yaml`"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "schema": {}}}]}),
                "`schema`",
            ),
            (json!({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}), "`retrieval`"),
            (json!({"tool_choice": "any"}), "`any`"),
            (json!({"tool_choice": {"type": "function", "name": "f"}}), "`name`"),
            (json!({"grammar": {"type": "ebnf", "text": ""}}), "`ebnf`"),
            (json!({"regex": 5}), "expected a string"),
        ];
        for (fields, named) in cases {
            let error = take(fields.clone()).unwrap_err();
            assert!(error.problem.contains(named), "{fields}: {}", error.problem);
            assert!(fields.get(&error.field).is_some(), "{fields}: {}", error.field);
        }
    }

    #[test]
    fn choices_are_words_or_a_function() {
        let choice = |value: Value| take(json!({"tool_choice": value})).unwrap().tool_choice;
        assert_eq!(choice(json!("required")), Some(ToolChoiceField::Required));
        let named = json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(choice(named), Some(ToolChoiceField::Named("f".into())));
        assert_eq!(choice(json!(null)), None);
    }

    #[test]
    fn properties_keep_the_order_in_which_they_were_written() {
        let schema = json!({"properties": {"z": {}, "a": {}}});
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        let taken = take(json!({"response_format": format})).unwrap().response_format;
        let Some(ResponseFormat::JsonSchema { json_schema }) = taken else { panic!() };
        assert_eq!(json_schema.schema.unwrap().to_string(), schema.to_string());
    }
}
