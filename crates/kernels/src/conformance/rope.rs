//! Rotary embedding.
//!
//! **Bound.** An angle taken as an f32 product errs by |angle| · u/2, sine and cosine by 2 u more;
//! the rotation of (a, b) multiplies that by at most |a| + |b| and adds two roundings.

use super::{ConformanceError, ROW_COUNTS, Suite, U};
use crate::reference::Reference;
use crate::{Backend, Rope, RopeStyle};

impl<B: Backend> Suite<'_, B> {
    /// Both styles, whole and partial heads, positions up to 8191.
    pub(super) fn rope(&mut self) -> Result<(), ConformanceError> {
        for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
            for (n_heads, head_dim, n_pairs) in [(1, 2, 1), (3, 64, 32), (2, 20, 10), (5, 40, 9)] {
                for n_rows in ROW_COUNTS {
                    self.rope_case(style, (n_heads, head_dim, n_pairs), n_rows)?;
                }
            }
        }
        Ok(())
    }

    fn rope_case(
        &mut self,
        style: RopeStyle,
        (n_heads, head_dim, n_pairs): (usize, usize, usize),
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("rope {style:?} H={n_heads} D={head_dim} pairs={n_pairs} T={n_rows}");
        let inverse_frequencies =
            (0..n_pairs).map(|i| 1e5f32.powf(-(i as f32) / n_pairs as f32)).collect();
        let rope = Rope { inverse_frequencies, style };
        let positions: Vec<u32> = (0..n_rows).map(|_| self.random.below(8192) as u32).collect();
        let x = self.random.normals(n_rows * n_heads * head_dim, 0.0, 1.0);
        let mut tested = self.upload(&case, &x)?;
        self.backend.rope(&mut tested, n_heads, head_dim, &positions, &rope);
        let mut expected = x.clone();
        Reference.rope(&mut expected, n_heads, head_dim, &positions, &rope);
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
            (angle + 4.0) * U * reach
        })
    }
}
