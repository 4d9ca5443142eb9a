//! One client of the soak: a request, and what became of it.

use std::{io, time::Duration};

use serde_json::Value;

use super::{
    http::{Exchange, Target},
    request::{Patience, Plan},
};

/// Longest wait for any byte of an answer.
const PATIENCE: Duration = Duration::from_secs(600);

/// What an answer says, without what differs from one run to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// Text of each choice, and why it ended.
    pub(super) choices: Vec<(String, String)>,
    /// Tokens, or pieces of a stream.
    pub(super) generated: u64,
    /// Whether it was held to a schema.
    pub(super) is_held: bool,
}

/// What became of one request.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// A whole, well-formed answer, with its body where it came in one piece.
    Complete { answer: Answer, body: Option<Value> },
    /// This client hung up.
    Cancelled,
    /// The server was full (429) and said so.
    Full,
    /// An error of the server by name: its code, and what it said.
    Refused { code: String, told: String },
    /// Anything else: the soak fails.
    Odd(String),
}

impl Plan {
    /// Sends the request and judges the form of the answer.
    pub(super) fn run(&self, target: Target<'_>) -> Outcome {
        let outcome = self
            .exchange(target)
            .unwrap_or_else(|error| Outcome::Odd(format!("no answer, or not to its end: {error}")));
        self.held_to(outcome)
    }

    /// A whole answer that is not what it was held to is an odd one.
    fn held_to(&self, outcome: Outcome) -> Outcome {
        let (Some(held), Outcome::Complete { mut answer, body }) = (self.held, outcome.clone())
        else {
            return outcome;
        };
        let fault = answer.choices.iter().find_map(|(text, finish)| held.fault(text, finish));
        if let Some(fault) = fault {
            return Outcome::Odd(format!("an answer that was held to a schema: {fault}"));
        }
        answer.is_held = true;
        Outcome::Complete { answer, body }
    }

    fn exchange(&self, target: Target<'_>) -> io::Result<Outcome> {
        let body = self.body.to_string();
        let mut exchange = Exchange::send(target, "POST", self.path, body.as_bytes(), PATIENCE)?;
        if let Patience::Before(patience) = self.patience
            && !exchange.begins_within(patience)?
        {
            exchange.hang_up();
            return Ok(Outcome::Cancelled);
        }
        let status = exchange.status()?;
        if status == 429 {
            return Ok(Outcome::Full);
        }
        if status != 200 {
            let body = exchange.rest()?;
            return Ok(refused(status, &String::from_utf8_lossy(&body)));
        }
        if self.is_stream { self.read_stream(exchange) } else { self.read_whole(exchange) }
    }

    fn read_whole(&self, mut exchange: Exchange) -> io::Result<Outcome> {
        let body = exchange.rest()?;
        Ok(self.judge_whole(serde_json::from_slice(&body)?))
    }

    fn judge_whole(&self, body: Value) -> Outcome {
        let choices: Option<Vec<_>> = body["choices"].as_array().and_then(|choices| {
            choices.iter().map(|choice| Some((text_of(choice)?, finish_of(choice)?))).collect()
        });
        let generated = body["usage"]["completion_tokens"].as_u64();
        match (choices, generated) {
            (Some(choices), Some(generated))
                if !choices.is_empty() && generated <= self.most_tokens =>
            {
                let answer = Answer { choices, generated, is_held: false };
                Outcome::Complete { answer, body: Some(body) }
            }
            (_, _) => Outcome::Odd(format!("answer of another form: {body}")),
        }
    }

    fn read_stream(&self, mut exchange: Exchange) -> io::Result<Outcome> {
        let mut text = Vec::new();
        let mut n_pieces = 0;
        while let Some(piece) = exchange.piece()? {
            text.extend(piece);
            n_pieces += 1;
            if self.patience == Patience::Pieces(n_pieces) {
                exchange.hang_up();
                return Ok(Outcome::Cancelled);
            }
        }
        Ok(judge_stream(&String::from_utf8_lossy(&text)))
    }
}

/// The body of an error that the server named.
fn refused(status: u16, text: &str) -> Outcome {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    match body["error"]["code"].as_str() {
        Some(code) => {
            Outcome::Refused { code: code.to_owned(), told: format!("status {status}: {text}") }
        }
        None => Outcome::Odd(format!("status {status} without a code: {text}")),
    }
}

/// Text of a choice, or of a piece of one; of calls their arguments, one behind the other.
fn text_of(choice: &Value) -> Option<String> {
    for calls in [&choice["message"]["tool_calls"], &choice["delta"]["tool_calls"]] {
        if let Some(calls) = calls.as_array() {
            let arguments =
                |call: &Value| call["function"]["arguments"].as_str().map(str::to_owned);
            return Some(calls.iter().filter_map(arguments).collect());
        }
    }
    // A cut answer that was to be calls has none, and no text either.
    if choice["message"].get("content").is_some_and(Value::is_null) {
        return Some(String::new());
    }
    let places = [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]];
    places.into_iter().find_map(Value::as_str).map(str::to_owned)
}

/// The reasons that OpenAI's list has, as far as a soak meets them.
const FINISHES: [&str; 3] = ["stop", "length", "tool_calls"];

