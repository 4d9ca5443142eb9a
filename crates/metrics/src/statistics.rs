//! The statistics behind the gates. Each states its definition; `golden/metrics` holds the values
//! that scipy gives for the same input.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, finite};
use crate::fidelity::{LogProbabilities, kld_of_logs};

/// A closed interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Arithmetic mean.
///
/// # Errors
/// No values, or one that is not finite.
pub fn mean(values: &[f64]) -> Result<f64, MetricsError> {
    finite("mean", values)?;
    Ok(values.iter().sum::<f64>() / count(values.len()))
}

/// Median: the middle value, or the mean of the two middle ones.
///
/// # Errors
/// No values, or one that is not finite.
pub fn median(values: &[f64]) -> Result<f64, MetricsError> {
    quantile(values, 0.5)
}

/// Quantile by linear interpolation between order statistics at `(n − 1)·p` (type 7 of Hyndman
/// and Fan 1996, the default of numpy and R).
///
/// # Errors
/// No values, one that is not finite, or `p` outside [0, 1].
pub fn quantile(values: &[f64], p: f64) -> Result<f64, MetricsError> {
    finite("quantile", values)?;
    if !(0.0..=1.0).contains(&p) {
        return Err(MetricsError::OutOfRange {
            statistic: "quantile",
            expected: "p in [0, 1]",
            found: p,
        });
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = p * count(sorted.len() - 1);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "place lies in [0, n − 1]"
    )]
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let part = place - place.floor();
    Ok((sorted[below] + part * (sorted[above] - sorted[below])).clamp(sorted[below], sorted[above]))
}

/// Probability that a value of `lower` is below a value of `higher`, ties counting one half: the
/// Mann–Whitney U statistic over `n·m`. 1 is perfect separation, 0.5 is none. Takes `n·m` steps.
///
/// # Errors
/// An empty set, or a value that is not finite.
pub fn auroc(lower: &[f64], higher: &[f64]) -> Result<f64, MetricsError> {
    finite("auroc", lower)?;
    finite("auroc", higher)?;
    let mut wins = 0.0;
    for a in lower {
        for b in higher {
            if a < b {
                wins += 1.0;
            } else if a == b {
                wins += 0.5;
            }
        }
    }
    Ok(wins / (count(lower.len()) * count(higher.len())))
}

/// 97.5th percentile of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// Wilson's score interval at 95% for a share (Wilson 1927), without continuity correction.
///
/// # Errors
/// No trials, or more successes than trials.
pub fn wilson(n_successes: usize, n_trials: usize) -> Result<Interval, MetricsError> {
    if n_trials == 0 {
        return Err(MetricsError::Empty { statistic: "wilson" });
    }
    if n_successes > n_trials {
        return Err(MetricsError::OutOfRange {
            statistic: "wilson",
            expected: "at most as many successes as trials",
            found: count(n_successes),
        });
    }
    let n = count(n_trials);
    let p = count(n_successes) / n;
    let z2 = Z_95 * Z_95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z_95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    // The formula reaches 0 and 1 at the ends only up to rounding.
    let low = if n_successes == 0 { 0.0 } else { (centre - half).max(0.0) };
    let high = if n_successes == n_trials { 1.0 } else { (centre + half).min(1.0) };
    Ok(Interval { low, high })
}

/// The upper end of the one-sided 95% interval of Clopper and Pearson (1934) for a share: the share at which as
/// few successes as these, or fewer, come up in one of twenty series. Without a success that is `1 − 0.05^(1/n)`,
/// close to `3 / n`.
///
/// # Errors
/// No trials, or more successes than trials.
pub fn binomial_upper(n_successes: usize, n_trials: usize) -> Result<f64, MetricsError> {
    if n_trials == 0 {
        return Err(MetricsError::Empty { statistic: "binomial_upper" });
    }
    if n_successes > n_trials {
        return Err(MetricsError::OutOfRange {
            statistic: "binomial_upper",
            expected: "at most as many successes as trials",
            found: count(n_successes),
        });
    }
    if n_successes == n_trials {
        return Ok(1.0);
    }
    // The probability of so few successes falls with the share; sixty halvings are below rounding.
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    for _ in 0..60 {
        let share = f64::midpoint(low, high);
        if at_most(n_successes, n_trials, share) > 0.05 {
            low = share;
        } else {
            high = share;
        }
    }
    Ok(high)
}

