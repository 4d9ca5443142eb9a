//! [`IntGrid`]: signed integers times one half-precision scale a group, and the scale that fits a
//! group best.
//!
//! A group on such a grid is the native block type of the same width with its scale repeated:
//! int4 is `Q4_0`, int8 is `Q8_0`.

use crate::block::{Block, f32_to_half, grid_index, half_to_f32, index_byte, pack_nibbles};
use crate::{BlockQ4_0, BlockQ8_0, DType};

/// Where the extreme value of an int4 group may come to lie on the grid. A step a little smaller
/// than the one that reaches it clamps one value and rounds the others finer; both signs, because
/// the grid reaches from -8 to 7.
const INT4_PLACES: [f32; 12] = [-8.0, -8.5, -7.5, -9.0, -7.0, -6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 6.5];
/// Adding and subtracting 1.5 · 2²³ rounds a small f32 to the nearest integer.
const TO_INTEGER: f32 = 12_582_912.0;
/// Sums of one group run in as many lanes, so that the compiler can use vector instructions.
const LANES: usize = 8;

/// A grid of signed integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntGrid {
    /// -8 to 7.
    Int4,
    /// -127 to 127.
    Int8,
}

impl IntGrid {
    /// Bits of a code.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            IntGrid::Int4 => 4,
            IntGrid::Int8 => 8,
        }
    }

    /// The block format whose blocks are this grid.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            IntGrid::Int4 => DType::Q4_0,
            IntGrid::Int8 => DType::Q8_0,
        }
    }

    /// The code nearest to `value` in steps of `scale`, half away from zero, clamped; 0 when
    /// `scale` is 0.
    #[must_use]
    pub fn code(self, value: f32, scale: f32) -> i8 {
        let (low, high) = match self {
            IntGrid::Int4 => (-8, 7),
            IntGrid::Int8 => (-127, 127),
        };
        index_byte(grid_index(value, scale, low, high)).cast_signed()
    }

    /// Half-precision bits of the scale for the group `values`.
    ///
    /// Int8: the largest magnitude becomes 127. Int4: of twelve scales that put the extreme at or
    /// beyond an end of the grid, and the least-squares refinement of the best of them, the one
    /// with the smallest Σ `importance` · error² (importance 1 when there is none).
    ///
    /// # Panics
    /// When `importance` is not as long as `values`.
    #[must_use]
    pub fn scale(self, values: &[f32], importance: Option<&[f32]>) -> u16 {
        if let Some(importance) = importance {
            assert_eq!(importance.len(), values.len(), "one importance a value");
        }
        let extreme = crate::block::signed_extreme(values);
        match self {
            IntGrid::Int8 => f32_to_half(extreme.abs() / 127.0),
            IntGrid::Int4 => int4_scale(values, extreme, importance),
        }
    }

    /// One block of 32 codes with its scale, as [`IntGrid::dtype`] stores it.
    pub fn write_block(self, scale: u16, codes: &[i8; 32], out: &mut Vec<u8>) {
        match self {
            IntGrid::Int4 => {
                let nibbles = codes.map(|code| (code + 8).cast_unsigned());
                let qs = pack_nibbles(&nibbles);
                out.extend(BlockQ4_0 { d: scale, qs }.to_bytes());
            }
            IntGrid::Int8 => out.extend(BlockQ8_0 { d: scale, qs: *codes }.to_bytes()),
        }
    }

    /// `values` rounded to nearest in groups of `group` along each row of `columns`, as blocks of
    /// [`IntGrid::dtype`].
    ///
    /// # Panics
    /// When `group` is not a multiple of 32 that divides `columns`, or `values` are not whole rows.
    #[must_use]
    pub fn round_rows(self, values: &[f32], columns: usize, group: usize) -> Vec<u8> {
        assert!(group.is_multiple_of(32) && group > 0, "groups of whole blocks, not {group}");
        assert!(columns.is_multiple_of(group), "{columns} columns are not whole groups of {group}");
        assert!(values.len().is_multiple_of(columns), "whole rows");
        let mut bytes = Vec::with_capacity(values.len() / 32 * self.dtype().block_bytes());
        for values in values.chunks_exact(group) {
            let scale = self.scale(values, None);
            let step = half_to_f32(scale);
            for block in values.as_chunks::<32>().0 {
                let codes = block.map(|value| self.code(value, step));
                self.write_block(scale, &codes, &mut bytes);
            }
        }
        bytes
    }
}

fn int4_scale(values: &[f32], extreme: f32, importance: Option<&[f32]>) -> u16 {
    let mut best = (f32::INFINITY, f32_to_half(extreme / -8.0), None);
    for place in INT4_PLACES {
        let scale = f32_to_half(extreme / place);
        let fit = int4_fit(values, half_to_f32(scale), importance);
        if fit.error < best.0 {
            best = (fit.error, scale, fit.least_squares());
        }
    }
    let Some(refined) = best.2 else { return best.1 };
    let scale = f32_to_half(refined);
    let fit = int4_fit(values, half_to_f32(scale), importance);
    if fit.error < best.0 { scale } else { best.1 }
}

