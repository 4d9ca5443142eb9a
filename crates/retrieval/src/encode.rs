//! The sentence encoder as this crate sees it. Implementations live above (engine) or in tests.

use std::error::Error;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A pinned sentence encoder: text to unit vector, and its tokenizer.
///
/// Guardrails §1.1.1: the encoder is never the generator. Whoever implements this returns vectors
/// of unit norm; nobody downstream re-normalises (G-24).
pub trait Encode: Send + Sync {
    /// `encoder_fp` of §1.1.1: a hex sha256 over weights, tokenizer, pooling, prefixes,
    /// normalisation, dtype and `max_tokens`. Two encoders with the same value give the same
    /// vectors.
    fn fingerprint(&self) -> &str;

    /// What the fingerprint stands for, readable; compared field by field on a mismatch.
    fn facts(&self) -> EncoderFacts;

    /// Content tokens of `text` with their byte ranges in it, in order. Special tokens that the
    /// model adds itself (CLS, SEP) are not among them.
    fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)>;

    /// One vector `(dim)` per text, in order, unit norm, f32.
    ///
    /// The texts are encoded as they come: prefixes and [`crate::prepare`] are the caller's.
    ///
    /// # Errors
    /// See [`EncodeError`]. A text over the window is an error, never truncated.
    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError>;
}

/// The readable contract of an encoder (G-24). Every field is part of the stored contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderFacts {
    /// Model name, for people.
    pub name: String,
    /// Length of a vector.
    pub dim: usize,
    /// The longest text in content tokens, prefix included: the model's window without the
    /// special tokens it adds itself.
    pub max_tokens: usize,
    /// How token vectors become one vector: `mean`, `cls`.
    pub pooling: String,
    /// Whether the vectors have unit norm. Only `true` is accepted by a collection.
    pub normalized: bool,
    /// The metric the vectors are made for. Only `cosine` is accepted by a collection.
    pub metric: String,
    /// Put before a question, exactly, for example `"query: "`; may be empty.
    pub query_prefix: String,
    /// Put before a passage, exactly; may be empty.
    pub passage_prefix: String,
    /// Fingerprint of the tokenizer (`tok_fp` of the index).
    pub tokenizer_fp: String,
}

/// Why texts could not be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A text is longer than the encoder reads; truncating it would embed another text.
    #[error("text {index}: {tokens} tokens, the encoder reads at most {limit}")]
    TooLong {
        /// Position in the call.
        index: usize,
        /// Its content tokens.
        tokens: usize,
        /// [`EncoderFacts::max_tokens`].
        limit: usize,
    },
    /// A text without content tokens has no vector.
    #[error("text {index}: no tokens to encode")]
    Empty {
        /// Position in the call.
        index: usize,
    },
    /// The model produced a vector with a NaN or an infinity.
    #[error("text {index}: the encoder returned a value that is not finite")]
    NotFinite {
        /// Position in the call.
        index: usize,
    },
    /// The model itself failed.
    #[error("encoder: {source}")]
    Model {
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
}
