//! What a sequence says: each token drawn, told, watched, and the last event.

use std::time::Instant;

use exrail_kernels::Largest;
use exrail_text::Tokenizer;

use super::{Ending, Row, Shared, milliseconds};
use crate::constraint::Constraint;
use crate::distribution::{Summary, largest};
use crate::event::{
    Alternative, Event, Finish, Finished, SequenceFault, Timings, TokenEvent, TokenLogprob, Usage,
};
use crate::loops::{LoopGuard, LoopMonitor, OnLoop};
use crate::output::AnswerText;
use crate::request::GenerateRequest;
use crate::roll_back::{Checkpoint, RollBack};
use crate::rotation::{Rotating, RotationPlan};
use crate::sampler::Sampler;

#[derive(Debug)]
pub(super) struct Generating {
    pub(super) prompt_tokens: usize,
    pub(super) max_tokens: usize,
    pub(super) top_logprobs: Option<usize>,
    pub(super) stop_at_eos: bool,
    pub(super) stop: Vec<String>,
    pub(super) sampler: Sampler,
    pub(super) answer: AnswerText,
    pub(super) events: flume::Sender<Event>,
    pub(super) submitted: Instant,
    pub(super) admitted: Instant,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Option<Instant>,
    /// Positions sampled, the end-of-sequence token included.
    pub(super) n_sampled: usize,
    /// Token events sent.
    pub(super) n_completion: usize,
    /// Of all sampled positions, if asked for.
    pub(super) entropy_sum: Option<f64>,
    pub(super) needs_only_tokens: bool,
    /// Bytes of text sent.
    pub(super) n_text: usize,
    pub(super) loop_guard: LoopGuard,
    pub(super) loops: Option<LoopMonitor>,
    /// `None`: a loop ends the answer.
    pub(super) roll_back: Option<Box<RollBack>>,
    /// `None`: it fits as it is.
    pub(super) rotation: Option<Box<Rotating>>,
    /// `None`: it may say anything.
    pub(super) constraint: Option<Box<Constraint>>,
}

/// A token that was chosen.
#[derive(Debug)]
struct Chosen {
    id: u32,
    /// Whether the answer ends instead: `id` is an end-of-sequence token then.
    ends: bool,
    logprob: Option<TokenLogprob>,
    /// Where it was measured.
    entropy: Option<f32>,
}

impl Chosen {
    /// One of which nothing else is known.
    fn of(id: u32) -> Chosen {
        Chosen { id, ends: false, logprob: None, entropy: None }
    }
}

impl Generating {
    /// The tokens of the prompt, and what is to be said behind it.
    pub(super) fn admit(
        request: GenerateRequest,
        (constraint, rotation): (Option<Box<Constraint>>, Option<RotationPlan>),
        events: flume::Sender<Event>,
        submitted: Instant,
    ) -> (Vec<u32>, Generating) {
        let needs_only_tokens = request.needs_only_tokens();
        let n_prompt = request.prompt.len();
        let guard = request.loop_guard;
        let mut generating = Generating {
            needs_only_tokens,
            prompt_tokens: n_prompt,
            max_tokens: request.max_tokens,
            top_logprobs: request.logprobs,
            stop_at_eos: request.stop_at_eos,
            answer: AnswerText::new(request.stop.clone()),
            stop: request.stop,
            sampler: Sampler::new(request.sampling),
            events,
            submitted,
            admitted: Instant::now(),
            first_token: None,
            last_token: None,
            n_sampled: 0,
            n_completion: 0,
            entropy_sum: request.entropy.then_some(0.0),
            n_text: 0,
            loop_guard: guard.unwrap_or_default(),
            loops: guard.map(LoopMonitor::new),
            roll_back: guard.filter(|it| it.on_loop == OnLoop::RollBack).map(|_| Box::default()),
            rotation: rotation.map(|plan| Box::new(Rotating::new(plan, n_prompt))),
            constraint,
        };
        if generating.roll_back.is_some() {
            generating.remember(n_prompt);
        }
        (request.prompt, generating)
    }

