//! What the soak demands, and what it found.

use std::fmt;

use exrail_metrics::{median, quantile, theil_sen};
use exrail_verify::Verdict;
use serde::Serialize;

use super::{client::Outcome, oracle::OracleReport, server::Gauges};

/// Growth of resident memory that still counts as flat, in bytes a request (field faults K3).
const FLAT_BYTES: f64 = 1000.0;
/// Requests and samples over which that can be told: an allocator grows by tens of kilobytes at a time.
const FEWEST_REQUESTS: u64 = 1000;
const FEWEST_SAMPLES: usize = 20;
/// Longest time without a generated token while clients ask.
const STALL_S: f64 = 15.0;
/// Parts of a soak, of which the first and the last are compared: five minutes of thirty (field faults C3).
const N_PARTS: f64 = 6.0;
/// How much longer the slowest answers in twenty may take in the last part.
const SLOWER: f64 = 1.2;
/// Answers of a part in which a 95th percentile is more than a few of its slowest.
const FEWEST_ANSWERS: usize = 200;
/// Share of the pool that is to be full in the median: held by answers, or kept for its content.
const FULL: f64 = 0.95;

/// The server at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Since the first client began.
    pub(super) seconds: f64,
    /// Requests that have ended, whichever way.
    pub(super) requests: u64,
    pub(super) resident_kib: u64,
    pub(super) generated: u64,
    /// Pages that answers hold.
    pub(super) pages_held: u64,
    /// Pages that nobody holds, kept for their content.
    pub(super) pages_cached: u64,
    pub(super) is_alive: bool,
}

/// A whole answer on the clock, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Took {
    /// When it ended, since the first client began.
    pub(super) at: f64,
    /// From the request's first byte to the answer's last one.
    pub(super) seconds: f64,
}

/// Requests by what became of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Counts {
    pub(super) complete: u64,
    pub(super) cancelled: u64,
    pub(super) full: u64,
    pub(super) generated: u64,
    /// Whole answers that were held to a schema, and conform or say that they are incomplete.
    pub(super) held: u64,
    /// The first few in words; their number is `n_faults`.
    pub(super) faults: Vec<String>,
    pub(super) n_faults: u64,
    /// Of the whole answers.
    #[serde(skip)]
    pub(super) took: Vec<Took>,
}

impl Counts {
    pub(super) fn add(&mut self, outcome: &Outcome, took: Took) {
        match outcome {
            Outcome::Complete { answer, .. } => {
                self.took.push(took);
                self.complete += 1;
                self.generated += answer.generated;
                self.held += u64::from(answer.is_held);
            }
            Outcome::Cancelled => self.cancelled += 1,
            Outcome::Full => self.full += 1,
            Outcome::Refused { told, .. } => self.add_fault(told),
            Outcome::Odd(told) => self.add_fault(told),
        }
    }

    /// Something that fails the soak.
    pub(super) fn add_fault(&mut self, told: &str) {
        self.n_faults += 1;
        if self.faults.len() < 10 {
            self.faults.push(told.chars().take(400).collect());
        }
    }
}

/// One demand and whether it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) demand: &'static str,
    pub(super) verdict: Verdict,
    pub(super) found: String,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Pass => "pass",
            Verdict::Inconclusive => "inconclusive",
            Verdict::Fail | Verdict::Review => "FAIL",
        };
        write!(f, "{verdict:<12}  {:<44} {}", self.demand, self.found)
    }
}

/// Everything that a soak is judged by.
#[derive(Debug)]
pub(super) struct Findings<'a> {
    pub(super) counts: &'a [Counts],
    pub(super) samples: &'a [Sample],
    pub(super) oracle: &'a OracleReport,
    /// After the last request.
    pub(super) end: Gauges,
}

/// Judges a whole soak.
pub(super) fn judge(findings: &Findings<'_>) -> Vec<Check> {
    let Findings { counts, samples, oracle, end } = *findings;
    let mut checks = clients(counts);
    checks.extend([
        mixed(counts, &end),
        held(counts),
        pages(&end),
        check(
            "no panic and no page fault in the engine",
            end.panics == 0 && end.kv_faults == 0 && end.audits > 0,
            format!("{} panics, {} faults, {} audits", end.panics, end.kv_faults, end.audits),
        ),
        check(
            "the device built nothing behind its fence",
            end.built == 0,
            format!("{} of five kinds", end.built),
        ),
        compared(oracle),
        filled(samples, &end),
        work(samples),
        pace(counts, samples),
        alive(samples),
        flat_memory(samples),
    ]);
    checks
}

