//! From what the modes said to the report: pooled classes, flips, drift, retrieval, gates.

use std::collections::{BTreeMap, BTreeSet};

use exrail_metrics::{
    AnswerText, Classes, LambdaState, MetricsError, Outcome, bootstrap_median, lambda, median,
    wilson,
};
use exrail_retrieval::Hit;

use super::{
    Difference, FaultStage, FoundAt, ItemComparison, ItemMode, ItemModes, ItemRuns, LambdaModes,
    LambdaModesReport, LeakCause, ModeComparison, ModeRuns, ModeSection, RetrievalCheck,
    RetrievalEquality, Stages, n_seeds,
};
use crate::error::VerifyError;
use crate::gates::{MIN_RATE_ITEMS, joined, median_of, share};
use crate::gold::N_PARAPHRASES;
use crate::probe::wordings_retrieve_alike;
use crate::quant::QuantMode;
use crate::report::{Cost, Measured, NotMeasured, Status, Unit, Verdict};
use crate::runs::{
    Attempt, ModeLambda, assembled_alike, citations_of, classes_of, majority_matches, runs_of,
    summarise,
};
use crate::scale::AnswerScale;

/// Largest share of flips that passes, and the one beyond which it fails (§1.3.10).
const FLIPS: (f64, f64) = (0.10, 0.20);
/// Largest share of answers that change between right and wrong (§1.5.6).
const GROSS: (f64, f64) = (0.05, 0.05);
/// Largest net change of right answers (§1.5.6).
const NET: f64 = 0.02;
/// Largest share of items on which int8 and int4 cite other snippets.
const CITED_OTHERWISE: (f64, f64) = (0.05, 0.05);
/// Largest drift that passes, and the one beyond which it fails (§1.1.12).
const DRIFT: (f64, f64) = (0.10, 0.15);
/// Fewest pairs on which drift is decided (§1.1.12).
const MIN_DRIFT_ITEMS: usize = 20;

const E_RESONANCE: &str = "not measured here: flatness across modes is a paired equivalence test over at least 50 \
                           prompts whose answers have several windows of 64 tokens (§1.4.4); these answers are shorter";

pub(super) fn report(
    probe: &LambdaModes<'_>,
    scale: &mut AnswerScale<'_>,
) -> Result<LambdaModesReport, VerifyError> {
    let items = items(probe, scale)?;
    let mut modes = BTreeMap::new();
    for (&mode, runs) in &probe.asked {
        modes.insert(mode, section(mode, runs.as_ref(), &items)?);
    }
    let mut comparisons = Vec::new();
    for (mode, reference) in pairs(probe) {
        comparisons.push(compare(probe, (mode, reference), &items, scale)?);
    }
    scale.check()?;
    let retrieval = retrieval(probe);
    let gates = gates(&comparisons, &retrieval);
    let statuses: Vec<Status> = gates.iter().map(|(_, status)| *status).collect();
    let failed = gates.into_iter().filter(|(_, status)| *status == Status::Fail);
    let costs = || modes.values().filter_map(|mode| mode.cost);
    Ok(LambdaModesReport {
        reference: probe.reference,
        n_answerable: probe.n_answerable,
        n_items: probe.items.len(),
        n_paraphrases: N_PARAPHRASES,
        n_seeds: reference(probe).map_or(0, |runs| n_seeds(&runs.facts)),
        equivalence: scale.in_words(),
        cost: Cost {
            generations: costs().map(|cost| cost.generations).sum(),
            tokens: costs().map(|cost| cost.tokens).sum(),
            seconds: costs().map(|cost| cost.seconds).sum(),
        },
        modes,
        retrieval,
        comparisons,
        items,
        e_resonance: NotMeasured { status: Status::NotAvailable, reason: E_RESONANCE },
        failed_gates: failed.map(|(name, _)| name).collect(),
        verdict: Verdict::of_statuses(&statuses),
    })
}

fn reference<'p>(probe: &'p LambdaModes<'_>) -> Option<&'p ModeRuns> {
    probe.asked.get(&probe.reference)?.as_ref().ok()
}

