//! λ across quantisation modes (§1.3.10): whether a model whose weights are rounded still gives the same answers over the
//! same evidence, and still finds the same evidence (§1.1.11).
//!
//! One mode is asked after the other, so that no two of them need be loaded at the same time: [`LambdaModes`] keeps what
//! each said, and [`LambdaModes::report`] compares it. The evidence of every mode is what the reference retrieved.

mod compare;
mod render;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Instant;

use exrail_metrics::median;
use exrail_retrieval::Hit;

pub use self::report::{
    Difference, FaultStage, FoundAt, ItemComparison, ItemMode, ItemModes, LambdaModesReport,
    LeakCause, ModeComparison, ModeCost, ModeSection, RetrievalEquality, Stages,
};
use crate::ask::{AskPolicy, answer_over, retrieve};
use crate::error::VerifyError;
use crate::evaluate::sample;
use crate::evidence_gate::EvidenceGate;
use crate::gold::{GoldItem, GoldKind, GoldSet, N_PARAPHRASES};
use crate::probe::retrieve_each;
use crate::prompt::Nonce;
use crate::quant::QuantMode;
use crate::runs::{Asking, Attempt, FrozenRuns, SEEDS, nonce_of, reply_of};
use crate::scale::AnswerScale;
use crate::system::{Generate, GeneratorFacts, Retrieve, SamplingKind};

/// Items whose question is asked once by itself, for the time of a single answer.
const SINGLE_ANSWERS: usize = 3;

/// What is asked, and how much.
#[derive(Clone, Debug, PartialEq)]
pub struct LambdaModesOptions {
    /// How questions are answered; the policy of production.
    pub policy: AskPolicy,
    /// Answerable items of the gold set, at least 1; all of them if there are fewer.
    pub n_items: usize,
    /// Chooses them.
    pub seed: u64,
    /// Whether the reference is asked over what each wording retrieves, too; not where that has been measured.
    pub live: bool,
    /// Whether retrieval is compared.
    pub retrieval: RetrievalCheck,
    /// Whether single questions are asked, for what the probe costs in answers.
    pub timed: bool,
}

impl Default for LambdaModesOptions {
    fn default() -> LambdaModesOptions {
        LambdaModesOptions {
            policy: AskPolicy::default(),
            n_items: 8,
            seed: 1,
            live: true,
            retrieval: RetrievalCheck::Enforce,
            timed: true,
        }
    }
}

/// Whether what each mode retrieves is compared with what the reference does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetrievalCheck {
    /// Any difference fails the probe.
    Enforce,
    /// The guard is off. For mutation tests, which show what it holds back.
    Off,
}

/// A mode, loaded.
#[derive(Clone, Copy)]
pub struct ModeSystem<'a> {
    /// What answers.
    pub generator: &'a dyn Generate,
    /// What finds, as it is while this mode is loaded.
    pub index: &'a dyn Retrieve,
}

/// How far the probe is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ModesProgress {
    /// The reference answered single questions; the rest is to come.
    Planned {
        /// Replies of one mode with frozen evidence, at most.
        per_mode: usize,
        /// Replies of the reference with live evidence, at most.
        live: usize,
        /// Seconds of a single answer of the reference, the median; none where none was generated.
        single_answer_s: Option<f64>,
    },
    /// A mode answered an item.
    Asked {
        /// The mode.
        mode: QuantMode,
        /// Items that it answered.
        n_done: usize,
        /// Items.
        n_total: usize,
    },
}

/// Takes [`ModesProgress`].
pub type Told<'a> = dyn FnMut(ModesProgress) + 'a;

/// What several modes of a model said to the same questions over the same evidence.
pub struct LambdaModes<'a> {
    items: Vec<&'a GoldItem>,
    n_answerable: usize,
    gate: &'a EvidenceGate,
    options: LambdaModesOptions,
    reference: QuantMode,
    asked: BTreeMap<QuantMode, Result<ModeRuns, String>>,
}

/// What one mode said.
struct ModeRuns {
    facts: GeneratorFacts,
    encoder_fp: String,
    index_hash: String,
    items: Vec<ItemRuns>,
    /// Seconds of single answers.
    single_s: Vec<f64>,
    seconds: f64,
}

/// What one mode said to one item.
struct ItemRuns {
    /// What the question found, then what each wording did.
    found: Vec<Vec<Hit>>,
    frozen: Vec<Attempt>,
    /// Only of the reference.
    live: Option<Vec<Attempt>>,
    /// Wall time of the frozen runs; none of runs that another probe had made.
    frozen_s: Option<f64>,
}

/// Which evidence a mode is asked over.
enum Evidence<'r> {
    /// Its own, frozen and live; what was asked over the frozen one before is not asked again.
    Own(FrozenRuns),
    /// That of the reference, frozen.
    Of(&'r ModeRuns),
}

