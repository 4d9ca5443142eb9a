//! What the engine tells a caller about its sequence.

use thiserror::Error;

use crate::cache::PageFault;
use crate::handle::Command;
use crate::rotation::Rotated;

/// Names one submitted sequence of this engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One message about a sequence. The order is `Started`, `Token`* with a `Rotated` behind those that filled
/// their place and one `RolledBack` at most, `Tail`?, then exactly one of `Finished` and `Failed`; a sequence may fail or be cancelled before it started.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The sequence left the queue and owns its pages.
    Started {
        /// Time in the queue.
        queue_ms: f64,
        /// Prompt tokens whose keys and values were in the cache: a multiple of 256, below the prompt's
        /// length.
        cached_tokens: usize,
    },
    /// One sampled token. The end-of-sequence token that ends an answer is not reported.
    Token(TokenEvent),
    /// Part of prompt and answer left the context; the tokens that follow do not see it.
    Rotated(Rotated),
    /// The answer went round in a circle, and goes on from before it ([`crate::OnLoop::RollBack`]): of what was
    /// sent this much stays.
    RolledBack {
        /// Token events.
        n_tokens: usize,
        /// Bytes of text.
        n_text: usize,
    },
    /// Text that was held back as the possible start of a stop string, or an unfinished UTF-8
    /// character, released because the answer ended. Belongs after the last token's text.
    Tail(String),
    /// The answer ended as asked.
    Finished(Finished),
    /// The sequence was given up; no text follows.
    Failed(SequenceFault),
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Vocabulary id.
    pub id: u32,
    /// Text that became certain with this token: whole UTF-8 characters, no part of a stop string.
    /// Often empty; joined over all events (and the tail) it is the answer.
    pub text: String,
    /// Present when the request asked for log-probabilities.
    pub logprob: Option<TokenLogprob>,
    /// Entropy of the model's distribution in nats, before penalties and temperature. Present when
    /// the request asked for it.
    pub entropy: Option<f32>,
}

/// Log-probabilities at one position: log-softmax of the raw logits over the tokenizer's
/// vocabulary, before penalties, bias and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Of the sampled token, whether or not it is among `top`.
    pub logprob: f32,
    /// Bytes of the sampled token; joined they are the answer before UTF-8 repair.
    pub bytes: Vec<u8>,
    /// The most likely tokens, most likely first, as asked.
    pub top: Vec<Alternative>,
}

/// One of the most likely tokens at a position.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// Vocabulary id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// End-of-sequence token or stop string.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// The answer went round in a circle, and [`crate::LoopGuard`] ended it (G-19).
    Degenerate,
    /// The context is full and may not be rotated.
    RotationRequired,
    /// What there is, is no whole answer of the request's grammar: the tokens were used up or no way to an end
    /// fits them, or a stop string came inside. Nobody may take it for a value.
    SchemaIncomplete,
    /// The caller cancelled.
    Cancelled,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub finish: Finish,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Token counts.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// Mean entropy of the sampled positions in nats; 0 without any. Present when the request asked
    /// for it.
    pub entropy_mean: Option<f32>,
    /// What the grammar did. Present when the request had one.
    pub constrained: Option<Constrained>,
}

/// What a grammar did to an answer (G-13).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Constrained {
    /// Whether the answer is a whole one of its grammar. Always true of [`Finish::Stop`].
    pub is_complete: bool,
    /// Tokens that were drawn under a mask, the end-of-sequence token included.
    pub n_masked: usize,
    /// Tokens that were bound to follow, and cost no step of their own.
    pub n_forced: usize,
    /// Tokens of a shortest end that was followed because no other fitted what was left of `max_tokens`.
    pub n_closing: usize,
    /// Drawn tokens where the model's first choice was not allowed.
    pub n_argmax_masked: usize,
    /// Least share of the model's probability, before penalties and temperature, that lay on allowed tokens;
    /// 1 without a drawn token.
    pub allowed_mass_min: f32,
    /// Mean of that share over the drawn tokens; 1 without any.
    pub allowed_mass_mean: f32,
    /// Whether that share was below [`MIN_ALLOWED_MASS`] for [`LOW_MASS_STEPS`] drawn tokens in a row: prompt
    /// and grammar ask for different things.
    pub is_mass_low: bool,
}

/// Share of the probability below which a model is forced; guardrails G-13, `min_allowed_mass`.
pub const MIN_ALLOWED_MASS: f32 = 1e-2;
/// Drawn tokens in a row below [`MIN_ALLOWED_MASS`] that are told; guardrails G-13.
pub const LOW_MASS_STEPS: usize = 3;

/// Token counts of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Token events; the end-of-sequence token does not count.
    pub completion_tokens: usize,
    /// Prompt tokens whose keys and values were in the cache when the sequence was admitted.
    pub cached_tokens: usize,
}

/// Times of one sequence in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Submit to admission.
    pub queue_ms: f64,
    /// Admission to the first sampled token.
    pub prefill_ms: f64,
    /// First to last sampled token.
    pub decode_ms: f64,
}

/// Why a sequence was given up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SequenceFault {
    /// The model gave NaN or an infinity.
    #[error("numeric fault: non-finite logits at generated token {step}")]
    NumericFault {
        /// Tokens sampled before.
        step: usize,
    },
    /// A page of this sequence, or the page books, broke an invariant. Asked again, it is computed
    /// without what was found broken.
    #[error("kv integrity: {0}")]
    KvIntegrity(PageFault),
    /// The step panicked; every sequence in that batch fails.
    #[error("step {step} panicked: {message}")]
    StepPanicked {
        /// Engine step.
        step: u64,
        /// The panic's message.
        message: String,
    },
    /// The deadline of the request passed first.
    #[error(
        "deadline: passed {phase}, after {n_tokens} generated tokens; allow more time or ask for fewer"
    )]
    DeadlineExceeded {
        /// What it was in.
        phase: LatePhase,
        /// Tokens generated before.
        n_tokens: usize,
    },
    /// The automaton of the request's grammar failed: it ran out of what one answer may take, or has a fault.
    #[error("grammar: the automaton failed at generated token {step}: {message}")]
    GrammarFault {
        /// Tokens generated before.
        step: usize,
        /// What it said.
        message: String,
    },
    /// The engine stopped before the answer was complete.
    #[error("the engine stopped")]
    Stopped,
}

/// What a sequence was in when its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LatePhase {
    /// It had no place in the batch yet.
    Queue,
    /// Its prompt was being read.
    Prefill,
    /// Its answer was being generated.
    Decode,
}

impl std::fmt::Display for LatePhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LatePhase::Queue => "in the queue",
            LatePhase::Prefill => "while the prompt was read",
            LatePhase::Decode => "while the answer was generated",
        })
    }
}

/// A running sequence seen from the caller. Dropping it cancels the sequence.
///
/// The channel is unbounded so that a caller who does not read never slows other sequences; it
/// holds at most 3 `max_tokens` + 4 small events, so its memory is bounded by the request.
#[derive(Debug)]
pub struct Generation {
    /// Name for logs and traces.
    pub id: SequenceId,
    /// The events, in order. Disconnects after `Finished` or `Failed`; a disconnect without either
    /// means that the engine is gone.
    pub events: flume::Receiver<Event>,
    pub(crate) commands: flume::Sender<Command>,
}

impl Generation {
    /// Asks the engine to stop; its pages are free within one step. `Finished` with
    /// [`Finish::Cancelled`] follows unless the sequence ended before.
    pub fn cancel(&self) {
        // A stopped engine has already failed the sequence.
        drop(self.commands.send(Command::Cancel(self.id)));
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel();
    }
}
