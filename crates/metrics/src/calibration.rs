//! Puts raw ΔS of one encoder on one corpus onto the scale on which the guide's numbers hold
//! (§1.1.7). After it, ≤ 0.45 means that at most 5% of the unanswerable questions get in, ≥ 0.60
//! that at most 5% of the answerable ones are lost, and 0.85 is no nearer than off-topic.
//!
//! Nothing here asks what the number is made of: any signal in [0, 2] that is small where the
//! evidence answers the question is put onto the same scale by the same rule.

use serde::{Deserialize, Serialize};

use crate::delta_s::{Family, Probe};
use crate::error::{MetricsError, finite};
use crate::statistics::{auroc, median, quantile};

/// Fewest values per set: a 5th percentile of fewer than 50 hangs on two values.
pub const MIN_CALIBRATION_ITEMS: usize = 50;

const MIN_AUROC: f64 = 0.90;
const MAX_SHARE_BETWEEN: f64 = 0.30;

/// The two quantiles between which a signal decides nothing (§1.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Raw value that maps to 0.45: 5th percentile of the unanswerable.
    pub t_pass: f64,
    /// Raw value that maps to 0.60: 95th percentile of the answerable.
    pub t_fail: f64,
    /// Whether the two quantiles crossed, so that both were set to their midpoint.
    pub midpoint: bool,
}

impl Thresholds {
    /// The quantiles of two sets of any size. [`Calibration::fit`] asks for more values than a
    /// quantile needs; a half of a gold set, on which a held-out error is fitted, may have fewer.
    ///
    /// # Errors
    /// An empty set, or a value that is not finite.
    pub fn fit(answerable: &[f64], unanswerable: &[f64]) -> Result<Thresholds, MetricsError> {
        let t_pass = quantile(unanswerable, 0.05)?;
        let t_fail = quantile(answerable, 0.95)?;
        if t_fail < t_pass {
            let middle = f64::midpoint(t_pass, t_fail);
            return Ok(Thresholds { t_pass: middle, t_fail: middle, midpoint: true });
        }
        Ok(Thresholds { t_pass, t_fail, midpoint: false })
    }

    /// Whether a gate of these thresholds refuses a question: its value is 0.60 or more on the
    /// calibrated scale. NaN is refused.
    #[must_use]
    pub fn refuse(&self, raw: f64) -> bool {
        // After the midpoint rule the threshold itself maps to 0.45.
        let passes = raw < self.t_fail || (raw <= self.t_pass && self.t_pass >= self.t_fail);
        !passes
    }
}

/// The fitted map of one probe family, with the evidence that it may gate, or may not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The probes for which this map holds.
    pub family: Family,
    /// Raw ΔS that maps to 0.45: 5th percentile of the unanswerable.
    pub t_pass: f64,
    /// Raw ΔS that maps to 0.60: 95th percentile of the answerable.
    pub t_fail: f64,
    /// Raw ΔS that maps to 0.85: median of the off-topic.
    pub t_rand: f64,
    /// Whether the two quantiles crossed, so that both were set to their midpoint.
    pub midpoint: bool,
    /// Probability that an answerable question is nearer than an unanswerable one.
    pub auroc: f64,
    /// Share of the answerable strictly between `t_pass` and `t_fail`: undecided by this scale.
    pub share_between: f64,
    /// Sizes of the answerable, unanswerable and off-topic sets.
    pub n: [usize; 3],
    /// Whether ΔS under this map may gate.
    pub fitness: Fitness,
}

/// Whether the encoder separates the sets well enough for ΔS to gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// ΔS may gate.
    Fit,
    /// ΔS is report-only; something else has to gate.
    Unfit(Vec<Unfit>),
}

/// One condition of fitness that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unfit {
    /// AUROC of answerable against unanswerable is below 0.90.
    Auroc,
    /// More than 30% of the answerable lie between the thresholds.
    ShareBetween,
    /// `t_fail` is not below `t_rand`: the lost answerable are no nearer than off-topic.
    FailNotBelowRandom,
}

