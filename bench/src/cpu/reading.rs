//! Single measurements, and what two sides' measurements of one test say together.

use std::collections::BTreeSet;

use anyhow::Result;
use exrail_metrics::median;
use serde::Serialize;

use super::{Side, Turn};

/// What was measured, and in which unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "test", rename_all = "snake_case")]
pub(super) enum Test {
    /// Tokens of a prompt per second, into an empty cache.
    Prefill {
        /// Length of the prompt.
        tokens: usize,
    },
    /// Tokens of all sequences per second.
    Decode {
        /// Cached positions of each sequence before.
        depth: usize,
        /// Sequences at once.
        batch: usize,
    },
    /// Tokens of one sequence per second where only the most likely one is asked for. The peer has
    /// no such way: its side of this is [`Test::Decode`].
    Greedy {
        /// Cached positions before.
        depth: usize,
    },
    /// Seconds from the start of a process to its end, one token in between.
    FirstToken,
    /// Bytes of the process after that token.
    Resident,
    /// Bytes of the process at their most until that token.
    Peak,
    /// [`Test::Resident`] over the bytes of weights and KV pool; ours only.
    ResidentRatio,
}

impl Test {
    /// For tables.
    pub(super) fn name(self) -> String {
        match self {
            Test::Prefill { tokens } => format!("prefill {tokens}, tok/s"),
            Test::Decode { depth, batch } => format!("decode @{depth} x{batch}, tok/s"),
            Test::Greedy { depth } => format!("greedy decode @{depth}, tok/s"),
            Test::FirstToken => "load to first token, s".to_owned(),
            Test::Resident => "resident, MB".to_owned(),
            Test::Peak => "resident at most, MB".to_owned(),
            Test::ResidentRatio => "resident / (weights + KV)".to_owned(),
        }
    }

    /// A value as [`Test::name`] announces it.
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Test::Prefill { .. } | Test::Decode { .. } | Test::Greedy { .. } => {
                format!("{value:.1}")
            }
            Test::FirstToken | Test::ResidentRatio => format!("{value:.3}"),
            Test::Resident | Test::Peak => format!("{:.1}", value / 1e6),
        }
    }
}

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Reading {
    #[serde(flatten)]
    pub(super) test: Test,
    pub(super) value: f64,
}

/// Samples of one side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Samples {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) n: usize,
}

/// Both sides on one test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    #[serde(flatten)]
    pub(super) test: Test,
    pub(super) exrail: Option<Samples>,
    pub(super) llama_cpp: Option<Samples>,
    /// Ours over theirs: the ratio of the medians.
    pub(super) ratio: Option<f64>,
    /// The same of each round alone, smallest and largest: how far to trust the ratio.
    pub(super) ratio_range: Option<[f64; 2]>,
}

/// Every test that a turn has, in order.
pub(super) fn compare(turns: &[Turn]) -> Result<Vec<Comparison>> {
    let tests: BTreeSet<Test> = turns.iter().flat_map(|t| &t.readings).map(|r| r.test).collect();
    tests.into_iter().map(|test| compare_one(turns, test)).collect()
}

fn compare_one(turns: &[Turn], test: Test) -> Result<Comparison> {
    let exrail = samples(&values(turns, Side::Exrail, test))?;
    let llama_cpp = samples(&values(turns, Side::LlamaCpp, test))?;
    let mut ratios = Vec::new();
    for round in turns.iter().map(|turn| turn.round).collect::<BTreeSet<_>>() {
        let turns: Vec<Turn> = turns.iter().filter(|t| t.round == round).cloned().collect();
        let of = |side| samples(&values(&turns, side, test));
        ratios.extend(ratio(of(Side::Exrail)?.as_ref(), of(Side::LlamaCpp)?.as_ref()));
    }
    let range = ratios.iter().copied().fold(None, |range: Option<[f64; 2]>, ratio| {
        Some(range.map_or([ratio; 2], |[low, high]| [low.min(ratio), high.max(ratio)]))
    });
    let ratio = ratio(exrail.as_ref(), llama_cpp.as_ref());
    Ok(Comparison { test, exrail, llama_cpp, ratio, ratio_range: range })
}

fn values(turns: &[Turn], side: Side, test: Test) -> Vec<f64> {
    let readings = turns.iter().filter(|turn| turn.side == side).flat_map(|turn| &turn.readings);
    readings.filter(|reading| reading.test == test).map(|reading| reading.value).collect()
}

/// None of no values.
fn samples(values: &[f64]) -> Result<Option<Samples>> {
    if values.is_empty() {
        return Ok(None);
    }
    Ok(Some(Samples {
        median: median(values)?,
        min: values.iter().copied().fold(f64::INFINITY, f64::min),
        max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        n: values.len(),
    }))
}

fn ratio(ours: Option<&Samples>, theirs: Option<&Samples>) -> Option<f64> {
    let (ours, theirs) = (ours?.median, theirs?.median);
    (theirs > 0.0).then_some(ours / theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECODE: Test = Test::Decode { depth: 0, batch: 1 };

    fn turn(round: usize, side: Side, values: &[f64]) -> Turn {
        let readings = values.iter().map(|&value| Reading { test: DECODE, value });
        Turn { round, side, idle_before: 1.0, stolen: 0.0, readings: readings.collect() }
    }

    #[test]
    fn the_ratio_is_that_of_medians_over_all_rounds() {
        let turns = [
            turn(1, Side::Exrail, &[10.0, 30.0]),
            turn(1, Side::LlamaCpp, &[5.0]),
            turn(2, Side::Exrail, &[24.0]),
            turn(2, Side::LlamaCpp, &[12.0]),
            turn(3, Side::LlamaCpp, &[8.0]),
        ];
        let [one] = compare(&turns).unwrap().try_into().unwrap();
        assert_eq!(one.exrail.unwrap(), Samples { median: 24.0, min: 10.0, max: 30.0, n: 3 });
        assert_eq!(one.llama_cpp.unwrap().median, 8.0);
        assert_eq!(one.ratio, Some(3.0));
        // Round 1 is 20 / 5, round 2 is 24 / 12, round 3 has no turn of ours.
        assert_eq!(one.ratio_range, Some([2.0, 4.0]));
    }

    #[test]
    fn a_test_of_one_side_has_no_ratio() {
        let [one] = compare(&[turn(1, Side::Exrail, &[10.0])]).unwrap().try_into().unwrap();
        assert_eq!((one.ratio, one.ratio_range, one.llama_cpp), (None, None, None));
        let zero = [turn(1, Side::Exrail, &[10.0]), turn(1, Side::LlamaCpp, &[0.0])];
        assert_eq!(compare(&zero).unwrap()[0].ratio, None);
        assert!(compare(&[turn(1, Side::Exrail, &[f64::NAN])]).is_err());
    }
}
