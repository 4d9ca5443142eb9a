//! Bodies of the two generation routes, validated: what they ask for, and every 422.

use serde_json::{Map, Value, json};

use super::{
    body::{
        Bound::{self, Above, AtLeast, AtMost},
        Checks, flag,
    },
    messages::{self, Turn},
    refusal::Refusal,
};

/// The route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

/// What is to be continued.
#[derive(Debug)]
pub(super) enum Prompt {
    Chat(Chat),
    Texts(Vec<String>),
}

/// A chat's prompt and what stands around it.
#[derive(Debug)]
pub(super) struct Chat {
    pub(super) turns: Vec<Turn>,
    /// Tools as sent, which a prompt shows; None without any, or with a choice of "none".
    pub(super) tools: Option<Value>,
    pub(super) add_generation_prompt: bool,
    pub(super) continue_final_message: bool,
    pub(super) response_prefix: String,
}

/// What ends a text.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    Text(String),
    Token(usize),
}

/// What a text must be.
#[derive(Clone, Debug)]
pub(super) enum Constraint {
    Schema(Value),
    Pattern(String),
    /// A grammar, or several constraints at once: more than the double can obey.
    TooMuch,
}

/// A generation request without faults.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) prompt: Prompt,
    /// Absent in a streamed completion is a fault; everywhere else it is like 0: no limit.
    pub(super) max_tokens: Option<usize>,
    pub(super) min_tokens: usize,
    pub(super) stops: Vec<Stop>,
    pub(super) greedy: bool,
    pub(super) n_choices: usize,
    pub(super) streams: bool,
    pub(super) include_usage: bool,
    /// How many alternatives of each token are told.
    pub(super) logprobs: Option<usize>,
    pub(super) constraint: Option<Constraint>,
}

/// Floats with their other names and bounds.
const NUMBERS: &[(&[&str], &[Bound])] = &[
    (&["top_p"], &[AtLeast(0.0), AtMost(1.0)]),
    (&["min_p"], &[]),
    (&["xtc_probability"], &[]),
    (&["xtc_threshold"], &[]),
    (&["adaptive_target"], &[]),
    (&["adaptive_decay"], &[]),
    (&["frequency_penalty"], &[AtLeast(0.0)]),
    (&["presence_penalty"], &[AtLeast(0.0)]),
    (&["repetition_penalty", "rep_pen"], &[Above(0.0)]),
];

/// Whole numbers with their other names and bounds.
const INTEGERS: &[(&[&str], &[Bound])] = &[
    (&["top_k"], &[AtLeast(-1.0)]),
    (
        &["penalty_range", "repetition_range", "repetition_penalty_range", "rep_pen_range"],
        &[AtLeast(-1.0)],
    ),
    (&["repetition_decay"], &[]),
    (&["loop_detect_window"], &[]),
];

const FLAGS: [&str; 3] = ["temperature_last", "token_healing", "add_bos_token"];

impl Ask {
    /// Reads a body, or says all that is wrong with it.
    pub(super) fn read(kind: Kind, body: &Map<String, Value>) -> Result<Ask, Refusal> {
        let mut checks = Checks::default();
        let prompt = match kind {
            Kind::Chat => Prompt::Chat(Chat::read(body, &mut checks)),
            Kind::Completion => Prompt::Texts(texts(body, &mut checks)),
        };
        let lengths = |names: &[&str], checks: &mut Checks| {
            let length = checks.integer(body, names, &[AtLeast(0.0)])?;
            usize::try_from(length).ok()
        };
        let max_tokens =
            lengths(&["max_tokens", "max_completion_tokens", "max_length"], &mut checks);
        let min_tokens = lengths(&["min_tokens", "min_length"], &mut checks).unwrap_or(0);
        let heat = [AtLeast(0.0), AtMost(10.0)];
        let temperature = checks.number(body, &["temperature"], &heat).unwrap_or(1.0);
        for (names, bounds) in NUMBERS {
            checks.number(body, names, bounds);
        }
        for (names, bounds) in INTEGERS {
            checks.integer(body, names, bounds);
        }
        for name in FLAGS {
            checks.boolean(body, name);
        }
        let n_choices = checks.integer(body, &["n"], &[AtLeast(1.0)]).unwrap_or(1);
        let streams = flag(checks.boolean(body, "stream"), false);
        let include_usage = include_usage(body, &mut checks);
        let stops = stops(body, &mut checks);
        let constraint = constraint(body, &mut checks);
        let logprobs = logprobs(body, &mut checks);
        checks.end()?;
        if max_tokens.is_some_and(|most| most > 0 && min_tokens > most) {
            return Err(Refusal::Broken);
        }
        let heat = |name: &str| body.get(name).and_then(Value::as_f64);
        if let (Some(least), Some(most)) = (heat("min_temp"), heat("max_temp"))
            && least > most
        {
            return Err(Refusal::Broken);
        }
        Ok(Ask {
            prompt,
            max_tokens,
            min_tokens,
            stops,
            greedy: temperature == 0.0,
            n_choices: usize::try_from(n_choices).unwrap_or(1),
            streams,
            include_usage,
            logprobs,
            constraint,
        })
    }
}

