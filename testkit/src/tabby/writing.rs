//! What the double writes: pseudo words, an instance of a schema, or a tool call; cut by stops
//! and limits.

use serde_json::{Value, json};

use super::{
    request::{Ask, Chat, Constraint, Stop},
    schema,
    tokens::{EOS, Tokens, split_plain},
};
use crate::Random;

/// How long a free text is.
const N_TOKENS: usize = 24;

/// How many tokens of spaces follow an opened object.
const N_BLANKS: usize = 8;

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Length,
    StopToken(String),
    StopString(String),
    /// The constraint was complete.
    Filter,
    /// The job was ended from outside, and nobody says so.
    Aborted,
}

/// A call that a user's message asks for.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) name: String,
    pub(super) arguments: Value,
}

/// One choice's text.
#[derive(Clone, Debug)]
pub(super) struct Written {
    pub(super) tokens: Vec<String>,
    pub(super) end: End,
    /// A tool call, whole. Its tokens are not shown.
    pub(super) call: Option<Call>,
    /// Whether a stream shows nothing before the end: the text began as a call.
    pub(super) held: bool,
}

/// The double's stand-in for a constraint that works.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Free,
    Instance(Value),
    Match(String),
    /// An object opened under this key, and spaces.
    Opened(String),
    Call(Call),
}

impl Written {
    /// Nothing, as after an unload that nobody tells about.
    pub(super) fn aborted() -> Written {
        Written { tokens: Vec::new(), end: End::Aborted, call: None, held: false }
    }

    /// The text that is shown.
    pub(super) fn text(&self) -> String {
        if self.call.is_some() { String::new() } else { self.tokens.concat() }
    }
}

/// The shape of an answer without faults.
pub(super) fn shape(ask_constraint: Option<&Constraint>, call: Option<Call>) -> Shape {
    match (ask_constraint, call) {
        (Some(Constraint::Schema(schema)), _) => Shape::Instance(schema.clone()),
        (Some(Constraint::Pattern(pattern)), _) => Shape::Match(pattern.clone()),
        (Some(Constraint::TooMuch) | None, Some(call)) => Shape::Call(call),
        (Some(Constraint::TooMuch) | None, None) => Shape::Free,
    }
}

/// Writes one choice of at most `limit` tokens.
pub(super) fn write(
    ask: &Ask,
    shape: &Shape,
    random: &mut Random,
    limit: usize,
    ids: &mut Tokens,
) -> Written {
    let (mut text, mut end, call) = match shape {
        Shape::Free => (words(random, N_TOKENS.max(ask.min_tokens)), at_stop_token(), None),
        Shape::Instance(schema) => {
            (schema::instance(schema, random).to_string(), End::Filter, None)
        }
        Shape::Match(pattern) => (schema::matching(pattern), End::Filter, None),
        Shape::Opened(key) => {
            let blanks = "    ".repeat(N_BLANKS);
            (format!("{{{}:{blanks}", Value::from(key.as_str())), at_stop_token(), None)
        }
        Shape::Call(call) => {
            let body = json!({"name": call.name, "arguments": call.arguments});
            let text = format!("<tool_call>\n{body}\n</tool_call>");
            (text, at_stop_token(), Some(call.clone()))
        }
    };
    let held = call.is_some();
    if let Some((at, stop)) = first_stop(&text, &ask.stops) {
        text.truncate(at);
        end = End::StopString(stop);
    }
    let mut tokens: Vec<String> = split_plain(&text).into_iter().map(str::to_owned).collect();
    let is_stop = |token: &String| {
        let id = ids.id(token);
        ask.stops.iter().any(|stop| matches!(stop, Stop::Token(stop) if *stop == id))
    };
    if let Some(at) = tokens.iter().position(is_stop) {
        end = End::StopToken(tokens[at].clone());
        tokens.truncate(at);
    }
    if tokens.len() > limit {
        tokens.truncate(limit);
        end = End::Length;
    }
    // What is cut never becomes a call.
    let call = call.filter(|_| end == at_stop_token());
    Written { tokens, end, call, held }
}

/// The call that the last message asks for: a user's `CALL name {json}`.
pub(super) fn call(chat: &Chat) -> Option<Call> {
    chat.tools.as_ref()?;
    let last = chat.turns.last().filter(|turn| turn.role == "user")?;
    let (_, rest) = last.content.as_ref()?.split_once("CALL ")?;
    let (name, rest) = rest.split_once(' ')?;
    let arguments = serde_json::Deserializer::from_str(rest).into_iter().next()?.ok()?;
    Some(Call { name: name.into(), arguments })
}

/// A pseudo word.
pub(super) fn word(random: &mut Random) -> String {
    const CONSONANTS: &[u8] = b"bdfgklmnprstvz";
    const VOWELS: &[u8] = b"aeiou";
    let mut word = String::new();
    for _ in 0..2 + random.below(2) {
        word.push(char::from(CONSONANTS[random.below(CONSONANTS.len())]));
        word.push(char::from(VOWELS[random.below(VOWELS.len())]));
    }
    word
}

fn words(random: &mut Random, n_words: usize) -> String {
    let words: Vec<String> = (0..n_words).map(|_| word(random)).collect();
    words.join(" ")
}

fn at_stop_token() -> End {
    End::StopToken(EOS.into())
}

fn first_stop(text: &str, stops: &[Stop]) -> Option<(usize, String)> {
    let found = stops.iter().filter_map(|stop| match stop {
        Stop::Text(stop) => Some((text.find(stop)?, stop.clone())),
        Stop::Token(_) => None,
    });
    found.min()
}
