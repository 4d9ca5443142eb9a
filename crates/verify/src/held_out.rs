//! What a gate does to questions that its thresholds have not seen.
//!
//! The gold set is cut in halves by a hash of the item's id. The thresholds are fitted on one half
//! and judge the other, then the other way round, so that each question is judged once by
//! thresholds of the half without it and no lucky half decides.

use exrail_metrics::{Interval, MetricsError, Thresholds, wilson};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Seed of the split that counts.
const SEED: u64 = 1;

/// Splits over which the errors are averaged, seeds 1 to this.
const N_SPLITS: u64 = 20;

/// Fewest questions of a kind in a half: below it a 5th percentile is the least value.
const MIN_HALF: usize = 20;

/// Largest share of the unanswerable let in, and of the answerable lost, of a gate that holds.
pub(crate) const MAX_ERROR: f64 = 0.05;

/// The errors of a signal on questions that its thresholds have not seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOut {
    /// Seed of the split: item `id` is in half `sha256("{seed}:{id}")[0] mod 2`.
    pub seed: u64,
    /// Fitted on half 0 and measured on half 1, then fitted on half 1 and measured on half 0.
    pub halves: [HeldOutErrors; 2],
    /// Both measurements together.
    pub pooled: HeldOutErrors,
    /// The same for other splits.
    pub splits: Splits,
}

/// What a gate got wrong.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOutErrors {
    /// Unanswerable questions that were not refused.
    pub let_in: Rate,
    /// Answerable questions that were refused.
    pub lost: Rate,
    /// Answerable questions that were not refused although their page was taken away. Another page
    /// may still answer some of them. None where nothing is left without their page.
    pub masked_let_in: Option<Rate>,
    /// Other wordings of answerable questions that were refused. No threshold is fitted on
    /// wordings: this is what the choice of words of a gold set hides. None without wordings.
    pub lost_worded: Option<Rate>,
}

/// A share with its sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Questions that count.
    pub n: usize,
    /// Questions asked.
    pub of: usize,
    /// `n / of`.
    pub share: f64,
    /// Wilson's 95% interval.
    pub interval: Interval,
}

/// Pooled errors over several splits of the same questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Splits {
    /// Number of splits, seeds 1 to this.
    pub n: u64,
    /// Mean share of the unanswerable let in.
    pub let_in_mean: f64,
    /// Largest share of the unanswerable let in.
    pub let_in_max: f64,
    /// Mean share of the answerable lost.
    pub lost_mean: f64,
    /// Largest share of the answerable lost.
    pub lost_max: f64,
}

impl HeldOut {
    /// Whether the gate lets at most 5% of the unanswerable in and loses at most 5% of the
    /// answerable, both halves together.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.pooled.let_in.share <= MAX_ERROR && self.pooled.lost.share <= MAX_ERROR
    }
}

/// The half of an item.
fn half(seed: u64, id: &str) -> u8 {
    Sha256::digest(format!("{seed}:{id}").as_bytes())[0] & 1
}

/// The readings of one signal, by item id.
pub(crate) struct Sets<'a, T> {
    pub(crate) answerable: &'a [(&'a str, T)],
    pub(crate) masked: &'a [(&'a str, T)],
    pub(crate) worded: &'a [(&'a str, T)],
    pub(crate) unanswerable: &'a [(&'a str, T)],
    pub(crate) off_topic: &'a [(&'a str, T)],
}

