//! Matrix products over row groups: the generic algorithm behind every `linear` operation.
//!
//! ```text
//! for each group of 16 weight rows (parallel)
//!   for each tile of 8, 4 or 1 activation rows
//!     for each block of 32 k
//!       load and unpack the weights once
//!       for each activation row: acc[row] += Σ w x            acc: one lane a weight row
//! ```
//!
//! The arithmetic of one output does not depend on the tile it is in: a row alone and the same row
//! in a batch give the same bits. No horizontal sums: lane r belongs to weight row r throughout.

use crate::activation::{QuantBlock, Tiles};
use crate::codes::{Codes, LINE};
use crate::lanes::Lanes;
use crate::tile::{BLOCK, Group};
use exrail_kernels::InputRounding;
use std::marker::PhantomData;

/// Halves of a block of bytes, which may have a scale each.
const HALVES: usize = 2;

/// Asks for a line of weights that a product with `N` rows of activations will need, `block` being
/// where it is.
///
/// How far ahead is best with one row depends on the CPU. With several rows the arithmetic of a
/// block takes so long that the processor's own prefetchers fall behind everywhere; asking the L2
/// leaves the requests of the L1 for the activations.
#[inline(always)]
pub(crate) fn prefetch<L: Lanes, const N: usize>(lanes: L, block: &[u8], line: usize) {
    if N == 1 {
        lanes.prefetch(block, lanes.ahead() + LINE * line);
    } else {
        lanes.prefetch_l2(block, 4096 + LINE * line);
    }
}

/// The activations of a product.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    /// `(T, columns)`.
    pub(crate) x: &'a [f32],
    pub(crate) columns: usize,
    /// By tiles, as [`Tiles`] says; empty unless the format wants integers.
    pub(crate) quantised: &'a [QuantBlock],
    pub(crate) rounding: InputRounding,
    pub(crate) tiles: Tiles,
}

impl<'a> Input<'a> {
    #[inline(always)]
    fn floats(self, row: usize) -> &'a [f32] {
        &self.x[row * self.columns..(row + 1) * self.columns]
    }

    /// The blocks of the tile of `N` rows that starts with `row`, `(columns / 32, N, P)`.
    #[inline(always)]
    fn tile<const P: usize, const N: usize>(self, row: usize) -> &'a [[[QuantBlock; P]; N]] {
        let n_blocks = self.columns / BLOCK * P;
        let tile = &self.quantised[row * n_blocks..(row + N) * n_blocks];
        tile.as_chunks::<P>().0.as_chunks::<N>().0
    }
}

/// How one tile format meets one kind of activation.
pub(crate) trait Format: Copy + Send + Sync {
    /// The largest tile of activation rows that the registers hold.
    const WIDEST: usize;

    /// The dot products of sixteen weight rows with activation rows `row..row + N`.
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N];
}

/// Scales and minima of a group's blocks.
pub(crate) trait Scales<'a>: Copy + Send + Sync {
    /// `w = scale q + minimum`; without, nibbles mean `q - 8`.
    const MINIMA: bool;
    /// 1 or 2.
    const PER_BLOCK: usize;
    fn of(group: Group<'a>) -> Self;
    fn scale<L: Lanes>(self, lanes: L, block: usize, half: usize) -> L::V;
    fn minimum<L: Lanes>(self, lanes: L, block: usize, half: usize) -> L::V;
}

/// f16 scales, one a block.
#[derive(Clone, Copy)]
pub(crate) struct HalfScales<'a, const MINIMA: bool>(Group<'a>);

impl<'a, const MINIMA: bool> Scales<'a> for HalfScales<'a, MINIMA> {
    const MINIMA: bool = MINIMA;
    const PER_BLOCK: usize = 1;

    #[inline(always)]
    fn of(group: Group<'a>) -> Self {
        HalfScales(group)
    }
    #[inline(always)]
    fn scale<L: Lanes>(self, lanes: L, block: usize, _half: usize) -> L::V {
        lanes.load_f16(self.0.scales(block))
    }
    #[inline(always)]
    fn minimum<L: Lanes>(self, lanes: L, block: usize, _half: usize) -> L::V {
        lanes.load_f16(self.0.minima(block))
    }
}

/// f16 scales a superblock times byte scales a sub-block: unsigned with minima (Q2_K, Q4_K,
/// Q5_K), signed without (Q3_K, Q6_K, IQ4_XS).
#[derive(Clone, Copy)]
pub(crate) struct SuperScales<'a, const MINIMA: bool, const PER_BLOCK: usize>(Group<'a>);

