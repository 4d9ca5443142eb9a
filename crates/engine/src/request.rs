//! What a caller asks of the engine, and the check that each option can be honoured.

use std::time::Instant;

use exrail_grammar::Grammar;

use crate::error::SubmitError;
use crate::loops::LoopGuard;
use crate::rotation::Rotation;

/// Most alternatives a caller may ask for beside a token; the limit of the OpenAI protocol.
pub const MAX_TOP_LOGPROBS: usize = 20;
/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string in bytes: text of this length may be held back.
pub const MAX_STOP_BYTES: usize = 256;
/// Largest absolute logit bias; ±100 forces or bans a token in practice.
pub const MAX_LOGIT_BIAS: f32 = 100.0;

/// One sequence to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Token ids of the prompt, special tokens included.
    pub prompt: Vec<u32>,
    /// Most tokens to sample, at least 1. Prompt plus this must fit the context, unless it may rotate.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// `Some(n)`: each token event carries its log-probability and the n most likely tokens.
    pub logprobs: Option<usize>,
    /// Whether each token event carries the entropy of the model's distribution. Without it, and
    /// with nothing else that needs every logit, a greedy answer is decoded from the largest one
    /// alone, and a GPU draws the tokens of any answer, which is faster; they are the same.
    pub entropy: bool,
    /// Whether an end-of-sequence token ends the answer; `false` runs to `max_tokens`.
    pub stop_at_eos: bool,
    /// Whose prompt it is: only prompts of one tenant share cached prefixes, so that nobody learns of
    /// another's prompt by its time to the first token, and tenants get equal shares of the engine while
    /// they wait for it. `None` is a tenant of its own.
    pub tenant: Option<String>,
    /// Whether it reads cached prefixes and leaves its own; `false` computes all of it, and nobody finds what
    /// it computed.
    pub prefix_cache: bool,
    /// What happens when prompt and answer outgrow their place in the cache.
    pub rotation: Rotation,
    /// Before which of the same tenant's requests.
    pub priority: Priority,
    /// When the whole answer is of no use any more: the sequence then fails with
    /// [`crate::SequenceFault::DeadlineExceeded`], waiting or running.
    pub deadline: Option<Instant>,
    /// Whether the answer ends when it goes round in a circle; `None` lets it go on to `max_tokens`.
    pub loop_guard: Option<LoopGuard>,
    /// What the answer may be, of [`crate::EngineHandle::grammars`] of the same engine or of one with the same
    /// tokenizer; `None`: any text. It needs `stop_at_eos`.
    pub grammar: Option<Grammar>,
}

/// Before which of the same tenant's requests a request leaves the queue: where all three wait, they get 4
/// to 2 to 1 of the tenant's tokens. It changes nothing between tenants, and nothing once admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// Somebody waits for it.
    High,
    /// Most requests.
    #[default]
    Normal,
    /// Whenever there is room.
    Low,
}

