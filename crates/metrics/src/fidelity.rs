//! Quantisation fidelity (§1.5): what a model predicts against what its reference predicts, of the same tokens at the
//! same positions.

use serde::Serialize;

use crate::error::{MetricsError, finite};
use crate::statistics::{count, mean, median, quantile};

/// Positions of a bin of [`FidelitySummary::by_position`].
pub const POSITION_BIN: usize = 64;

/// A next-token distribution: natural logarithms of V probabilities, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbabilities(Vec<f64>);

impl LogProbabilities {
    /// Log-softmax of logits `(V,)`.
    ///
    /// # Errors
    /// No logits, NaN or +∞. −∞ is a token of probability zero.
    pub fn of(logits: &[f32]) -> Result<LogProbabilities, MetricsError> {
        let bad = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        if let Some(index) = logits.iter().position(bad) {
            let found = f64::from(logits[index]);
            return Err(MetricsError::NotFinite { statistic: "kld", index, found });
        }
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if greatest == f32::NEG_INFINITY {
            return Err(MetricsError::Empty { statistic: "kld" });
        }
        let greatest = f64::from(greatest);
        let total: f64 = logits.iter().map(|&x| (f64::from(x) - greatest).exp()).sum();
        let ln = |&x: &f32| f64::from(x) - greatest - total.ln();
        Ok(LogProbabilities(logits.iter().map(ln).collect()))
    }

    /// `Σ p (ln p − ln q)` in nats, p this and q the other distribution (§1.5.1). Never below 0; +∞ where this allows a
    /// token that the other excludes.
    ///
    /// # Errors
    /// Different lengths.
    pub fn kld(&self, other: &LogProbabilities) -> Result<f64, MetricsError> {
        let (left, right) = (self.0.len(), other.0.len());
        if left != right {
            return Err(MetricsError::LengthMismatch { statistic: "kld", left, right });
        }
        Ok(kld_of_logs(&self.0, &other.0))
    }

    /// The most likely token; of equal ones the first.
    #[must_use]
    pub fn top(&self) -> usize {
        let better = |best: usize, id: usize| if self.0[id] > self.0[best] { id } else { best };
        (0..self.0.len()).reduce(better).unwrap_or_default()
    }

    /// ln p of a token; `None` outside the vocabulary.
    #[must_use]
    pub fn ln_p(&self, id: usize) -> Option<f64> {
        self.0.get(id).copied()
    }
}

/// `Σ p (ln p − ln q)` in nats, never below 0.
pub(crate) fn kld_of_logs(p: &[f64], q: &[f64]) -> f64 {
    let terms = p.iter().zip(q).filter(|(ln_p, _)| **ln_p > f64::NEG_INFINITY);
    // Rounding can leave a sum of −1e-17 for equal distributions.
    terms.map(|(ln_p, ln_q)| ln_p.exp() * (ln_p - ln_q)).sum::<f64>().max(0.0)
}

/// What is kept of every position. A position takes 25 bytes; no distribution is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Fidelity {
    /// `KLD(reference ‖ model)` of every position.
    klds: Vec<f64>,
    /// ln p less ln q of the token that follows: the losses that the other adds.
    losses: Vec<f64>,
    /// q less p of that token.
    shifts: Vec<f64>,
    /// Whether the most likely tokens are the same, position by position.
    same_top: Vec<bool>,
    /// Where each sequence begins in `klds`, and in `losses`.
    sequences: Vec<(usize, usize)>,
}

impl Fidelity {
    /// Begins a sequence: what is added next is its first position.
    pub fn begin_sequence(&mut self) {
        self.sequences.push((self.klds.len(), self.losses.len()));
    }

    /// Adds the next position: the distributions of the reference `p` and of the other model `q`, and the token that
    /// follows in the text, if one does.
    ///
    /// # Errors
    /// Vocabularies of different sizes, a token outside them, or a distribution that excludes what the reference
    /// allows. Nothing is added then.
    pub fn add(
        &mut self,
        p: &LogProbabilities,
        q: &LogProbabilities,
        next: Option<usize>,
    ) -> Result<(), MetricsError> {
        let kld = p.kld(q)?;
        finite("kld", &[kld])?;
        let follows = next.map(|id| {
            p.ln_p(id).zip(q.ln_p(id)).ok_or(MetricsError::OutOfRange {
                statistic: "perplexity",
                expected: "a token of the vocabulary",
                found: count(id),
            })
        });
        if let Some((ln_p, ln_q)) = follows.transpose()? {
            finite("perplexity", &[ln_p, ln_q])?;
            self.losses.push(ln_p - ln_q);
            self.shifts.push(ln_q.exp() - ln_p.exp());
        }
        self.klds.push(kld);
        self.same_top.push(p.top() == q.top());
        Ok(())
    }