impl<'a, const MINIMA: bool, const PER_BLOCK: usize> Scales<'a>
    for SuperScales<'a, MINIMA, PER_BLOCK>
{
    const MINIMA: bool = MINIMA;
    const PER_BLOCK: usize = PER_BLOCK;

    #[inline(always)]
    fn of(group: Group<'a>) -> Self {
        SuperScales(group)
    }
    #[inline(always)]
    fn scale<L: Lanes>(self, lanes: L, block: usize, half: usize) -> L::V {
        let sub = self.0.sub_scales(block, half);
        let sub = if MINIMA { lanes.load_u8(sub) } else { lanes.load_i8(sub) };
        lanes.mul(lanes.load_f16(self.0.super_scales(block)), sub)
    }
    #[inline(always)]
    fn minimum<L: Lanes>(self, lanes: L, block: usize, half: usize) -> L::V {
        let d = lanes.load_f16(self.0.super_minima(block));
        let sub = lanes.load_u8(self.0.sub_minima(block, half));
        lanes.mul(d, lanes.sub(lanes.splat(0.0), sub))
    }
}

/// bfloat16 scales, one a block: powers of two beyond f16.
#[derive(Clone, Copy)]
pub(crate) struct BrainScales<'a>(Group<'a>);

impl<'a> Scales<'a> for BrainScales<'a> {
    const MINIMA: bool = false;
    const PER_BLOCK: usize = 1;

    #[inline(always)]
    fn of(group: Group<'a>) -> Self {
        BrainScales(group)
    }
    #[inline(always)]
    fn scale<L: Lanes>(self, lanes: L, block: usize, _half: usize) -> L::V {
        lanes.load_bf16(self.0.scales(block))
    }
    #[inline(always)]
    fn minimum<L: Lanes>(self, lanes: L, _block: usize, _half: usize) -> L::V {
        lanes.splat(0.0)
    }
}

/// A scale family, without its lifetime.
pub(crate) trait ScaleFamily: Copy + Send + Sync {
    type Of<'a>: Scales<'a>;
}

/// [`HalfScales`].
#[derive(Clone, Copy)]
pub(crate) struct Halves<const MINIMA: bool>;
impl<const MINIMA: bool> ScaleFamily for Halves<MINIMA> {
    type Of<'a> = HalfScales<'a, MINIMA>;
}

/// [`SuperScales`].
#[derive(Clone, Copy)]
pub(crate) struct Supers<const MINIMA: bool, const PER_BLOCK: usize>;
impl<const MINIMA: bool, const PER_BLOCK: usize> ScaleFamily for Supers<MINIMA, PER_BLOCK> {
    type Of<'a> = SuperScales<'a, MINIMA, PER_BLOCK>;
}

/// [`BrainScales`].
#[derive(Clone, Copy)]
pub(crate) struct Brains;
impl ScaleFamily for Brains {
    type Of<'a> = BrainScales<'a>;
}

/// Σ w x of 32 nibbles and the `P` blocks of each of `N` rows.
#[inline(always)]
fn dot_nibbles<L: Lanes, S: ScaleFamily, const P: usize, const N: usize>(
    lanes: L,
    w: &[L::I; 8],
    rows: &[[QuantBlock; P]; N],
) -> [L::I; N] {
    let mut totals = [lanes.splat_i(0); N];
    unroll!(p in P, {
        unroll!(n in N, {
            let start = lanes.splat_i(if S::Of::MINIMA { 0 } else { rows[n][p].nibble_start });
            totals[n] = lanes.add_i(lanes.times_256(totals[n]), start);
        });
        totals = lanes.dot_nibbles(w, each(rows, |row| &row[p].quants), totals);
    });
    totals
}

/// Σ w x of 32 bytes and the `P` blocks of each of `N` rows.
#[inline(always)]
fn dot_bytes<L: Lanes, const P: usize, const N: usize>(
    lanes: L,
    w: &[L::I; 8],
    rows: &[[QuantBlock; P]; N],
) -> [L::I; N] {
    let mut totals = [lanes.splat_i(0); N];
    unroll!(p in P, {
        unroll!(n in N, {
            let start = lanes.start_bytes(rows[n][p].bytes_start);
            totals[n] = lanes.add_i(lanes.times_256(totals[n]), start);
        });
        unroll!(i in HALVES, {
            totals = lanes.dot_bytes(half::<L>(w, i), each(rows, |row| row[p].half(i)), totals);
        });
    });
    totals
}