fn clients(counts: &[Counts]) -> Vec<Check> {
    let sum = |field: fn(&Counts) -> u64| counts.iter().map(field).sum::<u64>();
    let complete = sum(|c| c.complete);
    let n_faults = sum(|c| c.n_faults);
    let fewest = counts.iter().map(|c| c.complete).min().unwrap_or(0);
    vec![
        check("no 5xx, no cut stream, no odd answer", n_faults == 0, format!("{n_faults} faults")),
        check(
            "every client had whole answers",
            fewest > 0,
            format!("{complete} in all, at least {fewest} each"),
        ),
    ]
}

/// A soak that did not meet what it is for has shown nothing.
fn mixed(counts: &[Counts], end: &Gauges) -> Check {
    let cancelled: u64 = counts.iter().map(|c| c.cancelled).sum();
    check(
        "requests were cancelled, rotated and shared",
        cancelled > 0 && end.rotations > 0 && end.prefix_hits > 0,
        format!(
            "{cancelled} cancelled, {} rotations, {} pages read from the cache",
            end.rotations, end.prefix_hits
        ),
    )
}

/// One that does not conform is an odd answer; a soak without any has not looked.
fn held(counts: &[Counts]) -> Check {
    let n_held: u64 = counts.iter().map(|c| c.held).sum();
    check(
        "answers held to a schema conform, or say they are cut",
        n_held > 0,
        format!("{n_held} looked at"),
    )
}

/// Pages in quarantine count as lost: nothing was injected.
fn pages(end: &Gauges) -> Check {
    let is_idle = end.running == 0 && end.waiting == 0;
    check(
        "every page is back at the end",
        end.pages_free == end.pages_total && is_idle,
        format!("{} of {} free, {} running", end.pages_free, end.pages_total, end.running),
    )
}

fn compared(oracle: &OracleReport) -> Check {
    let demand = "what was served is what a fresh prefill gives";
    let found = format!(
        "{} answers at {} tokens, {} of them rotated: KL at most {:.2e} nats, limit {:.2e}, {} drifted",
        oracle.n_answers,
        oracle.n_checkpoints,
        oracle.n_rotated,
        oracle.kl_max,
        oracle.limit,
        oracle.drifted.len()
    );
    let verdict = match (oracle.drifted.is_empty(), oracle.is_noise_low && oracle.n_answers > 0) {
        (true, true) => Verdict::Pass,
        (false, true) => Verdict::Fail,
        (_, false) => Verdict::Inconclusive,
    };
    Check { demand, verdict, found }
}

fn filled(samples: &[Sample], end: &Gauges) -> Check {
    let total = end.pages_total.max(1) as f64;
    let share = |pages: &dyn Fn(&Sample) -> u64| {
        let shares: Vec<f64> = samples.iter().map(|sample| pages(sample) as f64 / total).collect();
        median(&shares).unwrap_or(0.0)
    };
    let held = share(&|sample| sample.pages_held);
    let full = share(&|sample| sample.pages_held + sample.pages_cached);
    check(
        "the pool was full",
        full >= FULL,
        format!("median {:.0} %, {:.0} % of it held by answers", full * 100.0, held * 100.0),
    )
}

fn work(samples: &[Sample]) -> Check {
    let stall = longest_stall(samples);
    check(
        "tokens came all the time",
        stall <= STALL_S && !samples.is_empty(),
        format!("longest pause {stall:.1} s of {STALL_S} s"),
    )
}

/// Nothing that piles up makes answers wait: the same mix takes as long at the end as at the beginning.
fn pace(counts: &[Counts], samples: &[Sample]) -> Check {
    let demand = "answers are no slower at the end";
    let part = samples.last().map_or(0.0, |sample| sample.seconds) / N_PARTS;
    let within = |from: f64, to: f64| -> Vec<f64> {
        let all = counts.iter().flat_map(|c| &c.took);
        all.filter(|took| from <= took.at && took.at < to).map(|took| took.seconds).collect()
    };
    let (first, last) = (within(0.0, part), within((N_PARTS - 1.0) * part, N_PARTS * part));
    match (quantile(&first, 0.95), quantile(&last, 0.95)) {
        (Ok(before), Ok(after)) if first.len().min(last.len()) >= FEWEST_ANSWERS => check(
            demand,
            after <= SLOWER * before,
            format!(
                "p95 {before:.2} s in the first sixth, {after:.2} s in the last, {:.2} times; limit {SLOWER}",
                after / before
            ),
        ),
        (_, _) => Check {
            demand,
            verdict: Verdict::Inconclusive,
            found: format!(
                "{} answers in the first sixth and {} in the last, expected {FEWEST_ANSWERS}; soak longer",
                first.len(),
                last.len()
            ),
        },
    }
}