impl GenerateRequest {
    /// A request with default sampling that ends at the end-of-sequence token and never rotates.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
        GenerateRequest {
            prompt,
            max_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            logprobs: None,
            entropy: false,
            stop_at_eos: true,
            tenant: None,
            prefix_cache: true,
            priority: Priority::default(),
            deadline: None,
            loop_guard: None,
            grammar: None,
            rotation: Rotation::default(),
        }
    }

    /// Whether its tokens, drawn from the logits as they are, are all that it needs of them.
    pub(crate) fn needs_only_tokens(&self) -> bool {
        let is_watched = self.loop_guard.is_some_and(|guard| guard.entropy_baseline.is_some());
        let is_free = self.grammar.is_none() && !self.sampling.adjusts();
        is_free && self.logprobs.is_none() && !self.entropy && !is_watched
    }

    /// Refuses options that cannot be honoured; lengths are checked by the engine.
    ///
    /// # Errors
    /// [`SubmitError::BadOption`] naming the field, [`SubmitError::EmptyPrompt`], or
    /// [`SubmitError::UnknownToken`] for an id outside the vocabulary of `vocab_len` tokens.
    pub fn validate(&self, vocab_len: usize) -> Result<(), SubmitError> {
        if self.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(&id) = self.prompt.iter().find(|&&id| id as usize >= vocab_len) {
            return Err(SubmitError::UnknownToken { id, vocab_len });
        }
        require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)?;
        require(
            self.logprobs.is_none_or(|n| n <= MAX_TOP_LOGPROBS),
            "logprobs",
            "0 to 20",
            self.logprobs.unwrap_or(0),
        )?;
        require(
            self.stop.len() <= MAX_STOP_STRINGS,
            "stop",
            "at most 16 strings",
            self.stop.len(),
        )?;
        for stop in &self.stop {
            let fits = (1..=MAX_STOP_BYTES).contains(&stop.len());
            require(fits, "stop", "strings of 1 to 256 bytes", stop.len())?;
        }
        let baseline = self.loop_guard.and_then(|guard| guard.entropy_baseline);
        let is_entropy = baseline.is_none_or(|nats| nats.is_finite() && nats >= 0.0);
        let found = baseline.unwrap_or_default();
        require(is_entropy, "entropy_baseline", "nats, at least 0", found)?;
        let ends = self.grammar.is_none() || self.stop_at_eos;
        require(ends, "stop_at_eos", "true with a grammar", self.stop_at_eos)?;
        self.sampling.validate(vocab_len)
    }
}

/// How the next token is drawn from the logits.
///
/// Order: penalties (repetition, then presence and frequency) → logit bias → temperature → top-k →
/// top-p → min-p → draw. Each later filter sees the distribution renormalised over what the earlier
/// ones left. Log-probabilities and entropy are taken before all of it.
///
/// From the temperature on it is integers that are added and compared, as [`exrail_kernels::Draw`] defines:
/// from equal logits every device draws the same token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it, 0 to 5; 0 means greedy: the largest logit, lowest id on a tie.
    pub temperature: f32,
    /// Keep the k most likely tokens, at least 1; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keep the smallest set of most likely tokens with this probability, (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the most likely one's probability, [0, 1]; 0 keeps
    /// all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the window, (0, 10]; 1 is off
    /// (Keskar et al. 2019, CTRL, section 4.1).
    pub repetition_penalty: f32,
    /// Last tokens of prompt and answer that `repetition_penalty` looks at; at least 1 when it is
    /// on.
    pub repetition_window: usize,
    /// Subtracted once from tokens that the answer already has, -2 to 2. The prompt does not count.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the answer, -2 to 2. The prompt does not count.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, -100 to 100; each token at most once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws.
    pub seed: u64,
    /// Which of several sequences of one seed this is, such as the choice index of `n > 1`. A draw
    /// depends on (seed, sequence, step) and on nothing else.
    pub sequence: u64,
}

impl Default for Sampling {
    /// The plain distribution of the model: temperature 1, no filter, no penalty, seed 0.
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            sequence: 0,
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    #[must_use]
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Whether logits are changed before the draw.
    #[expect(clippy::float_cmp, reason = "exact values mean off")]
    pub(crate) fn adjusts(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }

