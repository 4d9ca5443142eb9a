//! The oracle of the KV cache (§1.6): a live cache against a fresh prefill of the same tokens.
//!
//! A causal cache is written once and read; whatever goes wrong with it, be it positions, pages, eviction
//! or the precision of its elements, makes its next-token distribution another than that of a fresh
//! prefill. One fault does not: a context beyond the range that the model was trained on is wrong in both, and shows as
//! a loss that rises with the position. The two need different cures, and rotation cures neither.
//!
//! A text may itself get harder. The loss of each bin is therefore compared with the loss of the same
//! tokens right behind the bin before them, and nothing else: a sound model gains by a longer context.

use std::num::NonZeroUsize;

use exrail_metrics::{kld_from_logits, mean, quantile, theil_sen};
use serde::{Serialize, Serializer};

use crate::error::VerifyError;
use crate::report::Verdict;
use crate::system::GenerateError;

/// Tokens between two checkpoints; one page of the cache.
pub const CHECKPOINT_TOKENS: NonZeroUsize = NonZeroUsize::new(256).expect("a page is not empty");
/// Tokens of a bin of the loss.
pub const BIN_TOKENS: usize = 512;
/// Fewest tokens of a probe: two checkpoints in a row, and three bins for a slope that leaves the first out.
pub const MIN_PROBE_TOKENS: usize = 4 * BIN_TOKENS;

/// A change of the most likely token counts when the reference preferred its own by more than this, in
/// logits.
const MIN_MARGIN: f64 = 0.5;
/// Tokens of the first page between two rows that the noise is taken of; a row has the vocabulary's length.
const NOISE_EVERY: NonZeroUsize = NonZeroUsize::new(4).expect("four is not zero");
/// The noise of two ways to compute the same is multiplied by this to make a limit.
const NOISE_FACTOR: f64 = 10.0;
/// Loss that counts as risen, in nats: the last two bins over the second. [N]
const RISE_NATS: f64 = 0.5;
/// Loss beyond that of the same tokens in a short context that counts as a fault, in nats. [N]
const EXCESS_NATS: f64 = 0.25;

/// A generator whose cache can be compared. Logits are rows `(V,)`.
pub trait CacheOracle {
    /// Feeds the tokens one by one, as an answer is fed, and calls `visit` with the position and the row of
    /// each `every`th.
    ///
    /// # Errors
    /// The generator failed.
    fn live(
        &self,
        ids: &[u32],
        every: NonZeroUsize,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), GenerateError>;

    /// Every row of the tokens, from a prefill of its own.
    ///
    /// # Errors
    /// The generator failed.
    fn rows(&self, ids: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), GenerateError>;

    /// Violations of the page books so far (G-17).
    fn violations(&self) -> u64;
}

/// Element type of a cache, by its width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvWidth {
    /// 16 bits or more.
    Sixteen,
    /// 8 bits.
    Eight,
}

impl KvWidth {
    /// KL divergence in nats that is allowed at least, whatever the noise (§1.6.2). Noise beyond it leaves
    /// nothing that can be told.
    #[must_use]
    pub fn least_limit(self) -> f64 {
        match self {
            KvWidth::Sixteen => 0.01,
            KvWidth::Eight => 0.05,
        }
    }

    /// KL divergence in nats beyond which a cache is wrong, at this 99th percentile of the noise.
    #[must_use]
    pub fn limit(self, noise_p99: f64) -> f64 {
        self.least_limit().max(NOISE_FACTOR * noise_p99)
    }
}

/// A text to probe with.
#[derive(Clone, Copy, Debug)]
pub struct ProbeText<'a> {
    /// What the model wants in front of a text.
    pub bos: Option<u32>,
    /// The tokens behind it.
    pub ids: &'a [u32],
}

/// One comparison.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Checkpoint {
    /// Tokens in the cache.
    pub tokens: usize,
    /// KL(fresh ‖ live) in nats.
    pub kl: f64,
    /// Whether the most likely tokens differ.
    pub argmax_changed: bool,
    /// By how much the fresh prefill prefers its most likely token, in logits.
    pub margin: f64,
}

