//! The acceptance report: what was measured on what, each value with its status, and a verdict.

use std::collections::BTreeMap;
use std::fmt;

use exrail_metrics::{Interval, KSweep};
use serde::Serialize;
use serde_json::Value;

use crate::calibrate::CorpusCalibration;
use crate::fix::Fix;
use crate::probe::ItemLambda;

/// Version of the report's shape.
pub(crate) const REPORT_VERSION: &str = "1.0";

/// The acceptance report. Its JSON is a subset of the diagnostic report of the specification.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this shape.
    pub report_version: &'static str,
    /// What the report is bound to; any change voids it.
    pub pins: Pins,
    /// How the system ran.
    pub config: Config,
    /// What was asked.
    pub sample: Sample,
    /// The scale of ΔS; none if there is no valid one.
    pub calibration: Option<CorpusCalibration>,
    /// Whether one was given that does not hold.
    #[serde(skip)]
    pub calibration_void: bool,
    /// ΔS.
    pub delta_s: DeltaSSection,
    /// Coverage of the evidence.
    pub coverage: CoverageSection,
    /// λ of each probed item.
    pub lambda: LambdaSection,
    /// The values that decide.
    pub gates: Vec<Gate>,
    /// Values that are reported and decide nothing.
    pub reported: Vec<Gate>,
    /// What this version does not measure, by the name of its section.
    #[serde(flatten)]
    pub not_measured: BTreeMap<&'static str, NotMeasured>,
    /// The result.
    pub verdict: Verdict,
    /// Names of the gates with status `fail`.
    pub failed_gates: Vec<&'static str>,
    /// What to do first; none if nothing failed.
    pub fix: Option<Fix>,
    /// What the report cost.
    pub cost: Cost,
}

impl Report {
    /// The report as JSON.
    ///
    /// # Errors
    /// None in practice: the report holds no map with keys other than text.
    pub fn to_json(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }
}

/// Fingerprints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pins {
    /// The generator's weights.
    pub model_fp: String,
    /// The generator's tokenizer.
    pub tok_fp: String,
    /// The gate's encoder.
    pub encoder_fp: String,
    /// The index.
    pub index_hash: String,
    /// The chat template.
    pub template_hash: String,
    /// The engine.
    pub engine_build: String,
    /// The gold set.
    pub gold_sha256: String,
}

impl Pins {
    /// All of them with their names in JSON.
    pub(crate) fn named(&self) -> [(&'static str, &str); 7] {
        [
            ("model_fp", &self.model_fp),
            ("tok_fp", &self.tok_fp),
            ("encoder_fp", &self.encoder_fp),
            ("index_hash", &self.index_hash),
            ("template_hash", &self.template_hash),
            ("engine_build", &self.engine_build),
            ("gold_sha256", &self.gold_sha256),
        ]
    }
}

/// Names and settings, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// The generator.
    pub model: String,
    /// Its weight format.
    pub quant: String,
    /// Format of its KV cache.
    pub kv_dtype: String,
    /// The device.
    pub device: String,
    /// The encoder.
    pub encoder: String,
    /// Snippets per question.
    pub k: usize,
    /// Chunks in the index.
    pub n_chunks: usize,
    /// Documents in the index.
    pub n_documents: usize,
    /// Whether the seeds of the λ probe mean anything.
    pub seeded_sampling: bool,
}

/// How many questions of which kind stand behind the numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Seed of the choice of items.
    pub seed: u64,
    /// Answerable questions in the gold set.
    pub n_answerable: usize,
    /// Unanswerable questions in the gold set.
    pub n_unanswerable: usize,
    /// Off-topic questions in the gold set.
    pub n_off_topic: usize,
    /// Answerable questions through retrieval.
    pub retrieved: usize,
    /// Answerable questions answered.
    pub answered: usize,
    /// Unanswerable questions asked.
    pub unanswerable_asked: usize,
    /// Items probed for λ.
    pub lambda_items: usize,
}

/// ΔS over the answerable questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeltaSSection {
    /// `ok`, `no_evidence`, `undefined`, `encoder_unfit` or `not_calibrated`.
    pub status: &'static str,
    /// Median of raw `ds_min`.
    pub raw_min: Option<f64>,
    /// Median of calibrated `ds_min`.
    pub cal_min: Option<f64>,
    /// Median of the calibrated token-weighted mean.
    pub cal_mean: Option<f64>,
    /// Median of calibrated `ds_ra`, retrieved against anchor.
    pub ra: Option<f64>,
    /// Band of `cal_min`.
    pub band: Option<exrail_metrics::Band>,
    /// Median decoy margin.
    pub decoy_margin: Option<f64>,
    /// The retriever ranks by the same encoder, so it has already minimised this number.
    pub circular: bool,
    /// Medians of `[ds_min, ds_mean]` for k = 5, 10, 20.
    pub k_sweep: Option<KSweep>,
    /// Each item.
    pub items: Vec<RetrievalItem>,
}