impl Calibration {
    /// Fits the map on raw values of the statistic that is served: `ds_min` through the live
    /// retriever for [`Family::QuestionEvidence`], labelled pairs for [`Family::TextText`], the
    /// signal of the same questions over the same evidence for the others.
    ///
    /// # Errors
    /// A set smaller than [`MIN_CALIBRATION_ITEMS`], or a value that is not in [0, 2].
    pub fn fit(
        family: Family,
        answerable: &[f64],
        unanswerable: &[f64],
        off_topic: &[f64],
    ) -> Result<Calibration, MetricsError> {
        check_set("answerable", answerable)?;
        check_set("unanswerable", unanswerable)?;
        check_set("off_topic", off_topic)?;
        let Thresholds { t_pass, t_fail, midpoint } = Thresholds::fit(answerable, unanswerable)?;
        let t_rand = median(off_topic)?;
        let n_between = answerable.iter().filter(|&&raw| raw > t_pass && raw < t_fail).count();
        let share_between = share(n_between, answerable.len());
        let auroc = auroc(answerable, unanswerable)?;
        let mut reasons = Vec::new();
        if auroc < MIN_AUROC {
            reasons.push(Unfit::Auroc);
        }
        if share_between > MAX_SHARE_BETWEEN {
            reasons.push(Unfit::ShareBetween);
        }
        if t_fail >= t_rand {
            reasons.push(Unfit::FailNotBelowRandom);
        }
        let fitness = if reasons.is_empty() { Fitness::Fit } else { Fitness::Unfit(reasons) };
        let n = [answerable.len(), unanswerable.len(), off_topic.len()];
        Ok(Calibration {
            family,
            t_pass,
            t_fail,
            t_rand,
            midpoint,
            auroc,
            share_between,
            n,
            fitness,
        })
    }

    /// Its thresholds.
    #[must_use]
    pub fn thresholds(&self) -> Thresholds {
        Thresholds { t_pass: self.t_pass, t_fail: self.t_fail, midpoint: self.midpoint }
    }

    /// Whether ΔS under this map may gate.
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.fitness == Fitness::Fit
    }

    /// The calibrated ΔS in [0, 1] of a raw one, piecewise linear through (0, 0), (`t_pass`, 0.45),
    /// (`t_fail`, 0.60), (`t_rand`, 0.85), (2, 1). Raw values outside [0, 2] are clamped; NaN stays
    /// NaN, which no band passes. After the midpoint rule the map jumps from 0.45 to 0.60 just above
    /// the threshold. Where `t_rand` ≤ `t_fail` (unfit) its knot is left out, so that the map keeps
    /// rising.
    #[must_use]
    pub fn map(&self, raw: f64) -> f64 {
        let raw = raw.clamp(0.0, 2.0);
        let knots =
            [(0.0, 0.0), (self.t_pass, 0.45), (self.t_fail, 0.60), (self.t_rand, 0.85), (2.0, 1.0)];
        let mut left = knots[0];
        for (index, &right) in knots.iter().enumerate().skip(1) {
            if index == 3 && self.t_rand <= self.t_fail {
                continue;
            }
            if raw <= right.0 {
                return interpolate(left, right, raw);
            }
            left = right;
        }
        if raw.is_nan() { raw } else { 1.0 }
    }

    /// [`Calibration::map`] with the check that the probe belongs to this map's family.
    ///
    /// # Errors
    /// The probe belongs to the other family.
    pub fn calibrated(&self, probe: Probe, raw: f64) -> Result<f64, MetricsError> {
        if probe.family() == self.family {
            Ok(self.map(raw))
        } else {
            Err(MetricsError::WrongFamily { probe, found: self.family })
        }
    }
}

/// Reaches both ends exactly, so that a threshold lands on its own side of the gate.
fn interpolate(left: (f64, f64), right: (f64, f64), x: f64) -> f64 {
    if x >= right.0 {
        return right.1;
    }
    let part = (x - left.0) / (right.0 - left.0);
    (left.1 + part * (right.1 - left.1)).clamp(left.1, right.1)
}

