//! The largest output of a head: found while it is computed, and where the high bits of its weights
//! tell rows apart, without the low bits of most rows.
//!
//! A weight of a split Q8_0 is `s (16 h + l - 128)`, h and l of four bits. With the middle of l,
//!
//! ```text
//! w x = s Σ (16 h - 120.5) x  +  s Σ (l - 7.5) x,    |second| <= s 7.5 Σ |x|
//! ```
//!
//! so the high bits of a row give its output up to a bound. Every group of rows gets the most that an
//! output of it can be; the group with the most is computed exactly; then every other group that may
//! reach that. What is compared in the end are the outputs of [`crate::linear`], bit for bit.
//!
//! How many groups are left depends on the model: of gemma-3-270m, whose logits lie far apart, 2 of
//! 100 at the most of a measured answer; of SmolLM2-135M, whose logits lie within the bound of each other, all. So the high bits are
//! tried now and then, and used while they help.

use crate::activation::QuantBlock;
use crate::lanes::{Kernel, Lanes};
use crate::linear::{Engine, Sums};
use crate::processor::Processor;
use crate::product::{HalfScales, Input, Scales, prefetch};
use crate::tile::{Group, ROWS};
use crate::weight::CpuWeight;
use exrail_kernels::{Activation, Largest};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Groups of a chunk: 40 to 80 kB of Q8_0 at 576 columns.
const GROUPS: usize = 8;

/// Scales of activations below which products with the scale of a weight may be subnormal, which the
/// bound does not allow for.
const SMALLEST_SCALE: f32 = 1e-25;

/// Whether the high bits of a head told its rows apart when they were tried last.
#[derive(Debug, Default)]
pub(crate) struct Screen {
    /// Products until they are tried again.
    rest: AtomicU32,
}

impl Screen {
    /// Products between two tries that do not help: they cost half a product each.
    const REST: u32 = 64;

    fn is_due(&self) -> bool {
        let rest = self.rest.load(Ordering::Relaxed);
        self.rest.store(rest.saturating_sub(1), Ordering::Relaxed);
        rest == 0
    }

    /// Takes down how many groups were left. Half of their bits were read, so that a third of them
    /// is still a gain.
    fn note(&self, n_left: usize, n_groups: usize) {
        if 3 * n_left > n_groups {
            self.rest.store(Screen::REST, Ordering::Relaxed);
        }
    }
}

/// One block of activations: what [`MostOf`] multiplies the scale of a weight with.
#[derive(Clone, Copy)]
struct Reach {
    /// Of Σ h x.
    high: f32,
    /// -120.5 Σ x.
    middle: f32,
    /// 7.5 Σ |x|, and what rounding may add.
    bound: f32,
}

impl Reach {
    /// `slack` is one plus the relative error that sums of this length may have.
    fn of([first, second]: &[QuantBlock; 2], slack: f32) -> Reach {
        let whole = |(&a, &b): (&i8, &i8)| 256 * i32::from(a) + i32::from(b);
        let size: i32 = first.quants.iter().zip(&second.quants).map(whole).map(i32::abs).sum();
        Reach {
            high: 16.0 * first.scale,
            middle: -120.5 * first.scaled_sum,
            bound: 7.5 * slack * first.scale * size as f32,
        }
    }
}

/// The most that an output of a group can be.
struct MostOf<'a> {
    group: Group<'a>,
    blocks: &'a [[QuantBlock; 2]],
    reach: &'a [Reach],
}

impl Kernel for MostOf<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> f32 {
        let MostOf { group, blocks, reach } = self;
        let scales = HalfScales::<false>::of(group);
        let (mut near, mut bound) = (lanes.splat(0.0), lanes.splat(0.0));
        for b in group.blocks() {
            let tile = group.weights::<256>(b);
            for line in 0..5 {
                prefetch::<L, 1>(lanes, tile, line);
            }
            let h = lanes.nibbles(tile);
            let (x, reach) = (&blocks[b], &reach[b]);
            let [first] = lanes.dot_nibbles(&h, [&x[0].quants], [lanes.splat_i(0)]);
            let [dot] = lanes.dot_nibbles(&h, [&x[1].quants], [lanes.times_256(first)]);
            let dot = lanes.to_f32(dot);
            let scale = scales.scale(lanes, b, 0);
            let value = lanes.fma(dot, lanes.splat(reach.high), lanes.splat(reach.middle));
            near = lanes.fma(value, scale, near);
            bound = lanes.fma(lanes.abs(scale), lanes.splat(reach.bound), bound);
        }
        // A NaN is not less, and what has left the range of f32 is no bound: neither is overlooked.
        let (most, all) = (lanes.add(near, bound), lanes.splat(f32::INFINITY));
        lanes.maximum(lanes.select_less(lanes.abs(most), all, most, all))
    }
}

/// The exact outputs of groups.
struct Exact<'a> {
    processor: Processor,
    activation: Activation,
    input: Input<'a>,
    weight: &'a CpuWeight,
    limit: usize,
}

impl Exact<'_> {
    /// The largest of a group's outputs below the limit.
    fn group(&self, group: usize) -> Largest {
        let mut out = [[0.0; ROWS]];
        let sums =
            Sums { group: self.weight.group(group), input: self.input, row: 0, sums: &mut out };
        sums.run(self.weight.dtype(), self.activation, self.processor);
        let first = group * ROWS;
        let largest = Largest::of(&out[0][..ROWS.min(self.limit - first)]);
        Largest { index: largest.index + first as u32, ..largest }
    }
}

