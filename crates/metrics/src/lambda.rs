//! λ, the stability of answers over paraphrases and seeds (§1.3). Stability, not truth: a system
//! that always gives the same wrong answer is convergent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::MetricsError;
use crate::statistics::{Interval, jaccard, wilson};

const MIN_CITATION_JACCARD: f64 = 0.70;
const MIN_RETRIEVE_JACCARD: f64 = 0.70;
const SENSITIVITY_MARGIN: f64 = 0.2;
/// Fewest items on which a release may be decided.
const MIN_RELEASE_ITEMS: usize = 50;

/// One run of a probe, after its answer got a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which paraphrase was asked.
    pub paraphrase: usize,
    /// Which seed was drawn.
    pub seed: usize,
    /// Class of the answer.
    pub class: usize,
    /// The snippets that the answer cites.
    pub citations: BTreeSet<String>,
    /// What kind of run this was.
    pub kind: RunKind,
}

/// What a run's output was, as far as λ needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// An answer that has to cite.
    Answer,
    /// An answer that need not cite, such as a refusal.
    NoCitationRequired,
    /// Invalid, empty, timed out or NaN.
    Invalid,
    /// The loop detector stopped it (G-19).
    Looped,
}

/// The four states, in the order of their numeric export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LambdaState {
    /// → (0): at least 5 of 6 agree, on the same citations. The only state that passes.
    Convergent,
    /// ← (1): everything else.
    Divergent,
    /// <> (2): at least one run went round in circles.
    Recursive,
    /// × (3): a third of the runs is invalid, or no class holds more than a third.
    Chaotic,
}

impl LambdaState {
    /// The number under which monitoring systems store the state: 0 →, 1 ←, 2 <>, 3 × (C-18).
    #[must_use]
    pub fn export(self) -> u8 {
        match self {
            LambdaState::Convergent => 0,
            LambdaState::Divergent => 1,
            LambdaState::Recursive => 2,
            LambdaState::Chaotic => 3,
        }
    }
}

impl fmt::Display for LambdaState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            LambdaState::Convergent => "convergent",
            LambdaState::Divergent => "divergent",
            LambdaState::Recursive => "recursive",
            LambdaState::Chaotic => "chaotic",
        })
    }
}

/// Which axis a divergence follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubLabel {
    /// Seeds agree where paraphrases do not.
    ParaphraseSensitive,
    /// Paraphrases agree where seeds do not.
    SeedSensitive,
    /// Neither axis stands out.
    Mixed,
}

impl fmt::Display for SubLabel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            SubLabel::ParaphraseSensitive => "paraphrase sensitive",
            SubLabel::SeedSensitive => "seed sensitive",
            SubLabel::Mixed => "mixed",
        })
    }
}

/// λ of one item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lambda {
    /// The state.
    pub state: LambdaState,
    /// Share of the largest class, in [1/N, 1].
    pub c: f64,
    /// Entropy of the class sizes in nats, in [0, ln N].
    pub se: f64,
    /// Mean pairwise Jaccard index of the citation sets, in [0, 1].
    pub cit: f64,
    /// Share of the same-paraphrase pairs of seeds that agree; none if there is no such pair.
    pub a_s: Option<f64>,
    /// Share of the same-seed pairs of paraphrases that agree; none if there is no such pair.
    pub a_p: Option<f64>,
    /// Which axis a divergence follows; only for [`LambdaState::Divergent`].
    pub sub_label: Option<SubLabel>,
}