/// The same of one half.
#[inline(always)]
fn dot_half<L: Lanes, const P: usize, const N: usize>(
    lanes: L,
    w: &[L::I; 8],
    rows: &[[QuantBlock; P]; N],
    i: usize,
) -> [L::I; N] {
    let mut totals = [lanes.splat_i(0); N];
    unroll!(p in P, {
        unroll!(n in N, {
            let start = lanes.start_bytes(rows[n][p].byte_starts[i]);
            totals[n] = lanes.add_i(lanes.times_256(totals[n]), start);
        });
        totals = lanes.dot_bytes(half::<L>(w, i), each(rows, |row| row[p].half(i)), totals);
    });
    totals
}

/// The weights of one half.
#[inline(always)]
fn half<L: Lanes>(w: &[L::I; 8], i: usize) -> [L::I; 4] {
    [w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]]
}

/// A part of each row.
#[inline(always)]
fn each<'a, T, U: ?Sized, const N: usize>(
    rows: &'a [T; N],
    of: impl Fn(&'a T) -> &'a U,
) -> [&'a U; N] {
    std::array::from_fn(|n| of(&rows[n]))
}

/// Nibble tiles with activations of `P` int8 each.
#[derive(Clone, Copy)]
pub(crate) struct NibblesInt8<S, const P: usize>(PhantomData<S>);

impl<S: ScaleFamily, const P: usize> Format for NibblesInt8<S, P> {
    const WIDEST: usize = 8;

    #[inline(always)]
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N] {
        let scales = S::Of::of(group);
        let blocks = input.tile::<P, N>(row);
        let mut acc = [lanes.splat(0.0); N];
        for (b, rows) in group.blocks().zip(blocks) {
            let tile = group.weights::<256>(b);
            for line in 0..5 {
                prefetch::<L, N>(lanes, tile, line);
            }
            let w = lanes.nibbles(tile);
            let scale = scales.scale(lanes, b, 0);
            let dots = dot_nibbles::<L, S, P, N>(lanes, &w, rows);
            unroll!(n in N, {
                let scale = lanes.mul(scale, lanes.splat(rows[n][0].scale));
                acc[n] = lanes.fma(lanes.to_f32(dots[n]), scale, acc[n]);
            });
            if S::Of::MINIMA {
                let minimum = scales.minimum(lanes, b, 0);
                unroll!(n in N, {
                    acc[n] = lanes.fma(minimum, lanes.splat(rows[n][0].scaled_sum), acc[n]);
                });
            }
        }
        acc
    }
}

/// Tiles of codes `C` with activations of `P` int8 each.
#[derive(Clone, Copy)]
pub(crate) struct CodesInt8<C, S, const P: usize>(PhantomData<(C, S)>);

impl<C: Codes, S: ScaleFamily, const P: usize> Format for CodesInt8<C, S, P> {
    const WIDEST: usize = 8;

    #[inline(always)]
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N] {
        let scales = S::Of::of(group);
        let blocks = input.tile::<P, N>(row);
        let mut acc = [lanes.splat(0.0); N];
        for (b, rows) in group.blocks().zip(blocks) {
            C::prefetch::<L, N>(lanes, group, b);
            let w = C::bytes(lanes, group, b);
            let scale = scales.scale(lanes, b, 0);
            if S::Of::PER_BLOCK == 1 {
                let dots = dot_bytes::<L, P, N>(lanes, &w, rows);
                unroll!(n in N, {
                    let scale = lanes.mul(scale, lanes.splat(rows[n][0].scale));
                    acc[n] = lanes.fma(lanes.to_f32(dots[n]), scale, acc[n]);
                });
            } else {
                let scales = [scale, scales.scale(lanes, b, 1)];
                unroll!(i in HALVES, {
                    let dots = dot_half::<L, P, N>(lanes, &w, rows, i);
                    unroll!(n in N, {
                        let scale = lanes.mul(scales[i], lanes.splat(rows[n][0].scale));
                        acc[n] = lanes.fma(lanes.to_f32(dots[n]), scale, acc[n]);
                    });
                });
            }
            if S::Of::MINIMA {
                let halves =
                    [scales.minimum(lanes, b, 0), scales.minimum(lanes, b, S::Of::PER_BLOCK - 1)];
                unroll!(n in N, {
                    acc[n] = add_minima::<L, S, P>(lanes, halves, &rows[n], acc[n]);
                });
            }
        }
        acc
    }
}

