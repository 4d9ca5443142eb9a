//! One request's sequences, from submission to whole choices or to a stream.

use std::time::Instant;

use exrail_engine::{
    EngineHandle, Event, Finish, Finished, GenerateRequest, Generation, Rotated, TokenLogprob,
};
use exrail_wire as wire;
use futures_util::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};

use crate::{error::ApiError, translate};

/// A choice that ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) logprobs: Vec<LogprobAt>,
    pub(crate) ids: Vec<u32>,
    pub(crate) rotations: Vec<RotatedAt>,
    /// Tokens that the loop guard took back.
    pub(crate) rolled_back: Option<usize>,
    pub(crate) finished: Option<Finished>,
}

/// A rotation, and the tokens of the answer before it.
#[derive(Clone, Debug)]
pub(crate) struct RotatedAt {
    pub(crate) at: usize,
    pub(crate) rotated: Rotated,
}

/// A token's log-probabilities, and where its text begins in the answer.
#[derive(Clone, Debug)]
pub(crate) struct LogprobAt {
    pub(crate) logprob: TokenLogprob,
    pub(crate) text_offset: usize,
}

/// Submits one sequence per choice. All are accepted or none is left running: a refused one drops
/// those before it, which cancels them.
pub(crate) fn submit(
    engine: &EngineHandle,
    request: &GenerateRequest,
    choices: usize,
) -> Result<Vec<Generation>, ApiError> {
    (0..choices)
        .map(|choice| Ok(engine.submit(translate::per_choice(request.clone(), choice))?))
        .collect()
}

/// The events of all sequences as they come, each with its choice's index.
pub(crate) fn events(generations: Vec<Generation>) -> impl Stream<Item = (usize, Event)> + Send {
    let streams = generations.into_iter().enumerate().map(|(index, generation)| {
        let events = generation.events.clone().into_stream();
        // The generation rides along: dropping the stream cancels the sequence.
        stream::unfold((events, generation), move |(mut events, generation)| async move {
            let event = events.next().await?;
            Some(((index, event), (events, generation)))
        })
        .boxed()
    });
    stream::select_all(streams)
}

/// Waits for all choices, one for each generation.
pub(crate) async fn collect(
    generations: Vec<Generation>,
    choices: &mut [Choice],
    mut first_token: impl FnMut(),
) -> Result<(), ApiError> {
    let mut events = std::pin::pin!(events(generations));
    let mut saw_token = false;
    while let Some((index, event)) = events.next().await {
        if matches!(event, Event::Token(_)) && !saw_token {
            saw_token = true;
            first_token();
        }
        choices[index].take(event)?;
    }
    if choices.iter().any(|choice| choice.finished.is_none()) {
        return Err(ApiError::Lost);
    }
    Ok(())
}

impl Choice {
    /// Adds an event; a failure of the sequence is the request's.
    pub(crate) fn take(&mut self, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Started { .. } => {}
            Event::Rotated(rotated) => {
                self.rotations.push(RotatedAt { at: self.ids.len(), rotated });
            }
            Event::Token(token) => {
                self.ids.push(token.id);
                let text_offset = self.text.chars().count();
                if let Some(logprob) = token.logprob {
                    self.logprobs.push(LogprobAt { logprob, text_offset });
                }
                self.text.push_str(&token.text);
            }
            Event::RolledBack { n_tokens, n_text } => {
                self.rolled_back = Some(self.ids.len() - n_tokens);
                self.ids.truncate(n_tokens);
                self.text.truncate(n_text);
                self.logprobs.truncate(n_tokens);
            }
            Event::Tail(text) => self.text.push_str(&text),
            Event::Finished(finished) => self.finished = Some(finished),
            Event::Failed(fault) => return Err(fault.into()),
        }
        Ok(())
    }
}

/// Usage over all choices of one prompt.
pub(crate) fn usage(choices: &[Choice]) -> wire::Usage {
    let usages = || choices.iter().filter_map(|choice| choice.finished.as_ref()).map(|f| f.usage);
    let prompt = usages().map(|usage| usage.prompt_tokens).max().unwrap_or(0);
    let cached = usages().map(|usage| usage.cached_tokens).max().unwrap_or(0);
    wire::Usage::new(prompt, usages().map(|usage| usage.completion_tokens).sum(), cached)
}

/// Why an answer ended, by its own name: in records and on routes of our own.
pub(crate) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Degenerate => "degenerate",
        Finish::RotationRequired => "context_rotation_required",
        Finish::Cancelled => "cancelled",
    }
}

/// Why an answer ended, as clients of OpenAI's API are told. Their types know a closed list of reasons, and
/// some refuse a whole answer for one that is not in it; `length` is what they take a cut answer for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// Of OpenAI's list.
    pub(crate) finish_reason: Option<&'static str>,
    /// The reason itself, where the list has no word for it.
    pub(crate) exrail_finish_reason: Option<&'static str>,
}

impl Told {
    pub(crate) fn of(finished: Option<&Finished>) -> Told {
        finished.map_or_else(Told::default, |f| Told::named(finish_reason(f.finish)))
    }

    /// For a reason of our own names.
    pub(crate) fn named(exact: &'static str) -> Told {
        let is_listed = ["stop", "length"].contains(&exact);
        let listed = if is_listed { exact } else { "length" };
        Told { finish_reason: Some(listed), exrail_finish_reason: (!is_listed).then_some(exact) }
    }
}

/// The trace record of a generation without a collection.
pub(crate) fn trace_body(route: &'static str, seed: u64, choices: &[Choice]) -> wire::TraceBody {
    let mut hash = Sha256::new();
    let mut reasons = Vec::new();
    let mut latency = wire::Latency::default();
    for choice in choices {
        hash.update(choice.text.as_bytes());
        let Some(finished) = &choice.finished else { continue };
        reasons.push(finish_reason(finished.finish));
        latency.queue = latency.queue.max(finished.timings.queue_ms);
        latency.prefill = latency.prefill.max(finished.timings.prefill_ms);
        latency.decode = latency.decode.max(finished.timings.decode_ms);
    }
    reasons.dedup();
    let usage = usage(choices);
    wire::TraceBody::Infer {
        route,
        seed,
        finish_reason: reasons.join(","),
        answer_sha256: hex(&hash.finalize()),
        tokens: wire::TokenCounts {
            r#in: usage.prompt_tokens,
            out: usage.completion_tokens,
            cached: usage.prompt_tokens_details.cached_tokens,
        },
        latency_ms: latency,
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Milliseconds since then.
pub(crate) fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