/// λ of the runs of one item; 3 paraphrases × 2 seeds in the specification.
///
/// # Errors
/// No runs.
pub fn lambda(runs: &[Run]) -> Result<Lambda, MetricsError> {
    let sizes = class_sizes(runs);
    let Some(&greatest) = sizes.iter().max() else {
        return Err(MetricsError::Empty { statistic: "lambda" });
    };
    let n_runs = runs.len();
    let n_invalid = runs.iter().filter(|run| run.kind == RunKind::Invalid).count();
    let looped = runs.iter().any(|run| run.kind == RunKind::Looped);
    let cit = citation_agreement(runs);
    let a_s = pair_agreement(runs, |a, b| a.paraphrase == b.paraphrase && a.seed != b.seed);
    let a_p = pair_agreement(runs, |a, b| a.seed == b.seed && a.paraphrase != b.paraphrase);
    // In whole numbers, so that 2 of 6 is exactly a third and 4 of 5 exactly 0.80.
    let state = if 3 * n_invalid >= n_runs || 3 * greatest <= n_runs {
        LambdaState::Chaotic
    } else if looped {
        LambdaState::Recursive
    } else if 5 * greatest >= 4 * n_runs && cit >= MIN_CITATION_JACCARD && n_invalid == 0 {
        LambdaState::Convergent
    } else {
        LambdaState::Divergent
    };
    let sub_label = (state == LambdaState::Divergent).then(|| sub_label(a_s, a_p));
    let se = semantic_entropy(&sizes);
    Ok(Lambda { state, c: share(greatest, n_runs), se, cit, a_s, a_p, sub_label })
}

fn sub_label(a_s: Option<f64>, a_p: Option<f64>) -> SubLabel {
    match (a_s, a_p) {
        (Some(a_s), Some(a_p)) if a_s - a_p > SENSITIVITY_MARGIN => SubLabel::ParaphraseSensitive,
        (Some(a_s), Some(a_p)) if a_p - a_s > SENSITIVITY_MARGIN => SubLabel::SeedSensitive,
        _ => SubLabel::Mixed,
    }
}

fn class_sizes(runs: &[Run]) -> Vec<usize> {
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    for run in runs {
        *sizes.entry(run.class).or_default() += 1;
    }
    sizes.into_values().collect()
}

/// Semantic entropy `−Σ (nₖ/N) ln(nₖ/N)` of class sizes, in nats (Farquhar et al. 2024); empty
/// classes add nothing, and no runs at all have entropy 0.
#[must_use]
pub fn semantic_entropy(class_sizes: &[usize]) -> f64 {
    let n_runs: usize = class_sizes.iter().sum();
    let occupied = class_sizes.iter().filter(|&&size| size > 0);
    let entropy: f64 = occupied.map(|&size| -share(size, n_runs) * share(size, n_runs).ln()).sum();
    // One class gives −0.
    entropy.max(0.0)
}

/// Two empty sets agree only where neither run had to cite. One run alone agrees with itself.
fn citation_agreement(runs: &[Run]) -> f64 {
    let free = |run: &Run| run.kind == RunKind::NoCitationRequired;
    let pair = |a: &Run, b: &Run| {
        let both_empty = if free(a) && free(b) { 1.0 } else { 0.0 };
        jaccard(&a.citations, &b.citations).unwrap_or(both_empty)
    };
    mean_over_pairs(runs, pair).unwrap_or(1.0)
}

/// Mean Jaccard index over all pairs of sets, for the stages before the answer; two empty sets
/// count 0, because two failed retrievals are no agreement. None for fewer than two sets.
#[must_use]
pub fn mean_pairwise_jaccard(sets: &[BTreeSet<String>]) -> Option<f64> {
    mean_over_pairs(sets, |a, b| jaccard(a, b).unwrap_or(0.0))
}

/// Whether the retrieve stage is convergent: mean pairwise Jaccard@k ≥ 0.70 (§1.3.7).
#[must_use]
pub fn retrieve_converges(sets: &[BTreeSet<String>]) -> bool {
    mean_pairwise_jaccard(sets).is_some_and(|mean| mean >= MIN_RETRIEVE_JACCARD)
}

fn mean_over_pairs<T>(items: &[T], value: impl Fn(&T, &T) -> f64) -> Option<f64> {
    let mut total = 0.0;
    let mut n_pairs = 0;
    for (index, a) in items.iter().enumerate() {
        for b in &items[index + 1..] {
            total += value(a, b);
            n_pairs += 1;
        }
    }
    (n_pairs > 0).then(|| total / f64::from(n_pairs))
}

