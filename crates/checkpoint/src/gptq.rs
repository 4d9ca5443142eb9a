//! GPTQ layers: `w = s (q - z)`, packed down K (`AutoGPTQ` `qlinear_cuda_old.py`, `GPTQModel`).
//!
//! `qweight` (K bits / 32, N), `qzeros` (G, N bits / 32), `scales` (G, N), optional `g_idx` (K).
//! The stream of each column is contiguous, lowest bits first, also across words for 3 bits. The
//! difference is an exact integer and the product rounds once to half, as torch does.

use crate::LoadError;
use crate::quantised::{
    Dense, GptqConfig, GptqZeros, Layer, RawType, dense, half_bits, stream_bits,
};

/// (N, K).
pub(crate) fn shape(layer: &Layer<'_>, config: GptqConfig) -> Result<(usize, usize), LoadError> {
    let weight = layer.require("qweight", RawType::I32, 2)?;
    let bits = config.bits as usize;
    let (words, n) = (weight.shape[0], weight.shape[1]);
    let per = if bits == 3 { 3 } else { 1 };
    if words == 0 || n == 0 || !words.is_multiple_of(per) {
        let expected = format!("a positive multiple of {per} rows and columns");
        return Err(layer.refuse("qweight", expected, format!("{:?}", weight.shape)));
    }
    // The words lie in memory, so this product fits.
    Ok((n, words * 32 / bits))
}

/// The weights.
pub(crate) fn dequantise(layer: &Layer<'_>, config: GptqConfig) -> Result<Dense, LoadError> {
    let (n, k) = shape(layer, config)?;
    let bits = config.bits as usize;
    let group_size = config.group_size.unwrap_or(k);
    let groups = k.div_ceil(group_size);
    if !(n * bits).is_multiple_of(32) {
        let expected = "output features that fill whole words of zero points";
        return Err(layer.refuse("qzeros", expected, format!("{n} of {bits} bits")));
    }
    let weight = layer.require("qweight", RawType::I32, 2)?;
    let zeros = layer.exact("qzeros", RawType::I32, &[groups, n * bits / 32])?;
    let scales = layer.exact("scales", RawType::F16, &[groups, n])?;
    let order = layer.optional("g_idx", RawType::I32, 1)?;
    if let Some(order) = order.filter(|order| order.shape != [k]) {
        return Err(layer.refuse("g_idx", format!("shape [{k}]"), format!("{:?}", order.shape)));
    }
    let mut out = dense(layer, n, k)?;
    for row in 0..k {
        let group = order.map_or(row / group_size, |order| order.word(row) as usize);
        if group >= groups {
            return Err(layer.refuse("g_idx", format!("groups below {groups}"), group));
        }
        for column in 0..n {
            let q = stream_bits(|w| weight.word(w * n + column), row * bits, config.bits);
            let base = group * (n * bits / 32);
            let stored = stream_bits(|w| zeros.word(base + w), column * bits, config.bits);
            let zero = match config.zeros {
                GptqZeros::LessOne => (stored + 1) & ((1 << config.bits) - 1),
                GptqZeros::Plain => stored,
            };
            let value = scales.half(group * n + column) * difference(q, zero);
            out.halves[column * k + row] = half_bits(value);
        }
    }
    Ok(out)
}

/// `q - zero`; both are at most eight bits wide.
pub(crate) fn difference(q: u32, zero: u32) -> f32 {
    let narrow = |x: u32| i16::try_from(x & 255).expect("eight bits");
    f32::from(narrow(q) - narrow(zero))
}