/// Adds what the minima of a block contribute.
#[inline(always)]
fn add_minima<L: Lanes, S: ScaleFamily, const P: usize>(
    lanes: L,
    [first, second]: [L::V; 2],
    x: &[QuantBlock; P],
    acc: L::V,
) -> L::V {
    if S::Of::PER_BLOCK == 1 {
        return lanes.fma(first, lanes.splat(x[0].scaled_sum), acc);
    }
    let mut starts = x[0].byte_starts;
    if P == 2 {
        let second = x[1].byte_starts;
        starts = [256 * starts[0] + second[0], 256 * starts[1] + second[1]];
    }
    // Below 2^24 but for the power of two, so that this is exact.
    let sums = starts.map(|start| lanes.splat(x[0].scale * (start as f32 / -128.0)));
    lanes.fma(second, sums[1], lanes.fma(first, sums[0], acc))
}

/// f32 products: even and odd k in two accumulators.
#[derive(Clone, Copy)]
struct FloatSums<V, const N: usize>([[V; 2]; N]);

impl<V: Copy, const N: usize> FloatSums<V, N> {
    /// Adds k = 4j..4j+4 of a block.
    #[inline(always)]
    fn add<L: Lanes<V = V>>(&mut self, lanes: L, w: [V; 4], x: &[&[f32; BLOCK]; N], j: usize) {
        for (c, &w) in w.iter().enumerate() {
            for (sums, x) in self.0.iter_mut().zip(x) {
                let sum = &mut sums[c % 2];
                *sum = lanes.fma(w, lanes.splat(x[4 * j + c]), *sum);
            }
        }
    }

    #[inline(always)]
    fn finish<L: Lanes<V = V>>(self, lanes: L) -> [V; N] {
        let mut out = [lanes.splat(0.0); N];
        for (out, [even, odd]) in out.iter_mut().zip(self.0) {
            *out = lanes.add(even, odd);
        }
        out
    }
}

/// Block `b` of N rows, whose columns are a multiple of 32.
#[inline(always)]
fn float_blocks<'a, const N: usize>(
    input: Input<'a>,
    row: usize,
    b: usize,
) -> [&'a [f32; BLOCK]; N] {
    let mut out = [&[0.0; BLOCK]; N];
    for (n, block) in out.iter_mut().enumerate() {
        *block = &input.floats(row + n).as_chunks::<BLOCK>().0[b];
    }
    out
}

/// Nibble tiles with f32 activations.
#[derive(Clone, Copy)]
pub(crate) struct NibblesFloat<S>(PhantomData<S>);

impl<S: ScaleFamily> Format for NibblesFloat<S> {
    const WIDEST: usize = 4;

    #[inline(always)]
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N] {
        let scales = S::Of::of(group);
        let mut sums = FloatSums([[lanes.splat(0.0); 2]; N]);
        let zero = lanes.splat(if S::Of::MINIMA { 0.0 } else { 8.0 });
        for b in group.blocks() {
            let tile = group.weights::<256>(b);
            let x = float_blocks::<N>(input, row, b);
            let scale = scales.scale(lanes, b, 0);
            let minimum =
                if S::Of::MINIMA { scales.minimum(lanes, b, 0) } else { lanes.splat(0.0) };
            for (j, &q) in lanes.nibbles(tile).iter().enumerate() {
                let mut w = lanes.unpack_bytes(q);
                for w in &mut w {
                    *w = if S::Of::MINIMA {
                        lanes.fma(*w, scale, minimum)
                    } else {
                        lanes.mul(lanes.sub(*w, zero), scale)
                    };
                }
                sums.add(lanes, w, &x, j);
            }
        }
        sums.finish(lanes)
    }
}

/// Tiles of codes `C` with f32 activations.
#[derive(Clone, Copy)]
pub(crate) struct CodesFloat<C, S>(PhantomData<(C, S)>);

impl<C: Codes, S: ScaleFamily> Format for CodesFloat<C, S> {
    const WIDEST: usize = 4;