/// Every mode with the reference, then int4 with int8.
fn pairs(probe: &LambdaModes<'_>) -> Vec<(QuantMode, QuantMode)> {
    let others = probe.asked.keys().filter(|&&mode| mode != probe.reference);
    let mut pairs: Vec<_> = others.map(|&mode| (mode, probe.reference)).collect();
    let both = [QuantMode::Int4, QuantMode::Int8];
    if both.iter().all(|mode| *mode != probe.reference && probe.asked.contains_key(mode)) {
        pairs.push((QuantMode::Int4, QuantMode::Int8));
    }
    pairs
}

/// What decides. Values that are reported only do not.
fn gates(comparisons: &[ModeComparison], retrieval: &RetrievalEquality) -> Vec<(String, Status)> {
    let mut gates = vec![("retrieval_bit_equal".to_owned(), retrieval.status)];
    for comparison in comparisons {
        let named = comparison.measured().into_iter();
        gates.extend(named.map(|(name, of)| (format!("{}.{name}", comparison.name()), of.status)));
    }
    gates.retain(|(_, status)| *status != Status::Reported);
    gates
}

fn section(
    mode: QuantMode,
    runs: Result<&ModeRuns, &String>,
    items: &[ItemModes],
) -> Result<ModeSection, VerifyError> {
    let of_mode = || items.iter().filter_map(|item| item.modes.get(&mode));
    let converges = |lambda: &ModeLambda| lambda.state == Some(LambdaState::Convergent);
    let live: Vec<&ModeLambda> = of_mode().filter_map(|item| item.live.as_ref()).collect();
    let runs_of = runs.ok();
    Ok(ModeSection {
        status: runs.map_or(Status::NotAvailable, |_| Status::Reported),
        reason: runs.err().cloned(),
        quant: runs_of.map(|runs| runs.facts.quant.clone()),
        model_fp: runs_of.map(|runs| runs.facts.model_fp.clone()),
        n_convergent: of_mode().filter(|item| converges(&item.frozen)).count(),
        n_undecided: of_mode().filter(|item| item.frozen.state.is_none()).count(),
        n_convergent_live: (!live.is_empty())
            .then(|| live.iter().filter(|lambda| converges(lambda)).count()),
        n_matching: of_mode().filter(|item| item.matches_gold == Some(true)).count(),
        cost: runs_of.map(ModeRuns::cost).transpose()?,
    })
}

fn items(
    probe: &LambdaModes<'_>,
    scale: &mut AnswerScale<'_>,
) -> Result<Vec<ItemModes>, VerifyError> {
    let mut items = Vec::with_capacity(probe.items.len());
    for (at, item) in probe.items.iter().enumerate() {
        let mut modes = BTreeMap::new();
        for (&mode, runs) in &probe.asked {
            if let Ok(runs) = runs {
                modes.insert(mode, item_mode(&runs.items[at], &item.answers, scale)?);
            }
        }
        items.push(ItemModes { id: item.id.clone(), modes });
    }
    Ok(items)
}

fn item_mode(
    runs: &ItemRuns,
    references: &[String],
    scale: &mut AnswerScale<'_>,
) -> Result<ItemMode, VerifyError> {
    let mut same = |a: &str, b: &str| scale.equivalence_ds(a, b);
    let frozen = summarise(&runs.frozen, &mut same)?;
    let live = runs.live.as_ref().map(|live| summarise(live, &mut same)).transpose()?;
    let [strict, lenient] = classes_of(runs.frozen.iter(), &mut same);
    let [strict, lenient] =
        [strict, lenient].map(|of| majority_matches(&runs.frozen, &of.ids, references));
    let state = |alike: bool| {
        if alike { LambdaState::Convergent } else { LambdaState::Divergent }
    };
    let stages = Stages {
        retrieve: state(wordings_retrieve_alike(&runs.found[1..])),
        assemble: state(assembled_alike(runs.frozen.iter().chain(runs.live.iter().flatten()))),
        reason: live.as_ref().unwrap_or(&frozen).state,
    };
    Ok(ItemMode {
        fault: fault(stages, live.is_some()),
        stages,
        matches_gold: (strict == lenient).then_some(strict),
        citations: cited_by_half(&runs.frozen).into_iter().collect(),
        ds_ac: median_of(runs.frozen.iter().map(|attempt| ds_ac(attempt, scale)))?,
        frozen,
        live,
    })
}

