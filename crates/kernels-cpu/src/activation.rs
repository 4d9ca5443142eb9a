//! Rounding activations to int8, 32 at a time, once or twice.

use crate::lanes::{Kernel, Lanes};
use crate::tile::BLOCK;
use exrail_kernels::InputRounding;

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
    /// Σ quants of each half.
    pub(crate) sums: [i32; 2],
}

const _: () = assert!(size_of::<QuantBlock>() == 48);

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

/// Quantises whole rows of a multiple of 32 values.
pub(crate) struct Quantise<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) rounding: InputRounding,
    pub(crate) blocks: &'a mut [QuantBlock],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (x, rest) = self.x.as_chunks::<BLOCK>();
        let n_blocks = n_blocks(self.rounding);
        assert!(rest.is_empty() && n_blocks * x.len() == self.blocks.len());
        for (x, blocks) in x.iter().zip(self.blocks.chunks_exact_mut(n_blocks)) {
            let (halves, _) = x.as_chunks::<16>();
            quantise(lanes, [lanes.load(&halves[0]), lanes.load(&halves[1])], blocks);
        }
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
        (whole.sums, remainder.sums) = ([sums[0], sums[1]], [sums[2], sums[3]]);
        whole.scale = step / 256.0;
        whole.scaled_sum = whole.scale * (256 * (sums[0] + sums[1]) + sums[2] + sums[3]) as f32;
        (remainder.scale, remainder.scaled_sum) = (0.0, 0.0);
    } else {
        let [low, high, ..] = lanes.integer_sums([first[0], first[1], first[0], first[1]]);
        blocks[0].sums = [low, high];
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
    use crate::{CpuBackend, CpuOptions, Isa};

    #[test]
    fn sums_and_scales_are_those_of_the_quants() {
        for isa in Isa::available() {
            let options = CpuOptions { isa: Some(isa), ..CpuOptions::default() };
            let backend = CpuBackend::new(options).expect("the instruction set is available");
            let x: Vec<f32> = (0..4 * BLOCK).map(|i| ((i * 7919) % 1000) as f32 - 300.0).collect();
            for rounding in [InputRounding::Once, InputRounding::Twice] {
                // What an earlier product left must not show.
                let used =
                    QuantBlock { quants: [5; BLOCK], scale: 7.0, scaled_sum: 8.0, sums: [9; 2] };
                let n = n_blocks(rounding);
                let mut blocks = vec![used; 4 * n];
                backend.parts().0.run(Quantise { x: &x, rounding, blocks: &mut blocks });
                for (x, blocks) in x.chunks_exact(BLOCK).zip(blocks.chunks_exact(n)) {
                    let sum = |quants: &[i8]| quants.iter().map(|&q| i32::from(q)).sum::<i32>();
                    for block in blocks {
                        let (low, high) = block.quants.split_at(BLOCK / 2);
                        assert_eq!(block.sums, [sum(low), sum(high)], "{isa} {rounding:?}");
                    }
                    let whole = |i: usize| {
                        blocks
                            .iter()
                            .fold(0, |whole, block| 256 * whole + i32::from(block.quants[i]))
                    };
                    let total: i32 = (0..BLOCK).map(whole).sum();
                    assert_eq!(blocks[0].scaled_sum, blocks[0].scale * total as f32);
                    assert!(blocks[1..].iter().all(|b| (b.scale, b.scaled_sum) == (0.0, 0.0)));
                    for (i, &x) in x.iter().enumerate() {
                        let found = blocks[0].scale * whole(i) as f32;
                        assert!((found - x).abs() <= 0.51 * blocks[0].scale + 1e-6 * x.abs());
                    }
                }
            }
        }
    }
}
