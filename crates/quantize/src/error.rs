//! [`QuantizeError`].

use thiserror::Error;

/// Why a checkpoint was not quantised.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// A matrix cannot be calibrated.
    #[error("tensor `{tensor}`: {problem}")]
    Calibration {
        /// Matrix concerned.
        tensor: String,
        /// What is wrong with its inputs.
        problem: &'static str,
    },
}
