//! The sections of a diagnosis that a verification does not have.

use std::collections::BTreeMap;

use exrail_metrics::FidelitySummary;
use exrail_retrieval::{Hit, SearchOptions};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::ask::GateReading;
use crate::diagnose::structured::SchemaObservation;
use crate::diagnose::vectors::{RetrievedBits, SpikeAttribution};
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::lambda_modes::{LambdaModesReport, ModeComparison};
use crate::prompt::hex;
use crate::quant::{NoiseFloor, QuantMode, QuantReport};
use crate::resonance::{ModeResonance, ResonanceDifference};
use crate::system::Retrieve;

/// What was measured, or why it was not and what would measure it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Section<T> {
    /// Measured.
    Ok(T),
    /// Not measured by this run.
    NotAvailable {
        /// Why, and what would.
        reason: String,
    },
    /// Measured, and the data cannot tell.
    Inconclusive {
        /// Why, and what would.
        reason: String,
    },
}

impl<T> Section<T> {
    /// Not measured, because of this.
    pub fn missing(reason: impl Into<String>) -> Section<T> {
        Section::NotAvailable { reason: reason.into() }
    }

    /// What was measured.
    pub fn value(&self) -> Option<&T> {
        match self {
            Section::Ok(value) => Some(value),
            Section::NotAvailable { .. } | Section::Inconclusive { .. } => None,
        }
    }

    /// Why nothing was measured.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Section::Ok(_) => None,
            Section::NotAvailable { reason } | Section::Inconclusive { reason } => Some(reason),
        }
    }
}

/// Reasons of the values that are null, by their names.
pub type Reasons = BTreeMap<&'static str, String>;

/// One question of the user's own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuestionSection {
    /// ΔS to its evidence, as the gate of the server reads it.
    pub delta_s: GateReading,
    /// What was retrieved, by rank.
    pub snippets: Vec<QuestionSnippet>,
}

/// Asks the index, and reads the gate of the server. Returns the SHA-256 of the question, too.
///
/// # Errors
/// The index failed.
pub fn ask_index(
    question: &str,
    index: &dyn Retrieve,
    gate: &EvidenceGate,
    search: &SearchOptions,
) -> Result<(String, QuestionSection), VerifyError> {
    let hits = index.search(question, search)?;
    let snippet = |hit: &Hit| QuestionSnippet {
        snippet_id: hit.chunk.snippet_id.clone(),
        section_id: hit.chunk.section_id.clone(),
        ds_raw: 1.0 - f64::from(hit.cosine),
        tokens: hit.chunk.tokens,
    };
    let snippets = hits.iter().map(snippet).collect();
    let section = QuestionSection { delta_s: gate.read(question, &hits).0, snippets };
    Ok((hex(&Sha256::digest(question)), section))
}

/// A snippet of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuestionSnippet {
    /// The snippet.
    pub snippet_id: String,
    /// Its section.
    pub section_id: String,
    /// 1 − cosine, in [0, 2].
    pub ds_raw: f64,
    /// Its tokens.
    pub tokens: usize,
}

/// The weights in other widths against the stored ones (§1.5).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantisationSection {
    /// `as_loaded` where the file holds blocks, whose values are then the reference; else its format.
    pub reference: String,
    /// Format of most weights.
    pub format: String,
    /// Parameters.
    pub parameters: u64,
    /// The reference against itself.
    pub noise: NoiseFloor,
    /// What a server of these options computes.
    pub as_served: Section<ModeFidelity>,
    /// Rounded to int8.
    pub int8: Section<ModeFidelity>,
    /// Rounded to int4.
    pub int4: Section<ModeFidelity>,
    /// Int4 with int8 as its reference.
    pub int4_vs_int8: Section<ModeFidelity>,
    /// Whether int8 is nearer to the reference than int4 on every text.
    pub ordered: Option<bool>,
    /// Whether the same questions found the same snippets to the bit before the other widths were loaded and while they
    /// were; null without questions.
    pub retrieval_bit_equal: Option<bool>,
    /// Questions that found something else.
    pub retrieval_differs: usize,
    /// What moved ΔS, or that it is about answers; null where nothing did.
    pub attribution: Option<SpikeAttribution>,
}

/// One width. Each headline is the worst of the texts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeFidelity {
    /// Mean divergence, nats.
    pub kld_mean: f64,
    /// 99th percentile of the divergence, nats.
    pub kld_p99: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
    /// What the loss grows by, nats a token.
    pub ln_ppl_ratio: f64,
    /// Change of ΔS between answer and cited snippets.
    pub ds_drift: Option<f64>,
    /// Share of items whose λ state or majority class differs.
    pub lambda_flip: Option<f64>,
    /// Share of the items whose majority answer changes between right and wrong.
    pub flips: Option<f64>,
    /// Whether E_resonance is the same: `flat`, or how it differs.
    pub e_res_tost: Option<&'static str>,
    /// The difference that says so.
    pub e_res: Option<ResonanceDifference>,
    /// Why a value is null.
    pub reasons: Reasons,
    /// Text by text.
    pub texts: BTreeMap<String, FidelitySummary>,
}