    #[inline(always)]
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N] {
        let scales = S::Of::of(group);
        let mut sums = FloatSums([[lanes.splat(0.0); 2]; N]);
        let bias = lanes.splat(128.0);
        for b in group.blocks() {
            let x = float_blocks::<N>(input, row, b);
            let last = S::Of::PER_BLOCK - 1;
            let scale = [scales.scale(lanes, b, 0), scales.scale(lanes, b, last)];
            let minimum = if S::Of::MINIMA {
                [scales.minimum(lanes, b, 0), scales.minimum(lanes, b, last)]
            } else {
                [lanes.splat(0.0); 2]
            };
            for (j, &q) in C::bytes(lanes, group, b).iter().enumerate() {
                let half = j / 4;
                let mut w = lanes.unpack_bytes(q);
                for w in &mut w {
                    let q = lanes.sub(*w, bias);
                    *w = if S::Of::MINIMA {
                        lanes.fma(q, scale[half], minimum[half])
                    } else {
                        lanes.mul(q, scale[half])
                    };
                }
                sums.add(lanes, w, &x, j);
            }
        }
        sums.finish(lanes)
    }
}

/// An element of a float tile.
pub(crate) trait Element: Copy + Send + Sync {
    /// Bytes of one k, sixteen rows.
    const LANE_BYTES: usize;
    /// Sixteen rows at one k.
    fn load<L: Lanes>(lanes: L, bytes: &[u8]) -> L::V;
}

/// f32 tiles.
#[derive(Clone, Copy)]
pub(crate) struct SingleElement;
/// f16 tiles.
#[derive(Clone, Copy)]
pub(crate) struct HalfElement;
/// bfloat16 tiles.
#[derive(Clone, Copy)]
pub(crate) struct BrainElement;
/// Tiles of signed bytes, without their scales.
#[derive(Clone, Copy)]
pub(crate) struct ByteElement;

impl Element for SingleElement {
    const LANE_BYTES: usize = 64;
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8]) -> L::V {
        lanes.load_f32(&bytes.as_chunks::<64>().0[0])
    }
}

impl Element for ByteElement {
    const LANE_BYTES: usize = 16;
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8]) -> L::V {
        lanes.load_i8(&bytes.as_chunks::<16>().0[0])
    }
}

impl Element for HalfElement {
    const LANE_BYTES: usize = 32;
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8]) -> L::V {
        lanes.load_f16(&bytes.as_chunks::<32>().0[0])
    }
}

impl Element for BrainElement {
    const LANE_BYTES: usize = 32;
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, bytes: &[u8]) -> L::V {
        lanes.load_bf16(&bytes.as_chunks::<32>().0[0])
    }
}

/// Float tiles; the columns need not be a multiple of 32.
#[derive(Clone, Copy)]
pub(crate) struct Floats<E>(PhantomData<E>);

impl<E: Element> Format for Floats<E> {
    const WIDEST: usize = 4;

    #[inline(always)]
    fn accumulate<L: Lanes, const N: usize>(
        lanes: L,
        group: Group<'_>,
        input: Input<'_>,
        row: usize,
    ) -> [L::V; N] {
        let mut sums = FloatSums([[lanes.splat(0.0); 2]; N]);
        let weights = &group.bytes[group.layout.weights..];
        let block_bytes = E::LANE_BYTES * BLOCK;
        let (n_whole, tail) = (input.columns / BLOCK, input.columns % BLOCK);
        for b in 0..n_whole {
            let x = float_blocks::<N>(input, row, b);
            let tile = &weights[b * block_bytes..(b + 1) * block_bytes];
            float_block::<E, L, N>(lanes, tile, &x, &mut sums);
        }
        if tail > 0 {
            // The tile is padded with zero weights, the activations here.
            let mut padded = [[0.0; BLOCK]; N];
            for (n, padded) in padded.iter_mut().enumerate() {
                padded[..tail].copy_from_slice(&input.floats(row + n)[n_whole * BLOCK..]);
            }
            let mut x = [&[0.0; BLOCK]; N];
            for (x, padded) in x.iter_mut().zip(&padded) {
                *x = padded;
            }
            float_block::<E, L, N>(lanes, &weights[n_whole * block_bytes..], &x, &mut sums);
        }
        sums.finish(lanes)
    }
}

#[inline(always)]
fn float_block<E: Element, L: Lanes, const N: usize>(
    lanes: L,
    tile: &[u8],
    x: &[&[f32; BLOCK]; N],
    sums: &mut FloatSums<L::V, N>,
) {
    for (j, four) in tile.chunks_exact(4 * E::LANE_BYTES).take(BLOCK / 4).enumerate() {
        let mut w = [lanes.splat(0.0); 4];
        for (w, bytes) in w.iter_mut().zip(four.chunks_exact(E::LANE_BYTES)) {
            *w = E::load(lanes, bytes);
        }
        sums.add(lanes, w, x, j);
    }
}
