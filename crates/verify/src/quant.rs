//! The quantisation probe (§1.5): how far a model whose weights are rounded is from its reference, teacher-forced.
//!
//! All models read the same tokens at the same time, and every position is compared as it comes: nothing but a few
//! numbers of each is kept, where the distributions of a text would take gigabytes.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use exrail_metrics::{Fidelity, FidelitySummary, LogProbabilities, MetricsError, mean, quantile};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::noise;
use crate::prompt::hex;
use crate::{CacheOracle, GenerateError, Status, Verdict, VerifyError};

/// Distributions that a model may be ahead of the slowest.
const AHEAD: usize = 8;
/// Tokens that the noise floor is measured on.
const NOISE_TOKENS: usize = 256;
/// Parameters from which the limits of §1.5.5 hold; below, they are to be calibrated anew.
pub const LIMITS_FROM_PARAMETERS: u64 = 3_000_000_000;

/// Rows of a model: [`CacheOracle::rows`] of one that several threads may ask.
pub type RowOracle<'a> = dyn CacheOracle + Sync + 'a;

/// What a model is loaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantMode {
    /// The stored weights, as a server of the same options computes with them.
    AsServed,
    /// Another checkpoint with the same vocabulary.
    Against,
    /// Matrices rounded to int8.
    Int8,
    /// Matrices of the layers rounded to int4, embedding and head to int8.
    Int4,
}

impl QuantMode {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            QuantMode::AsServed => "as_served",
            QuantMode::Against => "against",
            QuantMode::Int8 => "int8",
            QuantMode::Int4 => "int4",
        }
    }
}

/// Tokens to compare on: sequences that begin anew, each at least 2 tokens.
#[derive(Clone, Debug)]
pub struct QuantText {
    /// What kind of text it is.
    pub name: String,
    /// Token ids.
    pub sequences: Vec<Vec<u32>>,
}

/// What the reference differs from itself when it computes the same in another way: row by row instead of in chunks
/// (§1.5.3). Nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NoiseFloor {
    /// Distributions.
    pub positions: usize,
    /// Mean divergence.
    pub kld_mean: f64,
    /// Largest divergence.
    pub kld_max: f64,
}

/// The models on one text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextFidelity {
    /// What kind of text it is.
    pub name: String,
    /// Tokens read.
    pub tokens: usize,
    /// SHA-256 over the ids of every sequence behind their number, as little-endian 32-bit words; hexadecimal.
    pub ids_sha256: String,
    /// Each model against the reference.
    pub modes: BTreeMap<QuantMode, FidelitySummary>,
    /// Int4 with int8 as its reference.
    pub int4_vs_int8: Option<FidelitySummary>,
    /// What the summaries are of, position by position.
    #[serde(skip)]
    pub observed: TextObservations,
}

/// Position by position, what [`TextFidelity`] sums up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TextObservations {
    /// Each model against the reference.
    pub modes: BTreeMap<QuantMode, Fidelity>,
    /// Int4 with int8 as its reference.
    pub int4_vs_int8: Option<Fidelity>,
}

/// One limit of §1.5.5.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FidelityGate {
    /// What kind of text it is.
    pub text: String,
    /// The model.
    pub mode: QuantMode,
    /// The measure.
    pub metric: &'static str,
    /// Its value.
    pub value: f64,
    /// Passes up to this value, for a share from it on.
    pub pass: f64,
    /// Fails beyond it, where such a limit is given.
    pub fail: Option<f64>,
    /// Where it stands.
    pub status: Status,
}

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantReport {
    /// The reference against itself.
    pub noise: NoiseFloor,
    /// Divergence by divergence, what it sums up.
    #[serde(skip)]
    pub noise_observed: Vec<f64>,
    /// Text by text.
    pub texts: Vec<TextFidelity>,
    /// The limits.
    pub gates: Vec<FidelityGate>,
    /// Whether int8 is nearer to the reference than int4 on every text; if not, files were mixed up. None where one of
    /// them is missing.
    pub ordered: Option<bool>,
    /// Each model against what an earlier run found of it; empty without one.
    pub regressions: Vec<Regression>,
    /// The worst of all.
    pub verdict: Verdict,
}

