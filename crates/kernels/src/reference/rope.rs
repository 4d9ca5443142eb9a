//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

use crate::{Rope, RopeStyle};

/// See [`crate::Backend::rope`]. The angle is the f64 product of the position and the f32 inverse
/// frequency.
pub(super) fn rope(x: &mut [f32], n_heads: usize, head_dim: usize, positions: &[u32], rope: &Rope) {
    for (t, &position) in positions.iter().enumerate() {
        for h in 0..n_heads {
            let start = (t * n_heads + h) * head_dim;
            let head = &mut x[start..start + head_dim];
            turn(head, f64::from(position), rope, f64::from(rope.magnitude));
        }
    }
}

/// Turns one head by so many positions, and lengthens it by `magnitude`.
pub(super) fn turn(head: &mut [f32], positions: f64, rope: &Rope, magnitude: f64) {
    let (n_pairs, head_dim) = (rope.inverse_frequencies.len(), head.len());
    assert!(2 * n_pairs <= head_dim, "{n_pairs} pairs do not fit a head of {head_dim}");
    for (i, &inverse_frequency) in rope.inverse_frequencies.iter().enumerate() {
        let (sin, cos) = (positions * f64::from(inverse_frequency)).sin_cos();
        let (sin, cos) = (magnitude * sin, magnitude * cos);
        let (first, second) = match rope.style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + n_pairs),
        };
        let (a, b) = (f64::from(head[first]), f64::from(head[second]));
        head[first] = (a * cos - b * sin) as f32;
        head[second] = (a * sin + b * cos) as f32;
    }
}