    /// What §1.5.1 asks for.
    ///
    /// # Errors
    /// No positions, or none that a token follows.
    pub fn summary(&self) -> Result<FidelitySummary, MetricsError> {
        let at = |p| quantile(&self.klds, p);
        let squares: Vec<f64> = self.shifts.iter().map(|x| x * x).collect();
        let n_same_top = self.same_top.iter().filter(|&&same| same).count();
        Ok(FidelitySummary {
            positions: self.klds.len(),
            sequences: self.sequences.len(),
            kld_mean: mean(&self.klds)?,
            kld_mean_se: self.standard_error(&self.klds, |(klds, _)| klds),
            kld_median: median(&self.klds)?,
            kld_p99: at(0.99)?,
            kld_p999: at(0.999)?,
            kld_max: at(1.0)?,
            top1: count(n_same_top) / count(self.klds.len()),
            ln_ppl_ratio: mean(&self.losses)?,
            ln_ppl_ratio_se: self.standard_error(&self.losses, |(_, losses)| losses),
            rms_dp: mean(&squares)?.sqrt(),
            by_position: self.by_position()?,
        })
    }

    /// Standard error of the mean of `values` from the means of the sequences, weighted by their lengths: the positions
    /// of one sequence depend on each other (Cochran 1977, Sampling Techniques, §2.11: the ratio estimator).
    fn standard_error(
        &self,
        values: &[f64],
        start: impl Fn((usize, usize)) -> usize,
    ) -> Option<f64> {
        let starts: Vec<usize> = self.sequences.iter().map(|&both| start(both)).collect();
        if starts.len() < 2 {
            return None;
        }
        let (all, n) = (mean(values).ok()?, count(starts.len()));
        let ends = starts[1..].iter().copied().chain([values.len()]);
        let squares = starts.iter().zip(ends).map(|(&start, end)| {
            let sequence = values.get(start..end).unwrap_or_default();
            (sequence.iter().sum::<f64>() - all * count(sequence.len())).powi(2)
        });
        let variance = squares.sum::<f64>() * n / (n - 1.0);
        Some(variance.sqrt() / count(values.len()))
    }

    fn by_position(&self) -> Result<Vec<PositionBin>, MetricsError> {
        let ends = self.sequences.iter().skip(1).map(|&(klds, _)| klds).chain([self.klds.len()]);
        let mut bins: Vec<Vec<f64>> = Vec::new();
        for (&(start, _), end) in self.sequences.iter().zip(ends) {
            for (i, bin) in self.klds[start..end].chunks(POSITION_BIN).enumerate() {
                if bins.len() == i {
                    bins.push(Vec::new());
                }
                bins[i].extend(bin);
            }
        }
        let bin = |(i, klds): (usize, &Vec<f64>)| {
            Ok(PositionBin { from: i * POSITION_BIN, n: klds.len(), kld_mean: mean(klds)? })
        };
        bins.iter().enumerate().map(bin).collect()
    }
}

/// The fidelity of a model to its reference. Divergences in nats.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FidelitySummary {
    /// Distributions that were compared.
    pub positions: usize,
    /// Sequences that they are of.
    pub sequences: usize,
    /// Mean of `KLD(reference ‖ model)`.
    pub kld_mean: f64,
    /// Its standard error, sequences being the units; none with fewer than two.
    pub kld_mean_se: Option<f64>,
    /// Median.
    pub kld_median: f64,
    /// 99th percentile.
    pub kld_p99: f64,
    /// 99.9th percentile.
    pub kld_p999: f64,
    /// Largest.
    pub kld_max: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
    /// ln(PPL of the model / PPL of the reference) on the text: what the loss grows by, in nats a token.
    pub ln_ppl_ratio: f64,
    /// Its standard error, sequences being the units; none with fewer than two.
    pub ln_ppl_ratio_se: Option<f64>,
    /// Root mean square of what the probability of the token that follows changes by.
    pub rms_dp: f64,
    /// Mean divergence by the position in a sequence.
    pub by_position: Vec<PositionBin>,
}