impl ModeFidelity {
    /// The worst of texts; none without a text.
    #[must_use]
    pub fn of(texts: BTreeMap<String, FidelitySummary>) -> Option<ModeFidelity> {
        let greatest =
            |value: fn(&FidelitySummary) -> f64| texts.values().map(value).max_by(f64::total_cmp);
        let alone = "teacher-forced text has no answers: compared by λ across modes";
        let reasons = [
            (
                "ds_drift",
                "needs at least 20 answers of each width to the same questions".to_owned(),
            ),
            ("lambda_flip", alone.to_owned()),
            ("flips", alone.to_owned()),
            ("e_res_tost", "needs 50 prompts with long replies of each width: --deep".to_owned()),
        ];
        Some(ModeFidelity {
            kld_mean: greatest(|of| of.kld_mean)?,
            kld_p99: greatest(|of| of.kld_p99)?,
            top1: -greatest(|of| -of.top1)?,
            ln_ppl_ratio: greatest(|of| of.ln_ppl_ratio)?,
            ds_drift: None,
            lambda_flip: None,
            flips: None,
            e_res_tost: None,
            e_res: None,
            reasons: reasons.into(),
            texts,
        })
    }

    /// With what the answers of this width were compared by.
    fn with_answers(mut self, of: Option<&ModeComparison>) -> ModeFidelity {
        let Some(of) = of else { return self };
        self.ds_drift = of.ds_drift.value;
        self.lambda_flip = of.lambda_flip.value;
        self.flips = of.flips_gross.value;
        let values = [
            ("ds_drift", &of.ds_drift),
            ("lambda_flip", &of.lambda_flip),
            ("flips", &of.flips_gross),
        ];
        for (name, measured) in values {
            match (measured.value, &measured.reason) {
                (Some(_), _) => {
                    self.reasons.remove(name);
                }
                (None, Some(reason)) => {
                    self.reasons.insert(name, reason.clone());
                }
                (None, None) => {}
            }
        }
        self
    }
}

impl ModeFidelity {
    /// With how far long replies of this width go from what was asked.
    fn with_resonance(mut self, of: Option<&Result<ResonanceDifference, String>>) -> ModeFidelity {
        match of {
            Some(Ok(difference)) => {
                self.reasons.remove("e_res_tost");
                self.e_res_tost = Some(difference.found);
                self.e_res = Some(difference.clone());
            }
            Some(Err(reason)) => {
                self.reasons.insert("e_res_tost", reason.clone());
            }
            None => {}
        }
        self
    }
}

/// What is known of the stored weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    /// `as_loaded` where the file holds blocks, else its format.
    pub reference: String,
    /// Format of most weights.
    pub format: String,
    /// Parameters.
    pub parameters: u64,
}

/// What the probe of the widths found.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantPart {
    /// The reference.
    pub weights: Weights,
    /// The report.
    pub report: QuantReport,
    /// Whether retrieval stayed what it was while the other widths were loaded; none without questions.
    pub retrieval: Option<RetrievalBits>,
    /// Replies at length of each width to the same prompts; empty where none were asked for.
    pub resonance: ModeResonance,
}

/// Questions asked before and while other widths are loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RetrievalBits {
    /// Questions.
    pub n: usize,
    /// Those that found something else.
    pub differs: Vec<String>,
}

impl RetrievalBits {
    /// Compares what the same questions found at two times.
    #[must_use]
    pub fn between(before: &[RetrievedBits], meanwhile: &[RetrievedBits]) -> Option<RetrievalBits> {
        let pairs = before.iter().zip(meanwhile);
        let differs = pairs.filter(|(a, b)| a != b).map(|(a, _)| a.id.clone()).collect();
        (!before.is_empty()).then_some(RetrievalBits { n: before.len(), differs })
    }
}