/// The loss of one bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// Tokens in front of its end.
    pub tokens: usize,
    /// Mean negative log-likelihood in nats, behind everything before.
    pub nll: f64,
    /// The same behind the bin before it alone. None for the first.
    pub nll_short: Option<f64>,
}

/// How long the cache was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UntilDrift {
    /// It drifted at this many tokens.
    At(usize),
    /// It had not drifted by then: a bound, and no number.
    AtLeast(usize),
}

impl Serialize for UntilDrift {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            UntilDrift::At(tokens) => serializer.serialize_u64(*tokens as u64),
            UntilDrift::AtLeast(_) => serializer.collect_str(self),
        }
    }
}

impl std::fmt::Display for UntilDrift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            UntilDrift::At(tokens) => write!(f, "{tokens}"),
            UntilDrift::AtLeast(tokens) => write!(f, ">= {tokens}"),
        }
    }
}

/// What is wrong, first match wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheFault {
    /// The books of the pages broke.
    KvIntegrity,
    /// Two ways to compute the first page differ by more than a cache may: nothing can be told.
    Noise,
    /// The live cache is not what a fresh prefill is.
    CacheDrift,
    /// Only the last checkpoint is over the limit; two in a row are drift.
    LastCheckpoint,
    /// The loss rises with the position although the cache is right: the context is beyond the range that
    /// the model handles. Rotation does not cure it.
    ContextRange,
}

/// The report of a probe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CacheReport {
    /// Tokens probed.
    pub tokens: usize,
    /// How long the cache was right.
    pub tokens_until_drift: UntilDrift,
    /// Largest divergence of a checkpoint, nats.
    pub oracle_kl_max: f64,
    /// What a divergence may be: 10 times the noise, or the least limit of the element type.
    pub limit: f64,
    /// 99th percentile of the divergence between decode and prefill over the first page.
    pub noise_p99: f64,
    /// The comparisons.
    pub checkpoints: Vec<Checkpoint>,
    /// The loss by position.
    pub bins: Vec<Bin>,
    /// Theil–Sen slope of the loss from the second bin on, nats per 1,000 tokens.
    pub nll_slope_per_1k: f64,
    /// Mean loss of the last two bins over the second bin's, nats.
    pub nll_drift: f64,
    /// Mean loss of the last two bins over that of the same tokens in a short context, nats.
    pub nll_excess: f64,
    /// Violations of the page books meanwhile.
    pub violations: u64,
    /// What is wrong.
    pub fault: Option<CacheFault>,
    /// The result.
    pub verdict: Verdict,
    /// What the noise and the losses are of.
    #[serde(skip)]
    pub observed: CacheObservations,
}

/// What [`CacheReport`] sums up. Nats.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CacheObservations {
    /// Divergences between decode and prefill over the first page.
    pub noise: Vec<f64>,
    /// Loss of each token behind the first.
    pub losses: Vec<f64>,
    /// Losses of the tokens of each bin from the third on, behind the bin before it alone.
    pub losses_short: Vec<Vec<f64>>,
}

/// Probes a cache with the first `n_tokens` of a text, the BOS included.
///
/// # Errors
/// Fewer tokens than [`MIN_PROBE_TOKENS`], a text with fewer tokens than that, or a generator that failed.
pub fn cache_probe(
    oracle: &dyn CacheOracle,
    text: ProbeText<'_>,
    n_tokens: usize,
    width: KvWidth,
    told: &mut dyn FnMut(usize),
) -> Result<CacheReport, VerifyError> {
    if n_tokens < MIN_PROBE_TOKENS {
        let (expected, found) = ("at least 2048", n_tokens);
        return Err(VerifyError::Option { option: "tokens", expected, found });
    }
    let ids: Vec<u32> = text.bos.iter().chain(text.ids).copied().take(n_tokens).collect();
    if ids.len() < n_tokens {
        let (expected, found) = ("as many tokens as are probed", ids.len());
        return Err(VerifyError::Option { option: "text", expected, found });
    }
    let violations = oracle.violations();
    let noise = noise(oracle, &ids[..CHECKPOINT_TOKENS.get()])?;
    let noise_p99 = quantile(&noise, 0.99)?;
    let (checkpoints, losses) = checkpoints(oracle, &ids, told)?;
    let mut observed = CacheObservations { noise, losses, ..CacheObservations::default() };
    let bins = bins(oracle, text.bos, &ids, &mut observed)?;
    let least = width.least_limit();
    let judged = Judged {
        noise_is_high: noise_p99 > least,
        limit: width.limit(noise_p99),
        violations: oracle.violations() - violations,
        tokens: ids.len(),
    };
    judged.report(noise_p99, checkpoints, bins, observed)
}

