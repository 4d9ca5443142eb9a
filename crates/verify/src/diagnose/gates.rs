//! The gates of the parts that a verification does not measure.

use crate::cache::{CacheFault, CacheReport};
use crate::diagnose::Parts;
use crate::diagnose::assembly::{AssemblyCheck, RepeatCheck};
use crate::diagnose::parts::{
    BootSection, InjectionSection, Manifest, QuantPart, SchemaSection, Section, ShardSection,
    WeightsSection,
};
use crate::diagnose::vectors::VectorCheck;
use crate::lambda_modes::LambdaModesReport;
use crate::quant::{FidelityGate, LIMITS_FROM_PARAMETERS, QuantMode};
use crate::report::{Gate, Measured, Status, Unit};

/// Largest ratio of a first token behind the warm-up fence (G-05).
const COLD_RATIO_MAX: f64 = 1.5;

/// A gate over a number of things.
fn gate(
    (name, label, needed): (&'static str, &'static str, &'static str),
    (value, unit): (Option<f64>, Unit),
    n: usize,
    (status, reason): (Status, Option<String>),
) -> Gate {
    let measured = Measured { value, unit, needed, n, interval: None, status, reason };
    Gate { name, label, measured }
}

/// A gate that was not measured.
fn missing(names: (&'static str, &'static str, &'static str), unit: Unit, reason: &str) -> Gate {
    gate(names, (None, unit), 0, (Status::NotAvailable, Some(reason.to_owned())))
}

/// The limits of §1.5.5: name, label, what is needed.
const FIDELITY: [(QuantMode, &str, (&str, &str, &str)); 7] = [
    (QuantMode::Int8, "kld_mean", ("quant_int8_kld_mean", "int8: KLD, mean", "≤ 0.005")),
    (QuantMode::Int8, "top1", ("quant_int8_top1", "int8: same top token", "≥ 0.98")),
    (QuantMode::Int8, "ln_ppl_ratio", ("quant_int8_ln_ppl", "int8: ln PPL ratio", "≤ 0.005")),
    (QuantMode::Int4, "kld_mean", ("quant_int4_kld_mean", "int4: KLD, mean", "≤ 0.05")),
    (QuantMode::Int4, "kld_p99", ("quant_int4_kld_p99", "int4: KLD, 99th percentile", "≤ 0.5")),
    (QuantMode::Int4, "top1", ("quant_int4_top1", "int4: same top token", "≥ 0.90")),
    (QuantMode::Int4, "ln_ppl_ratio", ("quant_int4_ln_ppl", "int4: ln PPL ratio", "≤ 0.03")),
];
const ORDER: (&str, &str, &str) = ("quant_order", "int8 nearer than int4", "1.00");
const BITS: (&str, &str, &str) = ("retrieval_bits", "questions that retrieve otherwise", "0");

pub(super) fn of_quant(quant: &Section<QuantPart>) -> Vec<Gate> {
    let Some(part) = quant.value() else {
        let reason = quant.reason().unwrap_or_default();
        return vec![missing(ORDER, Unit::Share, reason), missing(BITS, Unit::Count, reason)];
    };
    let mut gates: Vec<Gate> = FIDELITY
        .iter()
        .filter_map(|(mode, metric, names)| of_width(part, *mode, metric, *names))
        .collect();
    if let Some(ordered) = part.report.ordered {
        let status = if ordered { Status::Pass } else { Status::Fail };
        let reason = (!ordered).then(|| "files or grids were mixed up".to_owned());
        let value = Some(if ordered { 1.0 } else { 0.0 });
        gates.push(gate(ORDER, (value, Unit::Share), part.report.texts.len(), (status, reason)));
    }
    gates.push(match &part.retrieval {
        Some(bits) => {
            let status = if bits.differs.is_empty() { Status::Pass } else { Status::Fail };
            let value = (Some(as_f64(bits.differs.len())), Unit::Count);
            gate(BITS, value, bits.n, (status, None))
        }
        None => missing(BITS, Unit::Count, "no question was asked before and after"),
    });
    gates
}

/// The worst of the texts.
fn of_width(
    part: &QuantPart,
    mode: QuantMode,
    metric: &str,
    names: (&'static str, &'static str, &'static str),
) -> Option<Gate> {
    let badness = |gate: &&FidelityGate| if metric == "top1" { -gate.value } else { gate.value };
    let found = part.report.gates.iter().filter(|gate| gate.mode == mode && gate.metric == metric);
    let worst = found.max_by(|a, b| badness(a).total_cmp(&badness(b)))?;
    let unit = if metric == "top1" { Unit::Share } else { Unit::Nats };
    let texts = part.report.texts.iter();
    let n = texts.filter_map(|text| Some(text.modes.get(&mode)?.positions)).sum();
    let reason = (worst.status == Status::NotCalibrated).then(|| {
        format!(
            "the limits are for models from {} billion parameters, this one has {:.2}",
            LIMITS_FROM_PARAMETERS / 1_000_000_000,
            as_f64(usize::try_from(part.weights.parameters).unwrap_or(usize::MAX)) / 1e9
        )
    });
    Some(gate(names, (Some(worst.value), unit), n, (worst.status, reason)))
}

/// Of widths against what is served, and of int4 against int8: name in JSON, name for people.
type Compared = (QuantMode, QuantMode, &'static str, (&'static str, &'static str));

const COMPARED: [Compared; 15] = {
    use QuantMode::{AsServed, Int4, Int8};
    [
        (Int8, AsServed, "lambda_flip", ("quant_int8_lambda_flip", "int8: λ or majority flips")),
        (Int8, AsServed, "flips_net", ("quant_int8_flips_net", "int8: right answers, net")),
        (Int8, AsServed, "flips_gross", ("quant_int8_flips_gross", "int8: answers that change")),
        (Int8, AsServed, "citations_same", ("quant_int8_cites", "int8: same snippets cited")),
        (Int8, AsServed, "ds_drift", ("quant_int8_ds_drift", "int8: ΔS answer to source, drift")),
        (Int4, AsServed, "lambda_flip", ("quant_int4_lambda_flip", "int4: λ or majority flips")),
        (Int4, AsServed, "flips_net", ("quant_int4_flips_net", "int4: right answers, net")),
        (Int4, AsServed, "flips_gross", ("quant_int4_flips_gross", "int4: answers that change")),
        (Int4, AsServed, "citations_same", ("quant_int4_cites", "int4: same snippets cited")),
        (Int4, AsServed, "ds_drift", ("quant_int4_ds_drift", "int4: ΔS answer to source, drift")),
        (Int4, Int8, "lambda_flip", ("quant_between_lambda_flip", "int4 to int8: λ or majority")),
        (Int4, Int8, "flips_net", ("quant_between_flips_net", "int4 to int8: right, net")),
        (Int4, Int8, "flips_gross", ("quant_between_flips_gross", "int4 to int8: changed")),
        (Int4, Int8, "citations_same", ("quant_between_cites", "int4 to int8: same snippets")),
        (Int4, Int8, "ds_drift", ("quant_between_ds_drift", "int4 to int8: ΔS drift")),
    ]
};
const MODES: (&str, &str, &str) = ("quant_lambda_flip", "λ across widths, flips", "≤ 0.10");

/// What the answers of other widths are compared by; what only reports comes from [`reported`].
pub(super) fn of_modes(modes: &Section<LambdaModesReport>) -> Vec<Gate> {
    match modes.value() {
        Some(report) => {
            let of = compared(report).into_iter();
            of.filter(|gate| gate.measured.status != Status::Reported).collect()
        }
        None => vec![missing(MODES, Unit::Share, modes.reason().unwrap_or_default())],
    }
}

fn compared(report: &LambdaModesReport) -> Vec<Gate> {
    let mut gates = Vec::new();
    for of in &report.comparisons {
        for (metric, measured) in of.measured() {
            let found = COMPARED.iter().find(|(mode, reference, name, _)| {
                (*mode, *reference, *name) == (of.mode, of.reference, metric)
            });
            if let Some((.., (name, label))) = found {
                gates.push(Gate { name, label, measured: measured.clone() });
            }
        }
    }
    gates
}

const ORACLE: (&str, &str, &str) = ("cache_oracle", "live cache to fresh prefill, KL", "≤ limit");
const RANGE: (&str, &str, &str) = ("cache_range", "loss by position, rise", "≤ 0.5");
const BOOKS: (&str, &str, &str) = ("kv_violations", "page books, violations", "0");

pub(super) fn of_cache(cache: &Section<CacheReport>) -> Vec<Gate> {
    let Some(report) = cache.value() else {
        let reason = cache.reason().unwrap_or_default();
        return vec![
            missing(ORACLE, Unit::Nats, reason),
            missing(RANGE, Unit::Nats, reason),
            missing(BOOKS, Unit::Count, reason),
        ];
    };
    let oracle = match report.fault {
        Some(CacheFault::CacheDrift) => Status::Fail,
        Some(CacheFault::Noise | CacheFault::LastCheckpoint) => Status::Inconclusive,
        Some(CacheFault::KvIntegrity | CacheFault::ContextRange) | None => Status::Pass,
    };
    let range = match report.fault {
        Some(CacheFault::ContextRange) => Status::Fail,
        // Nothing is said of the range while the cache itself is wrong.
        Some(CacheFault::CacheDrift | CacheFault::KvIntegrity | CacheFault::Noise) => {
            Status::Inconclusive
        }
        Some(CacheFault::LastCheckpoint) | None => Status::Pass,
    };
    let violations = as_f64(usize::try_from(report.violations).unwrap_or(usize::MAX));
    let books = if report.violations == 0 { Status::Pass } else { Status::Fail };
    let limit = Some(format!(
        "limit {:.3} nats; drift at {} tokens",
        report.limit, report.tokens_until_drift
    ));
    let excess = (range != Status::Pass).then(|| {
        format!("{:+.3} nats against the same tokens in a short context", report.nll_excess)
    });
    let n_checkpoints = report.checkpoints.len();
    vec![
        gate(ORACLE, (Some(report.oracle_kl_max), Unit::Nats), n_checkpoints, (oracle, limit)),
        gate(RANGE, (Some(report.nll_drift), Unit::Nats), report.bins.len(), (range, excess)),
        gate(BOOKS, (Some(violations), Unit::Count), report.tokens, (books, None)),
    ]
}

const CAPTURES: (&str, &str, &str) = ("boot_captures", "built behind the warm-up fence", "0");
const COLD: (&str, &str, &str) = ("boot_cold", "first token behind it, cold to warm", "≤ 1.5");

pub(super) fn of_boot(boot: &Section<BootSection>) -> Vec<Gate> {
    let Some(found) = boot.value() else {
        let reason = boot.reason().unwrap_or_default();
        return vec![missing(CAPTURES, Unit::Count, reason), missing(COLD, Unit::Ratio, reason)];
    };
    let captures = as_f64(usize::try_from(found.post_ready_captures).unwrap_or(usize::MAX));
    let built = if found.post_ready_captures == 0 { Status::Pass } else { Status::Fail };
    // A machine that does something else beside is as slow, so that a person has to look.
    let (cold, why) = if found.cold_ratio_max <= COLD_RATIO_MAX {
        (Status::Pass, None)
    } else {
        (Status::Review, Some("or the machine did something else beside".to_owned()))
    };
    vec![
        gate(CAPTURES, (Some(captures), Unit::Count), 1, (built, None)),
        gate(COLD, (Some(found.cold_ratio_max), Unit::Ratio), 1, (cold, why)),
    ]
}

const MANIFEST: (&str, &str, &str) = ("manifest", "the model is the one that was declared", "1.00");

/// Whether the model is that of its manifest, where there is one.
pub(super) fn of_manifest(manifest: Option<&Manifest>) -> Vec<Gate> {
    let Some(manifest) = manifest else { return Vec::new() };
    let (value, status) = match (&manifest.differs, &manifest.overlooked) {
        (Some(_), _) => (0.0, Status::Fail),
        (None, Some(_)) => (1.0, Status::Review),
        (None, None) => (1.0, Status::Pass),
    };
    let reason = manifest.differs.clone().or_else(|| {
        manifest.overlooked.as_ref().map(|why| format!("soft mismatches are overlooked: {why}"))
    });
    vec![gate(MANIFEST, (Some(value), Unit::Share), manifest.values, (status, reason))]
}

const WEIGHTS: (&str, &str, &str) = ("weights", "matrices that stand out", "0");

/// Whether the weights are those that they were made of, where there is something to compare with.
pub(super) fn of_weights(weights: &Section<WeightsSection>) -> Vec<Gate> {
    let Some(found) = weights.value() else { return Vec::new() };
    let reason = found.wrong.first().map(|worst| worst.told.clone());
    vec![count_gate(WEIGHTS, (found.wrong.len(), found.matrices), reason)]
}

const TEXTS: (&str, &str, &str) = ("chunk_texts", "chunks that are not their documents'", "0");
const VECTORS: (&str, &str, &str) = ("vectors", "vectors of another encoder", "0");
const COUNTS: (&str, &str, &str) = ("chunk_tokens", "chunks of another tokenizer", "0");

pub(super) fn of_vectors(check: &VectorCheck) -> Vec<Gate> {
    vec![
        count_gate(TEXTS, (check.texts_differ, check.texts), None),
        count_gate(VECTORS, (check.pairs_differ, check.pairs), None),
        count_gate(COUNTS, (check.chunks_differ, check.chunks), None),
    ]
}

const SLOTS: (&str, &str, &str) = ("prompt_slots", "prompts with slots out of order", "0");
const CUT: (&str, &str, &str) = ("prompt_evidence", "prompts that lost evidence", "0");
const READ: (&str, &str, &str) = ("prompt_read", "prompts that were read in part", "0");
const REPEATS: (&str, &str, &str) = ("repeats", "answers that differ from themselves", "0");

/// Whether what was found reaches the model, and whether the model repeats itself.
pub(super) fn of_prompts(parts: &Parts) -> Vec<Gate> {
    let AssemblyCheck { prompts, reordered, unplaced, cut, .. } = parts.assembly;
    let unknown = (unplaced > 0).then(|| format!("in {unplaced} the place of a slot is not known"));
    let RepeatCheck { pairs, differ, misread, .. } = parts.repeats;
    let mut repeats = count_gate(REPEATS, (differ, pairs), None);
    if differ > 0 && !parts.served.batch_invariant {
        let why = "kernels that sum otherwise in other company may do that: --batch-invariant";
        (repeats.measured.status, repeats.measured.reason) = (Status::Review, Some(why.to_owned()));
    }
    vec![
        count_gate(SLOTS, (reordered, prompts), unknown),
        count_gate(CUT, (cut, prompts), None),
        count_gate(READ, (misread, 2 * pairs), None),
        repeats,
    ]
}

const SCHEMA: (&str, &str, &str) = ("schema", "structured replies that are not", "0");

pub(super) fn of_schema(schema: &Section<SchemaSection>) -> Vec<Gate> {
    let Some(found) = schema.value() else { return Vec::new() };
    vec![count_gate(SCHEMA, (found.invalid, found.replies), None)]
}

/// A gate that is open when nothing of a kind was found among so many. Where there was none to look at, nothing is known.
fn count_gate(
    names: (&'static str, &'static str, &'static str),
    (found, among): (usize, usize),
    reason: Option<String>,
) -> Gate {
    if among == 0 {
        return missing(names, Unit::Count, "there was nothing to look at");
    }
    let status = if found == 0 { Status::Pass } else { Status::Fail };
    gate(names, (Some(as_f64(found)), Unit::Count), among, (status, reason))
}

const INJECTION: (&str, &str, &str) = ("injection", "strangers' texts that got through", "0");

pub(super) fn of_injection(injection: &Section<InjectionSection>) -> Vec<Gate> {
    // A run that tries none says so in its section: the suite is a part of its own, not of every diagnosis.
    let Some(found) = injection.value() else { return Vec::new() };
    let n = found.control_tokens + found.hijacks + found.leaks;
    let status = if n == 0 { Status::Pass } else { Status::Fail };
    let reason = Some(format!("at most {:.2} % with 95 % confidence", 100.0 * found.upper_95));
    vec![gate(INJECTION, (Some(as_f64(n)), Unit::Count), found.trials, (status, reason))]
}

const SHARDS: (&str, &str, &str) = ("shards", "ranks and slices make one model", "1.00");

pub(super) fn of_shards(shards: &Section<ShardSection>) -> Vec<Gate> {
    let Some(found) = shards.value() else { return Vec::new() };
    let broken = broken_shards(found);
    let status = if broken.is_none() { Status::Pass } else { Status::Fail };
    let value = if broken.is_none() { 1.0 } else { 0.0 };
    vec![gate(SHARDS, (Some(value), Unit::Share), 1, (status, broken))]
}

/// What is wrong with them, in words.
pub(super) fn broken_shards(shards: &ShardSection) -> Option<String> {
    let ShardSection { order_ok, slices_tile, residual_hash_ok } = shards;
    if !order_ok {
        Some("ranks are not in order".to_owned())
    } else if !slices_tile {
        Some("slices do not tile the tensors".to_owned())
    } else if !residual_hash_ok {
        Some("ranks compute different residuals".to_owned())
    } else {
        None
    }
}

/// What got through, or which structured replies were invalid, in words.
pub(super) fn injected(parts: &Parts) -> Option<String> {
    if let Some(found) = parts.injection.value() {
        let InjectionSection { control_tokens, hijacks, leaks, trials, .. } = found;
        if control_tokens + hijacks + leaks > 0 {
            return Some(format!(
                "{control_tokens} control tokens, {hijacks} hijacks, {leaks} leaks of {trials}"
            ));
        }
    }
    let schema = parts.schema.value().filter(|schema| !schema.valid)?;
    Some(format!(
        "{} of {} structured replies do not conform, after {} repairs",
        schema.invalid, schema.replies, schema.repairs
    ))
}

/// What explains the gates and decides nothing.
pub(super) fn reported(parts: &Parts) -> Vec<Gate> {
    let mut gates = parts.lambda_modes.value().map(compared).unwrap_or_default();
    gates.retain(|gate| gate.measured.status == Status::Reported);
    if let Some(served) = parts.quant.value().and_then(|part| {
        let texts = part.report.texts.iter();
        texts
            .filter_map(|text| text.modes.get(&QuantMode::AsServed))
            .max_by(|a, b| a.kld_mean.total_cmp(&b.kld_mean))
    }) {
        let names = ("served_kld_mean", "as served: KLD to exact arithmetic, mean", "");
        let value = (Some(served.kld_mean), Unit::Nats);
        gates.push(gate(names, value, served.positions, (Status::Reported, None)));
    }
    if let Some(cache) = parts.cache.value() {
        let names = ("nll_slope_per_1k", "loss by position, slope per 1,000 tokens", "");
        let value = (Some(cache.nll_slope_per_1k), Unit::Nats);
        gates.push(gate(names, value, cache.bins.len(), (Status::Reported, None)));
    }
    let masked = parts.report.calibration.as_ref().and_then(|calibration| calibration.masked);
    if let Some(masked) = masked {
        let names = ("masked_auroc", "ΔS tells a question from itself without its page", "");
        let value = (Some(masked.auroc), Unit::Share);
        gates.push(gate(names, value, masked.n, (Status::Reported, None)));
    }
    gates
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn as_f64(n: usize) -> f64 {
    n as f64
}
