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
    let largest = lanes.maximum(lanes.max(lanes.abs(a), lanes.abs(b)));
    // Zero for finite values, NaN for all others.
    let fault = lanes.sum(lanes.add(lanes.sub(a, a), lanes.sub(b, b)));
    blocks.fill(QuantBlock::default());
    if fault != 0.0 {
        blocks[0].scale = f32::NAN;
        blocks[0].scaled_sum = f32::NAN;
        return;
    }
    if largest < 1e-35 {
        return;
    }
    let step = largest / 127.0;
    let (inverse, back) = (lanes.splat(127.0 / largest), lanes.splat(-step));
    let first = [lanes.round(lanes.mul(a, inverse)), lanes.round(lanes.mul(b, inverse))];
    let sum = store(lanes, first, &mut blocks[0]);
    if let [whole, remainder] = blocks {
        // What is left is half a step at most, 128 parts of 256; of those 127 fit.
        let mut second = [lanes.fma(first[0], back, a), lanes.fma(first[1], back, b)];
        for part in &mut second {
            let parts = lanes.mul(lanes.mul(*part, inverse), lanes.splat(256.0));
            let parts = lanes.max(lanes.splat(-127.0), lanes.min(lanes.splat(127.0), parts));
            *part = lanes.round(parts);
        }
        let sum = 256 * sum + store(lanes, second, remainder);
        whole.scale = step / 256.0;
        whole.scaled_sum = whole.scale * sum as f32;
    } else {
        blocks[0].scale = step;
        blocks[0].scaled_sum = step * sum as f32;
    }
}

/// Stores integral values and returns their sum.
#[inline(always)]
fn store<L: Lanes>(lanes: L, values: [L::V; 2], block: &mut QuantBlock) -> i32 {
    let (quants, _) = block.quants.as_chunks_mut::<16>();
    for (half, value) in values.into_iter().enumerate() {
        lanes.store_i8(value, &mut quants[half]);
        block.sums[half] = quants[half].iter().map(|&q| i32::from(q)).sum();
    }
    block.sums[0] + block.sums[1]
}
