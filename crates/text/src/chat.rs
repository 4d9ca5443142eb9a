//! What a chat template is given: messages, tools, documents and named extras, and which of their
//! strings may carry somebody else's text.
//!
//! Every string comes from a user, a tool or a caller and is untrusted. Two kinds are *fixed*:
//! keys, and short words that templates compare or count (`"type": "object"`, identifiers of calls,
//! extras such as `reasoning_effort`). Altering those would change what the template does, so
//! `provenance` leaves them alone, and `encode_prompt` refuses one that contains a control literal.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use crate::template::TemplateError;
use crate::template_functions::number;

/// Names of the context that an extra must not replace.
const RESERVED: [&str; 7] =
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", NOW];
/// Where `strftime_now` finds the time.
pub(crate) const NOW: &str = "__now";
/// Keys whose values templates compare or count, if these are plain words.
const WORD_KEYS: [&str; 3] = ["type", "id", "tool_call_id"];

/// One message of a chat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool`: ASCII letters, digits, `_` and `-`.
    pub role: String,
    /// What the message says, or `None` beside tool calls. Never trusted.
    pub content: Option<String>,
    /// What the model thought before it answered. Never trusted.
    pub reasoning_content: Option<String>,
    /// Calls that an assistant made. Never trusted.
    pub tool_calls: Vec<ToolCall>,
    /// The call that a `tool` message answers. Never trusted.
    pub tool_call_id: Option<String>,
    /// The function that a `tool` message comes from, or who speaks. Never trusted.
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message of nothing but text.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> ChatMessage {
        ChatMessage { role: role.into(), content: Some(content.into()), ..ChatMessage::default() }
    }
}

/// A call of a function by an assistant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// Identifies the call; absent where the model gives none.
    pub id: Option<String>,
    /// The function.
    pub name: String,
    /// Its arguments by name. An object and not its text, because templates iterate over it.
    pub arguments: Map<String, Json>,
}

/// How to render a chat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// End with the beginning of an assistant turn, so that the model answers.
    pub add_generation_prompt: bool,
    /// What `strftime_now` shows, in UTC; `None` is the present.
    pub now: Option<SystemTime>,
    /// JSON definitions of functions that may be called; `None` is Python's.
    pub tools: Option<Vec<Json>>,
    /// Documents to answer from, for the templates that know them; `None` is Python's.
    pub documents: Option<Vec<Json>>,
    /// Further variables, such as `enable_thinking` (`chat_template_kwargs` elsewhere).
    pub extras: Map<String, Json>,
}

/// One walk over all strings of a chat: changes the texts, and notes what it met.
pub(crate) struct Walk<'a> {
    change: &'a dyn Fn(&str) -> String,
    /// The texts before they were changed.
    pub(crate) texts: Vec<String>,
    /// Keys and words, which are never changed.
    pub(crate) fixed: Vec<String>,
}

impl<'a> Walk<'a> {
    /// A walk that puts `change(text)` in the place of every text.
    pub(crate) fn new(change: &'a dyn Fn(&str) -> String) -> Walk<'a> {
        Walk { change, texts: Vec::new(), fixed: Vec::new() }
    }

    /// The variables of a template, without those that belong to the model.
    pub(crate) fn context(
        &mut self,
        messages: &[ChatMessage],
        options: &RenderOptions,
    ) -> Vec<(String, Value)> {
        let now = options.now.unwrap_or_else(SystemTime::now);
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let messages: Vec<Value> = messages.iter().map(|it| self.message(it)).collect();
        let mut variables = vec![
            ("messages".to_owned(), Value::from(messages)),
            ("tools".to_owned(), self.optional_list(options.tools.as_deref())),
            ("documents".to_owned(), self.optional_list(options.documents.as_deref())),
            ("add_generation_prompt".to_owned(), Value::from(options.add_generation_prompt)),
            (NOW.to_owned(), Value::from(now)),
        ];
        for (name, json) in &options.extras {
            let value = match json.as_str() {
                Some(text) if is_word(text) => self.word(text),
                Some(_) | None => self.json(json, name),
            };
            variables.push((name.clone(), value));
        }
        variables
    }

    fn message(&mut self, message: &ChatMessage) -> Value {
        let content = message.content.as_deref();
        let mut pairs = vec![
            ("role", Value::from(message.role.as_str())),
            ("content", content.map_or(Value::from(()), |it| self.text(it))),
        ];
        if let Some(reasoning) = &message.reasoning_content {
            pairs.push(("reasoning_content", self.text(reasoning)));
        }
        if !message.tool_calls.is_empty() {
            let calls: Vec<Value> = message.tool_calls.iter().map(|it| self.call(it)).collect();
            pairs.push(("tool_calls", Value::from(calls)));
        }
        if let Some(id) = &message.tool_call_id {
            pairs.push(("tool_call_id", self.keyed(id, "tool_call_id")));
        }
        if let Some(name) = &message.name {
            pairs.push(("name", self.text(name)));
        }
        Value::from_pairs(pairs)
    }

    fn call(&mut self, call: &ToolCall) -> Value {
        let function = Value::from_pairs([
            ("name", self.text(&call.name)),
            ("arguments", self.object(&call.arguments)),
        ]);
        let mut pairs = Vec::new();
        if let Some(id) = &call.id {
            pairs.push(("id", self.keyed(id, "id")));
        }
        pairs.push(("type", Value::from("function")));
        pairs.push(("function", function));
        Value::from_pairs(pairs)
    }

    fn optional_list(&mut self, items: Option<&[Json]>) -> Value {
        items.map_or(Value::from(()), |items| {
            Value::from(items.iter().map(|it| self.json(it, "")).collect::<Vec<_>>())
        })
    }

    fn object(&mut self, map: &Map<String, Json>) -> Value {
        self.fixed.extend(map.keys().cloned());
        Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), self.json(item, key))))
    }

    fn json(&mut self, json: &Json, key: &str) -> Value {
        match json {
            Json::Null => Value::from(()),
            Json::Bool(value) => Value::from(*value),
            Json::Number(value) => number(value),
            Json::String(text) => self.keyed(text, key),
            Json::Array(items) => {
                Value::from(items.iter().map(|it| self.json(it, "")).collect::<Vec<_>>())
            }
            Json::Object(map) => self.object(map),
        }
    }

    fn keyed(&mut self, text: &str, key: &str) -> Value {
        if WORD_KEYS.contains(&key) && is_word(text) { self.word(text) } else { self.text(text) }
    }

    fn word(&mut self, text: &str) -> Value {
        self.fixed.push(text.to_owned());
        Value::from(text)
    }

    fn text(&mut self, text: &str) -> Value {
        self.texts.push(text.to_owned());
        Value::from((self.change)(text))
    }
}

fn is_word(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(plain)
}

/// Refuses roles, which are written into the prompt as they are, with characters that no role
/// has, and extras that would replace another variable.
pub(crate) fn check(
    messages: &[ChatMessage],
    options: &RenderOptions,
) -> Result<(), TemplateError> {
    for (index, message) in messages.iter().enumerate() {
        if !is_word(&message.role) {
            let found = message.role.chars().take(64).collect();
            return Err(TemplateError::BadRole { index, found });
        }
    }
    match options.extras.keys().find(|name| RESERVED.contains(&name.as_str())) {
        Some(name) => Err(TemplateError::ReservedName { name: name.clone() }),
        None => Ok(()),
    }
}
