//! EXL3 layers (`exllamav3` `exl3.py`, `codebook.cuh`, `exl3_dq.cuh`, `reconstruct.cu`).
//!
//! `trellis` i16 (K / 16, N / 16, 16 bits), `suh` f16 (K) and `svh` f16 (N), or `su`, `sv` i16
//! bitfields in which a set bit means -1. `W = diag(suh) H W' H diag(svh)` with 128-wide Hadamard
//! blocks. Like `get_weight_tensor`, each of the four products is rounded to half. The reference sums
//! a Hadamard row in f32 in an order that it leaves open; here the sum is exact.

use crate::LoadError;
use crate::quantised::{Dense, Layer, RawTensor, RawType, dense, half_bits};
use half::f16;

const BLOCK: usize = 128;

#[derive(Clone, Copy)]
enum Codebook {
    Default,
    Mcg,
    Mul1,
}

/// (N, K).
pub(crate) fn shape(layer: &Layer<'_>) -> Result<(usize, usize), LoadError> {
    let trellis = layer.require("trellis", RawType::I16, 3)?;
    let (k, n) = (trellis.shape[0].saturating_mul(16), trellis.shape[1].saturating_mul(16));
    let whole = k > 0 && n > 0 && k.is_multiple_of(BLOCK) && n.is_multiple_of(BLOCK);
    let bits = trellis.shape[2] / 16;
    if !whole || !trellis.shape[2].is_multiple_of(16) || !(1..=8).contains(&bits) {
        let expected = "features in multiples of 128 and 16 to 128 words a tile";
        return Err(layer.refuse("trellis", expected, format!("{:?}", trellis.shape)));
    }
    Ok((n, k))
}

/// The weights.
pub(crate) fn dequantise(layer: &Layer<'_>) -> Result<Dense, LoadError> {
    let (n, k) = shape(layer)?;
    let trellis = layer.require("trellis", RawType::I16, 3)?;
    let codebook = codebook(layer)?;
    let inputs = signs(layer, "suh", "su", k)?;
    let outputs = signs(layer, "svh", "sv", n)?;
    let mut out = dense(layer, n, k)?;
    inner(&trellis, codebook, &mut out);
    for row in out.halves.chunks_mut(k) {
        for (block, signs) in row.as_chunks_mut::<BLOCK>().0.iter_mut().zip(inputs.chunks(BLOCK)) {
            hadamard(block, |i| signs[i]);
        }
    }
    for first in (0..n).step_by(BLOCK) {
        for column in 0..k {
            let mut block = std::array::from_fn(|i| out.halves[(first + i) * k + column]);
            hadamard(&mut block, |i| outputs[first + i]);
            for (i, value) in block.into_iter().enumerate() {
                out.halves[(first + i) * k + column] = value;
            }
        }
    }
    Ok(out)
}

fn codebook(layer: &Layer<'_>) -> Result<Codebook, LoadError> {
    let marker = |suffix| -> Result<bool, LoadError> {
        Ok(layer.optional(suffix, RawType::I32, 0)?.is_some())
    };
    match (marker("mcg")?, marker("mul1")?) {
        (false, false) => Ok(Codebook::Default),
        (true, false) => Ok(Codebook::Mcg),
        (false, true) => Ok(Codebook::Mul1),
        (true, true) => Err(layer.refuse("mcg", "one codebook", "mcg and mul1")),
    }
}

/// Factors a feature: halves, or a bitfield of signs.
fn signs(layer: &Layer<'_>, halves: &str, bits: &str, len: usize) -> Result<Vec<f32>, LoadError> {
    if layer.optional(halves, RawType::F16, 1)?.is_some() {
        let tensor = layer.exact(halves, RawType::F16, &[len])?;
        return Ok((0..len).map(|i| tensor.half(i)).collect());
    }
    let field = layer.exact(bits, RawType::I16, &[len / 16])?;
    let negative = |i: usize| (field.short(i / 16) >> (i % 16)) & 1 == 1;
    Ok((0..len).map(|i| if negative(i) { -1.0 } else { 1.0 }).collect())
}

