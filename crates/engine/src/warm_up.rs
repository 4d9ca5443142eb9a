//! The warm-up fence (G-05): real generations through the production path before the
//! first user token.
//!
//! A bucket is a shape that a request may bring: so many sequences decoding at once, or a prompt of
//! so many tokens. Each bucket runs `repeats` times; the first run pays for page faults, lazily
//! built tables and cold caches. Warm-up sequences take pages and steps like any other, give every
//! page back, and are left out of the public totals; draws are keyed by (seed, sequence, step), so
//! they consume no randomness either.
//!
//! What a device builds for a shape, such as the graph of a step, it builds here: when the plan has run, the
//! fence closes, and the engine says what grows behind it. Then each bucket runs once more, up to its first
//! token: what the first user of that shape will wait, over what a warm run waited, is the bucket's
//! `ready_ratio`.

use std::time::{Duration, Instant};

use exrail_kernels::{DeviceCounters, PAGE_TOKENS};
use thiserror::Error;

use crate::error::SubmitError;
use crate::event::{Event, Finish, Generation, SequenceFault, Timings};
use crate::handle::{EngineFacts, EngineHandle};
use crate::request::{GenerateRequest, Sampling};

/// Numbers of sequences up to which every one is warmed. Each is up to ten graphs of a GPU, which keeps 512
/// of them: more shapes would push those of the first out.
const MOST_TOGETHER: usize = 16;
/// Tokens of every warm-up sequence (G-05), where the context has room for them.
const N_TOKENS: usize = 10;

/// Which shapes to warm.
#[derive(Clone, Debug, PartialEq)]
pub struct WarmUpPlan {
    /// Numbers of sequences decoding at once.
    pub decode_buckets: Vec<usize>,
    /// Prompt lengths in tokens.
    pub prefill_buckets: Vec<usize>,
    /// Sequences that together take the most memory. They run first: what a device builds behind memory that
    /// grew later would be built for the old place.
    pub crowd: Vec<Prompt>,
    /// Sequences that run together once beside the buckets, greedily, and once with draws: what a device
    /// builds for them is there then. Their times are not taken.
    pub shapes: Vec<Vec<Prompt>>,
    /// Tokens to generate a run.
    pub n_tokens: usize,
    /// Runs of each bucket, at least 2: the first is the cold one.
    pub repeats: usize,
    /// Largest `cold_ratio` after the fence that counts as warm.
    pub cold_ratio_max: f64,
}

/// A sequence that warms the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Tokens of its prompt.
    pub n_tokens: usize,
    /// Positions before them. Nobody computes those: their keys and values are whatever the pages hold.
    pub depth: usize,
}

impl Prompt {
    /// One token behind so many positions.
    const fn behind(depth: usize) -> Prompt {
        Prompt { n_tokens: 1, depth }
    }
}

impl WarmUpPlan {
    /// [`WarmUpPlan::full`] for a device that has built something to get here, [`WarmUpPlan::short`] for
    /// one that builds nothing.
    #[must_use]
    pub fn of(handle: &EngineHandle) -> WarmUpPlan {
        if handle.counters().built.is_zero() {
            WarmUpPlan::short(handle)
        } else {
            WarmUpPlan::full(handle)
        }
    }

    /// Buckets for a device that builds nothing per shape, such as a CPU: one sequence and all that
    /// the engine can run, up to 8; one token and a prompt of 64.
    #[must_use]
    pub fn short(handle: &EngineHandle) -> WarmUpPlan {
        let most = handle.facts().options.max_sequences.min(8);
        let mut decode_buckets = vec![1, most];
        decode_buckets.dedup();
        WarmUpPlan {
            decode_buckets,
            prefill_buckets: vec![64],
            crowd: Vec::new(),
            shapes: Vec::new(),
            ..WarmUpPlan::full(handle)
        }
    }