    /// The next token, and what was asked for beside it.
    fn choose(
        &mut self,
        row: Row<'_>,
        tokens: &[u32],
        shared: &mut Shared<'_>,
    ) -> Result<Chosen, SequenceFault> {
        let logits = match row {
            Row::Logits(logits) => logits,
            Row::Found(Largest { index, value }) => {
                if !value.is_finite() {
                    return Err(self.not_finite());
                }
                assert!(self.constraint.is_none(), "a sequence with a grammar asks for logits");
                self.sampler.note(index);
                return Ok(Chosen::of(index));
            }
        };
        let rotation = self.rotation.take();
        let history = rotation.as_deref().map_or(tokens, |rotation| rotation.history(tokens));
        let chosen = self.choose_of(logits, history, shared);
        self.rotation = rotation;
        chosen
    }

    fn choose_of(
        &mut self,
        logits: &[f32],
        tokens: &[u32],
        shared: &mut Shared<'_>,
    ) -> Result<Chosen, SequenceFault> {
        let is_watched = self.loops.as_ref().is_some_and(LoopMonitor::wants_entropy);
        let is_measured = self.top_logprobs.is_some() || self.entropy_sum.is_some() || is_watched;
        if !is_measured && self.constraint.is_none() {
            let id = self.sampler.sample(logits, tokens, shared.scratch);
            return id.map(Chosen::of).ok_or_else(|| self.not_finite());
        }
        let summary = Summary::of(logits).ok_or_else(|| self.not_finite())?;
        let (id, ends) = if self.constraint.is_some() {
            self.choose_allowed((logits, &summary), tokens, shared)?
        } else {
            let id = self.sampler.sample(logits, tokens, shared.scratch);
            (id.ok_or_else(|| self.not_finite())?, false)
        };
        let logprob =
            self.top_logprobs.map(|n| describe(shared.tokenizer, &summary, logits, id, n));
        Ok(Chosen { id, ends, logprob, entropy: is_measured.then_some(summary.entropy) })
    }

    fn not_finite(&self) -> SequenceFault {
        SequenceFault::NumericFault { step: self.n_sampled }
    }

    pub(super) fn accept(
        &mut self,
        row: Row<'_>,
        tokens: &mut Vec<u32>,
        shared: &mut Shared<'_>,
    ) -> Option<Ending> {
        let Chosen { id, ends, logprob, entropy } = match self.choose(row, tokens, shared) {
            Ok(chosen) => chosen,
            Err(fault) => return Some(Ending::Fault(fault)),
        };
        self.n_sampled += 1;
        if let (Some(sum), Some(entropy)) = (&mut self.entropy_sum, entropy) {
            *sum += f64::from(entropy);
        }
        if ends || self.stop_at_eos && shared.eos.contains(&id) {
            tokens.push(id);
            self.note_time();
            return Some(self.ending_at_eos(id));
        }
        let told = entropy.filter(|_| self.entropy_sum.is_some());
        if let Some(ending) = self.say(id, (logprob, told), tokens, shared) {
            return Some(ending);
        }
        let bytes = text_bytes(shared.tokenizer, id);
        if let Some(ending) = self.watch(id, bytes, entropy, tokens.len()) {
            return Some(ending);
        }
        self.follow(tokens, shared)
    }

    fn note_time(&mut self) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    /// Adds a token to the answer and tells the caller; `Some` when the answer ends with it.
    pub(super) fn say(
        &mut self,
        id: u32,
        (logprob, entropy): (Option<TokenLogprob>, Option<f32>),
        tokens: &mut Vec<u32>,
        shared: &Shared<'_>,
    ) -> Option<Ending> {
        tokens.push(id);
        self.note_time();
        let bytes = text_bytes(shared.tokenizer, id);
        if let Some(rotation) = &mut self.rotation {
            rotation.push(id, bytes);
        }
        let piece = self.answer.push(bytes);
        self.n_text += piece.text.len();
        if let Some(constraint) = &mut self.constraint {
            constraint.keep(&piece.text);
        }
        let event = TokenEvent { id, text: piece.text, logprob, entropy };
        self.n_completion += 1;
        if self.events.send(Event::Token(event)).is_err() {
            return Some(Ending::Gone);
        }
        if let Some(index) = piece.stopped {
            return Some(self.ending_at_stop(index, shared.tokenizer));
        }
        self.ending_by_itself()
    }

    /// Looks for a loop behind a token, with so many tokens of the context; `Some` when the answer ends with it.
    fn watch(
        &mut self,
        id: u32,
        bytes: &[u8],
        entropy: Option<f32>,
        n_tokens: usize,
    ) -> Option<Ending> {
        let found = self.loops.as_mut().and_then(|loops| loops.note(id, bytes, entropy));
        let Some(roll_back) = &mut self.roll_back else {
            return found.map(|_| Ending::finish(Finish::Degenerate));
        };
        if let Some(found) = found {
            let goes_back = roll_back.decide(found, self.n_completion);
            return (!goes_back).then(|| Ending::finish(Finish::Degenerate));
        }
        if RollBack::wants(self.n_completion) {
            self.remember(n_tokens);
        }
        None
    }