impl<'a> LambdaModes<'a> {
    /// Chooses the items, and asks the reference: the model as it is served.
    ///
    /// # Errors
    /// The gold set does not fit the index or has no answerable item, no item is asked for, or a part of the system
    /// failed.
    pub fn begin(
        (mode, system): (QuantMode, ModeSystem<'_>),
        gold: &'a GoldSet,
        gate: &'a EvidenceGate,
        options: LambdaModesOptions,
        told: &mut Told<'_>,
    ) -> Result<LambdaModes<'a>, VerifyError> {
        LambdaModes::begin_with(FrozenRuns::default(), (mode, system), gold, gate, (options, told))
    }

    /// [`LambdaModes::begin`], with the reference's runs of items that have been asked over frozen evidence before.
    ///
    /// # Errors
    /// As [`LambdaModes::begin`].
    pub fn begin_with(
        known: FrozenRuns,
        (mode, system): (QuantMode, ModeSystem<'_>),
        gold: &'a GoldSet,
        gate: &'a EvidenceGate,
        (options, told): (LambdaModesOptions, &mut Told<'_>),
    ) -> Result<LambdaModes<'a>, VerifyError> {
        // The quotes of a gold set for other documents are not there.
        gold.resolve(system.index)?;
        let answerable: Vec<&GoldItem> = gold.of_kind(GoldKind::Answerable).collect();
        let n_answerable = answerable.len();
        let chosen = sample(&answerable, Some(options.n_items), options.seed, |item| &item.id);
        if chosen.is_empty() {
            let (option, expected) = ("items", "at least 1, of a gold set with answerable items");
            return Err(VerifyError::Option {
                option,
                expected,
                found: n_answerable.min(options.n_items),
            });
        }
        let items = chosen.into_iter().copied().collect();
        let mut probe = LambdaModes {
            items,
            n_answerable,
            gate,
            options,
            reference: mode,
            asked: BTreeMap::new(),
        };
        let runs = probe.ask(mode, system, Evidence::Own(known), told)?;
        probe.asked.insert(mode, Ok(runs));
        Ok(probe)
    }

    /// Asks another mode. One that fails is not available, and the report says why.
    pub fn add(&mut self, mode: QuantMode, system: ModeSystem<'_>, told: &mut Told<'_>) {
        let runs = match &self.asked[&self.reference] {
            Ok(reference) => self.ask(mode, system, Evidence::Of(reference), told),
            // `begin` gives no probe whose reference failed.
            Err(reason) => {
                self.leave_out(mode, reason.clone());
                return;
            }
        };
        self.asked.insert(mode, runs.map_err(|error| error.to_string()));
    }

    /// Notes why a mode that was asked for cannot be.
    pub fn leave_out(&mut self, mode: QuantMode, reason: String) {
        self.asked.insert(mode, Err(reason));
    }

    /// Compares what was said.
    ///
    /// # Errors
    /// The encoder failed.
    pub fn report(&self, scale: &mut AnswerScale<'_>) -> Result<LambdaModesReport, VerifyError> {
        compare::report(self, scale)
    }

    fn ask(
        &self,
        mode: QuantMode,
        system: ModeSystem<'_>,
        mut evidence: Evidence<'_>,
        told: &mut Told<'_>,
    ) -> Result<ModeRuns, VerifyError> {
        let started = Instant::now();
        let policy = &self.options.policy;
        let mut found = Vec::with_capacity(self.items.len());
        for item in &self.items {
            let mut of_item = vec![retrieve(system.index, &item.question, policy)?];
            of_item.extend(retrieve_each(system.index, item.asked(), policy)?);
            found.push(of_item);
        }
        let mut runs = ModeRuns {
            facts: system.generator.facts()?,
            encoder_fp: system.index.encoder_fp().to_owned(),
            index_hash: system.index.index_hash().to_owned(),
            items: Vec::with_capacity(self.items.len()),
            single_s: Vec::new(),
            seconds: 0.0,
        };
        let is_own = matches!(evidence, Evidence::Own(_));
        let evidence_of = match &evidence {
            Evidence::Own(_) => None,
            Evidence::Of(reference) => Some(*reference),
        };
        let hits = |at: usize| match evidence_of {
            None => &found[at][0],
            Some(reference) => &reference.items[at].found[0],
        };
        for at in 0..self.n_single() {
            runs.single_s.extend(self.single_answer_s(system, at, hits(at))?);
        }
        if is_own {
            told(self.plan(&runs)?);
        }
        let n_total = self.items.len();
        let mut items = Vec::with_capacity(n_total);
        for (at, of_item) in found.iter().enumerate() {
            let live = (self.options.live && is_own).then_some(&of_item[1..]);
            let known = match &mut evidence {
                Evidence::Own(known) => known.0.remove(&self.items[at].id),
                Evidence::Of(_) => None,
            };
            items.push(self.ask_item(system, at, (hits(at), live), known)?);
            told(ModesProgress::Asked { mode, n_done: at + 1, n_total });
        }
        for (item, found) in items.iter_mut().zip(found) {
            item.found = found;
        }
        runs.items = items;
        runs.seconds = started.elapsed().as_secs_f64();
        Ok(runs)
    }

    fn ask_item(
        &self,
        system: ModeSystem<'_>,
        at: usize,
        (frozen, live): (&[Hit], Option<&[Vec<Hit>]>),
        known: Option<Vec<Attempt>>,
    ) -> Result<ItemRuns, VerifyError> {
        let nonce = nonce_of(&self.items[at].id, system.index.index_hash());
        let (gate, policy) = (self.gate, &self.options.policy);
        let asking = Asking { generator: system.generator, gate, policy, nonce: &nonce };
        let wordings = self.items[at].asked();
        let started = Instant::now();
        let (frozen, frozen_s) = match known {
            Some(known) => (known, None),
            None => {
                let asked = asking.all(wordings, |_| frozen)?;
                (asked, Some(started.elapsed().as_secs_f64()))
            }
        };
        let live = live.map(|hits| asking.all(wordings, |wording| &hits[wording])).transpose()?;
        Ok(ItemRuns { found: Vec::new(), frozen, live, frozen_s })
    }

    /// Seconds that one question takes by itself; none where nothing was generated. Its fence has another mark, so that
    /// it leaves no prefix behind that the runs of the item would read.
    fn single_answer_s(
        &self,
        system: ModeSystem<'_>,
        at: usize,
        hits: &[Hit],
    ) -> Result<Option<f64>, VerifyError> {
        let (item, hash) = (self.items[at], system.index.index_hash());
        let nonce = Nonce::derive(&[item.id.as_bytes(), hash.as_bytes(), b"single"]);
        let call = (&self.options.policy, &nonce, SEEDS[0]);
        let started = Instant::now();
        match answer_over(system.generator, &item.question, hits, self.gate, call) {
            Ok(outcome) => Ok(outcome.reply.map(|_| started.elapsed().as_secs_f64())),
            Err(error) if error.is_outcome() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn n_single(&self) -> usize {
        if self.options.timed { self.items.len().min(SINGLE_ANSWERS) } else { 0 }
    }

    fn plan(&self, reference: &ModeRuns) -> Result<ModesProgress, VerifyError> {
        let n_runs = N_PARAPHRASES * n_seeds(&reference.facts);
        let runs = self.items.len() * n_runs;
        let per_mode = runs + self.n_single();
        Ok(ModesProgress::Planned {
            per_mode,
            live: if self.options.live { runs } else { 0 },
            single_answer_s: single_answer(reference)?,
        })
    }
}

impl ModeRuns {
    fn cost(&self) -> Result<ModeCost, VerifyError> {
        // Runs that another probe had made are in its cost.
        let made = |item: &'_ ItemRuns| item.frozen_s.is_some();
        let frozen = self.items.iter().filter(|item| made(item)).flat_map(|item| &item.frozen);
        let live = self.items.iter().filter_map(|item| item.live.as_ref()).flatten();
        let attempts = frozen.chain(live);
        let replies: Vec<_> = attempts.filter_map(reply_of).collect();
        let item_s: Vec<f64> = self.items.iter().filter_map(|item| item.frozen_s).collect();
        let item_s = if item_s.is_empty() { None } else { Some(median(&item_s)?) };
        let single_answer_s = single_answer(self)?;
        Ok(ModeCost {
            generations: replies.len() + self.single_s.len(),
            tokens: replies.iter().map(|reply| reply.n_prompt_tokens + reply.n_output_tokens).sum(),
            cached_tokens: replies.iter().map(|reply| reply.n_cached_tokens).sum(),
            seconds: self.seconds,
            single_answer_s,
            item_s,
            ratio: item_s.zip(single_answer_s).map(|(item, single)| item / single),
        })
    }
}

fn single_answer(runs: &ModeRuns) -> Result<Option<f64>, VerifyError> {
    Ok(if runs.single_s.is_empty() { None } else { Some(median(&runs.single_s)?) })
}

/// Seeds per wording; greedy decoding makes them void.
fn n_seeds(facts: &GeneratorFacts) -> usize {
    match facts.sampling {
        SamplingKind::Seeded => SEEDS.len(),
        SamplingKind::Greedy => 1,
    }
}