fn alive(samples: &[Sample]) -> Check {
    let dead = samples.iter().filter(|sample| !sample.is_alive).count();
    check("alive all the time", dead == 0, format!("{dead} of {} looks failed", samples.len()))
}

/// Theil–Sen slope of resident memory over the requests of the last half: single peaks do not bend it.
fn flat_memory(samples: &[Sample]) -> Check {
    let demand = "memory is flat over the last half";
    let total = samples.last().map_or(0.0, |sample| sample.seconds);
    let settled = samples.iter().filter(|sample| sample.seconds >= total / 2.0);
    let settled: Vec<&Sample> = settled.collect();
    let ends = settled.first().zip(settled.last());
    let n_requests = ends.map_or(0, |(first, last)| last.requests - first.requests);
    let requests: Vec<f64> = settled.iter().map(|sample| sample.requests as f64).collect();
    let bytes: Vec<f64> =
        settled.iter().map(|sample| sample.resident_kib as f64 * 1024.0).collect();
    let slope = theil_sen(&requests, &bytes).map(|fit| fit.slope);
    let enough = n_requests >= FEWEST_REQUESTS && settled.len() >= FEWEST_SAMPLES;
    match slope {
        // What a thousand requests may not take, fewer may not either.
        Ok(slope) if enough || slope * n_requests as f64 > FLAT_BYTES * FEWEST_REQUESTS as f64 => {
            check(
                demand,
                slope < FLAT_BYTES,
                format!("{slope:+.0} bytes a request over {n_requests}, limit {FLAT_BYTES:.0}"),
            )
        }
        Ok(_) | Err(_) => Check {
            demand,
            verdict: Verdict::Inconclusive,
            found: format!(
                "{n_requests} requests in {} samples, expected {FEWEST_REQUESTS} in \
                 {FEWEST_SAMPLES}; soak longer",
                settled.len()
            ),
        },
    }
}

