//! Runs a gold set through the system and makes the report.

use std::time::Instant;

use exrail_metrics::{
    Band, Ds, KSweep, SetDs, coverage_of, decoy_margin, gold_span_fits, k_sweep, median,
};
use exrail_retrieval::{Encode, Hit, SearchOptions};

use crate::answer::parse_answer;
use crate::ask::{AskOutcome, AskPolicy, OneOf, answer_all, evidence_ds, retrieve};
use crate::calibrate::CorpusCalibration;
use crate::encode::{Side, TextVectors};
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::fix::{Findings, fix_for};
use crate::gates::{self, Observed};
use crate::gold::{AnchorMode, GoldItem, GoldKind, GoldSet, N_PARAPHRASES, ResolvedItem};
use crate::observations::{
    self, AnswerObservation, CitedObservation, Observations, RefusalObservation,
    RetrievalObservation, SweepObservation,
};
use crate::positions::{Positions, anchor_tokens};
use crate::probe::{ItemLambda, probed};
use crate::prompt::{Live, Nonce};
use crate::report::{
    Config, Cost, CoverageSection, DeltaSSection, LambdaSection, Pins, REPORT_VERSION, Report,
    RetrievalItem, Sample, Status, Verdict, not_measured,
};
use crate::runs::{matches_reference, nonce_of};
use crate::scale::{AnswerScale, equivalence_in_words};
use crate::system::{Generate, GeneratorFacts, Retrieve, SamplingKind};

/// The k of the sweep (§1.1.10).
const SWEEP: [usize; 3] = [5, 10, 20];

/// Questions that are answered together: the weights are read once for all of them.
const AT_ONCE: usize = 12;

/// The parts of the system under test.
#[derive(Clone, Copy)]
pub struct System<'a> {
    /// What answers.
    pub generator: &'a dyn Generate,
    /// What finds.
    pub index: &'a dyn Retrieve,
    /// What the ΔS gate measures with.
    pub encoder: &'a dyn Encode,
}

/// How much is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyOptions {
    /// How questions are answered; the policy of production.
    pub policy: AskPolicy,
    /// Chooses the items of every sample.
    pub seed: u64,
    /// Answerable questions through retrieval; none means all, which costs no generation.
    pub n_retrieved: Option<usize>,
    /// Answerable questions answered, one generation each.
    pub n_answered: usize,
    /// Unanswerable questions asked, at most one generation each.
    pub n_unanswerable: usize,
    /// Items probed for λ, 12 generations each.
    pub n_lambda: usize,
    /// Largest chunk of the index in tokens, for the validity of gold items (§1.2.6).
    pub max_chunk_tokens: usize,
}

impl Default for VerifyOptions {
    fn default() -> VerifyOptions {
        VerifyOptions {
            policy: AskPolicy::default(),
            seed: 1,
            n_retrieved: None,
            n_answered: 12,
            n_unanswerable: 12,
            n_lambda: 3,
            max_chunk_tokens: 130,
        }
    }
}

/// How far a measurement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Questions done in this stage.
    pub n_done: usize,
    /// Questions in this stage.
    pub n_total: usize,
}

/// The stages of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Gold questions through retrieval, for the scale of ΔS.
    Calibrate,
    /// Gold questions through retrieval, for ΔS and coverage.
    Retrieve,
    /// Answerable questions answered.
    Answer,
    /// Unanswerable questions asked.
    Refuse,
    /// λ.
    Lambda,
    /// Retrieved snippets encoded once more.
    Encode,
    /// Prompts put together.
    Assemble,
    /// Replies at length.
    Write,
}

