//! The first page to open when a gate does not pass: the first match of a fixed order (§4).

use serde::Serialize;

use crate::report::{Gate, Status};

/// Where to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// The guardrail that stands behind the gate.
    pub guardrail: &'static str,
    /// Name of the documentation page.
    pub page: &'static str,
    /// Why this page.
    pub reason: &'static str,
    /// The number that led here.
    pub evidence: String,
    /// What to try, in order.
    pub steps: &'static [&'static str],
    /// How sure the choice is.
    pub confidence: Confidence,
}

/// How sure a fix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// The finding has one known cause.
    High,
    /// The finding has a usual cause.
    Medium,
    /// The finding has several causes; start here.
    Low,
}

/// What the choice of a fix looks at.
pub(crate) struct Findings<'a> {
    pub(crate) gates: &'a [Gate],
    pub(crate) calibration_void: bool,
    pub(crate) n_without_evidence: usize,
    pub(crate) flat_high: bool,
    pub(crate) decoy_margin: Option<f64>,
    /// Share of the probed items that converge live and frozen.
    pub(crate) lambda_rates: Option<(f64, f64)>,
}

impl Findings<'_> {
    fn status(&self, name: &str) -> Option<Status> {
        self.gates.iter().find(|gate| gate.name == name).map(|gate| gate.measured.status)
    }

    fn fails(&self, name: &str) -> bool {
        self.status(name) == Some(Status::Fail)
    }

    fn value(&self, name: &str) -> String {
        let gate = self.gates.iter().find(|gate| gate.name == name);
        match gate.and_then(|gate| Some((gate.label, gate.measured.value?))) {
            Some((label, value)) => format!("{label} {value:.2}"),
            None => format!("{name} has no value"),
        }
    }
}

/// The smallest fix, if any gate is closed by more than a lack of data.
pub(crate) fn fix_for(findings: &Findings<'_>) -> Option<Fix> {
    if findings.calibration_void {
        return Some(Fix {
            guardrail: "G-24",
            page: "embedding-vs-semantic",
            reason: "the stored calibration was made for another encoder or index",
            evidence: "fingerprints differ".to_owned(),
            steps: &["run the calibration again on this index", "verify again"],
            confidence: Confidence::High,
        });
    }
    if findings.n_without_evidence > 0 {
        return Some(Fix {
            guardrail: "G-06",
            page: "bootstrap-ordering",
            reason: "retrieval returned nothing for questions that the corpus answers",
            evidence: format!("{} questions without evidence", findings.n_without_evidence),
            steps: &["check that ingest finished before serving", "ask one of them by hand"],
            confidence: Confidence::High,
        });
    }
    retrieval_fix(findings).or_else(|| answer_fix(findings)).or_else(|| encoder_fix(findings))
}

fn retrieval_fix(findings: &Findings<'_>) -> Option<Fix> {
    if findings.flat_high {
        return Some(Fix {
            guardrail: "G-24",
            page: "retrieval-playbook",
            reason: "the nearest chunk is far at every k: suspect index, metric or normalisation",
            evidence: "ΔS at k = 20 is at least 0.60 and no lower than at k = 5".to_owned(),
            steps: &["compare the index's metric with the encoder's", "rebuild the index"],
            confidence: Confidence::Medium,
        });
    }
    let flat_boundary =
        findings.fails("delta_s") && findings.decoy_margin.is_some_and(|m| m <= 0.05);
    if findings.fails("coverage") || flat_boundary {
        let evidence = match findings.decoy_margin {
            Some(margin) => format!("{}, decoy margin {margin:.2}", findings.value("coverage")),
            None => findings.value("coverage"),
        };
        return Some(Fix {
            guardrail: "G-23",
            page: "chunking-checklist",
            reason: "the retrieved chunks do not hold the evidence",
            evidence,
            steps: &[
                "look at the items with coverage below 0.70 in the JSON report",
                "cut at headings, keep evidence in one chunk, ingest again",
                "raise k if the chunk is found just below it",
            ],
            confidence: Confidence::Medium,
        });
    }
    None
}

fn answer_fix(findings: &Findings<'_>) -> Option<Fix> {
    if findings.fails("lambda") {
        let (live, frozen) = findings.lambda_rates.unwrap_or((0.0, 0.0));
        let evidence = format!("convergent: live {live:.2}, frozen {frozen:.2}");
        return Some(if frozen >= 0.90 {
            Fix {
                guardrail: "G-14",
                page: "retrieval-traceability",
                reason: "answers agree on the same evidence, but wordings retrieve other evidence",
                evidence,
                steps: &["compare the snippet ids of the wordings", "retrieve by both indexes"],
                confidence: Confidence::High,
            }
        } else {
            Fix {
                guardrail: "G-20",
                page: "logic-collapse",
                reason: "answers differ even on the same evidence: the generator is unstable",
                evidence,
                steps: &["lower the temperature", "use a larger or less quantised model"],
                confidence: Confidence::Medium,
            }
        });
    }
    let unsupported =
        ["citations_valid", "citation_hit"].into_iter().find(|name| findings.fails(name));
    if let Some(name) = unsupported {
        return Some(Fix {
            guardrail: "G-15",
            page: "retrieval-traceability",
            reason: "answers do not rest on the evidence that holds the answer",
            evidence: findings.value(name),
            steps: &[
                "read the traces of the missed items: was the right snippet in the prompt?",
                "if it was, use a larger model",
            ],
            confidence: Confidence::Medium,
        });
    }
    findings.fails("refusal").then(|| Fix {
        guardrail: "G-15",
        page: "logic-collapse",
        reason: "questions that the corpus cannot answer are answered",
        evidence: findings.value("refusal"),
        steps: &[
            "raise the least share of a sentence's words that its source must hold",
            "use an encoder that separates the two kinds of questions, so that ΔS may gate",
        ],
        confidence: Confidence::Low,
    })
}

fn encoder_fix(findings: &Findings<'_>) -> Option<Fix> {
    if findings.fails("evidence_gate") {
        return Some(Fix {
            guardrail: "G-06",
            page: "delta-s-calibration",
            reason: "the gate is wrong too often on questions that it was not fitted on",
            evidence: findings.value("evidence_gate"),
            steps: &[
                "look at the three signals: `exrail calibrate --gold FILE --collection NAME`",
                "try another encoder, or a gold set whose unanswerable questions are such",
            ],
            confidence: Confidence::Medium,
        });
    }
    let closed = match findings.status("delta_s") {
        Some(Status::Fail | Status::NotCalibrated | Status::Inconclusive) => true,
        Some(Status::Pass | Status::Review | Status::NotAvailable | Status::Reported) | None => {
            false
        }
    };
    closed.then(|| Fix {
        guardrail: "G-24",
        page: "embedding-vs-semantic",
        reason: "ΔS of this encoder cannot gate on this corpus",
        evidence: findings.value("delta_s"),
        steps: &["calibrate on at least 50 questions of each kind", "try another encoder"],
        confidence: Confidence::Medium,
    })
}