/// The probability of at most `k` successes in `n` trials of which each succeeds with probability `p`, 0 < p < 1.
fn at_most(k: usize, n: usize, p: f64) -> f64 {
    // In logarithms: the first term underflows where n is large.
    let mut log_term = count(n) * (-p).ln_1p();
    let mut sum = log_term.exp();
    for i in 0..k {
        log_term += (count(n - i) / count(i + 1)).ln() + p.ln() - (-p).ln_1p();
        sum += log_term.exp();
    }
    sum
}

/// `|A ∩ B| / |A ∪ B|`; none for two empty sets, whose meaning the caller has to state.
#[must_use]
pub fn jaccard(a: &BTreeSet<String>, b: &BTreeSet<String>) -> Option<f64> {
    let n_shared = a.intersection(b).count();
    let n_all = a.len() + b.len() - n_shared;
    (n_all > 0).then(|| count(n_shared) / count(n_all))
}

/// A line through points that a quarter of wild points cannot bend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TheilSen {
    /// Median of the slopes of all pairs with different x.
    pub slope: f64,
    /// `median(y) − slope · median(x)`.
    pub intercept: f64,
}

/// Theil–Sen estimator of `y` over `x`.
///
/// # Errors
/// Different lengths, a value that is not finite, or fewer than two different x.
pub fn theil_sen(x: &[f64], y: &[f64]) -> Result<TheilSen, MetricsError> {
    if x.len() != y.len() {
        return Err(MetricsError::LengthMismatch {
            statistic: "theil_sen",
            left: x.len(),
            right: y.len(),
        });
    }
    finite("theil_sen", x)?;
    finite("theil_sen", y)?;
    let mut slopes = Vec::with_capacity(x.len() * x.len() / 2);
    for i in 0..x.len() {
        for j in i + 1..x.len() {
            let dx = x[j] - x[i];
            if dx != 0.0 {
                slopes.push((y[j] - y[i]) / dx);
            }
        }
    }
    if slopes.is_empty() {
        return Err(MetricsError::OutOfRange {
            statistic: "theil_sen",
            expected: "at least two different x",
            found: x[0],
        });
    }
    let slope = median(&slopes)?;
    Ok(TheilSen { slope, intercept: median(y)? - slope * median(x)? })
}

/// Kullback–Leibler divergence `Σ p (ln p − ln q)` in nats of two next-token distributions given
/// as logits over the same vocabulary; log-softmax and sum in f64 (§1.5.1). Never below 0.
///
/// # Errors
/// Different lengths, no logits, NaN or +∞. −∞ is a token of probability zero; where the
/// reference allows a token that the other excludes, the divergence is +∞.
pub fn kld_from_logits(reference: &[f32], other: &[f32]) -> Result<f64, MetricsError> {
    check_lengths("kld", reference.len(), other.len())?;
    LogProbabilities::of(reference)?.kld(&LogProbabilities::of(other)?)
}

/// [`kld_from_logits`] of probabilities.
///
/// # Errors
/// Different lengths, a probability outside [0, 1], or a sum that is not 1 within 1e-6.
pub fn kld_probabilities(reference: &[f64], other: &[f64]) -> Result<f64, MetricsError> {
    check_lengths("kld", reference.len(), other.len())?;
    for distribution in [reference, other] {
        finite("kld", distribution)?;
        let total: f64 = distribution.iter().sum();
        if let Some(&found) = distribution.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return Err(MetricsError::OutOfRange {
                statistic: "kld",
                expected: "probabilities in [0, 1]",
                found,
            });
        }
        if (total - 1.0).abs() > 1e-6 {
            return Err(MetricsError::OutOfRange {
                statistic: "kld",
                expected: "probabilities that sum to 1",
                found: total,
            });
        }
    }
    let logs = |values: &[f64]| values.iter().map(|p| p.ln()).collect::<Vec<_>>();
    Ok(kld_of_logs(&logs(reference), &logs(other)))
}