/// Measures a signal on held-out halves. `value` makes a number of a reading, given the off-topic
/// readings of the half that is fitted: what a signal learns, it learns there. None where a half
/// has too few questions of a kind, or where `value` can make none.
///
/// # Errors
/// A value is not finite.
pub(crate) fn held_out<T: Copy>(
    sets: &Sets<'_, T>,
    value: &dyn Fn(&[T], T) -> Option<f64>,
) -> Result<Option<HeldOut>, MetricsError> {
    let (mut chosen, mut pooled) = (None, Vec::new());
    for seed in 1..=N_SPLITS {
        let halves = [measure(sets, seed, 0, value)?, measure(sets, seed, 1, value)?];
        let [Some(first), Some(second)] = halves else { return Ok(None) };
        let both = first.with(&second)?;
        if seed == SEED {
            chosen = Some(([first, second], both));
        }
        pooled.push(both);
    }
    let Some((halves, both)) = chosen else { return Ok(None) };
    let (let_in_mean, let_in_max) = mean_and_max(pooled.iter().map(|errors| errors.let_in.share));
    let (lost_mean, lost_max) = mean_and_max(pooled.iter().map(|errors| errors.lost.share));
    let splits = Splits { n: N_SPLITS, let_in_mean, let_in_max, lost_mean, lost_max };
    Ok(Some(HeldOut { seed: SEED, halves, pooled: both, splits }))
}

/// Fits on half `fitted` and measures on the other.
fn measure<T: Copy>(
    sets: &Sets<'_, T>,
    seed: u64,
    fitted: u8,
    value: &dyn Fn(&[T], T) -> Option<f64>,
) -> Result<Option<HeldOutErrors>, MetricsError> {
    let of_half = |set: &[(&str, T)], which: u8| -> Vec<T> {
        set.iter().filter(|(id, _)| half(seed, id) == which).map(|(_, reading)| *reading).collect()
    };
    let off_topic = of_half(sets.off_topic, fitted);
    let values = |set: &[(&str, T)], which: u8| -> Option<Vec<f64>> {
        of_half(set, which).into_iter().map(|reading| value(&off_topic, reading)).collect()
    };
    let other = 1 - fitted;
    let (Some(a), Some(u)) = (values(sets.answerable, fitted), values(sets.unanswerable, fitted))
    else {
        return Ok(None);
    };
    let judged = [sets.answerable, sets.unanswerable, sets.masked, sets.worded];
    let judged = judged.map(|set| values(set, other));
    let [Some(answerable), Some(unanswerable), Some(masked), Some(worded)] = judged else {
        return Ok(None);
    };
    if [&a, &u, &answerable, &unanswerable].iter().any(|set| set.len() < MIN_HALF) {
        return Ok(None);
    }
    let thresholds = Thresholds::fit(&a, &u)?;
    let refused = |set: &[f64]| set.iter().filter(|raw| thresholds.refuse(**raw)).count();
    let let_in = |set: &[f64]| Rate::of(set.len() - refused(set), set.len());
    let lost = |set: &[f64]| Rate::of(refused(set), set.len());
    Ok(Some(HeldOutErrors {
        let_in: let_in(&unanswerable)?,
        lost: lost(&answerable)?,
        masked_let_in: if masked.is_empty() { None } else { Some(let_in(&masked)?) },
        lost_worded: if worded.is_empty() { None } else { Some(lost(&worded)?) },
    }))
}

impl Rate {
    fn of(n: usize, of: usize) -> Result<Rate, MetricsError> {
        #[expect(clippy::cast_precision_loss, reason = "question counts are far below 2^52")]
        let share = n as f64 / of as f64;
        Ok(Rate { n, of, share, interval: wilson(n, of)? })
    }

    fn with(&self, other: &Rate) -> Result<Rate, MetricsError> {
        Rate::of(self.n + other.n, self.of + other.of)
    }
}

impl HeldOutErrors {
    fn with(&self, other: &HeldOutErrors) -> Result<HeldOutErrors, MetricsError> {
        Ok(HeldOutErrors {
            let_in: self.let_in.with(&other.let_in)?,
            lost: self.lost.with(&other.lost)?,
            masked_let_in: both(self.masked_let_in, other.masked_let_in)?,
            lost_worded: both(self.lost_worded, other.lost_worded)?,
        })
    }
}