/// How a scale fits: importance-weighted sums over a group of values x and their codes c.
struct Fit {
    error: f32,  // Σ (x − scale · c)²
    along: f32,  // Σ x · c
    square: f32, // Σ c²
}

impl Fit {
    /// The scale that these codes fit best.
    fn least_squares(&self) -> Option<f32> {
        (self.square > 0.0).then(|| self.along / self.square)
    }
}

fn int4_fit(values: &[f32], scale: f32, importance: Option<&[f32]>) -> Fit {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let (mut error, mut along, mut square) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    let mut add = |lane: usize, value: f32, weight: f32| {
        let code = (value * inverse).clamp(-8.0, 7.0) + TO_INTEGER - TO_INTEGER;
        let difference = value - scale * code;
        error[lane] += weight * difference * difference;
        along[lane] += weight * value * code;
        square[lane] += weight * code * code;
    };
    let chunks = values.chunks(LANES);
    match importance {
        None => chunks.for_each(|chunk| {
            chunk.iter().enumerate().for_each(|(lane, &value)| add(lane, value, 1.0));
        }),
        Some(importance) => chunks.zip(importance.chunks(LANES)).for_each(|(chunk, weights)| {
            for (lane, (&value, &weight)) in chunk.iter().zip(weights).enumerate() {
                add(lane, value, weight);
            }
        }),
    }
    let sum = |lanes: [f32; LANES]| lanes.iter().sum();
    Fit { error: sum(error), along: sum(along), square: sum(square) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequantize;

    fn values(seed: u32, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        };
        (0..n).map(|_| (next() + next() + next()) as f32 * 0.1).collect()
    }

    fn error(grid: IntGrid, values: &[f32], group: usize) -> f64 {
        let bytes = grid.round_rows(values, values.len(), group);
        let mut out = vec![0.0; values.len()];
        dequantize(grid.dtype(), &bytes, &mut out).unwrap();
        out.iter().zip(values).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn the_search_is_never_worse_than_the_extreme_and_usually_better() {
        let (mut searched, mut plain) = (0.0, 0.0);
        for seed in 0..200 {
            let values = values(seed, 32);
            let array: &[f32; 32] = values.as_slice().try_into().unwrap();
            let nearest = BlockQ4_0::nearest(array).values();
            let by_extreme: f64 =
                nearest.iter().zip(array).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let by_search = error(IntGrid::Int4, &values, 32);
            assert!(by_search <= by_extreme, "seed {seed}: {by_search} > {by_extreme}");
            searched += by_search;
            plain += by_extreme;
        }
        assert!(searched < 0.92 * plain, "{searched} of {plain}");
    }

    #[test]
    fn int8_in_groups_of_a_block_is_the_nearest_block() {
        let values = values(7, 32);
        let array: &[f32; 32] = values.as_slice().try_into().unwrap();
        let bytes = IntGrid::Int8.round_rows(&values, 32, 32);
        assert_eq!(bytes, BlockQ8_0::nearest(array).to_bytes());
    }

    #[test]
    fn values_on_the_grid_stay() {
        let codes: [i8; 32] = std::array::from_fn(|i| (i % 16) as i8 - 8);
        let values = codes.map(|code| f32::from(code) * 0.25);
        assert_eq!(error(IntGrid::Int4, &values, 32), 0.0);
    }

    #[test]
    fn larger_groups_repeat_their_scale() {
        let bytes = IntGrid::Int4.round_rows(&values(3, 256), 256, 128);
        let scales: Vec<&[u8]> = bytes.chunks(18).map(|block| &block[..2]).collect();
        assert_eq!(scales.len(), 8);
        assert!(scales[..4].iter().all(|scale| *scale == scales[0]));
        assert_ne!(scales[0], scales[4]);
    }

    #[test]
    fn importance_moves_the_scale_to_what_matters() {
        let mut values = values(11, 32);
        values[0] = 1.0;
        let mut importance = vec![1.0; 32];
        importance[0] = 1e-6;
        let fine = half_to_f32(IntGrid::Int4.scale(&values, Some(&importance))).abs();
        importance[0] = 1e6;
        let coarse = half_to_f32(IntGrid::Int4.scale(&values, Some(&importance)));
        let code = f32::from(IntGrid::Int4.code(1.0, coarse));
        assert!((code * coarse - 1.0).abs() < 1e-3, "{coarse} times {code}");
        assert!(fine < coarse.abs(), "{fine} below {coarse}");
    }

    #[test]
    fn nothing_but_zeros_gives_zeros() {
        assert_eq!(error(IntGrid::Int4, &[0.0; 64], 64), 0.0);
        assert_eq!(error(IntGrid::Int8, &[0.0; 64], 64), 0.0);
    }
}