    /// Remembers the answer as it is, where it may go back; with so many tokens of the context.
    pub(super) fn remember(&mut self, n_tokens: usize) {
        let place = Checkpoint {
            n_tokens,
            n_completion: self.n_completion,
            n_sampled: self.n_sampled,
            n_text: self.n_text,
            entropy_sum: self.entropy_sum,
            sampler: self.sampler.clone(),
            answer: self.answer.clone(),
            json: self.rotation.as_deref().map(Rotating::json),
            grammar: self.constraint.as_deref().map(Constraint::mark),
        };
        if let Some(roll_back) = &mut self.roll_back {
            roll_back.remember(place);
        }
    }

    /// Is as it was, but for the sampler's penalty, and tells the caller. `n_back` tokens are gone. Or says why it
    /// cannot go on.
    pub(super) fn go_back(&mut self, place: Checkpoint, n_back: usize) -> Option<SequenceFault> {
        let Checkpoint {
            n_completion,
            n_sampled,
            n_text,
            entropy_sum,
            sampler,
            answer,
            json,
            grammar,
            ..
        } = place;
        (self.n_completion, self.n_sampled, self.n_text) = (n_completion, n_sampled, n_text);
        (self.entropy_sum, self.answer) = (entropy_sum, answer);
        self.sampler.go_back(sampler);
        self.needs_only_tokens = false;
        if let (Some(rotation), Some(json)) = (&mut self.rotation, json) {
            rotation.go_back(n_back, json);
        }
        self.loops = Some(LoopMonitor::new(self.loop_guard));
        drop(self.events.send(Event::RolledBack { n_tokens: n_completion, n_text }));
        self.constraint_goes_back(grammar)
    }

    /// A send fails only when the caller is gone; then nobody needs the event.
    pub(super) fn end(&mut self, ending: Ending, cached_tokens: usize) {
        let (mut finish, mut stop_string) = match ending {
            Ending::Finish { finish, stop_string } => (finish, stop_string),
            Ending::Fault(fault) => {
                drop(self.events.send(Event::Failed(fault)));
                return;
            }
            Ending::Gone => return,
        };
        if stop_string.is_none() {
            let tail = self.answer.finish();
            stop_string = tail.stopped.and_then(|index| self.stop.get(index).cloned());
            finish = self.finish_of_tail(finish, tail.stopped.is_some());
            if !tail.text.is_empty() {
                drop(self.events.send(Event::Tail(tail.text)));
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "answers are far below 2^52 tokens")]
        let n = self.n_sampled.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, reason = "entropies are reported in f32")]
        let entropy_mean = self.entropy_sum.map(|sum| (sum / n) as f32);
        let end = Instant::now();
        let first = self.first_token.unwrap_or(end);
        drop(self.events.send(Event::Finished(Finished {
            finish,
            stop_string,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.n_completion,
                cached_tokens,
            },
            timings: Timings {
                queue_ms: milliseconds(self.submitted, self.admitted),
                prefill_ms: milliseconds(self.admitted, first),
                decode_ms: milliseconds(first, self.last_token.unwrap_or(first)),
            },
            entropy_mean,
            constrained: self.constraint.as_deref_mut().map(Constraint::told),
        })));
    }
}

/// Control tokens are structure, not text: they are reported as tokens and show nothing.
fn text_bytes(tokenizer: &Tokenizer, id: u32) -> &[u8] {
    if tokenizer.is_control(id) { &[] } else { tokenizer.token_bytes(id).unwrap_or(&[]) }
}

fn describe(
    tokenizer: &Tokenizer,
    summary: &Summary,
    logits: &[f32],
    id: u32,
    n_top: usize,
) -> TokenLogprob {
    let top = largest(logits, n_top)
        .into_iter()
        .map(|(id, x)| Alternative {
            id,
            logprob: summary.logprob(x),
            bytes: text_bytes(tokenizer, id).to_vec(),
        })
        .collect();
    TokenLogprob {
        logprob: summary.logprob(logits[id as usize]),
        bytes: text_bytes(tokenizer, id).to_vec(),
        top,
    }
}
