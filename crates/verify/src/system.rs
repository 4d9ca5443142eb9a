//! The system under test, as traits: what answers and what finds. The server implements them over
//! its engine and collection, tests over a few lines.

use std::error::Error;
use std::sync::Arc;

use exrail_retrieval::{Chunk, Document, Hit, SearchOptions};
use serde_json::Value;

use crate::prompt::{FrameMessage, PromptFrame};

/// A text generator behind a chat template, with the sampling of production.
pub trait Generate {
    /// Generates a reply to the prompt, one that [`crate::cite_lark`] allows where answers are locked. Two calls with
    /// equal arguments give equal text.
    ///
    /// # Errors
    /// See [`GenerateError`].
    fn generate(&self, prompt: &PromptFrame, seed: u64) -> Result<Generated, GenerateError>;

    /// Generates replies to several prompts, one for each and in their order, each as [`Generate::generate`] would. A
    /// generator that can computes them together, so that what the prompts have in common is read once.
    fn generate_all(
        &self,
        prompts: &[(&PromptFrame, u64)],
    ) -> Vec<Result<Generated, GenerateError>> {
        prompts.iter().map(|&(prompt, seed)| self.generate(prompt, seed)).collect()
    }

    /// Generates the next step of an answer whose model's turn begins with `so_far`, one that [`crate::step_lark`]
    /// allows where answers are locked. Nothing is the end of the answer. Two calls with equal arguments give equal
    /// text.
    ///
    /// # Errors
    /// See [`GenerateError`].
    fn generate_step(
        &self,
        prompt: &PromptFrame,
        so_far: &str,
        seed: u64,
    ) -> Result<Generated, GenerateError>;

    /// Generates a reply to these messages that is of a JSON schema.
    ///
    /// # Errors
    /// See [`GenerateError`].
    fn generate_of_schema(
        &self,
        messages: &[FrameMessage],
        schema: &Value,
        seed: u64,
    ) -> Result<OfSchema, GenerateError>;

    /// Where the slots of a prompt come to stand in what the generator reads. Generates nothing.
    ///
    /// # Errors
    /// The template refuses the messages.
    fn place(&self, prompt: &PromptFrame) -> Result<Placed, GenerateError>;

    /// Tokens of the rendered prompt of these messages.
    ///
    /// # Errors
    /// The template refuses the messages.
    fn count_tokens(&self, messages: &[FrameMessage]) -> Result<usize, GenerateError>;

    /// Byte offsets at which the tokens of a text end, ascending.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    fn token_ends(&self, text: &str) -> Result<Vec<usize>, GenerateError>;

    /// Most tokens that a prompt may have so that a whole reply still fits.
    fn prompt_limit(&self) -> usize;

    /// What is pinned in the report.
    ///
    /// # Errors
    /// The generator cannot be identified.
    fn facts(&self) -> Result<GeneratorFacts, GenerateError>;
}

/// A prompt as the generator reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Its tokens.
    pub n_tokens: usize,
    /// First token of each slot and one past its last, in the order of [`PromptFrame::slots`]; none of one that the
    /// template changed.
    pub slots: Vec<Option<[usize; 2]>>,
}

/// A reply that is to be of a schema.
#[derive(Clone, Debug, PartialEq)]
pub struct OfSchema {
    /// The text.
    pub text: String,
    /// Least share of the probability that lay on what was allowed, in [0, 1]; none without a lock.
    pub allowed_mass_min: Option<f64>,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The text, without stop strings.
    pub text: String,
    /// Why it ended.
    pub end: GeneratedEnd,
    /// Tokens of the prompt.
    pub n_prompt_tokens: usize,
    /// Tokens of the reply.
    pub n_output_tokens: usize,
    /// Those of the prompt that were in the cache.
    pub n_cached_tokens: usize,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeneratedEnd {
    /// The model ended it.
    Stop,
    /// The token budget ended it; the last sentence may be cut.
    Length,
    /// The token budget ended it, and the grammar wrote the shortest end: the last sentence is cut, whole as it
    /// looks.
    Closed,
    /// The loop detector ended it (G-19).
    Looped,
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A logit was NaN or infinite.
    #[error("generation: logits that are not finite at step {step}")]
    Numeric {
        /// Step of the sequence.
        step: usize,
    },
    /// No complete reply in time.
    #[error("generation: no complete reply after {limit_ms} ms")]
    TimedOut {
        /// The limit.
        limit_ms: u64,
    },
    /// The prompt does not fit even with one snippet.
    #[error("prompt: {tokens} tokens, expected at most {limit}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// A guard refused the prompt (G-12). Whoever asks gets an error, and no answer.
    #[error("prompt: {0}")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
    /// The engine or the template failed.
    #[error("generator: {0}")]
    Engine(#[source] Box<dyn Error + Send + Sync>),
}

impl GenerateError {
    /// Whether it is what one question came to, which a measurement counts, and no failure of the measurement.
    #[must_use]
    pub fn is_outcome(&self) -> bool {
        match self {
            GenerateError::Numeric { .. }
            | GenerateError::TimedOut { .. }
            | GenerateError::Refused(_) => true,
            GenerateError::PromptTooLong { .. } | GenerateError::Engine(_) => false,
        }
    }
}

/// How the generator samples; greedy decoding makes the seeds of the λ probe void (§1.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplingKind {
    /// Draws depend on the seed.
    Seeded,
    /// The most probable token always.
    Greedy,
}

/// What identifies the generator in a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorFacts {
    /// Name for people.
    pub model: String,
    /// Fingerprint of the weights.
    pub model_fp: String,
    /// Fingerprint of the generator's tokenizer.
    pub tok_fp: String,
    /// Hash of the chat template.
    pub template_hash: String,
    /// Version and build of the engine.
    pub engine_build: String,
    /// Weight format, for example `Q4_1`.
    pub quant: String,
    /// Format of the KV cache.
    pub kv_dtype: String,
    /// The device, in words.
    pub device: String,
    /// How it samples.
    pub sampling: SamplingKind,
}

/// An index that finds chunks for a question.
pub trait Retrieve {
    /// The chunks for a question, best first.
    ///
    /// # Errors
    /// The index or its encoder failed.
    fn search(&self, question: &str, options: &SearchOptions) -> Result<Vec<Hit>, RetrieveError>;

    /// A document of the index.
    ///
    /// # Errors
    /// The store failed. A document that is not there is `None`.
    fn document(&self, doc_id: &str) -> Result<Option<Arc<Document>>, RetrieveError>;

    /// Names of all documents.
    fn doc_ids(&self) -> Vec<String>;

    /// Hash over chunks, vectors and contract; a calibration holds for one value of it.
    fn index_hash(&self) -> &str;

    /// Fingerprint of the encoder that made the vectors; equal to the gate's encoder means that
    /// ΔS is circular (§1.1.7).
    fn encoder_fp(&self) -> &str;

    /// Number of chunks.
    fn n_chunks(&self) -> usize;

    /// All chunks, in a fixed order.
    fn chunks(&self) -> Box<dyn Iterator<Item = &Arc<Chunk>> + '_>;
}

/// Why a search failed.
#[derive(Debug, thiserror::Error)]
#[error("index: {0}")]
pub struct RetrieveError(#[source] pub Box<dyn Error + Send + Sync>);
