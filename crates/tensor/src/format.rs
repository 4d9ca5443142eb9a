//! [`dequantize`] and [`quantize`]: whole slices of any [`DType`].

use half::{bf16, f16};
use thiserror::Error;

use crate::block::Block;
use crate::{
    BlockIQ4_NL, BlockIQ4_XS, BlockMXFP4, BlockQ2_K, BlockQ3_K, BlockQ4_0, BlockQ4_1, BlockQ4_K,
    BlockQ5_0, BlockQ5_1, BlockQ5_K, BlockQ6_K, BlockQ8_0, DType,
};

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
    let expected = stored_bytes(dtype, out.len())?;
    if bytes.len() != expected {
        let (n_values, found) = (out.len(), bytes.len());
        return Err(FormatError::WrongByteCount { dtype, n_values, expected, found });
    }
    match dtype {
        DType::F32 => read_numbers(bytes, out, f32::from_le_bytes),
        DType::F16 => read_numbers(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        DType::BF16 => read_numbers(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        DType::Q4_0 => read_blocks::<BlockQ4_0, 18, 32>(bytes, out),
        DType::Q4_1 => read_blocks::<BlockQ4_1, 20, 32>(bytes, out),
        DType::Q5_0 => read_blocks::<BlockQ5_0, 22, 32>(bytes, out),
        DType::Q5_1 => read_blocks::<BlockQ5_1, 24, 32>(bytes, out),
        DType::Q8_0 => read_blocks::<BlockQ8_0, 34, 32>(bytes, out),
        DType::Q2_K => read_blocks::<BlockQ2_K, 84, 256>(bytes, out),
        DType::Q3_K => read_blocks::<BlockQ3_K, 110, 256>(bytes, out),
        DType::Q4_K => read_blocks::<BlockQ4_K, 144, 256>(bytes, out),
        DType::Q5_K => read_blocks::<BlockQ5_K, 176, 256>(bytes, out),
        DType::Q6_K => read_blocks::<BlockQ6_K, 210, 256>(bytes, out),
        DType::IQ4_NL => read_blocks::<BlockIQ4_NL, 18, 32>(bytes, out),
        DType::IQ4_XS => read_blocks::<BlockIQ4_XS, 136, 256>(bytes, out),
        DType::MXFP4 => read_blocks::<BlockMXFP4, 17, 32>(bytes, out),
    }
    Ok(())
}

/// Returns `values` as blocks of `dtype`, each weight rounded to the nearest grid value.
///
/// For tests and tools: scales come from a block's extremes, without ggml's weighted search.
///
/// # Errors
/// When `values` is not a whole number of blocks.
pub fn quantize(dtype: DType, values: &[f32]) -> Result<Vec<u8>, FormatError> {
    let n_bytes = stored_bytes(dtype, values.len())?;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::Q4_0 => write_blocks::<BlockQ4_0, 18, 32>(values),
        DType::Q4_1 => write_blocks::<BlockQ4_1, 20, 32>(values),
        DType::Q5_0 => write_blocks::<BlockQ5_0, 22, 32>(values),
        DType::Q5_1 => write_blocks::<BlockQ5_1, 24, 32>(values),
        DType::Q8_0 => write_blocks::<BlockQ8_0, 34, 32>(values),
        DType::Q2_K => write_blocks::<BlockQ2_K, 84, 256>(values),
        DType::Q3_K => write_blocks::<BlockQ3_K, 110, 256>(values),
        DType::Q4_K => write_blocks::<BlockQ4_K, 144, 256>(values),
        DType::Q5_K => write_blocks::<BlockQ5_K, 176, 256>(values),
        DType::Q6_K => write_blocks::<BlockQ6_K, 210, 256>(values),
        DType::IQ4_NL => write_blocks::<BlockIQ4_NL, 18, 32>(values),
        DType::IQ4_XS => write_blocks::<BlockIQ4_XS, 136, 256>(values),
        DType::MXFP4 => write_blocks::<BlockMXFP4, 17, 32>(values),
    };
    debug_assert_eq!(bytes.len(), n_bytes);
    Ok(bytes)
}

fn stored_bytes(dtype: DType, n_values: usize) -> Result<usize, FormatError> {
    let not_whole =
        FormatError::NotWholeBlocks { dtype, block_len: dtype.block_len(), found: n_values };
    dtype.row_bytes(n_values).ok_or(not_whole)
}

fn read_numbers<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = read(*bytes);
    }
}

fn read_blocks<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
) {
    for (values, block) in out.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks().0) {
        *values = B::from_bytes(block).values();
    }
}

fn write_blocks<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    values: &[f32],
) -> Vec<u8> {
    values.as_chunks::<LEN>().0.iter().flat_map(|block| B::nearest(block).to_bytes()).collect()
}
