//! Why the engine refused to load, to start, or to take a request.

use exrail_kernels::KernelError;
use exrail_model::ModelError;
use thiserror::Error;

use exrail_checkpoint::LoadError;
use exrail_text::{TemplateError, TokenizerError};

use crate::plan::DoesNotFit;

/// Loading or starting failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model file was refused.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The weights do not make a model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The vocabulary does not make a tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The file's chat template does not compile.
    #[error("chat template: {0}")]
    Template(#[from] TemplateError),
    /// The device refused an allocation.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// A file beside the weights could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The tokenizer names tokens that the model has no rows for.
    #[error(
        "tokenizer: expected at most {rows} tokens (rows of the output matrix), found {tokens}"
    )]
    VocabularyTooLarge {
        /// Rows of the output matrix.
        rows: usize,
        /// Tokens of the tokenizer.
        tokens: usize,
    },
    /// The folder has no tokenizer that is read.
    #[error(
        "tokenizer.json: expected in the folder, found {}; save it there with \
         AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers",
        if *has_sentencepiece { "tokenizer.model only" } else { "no tokenizer" }
    )]
    NoTokenizer {
        /// Whether there is a `tokenizer.model`.
        has_sentencepiece: bool,
    },
    /// Two models whose weights are to be compared have other tensors.
    #[error("weights of {other}: expected the matrices of {reference}, found {found}")]
    OtherTensors {
        /// The model that is compared with.
        reference: String,
        /// The model that is compared.
        other: String,
        /// What differs.
        found: String,
    },
    /// An engine option cannot be honoured.
    #[error("engine option `{field}`: expected {expected}, found {found}")]
    BadOption {
        /// Field of [`crate::EngineOptions`].
        field: &'static str,
        /// What is possible.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The device has not the memory for it.
    #[error(transparent)]
    DoesNotFit(Box<DoesNotFit>),
    /// The system gave no thread.
    #[error("engine thread: {0}")]
    Thread(std::io::Error),
}

/// A request was refused. Nothing was queued.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The prompt leaves no room for an answer.
    #[error("prompt: expected at most {limit} tokens, found {tokens}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Context minus one token to generate.
        limit: usize,
    },
    /// The prompt fits, the answer asked for does not.
    #[error(
        "max_tokens: expected at most {limit} after a prompt of {prompt_tokens} tokens, found \
         {max_tokens}"
    )]
    TooManyTokens {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Context minus prompt.
        limit: usize,
    },
    /// Too many requests of this tenant wait already.
    #[error(
        "queue: expected fewer than {limit} waiting requests of one client; ask again after \
         {retry_after_s} s"
    )]
    QueueFull {
        /// Limit of one tenant's waiting requests.
        limit: usize,
        /// Seconds in which half of what waits is expected to have gone.
        retry_after_s: u64,
    },
    /// Too many requests of all tenants wait already.
    #[error(
        "queue: expected fewer than {limit} waiting requests, and all places are taken; ask again \
         after {retry_after_s} s"
    )]
    Overloaded {
        /// Limit of waiting requests.
        limit: usize,
        /// Seconds in which half of what waits is expected to have gone.
        retry_after_s: u64,
    },
    /// The engine no longer runs.
    #[error("the engine stopped")]
    Stopped,
    /// There is nothing to continue.
    #[error("prompt: expected at least 1 token, found 0")]
    EmptyPrompt,
    /// An id outside the vocabulary.
    #[error("token id: expected below {vocab_len}, found {id}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Tokens of the vocabulary.
        vocab_len: usize,
    },
    /// The grammar was compiled over the ids of another tokenizer.
    #[error(
        "grammar: expected one of this model's tokenizer, {expected}, found one of {found}; compile it with the \
         `grammars` of this engine"
    )]
    ForeignGrammar {
        /// Fingerprint of the engine's tokenizer.
        expected: String,
        /// Of the grammar's.
        found: String,
    },
    /// An option that cannot be honoured.
    #[error("`{field}`: expected {expected}, found {found}")]
    BadOption {
        /// Request field.
        field: &'static str,
        /// What is possible.
        expected: &'static str,
        /// What was given.
        found: String,
    },
}

/// Scoring failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// The ids were refused.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The sequence was given up.
    #[error(transparent)]
    Failed(#[from] crate::event::SequenceFault),
}
