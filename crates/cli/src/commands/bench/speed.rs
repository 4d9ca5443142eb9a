//! Prefill and decode of one model, in a process of its own, the way `llama-bench` and
//! `llama-batched-bench` time them: fixed tokens, logits of the last row of a prompt and of every
//! decode row copied out, nothing sampled. Decode runs once more the way that greedy answers take: the
//! most likely tokens instead of the logits, and fed to the next step, because how far logits lie apart
//! decides what has to be read of some heads; and once the way that sampled answers take on a device that
//! draws. Where the device runs ahead, each such step is asked for before the tokens of the last one are
//! read, as the engine does it.
//!
//! Where rows may not depend on their batch, each test runs in turns with rows that may, so that what the
//! mode costs is known.
//!
//! Every repetition runs every test once, so that a slow moment of the machine meets all tests and
//! not all samples of one. The first repetition warms up and is not counted.

use std::{
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use exrail_checkpoint::DecoderConfig;
use exrail_engine::{Admission, LoadOptions, Need, load_admitted};
use exrail_kernels::{
    AttentionSpan, Backend, Draw, DrawScratch, Draws, KvShape, Largest, PAGE_TOKENS, PageId,
    TokenId,
};
use exrail_model::{Batch, Decoder, RunSizes, Scratch, kv_shape};
use serde::{Deserialize, Serialize};

use super::{
    plan::Plan,
    process::{self, Resident},
};
use crate::{
    device::{Device, Job, Measured},
    memory,
    progress::Bars,
};

/// Largest KLD, in nats, between the logits of a prefill and of token-by-token decode: what rounded
/// activations may cost against exact ones. The two round alike or, on a GPU, more finely, so that they
/// may not differ by more. A kernel that computes something else has no speed.
const KLD_LIMIT: f64 = 2e-3;

/// Positions of that comparison.
const CHECKED_TOKENS: usize = 48;

/// Bytes that the bandwidth measurement reads: far more than a last-level cache holds.
const PROBE_BYTES: usize = 512 << 20;

/// Reads of the probe in every repetition.
const PROBE_PASSES: usize = 3;

/// Samples of one process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Speed {
    /// Hex sha256 of the file.
    pub(super) sha256: String,
    /// Tests in the order of the plan.
    pub(super) prefill: Vec<Prefill>,
    /// Tests by depth, then by batch.
    pub(super) decode: Vec<Decode>,
    /// Bytes per second that the same threads read from memory, between the repetitions.
    pub(super) read_bytes_per_s: Vec<f64>,
    /// KLD between prefill and decode of the same tokens, nats.
    pub(super) kld: f64,
    /// Memory after every test ran once, before the probe's buffer.
    pub(super) resident: Option<Resident>,
    /// Bytes of the KV pool.
    pub(super) kv_bytes: u64,
}

/// One prefill test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Prefill {
    /// Tokens of the prompt.
    pub(super) tokens: usize,
    /// Of each repetition.
    pub(super) rates: Rates,
}

/// Tokens of all sequences per second, of each repetition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Rates {
    /// As planned.
    pub(super) tokens_per_s: Vec<f64>,
    /// With rows that may depend on their batch, where that is another mode than the planned one.
    pub(super) batch_dependent: Vec<f64>,
}

/// One decode test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Decode {
    /// Cached positions of each sequence before.
    pub(super) depth: usize,
    /// Sequences at once.
    pub(super) batch: usize,
    /// What comes out of every step.
    pub(super) output: StepOutput,
    /// Of each repetition.
    pub(super) rates: Rates,
    /// Bytes of keys and values that a step reads on average.
    pub(super) kv_step_bytes: f64,
}

/// What a decode step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StepOutput {
    /// All logits, copied out.
    Logits,
    /// The most likely token: what a greedy request needs.
    Token,
    /// A token drawn with [`drawn`]: what a sampled request needs.
    Drawn,
}

/// How a token is drawn: at temperature 0.8 and top-p 0.95, by another number for each position and
/// sequence.
fn drawn(position: usize, sequence: usize) -> Draw {
    let counted = (position as u64) << 32 | sequence as u64;
    let numerator = (counted + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11; // 2^64 over the golden ratio
    Draw { temperature: 0.8, top_p: 0.95, numerator, ..Draw::LARGEST }
}

/// The most likely token.
fn most_likely(_position: usize, _sequence: usize) -> Draw {
    Draw::LARGEST
}

/// Loads and measures.
///
/// # Errors
/// The model cannot be loaded, its context is too short, or prefill and decode disagree.
pub(super) fn run(plan: &Plan, path: &Path, bars: &mut Bars) -> Result<Speed> {
    let (device, _) = Device::open(plan.device, plan.cpu(), plan.batch_invariant)?;
    device.run(Tests { plan, path, bars })
}

/// The tests of one model.
struct Tests<'a> {
    plan: &'a Plan,
    path: &'a Path,
    bars: &'a mut Bars,
}

