//! [`QuantizeOptions`].

use exrail_tensor::IntGrid;

use crate::QuantizeError;

/// Fewer tokens say too little about what a matrix multiplies.
const MIN_TOKENS: usize = 2048;
/// Tokens of one calibration sequence.
const SEQUENCE_LEN: usize = 512;

/// How to quantise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizeOptions {
    pub(crate) grid: IntGrid,
    pub(crate) group: usize,
    pub(crate) calibration: Option<Calibration>,
}

/// Text to calibrate with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Hex sha256 of the text.
    pub text_sha256: String,
    /// The text as ids of the model's vocabulary.
    pub ids: Vec<u32>,
}

impl QuantizeOptions {
    /// Rounds to `grid` in groups of `group` weights of a row, to nearest or calibrated.
    ///
    /// # Errors
    /// A group other than 32, 64 and 128, or a calibration of fewer than 2,048 tokens.
    pub fn new(
        grid: IntGrid,
        group: usize,
        calibration: Option<Calibration>,
    ) -> Result<QuantizeOptions, QuantizeError> {
        if ![32, 64, 128].contains(&group) {
            return Err(QuantizeError::Group { found: group });
        }
        if let Some(calibration) = &calibration {
            let (expected, found) = (MIN_TOKENS, calibration.ids.len());
            if found < expected {
                return Err(QuantizeError::TooFewTokens { expected, found });
            }
        }
        Ok(QuantizeOptions { grid, group, calibration })
    }
}

impl Calibration {
    /// Tokens of one sequence, for a model that serves `context_len`.
    pub(crate) fn sequence_len(context_len: usize) -> usize {
        SEQUENCE_LEN.min(context_len)
    }
}
