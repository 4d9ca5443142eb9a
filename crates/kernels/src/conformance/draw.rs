//! Draws. They have no bound: sums are of integers, so that a device draws the very token that
//! [`crate::Draw::of`] does.

use super::random::Random;
use super::{ConformanceError, Suite};
use crate::{Backend, Draw, Draws};

/// Values that may be drawn, those of a row, and how often all draws are tried: around the width of a warp,
/// odd, and two vocabularies.
const SIZES: [(usize, usize, usize); 9] = [
    (1, 1, 2),
    (1, 3, 2),
    (31, 31, 20),
    (32, 40, 20),
    (33, 33, 20),
    (1000, 1003, 12),
    (1025, 1025, 8),
    (49_152, 49_152, 1),
    (128_256, 128_301, 1),
];

/// Temperature, top-k, top-p and min-p: each filter alone, all together, and the extremes.
const OPTIONS: [(f32, u32, f32, f32); 20] = [
    (1.0, 0, 1.0, 0.0),
    (0.8, 0, 0.95, 0.0),
    (1.3, 0, 0.95, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.0, 0, 0.1, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 0.999_999, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 2, 1.0, 0.0),
    (1.0, 30, 1.0, 0.0),
    (5.0, 999, 1.0, 0.0),
    (1.0, u32::MAX, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 40, 0.9, 0.02),
    (5.0, 700, 0.6, 0.5),
    (5.0, 0, 1.0, 0.0),
    (0.01, 0, 0.9, 0.0),
    (1e-30, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.1),
];

impl<B: Backend> Suite<'_, B> {
    /// Every option on rows of every kind.
    pub(super) fn draws(&mut self) -> Result<(), ConformanceError> {
        for (limit, width, n_rounds) in SIZES {
            for round in 0..n_rounds {
                self.draw(limit, width, round)?;
            }
        }
        Ok(())
    }

    fn draw(&mut self, limit: usize, width: usize, round: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("draw {limit} of {width} round={round}");
        let rows: Vec<Draw> = (0..).zip(OPTIONS).map(|(t, _)| self.random.draw(t)).collect();
        // What is behind the limit is padding of a matrix, and no number matters there.
        let mut values = vec![f32::NAN; rows.len() * width];
        for (t, row) in values.chunks_exact_mut(width).enumerate() {
            // Options and kinds of rows have no common factor, so that they meet in other pairs each round.
            self.random.logits(&mut row[..limit], t + 7 * round);
        }
        let draws = Draws { limit, rows: &rows };
        let expected = draws.of_rows(&values, width);
        let mut x = self.upload(&case, &values)?;
        // A step without logit rows asks for no token.
        let none = self.backend.largest(&x, 0, width, limit);
        self.check_found(&case, &self.backend.found(&none), &[])?;
        let found = self.backend.draw(&mut x, width, draws);
        self.check_found(&case, &self.backend.found(&found), &expected)
    }
}

impl Random {
    /// A draw with the options of row `t`, by any number, the least or the most.
    pub(super) fn draw(&mut self, t: usize) -> Draw {
        let (temperature, top_k, top_p, min_p) = OPTIONS[t % OPTIONS.len()];
        let numerator = match self.below(8) {
            0 => 0,
            1 => (1 << 53) - 1,
            2.. => self.next() >> 11,
        };
        Draw { temperature, top_k, top_p, min_p, numerator }
    }

    /// Logits of one kind of ten: flat, peaked, with ties, far apart, no numbers.
    fn logits(&mut self, row: &mut [f32], kind: usize) {
        let scale = [1.0, 3.0, 10.0, 1.0, 2.0, 0.0, 0.01, 1e30, 4.0, 4.0][kind % 10];
        row.iter_mut().for_each(|x| *x = scale * self.normal());
        let at = self.below(row.len());
        match kind % 10 {
            3 => row.iter_mut().for_each(|x| *x = x.round()),
            4 => row.iter_mut().for_each(|x| *x = (x.round()).min(3.0)),
            8 => row[at] = 60.0,
            9 if kind.is_multiple_of(4) => row[at] = f32::NAN,
            9 => row[at] = [f32::INFINITY, f32::NEG_INFINITY][kind % 2],
            0 | 1 | 2 | 5 | 6 | 7 | 10.. => {}
        }
    }
}
