//! The diagnostic report of §4: every part of a system measured once, on one JSON.
//!
//! Nothing is measured here. A run measures part by part, [`diagnose`] puts the parts together, judges them and names
//! the smallest fix, and the renderers read nothing but its result.

mod assembly;
mod compare;
mod gates;
mod html;
mod junit;
mod parts;
mod plot;
mod structured;
mod terminal;
#[cfg(test)]
mod tests;
mod vectors;

use exrail_metrics::{Band, KSweep};
use serde::Serialize;
use serde_json::Value;

pub use self::assembly::{
    AssemblyCheck, AssemblyObservation, AssemblySystem, RepeatCheck, RepeatObservation,
    check_assembly, check_repeats,
};
pub use self::compare::{Change, CompareError, Comparison, GateChange, PINS, compare};
pub use self::parts::{
    BootSection, InjectionSection, Manifest, MatrixObservation, ModeFidelity, QuantPart,
    QuantisationSection, QuestionSection, QuestionSnippet, Reasons, RetrievalBits, SchemaSection,
    Section, ShardSection, Weights, WeightsSection, WrongMatrix, ask_index,
};
pub use self::structured::{SchemaObservation, schema_probe};
pub use self::vectors::{
    RetrievedBits, SpikeAttribution, SpikeCause, VectorCheck, VectorObservations, attribute_spike,
    check_vectors, retrieved_bits,
};
use crate::ask::GateReading;
use crate::cache::{CacheFault, CacheReport};
use crate::calibrate::CorpusCalibration;
use crate::fix::{Findings, Fix, Mismatch, fix_for};
use crate::gates::lambda_rates;
use crate::lambda_modes::LambdaModesReport;
use crate::observations::{ReadingObservation, ScaleObservation};
use crate::report::{
    Config, Cost, CoverageSection, DeltaSSection, Gate, LambdaSection, Pins, REPORT_VERSION,
    Report, RetrievalItem, Sample, Status, Verdict,
};
use crate::resonance::ResonanceSection;

/// What a run measured, part by part.
pub struct Parts {
    /// Names the report in traces.
    pub trace_id: String,
    /// Retrieval, answers and λ over the gold set.
    pub report: Report,
    /// The distances that the scale of ΔS is fitted to.
    pub scale: ScaleObservation,
    /// How it was served.
    pub served: Served,
    /// The stored vectors against the encoder.
    pub vectors: VectorCheck,
    /// How prompts were put together.
    pub assembly: AssemblyCheck,
    /// Questions that were answered twice.
    pub repeats: RepeatCheck,
    /// The user's question and its SHA-256.
    pub question: Option<(String, QuestionSection)>,
    /// Other widths of the weights.
    pub quant: Section<QuantPart>,
    /// What other widths answer.
    pub lambda_modes: Section<LambdaModesReport>,
    /// The cache.
    pub cache: Section<CacheReport>,
    /// The boot.
    pub boot: Section<BootSection>,
    /// Attempts to inject.
    pub injection: Section<InjectionSection>,
    /// Structured replies.
    pub schema: Section<SchemaSection>,
    /// Ranks and slices.
    pub shards: Section<ShardSection>,
    /// E over long replies.
    pub e_resonance: Section<ResonanceSection>,
    /// The model against its manifest; none without one.
    pub manifest: Option<Manifest>,
    /// The weights against those that they were made of.
    pub weights: Section<WeightsSection>,
    /// All that it cost.
    pub cost: Cost,
}

/// How the generator was served, beside [`Config`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Served {
    /// Parts of the model.
    pub shards: usize,
    /// The device of each.
    pub rank_map: Vec<String>,
    /// What else may change a prompt; exrail loads no extensions.
    pub extensions: Vec<String>,
    /// Whether an answer has the same bits whatever runs beside it.
    pub batch_invariant: bool,
}

