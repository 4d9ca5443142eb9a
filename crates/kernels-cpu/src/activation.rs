//! Rounding activations to int8, 32 at a time, once or twice.

use crate::lanes::{Kernel, Lanes};
use crate::tile::BLOCK;
use exrail_kernels::InputRounding;
use std::ops::Range;

/// 32 activations, rounded once: `x ≈ scale * quants` with `scale = max|x| / 127`.
///
/// Rounded twice they have two blocks, which are one integer of 16 bits: `x ≈ scale * (256 first +
/// second)` with `scale = max|x| / 127 / 256`. Scale and scaled sum are those of the whole, and the
/// second block has none.
///
/// A block whose largest magnitude is below 1e-35 becomes zeros, and a block with a NaN or an
/// infinity gets a NaN scale, so that the fault reaches the output instead of vanishing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct QuantBlock {
    pub(crate) quants: [i8; BLOCK],
    pub(crate) scale: f32,
    /// `scale` times the sum of the integers.
    pub(crate) scaled_sum: f32,
    /// -8 Σ quants: where a dot product with `q - 8` starts. In memory, because a broadcast from
    /// there takes no slot of the arithmetic.
    pub(crate) nibble_start: i32,
    /// -128 Σ quants, for dot products with `q - 128`.
    pub(crate) bytes_start: i32,
    /// The same of each half.
    pub(crate) byte_starts: [i32; 2],
}

const _: () = assert!(size_of::<QuantBlock>() == 56);

impl QuantBlock {
    /// The first or the last sixteen integers.
    #[inline(always)]
    pub(crate) fn half(&self, i: usize) -> &[i8; 16] {
        &self.quants.as_chunks::<16>().0[i]
    }

    /// Σ quants of each half.
    #[inline(always)]
    fn set_sums(&mut self, [low, high]: [i32; 2]) {
        self.nibble_start = -8 * (low + high);
        self.bytes_start = -128 * (low + high);
        self.byte_starts = [-128 * low, -128 * high];
    }
}

/// Blocks per 32 values.
///
/// Rounding every product once costs SmolLM2-135M a mean KL divergence of 4.2e-3 nats from the exact
/// mode; rounding all but the wide gate and up products twice costs a quarter of that.
pub(crate) fn n_blocks(rounding: InputRounding) -> usize {
    match rounding {
        InputRounding::Once => 1,
        InputRounding::Twice => 2,
    }
}

/// How rows of activations are cut into the tiles that products take at once: as many of eight rows
/// as there are, then of four, then single ones, as far as the registers hold them.
///
/// The blocks of a tile of N rows lie as `(columns / 32, N, 1 or 2)`, so that a product finds all
/// that it needs at fixed distances from one address: an Intel processor splits an instruction whose
/// operand has two registers in its address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    /// Rows in tiles of eight, which come first.
    in_eights: usize,
    /// Rows in those and in tiles of four.
    in_fours: usize,
}

impl Tiles {
    /// `widest` is [`Lanes::WIDEST`].
    pub(crate) fn new(n_rows: usize, widest: usize) -> Tiles {
        let in_eights = if widest >= 8 { n_rows / 8 * 8 } else { 0 };
        let in_fours = if widest >= 4 { n_rows / 4 * 4 } else { 0 };
        Tiles { in_eights, in_fours }
    }

    /// The rows of the tile that `row` is in.
    #[inline(always)]
    pub(crate) fn of(self, row: usize) -> Range<usize> {
        if row < self.in_eights {
            row / 8 * 8..row / 8 * 8 + 8
        } else if row < self.in_fours {
            row / 4 * 4..row / 4 * 4 + 4
        } else {
            row..row + 1
        }
    }
}

/// Quantises some of the blocks of x `(T, columns)`, whose columns are a multiple of 32.
pub(crate) struct Quantise<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) columns: usize,
    pub(crate) rounding: InputRounding,
    pub(crate) tiles: Tiles,
    /// How many blocks of x come before these.
    pub(crate) first: usize,
    pub(crate) blocks: &'a mut [QuantBlock],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let n_each = n_blocks(self.rounding);
        let per_row = self.columns / BLOCK;
        assert!(self.columns.is_multiple_of(BLOCK) && self.first.is_multiple_of(n_each));
        let first = self.first / n_each;
        let mut tile = self.tiles.of(first / per_row);
        let inside = first - tile.start * per_row;
        let (mut row, mut block) = (tile.start + inside % tile.len(), inside / tile.len());
        for blocks in self.blocks.chunks_exact_mut(n_each) {
            let x = &self.x[row * self.columns + block * BLOCK..][..BLOCK];
            let (halves, _) = x.as_chunks::<16>();
            quantise(lanes, [lanes.load(&halves[0]), lanes.load(&halves[1])], blocks);
            row += 1;
            if row == tile.end {
                (row, block) = (tile.start, block + 1);
            }
            if block == per_row {
                tile = self.tiles.of(tile.end);
                (row, block) = (tile.start, 0);
            }
        }
    }
}

/// Runs nothing: the answer is [`Lanes::WIDEST`].
pub(crate) struct Widest;

impl Kernel for Widest {
    type Out = usize;

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) -> usize {
        L::WIDEST
    }
}

