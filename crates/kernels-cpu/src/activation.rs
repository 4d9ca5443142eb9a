//! Rounding activations to int8, 32 at a time.

use crate::lanes::{Kernel, Lanes};
use crate::tile::BLOCK;

/// 32 activations: `x ≈ scale * quants`, `|x - scale * quants| <= scale / 2` with
/// `scale = max|x| / 127`.
///
/// A block whose largest magnitude is below 1e-35 becomes zeros, and a block with a NaN or an
/// infinity gets a NaN scale, so that the fault reaches the output instead of vanishing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct QuantBlock {
    pub(crate) quants: [i8; BLOCK],
    pub(crate) scale: f32,
    /// `scale * Σ quants`.
    pub(crate) scaled_sum: f32,
    /// Σ quants of each half.
    pub(crate) sums: [i32; 2],
}

const _: () = assert!(size_of::<QuantBlock>() == 48);

/// Quantises whole rows of a multiple of 32 values.
pub(crate) struct Quantise<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) blocks: &'a mut [QuantBlock],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (x, rest) = self.x.as_chunks::<BLOCK>();
        assert!(rest.is_empty() && x.len() == self.blocks.len());
        for (x, block) in x.iter().zip(self.blocks) {
            quantise_block(lanes, x, block);
        }
    }
}

#[inline(always)]
fn quantise_block<L: Lanes>(lanes: L, x: &[f32; BLOCK], block: &mut QuantBlock) {
    let (halves, _) = x.as_chunks::<16>();
    let (a, b) = (lanes.load(&halves[0]), lanes.load(&halves[1]));
    let largest = lanes.maximum(lanes.max(lanes.abs(a), lanes.abs(b)));
    // Zero for finite values, NaN for all others.
    let fault = lanes.sum(lanes.add(lanes.sub(a, a), lanes.sub(b, b)));
    *block = QuantBlock::default();
    if fault != 0.0 {
        block.scale = f32::NAN;
        block.scaled_sum = f32::NAN;
    } else if largest >= 1e-35 {
        let inverse = lanes.splat(127.0 / largest);
        let (quants, _) = block.quants.as_chunks_mut::<16>();
        for (half, v) in [a, b].into_iter().enumerate() {
            lanes.store_i8(lanes.round(lanes.mul(v, inverse)), &mut quants[half]);
            block.sums[half] = quants[half].iter().map(|&q| i32::from(q)).sum();
        }
        block.scale = largest / 127.0;
        block.scaled_sum = block.scale * (block.sums[0] + block.sums[1]) as f32;
    }
}