    /// The buckets of G-05, cut to what the engine can run; every number of sequences up to 16, and one
    /// sequence behind every power of two of positions; and what takes the most memory.
    #[must_use]
    pub fn full(handle: &EngineHandle) -> WarmUpPlan {
        let facts = handle.facts();
        let n_tokens = N_TOKENS.min(facts.context - 1);
        let decode = [1, 2, 4, 8, 16, 32];
        let prefill = [1, 64, 512, facts.options.prefill_chunk];
        let mut prefill_buckets = prefill.to_vec();
        prefill_buckets.sort_unstable();
        prefill_buckets.dedup();
        prefill_buckets.retain(|&n| n + n_tokens <= facts.context);
        WarmUpPlan {
            decode_buckets: decode
                .into_iter()
                .filter(|&n| n <= facts.options.max_sequences)
                .collect(),
            prefill_buckets,
            crowd: crowd(facts, n_tokens),
            shapes: shapes(facts, n_tokens),
            n_tokens,
            repeats: 3,
            cold_ratio_max: 1.5,
        }
    }
}

/// Every number of sequences up to 16, and one sequence behind every power of two of positions.
fn shapes(facts: &EngineFacts, n_tokens: usize) -> Vec<Vec<Prompt>> {
    let together = 1..=facts.options.max_sequences.min(MOST_TOGETHER);
    let mut shapes: Vec<Vec<Prompt>> = together.map(|n| vec![Prompt::behind(0); n]).collect();
    let last = facts.context.saturating_sub(n_tokens + 1);
    let doublings = std::iter::successors(Some(PAGE_TOKENS), |&depth| Some(2 * depth));
    let alone = |depth| vec![Prompt::behind(depth)];
    shapes.extend(doublings.take_while(|&depth| depth < last).map(alone));
    shapes
}

/// Chunks of a prompt, and then its tokens, at the end of the context or of the pool, beside as many others
/// as run at once.
fn crowd(facts: &EngineFacts, n_tokens: usize) -> Vec<Prompt> {
    let n_others = facts.options.max_sequences - 1;
    let n_pages = facts.kv_pages.saturating_sub(n_others).max(1);
    let room = facts.context.min(n_pages * PAGE_TOKENS).saturating_sub(n_tokens);
    // The first of two whole chunks has the others' prompts beside it.
    let prompt = room.min(2 * facts.options.prefill_chunk);
    let mut crowd = vec![Prompt::behind(0); n_others];
    if prompt > 0 {
        crowd.push(Prompt { n_tokens: prompt, depth: room - prompt });
    }
    crowd
}

impl WarmUpPlan {
    fn repeats(&self) -> usize {
        self.repeats.max(2)
    }

    /// Tokens of the whole plan: the runs before the fence, and one a sequence behind it.
    fn n_total(&self) -> usize {
        let bucket = |n_sequences| n_sequences * (self.repeats() * self.n_tokens + 1);
        let decode: usize = self.decode_buckets.iter().copied().map(bucket).sum();
        let untimed = self.crowd.len() + self.shapes.iter().map(Vec::len).sum::<usize>();
        decode + self.prefill_buckets.len() * bucket(1) + untimed * 2 * self.n_tokens
    }
}

/// What warming measured.
#[derive(Clone, Debug, PartialEq)]
pub struct WarmUpReport {
    /// One entry a bucket, decode buckets first.
    pub buckets: Vec<BucketReport>,
    /// Largest ratio of all buckets.
    pub cold_ratio: f64,
    /// Largest ratio behind the fence.
    pub ready_ratio: f64,
    /// Whether the runs after the first were stable: in every bucket the slowest of them took at
    /// most `cold_ratio_max` times their median to the first token.
    pub is_warm: bool,
    /// Whether every run of a bucket gave the same greedy tokens.
    pub is_stable: bool,
    /// Tokens generated.
    pub n_tokens: usize,
    /// What the device had built when the fence closed; all zeros of one that builds nothing.
    pub built: DeviceCounters,
    /// Wall time.
    pub took: Duration,
}

