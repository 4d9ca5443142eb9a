//! Which format a model writes, by what its chat template makes of a probe.

use crate::chat::{ChatMessage, RenderOptions, ToolCall};
use crate::{ChatTemplate, Tokenizer};

use super::region::{ARGUMENTS, CALL_ID};
use super::{Thoughts, ToolFamily, ToolFormat, ToolSpec};

/// Words that no template writes by itself.
const TOOL: &str = "exrail_probe";
const VALUE: &str = "exrail_value";
const SYSTEM: &str = "exrail_system";
/// Markers of thoughts, of all families.
pub(super) const THOUGHTS: [(&str, &str); 2] = [("<think>", "</think>"), ("[THINK]", "[/THINK]")];

pub(super) fn detect(
    template: Option<&ChatTemplate>,
    tokenizer: &Tokenizer,
    chosen: Option<ToolFamily>,
) -> ToolFormat {
    let probes = template.map_or_else(Probes::default, Probes::of);
    let found = probes.family();
    let family = chosen.unwrap_or(found);
    let is_described = probes.described && probes.called.contains(VALUE);
    let describes_tools = match family {
        ToolFamily::Hermes | ToolFamily::Llama3 | ToolFamily::Mistral => {
            is_described && family == found
        }
        // What the template would describe is another syntax than the one that is read.
        ToolFamily::Gemma | ToolFamily::Generic => false,
    };
    let thoughts = thoughts(template, tokenizer);
    let controls = controls(family, thoughts.as_ref(), tokenizer);
    ToolFormat {
        family,
        describes_tools,
        has_named_arguments: probes.called.contains(ARGUMENTS),
        takes_system: template.is_none() || probes.takes_system,
        thoughts,
        controls,
    }
}

/// What a template made of the probes.
#[derive(Default)]
struct Probes {
    /// A user's message.
    plain: String,
    /// A call and its result.
    called: String,
    /// The tool was described.
    described: bool,
    takes_system: bool,
}

impl Probes {
    fn of(template: &ChatTemplate) -> Probes {
        let tools = probe_tools();
        let render = |messages: &[ChatMessage], with_tools: bool| {
            let tools = with_tools.then(|| tools.clone());
            let options =
                RenderOptions { add_generation_prompt: true, tools, ..RenderOptions::default() };
            // A template may refuse a probe; then it does not show what was looked for.
            template.render(messages, &options).map_or_else(|_| String::new(), |it| it.text())
        };
        let user = ChatMessage::new("user", "text");
        let system = [ChatMessage::new("system", SYSTEM), user.clone()];
        let described =
            [&system[1..], &system[..]].iter().any(|it| render(it, true).contains(TOOL));
        let called = [Some(String::new()), None, Some("text".to_owned())]
            .into_iter()
            .map(|content| render(&probe_chat(content), true))
            .find(|text| text.contains(VALUE));
        Probes {
            plain: render(&[user], false),
            called: called.unwrap_or_default(),
            described,
            takes_system: render(&system, false).contains(SYSTEM),
        }
    }

    fn family(&self) -> ToolFamily {
        // Behind the description, which quotes formats too.
        let call = self.called.find(VALUE).map_or("", |at| {
            let start = self.called[..at].rfind("text").unwrap_or(0);
            &self.called[start..]
        });
        if call.contains("[TOOL_CALLS]") {
            ToolFamily::Mistral
        } else if call.contains("<tool_call>") {
            ToolFamily::Hermes
        } else if call.contains(&format!("{{\"name\": \"{TOOL}\", \"parameters\": ")) {
            ToolFamily::Llama3
        } else if self.plain.contains("<start_of_turn>") {
            ToolFamily::Gemma
        } else {
            ToolFamily::Generic
        }
    }
}

fn probe_tools() -> Vec<serde_json::Value> {
    let parameters = serde_json::json!({
        "type": "object",
        "properties": { "key": { "type": "string", "description": "a key" } },
        "required": ["key"]
    });
    let tool = ToolSpec::new(TOOL, Some("a probe".to_owned()), parameters);
    vec![tool.expect("the probe is a tool").definition()]
}

/// A call with its result. The identifier is one that Mistral's templates accept.
fn probe_chat(content: Option<String>) -> Vec<ChatMessage> {
    let id = Some("exrail000".to_owned());
    let arguments = serde_json::Map::from_iter([("key".to_owned(), VALUE.into())]);
    let call = ToolCall { id: id.clone(), name: TOOL.to_owned(), arguments };
    vec![
        ChatMessage::new("user", "text"),
        ChatMessage {
            role: "assistant".to_owned(),
            content,
            tool_calls: vec![call],
            ..ChatMessage::default()
        },
        ChatMessage {
            tool_call_id: id,
            name: Some(TOOL.to_owned()),
            ..ChatMessage::new("tool", "result")
        },
    ]
}

fn thoughts(template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Option<Thoughts> {
    let source = template.map_or("", ChatTemplate::source);
    let has = |marker: &str| tokenizer.token_id(marker).is_some() || source.contains(marker);
    let (open, close) = THOUGHTS.iter().find(|(open, close)| has(open) && has(close))?;
    Some(Thoughts { open: (*open).to_owned(), close: (*close).to_owned() })
}

/// The markers that are control tokens.
fn controls(
    family: ToolFamily,
    thoughts: Option<&Thoughts>,
    tokenizer: &Tokenizer,
) -> Vec<(u32, String)> {
    let markers: &[&str] = match family {
        ToolFamily::Hermes | ToolFamily::Generic => &["<tool_call>", "</tool_call>"],
        ToolFamily::Llama3 => &["<|python_tag|>"],
        ToolFamily::Mistral => &["[TOOL_CALLS]", ARGUMENTS, CALL_ID],
        ToolFamily::Gemma => &[],
    };
    let thought = thoughts.map(|it| [it.open.as_str(), it.close.as_str()]);
    let all = markers.iter().copied().chain(thought.into_iter().flatten());
    let control = |text: &str| {
        let id = tokenizer.token_id(text).filter(|&id| tokenizer.is_control(id))?;
        Some((id, text.to_owned()))
    };
    let mut controls: Vec<(u32, String)> = all.filter_map(control).collect();
    controls.sort_unstable();
    controls.dedup();
    controls
}
