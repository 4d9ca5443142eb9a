//! What can go wrong while measuring.

use std::io;
use std::path::PathBuf;

use exrail_metrics::MetricsError;
use exrail_retrieval::EncodeError;

use crate::system::{GenerateError, RetrieveError};

/// Why a gold set cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldError {
    /// The file cannot be read.
    #[error("gold set {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line is no gold item.
    #[error("gold set line {line}: {source}")]
    Line {
        /// Line, from 1.
        line: usize,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// An id occurs twice.
    #[error("gold item {id}: expected an id of its own, found the same on line {line}")]
    DuplicateId {
        /// The id.
        id: String,
        /// Line of its second use, from 1.
        line: usize,
    },
    /// An item lacks what its kind needs, or has what its kind must not have.
    #[error("gold item {id}, field `{field}`: expected {expected}, found {found}")]
    Field {
        /// The item.
        id: String,
        /// The field.
        field: &'static str,
        /// What its kind asks for.
        expected: &'static str,
        /// How many there are.
        found: usize,
    },
    /// The evidence names a document that the index does not hold exactly once.
    #[error("gold item {id}: expected one document `{doc}` in the index, found {found}")]
    Document {
        /// The item.
        id: String,
        /// The name.
        doc: String,
        /// How many documents have it.
        found: usize,
    },
    /// A quote does not occur exactly once in its document.
    #[error(
        "gold item {id}: expected the quote once in `{doc}`, found it {found} times: `{quote}`"
    )]
    Quote {
        /// The item.
        id: String,
        /// The document.
        doc: String,
        /// The quote.
        quote: String,
        /// How often it occurs.
        found: usize,
    },
}

/// Why a stored calibration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The file cannot be read or written.
    #[error("calibration {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no calibration.
    #[error("calibration {path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// It was made for something else, so it is void.
    #[error("calibration is void: `{field}` was {expected}, found {found}")]
    Void {
        /// What changed.
        field: &'static str,
        /// What it was made for.
        expected: String,
        /// What is there now.
        found: String,
    },
}

/// Why a report could not be made. A gate that does not pass is no error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The gold set.
    #[error(transparent)]
    Gold(#[from] GoldError),
    /// The stored calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// The generator.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The index.
    #[error(transparent)]
    Retrieve(#[from] RetrieveError),
    /// The encoder.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A statistic.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// An option is out of range.
    #[error("option `{option}`: expected {expected}, found {found}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its range in words.
        expected: &'static str,
        /// The value.
        found: usize,
    },
}