impl QuantPart {
    pub(crate) fn section(
        &self,
        attribution: Option<SpikeAttribution>,
        modes: Option<&LambdaModesReport>,
    ) -> QuantisationSection {
        let compared = |mode: QuantMode, reference: QuantMode| {
            let mut of = modes.iter().flat_map(|modes| &modes.comparisons);
            of.find(|of| (of.mode, of.reference) == (mode, reference))
        };
        let full = |of: ModeFidelity, (mode, reference): (QuantMode, QuantMode)| {
            let resonance = self.resonance.differences.get(&(mode, reference));
            of.with_answers(compared(mode, reference)).with_resonance(resonance)
        };
        let of = |mode: QuantMode| {
            let summaries = self
                .report
                .texts
                .iter()
                .filter_map(|text| Some((text.name.clone(), text.modes.get(&mode)?.clone())));
            match ModeFidelity::of(summaries.collect()) {
                Some(fidelity) => Section::Ok(full(fidelity, (mode, QuantMode::AsServed))),
                None => Section::missing(format!("not asked for: --modes {}", mode.name())),
            }
        };
        let between = self
            .report
            .texts
            .iter()
            .filter_map(|text| Some((text.name.clone(), text.int4_vs_int8.clone()?)));
        let Weights { reference, format, parameters } = self.weights.clone();
        QuantisationSection {
            reference,
            format,
            parameters,
            noise: self.report.noise,
            as_served: of(QuantMode::AsServed),
            int8: of(QuantMode::Int8),
            int4: of(QuantMode::Int4),
            int4_vs_int8: match ModeFidelity::of(between.collect()) {
                Some(fidelity) => Section::Ok(full(fidelity, (QuantMode::Int4, QuantMode::Int8))),
                None => Section::missing("needs both --modes int8,int4"),
            },
            ordered: self.report.ordered,
            retrieval_bit_equal: self.retrieval.as_ref().map(|bits| bits.differs.is_empty()),
            retrieval_differs: self.retrieval.as_ref().map_or(0, |bits| bits.differs.len()),
            attribution,
        }
    }
}

/// The files of the model against what a manifest declares of them (G-09).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// Values that were compared.
    pub values: usize,
    /// What differs; null where nothing does that is not overlooked.
    pub differs: Option<String>,
    /// Why soft mismatches are overlooked; null where there are none.
    pub overlooked: Option<String>,
}

/// What the boot measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BootSection {
    /// Wall time from the start to readiness, seconds.
    pub ready_s: f64,
    /// Time to the first token behind the warm-up fence over that of a warm run, largest of the buckets.
    pub cold_ratio_max: f64,
    /// First time to the first token over that of a warm run: what the warm-up took on itself.
    pub cold_start_ratio: f64,
    /// What the device built behind the fence: captures, loads, allocations.
    pub post_ready_captures: u64,
    /// Tokens that the warm-up made.
    pub warm_up_tokens: usize,
}

/// What was tried to inject (G-21).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InjectionSection {
    /// Texts of strangers that were tried.
    pub trials: usize,
    /// Texts that became control tokens.
    pub control_tokens: usize,
    /// Texts that changed what the template writes around them.
    pub hijacks: usize,
    /// Replies that told a stretch of the system message past the guard.
    pub leaks: usize,
    /// Share that may get through at most, with 95 % confidence (Clopper and Pearson).
    pub upper_95: f64,
}

/// Ranks and slices of a model on several devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShardSection {
    /// Ranks are unique and in order.
    pub order_ok: bool,
    /// Slices tile every tensor.
    pub slices_tile: bool,
    /// Residuals have one hash on all ranks.
    pub residual_hash_ok: bool,
}

/// Structured replies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SchemaSection {
    /// Replies that were to be of a schema.
    pub replies: usize,
    /// Those that are not of it, after one repair.
    pub invalid: usize,
    /// Whether every reply conformed.
    pub valid: bool,
    /// Replies that were asked for once more.
    pub repairs: usize,
    /// Least probability mass that the lock left; null where nothing holds replies to the schema.
    pub min_allowed_mass: Option<f64>,
    /// Reply by reply.
    #[serde(skip)]
    pub observed: Vec<SchemaObservation>,
}

/// The weights against those that they were made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WeightsSection {
    /// The checkpoint that they are compared with.
    pub against: String,
    /// Matrices that both have.
    pub matrices: usize,
    /// Those that lost more than the same matrix of other layers, or than their format costs; the worst first.
    pub wrong: Vec<WrongMatrix>,
    /// Matrix by matrix.
    #[serde(skip)]
    pub observed: Vec<MatrixObservation>,
}

/// A matrix that is not what it was made of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WrongMatrix {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub tensor: String,
    /// Signal to noise, decibels.
    pub sqnr_db: f64,
    /// What it should be about; null where nothing should have changed.
    pub expected_db: Option<f64>,
    /// Both in words.
    pub told: String,
}

/// What a matrix lost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatrixObservation {
    /// Its name.
    pub tensor: String,
    /// Its format.
    pub format: String,
    /// Signal to noise, decibels; none where nothing changed.
    pub sqnr_db: Option<f64>,
    /// What its format costs.
    pub format_db: Option<f64>,
}