impl Job for Tests<'_> {
    type Out = Speed;

    fn run<B: Measured>(self, backend: B) -> Result<Speed> {
        measure(Subject::load(backend, self.plan, self.path, self.bars)?, self.plan, self.bars)
    }
}

fn measure<B: Measured>(mut subject: Subject<B>, plan: &Plan, bars: &mut Bars) -> Result<Speed> {
    let kld = subject.check()?;
    subject.fill(plan.deepest());
    let mut speed = plan_tests(plan, &subject);
    speed.kld = kld;
    let mut modes = Modes::of(plan, &subject);
    for prefill in &speed.prefill {
        modes.run(&mut subject, |subject| subject.prefill(prefill.tokens));
    }
    for decode in &speed.decode {
        modes.run(&mut subject, |subject| subject.decode(decode, plan.generated.min(16)));
    }
    speed.resident = process::resident();
    let mut probe = subject.backend.probe(PROBE_BYTES)?;
    for repetition in 0..plan.repeat {
        bars.bench("prefill and decode", repetition, plan.repeat);
        speed.read_bytes_per_s.extend((0..PROBE_PASSES).map(|_| probe()));
        for test in &mut speed.prefill {
            let took = modes.run(&mut subject, |subject| subject.prefill(test.tokens));
            test.rates.push(test.tokens, took);
        }
        for test in &mut speed.decode {
            let took = modes.run(&mut subject, |subject| subject.decode(test, plan.generated));
            test.rates.push(test.batch * plan.generated, took);
        }
    }
    bars.clear();
    Ok(speed)
}

impl Rates {
    fn push(&mut self, n_tokens: usize, (planned, dependent): (Duration, Option<Duration>)) {
        let rate = |took: Duration| n_tokens as f64 / took.as_secs_f64();
        self.tokens_per_s.push(rate(planned));
        self.batch_dependent.extend(dependent.map(rate));
    }
}

/// The modes that tests run in.
struct Modes<B> {
    /// The device with rows that may depend on their batch, where the plan says that they may not.
    batch_dependent: Option<B>,
}

impl<B: Measured> Modes<B> {
    fn of(plan: &Plan, subject: &Subject<B>) -> Self {
        let other = plan.batch_invariant.then(|| subject.backend.batch_dependent());
        Self { batch_dependent: other.flatten() }
    }

    /// Runs a test as planned, and then in the other mode; how long each took.
    fn run(
        &mut self,
        subject: &mut Subject<B>,
        test: impl Fn(&mut Subject<B>),
    ) -> (Duration, Option<Duration>) {
        let timed = |subject: &mut Subject<B>| {
            let since = Instant::now();
            test(subject);
            since.elapsed()
        };
        let planned = timed(subject);
        let dependent = self.batch_dependent.as_mut().map(|other| {
            std::mem::swap(&mut subject.backend, other);
            let took = timed(subject);
            std::mem::swap(&mut subject.backend, other);
            took
        });
        (planned, dependent)
    }
}

/// The tests of the plan, without samples.
fn plan_tests<B: Measured>(plan: &Plan, subject: &Subject<B>) -> Speed {
    let prefill = plan.prompt.iter().map(|&tokens| Prefill { tokens, rates: Rates::default() });
    let pairs = plan.depth.iter().flat_map(|d| plan.batch.iter().map(move |b| (*d, *b)));
    let outputs = [StepOutput::Logits, StepOutput::Token, StepOutput::Drawn];
    let tests = pairs.flat_map(|(depth, batch)| outputs.map(|output| (depth, batch, output)));
    let decode = tests.map(|(depth, batch, output)| Decode {
        depth,
        batch,
        output,
        rates: Rates::default(),
        kv_step_bytes: batch as f64 * subject.kv_step_bytes(depth, plan.generated),
    });
    Speed {
        sha256: subject.sha256.clone(),
        prefill: prefill.collect(),
        decode: decode.collect(),
        read_bytes_per_s: Vec::new(),
        kld: 0.0,
        resident: None,
        kv_bytes: (subject.shape.page_bytes() * subject.shape.n_pages) as u64,
    }
}