impl Engine<'_> {
    /// The largest of the first `limit` outputs of `x Wᵀ`, x `(columns)`.
    pub(crate) fn largest(&mut self, x: &[f32], weight: &CpuWeight, limit: usize) -> Largest {
        let (columns, rounding) = (weight.columns(), weight.rounding());
        let x = &x[..columns];
        let wants_integers = self.is_integer(weight);
        let (processor, activation) = (self.processor, self.activation);
        let n_blocks = self.quantise(x, columns, rounding, wants_integers);
        let input = self.input(x, columns, rounding, n_blocks);
        let exact = Exact { processor, activation, input, weight, limit };
        let n_groups = limit.div_ceil(ROWS);
        let is_large = |block: &QuantBlock| block.scale > SMALLEST_SCALE;
        let can_tell = weight.is_split() && input.quantised.iter().any(is_large);
        if can_tell && weight.screen().is_due() {
            return self.largest_by_high_bits(&exact, n_groups);
        }
        let all: Vec<usize> = (0..n_groups).collect();
        self.largest_of(&exact, &all)
    }

    fn largest_by_high_bits(&self, exact: &Exact<'_>, n_groups: usize) -> Largest {
        let blocks = exact.input.quantised.as_chunks::<2>().0;
        // Both sums are of this many terms, each at most 66 times the bound, and rounded twice.
        let slack = 1.0 + (blocks.len() + 4) as f32 / 65536.0;
        let reach: Vec<Reach> = blocks.iter().map(|block| Reach::of(block, slack)).collect();
        let mut most = vec![0.0; n_groups];
        self.pool.run_chunks(&mut most, GROUPS, &|chunk, most| {
            for (i, most) in most.iter_mut().enumerate() {
                let group = exact.weight.group(chunk * GROUPS + i);
                *most = self.processor.run(MostOf { group, blocks, reach: &reach });
            }
        });
        // An infinite one is no fault here.
        let by_most = |&a: &usize, &b: &usize| f32::total_cmp(&most[a], &most[b]);
        let best = (0..n_groups).max_by(by_most).unwrap_or(0);
        let start = exact.group(best);
        // If `start` is no number, then the answer is none either.
        let may_reach = |&group: &usize| group != best && most[group] >= start.value;
        let left: Vec<usize> = (0..n_groups).filter(may_reach).collect();
        exact.weight.screen().note(left.len(), n_groups);
        if left.is_empty() { start } else { start.or(self.largest_of(exact, &left)) }
    }

    /// The largest output of some groups, which are not none.
    fn largest_of(&self, exact: &Exact<'_>, groups: &[usize]) -> Largest {
        let found = Mutex::new(None);
        self.pool.run_several(groups.len(), GROUPS, &|chunk| {
            let each = groups[chunk].iter().map(|&group| exact.group(group));
            let largest = each.reduce(Largest::or).expect("no chunk is empty");
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            *found = Some(found.map_or(largest, |found: Largest| found.or(largest)));
        });
        found.into_inner().unwrap_or_else(PoisonError::into_inner).expect("a head has rows")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuBackend, CpuOptions};
    use exrail_kernels::{Backend, InputRounding, WeightView};
    use exrail_tensor::DType;

    /// The first row has 24 in twelve columns, high bits that stand for more than it is; the last
    /// one has 15 in all, high bits that stand for half of it.
    #[test]
    fn without_the_bound_the_largest_output_would_be_missed() {
        let row = |q: [i8; 32]| {
            let scale = half::f16::ONE.to_le_bytes();
            scale.into_iter().chain(q.map(i8::cast_unsigned))
        };
        let first = std::array::from_fn(|k| if k < 12 { 24 } else { 0 });
        let between = std::iter::repeat_n([-128; 32], ROWS - 1);
        let rows = std::iter::once(first).chain(between).chain([[15; 32]]);
        let bytes: Vec<u8> = rows.flat_map(row).collect();
        let options = CpuOptions { threads: Some(1), split_heads_from: 0, ..CpuOptions::default() };
        let backend = CpuBackend::new(options).expect("an instruction set");
        let (rows, columns, rounding) = (ROWS + 1, 32, InputRounding::Twice);
        let name = "head";
        let dtype = DType::Q8_0;
        let view = WeightView { name, dtype, rows, columns, bytes: &bytes, rounding, head: true };
        let weight = backend.weight(&view).expect("a head");
        let (processor, pool) = backend.parts();
        let mut quantised = Vec::new();
        let activation = Activation::Int8;
        let mut engine = Engine { processor, pool, activation, quantised: &mut quantised };
        let found = engine.largest(&[1.0; 32], &weight, rows);
        assert_eq!((found.index, found.value.round()), (16, 480.0));

        let blocks = quantised.as_chunks::<2>().0;
        let reach = Reach::of(&blocks[0], 1.0);
        let most = |bound: f32| {
            [0, 1].map(|group| {
                let reach = &[Reach { bound, ..reach }];
                processor.run(MostOf { group: weight.group(group), blocks, reach })
            })
        };
        let (exact_first, exact_last) = (288.0, 480.0);
        let [_, last] = most(reach.bound);
        assert!(last >= exact_last, "{last}");
        let [first, last] = most(0.0);
        assert!(first > last && last < exact_first, "{first} {last}");
    }

    #[test]
    fn high_bits_that_do_not_help_rest_for_a_while() {
        let screen = Screen::default();
        assert!(screen.is_due() && screen.is_due());
        screen.note(33, 100);
        assert!(screen.is_due());
        screen.note(34, 100);
        let tries = (0..=Screen::REST).filter(|_| screen.is_due()).count();
        assert_eq!(tries, 1);
    }
}
