//! Operations on whole rows: norms, rotation, sums.

use crate::lanes::{Kernel, Lanes};
use crate::linear::{load_part, store_part};
use exrail_kernels::{Rope, RopeStyle};

/// `out = x / sqrt(mean(x²) + eps) * weight`, row by row.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mut squares = lanes.splat(0.0);
            for x in x.chunks(16) {
                let x = load_part(lanes, x);
                squares = lanes.fma(x, x, squares);
            }
            let mean = lanes.sum(squares) / width as f32;
            let factor = lanes.splat(1.0 / (mean + self.eps).sqrt());
            let parts = x.chunks(16).zip(self.weight.chunks(16)).zip(out.chunks_mut(16));
            for ((x, w), out) in parts {
                let scaled = lanes.mul(load_part(lanes, x), factor);
                store_part(lanes, lanes.mul(scaled, load_part(lanes, w)), out);
            }
        }
    }
}

/// `x = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row.
pub(crate) struct LayerNorm<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for LayerNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let width = self.weight.len();
        for row in self.x.chunks_exact_mut(width) {
            let mut total = lanes.splat(0.0);
            for x in row.chunks(16) {
                total = lanes.add(total, load_part(lanes, x));
            }
            let mean = lanes.sum(total) / width as f32;
            let centre = lanes.splat(mean);
            let mut squares = lanes.splat(0.0);
            let (whole, tail) = row.as_chunks::<16>();
            for x in whole {
                let x = lanes.sub(lanes.load(x), centre);
                squares = lanes.fma(x, x, squares);
            }
            let mut variance = lanes.sum(squares);
            for &x in tail {
                variance += (x - mean) * (x - mean);
            }
            let factor = lanes.splat(1.0 / (variance / width as f32 + self.eps).sqrt());
            let parts = row.chunks_mut(16).zip(self.weight.chunks(16)).zip(self.bias.chunks(16));
            for ((x, w), b) in parts {
                let normal = lanes.mul(lanes.sub(load_part(lanes, x), centre), factor);
                let y = lanes.fma(normal, load_part(lanes, w), load_part(lanes, b));
                store_part(lanes, y, x);
            }
        }
    }
}

/// `x += y`.
pub(crate) struct Add<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) y: &'a [f32],
}

impl Kernel for Add<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (x, y) in self.x.chunks_mut(16).zip(self.y.chunks(16)) {
            let sum = lanes.add(load_part(lanes, x), load_part(lanes, y));
            store_part(lanes, sum, x);
        }
    }
}

/// Sines and cosines of the last rotation, because every layer turns by the same angles.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    positions: Vec<u32>,
    inverse_frequencies: Vec<f32>,
    /// `(T, pairs)`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Fills the table unless it already holds these angles. Angles are f64: at position 100,000 an
    /// f32 angle is off by 0.004.
    pub(crate) fn fill(&mut self, positions: &[u32], rope: &Rope) {
        if self.positions == positions && self.inverse_frequencies == rope.inverse_frequencies {
            return;
        }
        self.positions = positions.to_vec();
        self.inverse_frequencies.clone_from(&rope.inverse_frequencies);
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &inverse_frequency in &rope.inverse_frequencies {
                let (sin, cos) = (f64::from(position) * f64::from(inverse_frequency)).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Cosines and sines of row t.
    pub(crate) fn row(&self, t: usize) -> (&[f32], &[f32]) {
        let n = self.inverse_frequencies.len();
        (&self.cos[t * n..(t + 1) * n], &self.sin[t * n..(t + 1) * n])
    }
}

/// Rotates the heads of some rows.
pub(crate) struct Rotate<'a> {
    pub(crate) x: &'a mut [f32],
    /// Row of the table that belongs to the first row of `x`.
    pub(crate) first_row: usize,
    pub(crate) n_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) table: &'a RopeTable,
    pub(crate) style: RopeStyle,
}

impl Kernel for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        for (t, row) in self.x.chunks_exact_mut(self.n_heads * self.head_dim).enumerate() {
            let (cos, sin) = self.table.row(self.first_row + t);
            for head in row.chunks_exact_mut(self.head_dim) {
                match self.style {
                    RopeStyle::Interleaved => {
                        let pairs = head.as_chunks_mut::<2>().0;
                        for ((pair, &cos), &sin) in pairs.iter_mut().zip(cos).zip(sin) {
                            *pair = turn(pair[0], pair[1], cos, sin);
                        }
                    }
                    RopeStyle::Halves => {
                        let (first, second) = head.split_at_mut(cos.len());
                        let pairs = first.iter_mut().zip(second).zip(cos.iter().zip(sin));
                        for ((a, b), (&cos, &sin)) in pairs {
                            [*a, *b] = turn(*a, *b, cos, sin);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn turn(a: f32, b: f32, cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}
