//! EXL2 layers (`exllamav2` `q_matrix.cu`, `qdq_*.cuh`, `ext.py`).
//!
//! `q_weight` (words, N) in groups of K of falling width b: every 32 rows are b words a column, lowest
//! bits first. `q_groups` holds (b, first word) pairs, `q_scale` (G, N / 8) nibbles, `q_scale_max`
//! (G). `w = (q - 2^(b - 1)) half((s + 1)^2 half(max / 256))`, rounded to half at each `half` and
//! at the end. Input feature k is stored row `q_invperm[k]`.

use crate::LoadError;
use crate::gptq::difference;
use crate::quantised::{Dense, Layer, RawTensor, RawType, dense, half_bits, stream_bits};
use half::f16;

struct Group {
    bits: u32,
    first_word: usize,
    rows: usize,
}

/// (N, K).
pub(crate) fn shape(layer: &Layer<'_>) -> Result<(usize, usize), LoadError> {
    let (weight, groups) = parts(layer)?;
    Ok((weight.shape[1], groups.iter().map(|group| group.rows).sum()))
}

fn parts<'a>(layer: &Layer<'a>) -> Result<(RawTensor<'a>, Vec<Group>), LoadError> {
    let weight = layer.require("q_weight", RawType::I32, 2)?;
    let pairs = layer.require("q_groups", RawType::I16, 1)?;
    let (words, n) = (weight.shape[0], weight.shape[1]);
    let n_groups = pairs.shape[0] / 2;
    if n_groups == 0 || pairs.shape[0] % 2 != 0 || n == 0 || n % 8 != 0 {
        let found = format!("{} numbers for {n} output features", pairs.shape[0]);
        return Err(layer.refuse("q_groups", "pairs, and output features in eights", found));
    }
    let mut groups = Vec::with_capacity(n_groups);
    for g in 0..n_groups {
        let bits = u32::from(pairs.short(2 * g));
        let first_word = usize::from(pairs.short(2 * g + 1));
        let end = if g + 1 < n_groups { usize::from(pairs.short(2 * g + 3)) } else { words };
        if !matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) {
            return Err(layer.refuse("q_groups", "widths 2, 3, 4, 5, 6 or 8", bits));
        }
        let starts_right = g > 0 || first_word == 0;
        let whole = |span: usize| (span * 32).is_multiple_of(bits as usize) && span > 0;
        let span = end.checked_sub(first_word).filter(|&span| starts_right && whole(span));
        let Some(span) = span.filter(|_| end <= words) else {
            let expected = format!("group {g} within {words} words, in whole rows");
            return Err(layer.refuse("q_groups", expected, format!("{first_word}..{end}")));
        };
        groups.push(Group { bits, first_word, rows: span * 32 / bits as usize });
    }
    Ok((weight, groups))
}

/// The weights.
pub(crate) fn dequantise(layer: &Layer<'_>) -> Result<Dense, LoadError> {
    let (weight, groups) = parts(layer)?;
    let n = weight.shape[1];
    let k: usize = groups.iter().map(|group| group.rows).sum();
    let scale = layer.exact("q_scale", RawType::I32, &[groups.len(), n / 8])?;
    let most = layer.exact("q_scale_max", RawType::F16, &[groups.len()])?;
    let place = places(layer, k)?;
    let mut out = dense(layer, n, k)?;
    let mut stored_row = 0;
    for (g, group) in groups.iter().enumerate() {
        let most = f16::from_f32(most.half(g) / 256.0).to_f32();
        for row in 0..group.rows {
            let input = place[stored_row];
            stored_row += 1;
            for column in 0..n {
                let word = |w: usize| weight.word((group.first_word + w) * n + column);
                let q = stream_bits(word, row * group.bits as usize, group.bits);
                let s = (scale.word(g * (n / 8) + column / 8) >> (4 * (column % 8))) & 15;
                let squared = (difference(s, 0) + 1.0).powi(2);
                let step = f16::from_f32(squared * most);
                let value = difference(q, 1 << (group.bits - 1)) * step.to_f32();
                out.halves[column * k + input] = half_bits(value);
            }
        }
    }
    Ok(out)
}

/// The input feature of each stored row: the inverse of `q_invperm`, which must be a permutation.
fn places(layer: &Layer<'_>, k: usize) -> Result<Vec<usize>, LoadError> {
    let stored = layer.exact("q_invperm", RawType::I32, &[k])?;
    let mut place = vec![usize::MAX; k];
    for input in 0..k {
        let row = stored.word(input) as usize;
        if row >= k || place[row] != usize::MAX {
            return Err(layer.refuse("q_invperm", format!("a permutation of 0..{k}"), row));
        }
        place[row] = input;
    }
    Ok(place)
}
