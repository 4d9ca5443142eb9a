//! E_resonance (§1.4): whether a residual drifts over long replies, and whether it is the same in two modes.

use crate::error::MetricsError;
use crate::statistics::{Interval, mean, median};

/// Slope per 1,000 tokens within which replies are flat (§1.4.2).
pub const TREND_MARGIN: f64 = 0.02;
/// Difference of mean residuals within which two modes are the same (§1.4.4).
pub const MODE_MARGIN: f64 = 0.05;
/// Fewest sequences of a trend, and fewest windows of each (§1.4.2).
pub const TREND_SIZE: (usize, usize) = (20, 50);
/// Fewest prompts on which two modes are compared (§1.4.4).
pub const MODE_PROMPTS: usize = 50;
/// Coverage of the intervals: an equivalence test at α = 0.05 asks whether that of 90 % lies inside the margin.
const LEVEL: f64 = 0.90;

/// What an interval says about a margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Equivalence {
    /// All of it lies inside: no difference that matters.
    Same,
    /// All of it lies above.
    Above,
    /// All of it lies below.
    Below,
    /// It crosses an end: too few data to tell.
    Inconclusive,
}

/// Two one-sided t tests of a mean against ±`margin` (Schuirmann 1987), with the 90 % interval that decides them.
///
/// # Errors
/// Fewer than two values, or one that is not finite.
pub fn tost(values: &[f64], margin: f64) -> Result<(Equivalence, Interval), MetricsError> {
    let interval = mean_interval(values, LEVEL)?;
    let found = if interval.low > -margin && interval.high < margin {
        Equivalence::Same
    } else if interval.low > margin {
        Equivalence::Above
    } else if interval.high < -margin {
        Equivalence::Below
    } else {
        Equivalence::Inconclusive
    };
    Ok((found, interval))
}

/// Values above twice the median of them (§1.4.3).
///
/// # Errors
/// No values, or one that is not finite.
pub fn spikes(values: &[f64]) -> Result<usize, MetricsError> {
    let limit = 2.0 * median(values)?;
    Ok(values.iter().filter(|value| **value > limit).count())
}

/// The t interval of a mean, `level` in (0, 1).
///
/// # Errors
/// Fewer than two values, one that is not finite, or a level outside (0, 1).
pub fn mean_interval(values: &[f64], level: f64) -> Result<Interval, MetricsError> {
    let found = mean(values)?;
    if !(level > 0.0 && level < 1.0) {
        let (statistic, expected) = ("mean_interval", "a level in (0, 1)");
        return Err(MetricsError::OutOfRange { statistic, expected, found: level });
    }
    let Some(freedom) = values.len().checked_sub(1).filter(|freedom| *freedom > 0) else {
        return Err(MetricsError::OutOfRange {
            statistic: "mean_interval",
            expected: "at least 2 values",
            found: 1.0,
        });
    };
    let squares: f64 = values.iter().map(|value| (value - found).powi(2)).sum();
    #[expect(clippy::cast_precision_loss, reason = "sample sizes are far below 2^52")]
    let error = (squares / freedom as f64 / values.len() as f64).sqrt();
    let half = t_quantile(freedom, level) * error;
    Ok(Interval { low: found - half, high: found + half })
}

/// The t with P(|T| ≤ t) = `level`.
fn t_quantile(freedom: usize, level: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while t_within(freedom, high) < level {
        high *= 2.0;
    }
    // Halved until the two are neighbours.
    for _ in 0..200 {
        let middle = f64::midpoint(low, high);
        if t_within(freedom, middle) < level { low = middle } else { high = middle }
    }
    high
}

/// P(|T| ≤ t) of Student's distribution with whole degrees of freedom, in closed form (Abramowitz and Stegun 1964,
/// 26.7.3 and 26.7.4).
fn t_within(freedom: usize, t: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "sample sizes are far below 2^52")]
    let angle = (t / (freedom as f64).sqrt()).atan();
    let (sin, cos) = angle.sin_cos();
    // Terms cos^k of every second k, each with the product of (k − 1)/k of those before.
    let sum = |first: usize, mut term: f64| {
        let mut total = 0.0;
        for k in (first..freedom).step_by(2) {
            total += term;
            #[expect(clippy::cast_precision_loss, reason = "sample sizes are far below 2^52")]
            let ratio = k as f64 / (k + 1) as f64;
            term *= ratio * cos * cos;
        }
        total
    };
    if freedom.is_multiple_of(2) {
        sin * sum(1, 1.0)
    } else {
        std::f64::consts::FRAC_2_PI * (angle + sin * sum(2, cos))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn students_quantiles_are_those_of_the_tables() {
        for (freedom, level, expected) in [
            (1, 0.90, 6.313_751_514_675_043),
            (2, 0.90, 2.919_985_580_353_725),
            (3, 0.95, 3.182_446_305_284_263),
            (19, 0.90, 1.729_132_811_521_366),
            (49, 0.90, 1.676_550_892_616_847),
            (200, 0.99, 2.600_634_436_650_242),
        ] {
            let found = t_quantile(freedom, level);
            assert!((found - expected).abs() < 1e-9, "{freedom}, {level}: {found}");
        }
    }

    #[test]
    fn an_interval_inside_the_margin_is_the_same_and_one_across_it_cannot_be_told() {
        let around = |middle: f64, spread: f64| [middle - spread, middle, middle + spread];
        let found = |values: &[f64]| tost(values, 0.02).unwrap().0;
        assert_eq!(found(&around(0.0, 0.001)), Equivalence::Same);
        assert_eq!(found(&around(0.1, 0.001)), Equivalence::Above);
        assert_eq!(found(&around(-0.1, 0.001)), Equivalence::Below);
        assert_eq!(found(&around(0.02, 0.001)), Equivalence::Inconclusive);
        assert_eq!(found(&around(0.0, 0.1)), Equivalence::Inconclusive);
        assert!(tost(&[0.0], 0.02).is_err() && tost(&[], 0.02).is_err());
    }

    #[test]
    fn a_spike_is_over_twice_the_median() {
        assert_eq!(spikes(&[1.0, 1.0, 2.0, 2.01, 1.0]).unwrap(), 1);
        assert!(spikes(&[]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn an_interval_holds_its_mean_and_shrinks_with_the_level(
            values in prop::collection::vec(-5.0..5.0_f64, 2..60),
        ) {
            let (wide, narrow) = (mean_interval(&values, 0.95)?, mean_interval(&values, 0.5)?);
            let middle = mean(&values)?;
            prop_assert!(wide.low <= narrow.low && narrow.high <= wide.high);
            prop_assert!(narrow.low <= middle + 1e-12 && middle <= narrow.high + 1e-12);
            let mirrored: Vec<f64> = values.iter().map(|value| -value).collect();
            let other = mean_interval(&mirrored, 0.95)?;
            prop_assert!((other.low + wide.high).abs() < 1e-9);
        }
    }
}
