//! The entropy that one route's answers usually have (G-19).

use std::sync::{Mutex, PoisonError};

/// Answers that make a baseline.
const ANSWERS: u32 = 32;

/// The mean over the first answers that ended by themselves. Then it stands: a model that degrades slowly
/// must not take its baseline along.
#[derive(Debug, Default)]
pub(crate) struct EntropyBaseline(Mutex<Sum>);

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    nats: f64,
    n: u32,
}

impl EntropyBaseline {
    /// Takes the mean entropy of an answer, in nats.
    pub(crate) fn note(&self, nats: f64) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sum.n < ANSWERS && nats.is_finite() {
            *sum = Sum { nats: sum.nats + nats, n: sum.n + 1 };
        }
    }

    /// The baseline, once there are answers enough.
    pub(crate) fn nats(&self) -> Option<f32> {
        let sum = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::cast_possible_truncation, reason = "entropies are reported in f32")]
        let mean = (sum.nats / f64::from(sum.n.max(1))) as f32;
        (sum.n == ANSWERS).then_some(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_mean_of_the_first_answers_and_stands_then() {
        let baseline = EntropyBaseline::default();
        for n in 0..ANSWERS {
            assert_eq!(baseline.nats(), None);
            baseline.note(if n % 2 == 0 { 1.0 } else { 2.0 });
        }
        assert_eq!(baseline.nats(), Some(1.5));
        baseline.note(100.0);
        assert_eq!(baseline.nats(), Some(1.5));
    }
}
