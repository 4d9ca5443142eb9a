//! Tools for a model whose template does not know them: written into the messages.
//!
//! The tools go behind the system text, calls behind what the assistant said, and results into messages of the
//! user, which is what templates of models without tools accept. All of it is content and therefore as
//! untrusted as any message: a description cannot become a control token.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::chat::{ChatMessage, ToolCall};

use super::{ToolFamily, ToolFormat, ToolSpec};

/// `messages` without calls, results and roles that a plain template does not know.
pub(super) fn written_out(
    format: &ToolFormat,
    messages: Vec<ChatMessage>,
    tools: &[ToolSpec],
) -> Vec<ChatMessage> {
    let mut written: Vec<ChatMessage> = Vec::with_capacity(messages.len() + 1);
    // Whether the last one written is a list of results: several become one message, since many templates
    // want turns that alternate.
    let mut is_result = false;
    for mut message in messages {
        if message.role == "tool" {
            let result = result_text(&message);
            match written.last_mut().filter(|_| is_result) {
                Some(last) => append(last, &result),
                None => written.push(ChatMessage::new("user", result)),
            }
            is_result = true;
            continue;
        }
        is_result = false;
        let calls = std::mem::take(&mut message.tool_calls);
        if !calls.is_empty() {
            append(&mut message, &calls_text(format, &calls));
        }
        written.push(message);
    }
    if !tools.is_empty() {
        describe(format, &mut written, &system_text(format, tools));
    }
    written
}

fn describe(format: &ToolFormat, messages: &mut Vec<ChatMessage>, text: &str) {
    match messages.first_mut() {
        Some(first) if first.role == "system" => append(first, text),
        Some(first) if !format.takes_system && first.role == "user" => {
            let said = first.content.take().unwrap_or_default();
            first.content = Some(format!("{text}\n\n{said}"));
        }
        Some(_) | None => messages.insert(0, ChatMessage::new("system", text)),
    }
}

fn append(message: &mut ChatMessage, text: &str) {
    let content = message.content.get_or_insert_default();
    if !content.is_empty() {
        content.push_str("\n\n");
    }
    content.push_str(text);
}

/// What the model is told.
fn system_text(format: &ToolFormat, tools: &[ToolSpec]) -> String {
    let mut text = "You may call these functions, one JSON definition a line:\n".to_owned();
    for tool in tools {
        writeln!(text, "{}", tool.definition()).expect("a String takes everything");
    }
    let placeholder = Value::from("<arguments as a JSON object>");
    let example = call_text(format, "<name of the function>", &placeholder);
    // The place of the arguments is no string.
    let example = example.replace(&placeholder.to_string(), "<arguments as a JSON object>");
    text.push_str("\nTo call one, write exactly this and nothing behind it:\n");
    text.push_str(&example);
    text.push_str(
        "\n\nThe result comes in the next message. If no function is needed, answer in words.",
    );
    text
}

fn calls_text(format: &ToolFormat, calls: &[ToolCall]) -> String {
    let texts = calls.iter().map(|call| {
        let arguments = Value::Object(call.arguments.clone());
        call_text(format, &call.name, &arguments)
    });
    texts.collect::<Vec<_>>().join("\n")
}

/// One call as this family writes it and as the grammar locks it.
fn call_text(format: &ToolFormat, name: &str, arguments: &Value) -> String {
    let name = Value::from(name);
    let object = |key: &str| format!("{{\"name\": {name}, \"{key}\": {arguments}}}");
    match format.family {
        ToolFamily::Hermes | ToolFamily::Generic => {
            format!("<tool_call>\n{}\n</tool_call>", object("arguments"))
        }
        ToolFamily::Llama3 => object("parameters"),
        ToolFamily::Mistral => format!("[TOOL_CALLS] [{}]", object("arguments")),
        ToolFamily::Gemma => format!("```tool_call\n{}\n```", object("arguments")),
    }
}

fn result_text(message: &ChatMessage) -> String {
    let content = message.content.as_deref().unwrap_or_default();
    let name = message.name.as_ref().map(|name| json!(name));
    match name {
        Some(name) => format!("<tool_response name={name}>\n{content}\n</tool_response>"),
        None => format!("<tool_response>\n{content}\n</tool_response>"),
    }
}