/// Runs the gold set and makes the report. A calibration that is void for this encoder or index
/// counts as none, and the report says so.
///
/// # Errors
/// The gold set does not fit the index, an option is out of range, or a part of the system
/// failed. A gate that does not pass is no error.
pub fn verify(
    system: System<'_>,
    gold: &GoldSet,
    calibration: Option<&CorpusCalibration>,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, VerifyError> {
    verify_observed(system, gold, calibration, options, progress).map(|(report, _)| report)
}

/// [`verify`], with what its numbers were computed from.
///
/// # Errors
/// As [`verify`].
pub fn verify_observed(
    system: System<'_>,
    gold: &GoldSet,
    calibration: Option<&CorpusCalibration>,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Report, Observations), VerifyError> {
    let started = Instant::now();
    let k = options.policy.search.k;
    if k == 0 {
        return Err(VerifyError::Option { option: "k", expected: "at least 1", found: 0 });
    }
    let checked = calibration.map(|calibration| {
        calibration.check(system.encoder.fingerprint(), system.index.index_hash(), k)
    });
    let void = checked.and_then(Result::err).map(|reason| reason.to_string());
    let calibration = calibration.filter(|_| void.is_none());
    let resolved = gold.resolve(system.index)?;
    let mut run = Run {
        system,
        options,
        calibration,
        gate: EvidenceGate::new(calibration, system.index)?,
        vectors: TextVectors::new(system.encoder),
        positions: Positions::new(system.encoder, system.index),
        progress,
        cost: Cost::default(),
        observed: Observations::default(),
    };
    let mut measured = run.measure(gold, &resolved)?;
    let observed = run.observed;
    measured.cost.seconds = started.elapsed().as_secs_f64();
    let report = assemble(system, gold, options, &measured, (calibration, void.as_deref()))?;
    Ok((report, observed))
}

/// Everything that was measured, before it is judged.
struct Measurements {
    retrieved: Vec<RetrievalItem>,
    sweep: Option<KSweep>,
    answers: Vec<AnswerItem>,
    refusals: Vec<RefusalItem>,
    lambda: Vec<ItemLambda>,
    cost: Cost,
}

fn assemble(
    system: System<'_>,
    gold: &GoldSet,
    options: &VerifyOptions,
    measured: &Measurements,
    scale: (Option<&CorpusCalibration>, Option<&str>),
) -> Result<Report, VerifyError> {
    let (calibration, void) = scale;
    let facts = system.generator.facts()?;
    let observed = Observed {
        calibration,
        void,
        circular: system.index.encoder_fp() == system.encoder.fingerprint(),
        retrieval: &measured.retrieved,
        answers: &measured.answers,
        refusals: &measured.refusals,
        lambda: &measured.lambda,
        seeded: facts.sampling == SamplingKind::Seeded,
    };
    let gates = gates::gates(&observed)?;
    let delta_s = delta_s_section(&observed, measured.sweep.clone())?;
    let findings = Findings {
        gates: &gates,
        calibration_void: void.is_some(),
        n_without_evidence: observed.retrieval.iter().filter(|i| i.raw_min.is_none()).count(),
        flat_high: delta_s.k_sweep.as_ref().is_some_and(|sweep| sweep.flat_high),
        decoy_margin: delta_s.decoy_margin,
        cal_min: delta_s.cal_min,
        lambda_rates: gates::lambda_rates(&measured.lambda),
        ..Findings::default()
    };
    let verdict = Verdict::of(&gates);
    let fix = if verdict == Verdict::Pass { None } else { fix_for(&findings) };
    let failed = gates.iter().filter(|gate| gate.measured.status == Status::Fail);
    Ok(Report {
        report_version: REPORT_VERSION,
        pins: pins(system, gold, &facts),
        config: config(system, &facts, options.policy.search.k),
        sample: sample_of(gold, options, measured),
        calibration: calibration.cloned(),
        calibration_void: void.is_some(),
        coverage: coverage_section(&measured.retrieved, &measured.answers)?,
        delta_s,
        lambda: lambda_section(&observed),
        failed_gates: failed.map(|gate| gate.name).collect(),
        reported: gates::reported(&observed)?,
        gates,
        not_measured: not_measured(),
        verdict,
        fix,
        cost: measured.cost,
    })
}

fn sample_of(gold: &GoldSet, options: &VerifyOptions, measured: &Measurements) -> Sample {
    Sample {
        seed: options.seed,
        n_answerable: gold.of_kind(GoldKind::Answerable).count(),
        n_unanswerable: gold.of_kind(GoldKind::Unanswerable).count(),
        n_off_topic: gold.of_kind(GoldKind::OffTopic).count(),
        retrieved: measured.retrieved.len(),
        answered: measured.answers.len(),
        unanswerable_asked: measured.refusals.len(),
        lambda_items: measured.lambda.len(),
    }
}

fn lambda_section(observed: &Observed<'_>) -> LambdaSection {
    LambdaSection {
        n_paraphrases: N_PARAPHRASES,
        n_seeds: if observed.seeded { 2 } else { 1 },
        equivalence: equivalence_in_words(
            observed.calibration.and_then(|calibration| calibration.tt.fit_calibration()),
        ),
        items: observed.lambda.to_vec(),
    }
}

/// What an answered question gave.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AnswerItem {
    pub(crate) refused: bool,
    /// Whether a cited snippet overlaps the evidence.
    pub(crate) hit: bool,
    /// Cited snippets that overlap the evidence, and all cited snippets.
    pub(crate) n_cited_right: usize,
    pub(crate) n_cited: usize,
    /// Whether the text that the user sees names a source that was not in the prompt.
    pub(crate) unknown_citation: bool,
    pub(crate) model_cited_share: Option<f64>,
    pub(crate) coverage_cited: Option<f64>,
    pub(crate) matches_gold: bool,
}

