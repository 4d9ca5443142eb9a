//! What the probe found, as it is published.

use std::collections::BTreeMap;

use exrail_metrics::LambdaState;
use serde::Serialize;
use serde_json::Value;

use crate::quant::QuantMode;
use crate::report::{Cost, Measured, NotMeasured, Status, Verdict};
use crate::runs::ModeLambda;

/// λ of a model in several quantisation modes, and what differs between them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LambdaModesReport {
    /// The mode that the others are compared with: the model as it is served.
    pub reference: QuantMode,
    /// Answerable items of the gold set.
    pub n_answerable: usize,
    /// Those that were asked.
    pub n_items: usize,
    /// Wordings per item.
    pub n_paraphrases: usize,
    /// Seeds per wording; 1 for greedy sampling, where seeds mean nothing.
    pub n_seeds: usize,
    /// How free text was compared.
    pub equivalence: &'static str,
    /// Every mode that was asked for.
    pub modes: BTreeMap<QuantMode, ModeSection>,
    /// Whether every mode finds the same evidence.
    pub retrieval: RetrievalEquality,
    /// Pairs of modes.
    pub comparisons: Vec<ModeComparison>,
    /// Every item in every mode that answered.
    pub items: Vec<ItemModes>,
    /// Not part of this probe, and why.
    pub e_resonance: NotMeasured,
    /// Names of the gates with status `fail`.
    pub failed_gates: Vec<String>,
    /// What all modes cost together.
    pub cost: Cost,
    /// The result.
    pub verdict: Verdict,
}

impl LambdaModesReport {
    /// The report as JSON.
    ///
    /// # Errors
    /// None in practice: its maps have text as keys.
    pub fn to_json(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }
}

/// One mode over all items.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeSection {
    /// [`Status::Reported`], or [`Status::NotAvailable`] of a mode that could not be asked.
    pub status: Status,
    /// Why it could not.
    pub reason: Option<String>,
    /// Format of its weights.
    pub quant: Option<String>,
    /// Fingerprint of its weights.
    pub model_fp: Option<String>,
    /// Items that are convergent over frozen evidence.
    pub n_convergent: usize,
    /// Items whose state only a fit encoder could tell.
    pub n_undecided: usize,
    /// Items that are convergent over live evidence; only of the reference.
    pub n_convergent_live: Option<usize>,
    /// Items whose largest class holds a reference answer.
    pub n_matching: usize,
    /// What it cost.
    pub cost: Option<ModeCost>,
}

/// What one mode cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ModeCost {
    /// Replies generated, single answers among them.
    pub generations: usize,
    /// Tokens read and written by the runs.
    pub tokens: usize,
    /// Those that were read from the cache.
    pub cached_tokens: usize,
    /// Wall time in seconds, without loading.
    pub seconds: f64,
    /// Seconds of one question answered by itself over a cold prefix, the median; none if nothing was generated.
    pub single_answer_s: Option<f64>,
    /// Seconds of the frozen runs of one item, the median.
    pub item_s: Option<f64>,
    /// `item_s` over `single_answer_s`; the goal is at most 4.
    pub ratio: Option<f64>,
}

/// One item in every mode that answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemModes {
    /// The item.
    pub id: String,
    /// Mode by mode.
    pub modes: BTreeMap<QuantMode, ItemMode>,
}

/// One item in one mode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemMode {
    /// λ over the evidence of the reference's own retrieval.
    pub frozen: ModeLambda,
    /// λ with evidence retrieved per wording; only of the reference.
    pub live: Option<ModeLambda>,
    /// The stages of an answer.
    pub stages: Stages,
    /// The first stage that is not convergent; none if all are, or if an undecided comparison hides it.
    pub fault: Option<FaultStage>,
    /// Whether the largest class of the frozen runs holds a reference answer; none if that depends on undecided
    /// comparisons. λ is stability, not truth.
    pub matches_gold: Option<bool>,
    /// Ids of the snippets that at least half of the frozen runs cite, sorted.
    pub citations: Vec<String>,
    /// Median over the answers of calibrated ΔS to the nearest cited snippet; none without a scale or an answer.
    pub ds_ac: Option<f64>,
}

/// The states of the stages (§1.3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stages {
    /// Whether the wordings retrieve the same snippets.
    pub retrieve: LambdaState,
    /// Whether template, role order and slot order were the same in all runs.
    pub assemble: LambdaState,
    /// λ of the live runs where there are any, else of the frozen ones; none if undecided.
    pub reason: Option<LambdaState>,
}