/// Share that a mean divergence may grow by from one run to another (§1.5.5).
const GROWTH: f64 = 0.2;

/// A mean divergence against that of an earlier run on the same ids.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Regression {
    /// What kind of text it is.
    pub text: String,
    /// The model.
    pub mode: QuantMode,
    /// Now.
    pub kld_mean: f64,
    /// Then.
    pub before: f64,
    /// [`Status::Pass`] up to a fifth more than then, or within the noise floor, else [`Status::Review`].
    pub status: Status,
}

/// An earlier [`QuantReport`], as far as it is compared.
#[derive(Clone, Debug, Deserialize)]
pub struct FidelityBaseline {
    texts: Vec<BaselineText>,
}

#[derive(Clone, Debug, Deserialize)]
struct BaselineText {
    name: String,
    ids_sha256: String,
    modes: BTreeMap<QuantMode, BaselineMode>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct BaselineMode {
    kld_mean: f64,
}

impl QuantReport {
    /// Compares the divergences with those of an earlier run. A scale of its own is a scale for a model that the limits
    /// are none for: where nothing else is open, it passes when it did not grow.
    ///
    /// # Errors
    /// [`BaselineDiffers`] when a text, its ids or a model is in one of the runs alone.
    pub fn compare_with(&mut self, baseline: &FidelityBaseline) -> Result<(), BaselineDiffers> {
        let named = |texts: Vec<String>| texts.join(", ");
        let found = self.texts.iter().map(|text| key(&text.name, &text.ids_sha256, &text.modes));
        let of_baseline = |text: &BaselineText| key(&text.name, &text.ids_sha256, &text.modes);
        let expected = baseline.texts.iter().map(of_baseline);
        let (expected, found) = (named(expected.collect()), named(found.collect()));
        if expected != found {
            return Err(BaselineDiffers { expected, found });
        }
        for (text, then) in self.texts.iter().zip(&baseline.texts) {
            for ((&mode, summary), before) in text.modes.iter().zip(then.modes.values()) {
                let (kld_mean, before) = (summary.kld_mean, before.kld_mean);
                let most = (before * (1.0 + GROWTH)).max(self.noise.kld_max);
                let status = if kld_mean <= most { Status::Pass } else { Status::Review };
                let text = text.name.clone();
                self.regressions.push(Regression { text, mode, kld_mean, before, status });
            }
        }
        let grew = self.regressions.iter().any(|regression| regression.status != Status::Pass);
        let limits_say_nothing = self.gates.iter().all(|g| g.status == Status::NotCalibrated);
        if self.verdict == Verdict::Fail {
            return Ok(());
        }
        if grew {
            self.verdict = Verdict::Review;
        } else if self.verdict == Verdict::Inconclusive && limits_say_nothing {
            self.verdict = Verdict::Pass;
        }
        Ok(())
    }
}

/// Two runs did not read the same.
#[derive(Debug, thiserror::Error)]
#[error("baseline: expected the texts and models {expected}, found {found}")]
pub struct BaselineDiffers {
    expected: String,
    found: String,
}

/// What two runs have in common.
fn key<T>(name: &str, ids_sha256: &str, modes: &BTreeMap<QuantMode, T>) -> String {
    let modes: Vec<&str> = modes.keys().map(|mode| mode.name()).collect();
    format!("`{name}` (ids {}) as {}", &ids_sha256[..ids_sha256.len().min(12)], modes.join(", "))
}

/// Compares `modes` with `reference` on `texts`. `parameters` of the model say whether the limits hold for it.
///
/// # Errors
/// A text without two tokens in a sequence, a model that fails or gives no distribution.
pub fn quant_probe(
    reference: &RowOracle<'_>,
    modes: &BTreeMap<QuantMode, &RowOracle<'_>>,
    texts: &[QuantText],
    parameters: u64,
    told: &mut dyn FnMut(usize),
) -> Result<QuantReport, VerifyError> {
    let sequences = || texts.iter().flat_map(|text| &text.sequences);
    let shortest = sequences().map(Vec::len).min().unwrap_or(0);
    if shortest < 2 {
        let (expected, found) = ("at least 2 tokens in every sequence", shortest);
        return Err(VerifyError::Option { option: "text", expected, found });
    }
    let longest = sequences().max_by_key(|ids| ids.len()).map(Vec::as_slice).unwrap_or_default();
    let noise_observed = noise(reference, &longest[..longest.len().min(NOISE_TOKENS)])?;
    let noise = noise_floor(&noise_observed)?;
    let mut n_told = 0;
    let mut found = Vec::with_capacity(texts.len());
    for text in texts {
        let mut tell = |n| {
            n_told += n;
            told(n_told);
        };
        found.push(compare_text(reference, modes, text, &mut tell)?);
    }
    let holds = parameters >= LIMITS_FROM_PARAMETERS;
    let gates: Vec<FidelityGate> = found.iter().flat_map(|text| gates_of(text, holds)).collect();
    let ordered = found.iter().map(is_ordered).collect::<Option<Vec<bool>>>();
    let ordered = ordered.map(|each| each.into_iter().all(|is| is));
    let verdict = verdict(&gates, ordered);
    let (texts, regressions) = (found, Vec::new());
    Ok(QuantReport { noise, noise_observed, texts, gates, ordered, regressions, verdict })
}

fn noise_floor(divergences: &[f64]) -> Result<NoiseFloor, VerifyError> {
    Ok(NoiseFloor {
        positions: divergences.len(),
        kld_mean: mean(divergences)?,
        kld_max: quantile(divergences, 1.0)?,
    })
}

fn compare_text(
    reference: &RowOracle<'_>,
    modes: &BTreeMap<QuantMode, &RowOracle<'_>>,
    text: &QuantText,
    told: &mut dyn FnMut(usize),
) -> Result<TextFidelity, VerifyError> {
    let models: Vec<&RowOracle<'_>> =
        [reference].into_iter().chain(modes.values().copied()).collect();
    let place = |mode| modes.keys().position(|&key| key == mode).map(|place| place + 1);
    let pair = place(QuantMode::Int8).zip(place(QuantMode::Int4));
    let mut fidelities = vec![Fidelity::default(); modes.len()];
    let mut between = Fidelity::default();
    for ids in &text.sequences {
        fidelities.iter_mut().chain([&mut between]).for_each(Fidelity::begin_sequence);
        in_step(&models, ids, &mut |at, rows| {
            let next = ids.get(at + 1).map(|&id| id as usize);
            for (fidelity, row) in fidelities.iter_mut().zip(&rows[1..]) {
                fidelity.add(&rows[0], row, next)?;
            }
            match pair {
                Some((int8, int4)) => between.add(&rows[int8], &rows[int4], next),
                None => Ok(()),
            }
        })?;
        told(ids.len());
    }
    let summaries = modes.keys().zip(&fidelities).map(|(&mode, of)| Ok((mode, of.summary()?)));
    Ok(TextFidelity {
        name: text.name.clone(),
        tokens: text.sequences.iter().map(Vec::len).sum(),
        ids_sha256: ids_sha256(&text.sequences),
        modes: summaries.collect::<Result<_, MetricsError>>()?,
        int4_vs_int8: pair.map(|_| between.summary()).transpose()?,
        observed: TextObservations {
            modes: modes.keys().copied().zip(fidelities).collect(),
            int4_vs_int8: pair.map(|_| between),
        },
    })
}

fn ids_sha256(sequences: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for ids in sequences {
        hash.update((ids.len() as u32).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    hex(&hash.finalize())
}

/// Takes a position, and what every model gives there.
type Visit<'a> = dyn FnMut(usize, &[LogProbabilities]) -> Result<(), MetricsError> + 'a;

/// Lets all models read the tokens, and calls `visit` with each position and what every model gives there.
fn in_step(
    models: &[&RowOracle<'_>],
    ids: &[u32],
    visit: &mut Visit<'_>,
) -> Result<(), VerifyError> {
    thread::scope(|scope| {
        let mut receivers = Vec::with_capacity(models.len());
        let mut readers = Vec::with_capacity(models.len());
        for &model in models {
            let (sender, receiver) = sync_channel(AHEAD);
            receivers.push(receiver);
            readers.push(scope.spawn(move || read(model, ids, &sender)));
        }
        let compared = compare_rows(receivers, ids.len(), visit);
        for reader in readers {
            reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        compared
    })
}

/// Sends what the model gives at each position, as long as somebody reads it.
fn read(
    model: &RowOracle<'_>,
    ids: &[u32],
    sender: &SyncSender<Result<LogProbabilities, MetricsError>>,
) -> Result<(), GenerateError> {
    let mut is_read = true;
    model.rows(ids, &mut |_, row| {
        is_read = is_read && sender.send(LogProbabilities::of(row)).is_ok();
    })
}

/// Takes the receivers, so that they are gone when it ends and nobody waits for a place.
fn compare_rows(
    receivers: Vec<Receiver<Result<LogProbabilities, MetricsError>>>,
    n: usize,
    visit: &mut Visit<'_>,
) -> Result<(), VerifyError> {
    for at in 0..n {
        let mut rows = Vec::with_capacity(receivers.len());
        for receiver in &receivers {
            match receiver.recv() {
                Ok(row) => rows.push(row?),
                // The model failed, and says why itself.
                Err(_) => return Ok(()),
            }
        }
        visit(at, &rows)?;
    }
    Ok(())
}

/// The limits of §1.5.5 that a mode has.
fn limits(mode: QuantMode) -> &'static [Limit] {
    match mode {
        QuantMode::AsServed | QuantMode::Against => &[],
        QuantMode::Int8 => &[
            Limit { metric: "kld_mean", pass: 0.005, fail: Some(0.02) },
            Limit { metric: "top1", pass: 0.98, fail: None },
            Limit { metric: "ln_ppl_ratio", pass: 0.005, fail: None },
        ],
        QuantMode::Int4 => &[
            Limit { metric: "kld_mean", pass: 0.05, fail: Some(0.10) },
            Limit { metric: "kld_p99", pass: 0.5, fail: None },
            Limit { metric: "top1", pass: 0.90, fail: Some(0.85) },
            Limit { metric: "ln_ppl_ratio", pass: 0.03, fail: None },
        ],
    }
}

struct Limit {
    metric: &'static str,
    pass: f64,
    fail: Option<f64>,
}

impl Limit {
    fn value(&self, of: &FidelitySummary) -> f64 {
        match self.metric {
            "kld_mean" => of.kld_mean,
            "kld_p99" => of.kld_p99,
            "top1" => of.top1,
            _ => of.ln_ppl_ratio,
        }
    }

    fn status(&self, value: f64) -> Status {
        // A share is better when it is larger.
        let is_share = self.metric == "top1";
        let within = |limit: f64| if is_share { value >= limit } else { value <= limit };
        if within(self.pass) {
            Status::Pass
        } else if self.fail.is_some_and(|fail| !within(fail)) {
            Status::Fail
        } else {
            Status::Review
        }
    }
}

/// Where the limits do not hold, nothing passes and nothing fails.
fn gates_of(text: &TextFidelity, holds: bool) -> Vec<FidelityGate> {
    let of_mode = |(&mode, summary): (&QuantMode, &FidelitySummary)| {
        let gates = limits(mode).iter().map(|limit| {
            let value = limit.value(summary);
            let status = if holds { limit.status(value) } else { Status::NotCalibrated };
            let Limit { metric, pass, fail } = *limit;
            FidelityGate { text: text.name.clone(), mode, metric, value, pass, fail, status }
        });
        gates.collect::<Vec<_>>()
    };
    text.modes.iter().flat_map(of_mode).collect()
}

fn is_ordered(text: &TextFidelity) -> Option<bool> {
    let of = |mode| text.modes.get(&mode).map(|summary| summary.kld_mean);
    Some(of(QuantMode::Int8)? < of(QuantMode::Int4)?)
}

/// A wrong order fails whatever the limits say.
fn verdict(gates: &[FidelityGate], ordered: Option<bool>) -> Verdict {
    let has = |status| gates.iter().any(|gate| gate.status == status);
    if ordered == Some(false) || has(Status::Fail) {
        Verdict::Fail
    } else if gates.is_empty() || has(Status::NotCalibrated) {
        Verdict::Inconclusive
    } else if has(Status::Review) {
        Verdict::Review
    } else {
        Verdict::Pass
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    const V: usize = 50;

    /// A model whose logits are off by up to `error`, and whose rows end early when it `fails_at` one.
    struct Fake {
        error: f32,
        fails_at: Option<usize>,
    }

    impl Fake {
        fn off(error: f32) -> Fake {
            Fake { error, fails_at: None }
        }

        fn row(&self, ids: &[u32], at: usize) -> Vec<f32> {
            let wave = |id: usize, k: u32| {
                let n = (ids[at] * 7 + k) as usize * (id + 3) * 2_654_435_761;
                f32::from((n >> 20) as u8) / 255.0
            };
            // One token is clearly the most likely.
            let bump = |id: usize| if id == (ids[at] as usize * 3) % V { 7.0 } else { 0.0 };
            let logit = |id| bump(id) + 6.0 * wave(id, 1) + self.error * (wave(id, 2) - 0.5);
            (0..V).map(logit).collect()
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
                visit(at, &self.row(ids, at));
            }
            Ok(())
        }

        fn rows(
            &self,
            ids: &[u32],
            visit: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), GenerateError> {
            for at in 0..ids.len() {
                if self.fails_at == Some(at) {
                    return Err(GenerateError::Engine("out of pages".into()));
                }
                visit(at, &self.row(ids, at));
            }
            Ok(())
        }

        fn violations(&self) -> u64 {
            0
        }
    }

    fn text(name: &str) -> QuantText {
        let sequence = |s: u32| (0..64).map(|i| (i * 13 + s * 5) % 50).collect();
        QuantText { name: name.into(), sequences: (0..4).map(sequence).collect() }
    }

    fn probe(int8: &Fake, int4: &Fake, parameters: u64) -> Result<QuantReport, VerifyError> {
        let modes: BTreeMap<QuantMode, &RowOracle<'_>> =
            [(QuantMode::Int8, int8 as _), (QuantMode::Int4, int4 as _)].into();
        let texts = [text("general"), text("frames")];
        quant_probe(&Fake::off(0.0), &modes, &texts, parameters, &mut |_| {})
    }

    const LARGE: u64 = LIMITS_FROM_PARAMETERS;

    #[test]
    fn a_fine_grid_passes_a_coarse_one_fails_and_both_are_told_apart() {
        let report = probe(&Fake::off(0.05), &Fake::off(0.5), LARGE).unwrap();
        assert_eq!((report.verdict, report.ordered), (Verdict::Pass, Some(true)), "{report:?}");
        assert_eq!((report.texts.len(), report.gates.len()), (2, 14));
        let text = &report.texts[0];
        let (int8, int4) = (&text.modes[&QuantMode::Int8], &text.modes[&QuantMode::Int4]);
        assert_eq!((text.tokens, int8.positions, int8.sequences), (256, 256, 4));
        assert!(0.0 < int8.kld_mean && int8.kld_mean < int4.kld_mean / 10.0, "{text:?}");
        assert!(text.int4_vs_int8.as_ref().unwrap().kld_mean > int8.kld_mean);
        let coarse = probe(&Fake::off(0.05), &Fake::off(12.0), LARGE).unwrap();
        assert_eq!(coarse.verdict, Verdict::Fail);
        let failed = coarse.gates.iter().filter(|gate| gate.status == Status::Fail);
        assert!(failed.clone().count() > 0 && failed.clone().all(|g| g.mode == QuantMode::Int4));
    }

    #[test]
    fn the_reference_against_itself_is_the_noise_floor() {
        let noise = probe(&Fake::off(0.0), &Fake::off(0.0), LARGE).unwrap().noise;
        assert!(noise.positions >= 4 && noise.kld_max == 0.0, "{noise:?}");
    }

    #[test]
    fn files_that_were_mixed_up_fail_whatever_the_limits_say() {
        let report = probe(&Fake::off(0.5), &Fake::off(0.05), LARGE).unwrap();
        assert_eq!((report.ordered, report.verdict), (Some(false), Verdict::Fail));
        let small = probe(&Fake::off(0.5), &Fake::off(0.05), 135_000_000).unwrap();
        assert_eq!(small.verdict, Verdict::Fail);
    }

    #[test]
    fn limits_of_large_models_are_no_scale_for_small_ones() {
        for error in [0.5, 20.0] {
            let report = probe(&Fake::off(0.05), &Fake::off(error), 135_000_000).unwrap();
            assert_eq!(report.verdict, Verdict::Inconclusive);
            assert!(report.gates.iter().all(|gate| gate.status == Status::NotCalibrated));
        }
    }

    fn baseline(report: &QuantReport) -> FidelityBaseline {
        serde_json::from_value(serde_json::to_value(report).unwrap()).unwrap()
    }

    #[test]
    fn a_small_model_is_judged_by_its_own_past() {
        let then = probe(&Fake::off(0.05), &Fake::off(0.5), 135_000_000).unwrap();
        let against = |int4: f32| {
            let mut now = probe(&Fake::off(0.05), &Fake::off(int4), 135_000_000).unwrap();
            now.compare_with(&baseline(&then)).unwrap();
            now
        };
        let same = against(0.5);
        assert_eq!((same.verdict, same.regressions.len()), (Verdict::Pass, 4));
        // The divergence grows with the square: 8 % and 32 %.
        assert_eq!(against(0.52).verdict, Verdict::Pass);
        let worse = against(0.575);
        assert_eq!(worse.verdict, Verdict::Review);
        let grown = worse.regressions.iter().filter(|of| of.status == Status::Review);
        assert!(grown.clone().count() == 2 && grown.clone().all(|of| of.mode == QuantMode::Int4));
        // Mutation: without the comparison nobody says so.
        let alone = probe(&Fake::off(0.05), &Fake::off(0.575), 135_000_000).unwrap();
        assert_eq!(alone.verdict, Verdict::Inconclusive);
        // What fails is not saved by a past that was as bad.
        let mut mixed = probe(&Fake::off(0.5), &Fake::off(0.05), 135_000_000).unwrap();
        mixed.compare_with(&baseline(&mixed.clone())).unwrap();
        assert_eq!(mixed.verdict, Verdict::Fail);
    }

    #[test]
    fn a_run_on_other_ids_is_no_baseline() {
        let then = probe(&Fake::off(0.05), &Fake::off(0.5), LARGE).unwrap();
        let mut other = then.clone();
        other.texts[1].ids_sha256 = "0".repeat(64);
        let error = other.compare_with(&baseline(&then)).unwrap_err().to_string();
        assert!(error.contains("ids 000000000000"), "{error}");
        let mut fewer = then.clone();
        fewer.texts[0].modes.remove(&QuantMode::Int8);
        assert!(fewer.compare_with(&baseline(&then)).is_err());
    }

    #[test]
    fn a_model_that_fails_says_so_and_nobody_waits() {
        let broken = Fake { error: 0.1, fails_at: Some(40) };
        for (int8, int4) in [(&broken, &Fake::off(0.1)), (&Fake::off(0.1), &broken)] {
            let error = probe(int8, int4, LARGE).unwrap_err().to_string();
            assert!(error.contains("out of pages"), "{error}");
        }
        let nan = probe(&Fake::off(f32::NAN), &Fake::off(0.1), LARGE).unwrap_err().to_string();
        assert!(nan.contains("finite"), "{nan}");
    }

    #[test]
    fn a_text_of_one_token_is_refused() {
        let modes: BTreeMap<QuantMode, &RowOracle<'_>> = BTreeMap::new();
        let short = QuantText { name: "general".into(), sequences: vec![vec![3]] };
        for texts in [&[short][..], &[]] {
            let found = quant_probe(&Fake::off(0.0), &modes, texts, LARGE, &mut |_| {});
            assert!(found.unwrap_err().to_string().contains("at least 2 tokens"));
        }
    }
}