fn both(first: Option<Rate>, second: Option<Rate>) -> Result<Option<Rate>, MetricsError> {
    match (first, second) {
        (Some(first), Some(second)) => Ok(Some(first.with(&second)?)),
        (first, second) => Ok(first.or(second)),
    }
}

fn mean_and_max(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut sum, mut n, mut max) = (0.0, 0.0, 0.0_f64);
    for value in values {
        (sum, n, max) = (sum + value, n + 1.0, max.max(value));
    }
    (sum / n, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` readings from `low` to `high`, with ids of their own.
    fn set(name: &str, low: f64, high: f64, n: u32) -> Vec<(String, f64)> {
        let step = (high - low) / f64::from(n - 1);
        (0..n).map(|i| (format!("{name}{i}"), low + step * f64::from(i))).collect()
    }

    fn measured(sets: [&[(String, f64)]; 4]) -> Option<HeldOut> {
        let [answerable, masked, unanswerable, off_topic] =
            sets.map(|set| set.iter().map(|(id, value)| (id.as_str(), *value)).collect::<Vec<_>>());
        let sets = Sets {
            answerable: &answerable,
            masked: &masked,
            worded: &masked,
            unanswerable: &unanswerable,
            off_topic: &off_topic,
        };
        held_out(&sets, &|_, value| Some(value)).unwrap()
    }

    #[test]
    fn separated_sets_have_no_error_in_either_half() {
        let (a, u) = (set("a", 0.1, 0.3, 100), set("u", 0.6, 0.8, 100));
        let found = measured([&a, &a, &u, &u]).unwrap();
        assert!(found.holds());
        let [first, second] = &found.halves;
        assert_eq!((first.let_in.n, first.lost.n, second.let_in.n, second.lost.n), (0, 0, 0, 0));
        assert_eq!(first.let_in.of + second.let_in.of, 100, "each question is judged once");
        assert!(first.let_in.of > 30 && second.let_in.of > 30, "the halves are halves");
        assert_eq!(found.pooled.masked_let_in.unwrap().n, 100, "the same values are let in");
        assert!(found.pooled.let_in.interval.high > 0.0, "no error in 100 is no proof of none");
    }

    #[test]
    fn equal_sets_let_in_what_they_do_not_lose() {
        let (a, u) = (set("a", 0.1, 0.9, 200), set("u", 0.1, 0.9, 200));
        let found = measured([&a, &a, &u, &u]).unwrap();
        assert!(!found.holds());
        let sum = found.pooled.let_in.share + found.pooled.lost.share;
        assert!((sum - 1.0).abs() < 0.15, "{sum}");
        assert!(found.splits.let_in_max >= found.splits.let_in_mean);
    }

    #[test]
    fn too_few_questions_are_no_measurement() {
        let (a, u) = (set("a", 0.1, 0.3, 100), set("u", 0.6, 0.8, 30));
        assert_eq!(measured([&a, &a, &u, &u]), None);
    }

    #[test]
    fn a_signal_learns_from_the_fitted_half_only() {
        let (a, u) = (set("a", 0.1, 0.3, 100), set("u", 0.6, 0.8, 100));
        let (a, u) = (borrowed(&a), borrowed(&u));
        let sets =
            Sets { answerable: &a, masked: &a, worded: &[], unanswerable: &u, off_topic: &u };
        let sizes = std::sync::Mutex::new(std::collections::BTreeSet::new());
        held_out(&sets, &|off_topic: &[f64], value| {
            sizes.lock().unwrap().insert(off_topic.len());
            Some(value)
        })
        .unwrap();
        assert!(sizes.lock().unwrap().iter().all(|size| *size < 80), "never all 100");
        assert_eq!(held_out(&sets, &|_, _| None).unwrap(), None);
    }

    fn borrowed(set: &[(String, f64)]) -> Vec<(&str, f64)> {
        set.iter().map(|(id, value)| (id.as_str(), *value)).collect()
    }
}
