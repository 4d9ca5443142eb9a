//! [`QuantizeError`].

use std::path::PathBuf;

use exrail_checkpoint::LoadError;
use exrail_model::ModelError;
use thiserror::Error;

/// Why a checkpoint was not quantised.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The source is refused.
    #[error(transparent)]
    Source(#[from] LoadError),
    /// A layer does not run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The source is a file.
    #[error(
        "{}: expected a Hugging Face folder (config.json, *.safetensors), found a file; a GGUF file \
         has no tokenizer.json and no config.json to write: load it with --quant instead, or \
         quantise the folder that it was converted from",
        path.display()
    )]
    NotAFolder {
        /// Source.
        path: PathBuf,
    },
    /// The source is quantised already.
    #[error(
        "{}: expected 16-bit or 32-bit weights, found a checkpoint that is quantised already \
         ({found}); quantise the one that it was made from", path.display()
    )]
    AlreadyQuantised {
        /// Source.
        path: PathBuf,
        /// Its method.
        found: String,
    },
    /// No matrix can be quantised.
    #[error("expected a matrix of at least 1024 weights in rows of whole groups of 32, found none")]
    NothingToQuantise,
    /// The destination is there.
    #[error("{}: exists already; remove it or choose another destination", path.display())]
    DestinationExists {
        /// Destination.
        path: PathBuf,
    },
    /// Something unfinished is there, of another run.
    #[error(
        "{}: holds an unfinished run with another {field}: expected {expected}, found {found}; \
         remove it to begin anew", path.display()
    )]
    OtherRun {
        /// Unfinished folder.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// Value of this run.
        expected: String,
        /// Value of the unfinished run.
        found: String,
    },
    /// Another process is at it.
    #[error("{}: another process is writing it", path.display())]
    Busy {
        /// Unfinished folder.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// File concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that this program wrote is not what it wrote.
    #[error("{}: {source}; remove the folder to begin anew", path.display())]
    Damaged {
        /// File concerned.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The group size has no kernel.
    #[error("group: expected 32, 64 or 128, found {found}")]
    Group {
        /// Group asked for.
        found: usize,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{tensor}`: expected finite weights, found {found} at index {index}")]
    NotFinite {
        /// Tensor concerned.
        tensor: String,
        /// First such element.
        index: usize,
        /// Its value.
        found: f32,
    },
    /// The calibration text is too short.
    #[error("calibration text: expected at least {expected} tokens, found {found}")]
    TooFewTokens {
        /// Tokens needed.
        expected: usize,
        /// Tokens of the text.
        found: usize,
    },
    /// The calibration text was encoded with another vocabulary.
    #[error("calibration text: expected token ids below {expected}, found {found}")]
    UnknownToken {
        /// Rows of the embedding.
        expected: usize,
        /// The id.
        found: u32,
    },
    /// A matrix cannot be calibrated.
    #[error("tensor `{tensor}`: {problem}")]
    Calibration {
        /// Matrix concerned.
        tensor: String,
        /// What is wrong with its inputs.
        problem: &'static str,
    },
}

impl QuantizeError {
    /// Names the file of an error of the system.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> QuantizeError {
        let path = path.into();
        |source| QuantizeError::Io { path, source }
    }
}
