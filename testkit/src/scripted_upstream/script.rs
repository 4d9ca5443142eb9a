//! What a scripted answer says, and the JSON that says it.

use serde_json::{Map, Value, json};

use super::ScriptedOptions;
use crate::random::Random;

/// The time stamp of every answer and model: two runs write the same bytes.
pub(super) const CREATED: u64 = 1_750_000_000;

const WORDS: [&str; 16] = [
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty",
    "knoll", "ledge", "marsh", "north", "ocean", "plain",
];

/// Which of the two routes a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

impl Kind {
    pub(super) fn prompt_field(self) -> &'static str {
        match self {
            Kind::Chat => "messages",
            Kind::Completion => "prompt",
        }
    }
}

/// An event of a stream, and the index of the token that it waits for.
pub(super) struct Event {
    pub(super) with_token: usize,
    pub(super) bytes: String,
}

/// One answer.
pub(super) struct Script {
    kind: Kind,
    id: String,
    model: String,
    pieces: Vec<String>,
    finish: &'static str,
    prompt_tokens: usize,
}

impl Script {
    /// The answer to the `number`th request.
    pub(super) fn new(
        kind: Kind,
        request: &Value,
        prompt: &[String],
        options: &ScriptedOptions,
        number: usize,
    ) -> Script {
        let mut pieces = whole_answer(request, prompt, options.tokens, number);
        let limit = request["max_completion_tokens"].as_u64().or(request["max_tokens"].as_u64());
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let finish = if pieces.len() > limit { "length" } else { "stop" };
        pieces.truncate(limit);
        let id = match kind {
            Kind::Chat => format!("chatcmpl-{number}"),
            Kind::Completion => format!("cmpl-{number}"),
        };
        let words = prompt.iter().map(|text| text.split_whitespace().count()).sum();
        Script { kind, id, model: options.model.clone(), pieces, finish, prompt_tokens: words }
    }

    pub(super) fn tokens(&self) -> usize {
        self.pieces.len()
    }

    /// The body of a plain reply.
    pub(super) fn reply(&self) -> Value {
        let text = self.pieces.concat();
        let (object, choice) = match self.kind {
            Kind::Chat => {
                let message = json!({ "role": "assistant", "content": text });
                ("chat.completion", json!({ "index": 0, "message": message }))
            }
            Kind::Completion => ("text_completion", json!({ "index": 0, "text": text })),
        };
        let mut reply = self.envelope(object, vec![finished(choice, Some(self.finish))]);
        reply["usage"] = self.usage();
        reply
    }

    /// The events of a streamed reply.
    pub(super) fn events(&self, with_usage: bool) -> Vec<Event> {
        let last = self.tokens().saturating_sub(1);
        let mut events = Vec::with_capacity(self.tokens() + 4);
        let mut add = |with_token, chunk: &Value| {
            events.push(Event { with_token, bytes: format!("data: {chunk}\n\n") });
        };
        if self.kind == Kind::Chat {
            // With the first token, as servers send it that know nothing before.
            add(0, &self.chunk(json!({ "role": "assistant", "content": "" }), None));
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            add(index, &self.chunk(self.delta(piece), None));
        }
        let end = if self.kind == Kind::Chat { json!({}) } else { json!("") };
        add(last, &self.chunk(end, Some(self.finish)));
        if with_usage {
            let mut usage = self.envelope(self.chunk_object(), Vec::new());
            usage["usage"] = self.usage();
            add(last, &usage);
        }
        events.push(Event { with_token: last, bytes: "data: [DONE]\n\n".to_owned() });
        events
    }

    fn delta(&self, piece: &str) -> Value {
        match self.kind {
            Kind::Chat => json!({ "content": piece }),
            Kind::Completion => json!(piece),
        }
    }

    fn chunk(&self, delta: Value, finish: Option<&str>) -> Value {
        let field = if self.kind == Kind::Chat { "delta" } else { "text" };
        let choice = json!({ "index": 0, field: delta });
        self.envelope(self.chunk_object(), vec![finished(choice, finish)])
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": CREATED,
            "model": self.model,
            "choices": choices,
        })
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens(),
            "total_tokens": self.prompt_tokens + self.tokens(),
        })
    }
}