    /// Refuses values that are not numbers or out of range. NaN fails every range.
    ///
    /// # Errors
    /// [`SubmitError::BadOption`] naming the field.
    pub fn validate(&self, vocab_len: usize) -> Result<(), SubmitError> {
        require(
            (0.0..=5.0).contains(&self.temperature),
            "temperature",
            "0 to 5",
            self.temperature,
        )?;
        require(self.top_k != Some(0), "top_k", "at least 1", 0)?;
        require(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "above 0, up to 1", self.top_p)?;
        require((0.0..=1.0).contains(&self.min_p), "min_p", "0 to 1", self.min_p)?;
        let penalty = self.repetition_penalty;
        require(penalty > 0.0 && penalty <= 10.0, "repetition_penalty", "above 0, to 10", penalty)?;
        #[expect(clippy::float_cmp, reason = "exactly 1 is the documented off value")]
        let window_fits = self.repetition_window > 0 || penalty == 1.0;
        require(window_fits, "repetition_window", "at least 1 with a repetition penalty", 0)?;
        let range = -2.0..=2.0;
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        require(range.contains(&presence), "presence_penalty", "-2 to 2", presence)?;
        require(range.contains(&frequency), "frequency_penalty", "-2 to 2", frequency)?;
        let mut seen = std::collections::BTreeSet::new();
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab_len {
                return Err(SubmitError::UnknownToken { id, vocab_len });
            }
            let fits = (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&bias);
            require(fits, "logit_bias", "-100 to 100", bias)?;
            require(seen.insert(id), "logit_bias", "each token once, repeated token", id)?;
        }
        Ok(())
    }
}

fn require(
    holds: bool,
    field: &'static str,
    expected: &'static str,
    found: impl std::fmt::Display,
) -> Result<(), SubmitError> {
    if holds {
        return Ok(());
    }
    Err(SubmitError::BadOption { field, expected, found: found.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut GenerateRequest)) -> &'static str {
        let mut request = GenerateRequest::new(vec![1, 2], 4);
        change(&mut request);
        match request.validate(10) {
            Err(SubmitError::BadOption { field, .. }) => field,
            other => panic!("expected a refused option, found {other:?}"),
        }
    }

    #[test]
    fn defaults_and_greedy_are_valid() {
        let mut request = GenerateRequest::new(vec![1], 1);
        request.validate(10).unwrap();
        request.sampling = Sampling::greedy();
        request.validate(10).unwrap();
    }

    #[test]
    fn each_bad_option_is_refused_by_name() {
        for value in [f32::NAN, f32::INFINITY, -1.0, 5.1] {
            assert_eq!(refused(|r| r.sampling.temperature = value), "temperature");
        }
        for value in [f32::NAN, 0.0, -0.1, 1.1] {
            assert_eq!(refused(|r| r.sampling.top_p = value), "top_p");
        }
        for value in [f32::NAN, -0.1, 1.1] {
            assert_eq!(refused(|r| r.sampling.min_p = value), "min_p");
        }
        for value in [f32::NAN, 0.0, -1.0, f32::INFINITY] {
            assert_eq!(refused(|r| r.sampling.repetition_penalty = value), "repetition_penalty");
        }
        for value in [f32::NAN, -2.1, 2.1] {
            assert_eq!(refused(|r| r.sampling.presence_penalty = value), "presence_penalty");
            assert_eq!(refused(|r| r.sampling.frequency_penalty = value), "frequency_penalty");
        }
        for value in [f32::NAN, -101.0, f32::INFINITY] {
            assert_eq!(refused(|r| r.sampling.logit_bias = vec![(1, value)]), "logit_bias");
        }
        assert_eq!(refused(|r| r.sampling.logit_bias = vec![(1, 0.0), (1, 1.0)]), "logit_bias");
        assert_eq!(refused(|r| r.sampling.top_k = Some(0)), "top_k");
        assert_eq!(refused(|r| r.max_tokens = 0), "max_tokens");
        assert_eq!(refused(|r| r.logprobs = Some(21)), "logprobs");
        assert_eq!(refused(|r| r.stop = vec![String::new()]), "stop");
        assert_eq!(refused(|r| r.stop = vec!["x".into(); 17]), "stop");
        let window = refused(|r| {
            r.sampling.repetition_penalty = 1.1;
            r.sampling.repetition_window = 0;
        });
        assert_eq!(window, "repetition_window");
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let request = GenerateRequest::new(vec![1, 10], 4);
        let expected = SubmitError::UnknownToken { id: 10, vocab_len: 10 };
        assert_eq!(request.validate(10).unwrap_err(), expected);
        assert_eq!(GenerateRequest::new(vec![], 4).validate(10), Err(SubmitError::EmptyPrompt));
    }
}
