//! Turns what was observed into gates. Thresholds are those of §1.1 to §1.3 and §1.7.

use exrail_metrics::{
    Calibration, Family, Fitness, LambdaState, Release, Unfit, mean, median, quantile, release,
    wilson,
};

use crate::calibrate::{CorpusCalibration, FamilyFit, Signal};
use crate::error::VerifyError;
use crate::evaluate::{AnswerItem, RefusalItem};
use crate::evidence_gate::gate_line;
use crate::probe::ItemLambda;
use crate::report::{Gate, Measured, RetrievalItem, Status, Unit};
use crate::runs::ModeLambda;

/// Fewest questions on which a rate may pass.
pub(crate) const MIN_RATE_ITEMS: usize = 50;
const MIN_COVERAGE: f64 = 0.70;

/// Everything that the gates look at.
pub(crate) struct Observed<'a> {
    pub(crate) calibration: Option<&'a CorpusCalibration>,
    /// Why the stored calibration does not hold, if there is one that does not.
    pub(crate) void: Option<&'a str>,
    pub(crate) circular: bool,
    pub(crate) retrieval: &'a [RetrievalItem],
    pub(crate) answers: &'a [AnswerItem],
    pub(crate) refusals: &'a [RefusalItem],
    pub(crate) lambda: &'a [ItemLambda],
    pub(crate) seeded: bool,
}

/// The gates, in the order of the pipeline.
pub(crate) fn gates(observed: &Observed<'_>) -> Result<Vec<Gate>, VerifyError> {
    Ok(vec![
        delta_s(observed)?,
        gate_line(observed.calibration),
        coverage(observed.retrieval)?,
        lambda(observed)?,
        citations_valid(observed)?,
        citation_hit(observed.answers)?,
        refusal(observed.refusals)?,
    ])
}

