//! Messages of a request as the chat templates take them: who may say what, and which call a result answers.
//!
//! Everything in them is somebody else's text. It reaches a template as data and never becomes a control
//! token; see `exrail_text::encode_prompt`.

use std::{collections::BTreeMap, sync::Arc};

use exrail_engine::{EngineHandle, Rotation};
use exrail_text::{ChatMessage, PlacedPrompt, SlotTokens, ToolCall, tools::ToolSpec};
use exrail_wire::{Content, ContentPart, RequestCall, RequestMessage, RotationFields};
use serde_json::{Map, Value};

use crate::{
    error::ApiError,
    extract::refuse_unknown,
    otlp::Said,
    rotation,
    rules::{self, HeldRules, Written},
    state::Services,
    structured::Opening,
    translate::{self, Slotted},
};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// `developer` is OpenAI's newer name of the system.
    fn named(name: &str) -> Option<Role> {
        Some(match name {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// The functions that were called so far, by the ids of the calls.
type Called = BTreeMap<String, String>;

/// What was said, as it came: who and what, without calls. Nothing that is added to it later is in here.
pub(crate) fn said(wire: &[RequestMessage]) -> Vec<Said> {
    let text = |content: &Content| match content {
        Content::Text(text) => text.clone(),
        Content::Parts(parts) => parts.iter().filter_map(|part| part.text.as_deref()).collect(),
    };
    let one = |message: &RequestMessage| Said {
        role: message.role.clone(),
        text: message.content.as_ref().map(text).unwrap_or_default(),
    };
    wire.iter().map(one).collect()
}

/// Messages of a request as the templates take them.
pub(crate) fn of_wire(wire: Vec<RequestMessage>) -> Result<Vec<ChatMessage>, ApiError> {
    if wire.is_empty() {
        return Err(bad("messages".into(), "expected at least one message, found none".into()));
    }
    let mut called = Called::new();
    wire.into_iter().enumerate().map(|(at, message)| of_one(at, message, &mut called)).collect()
}

fn of_one(
    at: usize,
    message: RequestMessage,
    called: &mut Called,
) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{at}].");
    refuse_unknown(&path, &message.unknown)?;
    let Some(role) = Role::named(&message.role) else {
        let problem = format!("expected system, user, assistant or tool, found `{}`", message.role);
        return Err(bad(format!("{path}role"), problem));
    };
    let only = |field: &str, is_there: bool, of: Role| match is_there && role != of {
        true => {
            let problem =
                format!("expected only in messages of {}, found one of {}", of.name(), role.name());
            Err(bad(format!("{path}{field}"), problem))
        }
        false => Ok(()),
    };
    only("tool_calls", message.tool_calls.is_some(), Role::Assistant)?;
    only("reasoning_content", message.reasoning_content.is_some(), Role::Assistant)?;
    only("tool_call_id", message.tool_call_id.is_some(), Role::Tool)?;
    only("name", message.name.is_some(), Role::Tool)?;
    let calls = calls(&path, message.tool_calls.unwrap_or_default(), called)?;
    let content = match message.content {
        Some(content) => Some(text(&path, content)?),
        None if !calls.is_empty() => None,
        None => return Err(bad(format!("{path}content"), "expected text, found none".into())),
    };
    let name = match role {
        Role::Tool => Some(answered(&path, message.tool_call_id.as_deref(), message.name, called)?),
        Role::System | Role::User | Role::Assistant => None,
    };
    Ok(ChatMessage {
        role: role.name().into(),
        content,
        reasoning_content: message.reasoning_content,
        tool_calls: calls,
        tool_call_id: message.tool_call_id,
        name,
    })
}

fn text(path: &str, content: Content) -> Result<String, ApiError> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let text = |(part_index, part): (usize, ContentPart)| {
        let path = format!("{path}content[{part_index}].");
        refuse_unknown(&path, &part.unknown)?;
        match (part.kind.as_str(), part.text) {
            ("text", Some(text)) => Ok(text),
            (kind, _) => {
                let problem = format!("expected a `text` part with text, found `{kind}`");
                Err(bad(format!("{path}type"), problem))
            }
        }
    };
    parts.into_iter().enumerate().map(text).collect()
}

/// The calls of an assistant's message; their ids are added to those that results may answer.
fn calls(
    path: &str,
    wire: Vec<RequestCall>,
    called: &mut Called,
) -> Result<Vec<ToolCall>, ApiError> {
    let mut calls = Vec::with_capacity(wire.len());
    for (at, call) in wire.into_iter().enumerate() {
        let path = format!("{path}tool_calls[{at}].");
        refuse_unknown(&path, &call.unknown)?;
        let function = call.function;
        // Templates walk through the arguments, so that text that is no object has no rendering.
        let arguments: Map<String, Value> =
            serde_json::from_str(&function.arguments).map_err(|error| {
                let problem = format!("expected a JSON object as text, found another one: {error}");
                bad(format!("{path}function.arguments"), problem)
            })?;
        if called.insert(call.id.clone(), function.name.clone()).is_some() {
            let problem = format!("expected an id of its own, found `{}` twice", call.id);
            return Err(bad(format!("{path}id"), problem));
        }
        calls.push(ToolCall { id: Some(call.id), name: function.name, arguments });
    }
    Ok(calls)
}

