//! AWQ layers: `w = s (q - z)`, four bits (`AutoAWQ` `packing_utils.py`, `gemm.py`, `gemv.py`).
//!
//! GEMM: `qweight` (K, N / 8), `qzeros` (G, N / 8), `scales` (G, N); nibble i of a word holds column
//! `[0, 2, 4, 6, 1, 3, 5, 7][i]`. GEMV: `qweight` (N, K / 8) in order; `qzeros` (N, W) and `scales`
//! (N, 8 W), both along the groups and padded to W words.

use crate::LoadError;
use crate::gptq::difference;
use crate::quantised::{AwqConfig, AwqPacking, Dense, Layer, RawType, dense, half_bits};

/// The nibble that holds column j of eight.
const NIBBLE_OF_COLUMN: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// (N, K).
pub(crate) fn shape(layer: &Layer<'_>, config: AwqConfig) -> Result<(usize, usize), LoadError> {
    let weight = layer.require("qweight", RawType::I32, 2)?;
    let (outer, words) = (weight.shape[0], weight.shape[1]);
    let (n, k) = match config.packing {
        AwqPacking::Gemm => (words.saturating_mul(8), outer),
        AwqPacking::Gemv => (outer, words.saturating_mul(8)),
    };
    if n == 0 || k == 0 || !k.is_multiple_of(config.group_size) {
        let expected = format!("input features in whole groups of {}", config.group_size);
        return Err(layer.refuse("qweight", expected, format!("{k} of {n} rows")));
    }
    Ok((n, k))
}

/// Words of zero points a row of the GEMV layout.
fn zeros_width(k: usize, group_size: usize) -> usize {
    let multiple = if group_size >= 128 {
        1
    } else if group_size == 64 {
        2
    } else {
        4
    };
    (k / group_size).div_ceil(8).next_multiple_of(multiple)
}

/// The weights.
pub(crate) fn dequantise(layer: &Layer<'_>, config: AwqConfig) -> Result<Dense, LoadError> {
    let (n, k) = shape(layer, config)?;
    let weight = layer.require("qweight", RawType::I32, 2)?;
    let groups = k / config.group_size;
    let width = match config.packing {
        AwqPacking::Gemm => n / 8,
        AwqPacking::Gemv => zeros_width(k, config.group_size),
    };
    let outer = if config.packing == AwqPacking::Gemm { groups } else { n };
    let zeros = layer.exact("qzeros", RawType::I32, &[outer, width])?;
    let scales = layer.exact("scales", RawType::F16, &[outer, width * 8])?;
    let mut out = dense(layer, n, k)?;
    let nibble = |word: u32, i: usize| (word >> (4 * i)) & 15;
    for row in 0..n {
        for column in 0..k {
            let group = column / config.group_size;
            let (q, zero, scale) = match config.packing {
                AwqPacking::Gemm => {
                    let i = NIBBLE_OF_COLUMN[row % 8];
                    let q = nibble(weight.word(column * width + row / 8), i);
                    let zero = nibble(zeros.word(group * width + row / 8), i);
                    (q, zero, scales.half(group * n + row))
                }
                AwqPacking::Gemv => {
                    let q = nibble(weight.word(row * (k / 8) + column / 8), column % 8);
                    let zero = nibble(zeros.word(row * width + group / 8), group % 8);
                    (q, zero, scales.half(row * width * 8 + group))
                }
            };
            out.halves[row * k + column] = half_bits(scale * difference(q, zero));
        }
    }
    Ok(out)
}