/// Rounds 32 values to one block or two.
#[inline(always)]
fn quantise<L: Lanes>(lanes: L, [a, b]: [L::V; 2], blocks: &mut [QuantBlock]) {
    let largest = lanes.largest_magnitude(a, b);
    if !(1e-35..f32::INFINITY).contains(&largest) {
        blocks.fill(QuantBlock::default());
        if largest >= 1e-35 || largest.is_nan() {
            blocks[0].scale = f32::NAN;
            blocks[0].scaled_sum = f32::NAN;
        }
        return;
    }
    let step = largest / 127.0;
    let (inverse, back) = (lanes.splat(127.0 / largest), lanes.splat(-step));
    let first = [lanes.round(lanes.mul(a, inverse)), lanes.round(lanes.mul(b, inverse))];
    store(lanes, first, &mut blocks[0]);
    if let [whole, remainder] = blocks {
        // What is left is half a step at most, 128 parts of 256; of those 127 fit.
        let mut second = [lanes.fma(first[0], back, a), lanes.fma(first[1], back, b)];
        for part in &mut second {
            let parts = lanes.mul(lanes.mul(*part, inverse), lanes.splat(256.0));
            let parts = lanes.max(lanes.splat(-127.0), lanes.min(lanes.splat(127.0), parts));
            *part = lanes.round(parts);
        }
        store(lanes, second, remainder);
        let sums = lanes.integer_sums([first[0], first[1], second[0], second[1]]);
        whole.set_sums([sums[0], sums[1]]);
        remainder.set_sums([sums[2], sums[3]]);
        whole.scale = step / 256.0;
        whole.scaled_sum = whole.scale * (256 * (sums[0] + sums[1]) + sums[2] + sums[3]) as f32;
        (remainder.scale, remainder.scaled_sum) = (0.0, 0.0);
    } else {
        let [low, high, ..] = lanes.integer_sums([first[0], first[1], first[0], first[1]]);
        blocks[0].set_sums([low, high]);
        blocks[0].scale = step;
        blocks[0].scaled_sum = step * (low + high) as f32;
    }
}

/// Stores integral values.
#[inline(always)]
fn store<L: Lanes>(lanes: L, values: [L::V; 2], block: &mut QuantBlock) {
    let (quants, _) = block.quants.as_chunks_mut::<16>();
    for (value, quants) in values.into_iter().zip(quants) {
        lanes.store_i8(value, quants);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::processor::Processor;

    /// What an earlier product left must not show.
    const USED: QuantBlock = QuantBlock {
        quants: [5; BLOCK],
        scale: 7.0,
        scaled_sum: 8.0,
        nibble_start: 9,
        bytes_start: 9,
        byte_starts: [9; 2],
    };

    fn check(x: &[f32], blocks: &[QuantBlock], what: &str) {
        let sum = |quants: &[i8]| quants.iter().map(|&q| i32::from(q)).sum::<i32>();
        for block in blocks {
            let (low, high) = block.quants.split_at(BLOCK / 2);
            assert_eq!(block.nibble_start, -8 * (sum(low) + sum(high)), "{what}");
            assert_eq!(block.bytes_start, -128 * (sum(low) + sum(high)), "{what}");
            assert_eq!(block.byte_starts, [-128 * sum(low), -128 * sum(high)], "{what}");
        }
        let whole = |i: usize| {
            blocks.iter().fold(0, |whole, block| 256 * whole + i32::from(block.quants[i]))
        };
        let total: i32 = (0..BLOCK).map(whole).sum();
        assert_eq!(blocks[0].scaled_sum, blocks[0].scale * total as f32, "{what}");
        assert!(blocks[1..].iter().all(|b| (b.scale, b.scaled_sum) == (0.0, 0.0)), "{what}");
        // Of the 128 parts that half a step has, 127 fit the second block.
        let bound = if blocks.len() == 1 { 0.51 } else { 1.01 } * blocks[0].scale;
        for (i, &x) in x.iter().enumerate() {
            let found = blocks[0].scale * whole(i) as f32;
            assert!((found - x).abs() <= bound + 1e-6 * x.abs(), "{what}");
        }
    }

    #[test]
    fn blocks_lie_by_tiles_and_have_the_sums_and_scales_of_their_quants() {
        let (n_rows, columns) = (15, 3 * BLOCK);
        let x: Vec<f32> =
            (0..n_rows * columns).map(|i| ((i * 7919) % 1000) as f32 - 300.0).collect();
        for isa in Isa::available() {
            let processor = Processor::of(isa).expect("listed as available");
            let widest = processor.run(Widest);
            let tiles = Tiles::new(n_rows, widest);
            let expected: &[(usize, usize)] = match widest {
                8 => &[(0, 8), (8, 4), (12, 1), (13, 1), (14, 1)],
                4 => &[(0, 4), (4, 4), (8, 4), (12, 1), (13, 1), (14, 1)],
                _ => &[(0, 1), (14, 1)],
            };
            for rounding in [InputRounding::Once, InputRounding::Twice] {
                let n = n_blocks(rounding);
                let mut all = vec![USED; n_rows * 3 * n];
                // In uneven parts, as threads take them.
                for (i, blocks) in all.chunks_mut(7 * n).enumerate() {
                    let first = 7 * n * i;
                    let x = &x;
                    processor.run(Quantise { x, columns, rounding, tiles, first, blocks });
                }
                for &(start, width) in expected {
                    assert_eq!(tiles.of(start + width - 1), start..start + width, "{isa}");
                    for (row, block) in (0..width).flat_map(|r| (0..3).map(move |b| (r, b))) {
                        let place = (start * 3 + block * width + row) * n;
                        let from = (start + row) * columns + block * BLOCK;
                        let what = format!("{isa}, {rounding:?}, row {row} from {start}");
                        check(&x[from..from + BLOCK], &all[place..place + n], &what);
                    }
                }
            }
        }
    }
}