/// Divergences between rows that were computed one by one and in chunks. They are taken where no fault of a cache
/// shows: a limit that a broken cache had raised would hide it.
pub(crate) fn noise(oracle: &dyn CacheOracle, ids: &[u32]) -> Result<Vec<f64>, VerifyError> {
    let mut chunked = Vec::new();
    oracle.rows(ids, &mut |at, row| {
        if (at + 1).is_multiple_of(NOISE_EVERY.get()) {
            chunked.push(row.to_vec());
        }
    })?;
    let mut divergences = Vec::new();
    oracle.live(ids, NOISE_EVERY, &mut |_, row| {
        divergences.push(kld_from_logits(&chunked[divergences.len()], row));
    })?;
    Ok(divergences.into_iter().collect::<Result<_, _>>()?)
}

/// What a fresh prefill says. It is causal: the row behind a token is that of a prefill which ends there.
struct Prefill {
    /// The row behind each checkpoint.
    rows: Vec<Vec<f32>>,
    /// The loss of each token behind the first.
    losses: Vec<f64>,
}

impl Prefill {
    fn of(oracle: &dyn CacheOracle, ids: &[u32]) -> Result<Prefill, GenerateError> {
        let mut prefill = Prefill { rows: Vec::new(), losses: Vec::with_capacity(ids.len()) };
        oracle.rows(ids, &mut |at, row| {
            if (at + 1).is_multiple_of(CHECKPOINT_TOKENS.get()) {
                prefill.rows.push(row.to_vec());
            }
            if let Some(&next) = ids.get(at + 1) {
                prefill.losses.push(loss(row, next));
            }
        })?;
        Ok(prefill)
    }
}

/// The checkpoints, and the losses of the prefill, which runs while the live sequence is in the same pool.
fn checkpoints(
    oracle: &dyn CacheOracle,
    ids: &[u32],
    told: &mut dyn FnMut(usize),
) -> Result<(Vec<Checkpoint>, Vec<f64>), VerifyError> {
    let mut prefill = None;
    let mut found = Vec::new();
    oracle.live(ids, CHECKPOINT_TOKENS, &mut |at, live| {
        if let Ok(prefill) = prefill.get_or_insert_with(|| Prefill::of(oracle, ids)) {
            found.push(compare(at + 1, &prefill.rows[found.len()], live));
            told(at + 1);
        }
    })?;
    let prefill = prefill.expect("a probe has at least one checkpoint")?;
    Ok((found.into_iter().collect::<Result<_, _>>()?, prefill.losses))
}

fn compare(tokens: usize, fresh: &[f32], live: &[f32]) -> Result<Checkpoint, VerifyError> {
    // A broken cache may give no numbers at all; of a fresh prefill that is an error.
    let is_finite = live.iter().all(|x| x.is_finite());
    let kl = if is_finite { kld_from_logits(fresh, live)? } else { f64::INFINITY };
    let (best, margin) = best(fresh);
    let argmax_changed = best != self::best(live).0;
    Ok(Checkpoint { tokens, kl, argmax_changed, margin })
}