/// What is allocated beside the weights.
fn sizes(plan: &Plan, config: &DecoderConfig) -> RunSizes {
    let (n_sequences, longest) = (plan.most_sequences(), plan.longest());
    let n_pages = n_sequences.saturating_mul(longest.div_ceil(PAGE_TOKENS));
    RunSizes {
        kv: kv_shape(config, n_pages, plan.kv_dtype()),
        max_rows: plan.chunk.min(longest).max(n_sequences),
        max_logit_rows: n_sequences,
    }
}

/// The model with its sequences.
struct Subject<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    scratch: Scratch<B>,
    pool: B::KvPool,
    shape: KvShape,
    /// Page table of each sequence.
    pages: Vec<Vec<PageId>>,
    /// Rows of a prefill step at most.
    chunk: usize,
    checked_tokens: usize,
    /// Positions that a sequence has pages for at least.
    longest: usize,
    logits: Vec<f32>,
    /// Hex sha256 of the file.
    sha256: String,
}

impl<B: Measured> Subject<B> {
    fn load(backend: B, plan: &Plan, path: &Path, bars: &mut Bars) -> Result<Self> {
        if let (Some(asked), Some(found)) = (plan.threads, backend.n_threads()) {
            ensure!(found == asked, "--threads: expected {asked}, the system gave {found}");
        }
        let (device, free) = backend.memory(None);
        let run = |config: &DecoderConfig| sizes(plan, config);
        let admission = Admission { device, free, need: Need::Run(&run) };
        let (options, mut told) = (LoadOptions::default(), |step| bars.load(&step));
        let loaded = load_admitted(backend.clone(), path, options, &admission, &mut told)
            .map_err(memory::refused_without_options)?;
        // A hash beside the tests would take their time.
        let sha256 = loaded.model_sha256.wait_told(&mut |bytes, total| bars.hash(bytes, total))?;
        let sha256 = sha256.to_owned();
        bars.clear();
        let decoder = loaded.decoder;
        let (longest, context) = (plan.longest(), decoder.config().context_len);
        ensure!(
            longest <= context,
            "context: expected at least {longest} tokens for this plan, the model has {context}"
        );
        let each = longest.div_ceil(PAGE_TOKENS);
        let RunSizes { kv: shape, max_rows, max_logit_rows } = sizes(plan, decoder.config());
        let pool = backend.kv_pool(shape)?;
        let scratch = decoder.scratch(&backend, max_rows, max_logit_rows)?;
        let ids = (0..u32::try_from(shape.n_pages)?).map(PageId).collect::<Vec<_>>();
        Ok(Self {
            pages: ids.chunks(each).map(<[PageId]>::to_vec).collect(),
            chunk: plan.chunk,
            checked_tokens: CHECKED_TOKENS.min(longest),
            longest,
            logits: Vec::new(),
            sha256,
            backend,
            decoder,
            scratch,
            pool,
            shape,
        })
    }

    /// Compares the last logits of a prefill with those of token-by-token decode.
    ///
    /// # Errors
    /// They differ by more than [`KLD_LIMIT`], or are not finite: then no timing means anything.
    fn check(&mut self) -> Result<f64> {
        let n = self.checked_tokens;
        self.prefill(n);
        let prefill = std::mem::take(&mut self.logits);
        for position in 0..n {
            let id = self.id(position, 0);
            self.step(&[id], &[(0, position, 1)], &[0]);
        }
        self.scratch.read_logits(&self.backend, &mut self.logits);
        let kld = agreement(&prefill, &self.logits)?;
        let last = self.id(n - 1, 0);
        for draw in [Draw::LARGEST, drawn(n - 1, 0)] {
            let expected = draw.of(&self.logits, &mut DrawScratch::default());
            let found = self.ask(&[last], n - 1, &[draw]);
            same_token(expected, self.backend.found(&found)[0])?;
            self.check_following(&found, expected)?;
        }
        Ok(kld)
    }

    /// The step behind one whose token was found, told that token and not.
    fn check_following(&mut self, found: &B::Found, token: Largest) -> Result<()> {
        let n = self.checked_tokens;
        if n < self.longest {
            let draws = [drawn(n, 0)];
            let [told, followed] =
                [self.ask(&[TokenId(token.index)], n, &draws), self.follow(found, n, &draws)]
                    .map(|found| self.backend.found(&found)[0]);
            same_token(told, followed)?;
        }
        Ok(())
    }

