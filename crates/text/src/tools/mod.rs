//! Tool calls: how each family of models writes them, what a grammar must allow, and how they are read
//! out of generated text.
//!
//! ```text
//! at load:     ChatTemplate + Tokenizer ─ ToolFormat::detect ─> ToolFormat
//! request in:  tools ─ ToolFormat::frame ─> messages and tools for the template
//!              tools + choice ─ ToolFormat::grammar ─> Composed (Lark with a hole for each schema)
//! answer out:  text ─ CallParser ─> Piece: Thought, Text, Call, Malformed
//! ```
//!
//! A call comes out whole or not at all: arguments are not released before their last bracket. What looks
//! like a call and is none is [`Piece::Malformed`] with its text, never a call. Whether arguments conform to
//! the schema of their tool is not decided here: the crate `grammar` has the validator.
//!
//! What whoever makes the text must pass on: the markers of a family may be control tokens, whose literals
//! are no text for a reader. Those in [`ToolFormat::markers`] have to reach the parser as their literal
//! ([`ToolFormat::marker_text`]), at their place between the other texts.

mod call;
mod detect;
mod fallback;
mod json;
mod judge;
mod lark;
mod parser;
mod region;
mod thoughts;
mod xml;

use serde_json::{Map, Value, json};

pub use call::{CallFault, Malformed, ParsedCall, Piece};
pub use lark::Composed;
pub use parser::CallParser;
pub use thoughts::{ThoughtLead, Thoughts};

use crate::{ChatMessage, ChatTemplate, Tokenizer};