impl Chat {
    fn read(body: &Map<String, Value>, checks: &mut Checks) -> Chat {
        let turns = messages::read(body, "messages", checks);
        let has_tools = check_tools(body, checks);
        let is_off = body.get("tool_choice").and_then(Value::as_str) == Some("none");
        let tools = if has_tools && !is_off { body.get("tools").cloned() } else { None };
        let continues = flag(checks.boolean(body, "continue_final_message"), false);
        checks.boolean(body, "parallel_tool_calls");
        let prefix = body.get("response_prefix").and_then(Value::as_str);
        Chat {
            turns,
            tools,
            add_generation_prompt: flag(checks.boolean(body, "add_generation_prompt"), true),
            continue_final_message: continues,
            response_prefix: prefix.unwrap_or_default().into(),
        }
    }

    /// The text to be continued.
    pub(super) fn render(&self) -> Result<String, Refusal> {
        if self.continue_final_message && self.add_generation_prompt {
            let text = "continue_final_message requires add_generation_prompt to be false";
            return Err(Refusal::unprocessable(text));
        }
        let tools =
            self.tools.as_ref().map(|tools| format!("{}system\n{tools}\n", super::tokens::BOS));
        let mut prompt = tools.unwrap_or_default() + &messages::render(&self.turns)?;
        if self.continue_final_message {
            let has_text = self.turns.last().is_some_and(|turn| turn.content.is_some());
            if !has_text {
                let text = "continue_final_message is set but there is no message to continue";
                return Err(Refusal::unprocessable(text));
            }
            let end_len = super::tokens::EOS.len() + 1;
            prompt.truncate(prompt.len() - end_len);
        }
        if self.add_generation_prompt {
            prompt.push_str(super::tokens::BOS);
            prompt.push_str("assistant\n");
        }
        Ok(prompt + &self.response_prefix)
    }
}

/// Whether there are tools; each needs a function's three fields.
fn check_tools(body: &Map<String, Value>, checks: &mut Checks) -> bool {
    let tools = match body.get("tools") {
        None | Some(Value::Null) => return false,
        Some(Value::Array(tools)) => tools,
        Some(other) => {
            checks.wrong("list_type", &["tools"], "Input should be a valid list", other);
            return false;
        }
    };
    for (index, tool) in tools.iter().enumerate() {
        let Some(function) = tool.get("function") else {
            checks.missing_at(json!(["body", "tools", index, "function"]), tool);
            continue;
        };
        for field in ["name", "description", "parameters"] {
            if function.get(field).is_none() {
                checks.missing_at(json!(["body", "tools", index, "function", field]), function);
            }
        }
    }
    !tools.is_empty()
}

