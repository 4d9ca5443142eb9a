//! Rotary embedding.
//!
//! **Bound.** An angle taken as an f32 product errs by |angle| · u/2, sine and cosine by 2 u more
//! and u again behind the magnitude; the rotation of (a, b) multiplies that by at most |a| + |b|
//! and the magnitude, and adds two roundings.

use super::{ConformanceError, ROW_COUNTS, Suite, U};
use crate::reference::Reference;
use crate::{Backend, Rope, RopeStyle};

/// H, D, pairs: whole heads and partial ones.
const HEADS: [(usize, usize, usize); 5] =
    [(1, 2, 1), (3, 64, 32), (2, 20, 10), (5, 40, 9), (2, 80, 10)];

impl<B: Backend> Suite<'_, B> {
    /// Both styles, whole and partial heads, magnitudes, positions up to 8191.
    pub(super) fn rope(&mut self) -> Result<(), ConformanceError> {
        for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
            for (n_heads, head_dim, n_pairs) in HEADS {
                for n_rows in ROW_COUNTS {
                    self.next_case();
                    let positions = self.positions(n_rows);
                    for magnitude in [1.0, 1.190_238] {
                        let rope = rope(style, n_pairs, 1e5, magnitude);
                        self.rope_case(&rope, (n_heads, head_dim), &positions)?;
                    }
                }
            }
        }
        self.rotations_in_turns()
    }

    fn positions(&mut self, n_rows: usize) -> Vec<u32> {
        (0..n_rows).map(|_| self.random.below(8192) as u32).collect()
    }

    /// Rotations that differ in one thing each, at the same positions, one after the other and
    /// again: a backend that keeps sines and cosines must tell them apart.
    fn rotations_in_turns(&mut self) -> Result<(), ConformanceError> {
        self.next_case();
        let first = rope(RopeStyle::Halves, 8, 1e4, 1.0);
        let ropes = [
            rope(RopeStyle::Halves, 8, 1e6, 1.0),
            rope(RopeStyle::Halves, 8, 1e4, 1.5),
            rope(RopeStyle::Interleaved, 8, 1e4, 1.0),
            rope(RopeStyle::Halves, 7, 1e4, 1.0),
        ];
        let positions = self.positions(5);
        let mut moved = positions.clone();
        moved[4] += 1;
        for other in &ropes {
            for rope in [&first, other, &first, other, other, &first] {
                self.rope_case(rope, (2, 16), &positions)?;
            }
            self.rope_case(&first, (2, 16), &moved)?;
        }
        Ok(())
    }

    fn rope_case(
        &mut self,
        rope: &Rope,
        (n_heads, head_dim): (usize, usize),
        positions: &[u32],
    ) -> Result<(), ConformanceError> {
        let Rope { style, magnitude, .. } = *rope;
        let (n_rows, n_pairs) = (positions.len(), rope.inverse_frequencies.len());
        let case = format!(
            "rope {style:?} H={n_heads} D={head_dim} pairs={n_pairs} magnitude={magnitude} T={n_rows}"
        );
        let x = self.random.normals(n_rows * n_heads * head_dim, 0.0, 1.0);
        let mut tested = self.upload(&case, &x)?;
        self.backend.rope(&mut tested, n_heads, head_dim, positions, rope);
        let mut expected = x.clone();
        Reference.rope(&mut expected, n_heads, head_dim, positions, rope);
        self.check(&case, &tested, &expected, |i| {
            let within = i % head_dim;
            if within >= 2 * n_pairs {
                return 0.0;
            }
            let (pair, partner) = match style {
                RopeStyle::Interleaved => (within / 2, within ^ 1),
                RopeStyle::Halves => (within % n_pairs, (within + n_pairs) % (2 * n_pairs)),
            };
            let position = f64::from(positions[i / (n_heads * head_dim)]);
            let angle = position * f64::from(rope.inverse_frequencies[pair]);
            let reach = f64::from(x[i].abs()) + f64::from(x[i - within + partner].abs());
            (angle + 5.0) * U * reach * f64::from(magnitude)
        })
    }
}

/// Frequencies `base^(-i / pairs)`.
pub(super) fn rope(style: RopeStyle, n_pairs: usize, base: f32, magnitude: f32) -> Rope {
    let inverse_frequencies =
        (0..n_pairs).map(|i| base.powf(-(i as f32) / n_pairs as f32)).collect();
    Rope { inverse_frequencies, style, magnitude }
}