/// The most likely token, and by how much.
fn best(row: &[f32]) -> (usize, f64) {
    let (mut at, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (index, &x) in row.iter().enumerate() {
        if x > first {
            (at, first, second) = (index, x, first);
        } else {
            second = second.max(x);
        }
    }
    (at, f64::from(first) - f64::from(second))
}

fn bins(
    oracle: &dyn CacheOracle,
    bos: Option<u32>,
    ids: &[u32],
    observed: &mut CacheObservations,
) -> Result<Vec<Bin>, VerifyError> {
    let n_bins = ids.len() / BIN_TOKENS;
    let mut bins = Vec::with_capacity(n_bins);
    for end in (1..=n_bins).map(|bin| bin * BIN_TOKENS) {
        // The first token has no loss.
        let from = (end - BIN_TOKENS).max(1);
        let nll = mean(&observed.losses[from - 1..end - 1])?;
        let nll_short = match (end - BIN_TOKENS).checked_sub(BIN_TOKENS) {
            Some(0) => Some(nll),
            Some(start) => {
                let short: Vec<u32> = bos.iter().chain(&ids[start..end]).copied().collect();
                let short = Prefill::of(oracle, &short)?.losses;
                let short = short[short.len() - BIN_TOKENS..].to_vec();
                let nll_short = mean(&short)?;
                observed.losses_short.push(short);
                Some(nll_short)
            }
            None => None,
        };
        bins.push(Bin { tokens: end, nll, nll_short });
    }
    Ok(bins)
}

/// −ln p of a token, in nats.
fn loss(row: &[f32], id: u32) -> f64 {
    let greatest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = row.iter().map(|&x| (f64::from(x) - greatest).exp()).sum();
    greatest + total.ln() - f64::from(row[id as usize])
}

/// What a verdict needs beside the measurements.
struct Judged {
    noise_is_high: bool,
    limit: f64,
    violations: u64,
    tokens: usize,
}

impl Judged {
    fn report(
        self,
        noise_p99: f64,
        checkpoints: Vec<Checkpoint>,
        bins: Vec<Bin>,
        observed: CacheObservations,
    ) -> Result<CacheReport, VerifyError> {
        let Judged { noise_is_high, limit, violations, tokens } = self;
        let nll: Vec<f64> = bins.iter().map(|bin| bin.nll).collect();
        #[expect(clippy::cast_precision_loss, reason = "texts are far below 2^52 tokens")]
        let places: Vec<f64> = bins.iter().map(|bin| bin.tokens as f64 / 1000.0).collect();
        let nll_slope_per_1k = theil_sen(&places[1..], &nll[1..])?.slope;
        let last_two = bins.len() - 2;
        let nll_drift = mean(&nll[last_two..])? - nll[1];
        let excess = |bin: &Bin| bin.nll_short.map(|short| bin.nll - short);
        let nll_excess = mean(&bins[last_two..].iter().filter_map(excess).collect::<Vec<_>>())?;
        let drift = drift(&checkpoints, limit);
        let is_last_over = checkpoints.last().is_some_and(|last| is_over(last, limit));
        let fault = if violations > 0 {
            Some(CacheFault::KvIntegrity)
        } else if noise_is_high {
            Some(CacheFault::Noise)
        } else if drift.is_some() {
            Some(CacheFault::CacheDrift)
        } else if is_last_over {
            Some(CacheFault::LastCheckpoint)
        } else {
            let rises = nll_drift > RISE_NATS && nll_excess > EXCESS_NATS;
            rises.then_some(CacheFault::ContextRange)
        };
        let verdict = match fault {
            None => Verdict::Pass,
            Some(CacheFault::Noise | CacheFault::LastCheckpoint) => Verdict::Inconclusive,
            Some(CacheFault::KvIntegrity | CacheFault::CacheDrift | CacheFault::ContextRange) => {
                Verdict::Fail
            }
        };
        let oracle_kl_max = checkpoints.iter().map(|point| point.kl).fold(0.0, f64::max);
        let censored = UntilDrift::AtLeast(checkpoints.last().map_or(0, |last| last.tokens));
        Ok(CacheReport {
            tokens,
            tokens_until_drift: drift.map_or(censored, UntilDrift::At),
            oracle_kl_max,
            limit,
            noise_p99,
            checkpoints,
            bins,
            nll_slope_per_1k,
            nll_drift,
            nll_excess,
            violations,
            fault,
            verdict,
            observed,
        })
    }
}

/// A divergence that is no number is over every limit.
fn is_over(point: &Checkpoint, limit: f64) -> bool {
    point.kl > limit || point.kl.is_nan()
}

/// Tokens at the first of two checkpoints in a row over the limit, or at one with another most likely token
/// that the reference was sure of.
#[must_use]
pub fn drift(checkpoints: &[Checkpoint], limit: f64) -> Option<usize> {
    let follows = |at: usize| checkpoints.get(at + 1).is_some_and(|next| is_over(next, limit));
    let mut points = checkpoints.iter().enumerate();
    let drifted = points.find(|(at, point)| {
        is_over(point, limit) && follows(*at) || point.argmax_changed && point.margin > MIN_MARGIN
    });
    drifted.map(|(_, point)| point.tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens from here on are hard to predict, in a `Fake`.
    const HARD: u32 = 6;
    const N: usize = 4096;

    /// A model of eight tokens that knows its text, with faults on demand.
    #[derive(Default)]
    struct Fake {
        text: Vec<u32>,
        /// Beyond so many tokens a live cache is wrong.
        drifts_at: Option<usize>,
        /// Only the checkpoint there is wrong.
        slips_at: Option<usize>,
        /// Beyond so many tokens the model is wrong, whatever its cache.
        range: Option<usize>,
        /// The divergence of decode and prefill on the first page, as a change of one logit.
        noise: f32,
        /// What should be a prefill reads the live cache.
        is_blind: bool,
        violations: std::cell::Cell<u64>,
        breaks_pages: bool,
    }

    impl Fake {
        fn new() -> Fake {
            let text = (0..).map(|at: u32| at * at % 5).take(N).collect();
            Fake { text, ..Fake::default() }
        }

        /// The row behind `at + 1` tokens whose next one is `next`.
        fn row(&self, at: usize, next: u32) -> Vec<f32> {
            let is_lost = next >= HARD || self.range.is_some_and(|range| at >= range);
            let mut row = vec![0.0; 8];
            row[next as usize] = if is_lost { 0.5 } else { 4.0 };
            row[0] += 0.1;
            row
        }

        fn live_row(&self, at: usize) -> Vec<f32> {
            let mut row = self.row(at, self.text.get(at + 1).copied().unwrap_or(0));
            let drifts = self.drifts_at.is_some_and(|from| at >= from);
            if drifts || self.slips_at == Some(at + 1) {
                row[5] += 2.0;
            }
            row[1] += self.noise;
            row
        }
    }

    impl CacheOracle for Fake {
        fn live(
            &self,
            ids: &[u32],
            every: NonZeroUsize,
            visit: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), GenerateError> {
            for at in (0..ids.len()).filter(|at| (at + 1).is_multiple_of(every.get())) {
                visit(at, &self.live_row(at));
            }
            self.violations.set(self.violations.get() + u64::from(self.breaks_pages));
            Ok(())
        }

        fn rows(
            &self,
            ids: &[u32],
            visit: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), GenerateError> {
            let is_prefix = self.text.starts_with(ids);
            let known = if is_prefix { &self.text[..] } else { ids };
            for at in 0..ids.len() {
                let row = if is_prefix && self.is_blind {
                    self.live_row(at)
                } else {
                    self.row(at, known.get(at + 1).copied().unwrap_or(0))
                };
                visit(at, &row);
            }
            Ok(())
        }

        fn violations(&self) -> u64 {
            self.violations.get()
        }
    }

    fn probe(fake: &Fake) -> CacheReport {
        let text = ProbeText { bos: None, ids: &fake.text };
        cache_probe(fake, text, N, KvWidth::Sixteen, &mut |_| {}).unwrap()
    }

    #[test]
    fn a_right_cache_is_right_for_as_long_as_it_was_looked_at() {
        let report = probe(&Fake::new());
        assert_eq!((report.verdict, report.fault), (Verdict::Pass, None));
        assert_eq!(report.tokens_until_drift, UntilDrift::AtLeast(4096));
        assert_eq!((report.checkpoints.len(), report.bins.len()), (16, 8));
        assert!((report.limit - 0.01).abs() < 1e-12 && report.oracle_kl_max < 1e-12);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["tokens_until_drift"], ">= 4096", "a bound is no number");
        assert_eq!(json["verdict"], "pass");
    }

    #[test]
    fn drift_is_the_first_of_two_checkpoints_over_the_limit() {
        let report = probe(&Fake { drifts_at: Some(1000), ..Fake::new() });
        assert_eq!(report.fault, Some(CacheFault::CacheDrift));
        assert_eq!(report.tokens_until_drift, UntilDrift::At(1024));
        assert_eq!(report.verdict, Verdict::Fail);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["tokens_until_drift"], 1024);
        // One alone is none, and at the end nobody knows.
        let slip = probe(&Fake { slips_at: Some(1024), ..Fake::new() });
        assert_eq!((slip.verdict, slip.fault), (Verdict::Pass, None));
        assert!(slip.oracle_kl_max > slip.limit);
        let last = probe(&Fake { slips_at: Some(4096), ..Fake::new() });
        assert_eq!(last.fault, Some(CacheFault::LastCheckpoint));
        assert_eq!(last.verdict, Verdict::Inconclusive);
    }

    /// Mutation: an oracle that reads the cache that it is to judge passes everything.
    #[test]
    fn an_oracle_that_reads_the_live_cache_lets_the_fault_through() {
        let blind = Fake { drifts_at: Some(1000), is_blind: true, ..Fake::new() };
        assert_ne!(blind.live_row(1500), blind.row(1500, blind.text[1501]), "what the user gets");
        assert_eq!(probe(&blind).verdict, Verdict::Pass);
    }

    #[test]
    fn another_most_likely_token_is_drift_where_the_reference_was_sure() {
        let point =
            |argmax_changed, margin| Checkpoint { tokens: 512, kl: 0.0, argmax_changed, margin };
        assert_eq!(drift(&[point(true, 0.51)], 0.01), Some(512));
        assert_eq!(drift(&[point(true, 0.5)], 0.01), None);
        assert_eq!(drift(&[point(false, 9.0)], 0.01), None);
        let nan = Checkpoint { kl: f64::NAN, ..point(false, 1.0) };
        assert_eq!(drift(&[nan, nan], 0.01), Some(512));
        assert_eq!(best(&[1.0, 3.5, 3.0]), (1, 0.5));
    }

    #[test]
    fn a_rising_loss_with_a_right_cache_is_the_contexts_range() {
        let report = probe(&Fake { range: Some(3000), ..Fake::new() });
        assert_eq!(report.fault, Some(CacheFault::ContextRange), "{report:?}");
        assert_eq!(report.verdict, Verdict::Fail);
        assert!(report.oracle_kl_max < 1e-12 && report.nll_drift > 1.0 && report.nll_excess > 1.0);
        // A text whose end is hard is not: the same tokens are as hard in a short context.
        let mut harder = Fake::new();
        harder.text[3000..].iter_mut().for_each(|id| *id = HARD);
        let report = probe(&harder);
        assert!(report.nll_drift > 1.0 && report.nll_slope_per_1k > 0.1, "{report:?}");
        assert_eq!((report.verdict, report.fault), (Verdict::Pass, None));
    }

    #[test]
    fn noise_raises_the_limit_until_nothing_can_be_told() {
        let some = probe(&Fake { noise: 0.2, ..Fake::new() });
        assert!(some.noise_p99 > 1e-4 && some.noise_p99 < 0.01, "{}", some.noise_p99);
        assert!(some.limit >= 0.01 && some.verdict == Verdict::Pass);
        let much = probe(&Fake { noise: 2.5, ..Fake::new() });
        assert_eq!((much.verdict, much.fault), (Verdict::Inconclusive, Some(CacheFault::Noise)));
    }

    #[test]
    fn broken_books_outweigh_everything() {
        let report = probe(&Fake { breaks_pages: true, ..Fake::new() });
        assert_eq!((report.verdict, report.fault), (Verdict::Fail, Some(CacheFault::KvIntegrity)));
        assert_eq!(report.violations, 2);
    }

    #[test]
    fn too_little_is_refused() {
        let fake = Fake::new();
        let refused = |n_tokens, ids| {
            let text = ProbeText { bos: Some(0), ids };
            let probed = cache_probe(&fake, text, n_tokens, KvWidth::Eight, &mut |_| {});
            probed.unwrap_err().to_string()
        };
        assert!(refused(2047, &fake.text).contains("at least 2048, found 2047"));
        let message = refused(2048, &fake.text[..2000]);
        assert!(message.contains("found 2001"), "{message}");
    }
}
