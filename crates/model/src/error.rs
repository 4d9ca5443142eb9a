//! [`ModelError`]: why a model was not loaded, or a text not encoded.

use exrail_checkpoint::LoadError;
use exrail_kernels::KernelError;
use thiserror::Error;

/// Why a model was not loaded, or a text not encoded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A tensor is missing or has another shape than the configuration implies.
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    /// The device refused a weight or had no memory.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// A text has no tokens, so it has no mean.
    #[error("text {text}: expected at least one token, found none")]
    EmptyText {
        /// Index in the call.
        text: usize,
    },
    /// A text is longer than the position table.
    #[error("text {text}: expected at most {limit} tokens, found {found}")]
    TextTooLong {
        /// Index in the call.
        text: usize,
        /// Rows of the position embedding.
        limit: usize,
        /// Tokens of the text.
        found: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("text {text}: expected token ids below {limit}, found {found}")]
    UnknownToken {
        /// Index in the call.
        text: usize,
        /// Rows of the word embedding.
        limit: usize,
        /// The id.
        found: u32,
    },
    /// The pooled vector has no direction: it holds NaN or infinity, or is zero.
    #[error("text {text}: expected a finite vector of positive length, found length {length}")]
    NumericFault {
        /// Index in the call.
        text: usize,
        /// Euclidean length of the pooled vector.
        length: f64,
    },
}
