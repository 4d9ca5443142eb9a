//! One client of the soak: random requests, one after the other, some of them given up.

use std::{io, net::SocketAddr, time::Duration};

use serde_json::{Value, json};

use super::http::Exchange;
use crate::random::Random;

/// Longest wait for any byte of an answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Words of the prompts; what they say does not matter, that prompts differ does.
const WORDS: [&str; 16] = [
    "river", "seven", "engine", "because", "paper", "under", "green", "clock", "ask", "window",
    "often", "north", "letter", "quiet", "number", "again",
];

/// What became of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A whole, well-formed answer.
    Complete { generated: u64 },
    /// This client hung up.
    Cancelled,
    /// The server was full (429) and said so.
    Full,
    /// Anything else: the soak fails.
    Fault(String),
}

/// When a client hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// Never.
    ToTheEnd,
    /// After so long without the head of an answer.
    Before(Duration),
    /// After so many pieces of a stream.
    Pieces(u64),
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    body: Value,
    max_tokens: u64,
    is_stream: bool,
    patience: Patience,
}

impl Plan {
    /// Draws a request. The nonce makes every prompt new to any cache.
    pub(crate) fn draw(random: &mut Random, model: &str, cancel_percent: u64) -> Self {
        let nonce = random.next();
        let n_words = 1 + random.below(300);
        let words: Vec<_> = (0..n_words).map(|_| WORDS[random.below(16) as usize]).collect();
        let (max_tokens, is_stream) = (1 + random.below(96), random.chance(50));
        let patience = match (random.chance(cancel_percent), is_stream) {
            (false, _) => Patience::ToTheEnd,
            (true, true) if random.chance(70) => Patience::Pieces(1 + random.below(20)),
            (true, _) => Patience::Before(Duration::from_millis(random.below(2000))),
        };
        let body = json!({
            "model": model,
            "messages": [{"role": "user", "content": format!("{nonce:016x} {}", words.join(" "))}],
            "max_tokens": max_tokens,
            "stream": is_stream,
            "temperature": if random.chance(50) { 0.0 } else { 1.0 },
            "seed": nonce >> 1,
        });
        Self { body, max_tokens, is_stream, patience }
    }

    /// Sends the request and judges the answer.
    pub(crate) fn run(&self, server: SocketAddr) -> Outcome {
        self.exchange(server).unwrap_or_else(|error| Outcome::Fault(format!("transport: {error}")))
    }

    fn exchange(&self, server: SocketAddr) -> io::Result<Outcome> {
        let body = self.body.to_string();
        let path = "/v1/chat/completions";
        let mut exchange = Exchange::send(server, "POST", path, body.as_bytes(), PATIENCE)?;
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
            let text = String::from_utf8_lossy(&body).into_owned();
            return Ok(Outcome::Fault(format!("status {status}: {text}")));
        }
        if self.is_stream { self.read_stream(exchange) } else { self.read_whole(exchange) }
    }

    fn read_whole(&self, mut exchange: Exchange) -> io::Result<Outcome> {
        let body = exchange.rest()?;
        Ok(self.judge_whole(&serde_json::from_slice(&body)?))
    }

    fn judge_whole(&self, answer: &Value) -> Outcome {
        let generated = answer["usage"]["completion_tokens"].as_u64();
        let finish = answer["choices"][0]["finish_reason"].as_str();
        match (finish, generated) {
            (Some("stop" | "length"), Some(generated)) if generated <= self.max_tokens => {
                Outcome::Complete { generated }
            }
            (_, _) => Outcome::Fault(format!("answer of another form: {answer}")),
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

/// A stream is whole when it names a finish reason, carries no error and ends with `[DONE]`.
fn judge_stream(text: &str) -> Outcome {
    let mut events: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    if events.pop() != Some("[DONE]") {
        return Outcome::Fault(format!("stream without its end: {text}"));
    }
    let (mut generated, mut is_finished) = (0, false);
    for event in events {
        let Ok(event) = serde_json::from_str::<Value>(event) else {
            return Outcome::Fault(format!("event of another form: {event}"));
        };
        if event.get("error").is_some() {
            return Outcome::Fault(format!("error in a stream: {event}"));
        }
        generated += u64::from(event["choices"][0]["delta"]["content"].is_string());
        is_finished |= event["choices"][0]["finish_reason"].is_string();
    }
    if is_finished {
        Outcome::Complete { generated }
    } else {
        Outcome::Fault(format!("stream without a finish reason: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_ends_early_is_a_fault() {
        let whole = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n\
                     data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
                     data: [DONE]\n\n";
        assert_eq!(judge_stream(whole), Outcome::Complete { generated: 1 });
        let cut = whole.replace("data: [DONE]\n\n", "");
        assert!(matches!(judge_stream(&cut), Outcome::Fault(_)));
        let unfinished = whole.replace("\"stop\"", "null");
        assert!(matches!(judge_stream(&unfinished), Outcome::Fault(_)));
        let failed = format!("data: {{\"error\":{{}}}}\n\n{whole}");
        assert!(matches!(judge_stream(&failed), Outcome::Fault(_)));
    }

    #[test]
    fn an_answer_longer_than_asked_is_a_fault() {
        let plan = Plan {
            body: Value::Null,
            max_tokens: 4,
            is_stream: false,
            patience: Patience::ToTheEnd,
        };
        let answer = |generated: u64| {
            json!({
                "choices": [{"finish_reason": "length"}],
                "usage": {"completion_tokens": generated},
            })
        };
        assert_eq!(plan.judge_whole(&answer(4)), Outcome::Complete { generated: 4 });
        assert!(matches!(plan.judge_whole(&answer(5)), Outcome::Fault(_)));
    }

    #[test]
    fn no_two_prompts_are_equal() {
        let mut random = Random::new(3);
        let mut draw = || Plan::draw(&mut random, "m", 30).body["messages"].to_string();
        assert_ne!(draw(), draw());
    }
}