/// Decodes the tiles of 16 x 16 weights, which lie in the order of tensor cores.
fn inner(trellis: &RawTensor<'_>, codebook: Codebook, out: &mut Dense) {
    let (tiles_n, shorts) = (trellis.shape[1], trellis.shape[2]);
    let bits = shorts / 16;
    for tile_k in 0..trellis.shape[0] {
        for tile_n in 0..tiles_n {
            let first_word = (tile_k * tiles_n + tile_n) * shorts / 2;
            for i in 0..256 {
                let (lane, within) = (i / 8, i % 8);
                let row = lane % 4 * 2 + [0, 1, 8, 9][within % 4];
                let column = lane / 4 + within / 4 * 8;
                let state = state(|w| trellis.word(first_word + w), (i + 1) * bits, 256 * bits);
                let at = (tile_n * 16 + column) * out.columns + tile_k * 16 + row;
                out.halves[at] = decode(codebook, state);
            }
        }
    }
}

/// The 16 bits that end before bit `end` of a circular stream of `len` bits, highest bit first.
fn state(word: impl Fn(usize) -> u32, end: usize, len: usize) -> u32 {
    (0..16).fold(0, |state, i| {
        let at = (end + len - 16 + i) % len;
        (state << 1) | ((word(at / 32) >> (31 - at % 32)) & 1)
    })
}

fn decode(codebook: Codebook, state: u32) -> u16 {
    let x = match codebook {
        Codebook::Default => state.wrapping_mul(89_226_354).wrapping_add(64_248_484),
        Codebook::Mcg => state.wrapping_mul(0xCBAC_1FED),
        Codebook::Mul1 => {
            let x = state.wrapping_mul(0x83DC_D12D);
            let sum: f64 = x.to_le_bytes().into_iter().map(f64::from).sum();
            let (factor, bias) = (f16::from_bits(0x1eee).to_f64(), f16::from_bits(0xc931).to_f64());
            // Exact in f64, so that this rounds once like the fused instruction.
            return half((sum + 1024.0) * factor + bias).to_bits();
        }
    };
    let [a, b, c, d] = ((x & 0x8fff_8fff) ^ 0x3b60_3b60).to_le_bytes();
    let value = |bytes| f16::from_le_bytes(bytes).to_f64();
    half(value([a, b]) + value([c, d])).to_bits()
}

/// The Hadamard transform of a block, rounded to half, times a factor, rounded to half.
fn hadamard(block: &mut [u16; BLOCK], factor: impl Fn(usize) -> f32) {
    let mut sums = block.map(|bits| f16::from_bits(bits).to_f64());
    let mut width = 1;
    while width < BLOCK {
        for pair in sums.chunks_mut(2 * width) {
            let (low, high) = pair.split_at_mut(width);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        width *= 2;
    }
    // The f32 nearest to 1 / sqrt(128), as the reference's matrix holds it.
    let scale = f64::from(f32::from_bits(0x3db5_04f3));
    for (i, (out, sum)) in block.iter_mut().zip(sums).enumerate() {
        *out = half_bits(half(sum * scale).to_f32() * factor(i));
    }
}

/// The half nearest to `value`, rounded once. `f16::from_f64` rounds to `f32` on the way; this rounds
/// to odd there, which keeps the second rounding right.
fn half(value: f64) -> f16 {
    #[expect(clippy::cast_possible_truncation, reason = "corrected below")]
    let near = value as f32;
    if f64::from(near) == value || !near.is_finite() {
        return f16::from_f32(near);
    }
    let above = f64::from(near).abs() > value.abs();
    f16::from_f32(f32::from_bits((near.to_bits() - u32::from(above)) | 1))
}