pub(super) fn check(demand: &'static str, pass: bool, found: String) -> Check {
    Check { demand, verdict: if pass { Verdict::Pass } else { Verdict::Fail }, found }
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
    use exrail_verify::{Checkpoint, KvWidth};

    use super::super::oracle::Compared;
    use super::*;

    const END: Gauges = Gauges {
        pages_total: 64,
        pages_free: 64,
        pages_cached: 0,
        pages_quarantined: 0,
        running: 0,
        waiting: 0,
        generated: 300,
        cancelled: 2,
        panics: 0,
        kv_faults: 0,
        audits: 9,
        prefix_hits: 1,
        evictions: 1,
        rotations: 1,
        built: 0,
    };

    /// One sample a second with twenty requests, whose memory grows by so much a request.
    fn samples(growth_kib: f64) -> Vec<Sample> {
        (0..300u32)
            .map(|s| Sample {
                seconds: f64::from(s),
                requests: u64::from(s) * 20,
                resident_kib: (200_000.0 + 20.0 * f64::from(s) * growth_kib) as u64,
                generated: u64::from(s),
                pages_held: 60,
                pages_cached: 3,
                is_alive: true,
            })
            .collect()
    }

    /// Ten answers a second of two clients, all as fast.
    fn counts() -> Vec<Counts> {
        let took = (0..1500u32).map(|n| Took { at: f64::from(n) * 0.2, seconds: 2.0 }).collect();
        vec![
            Counts { complete: 3, cancelled: 1, generated: 30, held: 1, took, ..Counts::default() };
            2
        ]
    }

    const SECOND: Took = Took { at: 1.0, seconds: 1.0 };

    fn oracle(kl: f64, noise: f64) -> OracleReport {
        let point = Checkpoint { tokens: 9, kl, argmax_changed: false, margin: 1.0 };
        let compared = Compared { n_rotations: 0, checkpoints: vec![point; 3], worst: None };
        OracleReport::of(&[compared], noise, KvWidth::Sixteen)
    }

    /// The demands that did not pass.
    fn failed(findings: &Findings<'_>) -> Vec<(&'static str, Verdict)> {
        let checks = judge(findings).into_iter();
        let failed = checks.filter(|check| check.verdict != Verdict::Pass);
        failed.map(|check| (check.demand, check.verdict)).collect()
    }

    /// What fails when one part of a sound soak is another.
    fn failed_with(
        change: impl FnOnce(&mut Vec<Counts>, &mut Vec<Sample>, &mut Gauges),
    ) -> Vec<(&'static str, Verdict)> {
        let (mut counts, mut samples, mut end) = (counts(), samples(0.0), END);
        change(&mut counts, &mut samples, &mut end);
        let oracle = oracle(0.0, 0.0);
        failed(&Findings { counts: &counts, samples: &samples, oracle: &oracle, end })
    }

    #[test]
    fn a_sound_soak_passes() {
        assert_eq!(failed_with(|_, _, _| {}), []);
        // 900 bytes a request are under 1 kB.
        assert_eq!(failed_with(|_, found, _| *found = samples(0.88)), []);
    }

    /// Each fault alone turns exactly its own demand red.
    #[test]
    fn every_fault_is_caught() {
        let fail = |demand| [(demand, Verdict::Fail)];
        let odd = failed_with(|counts, _, _| counts[0].add(&Outcome::Odd("x".into()), SECOND));
        assert_eq!(odd, fail("no 5xx, no cut stream, no odd answer"));
        let refused = Outcome::Refused { code: "kv_integrity".into(), told: "status 500".into() };
        let refused = failed_with(|counts, _, _| counts[0].add(&refused, SECOND));
        assert_eq!(refused, fail("no 5xx, no cut stream, no odd answer"));
        let idle = failed_with(|counts, _, _| counts[1].complete = 0);
        assert_eq!(idle, fail("every client had whole answers"));
        let never = failed_with(|counts, _, _| counts.iter_mut().for_each(|c| c.cancelled = 0));
        assert_eq!(never, fail("requests were cancelled, rotated and shared"));
        let unshared = failed_with(|_, _, end| end.prefix_hits = 0);
        assert_eq!(unshared, fail("requests were cancelled, rotated and shared"));
        let free = failed_with(|counts, _, _| counts.iter_mut().for_each(|c| c.held = 0));
        assert_eq!(free, fail("answers held to a schema conform, or say they are cut"));
        let leak = failed_with(|_, _, end| end.pages_free = 63);
        assert_eq!(leak, fail("every page is back at the end"));
        let panic = failed_with(|_, _, end| end.panics = 1);
        assert_eq!(panic, fail("no panic and no page fault in the engine"));
        let unaudited = failed_with(|_, _, end| end.audits = 0);
        assert_eq!(unaudited, fail("no panic and no page fault in the engine"));
        let built = failed_with(|_, _, end| end.built = 1);
        assert_eq!(built, fail("the device built nothing behind its fence"));
        let growing = failed_with(|_, found, _| *found = samples(1.1));
        assert_eq!(growing, fail("memory is flat over the last half"));
        let stalled = failed_with(|_, found, _| {
            found[100..130].iter_mut().for_each(|sample| sample.generated = 99);
        });
        assert_eq!(stalled, fail("tokens came all the time"));
        // C3: a 5 s answer that takes 5 minutes after hundreds of requests.
        let slower = failed_with(|counts, _, _| {
            let late = counts[0].took.iter_mut().filter(|took| took.at > 270.0);
            late.for_each(|took| took.seconds = 2.5);
        });
        assert_eq!(slower, fail("answers are no slower at the end"));
        let empty = failed_with(|_, found, _| {
            found.iter_mut().for_each(|sample| sample.pages_cached = 0);
        });
        assert_eq!(empty, fail("the pool was full"));
        let dead = failed_with(|_, found, _| found[7].is_alive = false);
        assert_eq!(dead, fail("alive all the time"));
    }

    #[test]
    fn a_drifted_answer_fails_and_one_that_cannot_be_told_is_no_pass() {
        let (counts, samples) = (counts(), samples(0.0));
        let judged = |oracle: OracleReport| {
            failed(&Findings { counts: &counts, samples: &samples, oracle: &oracle, end: END })
        };
        let demand = "what was served is what a fresh prefill gives";
        assert_eq!(judged(oracle(0.02, 0.0)), [(demand, Verdict::Fail)]);
        assert_eq!(judged(oracle(0.0, 0.02)), [(demand, Verdict::Inconclusive)]);
        let none = OracleReport::of(&[], 0.0, KvWidth::Sixteen);
        assert_eq!(judged(none), [(demand, Verdict::Inconclusive)]);
    }

    #[test]
    fn too_short_a_soak_says_nothing_of_pace_and_memory() {
        let short = failed_with(|_, found, _| found.truncate(30));
        let unsure = |demand| (demand, Verdict::Inconclusive);
        let pace = unsure("answers are no slower at the end");
        let memory = "memory is flat over the last half";
        assert_eq!(short, [pace, unsure(memory)]);
        let leaking = failed_with(|_, found, _| *found = samples(10.0)[..30].to_vec());
        assert_eq!(leaking, [pace, (memory, Verdict::Fail)]);
    }
}