/// The diagnostic report.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Version of this shape.
    pub report_version: &'static str,
    /// Names it in traces and beside its observations.
    pub trace_id: String,
    /// What it is bound to; any change voids it.
    pub pins: Pins,
    /// How the system ran.
    pub config: DiagnosisConfig,
    /// SHA-256 of the user's question; null without one.
    pub question_sha256: Option<String>,
    /// The user's question.
    pub question: Section<QuestionSection>,
    /// What was asked.
    pub sample: Sample,
    /// The scale of ΔS; null if there is no valid one.
    pub calibration: Option<CorpusCalibration>,
    /// ΔS over the gold set.
    pub delta_s: DiagnosedDeltaS,
    /// Coverage of the evidence.
    pub coverage: Section<CoverageSection>,
    /// λ of each probed item.
    pub lambda: DiagnosedLambda,
    /// How prompts were put together.
    pub assembly: AssemblyCheck,
    /// Questions that were answered twice.
    pub repeats: RepeatCheck,
    /// The model against its manifest.
    pub manifest: Section<Manifest>,
    /// The weights against those that they were made of.
    pub weights: Section<WeightsSection>,
    /// Other widths of the weights.
    pub quantisation: Section<QuantisationSection>,
    /// The cache.
    pub cache: Section<CacheSection>,
    /// The boot.
    pub boot: Section<BootSection>,
    /// Structured replies.
    pub schema: Section<SchemaSection>,
    /// Attempts to inject.
    pub injection: Section<InjectionSection>,
    /// Ranks and slices.
    pub shards: Section<ShardSection>,
    /// E over long replies.
    pub e_resonance: Section<ResonanceSection>,
    /// The values that decide.
    pub gates: Vec<Gate>,
    /// Values that are reported and decide nothing.
    pub reported: Vec<Gate>,
    /// The result.
    pub verdict: Verdict,
    /// Names of the gates with status `fail`.
    pub failed_gates: Vec<&'static str>,
    /// What to do first.
    pub fix: Option<Fix>,
    /// What it cost.
    pub cost: Cost,
}

/// Names and settings, for people.
#[derive(Clone, Debug, Serialize)]
pub struct DiagnosisConfig {
    /// As in a verification.
    #[serde(flatten)]
    pub config: Config,
    /// How the generator was served.
    #[serde(flatten)]
    pub served: Served,
}

/// ΔS with the questions that the corpus cannot answer beside those that it can.
#[derive(Clone, Debug, Serialize)]
pub struct DiagnosedDeltaS {
    /// As in a verification.
    #[serde(flatten)]
    pub section: DeltaSSection,
    /// The nearest chunk is far at every k (§1.1.10).
    pub flat_high: bool,
    /// Questions that the corpus cannot answer, on the scale where there is one.
    pub unanswerable: Vec<Distance>,
    /// The stored vectors and chunks against the encoder.
    pub vectors: VectorCheck,
    /// Why a value is null.
    pub reasons: Reasons,
}

/// ΔS of a question.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// Raw `ds_min`.
    pub raw_min: f64,
    /// The same, calibrated.
    pub cal_min: Option<f64>,
}

/// λ of the model as it is served, and across widths.
#[derive(Clone, Debug, Serialize)]
pub struct DiagnosedLambda {
    /// `ok`, or `not_available` where no item was probed.
    pub status: &'static str,
    /// As in a verification.
    #[serde(flatten)]
    pub section: LambdaSection,
    /// The same items in other widths over the same evidence.
    pub modes: Section<LambdaModesReport>,
}

/// The cache, with the fault under the name of §4.
#[derive(Clone, Debug, Serialize)]
pub struct CacheSection {
    /// As the probe found it.
    #[serde(flatten)]
    pub report: CacheReport,
    /// Rotations during the probe, which lets none happen.
    pub rotations: usize,
    /// What is wrong.
    pub first_fault: Option<CacheFault>,
}