/// What an unanswerable question gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefusalItem {
    pub(crate) refused: bool,
    pub(crate) unknown_citation: bool,
}

struct Run<'a> {
    system: System<'a>,
    options: &'a VerifyOptions,
    calibration: Option<&'a CorpusCalibration>,
    gate: EvidenceGate,
    vectors: TextVectors<'a>,
    positions: Positions<'a>,
    progress: &'a mut dyn FnMut(Progress),
    cost: Cost,
    observed: Observations,
}

impl Run<'_> {
    fn measure(
        &mut self,
        gold: &GoldSet,
        resolved: &[ResolvedItem],
    ) -> Result<Measurements, VerifyError> {
        let options = self.options;
        let choose = |n| sample(resolved, n, options.seed, |resolved| &resolved.item.id);
        let unanswerable: Vec<&GoldItem> = gold.of_kind(GoldKind::Unanswerable).collect();
        let asked =
            sample(&unanswerable, Some(options.n_unanswerable), options.seed, |item| &item.id);
        Ok(Measurements {
            retrieved: self.retrieval(&choose(options.n_retrieved))?,
            sweep: self.sweep(resolved)?,
            answers: self.answers(&choose(Some(options.n_answered)))?,
            refusals: self.refusals(&asked)?,
            lambda: self.lambda(&choose(Some(options.n_lambda)))?,
            cost: self.cost,
        })
    }

    fn report(&mut self, stage: Stage, n_done: usize, n_total: usize) {
        (self.progress)(Progress { stage, n_done, n_total });
    }

    fn retrieval(&mut self, items: &[&ResolvedItem]) -> Result<Vec<RetrievalItem>, VerifyError> {
        let mut found = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            found.push(self.retrieve_item(item)?);
            self.report(Stage::Retrieve, index + 1, items.len());
        }
        Ok(found)
    }

    fn retrieve_item(&mut self, item: &ResolvedItem) -> Result<RetrievalItem, VerifyError> {
        let policy = &self.options.policy;
        let hits = retrieve(self.system.index, &item.item.question, policy)?;
        let (raw_min, raw_mean) = match evidence_ds(&hits) {
            SetDs::Values { min, mean, .. } => (Some(min), Some(mean)),
            SetDs::NoEvidence | SetDs::Undefined(_) => (None, None),
        };
        let qe = self.calibration.and_then(|calibration| calibration.qe.calibration());
        let calibrate = |raw: Option<f64>| Some(qe?.map(raw?));
        let anchor = self.positions.anchor(item);
        let sections = self.positions.sections(item);
        let retrieved = self.positions.chunks(hits.iter().map(|hit| &*hit.chunk))?;
        let coverage = coverage_of(&anchor, &retrieved, &retrieved, &sections);
        self.observed.retrieval.push(RetrievalObservation {
            id: item.item.id.clone(),
            chunks: observations::chunks_of(item, &hits),
            first_20: Vec::new(),
            ra_raw: Vec::new(),
            anchor_mode: item.item.anchor_mode,
            anchor: observations::anchor_of(&anchor),
            retrieved: retrieved.runs(),
            sections: sections.runs(),
        });
        Ok(RetrievalItem {
            id: item.item.id.clone(),
            raw_min,
            cal_min: calibrate(raw_min),
            cal_mean: calibrate(raw_mean),
            ra: self.retrieved_to_anchor(item, &hits)?,
            decoy_margin: self.decoy_margin(item)?,
            coverage: coverage.value,
            bleed: coverage.bleed,
            anchor_fits: gold_span_fits(
                anchor_tokens(&anchor),
                policy.search.k,
                self.options.max_chunk_tokens,
            ),
        })
    }

    /// Calibrated ΔS of the evidence and the nearest retrieved chunk: of the farthest quote if
    /// all are needed, of the nearest if any is enough.
    fn retrieved_to_anchor(
        &mut self,
        item: &ResolvedItem,
        hits: &[Hit],
    ) -> Result<Option<f64>, VerifyError> {
        let Some(tt) = self.calibration.and_then(|calibration| calibration.tt.calibration()) else {
            return Ok(None);
        };
        let mut per_quote = Vec::with_capacity(item.spans.len());
        for span in &item.spans {
            let mut nearest: Option<f64> = None;
            for hit in hits {
                let pair = ((Side::Passage, &*hit.chunk.text), (Side::Passage, span.text()));
                match self.vectors.ds(pair.0, pair.1)? {
                    Ds::Value(raw) => nearest = Some(nearest.map_or(raw, |least| least.min(raw))),
                    Ds::Undefined(_) => return Ok(None),
                }
            }
            match nearest {
                Some(raw) => per_quote.push(raw),
                None => return Ok(None),
            }
        }
        if let Some(observed) = self.observed.retrieval.last_mut() {
            observed.ra_raw.clone_from(&per_quote);
        }
        let per_quote = per_quote.into_iter().map(|raw| tt.map(raw));
        Ok(match item.item.anchor_mode {
            AnchorMode::All => per_quote.max_by(f64::total_cmp),
            AnchorMode::Any => per_quote.min_by(f64::total_cmp),
        })
    }

    /// How much farther the nearest chunk without evidence is than the nearest one with it, among
    /// the first 20.
    fn decoy_margin(&mut self, item: &ResolvedItem) -> Result<Option<f64>, VerifyError> {
        let Some(qe) = self.calibration.and_then(|calibration| calibration.qe.calibration()) else {
            return Ok(None);
        };
        let hits = self.search(&item.item.question, SWEEP[2])?;
        if let Some(observed) = self.observed.retrieval.last_mut() {
            observed.first_20 = observations::chunks_of(item, &hits);
        }
        let nearest = |holds: bool| {
            let chosen = hits.iter().filter(|hit| holds_evidence(item, hit) == holds);
            chosen.map(|hit| 1.0 - f64::from(hit.cosine)).min_by(f64::total_cmp)
        };
        Ok(match (nearest(false), nearest(true)) {
            (Some(decoy), Some(anchor)) => Some(decoy_margin(qe.map(decoy), qe.map(anchor))),
            _ => None,
        })
    }

    fn search(&self, question: &str, k: usize) -> Result<Vec<Hit>, VerifyError> {
        let options = SearchOptions { k, ..self.options.policy.search.clone() };
        Ok(self.system.index.search(question, &options)?)
    }

    /// Medians of the calibrated curves over k; none without a scale or without evidence.
    fn sweep(&mut self, items: &[ResolvedItem]) -> Result<Option<KSweep>, VerifyError> {
        let Some(qe) = self.calibration.and_then(|calibration| calibration.qe.calibration()) else {
            return Ok(None);
        };
        let mut points = Vec::with_capacity(SWEEP.len());
        for k in SWEEP {
            let (mut mins, mut means) = (Vec::new(), Vec::new());
            for item in items {
                let hits = self.search(&item.item.question, k)?;
                if let SetDs::Values { min, mean, .. } = evidence_ds(&hits) {
                    mins.push(qe.map(min));
                    means.push(qe.map(mean));
                }
                let (id, chunks) = (item.item.id.clone(), observations::chunks_of(item, &hits));
                self.observed.sweep.push(SweepObservation { id, k, chunks });
            }
            if mins.is_empty() {
                return Ok(None);
            }
            points.push((k, median(&mins)?, median(&means)?));
        }
        Ok(Some(k_sweep(&points)))
    }

    /// Asks several questions, by id and text, and tells after each group of them.
    fn ask(
        &mut self,
        stage: Stage,
        questions: &[(&str, &str)],
    ) -> Result<Vec<Option<AskOutcome>>, VerifyError> {
        let mut outcomes = Vec::with_capacity(questions.len());
        for group in questions.chunks(AT_ONCE) {
            outcomes.extend(self.ask_group(group)?);
            self.report(stage, outcomes.len(), questions.len());
        }
        Ok(outcomes)
    }

    fn ask_group(
        &mut self,
        questions: &[(&str, &str)],
    ) -> Result<Vec<Option<AskOutcome>>, VerifyError> {
        let (System { generator, index, .. }, policy) = (self.system, &self.options.policy);
        let mut asked = Vec::with_capacity(questions.len());
        for &(id, question) in questions {
            let nonce = nonce_of(id, index.index_hash());
            asked.push((question, retrieve(index, question, policy)?, nonce));
        }
        let seed = self.options.seed;
        let all = asked.iter().map(|(question, hits, nonce)| OneOf { question, hits, nonce, seed });
        let answered = answer_all(generator, &all.collect::<Vec<_>>(), &self.gate, policy);
        let outcomes = answered.into_iter().map(|answer| match answer {
            Ok(outcome) => {
                if let Some(reply) = &outcome.reply {
                    self.cost.generations += 1;
                    self.cost.tokens += reply.n_prompt_tokens + reply.n_output_tokens;
                }
                Ok(Some(outcome))
            }
            // The user gets an error, which is no answer and no refusal.
            Err(error) if error.is_outcome() => Ok(None),
            Err(error) => Err(error.into()),
        });
        outcomes.collect()
    }

    fn answers(&mut self, items: &[&ResolvedItem]) -> Result<Vec<AnswerItem>, VerifyError> {
        let questions: Vec<(&str, &str)> =
            items.iter().map(|of| (&*of.item.id, &*of.item.question)).collect();
        let outcomes = self.ask(Stage::Answer, &questions)?;
        let outcomes = items.iter().zip(&outcomes);
        outcomes.map(|(item, outcome)| self.answer_item(item, outcome.as_ref())).collect()
    }

    fn answer_item(
        &mut self,
        item: &ResolvedItem,
        outcome: Option<&AskOutcome>,
    ) -> Result<AnswerItem, VerifyError> {
        let cited_ids = outcome.map(AskOutcome::cited_ids).unwrap_or_default();
        let evidence = outcome.map_or(&[] as &[Hit], |outcome| &outcome.evidence);
        let cited: Vec<&Hit> = evidence
            .iter()
            .filter(|hit| cited_ids.contains(&hit.chunk.snippet_id.as_str()))
            .collect();
        let n_cited_right = cited.iter().filter(|hit| holds_evidence(item, hit)).count();
        let anchor = self.positions.anchor(item);
        let sections = self.positions.sections(item);
        let tokens = self.positions.chunks(cited.iter().map(|hit| &*hit.chunk))?;
        let refused = outcome.is_none_or(|outcome| outcome.refusal.is_some());
        let is_right = |id: &&str| {
            cited.iter().any(|hit| hit.chunk.snippet_id == *id && holds_evidence(item, hit))
        };
        let cited_of =
            |id: &&str| CitedObservation { snippet_id: (*id).to_owned(), evidence: is_right(id) };
        let answer = AnswerItem {
            refused,
            hit: n_cited_right > 0,
            n_cited_right,
            n_cited: cited_ids.len(),
            unknown_citation: outcome.is_some_and(shows_unknown_citation),
            model_cited_share: outcome.and_then(AskOutcome::model_cited_share),
            coverage_cited: coverage_of(&anchor, &tokens, &tokens, &sections).cited,
            matches_gold: outcome.is_some_and(|outcome| {
                !refused && matches_reference(&outcome.text, &item.item.answers)
            }),
        };
        self.observed.answers.push(AnswerObservation {
            id: item.item.id.clone(),
            refused,
            cited: cited_ids.iter().map(cited_of).collect(),
            unknown_citation: answer.unknown_citation,
            model_cited_share: answer.model_cited_share,
            anchor: observations::anchor_of(&anchor),
            cited_positions: tokens.runs(),
            matches_gold: answer.matches_gold,
        });
        Ok(answer)
    }

    fn refusals(&mut self, items: &[&&GoldItem]) -> Result<Vec<RefusalItem>, VerifyError> {
        let questions: Vec<(&str, &str)> =
            items.iter().map(|item| (&*item.id, &*item.question)).collect();
        let mut refusals = Vec::with_capacity(items.len());
        for (item, outcome) in items.iter().zip(self.ask(Stage::Refuse, &questions)?) {
            let refused = outcome.as_ref().is_some_and(|outcome| outcome.refusal.is_some());
            let unknown_citation = outcome.as_ref().is_some_and(shows_unknown_citation);
            refusals.push(RefusalItem { refused, unknown_citation });
            let id = item.id.clone();
            self.observed.refusals.push(RefusalObservation { id, refused, unknown_citation });
        }
        Ok(refusals)
    }

    fn lambda(&mut self, items: &[&ResolvedItem]) -> Result<Vec<ItemLambda>, VerifyError> {
        let (index, policy) = (self.system.index, &self.options.policy);
        let bound = (index.index_hash(), policy.search.k);
        let mut scale = AnswerScale::new(self.system.encoder, self.calibration, bound);
        let mut of_items = Vec::with_capacity(items.len());
        for (n_done, item) in items.iter().enumerate() {
            let system = (self.system.generator, index);
            let mut same = |a: &str, b: &str| scale.equivalence_ds(a, b);
            let (lambda, frozen) = probed(system, &self.gate, policy, &item.item, &mut same)?;
            scale.check()?;
            for run in lambda.frozen.runs.iter().chain(&lambda.live.runs) {
                self.cost.generations += usize::from(run.generated);
                self.cost.tokens += run.tokens_in + run.tokens;
            }
            self.observed.frozen.0.insert(lambda.id.clone(), frozen);
            of_items.push(lambda);
            self.report(Stage::Lambda, n_done + 1, items.len());
        }
        Ok(of_items)
    }
}

