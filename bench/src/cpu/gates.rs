//! What the measurements must reach: the numbers of the project's performance targets.
//!
//! A gate that could not be measured does not pass.

use serde::Serialize;

use super::{
    Sizes,
    reading::{Comparison, Test},
};
use crate::machine::IDLE_SHARE;

/// Decode and prefill over llama.cpp at the least, and the goals.
const DECODE: (f64, f64) = (1.8, 3.0);
const PREFILL: (f64, f64) = (1.3, 2.0);
/// Tokens per second of a batch over those of one sequence, both ours.
const BATCH: f64 = 3.0;
/// Our time to the first token over llama.cpp's at most.
const LOAD: f64 = 1.0;
/// Resident memory over weights and KV pool at most.
const RESIDENT: f64 = 1.15;

/// Which side of its limit a number must be on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Demand {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Pass,
    Fail,
    NotAvailable,
}

/// One demand and what was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Gate {
    pub(super) name: String,
    pub(super) demand: Demand,
    /// What is hoped for beyond the demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) goal: Option<f64>,
    pub(super) found: Option<f64>,
    pub(super) status: Status,
}

impl Gate {
    fn new(name: String, demand: Demand, goal: Option<f64>, found: Option<f64>) -> Self {
        let status = match (demand, found) {
            (_, None) => Status::NotAvailable,
            (Demand::AtLeast(limit), Some(found)) if found >= limit => Status::Pass,
            (Demand::AtMost(limit), Some(found)) if found <= limit => Status::Pass,
            (Demand::AtLeast(_) | Demand::AtMost(_), Some(_)) => Status::Fail,
        };
        Self { name, demand, goal, found, status }
    }

    /// The machine's idle share before a run, the least of all runs.
    pub(super) fn idle(least: f64) -> Self {
        Self::new(
            "machine idle before every run".into(),
            Demand::AtLeast(IDLE_SHARE),
            None,
            Some(least),
        )
    }

    pub(super) fn passes(&self) -> bool {
        self.status == Status::Pass
    }
}

/// The gates of one file.
pub(super) fn of(comparisons: &[Comparison], sizes: &Sizes) -> Vec<Gate> {
    let find = |test: Test| comparisons.iter().find(|comparison| comparison.test == test);
    let ratio = |test| find(test).and_then(|comparison| comparison.ratio);
    let ours = |test| find(test).and_then(|c| c.exrail.as_ref()).map(|samples| samples.median);
    let Sizes { prompt, depth, batch, .. } = *sizes;
    let at_least =
        |name, (limit, goal), found| Gate::new(name, Demand::AtLeast(limit), Some(goal), found);
    let single = Test::Decode { depth: 0, batch: 1 };
    let batched = ours(Test::Decode { depth: 0, batch }).zip(ours(single)).map(|(b, s)| b / s);
    vec![
        at_least("decode, greedy / llama.cpp".into(), DECODE, ratio(Test::Greedy { depth: 0 })),
        at_least("decode, all logits / llama.cpp".into(), DECODE, ratio(single)),
        at_least(
            format!("decode at depth {depth}, greedy / llama.cpp"),
            DECODE,
            ratio(Test::Greedy { depth }),
        ),
        at_least(
            format!("decode at depth {depth}, all logits / llama.cpp"),
            DECODE,
            ratio(Test::Decode { depth, batch: 1 }),
        ),
        at_least(
            format!("prefill {prompt} / llama.cpp"),
            PREFILL,
            ratio(Test::Prefill { tokens: prompt }),
        ),
        Gate::new(format!("batch {batch} decode / batch 1"), Demand::AtLeast(BATCH), None, batched),
        Gate::new(
            "load to first token / llama.cpp".into(),
            Demand::AtMost(LOAD),
            None,
            ratio(Test::FirstToken),
        ),
        Gate::new(
            "resident / (weights + KV)".into(),
            Demand::AtMost(RESIDENT),
            None,
            ours(Test::ResidentRatio),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::{super::reading::Samples, *};

    const SIZES: Sizes = Sizes {
        threads: 2,
        prompt: 512,
        generated: 128,
        depth: 1000,
        batch: 8,
        rounds: 5,
        repeat: 1,
    };

    fn comparison(test: Test, ours: f64, theirs: Option<f64>) -> Comparison {
        let samples = |median| Samples { median, min: median, max: median, n: 1 };
        Comparison {
            test,
            exrail: Some(samples(ours)),
            llama_cpp: theirs.map(samples),
            ratio: theirs.map(|theirs| ours / theirs),
            ratio_range: None,
        }
    }

    fn all(decode: f64, first_token_s: f64, resident: f64) -> Vec<Comparison> {
        vec![
            comparison(Test::Prefill { tokens: 512 }, 1300.0, Some(1000.0)),
            comparison(Test::Decode { depth: 0, batch: 1 }, decode, Some(100.0)),
            comparison(Test::Decode { depth: 0, batch: 8 }, 600.0, Some(300.0)),
            comparison(Test::Decode { depth: 1000, batch: 1 }, 190.0, Some(100.0)),
            comparison(Test::Greedy { depth: 0 }, 200.0, Some(100.0)),
            comparison(Test::Greedy { depth: 1000 }, 180.0, Some(100.0)),
            comparison(Test::FirstToken, first_token_s, Some(0.5)),
            comparison(Test::ResidentRatio, resident, None),
        ]
    }

    #[test]
    fn every_gate_passes_at_its_limit() {
        let gates = of(&all(180.0, 0.5, 1.15), &SIZES);
        assert_eq!(gates.len(), 8);
        assert!(gates.iter().all(Gate::passes), "{gates:?}");
    }

    #[test]
    fn a_number_beyond_its_limit_fails_its_gate_and_no_other() {
        for (measured, failing) in [
            (all(179.9, 0.5, 1.15), "decode, all logits / llama.cpp"),
            (all(200.1, 0.5, 1.15), "batch 8 decode / batch 1"),
            (all(180.0, 0.501, 1.15), "load to first token / llama.cpp"),
            (all(180.0, 0.5, 1.151), "resident / (weights + KV)"),
        ] {
            let gates = of(&measured, &SIZES);
            let failed: Vec<_> = gates.iter().filter(|g| !g.passes()).map(|g| &g.name).collect();
            assert_eq!(failed, [failing]);
            assert!(gates.iter().all(|gate| gate.status != Status::NotAvailable));
        }
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        let gates = of(&[], &SIZES);
        assert!(gates.iter().all(|gate| gate.status == Status::NotAvailable && !gate.passes()));
        // The peer failed: no ratio, but what is ours alone stands.
        let mut measured = all(180.0, 0.5, 1.0);
        measured[1] = comparison(Test::Decode { depth: 0, batch: 1 }, 180.0, None);
        let gates = of(&measured, &SIZES);
        assert_eq!(gates[0].status, Status::Pass);
        assert_eq!(gates[1].status, Status::NotAvailable);
        assert_eq!(gates[5].status, Status::Pass);
    }

    #[test]
    fn a_busy_machine_fails() {
        assert!(Gate::idle(0.97).passes());
        assert_eq!(Gate::idle(0.96).status, Status::Fail);
    }
}