/// The function whose result a `tool` message is.
fn answered(
    path: &str,
    id: Option<&str>,
    name: Option<String>,
    called: &Called,
) -> Result<String, ApiError> {
    let field = format!("{path}tool_call_id");
    let Some(id) = id else {
        return Err(bad(field, "expected the id of the call that it answers, found none".into()));
    };
    let Some(function) = called.get(id) else {
        let problem = format!("expected the id of a call before it, found `{id}`");
        return Err(bad(field, problem));
    };
    match name {
        Some(name) if name != *function => {
            let problem = format!("expected `{function}`, which call `{id}` is of, found `{name}`");
            Err(bad(format!("{path}name"), problem))
        }
        Some(_) | None => Ok(function.clone()),
    }
}

/// A conversation as the model reads it.
pub(crate) struct Conversation {
    messages: Vec<ChatMessage>,
    /// Messages of ours in front of those of the request.
    n_added: usize,
    pub(crate) placed: PlacedPrompt,
    /// Where its answer begins.
    pub(crate) opening: Opening,
    /// The hard rules of the request, which its tokens say.
    pub(crate) rules: Option<Arc<HeldRules>>,
    /// The message that holds them.
    ruled: Option<usize>,
}

impl Conversation {
    /// Tells the model of the tools, renders and encodes it. Hard rules that were written into it are read back out of
    /// its tokens.
    pub(crate) fn new(
        services: &Services,
        said: Vec<ChatMessage>,
        tools: &[ToolSpec],
        written: Option<&Written>,
    ) -> Result<Conversation, ApiError> {
        let format = services.tool_format();
        let n_said = said.len() - written.map_or(0, |written| written.n_added);
        let has_calls = said.iter().any(|message| !message.tool_calls.is_empty());
        let (messages, told) = match tools.is_empty() && !has_calls {
            true => (said, None),
            false => format.frame(said, tools),
        };
        let engine = &services.engine;
        let place = written.and_then(|written| rules::find(&written.set, &messages));
        let slots: Vec<_> = place.iter().cloned().collect();
        let Slotted { placed, slots, text } =
            translate::slotted_prompt(engine, &messages, told.as_deref(), &slots)?;
        let slot: Option<&SlotTokens> = slots.first().and_then(Option::as_ref);
        let held = |written: &Written| HeldRules::of(&written.set, engine, &placed.ids, slot);
        let rules = written.map(held).transpose()?.map(Arc::new);
        let ruled = place.map(|(message, _)| message);
        let opening = Opening { lead: format.thought_lead(&text), format: format.clone() };
        let n_added = messages.len().saturating_sub(n_said);
        Ok(Conversation { messages, n_added, placed, opening, rules, ruled })
    }

    /// What happens when its answer outgrows the cache; the request counts its own messages only.
    pub(crate) fn rotation(
        &self,
        engine: &EngineHandle,
        fields: Option<RotationFields>,
    ) -> Result<Rotation, ApiError> {
        let fields = fields.map(|mut fields| {
            for pin in fields.pin_messages.iter_mut().flatten() {
                *pin = pin.saturating_add(self.n_added);
            }
            fields
        });
        rotation::of_chat(engine, fields, (&self.messages, &self.placed.places), self.ruled)
    }
}

fn bad(field: String, problem: String) -> ApiError {
    ApiError::BadField { field, problem }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(messages: Value) -> Result<Vec<ChatMessage>, ApiError> {
        of_wire(serde_json::from_value(messages).unwrap())
    }

    fn call(id: &str, arguments: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": "look_up", "arguments": arguments}})
    }

    #[test]
    fn a_result_carries_the_name_of_the_function_that_was_called() {
        let messages = of(json!([
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": null, "tool_calls": [call("a", "{\"q\": 1}")]},
            {"role": "tool", "tool_call_id": "a", "content": "two"},
        ]))
        .unwrap();
        assert_eq!(messages[1].content, None);
        assert_eq!(messages[1].tool_calls[0].arguments["q"], 1);
        assert_eq!(messages[2].name.as_deref(), Some("look_up"));
    }

    #[test]
    fn what_no_template_could_render_is_refused_with_its_path() {
        let asked = json!({"role": "user", "content": "x"});
        let calls =
            |calls: Value| json!({"role": "assistant", "content": null, "tool_calls": calls});
        let cases = [
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "assistant", "content": null}]), "messages[0].content"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user", "content": "x", "name": "Ann"}]), "messages[0].name"),
            (json!([{"role": "user", "content": "x", "tool_calls": []}]), "messages[0].tool_calls"),
            (
                json!([asked, calls(json!([call("a", "[1]")]))]),
                "messages[1].tool_calls[0].function.arguments",
            ),
            (
                json!([asked, calls(json!([call("a", "")]))]),
                "messages[1].tool_calls[0].function.arguments",
            ),
            (
                json!([asked, calls(json!([call("a", "{}"), call("a", "{}")]))]),
                "messages[1].tool_calls[1].id",
            ),
            (json!([asked, {"role": "tool", "content": "x"}]), "messages[1].tool_call_id"),
            (
                json!([asked, calls(json!([call("a", "{}")])),
                    {"role": "tool", "content": "x", "tool_call_id": "b"}]),
                "messages[2].tool_call_id",
            ),
            (
                json!([asked, calls(json!([call("a", "{}")])),
                    {"role": "tool", "content": "x", "tool_call_id": "a", "name": "other"}]),
                "messages[2].name",
            ),
        ];
        for (messages, expected) in cases {
            let error = of(messages.clone()).unwrap_err();
            let ApiError::BadField { field, .. } = &error else { panic!("{messages}: {error}") };
            assert_eq!(field, expected, "{messages}");
        }
    }
}