pub(crate) fn holds_evidence(item: &ResolvedItem, hit: &Hit) -> bool {
    let range = hit.chunk.span.start..hit.chunk.span.end;
    item.spans.iter().any(|span| span.overlaps(&hit.chunk.doc_id, &range))
}

/// Reads the text as the user sees it, with the guard on or off.
fn shows_unknown_citation(outcome: &AskOutcome) -> bool {
    !parse_answer(&outcome.text, &Live::new(&outcome.evidence)).unknown_citations.is_empty()
}

/// `n` items, or all, chosen by a hash of seed and id: the choice does not depend on the order of
/// the file, and an item added elsewhere does not reshuffle the rest.
pub(crate) fn sample<T>(
    items: &[T],
    n: Option<usize>,
    seed: u64,
    id: impl Fn(&T) -> &str,
) -> Vec<&T> {
    let mut chosen: Vec<(String, usize)> = items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            let key = Nonce::derive(&[&seed.to_le_bytes(), id(item).as_bytes()]);
            (key.as_str().to_owned(), index)
        })
        .collect();
    chosen.sort();
    chosen.truncate(n.unwrap_or(items.len()));
    chosen.into_iter().map(|(_, index)| &items[index]).collect()
}

fn delta_s_section(
    observed: &Observed<'_>,
    k_sweep: Option<KSweep>,
) -> Result<DeltaSSection, VerifyError> {
    let items = observed.retrieval;
    let cal_min = gates::median_of(items.iter().map(|item| item.cal_min))?;
    Ok(DeltaSSection {
        status: gates::delta_s_status(observed),
        raw_min: gates::median_of(items.iter().map(|item| item.raw_min))?,
        cal_min,
        cal_mean: gates::median_of(items.iter().map(|item| item.cal_mean))?,
        ra: gates::median_of(items.iter().map(|item| item.ra))?,
        band: cal_min.map(Band::of),
        decoy_margin: gates::median_of(items.iter().map(|item| item.decoy_margin))?,
        circular: observed.circular,
        k_sweep,
        items: items.to_vec(),
    })
}