/// Where answers begin to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultStage {
    /// What was found.
    Retrieve,
    /// The prompt around it.
    Assemble,
    /// What the model made of it.
    Reason,
}

impl FaultStage {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FaultStage::Retrieve => "retrieve",
            FaultStage::Assemble => "assemble",
            FaultStage::Reason => "reason",
        }
    }
}

/// A mode against another one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeComparison {
    /// The mode.
    pub mode: QuantMode,
    /// What it is compared with.
    pub reference: QuantMode,
    /// `lambda_quant_flip`: share of the items whose state or majority class differs over the same evidence, undecided
    /// ones left out of the count (§1.3.10).
    pub lambda_flip: Measured,
    /// Items that only a fit encoder could decide.
    pub n_undecided: usize,
    /// Share of the items whose majority answer became right, less the share whose did not stay so (§1.5.6).
    pub flips_net: Measured,
    /// Share of the items whose majority answer changed between right and wrong, either way (§1.5.6).
    pub flips_gross: Measured,
    /// Share of the items on which both cite the same snippets; a gate between int8 and int4.
    pub citations_same: Measured,
    /// `|median(ds_ac of the mode − ds_ac of the reference)|` over the items where both have one (§1.1.12).
    pub ds_drift: Measured,
    /// Every item.
    pub items: Vec<ItemComparison>,
}

impl ModeComparison {
    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}_vs_{}", self.mode.name(), self.reference.name())
    }

    /// The values with their names.
    #[must_use]
    pub fn measured(&self) -> [(&'static str, &Measured); 5] {
        [
            ("lambda_flip", &self.lambda_flip),
            ("flips_net", &self.flips_net),
            ("flips_gross", &self.flips_gross),
            ("citations_same", &self.citations_same),
            ("ds_drift", &self.ds_drift),
        ]
    }
}

/// One item of two modes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemComparison {
    /// The item.
    pub id: String,
    /// Whether state or majority class differs; none if that depends on undecided comparisons.
    pub flip: Option<bool>,
    /// Whether the states differ, undecided pairs taken as different.
    pub state_differs: bool,
    /// Whether no class is a largest one in both, undecided pairs taken as different.
    pub majority_differs: bool,
    /// Where the modes begin to differ; only of a flip.
    pub stage: Option<FaultStage>,
    /// Classes of the reference's runs, in run order; assigned over the runs of both, the reference's first, undecided
    /// pairs taken as different.
    pub reference_classes: Vec<usize>,
    /// Classes of the mode's runs, of the same assignment.
    pub mode_classes: Vec<usize>,
    /// Comparisons of answers that only a fit encoder could decide.
    pub n_undecided: usize,
    /// Whether both cite the same snippets.
    pub citations_same: bool,
    /// `ds_ac` of the mode less that of the reference.
    pub ds_ac_change: Option<f64>,
}

/// Whether every mode finds the same evidence, to the bit (§1.1.11).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalEquality {
    /// Whether ids, order and cosines are bit-equal in all modes; none if there was nothing to compare.
    pub bit_equal: Option<bool>,
    /// [`Status::Pass`], [`Status::Fail`] or [`Status::NotAvailable`].
    pub status: Status,
    /// Queries that every mode ran.
    pub n_queries: usize,
    /// The first difference of every query that has one.
    pub differences: Vec<Difference>,
    /// What a difference comes from; none without one, and then whatever differs between modes is in the answers.
    pub attribution: Option<LeakCause>,
    /// In words.
    pub reason: Option<String>,
}

/// What one query finds otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The mode.
    pub mode: QuantMode,
    /// The item.
    pub item: String,
    /// 0 for the question, else the wording from 1.
    pub wording: usize,
    /// The first place that differs, from 1.
    pub place: usize,
    /// What the reference has there.
    pub expected: Option<FoundAt>,
    /// What the mode has there.
    pub found: Option<FoundAt>,
}

/// A snippet at a place of a ranking.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoundAt {
    /// The snippet.
    pub snippet_id: String,
    /// Raw ΔS to the query.
    pub ds: f64,
    /// The bits of the cosine, an IEEE 754 single; hexadecimal.
    pub cosine_bits: String,
}

/// How a generator's weights came into retrieval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeakCause {
    /// Another encoder was loaded.
    Encoder,
    /// Another index was opened: chunk boundaries or vectors moved.
    Index,
    /// Encoder and index have the same fingerprints: queries are rewritten by the generator, or the encoder computes with
    /// its weights.
    Unknown,
}