fn check_lengths(statistic: &'static str, left: usize, right: usize) -> Result<(), MetricsError> {
    if left == right {
        Ok(())
    } else {
        Err(MetricsError::LengthMismatch { statistic, left, right })
    }
}

/// Percentile-bootstrap 95% interval of the median from `n_draws` resamples. The draws depend on
/// `seed` only, so a report can be recomputed.
///
/// # Errors
/// No values, one that is not finite, or no draws.
pub fn bootstrap_median(
    values: &[f64],
    n_draws: usize,
    seed: u64,
) -> Result<Interval, MetricsError> {
    finite("bootstrap_median", values)?;
    let mut state = seed;
    let mut medians = Vec::with_capacity(n_draws);
    let mut sample = vec![0.0; values.len()];
    for _ in 0..n_draws {
        for slot in &mut sample {
            *slot = values[draw_below(&mut state, values.len())];
        }
        medians.push(median(&sample)?);
    }
    Ok(Interval { low: quantile(&medians, 0.025)?, high: quantile(&medians, 0.975)? })
}

/// One step of SplitMix64 (Steele, Lea and Flood 2014), scaled to `0..n` by the high half of the
/// product.
fn draw_below(state: &mut u64, n: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    #[expect(clippy::cast_possible_truncation, reason = "the product's high half is below n")]
    let index = ((u128::from(z) * n as u128) >> 64) as usize;
    index
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(crate) fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Values of scipy's `beta.ppf(0.95, k + 1, n − k)`.
    #[test]
    fn binomial_upper_is_the_quantile_of_the_beta_distribution() {
        for (k, n, expected) in [
            (0, 1, 0.95),
            (0, 180, 0.016_505),
            (0, 100, 0.029_513),
            (1, 100, 0.046_560),
            (5, 10, 0.777_559),
        ] {
            let upper = binomial_upper(k, n).expect("valid counts");
            assert!((upper - expected).abs() < 1e-5, "{k} of {n}: {upper}");
        }
        assert_eq!(binomial_upper(3, 3).expect("valid counts"), 1.0);
        assert!(binomial_upper(0, 0).is_err() && binomial_upper(3, 2).is_err());
        let rule_of_three = binomial_upper(0, 100_000).expect("valid counts") * 1e5;
        assert!((rule_of_three - 3.0).abs() < 0.01, "{rule_of_three}");
    }

    #[test]
    fn six_of_six_has_a_lower_bound_of_0_61() {
        let interval = wilson(6, 6).expect("valid counts");
        assert!((interval.low - 0.6097).abs() < 5e-5);
        assert!((interval.high - 1.0).abs() < 1e-12);
    }

    #[test]
    fn bad_input_is_named() {
        assert_eq!(mean(&[]), Err(MetricsError::Empty { statistic: "mean" }));
        assert!(median(&[1.0, f64::NAN]).is_err());
        assert!(quantile(&[1.0], 1.5).is_err());
        assert!(wilson(0, 0).is_err() && wilson(3, 2).is_err());
        assert!(theil_sen(&[1.0, 1.0], &[1.0, 2.0]).is_err());
        assert!(theil_sen(&[1.0], &[1.0, 2.0]).is_err());
        assert!(kld_from_logits(&[], &[]).is_err());
        assert!(kld_from_logits(&[f32::NAN], &[0.0]).is_err());
        assert!(kld_probabilities(&[0.5, 0.4], &[0.5, 0.5]).is_err());
        assert!(bootstrap_median(&[1.0], 0, 1).is_err());
    }

    #[test]
    fn excluded_token_is_an_infinite_divergence() {
        let masked = [0.0, f32::NEG_INFINITY];
        assert_eq!(kld_from_logits(&masked, &[0.0, 0.0]), Ok(std::f64::consts::LN_2));
        assert_eq!(kld_from_logits(&[0.0, 0.0], &masked), Ok(f64::INFINITY));
    }

    #[test]
    fn two_empty_sets_have_no_jaccard() {
        let set = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        assert_eq!(jaccard(&set(&[]), &set(&[])), None);
        assert_eq!(jaccard(&set(&["a"]), &set(&[])), Some(0.0));
        assert_eq!(jaccard(&set(&["a", "b"]), &set(&["b", "c", "d"])), Some(0.25));
    }

    #[test]
    fn one_wild_point_does_not_bend_the_line() {
        let x = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let y = [1.0, 3.0, 5.0, 7.0, 900.0, 11.0];
        let line = theil_sen(&x, &y).expect("valid series");
        assert!((line.slope - 2.0).abs() < 1e-12);
    }

    #[test]
    fn bootstrap_is_reproducible_and_holds_the_median() {
        let values: Vec<f64> = (0..40).map(f64::from).collect();
        let first = bootstrap_median(&values, 500, 7).expect("valid");
        assert_eq!(first, bootstrap_median(&values, 500, 7).expect("valid"));
        assert!(first.low < 19.5 && 19.5 < first.high);
    }

    proptest! {
        #[test]
        fn divergence_of_itself_is_zero_and_never_negative(
            p in prop::collection::vec(-20.0f32..20.0, 5),
            q in prop::collection::vec(-20.0f32..20.0, 5),
        ) {
            prop_assert_eq!(kld_from_logits(&p, &p), Ok(0.0));
            prop_assert!(kld_from_logits(&p, &q).expect("finite logits") >= 0.0);
            // A constant added to all logits changes nothing.
            let shifted: Vec<f32> = p.iter().map(|x| x + 1.0).collect();
            prop_assert!(kld_from_logits(&p, &shifted).expect("finite logits") < 1e-9);
        }

        #[test]
        fn auroc_swaps_to_its_complement_and_ignores_scale(
            a in prop::collection::vec(0u8..10, 1..20), b in prop::collection::vec(0u8..10, 1..20)
        ) {
            let (a, b): (Vec<f64>, Vec<f64>) =
                (a.iter().map(|&x| x.into()).collect(), b.iter().map(|&x| x.into()).collect());
            let value = auroc(&a, &b).expect("finite");
            prop_assert!((value + auroc(&b, &a).expect("finite") - 1.0).abs() < 1e-12);
            let cube = |values: &[f64]| values.iter().map(|x| x.powi(3)).collect::<Vec<_>>();
            prop_assert!((value - auroc(&cube(&a), &cube(&b)).expect("finite")).abs() < 1e-12);
        }

        #[test]
        fn quantiles_are_ordered_and_inside(
            values in prop::collection::vec(-5.0f64..5.0, 1..40), p in 0.0f64..1.0, r in 0.0f64..1.0
        ) {
            let (low, high) = (quantile(&values, 0.0).expect("valid"), quantile(&values, 1.0).expect("valid"));
            let (a, b) = (quantile(&values, p.min(r)).expect("valid"), quantile(&values, p.max(r)).expect("valid"));
            prop_assert!(low <= a && a <= b && b <= high);
        }

        #[test]
        fn wilson_holds_the_share(n in 1usize..200, part in 0.0f64..=1.0) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in 0..=n")]
            let successes = (part * count(n)) as usize;
            let interval = wilson(successes, n).expect("valid counts");
            let share = count(successes) / count(n);
            prop_assert!(0.0 <= interval.low && interval.low <= share);
            prop_assert!(share <= interval.high && interval.high <= 1.0);
        }
    }
}