/// [`POSITION_BIN`] positions of all sequences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PositionBin {
    /// First position.
    pub from: usize,
    /// Distributions.
    pub n: usize,
    /// Mean divergence.
    pub kld_mean: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(logits: &[f32]) -> LogProbabilities {
        LogProbabilities::of(logits).unwrap()
    }

    #[test]
    fn a_model_is_itself() {
        let p = of(&[1.0, 3.0, -2.0]);
        let mut fidelity = Fidelity::default();
        for next in [Some(1), None] {
            fidelity.begin_sequence();
            fidelity.add(&p, &p, Some(0)).unwrap();
            fidelity.add(&p, &p, next).unwrap();
        }
        let found = fidelity.summary().unwrap();
        assert_eq!((found.positions, found.sequences, found.top1), (4, 2, 1.0));
        assert_eq!(
            (found.kld_mean, found.kld_max, found.ln_ppl_ratio, found.rms_dp),
            (0.0, 0.0, 0.0, 0.0)
        );
        assert_eq!((found.kld_mean_se, found.ln_ppl_ratio_se), (Some(0.0), Some(0.0)));
        assert_eq!(found.by_position, [PositionBin { from: 0, n: 4, kld_mean: 0.0 }]);
    }

    #[test]
    fn the_loss_is_of_the_token_that_follows() {
        let (p, q) = (of(&[0.0, 0.0]), of(&[0.0, f32::ln(3.0)]));
        let mut fidelity = Fidelity::default();
        fidelity.begin_sequence();
        fidelity.add(&p, &q, Some(0)).unwrap();
        let found = fidelity.summary().unwrap();
        assert!((found.ln_ppl_ratio - 2.0_f64.ln()).abs() < 1e-7, "a half becomes a quarter");
        assert!((found.rms_dp - 0.25).abs() < 1e-7);
        let kld = 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln();
        assert!((found.kld_mean - kld).abs() < 1e-7 && found.top1 == 0.0);
        assert_eq!(found.kld_mean_se, None, "one sequence says nothing of others");
    }

    #[test]
    fn sequences_that_agree_inside_are_as_few_as_they_are() {
        // Two sequences of a hundred equal positions: the error is that of two values.
        let (p, near, far) = (of(&[0.0, 0.0]), of(&[0.0, 0.1]), of(&[0.0, 1.0]));
        let mut fidelity = Fidelity::default();
        for q in [&near, &far] {
            fidelity.begin_sequence();
            (0..100).for_each(|_| fidelity.add(&p, q, Some(0)).unwrap());
        }
        let (a, b) = (p.kld(&near).unwrap(), p.kld(&far).unwrap());
        let found = fidelity.summary().unwrap();
        assert!((found.kld_mean_se.unwrap() - (b - a) / 2.0).abs() < 1e-12);
        assert_eq!(found.by_position.iter().map(|bin| bin.n).collect::<Vec<_>>(), [128, 72]);
    }

    #[test]
    fn what_cannot_be_compared_adds_nothing() {
        let (p, other) = (of(&[0.0, 0.0]), of(&[0.0, 0.0, 0.0]));
        let mut fidelity = Fidelity::default();
        fidelity.begin_sequence();
        assert!(fidelity.add(&p, &other, Some(0)).is_err());
        assert!(fidelity.add(&p, &p, Some(2)).unwrap_err().to_string().contains("found 2"));
        assert!(fidelity.add(&p, &of(&[0.0, f32::NEG_INFINITY]), Some(0)).is_err());
        assert!(fidelity.summary().is_err());
        assert!(LogProbabilities::of(&[f32::NAN]).is_err() && LogProbabilities::of(&[]).is_err());
    }

    proptest! {
        #[test]
        fn divergence_is_not_negative_and_does_not_see_a_shift(
            p in prop::collection::vec(-20.0_f32..20.0, 2..40), shift in -5_i8..5,
        ) {
            let q: Vec<f32> = p.iter().rev().copied().collect();
            let kld = of(&p).kld(&of(&q)).unwrap();
            prop_assert!(kld >= 0.0);
            let shifted: Vec<f32> = q.iter().map(|x| x + f32::from(shift)).collect();
            prop_assert!((of(&p).kld(&of(&shifted)).unwrap() - kld).abs() < 1e-4 * (1.0 + kld));
        }
    }
}