/// Frozen evidence is retrieved once, so it is no fault of frozen runs that the wordings find something else.
fn fault(stages: Stages, is_live: bool) -> Option<FaultStage> {
    if is_live && stages.retrieve != LambdaState::Convergent {
        Some(FaultStage::Retrieve)
    } else if stages.assemble != LambdaState::Convergent {
        Some(FaultStage::Assemble)
    } else {
        let state = stages.reason.filter(|&state| state != LambdaState::Convergent);
        state.map(|_| FaultStage::Reason)
    }
}

fn cited_by_half(attempts: &[Attempt]) -> BTreeSet<String> {
    let sets: Vec<BTreeSet<String>> = attempts.iter().map(citations_of).collect();
    let n_citing = |id: &String| sets.iter().filter(|set| set.contains(id)).count();
    let all: BTreeSet<&String> = sets.iter().flatten().collect();
    all.into_iter().filter(|id| 2 * n_citing(id) >= sets.len()).cloned().collect()
}

/// Refusals and invalid replies cite nothing and have none.
fn ds_ac(attempt: &Attempt, scale: &mut AnswerScale<'_>) -> Option<f64> {
    let Outcome::Answer(AnswerText::Text(text)) = &attempt.answer else { return None };
    let cited = citations_of(attempt);
    let evidence = attempt.outcome.iter().flat_map(|outcome| &outcome.evidence);
    let chunks = evidence.filter(|hit| cited.contains(&hit.chunk.snippet_id));
    scale.ds_ac(text, chunks.map(|hit| hit.chunk.text.as_str()))
}

fn compare(
    probe: &LambdaModes<'_>,
    (mode, reference): (QuantMode, QuantMode),
    items: &[ItemModes],
    scale: &mut AnswerScale<'_>,
) -> Result<ModeComparison, VerifyError> {
    let (of_mode, of_reference) = match (&probe.asked[&mode], &probe.asked[&reference]) {
        (Ok(of_mode), Ok(of_reference)) => (of_mode, of_reference),
        (Err(reason), _) => return Ok(not_available((mode, reference), (mode, reason))),
        (_, Err(reason)) => return Ok(not_available((mode, reference), (reference, reason))),
    };
    let mut compared = Vec::with_capacity(items.len());
    let mut matches = Vec::with_capacity(items.len());
    for ((item, a), b) in items.iter().zip(&of_reference.items).zip(&of_mode.items) {
        let (known_a, known_b) = (&item.modes[&reference], &item.modes[&mode]);
        let mut same = |x: &str, y: &str| scale.equivalence_ds(x, y);
        let comparison = compare_item(&item.id, (a, known_a), (b, known_b), &mut same)?;
        compared.push(comparison);
        matches.push(known_a.matches_gold.zip(known_b.matches_gold));
    }
    let is_greedy = n_seeds(&of_reference.facts) == 1;
    let gates_citations = (mode, reference) == (QuantMode::Int4, QuantMode::Int8);
    Ok(ModeComparison {
        mode,
        reference,
        lambda_flip: lambda_flip(&compared, is_greedy)?,
        n_undecided: compared.iter().filter(|item| item.flip.is_none()).count(),
        flips_net: flips_net(&matches),
        flips_gross: flips_gross(&matches)?,
        citations_same: citations_same(&compared, gates_citations)?,
        ds_drift: ds_drift(&compared, scale)?,
        items: compared,
    })
}