    /// Writes keys and values of `depth` positions of every sequence. Tests overwrite them with
    /// others of the same size, which takes the same time to read.
    fn fill(&mut self, depth: usize) {
        if depth == 0 {
            return;
        }
        self.prefill(depth);
        for pages in &self.pages[1..] {
            for (from, to) in self.pages[0].iter().zip(pages) {
                self.backend.kv_copy_page(&mut self.pool, *from, *to);
            }
        }
    }

    /// Reads `n_tokens` of the first sequence into an empty cache and copies the last logits out.
    fn prefill(&mut self, n_tokens: usize) {
        for first in (0..n_tokens).step_by(self.chunk) {
            let n_rows = self.chunk.min(n_tokens - first);
            let ids: Vec<_> = (first..first + n_rows).map(|p| self.id(p, 0)).collect();
            let last = [u32::try_from(n_rows - 1).expect("a prompt is far below 2^32 tokens")];
            let logit_rows = if first + n_rows == n_tokens { &last[..] } else { &[] };
            self.step(&ids, &[(0, first, n_rows)], logit_rows);
        }
        self.scratch.read_logits(&self.backend, &mut self.logits);
    }

    /// Decodes `n_tokens` of each sequence of the test, one a step.
    fn decode(&mut self, test: &Decode, n_tokens: usize) {
        let positions = test.depth..test.depth + n_tokens;
        match test.output {
            StepOutput::Token => self.decode_ahead(positions, test.batch, most_likely),
            StepOutput::Drawn => self.decode_ahead(positions, test.batch, drawn),
            StepOutput::Logits => {
                let rows: Vec<u32> = (0..).take(test.batch).collect();
                for position in positions {
                    let ids: Vec<_> = (0..test.batch).map(|s| self.id(position, s)).collect();
                    let spans: Vec<_> = (0..test.batch).map(|s| (s, position, 1)).collect();
                    self.step(&ids, &spans, &rows);
                    self.scratch.read_logits(&self.backend, &mut self.logits);
                }
            }
        }
    }

    /// Decode without logits: a step is asked for before the last one's tokens are read. A device that
    /// computes in the calling thread has them by then.
    fn decode_ahead(
        &mut self,
        positions: Range<usize>,
        batch: usize,
        draw: impl Fn(usize, usize) -> Draw,
    ) {
        let first: Vec<_> = (0..batch).map(|s| self.id(positions.start, s)).collect();
        let mut last: Option<B::Found> = None;
        for position in positions {
            let draws: Vec<_> = (0..batch).map(|s| draw(position, s)).collect();
            let next = match &last {
                Some(last) => self.follow(last, position, &draws),
                None => self.ask(&first, position, &draws),
            };
            if let Some(last) = last.replace(next) {
                self.backend.found(&last);
            }
        }
        if let Some(last) = last {
            self.backend.found(&last);
        }
    }

    /// One step; spans are (sequence, first position, rows).
    fn step(&mut self, ids: &[TokenId], spans: &[(usize, usize, usize)], logit_rows: &[u32]) {
        let spans = Self::spans(&self.pages, spans);
        let batch = Batch { ids, spans: &spans, logit_rows };
        self.decoder.forward(&self.backend, &mut self.scratch, &mut self.pool, &batch);
    }

    /// A row of each of the first sequences that asks for a token.
    fn ask(&mut self, ids: &[TokenId], position: usize, draws: &[Draw]) -> B::Found {
        let each: Vec<_> = (0..ids.len()).map(|s| (s, position, 1)).collect();
        let rows: Vec<u32> = (0..).take(ids.len()).collect();
        let spans = Self::spans(&self.pages, &each);
        let batch = Batch { ids, spans: &spans, logit_rows: &rows };
        let draws = Draws { limit: self.decoder.config().vocab_size, rows: draws };
        let (scratch, pool) = (&mut self.scratch, &mut self.pool);
        self.decoder.forward_drawn(&self.backend, scratch, pool, &batch, draws)
    }

    /// [`Subject::ask`] of the tokens that `last` gives for the first sequences, one for each draw.
    fn follow(&mut self, last: &B::Found, position: usize, draws: &[Draw]) -> B::Found {
        let each: Vec<_> = (0..draws.len()).map(|s| (s, position, 1)).collect();
        let spans = Self::spans(&self.pages, &each);
        let draws = Draws { limit: self.decoder.config().vocab_size, rows: draws };
        let (scratch, pool) = (&mut self.scratch, &mut self.pool);
        self.decoder.follow_drawn(&self.backend, scratch, pool, last, &spans, draws)
    }

