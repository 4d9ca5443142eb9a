//! Reading the raw logits of one position: finiteness, log-sum, entropy, most likely tokens.

use std::cmp::Ordering;

use exrail_kernels::{all_finite, exp_nonpositive, maximum};

/// Elements summed in f32 before the partial sum moves to f64.
const BLOCK: usize = 256;
const LANES: usize = 16;

/// What one pass over the logits gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// Largest logit.
    pub(crate) max: f32,
    /// ln Σ e^(x - max).
    pub(crate) log_sum: f32,
    /// −Σ p ln p in nats, p = softmax of the logits.
    pub(crate) entropy: f32,
}

impl Summary {
    /// Reads the logits; `None` if any is NaN or infinite.
    ///
    /// With w = e^(x - max), z = Σ w and s = Σ w (x - max): entropy = ln z − s / z.
    #[must_use]
    pub(crate) fn of(logits: &[f32]) -> Option<Summary> {
        if logits.is_empty() || !all_finite(logits) {
            return None;
        }
        let max = maximum(logits);
        let (mut z, mut s) = (0.0_f64, 0.0_f64);
        for block in logits.chunks(BLOCK) {
            let (block_z, block_s) = block_sums(block, max);
            z += f64::from(block_z);
            s += f64::from(block_s);
        }
        #[expect(clippy::cast_possible_truncation, reason = "results are reported in f32")]
        Some(Summary { max, log_sum: z.ln() as f32, entropy: (z.ln() - s / z).max(0.0) as f32 })
    }

    /// Natural logarithm of the probability of a token with logit `x`.
    #[must_use]
    pub(crate) fn logprob(&self, x: f32) -> f32 {
        x - self.max - self.log_sum
    }
}

/// The `n` largest values with their indexes, largest first, lower index first on a tie.
#[must_use]
pub(crate) fn largest(values: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (id, &x) in (0_u32..).zip(values) {
        if top.len() == n && top.last().is_none_or(|last| x <= last.1) {
            continue;
        }
        let at = top.partition_point(|entry| entry.1.total_cmp(&x) != Ordering::Less);
        top.insert(at, (id, x));
        top.truncate(n);
    }
    top
}

/// `(Σ w, Σ w (x - max))` over at most [`BLOCK`] values, in lanes so that it vectorises.
fn block_sums(block: &[f32], max: f32) -> (f32, f32) {
    let (mut z, mut s) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (chunks, tail) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let d = chunk[lane] - max;
            let w = exp_nonpositive(d);
            z[lane] += w;
            s[lane] += w * d.max(-87.0);
        }
    }
    for (lane, &x) in tail.iter().enumerate() {
        let d = x - max;
        let w = exp_nonpositive(d);
        z[lane] += w;
        s[lane] += w * d.max(-87.0);
    }
    (z.iter().sum(), s.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniform;

    #[expect(clippy::cast_possible_truncation, reason = "test data")]
    fn noise(n: u32, spread: f64) -> Vec<f32> {
        (0..n).map(|i| ((uniform(3, 0, u64::from(i)) - 0.5) * spread) as f32).collect()
    }

    #[test]
    fn summary_agrees_with_the_definition_in_f64() {
        for (n, spread) in [(1, 1.0), (17, 3.0), (1000, 20.0), (49_152, 30.0)] {
            let logits = noise(n, spread);
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let w: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
            let z: f64 = w.iter().sum();
            let entropy: f64 = w.iter().map(|w| -(w / z) * (w / z).ln()).sum();
            let summary = Summary::of(&logits).unwrap();
            // f32 block sums of 16 terms a lane and an exponential within 2e-7: relative 2e-6 on z,
            // so absolute 2e-6 on ln z; the entropy adds the rounding of its own f32 value.
            assert!((f64::from(summary.log_sum) - z.ln()).abs() < 2e-6, "{n}");
            assert!((f64::from(summary.entropy) - entropy).abs() < 1e-5, "{n}");
            let total: f64 = logits.iter().map(|&x| f64::from(summary.logprob(x)).exp()).sum();
            assert!((total - 1.0).abs() < 1e-5, "{n}: {total}");
        }
    }

    #[test]
    fn one_bad_value_anywhere_is_seen() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 15, 16, 998, 999] {
                let mut logits = noise(1000, 4.0);
                logits[at] = bad;
                assert_eq!(Summary::of(&logits), None);
            }
        }
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!(largest(&[1.0, 3.0], 5).len(), 2);
        assert!(largest(&[1.0], 0).is_empty());
    }
}