/// Puts the parts together, judges them and names the fix.
#[must_use]
pub fn diagnose(parts: Parts) -> Diagnosis {
    let Parts { report, quant, cache, boot, injection, shards, .. } = &parts;
    let mut gates = gates::of_manifest(parts.manifest.as_ref());
    gates.extend(gates::of_weights(&parts.weights));
    gates.extend(gates::of_vectors(&parts.vectors));
    gates.extend(report.gates.iter().cloned());
    gates.extend(gates::of_prompts(&parts));
    gates.extend(gates::of_schema(&parts.schema));
    gates.extend(gates::of_quant(quant));
    gates.extend(gates::of_modes(&parts.lambda_modes));
    gates.extend(gates::of_cache(cache));
    gates.extend(gates::of_boot(boot));
    gates.extend(gates::of_injection(injection));
    gates.extend(gates::of_shards(shards));
    let verdict = Verdict::of(&gates);
    let fix = fix_for(&findings(&parts, &gates));
    let failed = gates.iter().filter(|gate| gate.measured.status == Status::Fail);
    let failed_gates = failed.map(|gate| gate.name).collect();
    let mut reported = report.reported.clone();
    reported.extend(gates::reported(&parts));
    let delta_s = delta_s(&parts);
    let attribution = attribute_spike(
        &parts.vectors,
        has_spike(&parts),
        gates.iter().any(|gate| gate.measured.status == Status::Fail && is_of_answers(gate)),
    );
    let modes = parts.lambda_modes.value();
    let quantisation = match &parts.quant {
        Section::Ok(part) => Section::Ok(part.section(attribution, modes)),
        Section::NotAvailable { reason } => Section::NotAvailable { reason: reason.clone() },
        Section::Inconclusive { reason } => Section::Inconclusive { reason: reason.clone() },
    };
    let config = DiagnosisConfig { config: report.config.clone(), served: parts.served.clone() };
    let (question_sha256, question) = match parts.question {
        Some((sha256, section)) => (Some(sha256), Section::Ok(section)),
        None => (None, Section::missing("not asked: give one with --question")),
    };
    let report = parts.report;
    Diagnosis {
        report_version: REPORT_VERSION,
        trace_id: parts.trace_id,
        pins: report.pins,
        config,
        question_sha256,
        question,
        sample: report.sample,
        calibration: report.calibration,
        delta_s,
        coverage: coverage(report.coverage),
        lambda: DiagnosedLambda {
            status: if report.lambda.items.is_empty() { "not_available" } else { "ok" },
            section: report.lambda,
            modes: parts.lambda_modes,
        },
        assembly: parts.assembly,
        repeats: parts.repeats,
        manifest: match parts.manifest {
            Some(manifest) => Section::Ok(manifest),
            None => Section::missing("not declared: give one with --manifest FILE"),
        },
        weights: parts.weights,
        quantisation,
        cache: match parts.cache {
            Section::Ok(report) => {
                Section::Ok(CacheSection { rotations: 0, first_fault: report.fault, report })
            }
            Section::NotAvailable { reason } => Section::NotAvailable { reason },
            Section::Inconclusive { reason } => Section::Inconclusive { reason },
        },
        boot: parts.boot,
        schema: parts.schema,
        injection: parts.injection,
        shards: parts.shards,
        e_resonance: parts.e_resonance,
        gates,
        reported,
        verdict,
        failed_gates,
        fix,
        cost: parts.cost,
    }
}

impl Diagnosis {
    /// The report as JSON.
    ///
    /// # Errors
    /// None in practice: the report holds no map with keys other than text.
    pub fn to_json(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }
}

fn is_of_answers(gate: &Gate) -> bool {
    ["lambda", "citation_hit", "citations_valid", "refusal"].contains(&gate.name)
        || gate.name.starts_with("quant_")
}

/// ΔS of the question, or the median.
fn cal_min(parts: &Parts) -> Option<f64> {
    let asked = parts.question.as_ref().map(|(_, question)| question.delta_s.cal_min());
    asked.unwrap_or(parts.report.delta_s.cal_min)
}

/// ΔS fails, or lies where only unanswerable questions should.
/// None without a scale.
fn has_spike(parts: &Parts) -> Option<bool> {
    let fails = |gate: &Gate| gate.name == "delta_s" && gate.measured.status == Status::Fail;
    let fails = parts.report.gates.iter().any(fails);
    Some(fails || cal_min(parts)? >= 0.60)
}

fn findings<'a>(parts: &Parts, gates: &'a [Gate]) -> Findings<'a> {
    let report = &parts.report;
    let differs = parts.manifest.as_ref().and_then(|manifest| manifest.differs.clone());
    let captures = parts.boot.value().map_or(0, |boot| boot.post_ready_captures);
    let without = |item: &&RetrievalItem| item.raw_min.is_none();
    let asked_in_vain = parts
        .question
        .as_ref()
        .is_some_and(|(_, question)| matches!(question.delta_s, GateReading::NoEvidence));
    Findings {
        gates,
        mismatch: differs.map(Mismatch::Model).or_else(|| of_index(&parts.vectors)),
        calibration_void: report.calibration_void,
        not_ready: (captures > 0)
            .then(|| format!("{captures} things built behind the warm-up fence")),
        n_without_evidence: report.delta_s.items.iter().filter(without).count()
            + usize::from(asked_in_vain),
        shards: parts.shards.value().and_then(gates::broken_shards),
        weights: parts.weights.value().and_then(wrong_matrices),
        cache: parts.cache.value().and_then(|cache| cache.fault),
        reordered: of_prompts(parts.assembly.reordered, &parts.assembly, "have slots out of order"),
        cut: read_in_part(parts),
        unrepeatable: (parts.repeats.differ > 0 && parts.served.batch_invariant).then(|| {
            let RepeatCheck { pairs, differ, .. } = parts.repeats;
            format!("{differ} of {pairs} questions, asked twice")
        }),
        injected: gates::injected(parts),
        flat_high: flat_high(report.delta_s.k_sweep.as_ref()),
        decoy_margin: report.delta_s.decoy_margin,
        cal_min: cal_min(parts),
        lambda_rates: lambda_rates(&report.lambda.items),
    }
}