    fn spans<'a>(
        pages: &'a [Vec<PageId>],
        spans: &[(usize, usize, usize)],
    ) -> Vec<AttentionSpan<'a>> {
        let mut first_row = 0;
        let span = |&(sequence, first_position, n_rows): &(usize, usize, usize)| {
            let pages: &[PageId] = &pages[sequence];
            let span = AttentionSpan { first_row, n_rows, first_position, pages };
            first_row += n_rows;
            span
        };
        spans.iter().map(span).collect()
    }

    /// A token of the vocabulary, another one for each position and sequence.
    fn id(&self, position: usize, sequence: usize) -> TokenId {
        let id = (101 + 31 * position + 7 * sequence) % self.decoder.config().vocab_size;
        TokenId(u32::try_from(id).expect("token ids are 32 bits wide"))
    }

    /// Bytes of keys and values that a sequence's decode step reads, on average over `n_tokens`
    /// steps from `depth` on.
    fn kv_step_bytes(&self, depth: usize, n_tokens: usize) -> f64 {
        let one = self.shape.page_bytes() / PAGE_TOKENS / self.shape.n_layers;
        let windows = windows(&self.decoder);
        mean_visible(&windows, depth, n_tokens) * one as f64
    }
}

/// The divergence of decode from prefill, in nats.
///
/// # Errors
/// It is more than [`KLD_LIMIT`], or a logit is not finite.
fn agreement(prefill: &[f32], decode: &[f32]) -> Result<f64> {
    let kld = exrail_metrics::kld_from_logits(prefill, decode)?;
    ensure!(
        kld <= KLD_LIMIT,
        "prefill and decode differ: expected a KLD of at most {KLD_LIMIT}, found {kld}"
    );
    Ok(kld)
}

/// # Errors
/// A step gives another token than the logits do, or another value: then its timing means nothing.
fn same_token(expected: Largest, found: Largest) -> Result<()> {
    ensure!(found == expected, "the token of a step: expected {expected:?}, found {found:?}");
    Ok(())
}

/// How many tokens each layer sees at most; `None`: all.
fn windows<B: Backend>(decoder: &Decoder<B>) -> Vec<Option<usize>> {
    decoder.config().layers.iter().map(|layer| layer.window).collect()
}

/// Positions that one step reads in all layers together, on average over `n_tokens` steps from
/// `depth` on; the first step sees `depth` positions and itself.
fn mean_visible(windows: &[Option<usize>], depth: usize, n_tokens: usize) -> f64 {
    let seen =
        |window: &Option<usize>, position: usize| window.map_or(position, |w| w.min(position));
    let steps = depth + 1..=depth + n_tokens;
    let all: usize = steps.map(|p| windows.iter().map(|w| seen(w, p)).sum::<usize>()).sum();
    all as f64 / n_tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_what_is_cached_and_no_more_than_its_window() {
        assert_eq!(mean_visible(&[None], 0, 1), 1.0);
        assert_eq!(mean_visible(&[None, None], 10, 3), 2.0 * 12.0);
        assert_eq!(mean_visible(&[None, Some(4)], 10, 3), 12.0 + 4.0);
        assert_eq!(mean_visible(&[Some(12)], 10, 4), (11.0 + 12.0 * 3.0) / 4.0);
    }
    #[test]
    fn a_greedy_step_with_another_token_or_value_refuses_the_model() {
        let expected = Largest { index: 3, value: 1.5 };
        assert!(same_token(expected, expected).is_ok());
        for (index, value) in [(4, 1.5), (3, 1.25), (3, f32::NAN)] {
            let error = same_token(expected, Largest { index, value }).unwrap_err().to_string();
            assert!(error.contains("expected Largest { index: 3"), "{error}");
        }
    }
    #[test]
    fn logits_that_differ_or_are_not_numbers_refuse_the_model() {
        let logits = [0.5, -1.0, 2.0];
        assert_eq!(agreement(&logits, &logits).unwrap(), 0.0);
        assert!(agreement(&logits, &[0.51, -1.0, 2.0]).unwrap() < KLD_LIMIT);
        let error = agreement(&logits, &[2.0, -1.0, 0.5]).unwrap_err().to_string();
        assert!(error.contains("at most 0.002"), "{error}");
        assert!(agreement(&logits, &[f32::NAN, -1.0, 2.0]).is_err());
    }
}