/// `ok` or the state that keeps ΔS from gating.
pub(crate) fn delta_s_status(observed: &Observed<'_>) -> &'static str {
    let qe = observed.calibration.and_then(|calibration| calibration.qe.calibration());
    if observed.retrieval.iter().any(|item| item.raw_min.is_none()) {
        return "no_evidence";
    }
    match qe {
        None => "not_calibrated",
        Some(calibration) if calibration.is_fit() => "ok",
        Some(_) => "encoder_unfit",
    }
}

/// Median over the items of max(`ds_qr`, `ds_ra`), calibrated (§1.1.6, C-07).
fn delta_s(observed: &Observed<'_>) -> Result<Gate, VerifyError> {
    let items = observed.retrieval;
    let values: Vec<f64> =
        items.iter().filter_map(|item| Some(item.cal_min?.max(item.ra.unwrap_or(0.0)))).collect();
    let mut measured = Measured {
        value: if values.is_empty() { None } else { Some(median(&values)?) },
        unit: Unit::CalibratedDs,
        needed: "≤ 0.45",
        n: values.len(),
        interval: None,
        status: Status::Inconclusive,
        reason: None,
    };
    let n_without = items.iter().filter(|item| item.raw_min.is_none()).count();
    (measured.status, measured.reason) = if items.is_empty() {
        (Status::Inconclusive, Some("no answerable question was asked".to_owned()))
    } else if n_without > 0 {
        let reason = format!("{n_without} of {} questions found no evidence", items.len());
        (Status::Fail, Some(reason))
    } else if let Some(closed) = scale_fault(observed) {
        closed
    } else {
        delta_s_decision(&values)?
    };
    if values.len() > 1 {
        measured.interval = Some(exrail_metrics::bootstrap_median(&values, 1_000, 1)?);
    }
    Ok(Gate { name: "delta_s", label: "ΔS to the evidence, median", measured })
}

fn delta_s_decision(values: &[f64]) -> Result<(Status, Option<String>), VerifyError> {
    let (middle, p90) = (median(values)?, quantile(values, 0.90)?);
    let n_danger = values.iter().filter(|&&value| value >= 0.85).count();
    if middle <= 0.45 && p90 <= 0.60 && n_danger == 0 {
        return Ok((Status::Pass, None));
    }
    let status = if middle >= 0.60 || p90 >= 0.85 { Status::Fail } else { Status::Review };
    let reason = format!(
        "90th percentile {p90:.2} (needed ≤ 0.60), {n_danger} at 0.85 or above (needed none)"
    );
    Ok((status, Some(reason)))
}

/// Why ΔS has no scale on which it may gate.
fn scale_fault(observed: &Observed<'_>) -> Option<(Status, Option<String>)> {
    if let Some(reason) = observed.void {
        return Some((Status::NotCalibrated, Some(reason.to_owned())));
    }
    let Some(calibration) = observed.calibration else {
        let reason = "ΔS has not been calibrated for this encoder and index".to_owned();
        return Some((Status::NotCalibrated, Some(reason)));
    };
    for (fit, pairs) in [(&calibration.qe, "question and page"), (&calibration.tt, "page and page")]
    {
        match fit {
            FamilyFit::NotCalibrated { reason } => {
                return Some((Status::NotCalibrated, Some(format!("{pairs}: {reason}"))));
            }
            FamilyFit::Fitted(map) => {
                if let Some(reason) = unfit_in_words(map) {
                    let decides =
                        calibration.deciding().filter(|_| map.family == Family::QuestionEvidence);
                    if let Some(signal @ (Signal::Lexical | Signal::Joint)) = decides {
                        let reason = format!(
                            "the encoder is unfit to gate here, so ΔS only reports and {signal} decides: {reason}"
                        );
                        return Some((Status::Reported, Some(reason)));
                    }
                    let reason = format!(
                        "the encoder is unfit to gate here, so ΔS only reports: {pairs}: {reason}"
                    );
                    return Some((Status::Inconclusive, Some(reason)));
                }
            }
        }
    }
    None
}

/// Which conditions of fitness do not hold, with their numbers; none of a map that may gate.
#[must_use]
pub fn unfit_in_words(calibration: &Calibration) -> Option<String> {
    let Fitness::Unfit(reasons) = &calibration.fitness else { return None };
    let words: Vec<String> = reasons
        .iter()
        .map(|reason| match reason {
            Unfit::Auroc => format!("AUROC {:.2}, needed 0.90", calibration.auroc),
            Unfit::ShareBetween => {
                format!("{:.0}% undecided, limit 30%", 100.0 * calibration.share_between)
            }
            Unfit::FailNotBelowRandom => format!(
                "lost questions at {:.2} are no nearer than off-topic ones at {:.2}",
                calibration.t_fail, calibration.t_rand
            ),
        })
        .collect();
    Some(words.join("; "))
}

fn coverage(items: &[RetrievalItem]) -> Result<Gate, VerifyError> {
    // A gold item whose evidence cannot fit into k chunks says nothing about the retriever.
    let valid: Vec<f64> =
        items.iter().filter(|item| item.anchor_fits).filter_map(|item| item.coverage).collect();
    let n_pass = valid.iter().filter(|&&value| value >= MIN_COVERAGE).count();
    let mut measured = rate(n_pass, valid.len(), 0.95, "≥ 0.95")?;
    if measured.status == Status::Fail && measured.value.is_some_and(|value| value >= 0.90) {
        measured.status = Status::Review;
    }
    let n_left_out = items.len() - valid.len();
    if n_left_out > 0 {
        let note = format!("{n_left_out} left out: their evidence is larger than k chunks");
        measured.reason = Some(joined(measured.reason.take(), note));
    }
    Ok(Gate { name: "coverage", label: "questions with coverage ≥ 0.70", measured })
}

fn lambda(observed: &Observed<'_>) -> Result<Gate, VerifyError> {
    let items = observed.lambda;
    let count = |state| items.iter().filter(|item| item.live.state == Some(state)).count();
    let n_undecided = items.iter().filter(|item| item.live.state.is_none()).count();
    let (n_convergent, n_chaotic) = (count(LambdaState::Convergent), count(LambdaState::Chaotic));
    let mut measured = rate(n_convergent, items.len(), 0.90, "≥ 0.90")?;
    if !items.is_empty() {
        // Undecided items may turn out convergent: only what fails even then is a failure.
        let (best, _) = release(n_convergent + n_undecided, n_chaotic, items.len())?;
        let (worst, _) = release(n_convergent, n_chaotic, items.len())?;
        measured.status = match (worst, best) {
            (Release::Pass, _) => Status::Pass,
            (_, Release::Fail) => Status::Fail,
            (Release::Fail | Release::TooFew, Release::Pass | Release::TooFew) => {
                Status::Inconclusive
            }
        };
        measured.reason = lambda_reason(measured.status, items.len(), n_chaotic, n_undecided);
    }
    if !observed.seeded {
        // A failure over wordings alone is a failure; a pass would need the second axis.
        if measured.status == Status::Pass {
            measured.status = Status::Inconclusive;
        }
        let note = "greedy sampling makes seeds void; batch composition is not varied".to_owned();
        measured.reason = Some(joined(measured.reason.take(), note));
    }
    Ok(Gate { name: "lambda", label: "λ convergent, live", measured })
}

fn lambda_reason(
    status: Status,
    n_items: usize,
    n_chaotic: usize,
    n_undecided: usize,
) -> Option<String> {
    let mut parts = Vec::new();
    if n_chaotic > 0 {
        parts.push(format!("{n_chaotic} chaotic, needed none"));
    }
    if n_undecided > 0 {
        parts.push(format!("{n_undecided} undecided: no fit encoder to compare long answers"));
    }
    if n_items < MIN_RATE_ITEMS && status != Status::Fail {
        parts.push(format!("{n_items} items; a pass needs at least {MIN_RATE_ITEMS}"));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// No text that reached the user names a source that was not in its prompt (G-14, G-15).
fn citations_valid(observed: &Observed<'_>) -> Result<Gate, VerifyError> {
    let flags = observed
        .answers
        .iter()
        .map(|answer| answer.unknown_citation)
        .chain(observed.refusals.iter().map(|refusal| refusal.unknown_citation));
    let (n_all, n_bad) = flags.fold((0, 0), |(n, bad), flag| (n + 1, bad + usize::from(flag)));
    let mut measured = rate(n_all - n_bad, n_all, 1.0, "1.00")?;
    // True by construction, so one counterexample decides and none is no proof by sampling.
    if n_all > 0 {
        measured.status = if n_bad == 0 { Status::Pass } else { Status::Fail };
        measured.reason =
            (n_bad > 0).then(|| format!("{n_bad} answers name a source that was not retrieved"));
    }
    Ok(Gate { name: "citations_valid", label: "citations are retrieved snippets", measured })
}

fn citation_hit(answers: &[AnswerItem]) -> Result<Gate, VerifyError> {
    let n_hit = answers.iter().filter(|answer| answer.hit).count();
    let mut measured = rate(n_hit, answers.len(), 0.95, "≥ 0.95")?;
    let n_refused = answers.iter().filter(|answer| answer.refused).count();
    if n_refused > 0 {
        let note = format!("{n_refused} of {} answerable questions were refused", answers.len());
        measured.reason = Some(joined(measured.reason.take(), note));
    }
    Ok(Gate { name: "citation_hit", label: "answers cite the evidence", measured })
}

fn refusal(refusals: &[RefusalItem]) -> Result<Gate, VerifyError> {
    let n_refused = refusals.iter().filter(|item| item.refused).count();
    let measured = rate(n_refused, refusals.len(), 0.98, "≥ 0.98")?;
    Ok(Gate { name: "refusal", label: "unanswerable questions refused", measured })
}

/// A rate against a threshold. Below 50 questions it cannot pass, and fails only if its 95%
/// interval lies wholly below the threshold.
fn rate(n: usize, n_all: usize, least: f64, needed: &'static str) -> Result<Measured, VerifyError> {
    let mut measured = Measured {
        value: None,
        unit: Unit::Share,
        needed,
        n: n_all,
        interval: None,
        status: Status::NotAvailable,
        reason: Some("no question of this kind was asked".to_owned()),
    };
    if n_all == 0 {
        return Ok(measured);
    }
    let interval = wilson(n, n_all)?;
    let value = share(n, n_all);
    let enough = n_all >= MIN_RATE_ITEMS;
    let few = || Some(format!("{n_all} questions; a pass needs at least {MIN_RATE_ITEMS}"));
    (measured.status, measured.reason) = if value >= least && enough {
        (Status::Pass, None)
    } else if value < least && (enough || interval.high < least) {
        (Status::Fail, None)
    } else {
        (Status::Inconclusive, few())
    };
    measured.value = Some(value);
    measured.interval = Some(interval);
    Ok(measured)
}

/// Values that decide nothing but explain the gates.
pub(crate) fn reported(observed: &Observed<'_>) -> Result<Vec<Gate>, VerifyError> {
    let items = observed.retrieval;
    let of = |value: fn(&RetrievalItem) -> Option<f64>| items.iter().map(value);
    let mut raw =
        plain(("delta_s_raw", "ΔS raw, median", ""), Unit::RawDs, of(|i| i.raw_min), median)?;
    if observed.circular {
        let note =
            "circular: the index ranks by the same encoder, so it has already minimised this";
        raw.measured.reason = Some(note.to_owned());
    }
    let mut found = vec![
        raw,
        plain(
            ("delta_s_ra", "ΔS retrieved to anchor, median", "≤ 0.45"),
            Unit::CalibratedDs,
            of(|item| item.ra),
            median,
        )?,
        plain(
            ("decoy_margin", "decoy margin, median", "> 0.05"),
            Unit::CalibratedDs,
            of(|item| item.decoy_margin),
            median,
        )?,
        plain(
            ("coverage_mean", "coverage, mean", "≥ 0.70"),
            Unit::Share,
            of(|i| i.coverage),
            mean,
        )?,
        plain(("bleed", "bleed, mean", "≤ 0.10"), Unit::Share, of(|item| item.bleed), mean)?,
    ];
    found.extend(reported_answers(observed)?);
    Ok(found)
}

fn reported_answers(observed: &Observed<'_>) -> Result<Vec<Gate>, VerifyError> {
    let (answers, lambda) = (observed.answers, observed.lambda);
    let n_frozen = lambda.iter().filter(|item| converges(&item.frozen)).count();
    let n_same = lambda.iter().filter(|item| item.retrieve_convergent).count();
    let n_gold = lambda.iter().filter(|item| item.matches_gold).count();
    let n_cited: usize = answers.iter().map(|answer| answer.n_cited).sum();
    let n_right: usize = answers.iter().map(|answer| answer.n_cited_right).sum();
    let n_match = answers.iter().filter(|answer| answer.matches_gold).count();
    let released = answers.iter().filter(|answer| !answer.refused);
    Ok(vec![
        share_of(
            ("lambda_frozen", "λ convergent, frozen evidence", "≥ 0.90"),
            (n_frozen, lambda.len()),
        )?,
        share_of(
            ("lambda_matches_gold", "majority answer matches reference", ""),
            (n_gold, lambda.len()),
        )?,
        share_of(
            ("retrieve_convergent", "wordings retrieve the same", ""),
            (n_same, lambda.len()),
        )?,
        share_of(
            ("citation_precision", "cited snippets hold evidence", "≥ 0.90"),
            (n_right, n_cited),
        )?,
        plain(
            ("coverage_cited", "coverage by cited snippets, mean", ""),
            Unit::Share,
            answers.iter().map(|answer| answer.coverage_cited),
            mean,
        )?,
        share_of(("answer_match", "answers match the reference", ""), (n_match, answers.len()))?,
        plain(
            ("model_cited", "sentences the model cites itself", ""),
            Unit::Share,
            released.map(|answer| answer.model_cited_share),
            mean,
        )?,
    ])
}

fn converges(mode: &ModeLambda) -> bool {
    mode.state == Some(LambdaState::Convergent)
}

/// Shares of the probed items that converge live and frozen.
pub(crate) fn lambda_rates(items: &[ItemLambda]) -> Option<(f64, f64)> {
    let count = |mode: fn(&ItemLambda) -> &ModeLambda| {
        items.iter().filter(|item| converges(mode(item))).count()
    };
    let n = items.len();
    (n > 0).then(|| (share(count(|i| &i.live), n), share(count(|i| &i.frozen), n)))
}

fn plain(
    (name, label, needed): (&'static str, &'static str, &'static str),
    unit: Unit,
    values: impl Iterator<Item = Option<f64>>,
    statistic: fn(&[f64]) -> Result<f64, exrail_metrics::MetricsError>,
) -> Result<Gate, VerifyError> {
    let values: Vec<f64> = values.flatten().collect();
    let value = if values.is_empty() { None } else { Some(statistic(&values)?) };
    let (status, reason) = match value {
        Some(_) => (Status::Reported, None),
        None => (Status::NotAvailable, Some("no question has this value".to_owned())),
    };
    let measured =
        Measured { value, unit, needed, n: values.len(), interval: None, status, reason };
    Ok(Gate { name, label, measured })
}

fn share_of(
    (name, label, needed): (&'static str, &'static str, &'static str),
    (n, n_all): (usize, usize),
) -> Result<Gate, VerifyError> {
    let measured = rate(n, n_all, 0.0, needed)?;
    let status = if n_all == 0 { Status::NotAvailable } else { Status::Reported };
    let reason = if n_all == 0 { measured.reason.clone() } else { None };
    Ok(Gate { name, label, measured: Measured { status, reason, ..measured } })
}

/// Median of the values that exist.
pub(crate) fn median_of(
    values: impl Iterator<Item = Option<f64>>,
) -> Result<Option<f64>, VerifyError> {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() { Ok(None) } else { Ok(Some(median(&values)?)) }
}

/// Mean of the values that exist.
pub(crate) fn mean_of(
    values: impl Iterator<Item = Option<f64>>,
) -> Result<Option<f64>, VerifyError> {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() { Ok(None) } else { Ok(Some(mean(&values)?)) }
}

pub(crate) fn joined(first: Option<String>, second: String) -> String {
    match first {
        Some(first) => format!("{first}; {second}"),
        None => second,
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(crate) fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}