/// Why a choice ended; none of a piece within.
fn finish_of(choice: &Value) -> Option<String> {
    let finish = choice["finish_reason"].as_str().filter(|name| FINISHES.contains(name));
    let exact = choice["exrail_finish_reason"].as_str();
    Some(exact.unwrap_or(finish?).to_owned())
}

/// A stream is whole when each choice has a finish reason and it carries no error and ends with `[DONE]`.
fn judge_stream(text: &str) -> Outcome {
    let mut events: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let is_done = events.pop_if(|last| *last == "[DONE]").is_some();
    let mut answer = Answer::default();
    for event in events {
        let Ok(event) = serde_json::from_str::<Value>(event) else {
            return Outcome::Odd(format!("event of another form: {event}"));
        };
        if event.get("error").is_some() {
            return match (event["error"]["code"].as_str(), is_done) {
                (Some(code), false) => {
                    Outcome::Refused { code: code.to_owned(), told: event.to_string() }
                }
                (Some(_), true) => Outcome::Odd(format!("an error and then its end: {text}")),
                (None, _) => Outcome::Odd(format!("error without a code: {event}")),
            };
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            answer.take(choice);
        }
    }
    let is_whole = answer.choices.iter().all(|(_, finish)| !finish.is_empty());
    if !is_done {
        Outcome::Odd(format!("stream without its end: {text}"))
    } else if is_whole && !answer.choices.is_empty() {
        Outcome::Complete { answer, body: None }
    } else {
        Outcome::Odd(format!("stream without a finish reason: {text}"))
    }
}

impl Answer {
    fn take(&mut self, choice: &Value) {
        let index = choice["index"].as_u64().and_then(|index| usize::try_from(index).ok());
        let index = index.unwrap_or(0);
        self.choices.resize(self.choices.len().max(index + 1), <(String, String)>::default());
        if let Some(text) = text_of(choice).filter(|text| !text.is_empty()) {
            self.choices[index].0.push_str(&text);
            self.generated += 1;
        }
        if let Some(finish) = finish_of(choice) {
            self.choices[index].1 = finish;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn is_odd(text: &str) -> bool {
        matches!(judge_stream(text), Outcome::Odd(_))
    }

    #[test]
    fn a_stream_that_ends_early_is_a_fault() {
        let whole = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n\
                     data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
                     data: [DONE]\n\n";
        let Outcome::Complete { answer, .. } = judge_stream(whole) else { panic!("it is whole") };
        let choices = vec![("a".into(), "stop".into())];
        assert_eq!(answer, Answer { choices, generated: 1, is_held: false });
        assert!(is_odd(&whole.replace("data: [DONE]\n\n", "")));
        assert!(is_odd(&whole.replace("\"stop\"", "null")));
        assert!(is_odd(&format!("data: {{\"error\":{{}}}}\n\n{whole}")));
        let error = "data: {\"error\":{\"code\":\"numeric_fault\"}}\n\n";
        assert!(is_odd(&format!("{error}{whole}")), "a failed stream never ends as a whole one");
        let Outcome::Refused { code, .. } = judge_stream(error) else { panic!("it has a name") };
        assert_eq!(code, "numeric_fault");
    }

    #[test]
    fn choices_of_a_stream_are_kept_apart() {
        let event = |index: u64, text: &str, finish: Value| {
            let choice = json!({"index": index, "text": text, "finish_reason": finish});
            format!("data: {}\n\n", json!({"choices": [choice]}))
        };
        let text = [
            event(1, "b", Value::Null),
            event(0, "a", Value::Null),
            event(0, "", json!("stop")),
            event(1, "", json!("length")),
            "data: [DONE]\n\n".to_owned(),
        ];
        let Outcome::Complete { answer, .. } = judge_stream(&text.concat()) else {
            panic!("whole")
        };
        let expected = [("a", "stop"), ("b", "length")];
        let expected = expected.map(|(text, finish)| (text.to_owned(), finish.to_owned()));
        assert_eq!((answer.choices.as_slice(), answer.generated), (&expected[..], 2));
        assert!(is_odd(&[&text[..3], &text[4..]].concat().concat()), "one has no end");
    }

    #[test]
    fn an_answer_longer_than_asked_is_a_fault() {
        let plan = Plan {
            path: "",
            body: Value::Null,
            tenant: 0,
            most_tokens: 4,
            is_stream: false,
            patience: Patience::ToTheEnd,
            is_compared: false,
            held: None,
        };
        let answer = |generated: u64| {
            json!({
                "choices": [{"text": "x", "finish_reason": "length"}],
                "usage": {"completion_tokens": generated},
            })
        };
        assert!(matches!(plan.judge_whole(answer(4)), Outcome::Complete { .. }));
        assert!(matches!(plan.judge_whole(answer(5)), Outcome::Odd(_)));
    }

    #[test]
    fn an_error_has_a_code() {
        let named = refused(500, "{\"error\":{\"code\":\"kv_integrity\"}}");
        assert!(matches!(named, Outcome::Refused { code, .. } if code == "kv_integrity"));
        assert!(matches!(refused(502, "oops"), Outcome::Odd(_)));
    }
}
