//! Operations on whole rows: norms, rotation, sums.

use crate::lanes::{Kernel, Lanes};
use crate::linear::{load_part, store_part};
use crate::math;
use exrail_kernels::{NormKind, Rope, RopeStyle};

/// What a norm subtracts from the values of a row and then multiplies them with.
#[inline(always)]
fn centre_and_factor<L: Lanes>(lanes: L, kind: NormKind, row: &[f32], eps: f32) -> [L::V; 2] {
    let width = row.len() as f32;
    let mean = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => {
            let mut total = lanes.splat(0.0);
            for x in row.chunks(16) {
                total = lanes.add(total, load_part(lanes, x));
            }
            lanes.sum(total) / width
        }
    };
    let centre = lanes.splat(mean);
    let mut squares = lanes.splat(0.0);
    let (whole, tail) = row.as_chunks::<16>();
    for x in whole {
        let x = lanes.sub(lanes.load(x), centre);
        squares = lanes.fma(x, x, squares);
    }
    if !tail.is_empty() {
        // The padding must be the mean, so that it adds nothing.
        let mut padded = [mean; 16];
        padded[..tail.len()].copy_from_slice(tail);
        let x = lanes.sub(lanes.load(&padded), centre);
        squares = lanes.fma(x, x, squares);
    }
    let variance = lanes.sum(squares) / width;
    [centre, lanes.splat(1.0 / (variance + eps).sqrt())]
}

/// `(x - centre) * factor`.
#[inline(always)]
fn normal<L: Lanes>(lanes: L, x: &[f32], [centre, factor]: [L::V; 2]) -> L::V {
    lanes.mul(lanes.sub(load_part(lanes, x), centre), factor)
}

/// `out = norm(x)`, or `out += norm(x)`, row by row.
pub(crate) struct Norm<'a> {
    pub(crate) kind: NormKind,
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) adds: bool,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let row = centre_and_factor(lanes, self.kind, x, self.eps);
            let parts = x.chunks(16).zip(self.weight.chunks(16)).zip(out.chunks_mut(16));
            for ((x, w), out) in parts {
                let (normal, w) = (normal(lanes, x, row), load_part(lanes, w));
                let value = if self.adds {
                    lanes.fma(normal, w, load_part(lanes, out))
                } else {
                    lanes.mul(normal, w)
                };
                store_part(lanes, value, out);
            }
        }
    }
}

/// `x = norm(x)`, and with a bias `x = norm(x) + bias`, row by row.
pub(crate) struct NormInPlace<'a> {
    pub(crate) kind: NormKind,
    pub(crate) x: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) eps: f32,
}

impl Kernel for NormInPlace<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for x in self.x.chunks_exact_mut(self.weight.len()) {
            let row = centre_and_factor(lanes, self.kind, x, self.eps);
            for (i, (x, w)) in x.chunks_mut(16).zip(self.weight.chunks(16)).enumerate() {
                let (normal, w) = (normal(lanes, x, row), load_part(lanes, w));
                let value = match self.bias {
                    Some(bias) => {
                        let bias = &bias[16 * i..][..x.len()];
                        lanes.fma(normal, w, load_part(lanes, bias))
                    }
                    None => lanes.mul(normal, w),
                };
                store_part(lanes, value, x);
            }
        }
    }
}

/// `x = scale * x`, then with a cap `cap * tanh(x / cap)`.
pub(crate) struct ScaleAndCap<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) scale: f32,
    pub(crate) soft_cap: Option<f32>,
}

impl Kernel for ScaleAndCap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for x in self.x.chunks_mut(16) {
            let scaled = lanes.mul(load_part(lanes, x), lanes.splat(self.scale));
            let value = match self.soft_cap {
                Some(cap) => math::soft_cap(lanes, scaled, cap),
                None => scaled,
            };
            store_part(lanes, value, x);
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

/// Sines and cosines of one rotation, kept because most layers turn by the same angles.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    positions: Vec<u32>,
    inverse_frequencies: Vec<f32>,
    magnitude: f32,
    /// `(T, pairs)`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Fills the table unless it already holds these angles. Angles are f64: at position 100,000 an
    /// f32 angle is off by 0.004.
    pub(crate) fn fill(&mut self, positions: &[u32], rope: &Rope) {
        if self.holds(positions, rope) {
            return;
        }
        self.magnitude = rope.magnitude;
        self.positions = positions.to_vec();
        self.inverse_frequencies.clone_from(&rope.inverse_frequencies);
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &inverse_frequency in &rope.inverse_frequencies {
                let (sin, cos) = (f64::from(position) * f64::from(inverse_frequency)).sin_cos();
                self.cos.push((f64::from(rope.magnitude) * cos) as f32);
                self.sin.push((f64::from(rope.magnitude) * sin) as f32);
            }
        }
    }

    /// Whether it was filled for these positions and this rotation.
    pub(crate) fn holds(&self, positions: &[u32], rope: &Rope) -> bool {
        self.positions == positions
            && self.inverse_frequencies == rope.inverse_frequencies
            && self.magnitude.to_bits() == rope.magnitude.to_bits()
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