/// The prompts of a completion; numbers of tokens are not accepted.
fn texts(body: &Map<String, Value>, checks: &mut Checks) -> Vec<String> {
    let message = "Input should be a valid string";
    match body.get("prompt") {
        None => {
            checks.missing(&["prompt"], body);
            Vec::new()
        }
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => {
            let mut texts = Vec::with_capacity(items.len());
            for (index, item) in items.iter().enumerate() {
                match item.as_str() {
                    Some(text) => texts.push(text.into()),
                    None => checks.wrong_at(
                        "string_type",
                        json!(["body", "prompt", "list[str]", index]),
                        message,
                        item,
                    ),
                }
            }
            texts
        }
        Some(other) => {
            checks.wrong_at("string_type", json!(["body", "prompt", "str"]), message, other);
            Vec::new()
        }
    }
}

fn include_usage(body: &Map<String, Value>, checks: &mut Checks) -> bool {
    match body.get("stream_options") {
        None | Some(Value::Null) => false,
        Some(Value::Object(options)) => flag(checks.boolean(options, "include_usage"), false),
        Some(other) => {
            let message = "Input should be a valid dictionary or object to extract fields from";
            checks.wrong("model_attributes_type", &["stream_options"], message, other);
            false
        }
    }
}

fn stops(body: &Map<String, Value>, checks: &mut Checks) -> Vec<Stop> {
    let value = body.get("stop").or_else(|| body.get("stop_sequence")).unwrap_or(&Value::Null);
    if value.is_null() {
        return Vec::new();
    }
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let mut stops = Vec::new();
    for item in items {
        match item {
            Value::String(text) if text.is_empty() => {}
            Value::String(text) => stops.push(Stop::Text(text.clone())),
            Value::Number(id) if value.is_array() && id.is_u64() => {
                let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
                stops.extend(id.map(Stop::Token));
            }
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_) => {
                checks.wrong("string_type", &["stop"], "Input should be a valid string", item);
            }
        }
    }
    stops
}

/// An int or a bool; `top_logprobs` beside true.
fn logprobs(body: &Map<String, Value>, checks: &mut Checks) -> Option<usize> {
    let top = checks.integer(body, &["top_logprobs"], &[AtLeast(0.0)]).unwrap_or(0);
    let n_alternatives = match body.get("logprobs")? {
        Value::Bool(true) => top,
        Value::Null | Value::Bool(false) => return None,
        Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            checks.integer(body, &["logprobs"], &[AtLeast(0.0)])?.max(top)
        }
    };
    usize::try_from(n_alternatives).ok()
}

/// Of `response_format` only the types "json" and "json_schema" are known.
fn constraint(body: &Map<String, Value>, checks: &mut Checks) -> Option<Constraint> {
    let dictionary = "Input should be a valid dictionary";
    let mut schema = body.get("json_schema").filter(|schema| !schema.is_null()).cloned();
    if let Some(other) = schema.take_if(|schema| !schema.is_object()) {
        checks.wrong("dict_type", &["json_schema"], dictionary, &other);
    }
    match body.get("response_format") {
        None | Some(Value::Null) => {}
        Some(Value::Object(format)) => match format.get("type").and_then(Value::as_str) {
            Some("json") => schema = Some(json!({"type": "object"})),
            Some("json_schema") => match format.get("json_schema") {
                None | Some(Value::Null) => {}
                Some(Value::Object(given)) => {
                    let wrapped = given.get("schema").filter(|schema| schema.is_object());
                    schema = Some(wrapped.cloned().unwrap_or_else(|| Value::Object(given.clone())));
                }
                Some(other) => {
                    checks.wrong(
                        "dict_type",
                        &["response_format", "json_schema"],
                        dictionary,
                        other,
                    );
                }
            },
            _ => {}
        },
        Some(other) => {
            let message = "Input should be a valid dictionary or object to extract fields from";
            checks.wrong("model_attributes_type", &["response_format"], message, other);
        }
    }
    let text = |key: &str| body.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    match (schema, text("regex_pattern"), text("grammar_string")) {
        (None, None, None) => None,
        (Some(schema), None, None) => Some(Constraint::Schema(schema)),
        (None, Some(pattern), None) => Some(Constraint::Pattern(pattern.into())),
        _ => Some(Constraint::TooMuch),
    }
}