/// The texts that a request puts before the model; none where its field is missing or of a type
/// that no client sends.
pub(super) fn prompt(kind: Kind, request: &Value) -> Option<Vec<String>> {
    let field = &request[kind.prompt_field()];
    match kind {
        Kind::Chat => {
            Some(field.as_array()?.iter().map(|message| text_of(&message["content"])).collect())
        }
        Kind::Completion if field.is_null() => None,
        Kind::Completion => Some(vec![text_of(field)]),
    }
}

/// The text of a string, or of an array of strings and parts of type `text`.
fn text_of(content: &Value) -> String {
    let Some(parts) = content.as_array() else {
        return content.as_str().unwrap_or_default().to_owned();
    };
    parts.iter().filter_map(|part| part.as_str().or(part["text"].as_str())).collect()
}

fn finished(mut choice: Value, finish: Option<&str>) -> Value {
    choice["finish_reason"] = json!(finish);
    choice
}

fn whole_answer(request: &Value, prompt: &[String], n_tokens: usize, number: usize) -> Vec<String> {
    // The last message that asks for an echo: earlier ones are the conversation so far. It goes
    // before a schema, so that an answer can break one.
    let echo = prompt.iter().rev().find_map(|text| Some(text.split_once("ECHO ")?.1));
    if let Some(text) = echo {
        return pieces(text);
    }
    let format = &request["response_format"];
    match format["type"].as_str() {
        Some("json_object") => return pieces("{}"),
        Some("json_schema") => {
            return pieces(&instance(&format["json_schema"]["schema"]).to_string());
        }
        Some(_) | None => {}
    }
    let seed = if request["temperature"].as_f64() == Some(0.0) {
        0
    } else {
        // As with a real server, an answer that nobody seeded can be had only once.
        let unseeded = u64::MAX - number as u64;
        request["seed"].as_i64().map_or(unseeded, i64::cast_unsigned).wrapping_add(1)
    };
    let mut random = Random::named(seed, &prompt.join("\n"));
    let word = |index| if index == 0 { "" } else { " " };
    (0..n_tokens)
        .map(|index| format!("{}{}", word(index), WORDS[random.below(WORDS.len())]))
        .collect()
}

/// A text in pieces of words with the space before them, the length of a token at most.
fn pieces(text: &str) -> Vec<String> {
    const LONGEST: usize = 6;
    let mut pieces = Vec::<String>::new();
    let mut len = LONGEST;
    for character in text.chars() {
        if len >= LONGEST || character.is_whitespace() {
            pieces.push(String::new());
            len = 0;
        }
        if let Some(piece) = pieces.last_mut() {
            piece.push(character);
        }
        len += 1;
    }
    pieces
}

/// A small instance of a schema: every property is there, with the least value of its type.
fn instance(schema: &Value) -> Value {
    if let Some(value) = schema.get("const") {
        return value.clone();
    }
    if let Some(value) = schema["enum"].get(0) {
        return value.clone();
    }
    let kind = schema["type"].as_str().or(schema["type"][0].as_str());
    match kind.or(schema.get("properties").map(|_| "object")) {
        Some("object") => {
            let none = Map::new();
            let properties = schema["properties"].as_object().unwrap_or(&none);
            properties.iter().map(|(name, schema)| (name.clone(), instance(schema))).collect()
        }
        Some("array") => {
            let len = schema["minItems"].as_u64().unwrap_or(0);
            (0..len).map(|_| instance(&schema["items"])).collect()
        }
        Some("string") => {
            let len = usize::try_from(schema["minLength"].as_u64().unwrap_or(1)).unwrap_or(1);
            Value::from("a".repeat(len.max(1)))
        }
        Some("integer" | "number") => schema.get("minimum").cloned().unwrap_or(json!(0)),
        Some("boolean") => json!(false),
        Some(_) | None => Value::Null,
    }
}
