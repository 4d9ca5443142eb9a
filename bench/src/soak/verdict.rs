//! What the soak demands, and what it found.

use std::fmt;

use anyhow::Result;
use exrail_metrics::{median, theil_sen};
use serde::Serialize;

use super::{client::Outcome, server::Gauges};

/// Share of the time at the start in which memory may grow: caches and buffers fill.
const WARM_UP_SHARE: f64 = 1.0 / 3.0;

/// Growth of resident memory over the rest that still counts as flat, as a share of its median.
const FLAT_SHARE: f64 = 0.01;

/// Longest time without a generated token while clients ask.
const STALL_S: f64 = 15.0;

/// The server at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Sample {
    /// Since the first client began.
    pub(crate) seconds: f64,
    pub(crate) resident_kib: u64,
    pub(crate) generated: u64,
    pub(crate) pages_free: u64,
}

/// Requests by what became of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Counts {
    pub(crate) complete: u64,
    pub(crate) cancelled: u64,
    pub(crate) full: u64,
    pub(crate) generated: u64,
    /// The first few in words; their number is `n_faults`.
    pub(crate) faults: Vec<String>,
    pub(crate) n_faults: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Complete { generated } => {
                self.complete += 1;
                self.generated += generated;
            }
            Outcome::Cancelled => self.cancelled += 1,
            Outcome::Full => self.full += 1,
            Outcome::Fault(fault) => {
                self.n_faults += 1;
                if self.faults.len() < 10 {
                    self.faults.push(fault.chars().take(400).collect());
                }
            }
        }
    }
}

/// One demand and whether it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    pub(crate) demand: &'static str,
    pub(crate) pass: bool,
    pub(crate) found: String,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.pass { "pass" } else { "FAIL" };
        write!(f, "{verdict}  {:<42} {}", self.demand, self.found)
    }
}

/// Judges a whole soak.
///
/// # Errors
/// Too few samples for a slope.
pub(crate) fn judge(counts: &[Counts], samples: &[Sample], end: Gauges) -> Result<Vec<Check>> {
    let sum = |field: fn(&Counts) -> u64| counts.iter().map(field).sum::<u64>();
    let (complete, cancelled) = (sum(|c| c.complete), sum(|c| c.cancelled));
    let n_faults = sum(|c| c.n_faults);
    let fewest = counts.iter().map(|c| c.complete).min().unwrap_or(0);
    let leaked = end.pages_total.saturating_sub(end.pages_free);
    let stall = longest_stall(samples);
    Ok(vec![
        check("no 5xx, no cut stream, no odd answer", n_faults == 0, format!("{n_faults} faults")),
        check(
            "every client had whole answers",
            fewest > 0,
            format!("{complete} in all, at least {fewest} each"),
        ),
        check("requests were cancelled", cancelled > 0, format!("{cancelled}")),
        check(
            "all KV pages are free at the end",
            leaked == 0 && end.running == 0 && end.waiting == 0,
            format!("{} of {} free, {} running", end.pages_free, end.pages_total, end.running),
        ),
        check(
            "no panic and no page fault in the engine",
            end.panics == 0 && end.kv_faults == 0,
            format!("{} panics, {} faults", end.panics, end.kv_faults),
        ),
        check(
            "tokens came all the time",
            stall <= STALL_S,
            format!("longest pause {stall:.1} s of {STALL_S} s"),
        ),
        flat_memory(samples)?,
    ])
}

fn check(demand: &'static str, pass: bool, found: String) -> Check {
    Check { demand, pass, found }
}

/// Theil–Sen slope of resident memory after the warm-up: single peaks do not bend it.
fn flat_memory(samples: &[Sample]) -> Result<Check> {
    let total = samples.last().map_or(0.0, |sample| sample.seconds);
    let settled = samples.iter().filter(|sample| sample.seconds >= total * WARM_UP_SHARE);
    let (seconds, kib): (Vec<_>, Vec<_>) =
        settled.map(|sample| (sample.seconds, sample.resident_kib as f64)).unzip();
    let slope = theil_sen(&seconds, &kib)?.slope;
    let middle = median(&kib)?;
    let growth = slope * (total - seconds[0]);
    Ok(check(
        "memory is flat after the first third",
        growth <= middle * FLAT_SHARE,
        format!(
            "{:+.1} KiB/min, {:+.2} % of {:.0} MiB in {:.0} s (limit {:.0} %)",
            slope * 60.0,
            growth / middle * 100.0,
            middle / 1024.0,
            total - seconds[0],
            FLAT_SHARE * 100.0
        ),
    ))
}

fn longest_stall(samples: &[Sample]) -> f64 {
    let (mut longest, mut since) = (0.0f64, 0.0);
    let mut generated = samples.first().map_or(0, |sample| sample.generated);
    for sample in samples {
        if sample.generated > generated {
            generated = sample.generated;
            since = sample.seconds;
        }
        longest = longest.max(sample.seconds - since);
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: Gauges = Gauges {
        pages_total: 64,
        pages_free: 64,
        running: 0,
        waiting: 0,
        generated: 300,
        panics: 0,
        kv_faults: 0,
    };

    fn samples(growth_kib_per_s: u64) -> Vec<Sample> {
        (0..300u64)
            .map(|s| Sample {
                seconds: s as f64,
                resident_kib: 200_000 + s * growth_kib_per_s + s % 7,
                generated: s,
                pages_free: 10,
            })
            .collect()
    }

    fn counts() -> Vec<Counts> {
        vec![Counts { complete: 3, cancelled: 1, generated: 30, ..Counts::default() }; 2]
    }

    fn failed(counts: &[Counts], samples: &[Sample], end: Gauges) -> Vec<&'static str> {
        let checks = judge(counts, samples, end).unwrap();
        checks.iter().filter(|check| !check.pass).map(|check| check.demand).collect()
    }

    #[test]
    fn a_sound_soak_passes() {
        assert!(failed(&counts(), &samples(0), END).is_empty());
    }

    /// Each fault alone turns exactly its own demand red.
    #[test]
    fn every_fault_is_caught() {
        let mut faulty = counts();
        faulty[0].add(Outcome::Fault("status 500".into()));
        assert_eq!(failed(&faulty, &samples(0), END), ["no 5xx, no cut stream, no odd answer"]);

        let mut idle = counts();
        idle[1].complete = 0;
        assert_eq!(failed(&idle, &samples(0), END), ["every client had whole answers"]);

        let leak = Gauges { pages_free: 63, ..END };
        assert_eq!(failed(&counts(), &samples(0), leak), ["all KV pages are free at the end"]);

        let panic = Gauges { panics: 1, ..END };
        let demand = ["no panic and no page fault in the engine"];
        assert_eq!(failed(&counts(), &samples(0), panic), demand);

        let demand = ["memory is flat after the first third"];
        assert_eq!(failed(&counts(), &samples(40), END), demand);

        let mut stalled = samples(0);
        for sample in &mut stalled[100..130] {
            sample.generated = 99;
        }
        assert_eq!(failed(&counts(), &stalled, END), ["tokens came all the time"]);
    }
}