/// One bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct BucketReport {
    /// Sequences at once.
    pub n_sequences: usize,
    /// Prompt tokens of each.
    pub n_prompt: usize,
    /// Time to the last sequence's first token, per run.
    pub first_token_ms: Vec<f64>,
    /// Mean time between tokens after that, per run.
    pub inter_token_ms: Vec<f64>,
    /// First run's `first_token_ms` over the median of the later runs (§3.1).
    pub cold_ratio: f64,
    /// The first token's time of the run behind the fence over the same median: what is still cold when
    /// users come. Above `cold_ratio_max` is a fault, or a machine that does something else beside.
    pub ready_ratio: f64,
}

/// Warming failed; the engine must not be called ready.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum WarmUpError {
    /// A run was refused.
    #[error("warm-up refused: {0}")]
    Refused(#[from] SubmitError),
    /// A run was given up.
    #[error("warm-up failed: {0}")]
    Failed(#[from] SequenceFault),
    /// A run ended early.
    #[error("warm-up: expected {expected} tokens, found {found}")]
    TooFewTokens {
        /// Tokens asked for.
        expected: usize,
        /// Token events.
        found: usize,
    },
}

/// Runs the plan and closes the fence: what the device builds from here on is counted in
/// [`crate::Counters::built_after_fence`] and warned of. Call it before anybody else submits: other traffic
/// would falsify its times.
///
/// # Errors
/// See [`WarmUpError`].
pub fn warm_up(handle: &EngineHandle, plan: &WarmUpPlan) -> Result<WarmUpReport, WarmUpError> {
    warm_up_told(handle, plan, &mut |_, _| {})
}

/// [`warm_up`] that says after every token how many it has generated, and of how many.
///
/// # Errors
/// See [`WarmUpError`].
pub fn warm_up_told(
    handle: &EngineHandle,
    plan: &WarmUpPlan,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<WarmUpReport, WarmUpError> {
    let start = Instant::now();
    handle.open_fence();
    let mut runs = Runs { handle, n_done: 0, n_total: plan.n_total(), progress };
    let decode = plan.decode_buckets.iter().map(|&n| (n, 1));
    let prefill = plan.prefill_buckets.iter().map(|&n| (1, n));
    let mut report = WarmUpReport {
        buckets: Vec::new(),
        cold_ratio: 0.0,
        ready_ratio: 0.0,
        is_warm: true,
        is_stable: true,
        n_tokens: 0,
        built: DeviceCounters::default(),
        took: Duration::ZERO,
    };
    runs.untimed(&plan.crowd, plan.n_tokens)?;
    for (n_sequences, n_prompt) in decode.chain(prefill) {
        let prompts = alike(n_sequences, n_prompt);
        let ran = (0..plan.repeats())
            .map(|_| runs.run(&prompts, plan.n_tokens, &Sampling::greedy()))
            .collect::<Result<Vec<Run>, _>>()?;
        let first_token_ms: Vec<f64> = ran.iter().map(|run| run.first_token_ms).collect();
        let later = median(&first_token_ms[1..]);
        let slowest = first_token_ms[1..].iter().copied().fold(0.0, f64::max);
        report.is_warm &= slowest <= plan.cold_ratio_max * later;
        report.is_stable &= ran.windows(2).all(|pair| pair[0].ids == pair[1].ids);
        let cold_ratio = first_token_ms[0] / later;
        report.cold_ratio = report.cold_ratio.max(cold_ratio);
        report.buckets.push(BucketReport {
            n_sequences,
            n_prompt,
            inter_token_ms: ran.iter().map(|run| run.inter_token_ms).collect(),
            first_token_ms,
            cold_ratio,
            ready_ratio: f64::NAN, // known behind the fence
        });
    }
    for shape in &plan.shapes {
        runs.untimed(shape, plan.n_tokens)?;
    }
    report.built = handle.close_fence().ok_or(SequenceFault::Stopped)?;
    for bucket in &mut report.buckets {
        let run = runs.run(&alike(bucket.n_sequences, bucket.n_prompt), 1, &Sampling::greedy())?;
        bucket.ready_ratio = run.first_token_ms / median(&bucket.first_token_ms[1..]);
        report.ready_ratio = report.ready_ratio.max(bucket.ready_ratio);
    }
    if report.ready_ratio > plan.cold_ratio_max {
        tracing::warn!(
            found = report.ready_ratio,
            "cold behind the warm-up fence: expected the first token of a warm shape within {} times its \
             median, see `exrail_ready_ratio` in /metrics; a busy machine does that too",
            plan.cold_ratio_max
        );
    }
    report.n_tokens = runs.n_done;
    report.took = start.elapsed();
    Ok(report)
}

/// Sequences of a bucket.
fn alike(n_sequences: usize, n_tokens: usize) -> Vec<Prompt> {
    vec![Prompt { n_tokens, depth: 0 }; n_sequences]
}

struct Run {
    first_token_ms: f64,
    inter_token_ms: f64,
    /// Tokens of each sequence.
    ids: Vec<Vec<u32>>,
}

/// Runs one after the other, and says how far they are.
struct Runs<'a> {
    handle: &'a EngineHandle,
    /// Tokens so far.
    n_done: usize,
    n_total: usize,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl Runs<'_> {
    /// Once greedily, once with draws.
    fn untimed(&mut self, prompts: &[Prompt], n_tokens: usize) -> Result<(), WarmUpError> {
        for sampling in [Sampling::greedy(), Sampling::default()] {
            self.run(prompts, n_tokens, &sampling)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        prompts: &[Prompt],
        n_tokens: usize,
        sampling: &Sampling,
    ) -> Result<Run, WarmUpError> {
        let warming = |(sequence, prompt): (usize, &Prompt)| {
            let n_prompt = prompt.depth + prompt.n_tokens;
            let mut request = request(self.handle, sequence, n_prompt, n_tokens);
            request.sampling = sampling.clone();
            (request, prompt.depth)
        };
        let generations = self.handle.warm(prompts.iter().enumerate().map(warming).collect())?;
        let mut run = Run { first_token_ms: 0.0, inter_token_ms: 0.0, ids: Vec::new() };
        let gaps = u32::try_from(n_tokens.saturating_sub(1).max(1)).unwrap_or(u32::MAX);
        for generation in &generations {
            let (ids, timings) = self.collect(generation)?;
            if ids.len() != n_tokens {
                return Err(WarmUpError::TooFewTokens { expected: n_tokens, found: ids.len() });
            }
            run.first_token_ms = run.first_token_ms.max(timings.queue_ms + timings.prefill_ms);
            run.inter_token_ms = run.inter_token_ms.max(timings.decode_ms / f64::from(gaps));
            run.ids.push(ids);
        }
        Ok(run)
    }

    fn collect(&mut self, generation: &Generation) -> Result<(Vec<u32>, Timings), WarmUpError> {
        let mut ids = Vec::new();
        loop {
            match generation.events.recv().map_err(|_| SequenceFault::Stopped)? {
                Event::Started { .. }
                | Event::Rotated(_)
                | Event::RolledBack { .. }
                | Event::Tail(_) => {}
                Event::Token(token) => {
                    ids.push(token.id);
                    self.n_done += 1;
                    (self.progress)(self.n_done, self.n_total);
                }
                Event::Finished(finished) => match finished.finish {
                    Finish::Stop | Finish::Length | Finish::Degenerate => {
                        return Ok((ids, finished.timings));
                    }
                    Finish::RotationRequired | Finish::SchemaIncomplete | Finish::Cancelled => {
                        return Err(SequenceFault::Stopped.into());
                    }
                },
                Event::Failed(fault) => return Err(fault.into()),
            }
        }
    }
}

/// Ordinary tokens of the vocabulary, another one for each sequence; end of sequence is ignored so
/// that every run has the same length.
fn request(
    handle: &EngineHandle,
    sequence: usize,
    n_prompt: usize,
    n_tokens: usize,
) -> GenerateRequest {
    let vocab_len = handle.facts().vocab_len;
    let prompt = (0..n_prompt).map(|i| (101 + 31 * i + 7 * sequence) % vocab_len);
    let prompt = prompt.map(|id| u32::try_from(id).expect("token ids are 32 bits wide")).collect();
    let mut request = GenerateRequest::new(prompt, n_tokens);
    request.stop_at_eos = false;
    request
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