fn pair_agreement(runs: &[Run], belongs: impl Fn(&Run, &Run) -> bool) -> Option<f64> {
    let (mut n_same, mut n_pairs) = (0, 0);
    for (index, a) in runs.iter().enumerate() {
        for b in runs[index + 1..].iter().filter(|b| belongs(a, b)) {
            n_pairs += 1;
            n_same += usize::from(a.class == b.class);
        }
    }
    (n_pairs > 0).then(|| share(n_same, n_pairs))
}

/// What λ over many items says about a release (§1.3.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Release {
    /// At least 50 items, rate ≥ 0.90, Wilson lower bound ≥ 0.80, none chaotic.
    Pass,
    /// An item is chaotic, or the rate is too low whatever further items would show.
    Fail,
    /// Too few items to decide.
    TooFew,
}

/// Decides a release on the counts of items, with the Wilson interval of the convergent rate.
/// Fewer than 50 items can fail, by a chaotic one or by an interval wholly below 0.90, but never
/// pass.
///
/// # Errors
/// No items, or more convergent than items.
pub fn release(
    n_convergent: usize,
    n_chaotic: usize,
    n_items: usize,
) -> Result<(Release, Interval), MetricsError> {
    let interval = wilson(n_convergent, n_items)?;
    let enough = n_items >= MIN_RELEASE_ITEMS;
    let good = 10 * n_convergent >= 9 * n_items && interval.low >= 0.80;
    let decision = if n_chaotic > 0 || interval.high < 0.90 || (enough && !good) {
        Release::Fail
    } else if enough {
        Release::Pass
    } else {
        Release::TooFew
    };
    Ok((decision, interval))
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Six runs, paraphrase-major: (0,0) (0,1) (1,0) (1,1) (2,0) (2,1).
    fn runs(classes: [usize; 6]) -> Vec<Run> {
        let run = |(index, class)| Run {
            paraphrase: index / 2,
            seed: index % 2,
            class,
            citations: BTreeSet::from(["s1".to_owned()]),
            kind: RunKind::Answer,
        };
        classes.into_iter().enumerate().map(run).collect()
    }

    fn state(runs: &[Run]) -> LambdaState {
        lambda(runs).expect("runs are given").state
    }

    #[test]
    fn semantic_entropy_table_of_the_specification() {
        let table = [
            (vec![6], 0.0),
            (vec![5, 1], 0.451),
            (vec![4, 2], 0.637),
            (vec![3, 3], 0.693),
            (vec![1; 6], 1.792),
        ];
        for (sizes, expected) in table {
            assert!((semantic_entropy(&sizes) - expected).abs() < 5e-4, "{sizes:?}");
        }
    }

    #[test]
    fn constant_perfect_run_is_convergent() {
        let result = lambda(&runs([0; 6])).expect("six runs");
        assert_eq!(result.state, LambdaState::Convergent);
        assert_eq!((result.c, result.se, result.cit), (1.0, 0.0, 1.0));
        assert_eq!((result.a_s, result.a_p, result.sub_label), (Some(1.0), Some(1.0), None));
    }

    #[test]
    fn states_by_class_sizes() {
        assert_eq!(state(&runs([0, 0, 0, 0, 0, 1])), LambdaState::Convergent);
        assert_eq!(state(&runs([0, 0, 0, 0, 1, 1])), LambdaState::Divergent);
        assert_eq!(state(&runs([0, 0, 0, 1, 1, 1])), LambdaState::Divergent);
        assert_eq!(state(&runs([0, 0, 1, 1, 2, 2])), LambdaState::Chaotic);
        assert_eq!(state(&runs([0, 1, 2, 3, 4, 5])), LambdaState::Chaotic);
    }

    #[test]
    fn invalid_runs_forbid_convergence_and_a_third_is_chaos() {
        let mut six = runs([0, 0, 0, 0, 0, 1]);
        six[5].kind = RunKind::Invalid;
        assert_eq!(state(&six), LambdaState::Divergent);
        six[4].kind = RunKind::Invalid;
        assert_eq!(state(&six), LambdaState::Chaotic);
    }

    #[test]
    fn one_loop_is_recursive() {
        let mut six = runs([0; 6]);
        six[2].kind = RunKind::Looped;
        assert_eq!(state(&six), LambdaState::Recursive);
    }

    #[test]
    fn same_answer_on_other_citations_diverges() {
        let mut six = runs([0; 6]);
        for (index, run) in six.iter_mut().enumerate() {
            run.citations = BTreeSet::from([format!("s{}", index % 2)]);
        }
        assert_eq!(state(&six), LambdaState::Divergent);
    }

    #[test]
    fn missing_citations_count_one_only_when_none_is_required() {
        let mut six = runs([0; 6]);
        for run in &mut six {
            run.citations.clear();
        }
        assert_eq!(lambda(&six).expect("six runs").cit, 0.0);
        for run in &mut six {
            run.kind = RunKind::NoCitationRequired;
        }
        assert_eq!(state(&six), LambdaState::Convergent);
    }

    #[test]
    fn the_axis_of_a_divergence_is_named() {
        let label = |classes| lambda(&runs(classes)).expect("six runs").sub_label;
        assert_eq!(label([0, 0, 0, 0, 1, 1]), Some(SubLabel::ParaphraseSensitive));
        assert_eq!(label([0, 1, 0, 1, 0, 1]), Some(SubLabel::SeedSensitive));
        assert_eq!(label([0, 0, 0, 1, 1, 0]), Some(SubLabel::Mixed));
    }

    #[test]
    fn release_rule_of_the_specification() {
        let decide = |convergent, chaotic, n| release(convergent, chaotic, n).expect("counts").0;
        assert_eq!(decide(46, 0, 50), Release::Pass);
        assert_eq!(decide(45, 0, 50), Release::Fail);
        assert_eq!(decide(90, 0, 100), Release::Pass);
        assert_eq!(decide(89, 0, 100), Release::Fail);
        assert_eq!(decide(49, 1, 50), Release::Fail);
        assert_eq!(decide(10, 0, 10), Release::TooFew);
        assert_eq!(decide(0, 0, 10), Release::Fail);
        assert!(release(0, 0, 0).is_err());
    }

    #[test]
    fn export_numbers() {
        let states = [
            LambdaState::Convergent,
            LambdaState::Divergent,
            LambdaState::Recursive,
            LambdaState::Chaotic,
        ];
        assert_eq!(states.map(LambdaState::export), [0, 1, 2, 3]);
    }

    #[test]
    fn power_of_one_screen() {
        // §1.3.8: if a run agrees with probability p, at least 5 of 6 do with these.
        for (p, expected) in [(0.9_f64, 0.89), (0.8, 0.66), (0.7, 0.42)] {
            let passes = p.powi(6) + 6.0 * p.powi(5) * (1.0 - p);
            assert!((passes - expected).abs() < 0.005);
        }
    }

    #[test]
    fn failed_retrievals_do_not_agree() {
        let empty = vec![BTreeSet::new(), BTreeSet::new()];
        assert!(!retrieve_converges(&empty));
        assert_eq!(mean_pairwise_jaccard(&empty[..1]), None);
    }

    proptest! {
        #[test]
        fn ranges_hold_and_class_names_do_not_matter(
            classes in prop::array::uniform6(0usize..6), shift in 1usize..9
        ) {
            let result = lambda(&runs(classes)).expect("six runs");
            prop_assert!((1.0 / 6.0..=1.0).contains(&result.c));
            prop_assert!((0.0..=6.0f64.ln() + 1e-12).contains(&result.se));
            prop_assert!((0.0..=1.0).contains(&result.cit));
            prop_assert_eq!(&result, &lambda(&runs(classes.map(|c| c + shift))).expect("six runs"));
        }

        #[test]
        fn swapping_the_seeds_changes_nothing(classes in prop::array::uniform6(0usize..3)) {
            let mut swapped = runs(classes);
            for run in &mut swapped {
                run.seed = 1 - run.seed;
            }
            prop_assert_eq!(lambda(&swapped), lambda(&runs(classes)));
        }
    }
}