fn check_set(set: &'static str, values: &[f64]) -> Result<(), MetricsError> {
    if values.len() < MIN_CALIBRATION_ITEMS {
        return Err(MetricsError::TooFew {
            set,
            needed: MIN_CALIBRATION_ITEMS,
            found: values.len(),
        });
    }
    finite(set, values)?;
    match values.iter().find(|value| !(0.0..=2.0).contains(*value)) {
        Some(&found) => {
            Err(MetricsError::OutOfRange { statistic: set, expected: "a value in [0, 2]", found })
        }
        None => Ok(()),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::delta_s::Band;

    /// `n` values evenly from `low` to `high`.
    fn spread(low: f64, high: f64, n: u32) -> Vec<f64> {
        (0..n).map(|i| low + (high - low) * f64::from(i) / f64::from(n - 1)).collect()
    }

    fn fit(a: &[f64], u: &[f64], o: &[f64]) -> Calibration {
        Calibration::fit(Family::QuestionEvidence, a, u, o).expect("valid sets")
    }

    #[test]
    fn separated_sets_use_the_midpoint_and_jump_over_review() {
        let calibration =
            fit(&spread(0.1, 0.3, 101), &spread(0.5, 0.7, 101), &spread(0.8, 1.0, 101));
        assert!(calibration.midpoint && calibration.is_fit());
        // 95th percentile of A = 0.29, 5th of U = 0.51.
        assert!((calibration.t_pass - 0.40).abs() < 1e-12);
        assert_eq!(calibration.t_pass.to_bits(), calibration.t_fail.to_bits());
        assert_eq!(Band::of(calibration.map(calibration.t_pass)), Band::PassEdge);
        assert_eq!(Band::of(calibration.map(calibration.t_pass + 1e-9)), Band::Fail);
    }

    #[test]
    fn overlapping_sets_keep_both_thresholds_and_hit_the_knots() {
        let calibration =
            fit(&spread(0.1, 0.6, 101), &spread(0.5, 0.9, 101), &spread(0.8, 1.0, 101));
        assert!(!calibration.midpoint);
        for (raw, expected) in [
            (0.0, 0.0),
            (calibration.t_pass, 0.45),
            (calibration.t_fail, 0.60),
            (calibration.t_rand, 0.85),
            (2.0, 1.0),
        ] {
            assert!((calibration.map(raw) - expected).abs() < 1e-12, "{raw}");
        }
    }

    #[test]
    fn encoder_of_the_specification_is_unfit() {
        // §1.1.13: AUROC 0.82 and 59% of the answerable in between.
        let calibration =
            fit(&spread(0.35, 0.70, 101), &spread(0.50, 0.80, 101), &spread(0.7, 1.0, 101));
        let Fitness::Unfit(reasons) = &calibration.fitness else { panic!("must be unfit") };
        assert!(reasons.contains(&Unfit::Auroc) && reasons.contains(&Unfit::ShareBetween));
    }

    #[test]
    fn off_topic_nearer_than_the_lost_answerable_is_unfit_and_still_monotone() {
        let calibration =
            fit(&spread(0.1, 0.6, 101), &spread(0.55, 0.9, 101), &spread(0.4, 0.5, 101));
        assert_eq!(calibration.fitness, Fitness::Unfit(vec![Unfit::FailNotBelowRandom]));
        let values: Vec<f64> = spread(0.0, 2.0, 400).iter().map(|&r| calibration.map(r)).collect();
        assert!(values.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn small_or_broken_sets_are_refused() {
        let good = spread(0.1, 0.3, 60);
        let error = Calibration::fit(Family::TextText, &good[..49], &good, &good);
        assert_eq!(error, Err(MetricsError::TooFew { set: "answerable", needed: 50, found: 49 }));
        let mut broken = good.clone();
        broken[3] = f64::NAN;
        assert!(Calibration::fit(Family::TextText, &good, &broken, &good).is_err());
        broken[3] = 2.5;
        assert!(Calibration::fit(Family::TextText, &good, &good, &broken).is_err());
    }

    #[test]
    fn thresholds_refuse_what_the_map_fails() {
        let sets = [(0.1, 0.3, 0.5, 0.7), (0.1, 0.6, 0.5, 0.9), (0.2, 0.2, 0.2, 0.2)];
        for (a_low, a_high, u_low, u_high) in sets {
            let (a, u) = (spread(a_low, a_high, 101), spread(u_low, u_high, 101));
            let calibration = fit(&a, &u, &spread(0.8, 1.0, 101));
            let thresholds = calibration.thresholds();
            for raw in spread(0.0, 2.0, 401).into_iter().chain([thresholds.t_pass]) {
                let closed = match Band::of(calibration.map(raw)) {
                    Band::Stable | Band::PassEdge | Band::Review => false,
                    Band::Fail | Band::Danger => true,
                };
                assert_eq!(thresholds.refuse(raw), closed, "{raw} of {thresholds:?}");
            }
            assert!(thresholds.refuse(f64::NAN));
        }
        assert!(Thresholds::fit(&[], &[0.5]).is_err());
    }

    #[test]
    fn a_probe_of_the_other_family_is_refused() {
        let calibration =
            fit(&spread(0.1, 0.3, 101), &spread(0.5, 0.7, 101), &spread(0.8, 1.0, 101));
        assert!(calibration.calibrated(Probe::DsQr, 0.2).is_ok());
        assert!(calibration.calibrated(Probe::DsRa, 0.2).is_err());
    }

    proptest! {
        #[test]
        fn map_is_monotone_and_in_range(
            a in prop::collection::vec(0.0f64..2.0, 50..70),
            u in prop::collection::vec(0.0f64..2.0, 50..70),
            o in prop::collection::vec(0.0f64..2.0, 50..70),
            x in -1.0f64..3.0, y in -1.0f64..3.0,
        ) {
            let calibration = fit(&a, &u, &o);
            let (low, high) = (x.min(y), x.max(y));
            prop_assert!(calibration.map(low) <= calibration.map(high));
            prop_assert!((0.0..=1.0).contains(&calibration.map(x)));
            prop_assert!(calibration.map(calibration.t_pass) <= 0.45);
            prop_assert!(calibration.map(f64::NAN).is_nan());
        }

        #[test]
        fn order_within_a_set_does_not_matter(
            mut a in prop::collection::vec(0.0f64..2.0, 50..70),
        ) {
            let u = spread(0.4, 0.9, 60);
            let first = fit(&a, &u, &u);
            a.reverse();
            prop_assert_eq!(first, fit(&a, &u, &u));
        }
    }
}