fn coverage_section(
    items: &[RetrievalItem],
    answers: &[AnswerItem],
) -> Result<CoverageSection, VerifyError> {
    Ok(CoverageSection {
        value: gates::mean_of(items.iter().map(|item| item.coverage))?,
        cited: gates::mean_of(answers.iter().map(|answer| answer.coverage_cited))?,
        bleed: gates::mean_of(items.iter().map(|item| item.bleed))?,
        method: "offsets",
    })
}

fn pins(system: System<'_>, gold: &GoldSet, facts: &GeneratorFacts) -> Pins {
    Pins {
        model_fp: facts.model_fp.clone(),
        tok_fp: facts.tok_fp.clone(),
        encoder_fp: system.encoder.fingerprint().to_owned(),
        index_hash: system.index.index_hash().to_owned(),
        template_hash: facts.template_hash.clone(),
        engine_build: facts.engine_build.clone(),
        gold_sha256: gold.sha256().to_owned(),
    }
}

fn config(system: System<'_>, facts: &GeneratorFacts, k: usize) -> Config {
    Config {
        model: facts.model.clone(),
        quant: facts.quant.clone(),
        kv_dtype: facts.kv_dtype.clone(),
        device: facts.device.clone(),
        encoder: system.encoder.facts().name,
        k,
        n_chunks: system.index.n_chunks(),
        n_documents: system.index.doc_ids().len(),
        seeded_sampling: facts.sampling == SamplingKind::Seeded,
    }
}
