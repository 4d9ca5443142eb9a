//! One request's sequences, from submission to whole choices or to a stream.

use std::{sync::Arc, time::Instant};

use exrail_engine::{
    EngineHandle, Event, Finish, Finished, GenerateRequest, Generation, Rotated, TokenLogprob,
};
use exrail_verify::Leak;
use exrail_wire as wire;
use futures_util::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};

use crate::{
    error::ApiError,
    leak::LEAK,
    rules::HeldRules,
    structured::{Lock, Reply},
    translate,
};

/// A choice that ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) logprobs: Vec<LogprobAt>,
    pub(crate) ids: Vec<u32>,
    pub(crate) rotations: Vec<RotatedAt>,
    /// What the answer was about to repeat of a system message; it ends before that.
    pub(crate) leak: Option<Leak>,
    /// Tokens that the loop guard took back.
    pub(crate) rolled_back: Option<usize>,
    pub(crate) finished: Option<Finished>,
    /// What it was held to.
    pub(crate) lock: Option<Arc<Lock>>,
    /// Hard rules that its context must not lose.
    pub(crate) rules: Option<Arc<HeldRules>>,
    /// What may be told of it; of a choice that is held to nothing, the text is all of it.
    pub(crate) reply: Option<Reply>,
    /// Answers before this one that did not conform, and the tokens that they took.
    pub(crate) n_repairs: usize,
    pub(crate) n_withheld_tokens: usize,
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

/// One request per choice; they differ in their random sequence only.
pub(crate) fn requests(base: &GenerateRequest, choices: usize) -> Vec<GenerateRequest> {
    (0..choices).map(|choice| translate::per_choice(base.clone(), choice)).collect()
}

/// Submits one sequence per request. All are accepted or none is left running: a refused one drops
/// those before it, which cancels them.
pub(crate) fn submit(
    engine: &EngineHandle,
    requests: &[GenerateRequest],
) -> Result<Vec<Generation>, ApiError> {
    requests.iter().map(|request| Ok(engine.submit(request.clone())?)).collect()
}

/// The events of all sequences as they come, each with its choice's index.
pub(crate) fn events(
    generations: Vec<Arc<Generation>>,
) -> impl Stream<Item = (usize, Event)> + Send {
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
    let generations = generations.into_iter().map(Arc::new).collect();
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
    /// One that has not begun.
    pub(crate) fn held_to(lock: Option<&Arc<Lock>>, rules: Option<&Arc<HeldRules>>) -> Choice {
        Choice { lock: lock.cloned(), rules: rules.cloned(), ..Choice::default() }
    }

    /// Why it ended; a choice without an end has been given up, and so has one that was about to leak.
    pub(crate) fn finish(&self) -> Finish {
        let finished = self.finished.as_ref().filter(|_| self.leak.is_none());
        finished.map_or(Finish::Cancelled, |finished| finished.finish)
    }

    /// Whether it holds calls.
    pub(crate) fn has_calls(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| !reply.calls.is_empty())
    }

    /// The log-probabilities of what is told: those of thoughts are not.
    pub(crate) fn told_logprobs(&self) -> &[LogprobAt] {
        let Some(reply) = &self.reply else { return &self.logprobs };
        if !self.text.ends_with(&reply.content) {
            return &[];
        }
        let from = self.text.chars().count() - reply.content.chars().count();
        let first = self.logprobs.partition_point(|at| at.text_offset < from);
        &self.logprobs[first..]
    }

    /// Why it ended, by its own name.
    fn reason(&self) -> Option<&'static str> {
        let of_engine = self.finished.as_ref().map(|finished| finish_reason(finished.finish));
        self.leak.map(|_| LEAK).or(of_engine)
    }

    /// Why it ended, as clients are told.
    pub(crate) fn told(&self) -> Told {
        match self.reason() {
            None => Told::default(),
            Some(_) if self.finish() == Finish::Stop && self.has_calls() => {
                Told { finish_reason: Some("tool_calls"), exrail_finish_reason: None }
            }
            Some(reason) => Told::named(reason),
        }
    }

    /// The text of a choice that was released: what its client was told, without thoughts.
    pub(crate) fn released(&self) -> String {
        self.reply.as_ref().map_or(&self.text, |reply| &reply.content).clone()
    }

    /// Adds an event; a failure of the sequence is the request's.
    pub(crate) fn take(&mut self, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Started { .. } => {}
            Event::Rotated(rotated) => {
                if let Some(rules) = &self.rules {
                    rules.stay(&rotated)?;
                }
                self.rotations.push(RotatedAt { at: self.ids.len(), rotated });
            }
            Event::Token(token) => {
                self.ids.push(token.id);
                let text_offset = self.text.chars().count();
                if let Some(logprob) = token.logprob {
                    self.logprobs.push(LogprobAt { logprob, text_offset });
                }
                self.text.push_str(&token.text);
                let marker = self.lock.as_ref().and_then(|lock| lock.marker(token.id));
                if let Some(marker) = marker.map(str::to_owned) {
                    self.text.push_str(&marker);
                }
            }
            Event::RolledBack { n_tokens, n_text } => {
                self.rolled_back = Some(self.ids.len() - n_tokens);
                self.ids.truncate(n_tokens);
                // The engine counts its own text, which has no markers.
                let marker = |id: &u32| self.lock.as_ref()?.marker(*id);
                let n_markers: usize = self.ids.iter().filter_map(marker).map(str::len).sum();
                self.text.truncate(self.text.floor_char_boundary(n_text + n_markers));
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
    let told: usize = usages().map(|usage| usage.completion_tokens).sum();
    let withheld: usize = choices.iter().map(|choice| choice.n_withheld_tokens).sum();
    wire::Usage::new(prompt, told + withheld, cached)
}

/// Why an answer ended, by its own name: in records and on routes of our own.
pub(crate) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Degenerate => "degenerate",
        Finish::RotationRequired => "context_rotation_required",
        Finish::SchemaIncomplete => "schema_incomplete",
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
    /// For a reason of our own names.
    pub(crate) fn named(exact: &'static str) -> Told {
        let listed = match exact {
            "stop" => "stop",
            // An answer that a guard has cut is what OpenAI's list calls so.
            LEAK => "content_filter",
            _ => "length",
        };
        let exrail_finish_reason = (listed != exact).then_some(exact);
        Told { finish_reason: Some(listed), exrail_finish_reason }
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
        reasons.extend(choice.reason());
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
        structured: structured(choices),
        constraints: choices.first().and_then(|choice| Some(choice.rules.as_ref()?.record())),
    }
}

/// What the choices were held to, if to anything.
fn structured(choices: &[Choice]) -> Option<wire::StructuredRecord> {
    let lock = choices.first()?.lock.as_ref()?;
    let replies = choices.iter().filter_map(|choice| choice.reply.as_ref());
    let calls = replies.flat_map(|reply| &reply.calls).map(|call| wire::CallRecord {
        name: call.name.clone(),
        dedupe_key: call.dedupe_key.clone(),
    });
    let tool_calls: Vec<wire::CallRecord> = calls.collect();
    Some(wire::StructuredRecord {
        schema_hash: lock.schema_hash()?.into(),
        contracts: lock.contracts(),
        is_complete: choices.iter().all(|choice| choice.finish() == Finish::Stop),
        n_tool_calls: tool_calls.len(),
        tool_calls,
        n_repairs: choices.iter().map(|choice| choice.n_repairs).sum(),
    })
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Milliseconds since then.
pub(crate) fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