fn compare_item(
    id: &str,
    (a, known_a): (&ItemRuns, &ItemMode),
    (b, known_b): (&ItemRuns, &ItemMode),
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<ItemComparison, VerifyError> {
    // Class numbers of two assignments mean nothing to each other, so there is one over all runs. The reference's come
    // first: its classes are those that it has alone.
    let [strict, lenient] = classes_of(a.frozen.iter().chain(&b.frozen), calibrated_ds);
    let (state_differs, majority_differs) = differ((&a.frozen, &b.frozen), &strict)?;
    let is_flip = state_differs || majority_differs;
    let (state_if_same, majority_if_same) = differ((&a.frozen, &b.frozen), &lenient)?;
    let flip = (is_flip == (state_if_same || majority_if_same)).then_some(is_flip);
    let n_a = a.frozen.len();
    Ok(ItemComparison {
        id: id.to_owned(),
        flip,
        state_differs,
        majority_differs,
        stage: flip.filter(|&flip| flip).map(|_| stage(a, b)),
        reference_classes: strict.ids[..n_a].to_vec(),
        mode_classes: strict.ids[n_a..].to_vec(),
        n_undecided: strict.n_undecided,
        citations_same: known_a.citations == known_b.citations,
        ds_ac_change: known_a.ds_ac.zip(known_b.ds_ac).map(|(of_a, of_b)| of_b - of_a),
    })
}

/// Whether state and majority class of two modes differ, under classes over the runs of both.
fn differ(
    (a, b): (&[Attempt], &[Attempt]),
    pooled: &Classes,
) -> Result<(bool, bool), MetricsError> {
    let (classes_a, classes_b) = pooled.ids.split_at(a.len());
    let state_a = lambda(&runs_of(a, classes_a))?.state;
    let state_b = lambda(&runs_of(b, classes_b))?.state;
    let majority_differs = largest(classes_a).is_disjoint(&largest(classes_b));
    Ok((state_a != state_b, majority_differs))
}

/// The largest classes; several where they are of one size.
fn largest(classes: &[usize]) -> BTreeSet<usize> {
    let size = |class: usize| classes.iter().filter(|&&other| other == class).count();
    let greatest = classes.iter().map(|&class| size(class)).max();
    classes.iter().copied().filter(|&class| Some(size(class)) == greatest).collect()
}

/// Where two modes begin to differ.
fn stage(a: &ItemRuns, b: &ItemRuns) -> FaultStage {
    if !found_alike(&a.found, &b.found) {
        FaultStage::Retrieve
    } else if !assembled_alike(a.frozen.iter().chain(&b.frozen)) {
        FaultStage::Assemble
    } else {
        FaultStage::Reason
    }
}

/// A share of which less is better. Below 50 items it cannot pass, and fails only if its 95 % interval lies wholly
/// beyond the limit.
fn decide(n_bad: usize, n: usize, (pass, fail): (f64, f64)) -> Result<Status, MetricsError> {
    let (value, interval) = (share(n_bad, n), wilson(n_bad, n)?);
    let enough = n >= MIN_RATE_ITEMS;
    Ok(if value > fail && (enough || interval.low > fail) {
        Status::Fail
    } else if !enough {
        Status::Inconclusive
    } else if value <= pass {
        Status::Pass
    } else {
        Status::Review
    })
}

fn few(n: usize, status: Status) -> Option<String> {
    let is_open = n < MIN_RATE_ITEMS && status == Status::Inconclusive;
    is_open.then(|| format!("{n} items; a pass needs at least {MIN_RATE_ITEMS}"))
}

fn lambda_flip(items: &[ItemComparison], is_greedy: bool) -> Result<Measured, VerifyError> {
    let n = items.len();
    let n_flips = items.iter().filter(|item| item.flip == Some(true)).count();
    let n_undecided = items.iter().filter(|item| item.flip.is_none()).count();
    // Undecided items may be flips or not: only what holds either way is decided.
    let best = decide(n_flips, n, FLIPS)?;
    let worst = decide(n_flips + n_undecided, n, FLIPS)?;
    let mut status = if best == worst { best } else { Status::Inconclusive };
    let mut reason = few(n, status);
    if n_undecided > 0 {
        let note = format!("{n_undecided} undecided: no fit encoder to compare long answers");
        reason = Some(joined(reason, note));
    }
    if is_greedy {
        if status == Status::Pass {
            status = Status::Inconclusive;
        }
        let note = "greedy sampling makes seeds void; batch composition is not varied".to_owned();
        reason = Some(joined(reason, note));
    }
    Ok(Measured {
        value: Some(share(n_flips, n)),
        unit: Unit::Share,
        needed: "≤ 0.10",
        n,
        interval: Some(wilson(n_flips, n)?),
        status,
        reason,
    })
}

/// Whether the majority answers are right, of the reference and of the mode; none if undecided.
type Matches = [Option<(bool, bool)>];

fn flips_gross(matches: &Matches) -> Result<Measured, VerifyError> {
    let n = matches.len();
    let n_changed = matches.iter().flatten().filter(|(before, after)| before != after).count();
    let n_undecided = matches.iter().filter(|pair| pair.is_none()).count();
    let (best, worst) = (decide(n_changed, n, GROSS)?, decide(n_changed + n_undecided, n, GROSS)?);
    let status = if best == worst { best } else { Status::Inconclusive };
    Ok(Measured {
        value: Some(share(n_changed, n)),
        unit: Unit::Share,
        needed: "≤ 0.05",
        n,
        interval: Some(wilson(n_changed, n)?),
        status,
        reason: undecided(few(n, status), n_undecided),
    })
}

fn flips_net(matches: &Matches) -> Measured {
    let n = matches.len();
    let count = |pair: (bool, bool)| matches.iter().flatten().filter(|&&of| of == pair).count();
    let (n_gained, n_lost) = (count((false, true)), count((true, false)));
    let n_undecided = matches.iter().filter(|pair| pair.is_none()).count();
    let change = share(n_gained.abs_diff(n_lost), n);
    let status = if n < MIN_RATE_ITEMS || n_undecided > 0 {
        Status::Inconclusive
    } else if change <= NET {
        Status::Pass
    } else {
        Status::Fail
    };
    Measured {
        value: Some(share(n_gained, n) - share(n_lost, n)),
        unit: Unit::Share,
        needed: "± 0.02",
        n,
        interval: None,
        status,
        reason: undecided(few(n, status), n_undecided),
    }
}

fn undecided(reason: Option<String>, n_undecided: usize) -> Option<String> {
    if n_undecided == 0 {
        return reason;
    }
    let note = format!("{n_undecided} undecided: no fit encoder to compare long answers");
    Some(joined(reason, note))
}

fn citations_same(items: &[ItemComparison], gates: bool) -> Result<Measured, VerifyError> {
    let n = items.len();
    let n_same = items.iter().filter(|item| item.citations_same).count();
    let decided = decide(n - n_same, n, CITED_OTHERWISE)?;
    Ok(Measured {
        value: Some(share(n_same, n)),
        unit: Unit::Share,
        needed: if gates { "≥ 0.95" } else { "" },
        n,
        interval: Some(wilson(n_same, n)?),
        status: if gates { decided } else { Status::Reported },
        reason: few(n, decided).filter(|_| gates),
    })
}

fn ds_drift(items: &[ItemComparison], scale: &AnswerScale<'_>) -> Result<Measured, VerifyError> {
    let changes: Vec<f64> = items.iter().filter_map(|item| item.ds_ac_change).collect();
    let n = changes.len();
    let value = if changes.is_empty() { None } else { Some(median(&changes)?.abs()) };
    let (status, reason) = match (scale.fault(), value) {
        (Some((status, reason)), _) => (status, Some(reason)),
        (None, None) => {
            let reason = "no item has an answer with a citation in both modes".to_owned();
            (Status::NotAvailable, Some(reason))
        }
        (None, Some(_)) if n < MIN_DRIFT_ITEMS => {
            let reason = format!("{n} items; drift is decided from {MIN_DRIFT_ITEMS} on");
            (Status::Inconclusive, Some(reason))
        }
        (None, Some(value)) if value <= DRIFT.0 => (Status::Pass, None),
        (None, Some(value)) if value > DRIFT.1 => (Status::Fail, None),
        (None, Some(_)) => (Status::Review, None),
    };
    // Of the median itself, before its sign goes.
    let interval = if n > 1 { Some(bootstrap_median(&changes, 1_000, 1)?) } else { None };
    let (unit, needed) = (Unit::CalibratedDs, "≤ 0.10");
    Ok(Measured { value, unit, needed, n, interval, status, reason })
}

/// A comparison with a mode that did not answer.
fn not_available(
    (mode, reference): (QuantMode, QuantMode),
    (missing, reason): (QuantMode, &str),
) -> ModeComparison {
    let none = |unit, needed| Measured {
        value: None,
        unit,
        needed,
        n: 0,
        interval: None,
        status: Status::NotAvailable,
        reason: Some(format!("{}: {reason}", missing.name())),
    };
    ModeComparison {
        mode,
        reference,
        lambda_flip: none(Unit::Share, "≤ 0.10"),
        n_undecided: 0,
        flips_net: none(Unit::Share, "± 0.02"),
        flips_gross: none(Unit::Share, "≤ 0.05"),
        citations_same: none(Unit::Share, "≥ 0.95"),
        ds_drift: none(Unit::CalibratedDs, "≤ 0.10"),
        items: Vec::new(),
    }
}

/// Compares what every mode found with what the reference did.
fn retrieval(probe: &LambdaModes<'_>) -> RetrievalEquality {
    let n_queries = probe.items.iter().map(|item| 1 + item.asked().len()).sum();
    let mut differences = Vec::new();
    let mut attribution = None;
    if probe.options.retrieval == RetrievalCheck::Off {
        let (status, reason) = (Status::Reported, Some("not compared".to_owned()));
        let bit_equal = None;
        return RetrievalEquality {
            bit_equal,
            status,
            n_queries,
            differences,
            attribution,
            reason,
        };
    }
    let mut n_compared = 0;
    if let Some(reference) = reference(probe) {
        for (&mode, runs) in probe.asked.iter().filter(|(mode, _)| **mode != probe.reference) {
            let Ok(runs) = runs else { continue };
            n_compared += 1;
            for (at, item) in probe.items.iter().enumerate() {
                let pair = (&reference.items[at].found[..], &runs.items[at].found[..]);
                differences.extend(differences_of(mode, &item.id, pair));
            }
            if attribution.is_none() && differences.iter().any(|of: &Difference| of.mode == mode) {
                attribution = Some(cause(reference, runs));
            }
        }
    }
    let (status, bit_equal) = match (n_compared, differences.is_empty()) {
        (0, _) => (Status::NotAvailable, None),
        (_, true) => (Status::Pass, Some(true)),
        (_, false) => (Status::Fail, Some(false)),
    };
    let reason = in_words(n_compared, &differences, attribution);
    RetrievalEquality { bit_equal, status, n_queries, differences, attribution, reason }
}

fn in_words(
    n_compared: usize,
    differences: &[Difference],
    cause: Option<LeakCause>,
) -> Option<String> {
    if n_compared == 0 {
        return Some("no other mode was asked".to_owned());
    }
    let first = differences.first()?;
    let cause = match cause? {
        LeakCause::Encoder => "another encoder is loaded with it",
        LeakCause::Index => "another index is open beside it: chunks or vectors moved",
        LeakCause::Unknown => {
            "encoder and index are the same by their fingerprints, so the generator rewrites queries or its weights \
             are in the encoder"
        }
    };
    Some(format!(
        "item {}: {} finds something else than the reference at place {}; the quantised model leaks into retrieval: \
         {cause}",
        first.item,
        first.mode.name(),
        first.place
    ))
}

/// What changed together with what was found (§1.1.11).
fn cause(reference: &ModeRuns, mode: &ModeRuns) -> LeakCause {
    if reference.encoder_fp != mode.encoder_fp {
        LeakCause::Encoder
    } else if reference.index_hash != mode.index_hash {
        LeakCause::Index
    } else {
        LeakCause::Unknown
    }
}

/// The first difference of every query of an item.
fn differences_of(
    mode: QuantMode,
    item: &str,
    (expected, found): (&[Vec<Hit>], &[Vec<Hit>]),
) -> Vec<Difference> {
    let mut differences = Vec::new();
    for (wording, (expected, found)) in expected.iter().zip(found).enumerate() {
        if let Some(at) = differs_at(expected, found) {
            differences.push(Difference {
                mode,
                item: item.to_owned(),
                wording,
                place: at + 1,
                expected: expected.get(at).map(found_at),
                found: found.get(at).map(found_at),
            });
        }
    }
    differences
}

/// Whether every query finds the same.
fn found_alike(expected: &[Vec<Hit>], found: &[Vec<Hit>]) -> bool {
    expected.iter().zip(found).all(|(a, b)| differs_at(a, b).is_none())
}

/// The first place where ids or the bits of the cosine, of which ΔS is made, differ.
fn differs_at(expected: &[Hit], found: &[Hit]) -> Option<usize> {
    let key = |hit: &Hit| (hit.chunk.snippet_id.clone(), hit.cosine.to_bits());
    let longest = expected.len().max(found.len());
    (0..longest).find(|&at| expected.get(at).map(key) != found.get(at).map(key))
}

fn found_at(hit: &Hit) -> FoundAt {
    FoundAt {
        snippet_id: hit.chunk.snippet_id.clone(),
        ds: 1.0 - f64::from(hit.cosine),
        cosine_bits: format!("{:08x}", hit.cosine.to_bits()),
    }
}