/// What retrieval gave for one gold item.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalItem {
    /// The item.
    pub id: String,
    /// Raw `ds_min` of question and chunks; none without evidence.
    pub raw_min: Option<f64>,
    /// The same, calibrated.
    pub cal_min: Option<f64>,
    /// Calibrated token-weighted mean.
    pub cal_mean: Option<f64>,
    /// Calibrated ΔS of the nearest chunk and the anchor.
    pub ra: Option<f64>,
    /// Decoy margin, where an anchor chunk and a decoy were found within k = 20.
    pub decoy_margin: Option<f64>,
    /// Share of the anchor's tokens in the retrieved chunks.
    pub coverage: Option<f64>,
    /// Share of the retrieved tokens outside the anchor's sections.
    pub bleed: Option<f64>,
    /// Whether k chunks can hold the anchor at all (§1.2.6).
    pub anchor_fits: bool,
}

/// Coverage over the answerable questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CoverageSection {
    /// Mean coverage.
    pub value: Option<f64>,
    /// Mean coverage by cited chunks, over the answered questions.
    pub cited: Option<f64>,
    /// Mean bleed.
    pub bleed: Option<f64>,
    /// How positions were found.
    pub method: &'static str,
}

/// λ over the probed items.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LambdaSection {
    /// Wordings per item.
    pub n_paraphrases: usize,
    /// Seeds per wording; 1 for greedy sampling, where seeds mean nothing.
    pub n_seeds: usize,
    /// How free text was compared.
    pub equivalence: &'static str,
    /// Each item.
    pub items: Vec<ItemLambda>,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gate {
    /// Name in JSON.
    pub name: &'static str,
    /// Name for people.
    pub label: &'static str,
    /// The value.
    #[serde(flatten)]
    pub measured: Measured,
}

/// A value with its status.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The value; none where it could not be measured, and then there is a reason.
    pub value: Option<f64>,
    /// How the value is to be read.
    pub unit: Unit,
    /// What was needed, in words; empty where nothing is.
    pub needed: &'static str,
    /// Number of questions behind the value.
    pub n: usize,
    /// 95% interval.
    pub interval: Option<Interval>,
    /// Whether the gate opens.
    pub status: Status,
    /// Why not, or what to keep in mind.
    pub reason: Option<String>,
}

/// Unit of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Calibrated ΔS, 0 to 1.
    CalibratedDs,
    /// Raw ΔS, 0 to 2.
    RawDs,
    /// A share of 1.
    Share,
    /// A number of things.
    Count,
    /// Nats.
    Nats,
    /// A time over another.
    Ratio,
}

/// Whether a gate opens. Only `Pass` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The value meets what is needed.
    Pass,
    /// Between pass and fail: a person has to look.
    Review,
    /// The value misses what is needed.
    Fail,
    /// Too little data, or an instrument that cannot tell.
    Inconclusive,
    /// There is no scale for this value on this encoder and corpus.
    NotCalibrated,
    /// Not measured.
    NotAvailable,
    /// Reported only; no gate.
    Reported,
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Status::Pass => "pass",
            Status::Review => "review",
            Status::Fail => "fail",
            Status::Inconclusive => "inconclusive",
            Status::NotCalibrated => "not calibrated",
            Status::NotAvailable => "not available",
            Status::Reported => "reported",
        })
    }
}

/// The result of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every gate passes.
    Pass,
    /// No gate fails, one needs a person.
    Review,
    /// A gate fails.
    Fail,
    /// No gate fails, but one could not be decided.
    Inconclusive,
}

impl Verdict {
    /// The verdict of gates: a failure outweighs what is undecided, that outweighs review.
    #[must_use]
    pub fn of(gates: &[Gate]) -> Verdict {
        Verdict::of_statuses(&gates.iter().map(|gate| gate.measured.status).collect::<Vec<_>>())
    }

    /// The same of their statuses; without a gate nothing is decided.
    #[must_use]
    pub fn of_statuses(statuses: &[Status]) -> Verdict {
        let has = |status: Status| statuses.contains(&status);
        if has(Status::Fail) {
            Verdict::Fail
        } else if statuses.is_empty()
            || has(Status::Inconclusive)
            || has(Status::NotCalibrated)
            || has(Status::NotAvailable)
        {
            Verdict::Inconclusive
        } else if has(Status::Review) {
            Verdict::Review
        } else {
            Verdict::Pass
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Verdict::Pass => "pass",
            Verdict::Review => "review",
            Verdict::Fail => "fail",
            Verdict::Inconclusive => "inconclusive",
        })
    }
}

/// A section that this version does not fill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotMeasured {
    /// Always [`Status::NotAvailable`].
    pub status: Status,
    /// Why, for a user.
    pub reason: &'static str,
}

/// What a report cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Replies generated.
    pub generations: usize,
    /// Tokens read and written.
    pub tokens: usize,
    /// Wall time in seconds.
    pub seconds: f64,
}

/// The sections of the diagnostic report that this version leaves empty.
pub(crate) fn not_measured() -> BTreeMap<&'static str, NotMeasured> {
    [
        (
            "e_resonance",
            "not measured by this version: flatness needs at least 20 replies of 3,200 tokens each",
        ),
        (
            "quantisation",
            "not measured here: `exrail probe quant` loads the model in other widths beside it",
        ),
        (
            "cache",
            "not measured here: `exrail probe cache` compares with fresh prefills",
        ),
        (
            "schema",
            "not measured by this version: grounded answers are locked to their own grammar, and a gold set asks for no schema",
        ),
        ("shards", "not measured by this version: the model runs on one device"),
    ]
    .map(|(name, reason)| (name, NotMeasured { status: Status::NotAvailable, reason }))
    .into_iter()
    .collect()
}