/// What is wrong with the index itself: what makes other numbers meaningless comes first.
fn of_index(check: &VectorCheck) -> Option<Mismatch> {
    let VectorCheck { pairs, pairs_differ, chunks, chunks_differ, texts, texts_differ, .. } = check;
    if *texts_differ > 0 {
        let what = format!("{texts_differ} of {texts} chunks say something else");
        Some(Mismatch::Document(what))
    } else if *pairs_differ > 0 {
        let what = format!("{pairs_differ} of {pairs} retrieved vectors are another encoder's");
        Some(Mismatch::Encoder(what))
    } else if *chunks_differ > 0 {
        let what = format!("{chunks_differ} of {chunks} retrieved chunks count otherwise");
        Some(Mismatch::Tokenizer(what))
    } else {
        None
    }
}

/// The matrices that stand out, the worst in words.
fn wrong_matrices(weights: &WeightsSection) -> Option<String> {
    let worst = weights.wrong.first()?;
    let (n_wrong, matrices) = (weights.wrong.len(), weights.matrices);
    Some(format!("{n_wrong} of {matrices} matrices stand out, first {}", worst.told))
}

fn of_prompts(n: usize, of: &AssemblyCheck, what: &str) -> Option<String> {
    (n > 0).then(|| format!("{n} of {} prompts {what}", of.prompts))
}

/// Evidence that did not fit, or a prompt that somebody shortened on its way.
fn read_in_part(parts: &Parts) -> Option<String> {
    let misread = parts.repeats.misread;
    let read = (misread > 0).then(|| {
        let n_all = 2 * parts.repeats.pairs;
        format!("{misread} of {n_all} prompts were read with another number of tokens")
    });
    read.or_else(|| of_prompts(parts.assembly.cut, &parts.assembly, "lost evidence that was found"))
}

fn flat_high(sweep: Option<&KSweep>) -> bool {
    sweep.is_some_and(|sweep| sweep.flat_high)
}

fn delta_s(parts: &Parts) -> DiagnosedDeltaS {
    let mut section = parts.report.delta_s.clone();
    let scale = parts.report.calibration.as_ref().and_then(|c| c.qe.calibration());
    let at = |of: &ReadingObservation| Distance {
        raw_min: of.ds,
        cal_min: scale.map(|scale| scale.map(of.ds)),
    };
    let mut reasons = Reasons::new();
    let no_scale = match scale {
        Some(_) => "no question has this value",
        None => "ΔS has no valid scale for this encoder and index: exrail verify --calibrate",
    };
    let values = [
        ("raw_min", section.raw_min),
        ("cal_min", section.cal_min),
        ("cal_mean", section.cal_mean),
        ("ra", section.ra),
        ("decoy_margin", section.decoy_margin),
    ];
    for (name, value) in values {
        if value.is_none() {
            reasons.insert(name, no_scale.to_owned());
        }
    }
    if section.k_sweep.is_none() {
        reasons.insert("k_sweep", no_scale.to_owned());
    }
    section.band = section.cal_min.map(Band::of);
    DiagnosedDeltaS {
        flat_high: flat_high(section.k_sweep.as_ref()),
        unanswerable: parts.scale.unanswerable.iter().map(at).collect(),
        vectors: parts.vectors.clone(),
        reasons,
        section,
    }
}

fn coverage(section: CoverageSection) -> Section<CoverageSection> {
    match section.value {
        Some(_) => Section::Ok(section),
        None => Section::missing("no answerable question was asked"),
    }
}
