//! What is inside a stretch that ended: calls, or the reason why it is none.

use std::ops::Range;

use serde_json::{Map, Value};

use super::region::{Body, Ended, Kind};
use super::{CallFault, ParsedCall, ToolSpec, json, xml};

const SHAPE: CallFault = CallFault::NotACall { expected: "an object with a name and arguments" };

/// What a stretch turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    /// One call or several, all of them well formed; numbered from 0 here.
    Calls(Vec<ParsedCall>),
    /// To be told with its text.
    Fault(CallFault),
    /// For the reader.
    Text,
}

/// Looks inside; `held` is the text that the ranges are of.
pub(crate) fn judge(kind: Kind, held: &str, ended: &Ended, tools: &[ToolSpec]) -> Verdict {
    let stretch = &held[..ended.len];
    let calls = match &ended.body {
        Body::Text => return Verdict::Text,
        Body::Broken(fault) => Err(fault.clone()),
        Body::Xml(body) => xml::read(&held[body.clone()], tools).and_then(|(name, arguments)| {
            let arguments_json = Value::Object(arguments.clone()).to_string();
            known(&name, tools)?;
            Ok(vec![ParsedCall { index: 0, name, arguments, arguments_json }])
        }),
        Body::Json { json, name: Some(name) } => {
            call_of(&held[name.clone()], &held[json.clone()], tools).map(|call| vec![call])
        }
        Body::Json { json, name: None } => calls(&held[json.clone()], tools),
    };
    match calls {
        Ok(calls) => Verdict::Calls(calls),
        Err(fault) if kind == Kind::Leading && !is_meant(stretch, tools) => {
            // Every JSON answer begins so; only one with the shape of a call is told.
            match fault {
                CallFault::UnknownTool { .. } => Verdict::Fault(fault),
                CallFault::Cut
                | CallFault::NotJson { .. }
                | CallFault::NotACall { .. }
                | CallFault::ExtraText
                | CallFault::TooMany { .. }
                | CallFault::TooLong { .. } => Verdict::Text,
            }
        }
        Err(fault) => Verdict::Fault(fault),
    }
}

/// Whether an object that was not finished, or not understood, names one of the tools or began to.
pub(crate) fn is_meant(text: &str, tools: &[ToolSpec]) -> bool {
    let Some((_, behind)) = text.split_once("\"name\"") else { return false };
    let Some(behind) = behind.trim_start().strip_prefix(':') else {
        return behind.trim().is_empty();
    };
    let Some(name) = behind.trim_start().strip_prefix('"') else { return behind.trim().is_empty() };
    match name.split_once('"') {
        Some((name, _)) => tools.iter().any(|tool| tool.name() == name),
        None => tools.iter().any(|tool| tool.name().starts_with(name)),
    }
}

fn calls(text: &str, tools: &[ToolSpec]) -> Result<Vec<ParsedCall>, CallFault> {
    if text.starts_with('{') {
        return Ok(vec![object(text, tools)?]);
    }
    let items = json::items(text)?;
    if items.is_empty() {
        return Err(SHAPE);
    }
    items.into_iter().map(|item| object(&text[item], tools)).collect()
}

fn object(text: &str, tools: &[ToolSpec]) -> Result<ParsedCall, CallFault> {
    let mut name: Option<String> = None;
    let mut arguments: Option<Range<usize>> = None;
    for (key, span) in json::members(text)? {
        let value = &text[span.clone()];
        match key.as_str() {
            "name" => name = json::value(value)?.as_str().map(str::to_owned),
            // Both are written by models of every family; both at once mean nothing.
            "arguments" | "parameters" if arguments.is_none() => arguments = Some(span),
            // Mistral's own identifier: ours replaces it.
            "id" if value.starts_with('"') => {}
            "type" if value == "\"function\"" => {}
            _ => return Err(SHAPE),
        }
    }
    let (Some(name), Some(arguments)) = (name, arguments) else { return Err(SHAPE) };
    call_of(&name, &text[arguments], tools)
}

fn call_of(name: &str, arguments: &str, tools: &[ToolSpec]) -> Result<ParsedCall, CallFault> {
    if !arguments.starts_with('{') {
        return Err(CallFault::NotACall { expected: "an object of arguments" });
    }
    // Again for the one that stands behind a name, which nobody has read strictly yet.
    json::members(arguments)?;
    known(name, tools)?;
    let parsed: Map<String, Value> = match json::value(arguments)? {
        Value::Object(parsed) => parsed,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            return Err(SHAPE);
        }
    };
    let arguments_json = arguments.to_owned();
    Ok(ParsedCall { index: 0, name: name.to_owned(), arguments: parsed, arguments_json })
}

fn known(name: &str, tools: &[ToolSpec]) -> Result<(), CallFault> {
    if tools.iter().any(|tool| tool.name() == name) {
        return Ok(());
    }
    Err(CallFault::UnknownTool { name: name.chars().take(80).collect() })
}