/// Longest name of a tool.
pub(crate) const MAX_NAME_BYTES: usize = 64;

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ToolFamily {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`: Qwen 2 to 3, Hermes, Granite 4. Read, too, where a
    /// model writes `<tool_call><function=…><parameter=…>` (Qwen-Coder).
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, or behind `<|python_tag|>`: Llama 3.1 to 3.3.
    Llama3,
    /// `[TOOL_CALLS] [{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]name[ARGS]{…}`: Mistral.
    Mistral,
    /// A fence of three backticks and `tool_call`, with `{"name": …, "arguments": {…}}` in it: Gemma, which has no
    /// format of its own.
    Gemma,
    /// As `Hermes`, told to the model by a system text of ours: every other family.
    Generic,
}

impl ToolFamily {
    /// The name in configurations and errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama3 => "llama3",
            Self::Mistral => "mistral",
            Self::Gemma => "gemma",
            Self::Generic => "generic",
        }
    }
}

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSpec {
    /// 1 to 64 ASCII letters, digits, `_` and `-`.
    name: String,
    /// What it does, for the model. Never trusted.
    description: Option<String>,
    /// The JSON Schema of its arguments: an object, whose values are objects.
    parameters: Map<String, Value>,
}

/// A tool or a choice that cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// A name that cannot stand in every format.
    #[error("tool name: expected 1 to 64 letters, digits, `_` or `-`, found {found:?}")]
    BadName {
        /// The name, at most its first 80 characters.
        found: String,
    },
    /// Parameters that do not describe an object.
    #[error("parameters of tool `{name}`: expected a JSON Schema of type `object`, found {found}")]
    NotAnObject {
        /// The tool.
        name: String,
        /// What was found, cut.
        found: String,
    },
    /// Two tools of one name.
    #[error("tools: expected names that differ, found `{name}` twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A call is demanded and there is nothing to call.
    #[error("tools: expected at least one to choose from, found none")]
    NoTools,
    /// The chosen tool is not among the tools.
    #[error("tool_choice: expected one of the tools, found `{name}`")]
    UnknownChoice {
        /// The name that was chosen.
        name: String,
    },
    /// A limit that allows no call.
    #[error("calls in an answer: expected at least 1, found 0")]
    NoCalls,
}

impl ToolSpec {
    /// Checks the name and that the parameters are of an object. `Null` parameters are those of a function
    /// without arguments; a schema without `type` gets `object`.
    ///
    /// # Errors
    /// [`ToolError::BadName`], [`ToolError::NotAnObject`].
    pub fn new(
        name: impl Into<String>,
        description: Option<String>,
        parameters: Value,
    ) -> Result<ToolSpec, ToolError> {
        let name = name.into();
        if !is_name(&name) {
            return Err(ToolError::BadName { found: name.chars().take(80).collect() });
        }
        let mut parameters = match parameters {
            Value::Object(schema) => schema,
            Value::Null => {
                let none =
                    json!({ "type": "object", "properties": {}, "additionalProperties": false });
                none.as_object().cloned().unwrap_or_default()
            }
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                let found = other.to_string().chars().take(80).collect();
                return Err(ToolError::NotAnObject { name, found });
            }
        };
        match parameters.get("type") {
            None => {
                parameters.insert("type".to_owned(), "object".into());
            }
            Some(Value::String(kind)) if kind == "object" => {}
            Some(other) => {
                let found = format!("type {other}").chars().take(80).collect();
                return Err(ToolError::NotAnObject { name, found });
            }
        }
        Ok(ToolSpec { name, description, parameters })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it does, in the caller's words.
    #[must_use]
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// The JSON Schema of its arguments.
    #[must_use]
    pub fn parameters(&self) -> &Map<String, Value> {
        &self.parameters
    }

    /// The schema that arguments are held to: without fields that are not named, unless the schema speaks of
    /// them, or is put together from others (G-13: no call has extra fields).
    #[must_use]
    pub fn arguments_schema(&self) -> Value {
        const SPEAKS: [&str; 9] = [
            "additionalProperties",
            "unevaluatedProperties",
            "patternProperties",
            "allOf",
            "anyOf",
            "oneOf",
            "if",
            "$ref",
            "$dynamicRef",
        ];
        let mut schema = self.parameters.clone();
        if schema.contains_key("properties") && !SPEAKS.iter().any(|key| schema.contains_key(*key))
        {
            schema.insert("additionalProperties".to_owned(), false.into());
        }
        Value::Object(schema)
    }

    /// The definition as templates read it: `{"type": "function", "function": {…}}`.
    #[must_use]
    pub fn definition(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".to_owned(), self.name.clone().into());
        // Templates write `tool.function.description` without asking whether it is there.
        let description = self.description.clone().unwrap_or_default();
        function.insert("description".to_owned(), description.into());
        function.insert("parameters".to_owned(), Value::Object(self.parameters.clone()));
        json!({ "type": "function", "function": function })
    }
}

/// Whether every format can carry `name`.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain)
}

/// What the caller wants called (`tool_choice`). For `none` there is no grammar, and a parser without tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallChoice<'a> {
    /// Text, or text and calls: the model decides.
    Auto,
    /// At least one call.
    Required,
    /// At least one call, and only of this tool.
    Named(&'a str),
}

/// Bounds of the calls in one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLimits {
    /// Most calls, at least 1. One for `parallel_tool_calls: false`. (G-13: `max_tool_calls` 3.)
    pub calls: usize,
    /// Most bytes of one call, its markers included, and of a list of calls.
    pub bytes: usize,
}

impl Default for CallLimits {
    fn default() -> CallLimits {
        CallLimits { calls: 3, bytes: 256 * 1024 }
    }
}

/// How the identifier of a call looks; the server draws it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdShape {
    /// Begins it.
    pub prefix: &'static str,
    /// ASCII letters and digits that follow.
    pub n_alphanumerics: usize,
}

/// How one model writes tool calls and thoughts. Made once, when it is loaded; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolFormat {
    family: ToolFamily,
    /// The template writes the tools itself.
    describes_tools: bool,
    /// The template writes `[TOOL_CALLS]name[ARGS]{…}` and no list.
    has_named_arguments: bool,
    /// The template has a place for a system message.
    takes_system: bool,
    thoughts: Option<Thoughts>,
    /// Control tokens with their literals, ascending by id.
    controls: Vec<(u32, String)>,
}

impl ToolFormat {
    /// Finds the format of a model: by what its template makes of a chat with a tool, a call and a result,
    /// first rule first. Nothing is taken from names of models.
    ///
    /// 1. It writes `[TOOL_CALLS]`: Mistral; with `[ARGS]` the newer form.
    /// 2. It writes `<tool_call>`: Hermes.
    /// 3. It writes `{"name": …, "parameters": …}` for a call: Llama 3.
    /// 4. It opens turns with `<start_of_turn>`: Gemma.
    /// 5. Anything else, and no template: Generic.
    ///
    /// The model thinks if its vocabulary or its template has both markers of a thought.
    #[must_use]
    pub fn detect(template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> ToolFormat {
        detect::detect(template, tokenizer, None)
    }

    /// As [`ToolFormat::detect`], with a family that somebody chose. If the template shows another one, tools
    /// are described by [`ToolFormat::frame`].
    #[must_use]
    pub fn detect_as(
        family: ToolFamily,
        template: Option<&ChatTemplate>,
        tokenizer: &Tokenizer,
    ) -> ToolFormat {
        detect::detect(template, tokenizer, Some(family))
    }

    /// The family.
    #[must_use]
    pub fn family(&self) -> ToolFamily {
        self.family
    }

    /// Whether the chat template describes the tools; otherwise [`ToolFormat::frame`] does.
    #[must_use]
    pub fn describes_tools(&self) -> bool {
        self.describes_tools
    }

    /// The markers of a thought, if this model thinks.
    #[must_use]
    pub fn thoughts(&self) -> Option<&Thoughts> {
        self.thoughts.as_ref()
    }

    /// Control ids that must reach the parser as their literal, ascending; often none.
    #[must_use]
    pub fn markers(&self) -> Vec<u32> {
        self.controls.iter().map(|(id, _)| *id).collect()
    }

    /// The literal of one of [`ToolFormat::markers`].
    #[must_use]
    pub fn marker_text(&self, id: u32) -> Option<&str> {
        let at = self.controls.binary_search_by_key(&id, |(control, _)| *control).ok()?;
        Some(&self.controls[at].1)
    }

    /// `call_` and 24 letters and digits; for Mistral, whose templates refuse anything else, exactly 9.
    #[must_use]
    pub fn id_shape(&self) -> IdShape {
        match self.family {
            ToolFamily::Mistral => IdShape { prefix: "", n_alphanumerics: 9 },
            ToolFamily::Hermes | ToolFamily::Llama3 | ToolFamily::Gemma | ToolFamily::Generic => {
                IdShape { prefix: "call_", n_alphanumerics: 24 }
            }
        }
    }

    /// What the template gets: the messages, and the definitions of the tools if it describes them itself.
    /// Where it does not, tools, calls and results are written into the messages in this family's syntax
    /// (see `docs/tools.md`); what is written there is as untrusted as any message.
    #[must_use]
    pub fn frame(
        &self,
        messages: Vec<ChatMessage>,
        tools: &[ToolSpec],
    ) -> (Vec<ChatMessage>, Option<Vec<Value>>) {
        if self.describes_tools {
            let definitions = tools.iter().map(ToolSpec::definition).collect();
            return (messages, (!tools.is_empty()).then_some(definitions));
        }
        (fallback::written_out(self, messages, tools), None)
    }

    /// Whether the template says what a system message does.
    #[must_use]
    pub fn takes_system(&self) -> bool {
        self.takes_system
    }

    /// Whether the rendered prompt has opened a thought, or the answer may open one.
    #[must_use]
    pub fn thought_lead(&self, prompt: &str) -> ThoughtLead {
        self.thoughts.as_ref().map_or(ThoughtLead::Absent, |thoughts| thoughts.lead(prompt))
    }

    /// What an answer with these tools may be. Text before the first call is free, but cannot hold the
    /// marker that opens a call; behind the marker there is exactly one call of the family, the name one of
    /// the tools', the arguments a value of that tool's schema. Behind the last call the answer ends.
    ///
    /// # Errors
    /// [`ToolError::NoTools`], [`ToolError::DuplicateName`], [`ToolError::UnknownChoice`],
    /// [`ToolError::NoCalls`].
    pub fn grammar(
        &self,
        tools: &[ToolSpec],
        choice: CallChoice<'_>,
        lead: ThoughtLead,
        limits: CallLimits,
    ) -> Result<Composed, ToolError> {
        let chosen = chosen(tools, choice)?;
        if limits.calls == 0 {
            return Err(ToolError::NoCalls);
        }
        Ok(lark::calls(self, &chosen, choice, lead, limits))
    }

    /// A value of `schema`, behind a thought if there is one: the lock of `response_format`.
    #[must_use]
    pub fn schema_grammar(&self, schema: Value, lead: ThoughtLead) -> Composed {
        lark::schema(self, schema, lead)
    }

    /// What takes an answer apart. Without tools nothing is a call, and only the thought is taken off.
    #[must_use]
    pub fn parser(&self, tools: &[ToolSpec], lead: ThoughtLead, limits: CallLimits) -> CallParser {
        CallParser::new(self, tools, lead, limits)
    }

    /// Id of the control token that `literal` is, or `None` where it is ordinary text.
    pub(crate) fn control(&self, literal: &str) -> Option<u32> {
        self.controls.iter().find(|(_, text)| text == literal).map(|(id, _)| *id)
    }
}

/// The tools that may be called.
fn chosen<'a>(
    tools: &'a [ToolSpec],
    choice: CallChoice<'_>,
) -> Result<Vec<&'a ToolSpec>, ToolError> {
    for (at, tool) in tools.iter().enumerate() {
        if tools[..at].iter().any(|other| other.name == tool.name) {
            return Err(ToolError::DuplicateName { name: tool.name.clone() });
        }
    }
    if tools.is_empty() {
        return Err(ToolError::NoTools);
    }
    match choice {
        CallChoice::Auto | CallChoice::Required => Ok(tools.iter().collect()),
        CallChoice::Named(name) => match tools.iter().find(|tool| tool.name == name) {
            Some(tool) => Ok(vec![tool]),
            None => Err(ToolError::UnknownChoice { name: name.chars().take(80).collect() }),
        },
    }
}
