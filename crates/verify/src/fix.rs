//! The first page to open when a gate does not pass: the first match of a fixed order (§4).
//!
//! Symptoms overlap: a mixed index makes coverage fail, and a broken cache makes answers diverge. The order goes from
//! what makes all other numbers meaningless to what is left when nothing else explains it.

use serde::Serialize;

use crate::cache::CacheFault;
use crate::report::{Gate, Status};

/// Where to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// The guardrail that stands behind the gate.
    pub guardrail: &'static str,
    /// Where on the way from a question to its reply the fault is.
    pub stage: FixStage,
    /// Name of the documentation page.
    pub page: &'static str,
    /// Pages to read next.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub then: &'static [&'static str],
    /// Why this page.
    pub reason: &'static str,
    /// The number that led here.
    pub evidence: String,
    /// What to try, in order.
    pub steps: &'static [&'static str],
    /// How sure the choice is.
    pub confidence: Confidence,
}

/// Where a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FixStage {
    /// What was loaded, and when it was called ready.
    Boot,
    /// The weights and their rounding.
    Weights,
    /// The parts of a model on several devices.
    Shards,
    /// The KV cache.
    Cache,
    /// Documents, chunks and vectors.
    Index,
    /// From the question to its evidence.
    Retrieve,
    /// From the evidence to the prompt.
    Assemble,
    /// From the prompt to the answer.
    Reason,
    /// From the answer to who asked: shape, injection, leaks.
    Reply,
    /// No rule says where.
    Unknown,
}

impl FixStage {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FixStage::Boot => "boot",
            FixStage::Weights => "weights",
            FixStage::Shards => "shards",
            FixStage::Cache => "cache",
            FixStage::Index => "index",
            FixStage::Retrieve => "retrieve",
            FixStage::Assemble => "assemble",
            FixStage::Reason => "reason",
            FixStage::Reply => "reply",
            FixStage::Unknown => "unknown",
        }
    }
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

/// A fingerprint that is not the one that was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// Of the model and its manifest: what differs.
    Model(String),
    /// Of vectors and encoder: what differs.
    Encoder(String),
    /// Of chunks and the documents that they name: what differs.
    Document(String),
    /// Of chunks and tokenizer: what differs.
    Tokenizer(String),
}

/// What the choice of a fix looks at. What was not measured is absent, and chooses nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings<'a> {
    pub(crate) gates: &'a [Gate],
    pub(crate) mismatch: Option<Mismatch>,
    pub(crate) calibration_void: bool,
    /// What the engine built behind its warm-up fence, in words.
    pub(crate) not_ready: Option<String>,
    pub(crate) n_without_evidence: usize,
    /// What is wrong with ranks or slices, in words.
    pub(crate) shards: Option<String>,
    pub(crate) cache: Option<CacheFault>,
    /// Which matrices are not what they were made of, in words.
    pub(crate) weights: Option<String>,
    /// What came out of order on the way into the prompt, in words.
    pub(crate) reordered: Option<String>,
    /// What was lost on the way into the prompt, in words.
    pub(crate) cut: Option<String>,
    /// How many answers differ from themselves, in words.
    pub(crate) unrepeatable: Option<String>,
    /// Invalid replies, leaks or hijacks, in words.
    pub(crate) injected: Option<String>,
    pub(crate) flat_high: bool,
    pub(crate) decoy_margin: Option<f64>,
    /// Calibrated ΔS of the question, or the median.
    pub(crate) cal_min: Option<f64>,
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

    /// The first gate of a family that fails.
    fn failing(&self, prefix: &str) -> Option<&Gate> {
        let fails =
            |gate: &&Gate| gate.name.starts_with(prefix) && gate.measured.status == Status::Fail;
        self.gates.iter().find(fails)
    }

    fn value(&self, name: &str) -> String {
        match self.gates.iter().find(|gate| gate.name == name) {
            Some(gate) => value_of(gate),
            None => format!("{name} has no value"),
        }
    }
}

fn value_of(gate: &Gate) -> String {
    match gate.measured.value {
        Some(value) => format!("{} {value:.2}", gate.label),
        None => format!("{} has no value", gate.name),
    }
}

/// One row of the order.
type Row = fn(&Findings<'_>) -> Option<Fix>;

/// The order of §4, then what its rows leave open: C-38 wants a fix for every gate that fails.
const ORDER: [Row; 18] = [
    fingerprints,
    readiness,
    shards,
    weights,
    cache,
    assembly,
    repeats,
    injection,
    flat_high,
    chunking,
    wordings,
    generator,
    fidelity,
    citations,
    refusals,
    encoder,
    far,
    any,
];

/// The smallest fix, if any gate is closed by more than a lack of data, or the evidence is far.
pub(crate) fn fix_for(findings: &Findings<'_>) -> Option<Fix> {
    ORDER.iter().find_map(|row| row(findings))
}

fn fingerprints(findings: &Findings<'_>) -> Option<Fix> {
    let differ = |page, reason, evidence: &str, steps| Fix {
        guardrail: "G-09",
        stage: FixStage::Boot,
        page,
        then: &[],
        reason,
        evidence: evidence.to_owned(),
        steps,
        confidence: Confidence::High,
    };
    match &findings.mismatch {
        Some(Mismatch::Model(what)) => Some(differ(
            "predeploy-collapse",
            "the model is not the one that its manifest describes",
            what,
            &[
                "exrail preflight MODEL --manifest FILE names what differs",
                "load the declared files",
            ],
        )),
        Some(Mismatch::Encoder(what)) => Some(Fix {
            guardrail: "G-24",
            stage: FixStage::Index,
            ..differ(
                "embedding-vs-semantic",
                "vectors of the index are not those of this encoder",
                what,
                &["ingest again with this encoder into a new collection", "diagnose again"],
            )
        }),
        Some(Mismatch::Document(what)) => Some(Fix {
            guardrail: "G-07",
            stage: FixStage::Index,
            ..differ(
                "structural-lock",
                "chunks of the index do not say what their documents say",
                what,
                &["ingest the documents again into a new collection", "diagnose again"],
            )
        }),
        Some(Mismatch::Tokenizer(what)) => Some(Fix {
            guardrail: "G-23",
            stage: FixStage::Index,
            ..differ(
                "tokenizer-drift",
                "chunks were counted by another tokenizer than the encoder's",
                what,
                &["ingest again, so that chunks are cut anew", "diagnose again"],
            )
        }),
        None => findings.calibration_void.then(|| Fix {
            guardrail: "G-24",
            stage: FixStage::Retrieve,
            page: "embedding-vs-semantic",
            then: &["delta-s-calibration"],
            reason: "the stored calibration was made for another encoder or index",
            evidence: "fingerprints differ".to_owned(),
            steps: &["run the calibration again on this index", "verify again"],
            confidence: Confidence::High,
        }),
    }
}

fn readiness(findings: &Findings<'_>) -> Option<Fix> {
    if let Some(built) = &findings.not_ready {
        return Some(Fix {
            guardrail: "G-05",
            stage: FixStage::Boot,
            page: "bootstrap-ordering",
            then: &["warm-up-fence"],
            reason: "the engine was called ready before it was",
            evidence: built.clone(),
            steps: &["read the phases of exrail boot", "start it again on a machine at rest"],
            confidence: Confidence::Medium,
        });
    }
    (findings.n_without_evidence > 0).then(|| Fix {
        guardrail: "G-06",
        stage: FixStage::Index,
        page: "bootstrap-ordering",
        then: &[],
        reason: "retrieval returned nothing for questions that the corpus answers",
        evidence: format!("{} questions without evidence", findings.n_without_evidence),
        steps: &["check that ingest finished before serving", "ask one of them by hand"],
        confidence: Confidence::High,
    })
}

fn shards(findings: &Findings<'_>) -> Option<Fix> {
    findings.shards.as_ref().map(|what| Fix {
        guardrail: "G-27",
        stage: FixStage::Shards,
        page: "deployment-deadlock",
        then: &["shard-order"],
        reason: "the parts of the model do not make one model",
        evidence: what.clone(),
        steps: &["compare the rank cards", "pin devices by UUID and start the group again"],
        confidence: Confidence::High,
    })
}

fn cache(findings: &Findings<'_>) -> Option<Fix> {
    let (reason, steps, confidence): (_, &[&str], _) = match findings.cache? {
        CacheFault::KvIntegrity => (
            "the page books of the KV cache broke",
            &["run it again", "if it stays, report it with this output"],
            Confidence::High,
        ),
        CacheFault::CacheDrift => (
            "the live cache is not what a fresh prefill is",
            &["rotate below that many tokens", "use --kv f16", "report it with this output"],
            Confidence::High,
        ),
        CacheFault::ContextRange => (
            "the loss rises although the cache is right: the context is beyond the model's range",
            &["keep --max-context below that", "use a model that is trained for it"],
            Confidence::Medium,
        ),
        // Nothing can be told by these; they close the gate, and no page is to blame.
        CacheFault::Noise | CacheFault::LastCheckpoint => return None,
    };
    Some(Fix {
        guardrail: "G-17",
        stage: FixStage::Cache,
        page: "context-drift",
        then: &["entropy-collapse", "cache-oracle", "kv-cache-corruption"],
        reason,
        evidence: format!("{}, {}", findings.value("cache_oracle"), findings.value("cache_range")),
        steps,
        confidence,
    })
}

fn weights(findings: &Findings<'_>) -> Option<Fix> {
    findings.weights.as_ref().map(|what| Fix {
        guardrail: "G-09",
        stage: FixStage::Weights,
        page: "quantisation-drift",
        then: &["predeploy-collapse"],
        reason: "matrices are not those that they were made of: look at their scales and groups",
        evidence: what.clone(),
        steps: &[
            "exrail probe quant REFERENCE --against MODEL names the matrices that stand out",
            "quantise again, or load the file that was tested",
        ],
        confidence: Confidence::High,
    })
}

/// What the model reads is not what was put together for it.
fn assembly(findings: &Findings<'_>) -> Option<Fix> {
    let at_fault = |reason, what: &String, steps| Fix {
        guardrail: "G-12",
        stage: FixStage::Assemble,
        page: "prompt-lint",
        then: &[],
        reason,
        evidence: what.clone(),
        steps,
        confidence: Confidence::High,
    };
    let reordered = findings.reordered.as_ref().map(|what| {
        at_fault(
            "the template puts the parts of the prompt into another order",
            what,
            &["compare the template with its publisher's", "exrail preflight pins its hash"],
        )
    });
    reordered.or_else(|| {
        Some(at_fault(
            "evidence that was found does not reach the model",
            findings.cut.as_ref()?,
            &[
                "raise --max-context, or lower k or the tokens of an answer",
                "in a gateway: find out who cuts the prompt, and let it refuse instead",
            ],
        ))
    })
}

fn repeats(findings: &Findings<'_>) -> Option<Fix> {
    findings.unrepeatable.as_ref().map(|what| Fix {
        guardrail: "G-28",
        stage: FixStage::Reason,
        page: "batch-invariance",
        then: &["lambda-probe"],
        reason: "the same prompt with the same seed gives another answer",
        evidence: what.clone(),
        steps: &[
            "look whether the seed of a request reaches the sampler",
            "on a GPU: --batch-invariant",
        ],
        confidence: Confidence::High,
    })
}

fn injection(findings: &Findings<'_>) -> Option<Fix> {
    findings.injected.as_ref().map(|what| Fix {
        guardrail: "G-21",
        stage: FixStage::Reply,
        page: "prompt-injection",
        then: &["logic-collapse", "schema-lock"],
        reason: "a stranger's text or a broken shape gets through",
        evidence: what.clone(),
        steps: &[
            "exrail probe injection MODEL names the texts' classes",
            "hold the reply to its schema while tokens are drawn, not in the prompt alone",
        ],
        confidence: Confidence::High,
    })
}

fn flat_high(findings: &Findings<'_>) -> Option<Fix> {
    findings.flat_high.then(|| Fix {
        guardrail: "G-24",
        stage: FixStage::Index,
        page: "retrieval-playbook",
        then: &[],
        reason: "the nearest chunk is far at every k: suspect index, metric or normalisation",
        evidence: "ΔS at k = 20 is at least 0.60 and no lower than at k = 5".to_owned(),
        steps: &["compare the index's metric with the encoder's", "rebuild the index"],
        confidence: Confidence::Medium,
    })
}

fn chunking(findings: &Findings<'_>) -> Option<Fix> {
    let flat_boundary =
        findings.fails("delta_s") && findings.decoy_margin.is_some_and(|m| m <= 0.05);
    if !findings.fails("coverage") && !flat_boundary {
        return None;
    }
    let evidence = match findings.decoy_margin {
        Some(margin) => format!("{}, decoy margin {margin:.2}", findings.value("coverage")),
        None => findings.value("coverage"),
    };
    Some(Fix {
        guardrail: "G-23",
        stage: FixStage::Index,
        page: "chunking-checklist",
        then: &["coverage"],
        reason: "the retrieved chunks do not hold the evidence",
        evidence,
        steps: &[
            "look at the items with coverage below 0.70 in the JSON report",
            "cut at headings, keep evidence in one chunk, ingest again",
            "raise k if the chunk is found just below it",
        ],
        confidence: Confidence::Medium,
    })
}

/// What λ says, where it fails.
fn divergence(findings: &Findings<'_>) -> Option<(f64, String)> {
    let (live, frozen) = findings.fails("lambda").then_some(findings.lambda_rates)??;
    Some((frozen, format!("convergent: live {live:.2}, frozen {frozen:.2}")))
}

fn wordings(findings: &Findings<'_>) -> Option<Fix> {
    let (frozen, evidence) = divergence(findings)?;
    (frozen >= 0.90).then_some(Fix {
        guardrail: "G-14",
        stage: FixStage::Retrieve,
        page: "retrieval-traceability",
        then: &[],
        reason: "answers agree on the same evidence, but wordings retrieve other evidence",
        evidence,
        steps: &["compare the snippet ids of the wordings", "retrieve by both indexes"],
        confidence: Confidence::High,
    })
}

fn generator(findings: &Findings<'_>) -> Option<Fix> {
    let (_, evidence) = divergence(findings)?;
    Some(Fix {
        guardrail: "G-20",
        stage: FixStage::Reason,
        page: "logic-collapse",
        then: &["lambda-probe"],
        reason: "answers differ even on the same evidence: the generator is unstable",
        evidence,
        steps: &["lower the temperature", "use a larger or less quantised model"],
        confidence: Confidence::Medium,
    })
}

fn fidelity(findings: &Findings<'_>) -> Option<Fix> {
    findings.failing("quant_").map(|gate| Fix {
        guardrail: "G-26",
        stage: FixStage::Weights,
        page: "quantisation-drift",
        then: &[],
        reason: "rounding changes what the model predicts: requantise; no page of the guide applies, ours says how",
        evidence: value_of(gate),
        steps: &[
            "exrail probe quant names the matrices that rounding hurts most",
            "quantise again from 16 bits: exrail quantize with a calibration text, or int8",
        ],
        confidence: Confidence::High,
    })
}

fn citations(findings: &Findings<'_>) -> Option<Fix> {
    let name = ["citations_valid", "citation_hit"].into_iter().find(|name| findings.fails(name))?;
    Some(Fix {
        guardrail: "G-15",
        stage: FixStage::Reason,
        page: "retrieval-traceability",
        then: &["citations"],
        reason: "answers do not rest on the evidence that holds the answer",
        evidence: findings.value(name),
        steps: &[
            "read the traces of the missed items: was the right snippet in the prompt?",
            "if it was, use a larger model",
        ],
        confidence: Confidence::Medium,
    })
}

fn refusals(findings: &Findings<'_>) -> Option<Fix> {
    findings.fails("refusal").then(|| Fix {
        guardrail: "G-15",
        stage: FixStage::Reason,
        page: "logic-collapse",
        then: &["delta-s-calibration"],
        reason: "questions that the corpus cannot answer are answered",
        evidence: findings.value("refusal"),
        steps: &[
            "raise the least share of a sentence's words that its source must hold",
            "use an encoder that separates the two kinds of questions, so that ΔS may gate",
        ],
        confidence: Confidence::Low,
    })
}

fn encoder(findings: &Findings<'_>) -> Option<Fix> {
    if findings.fails("evidence_gate") {
        return Some(Fix {
            guardrail: "G-06",
            stage: FixStage::Retrieve,
            page: "embedding-vs-semantic",
            then: &["delta-s-calibration"],
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
        stage: FixStage::Retrieve,
        page: "embedding-vs-semantic",
        then: &["delta-s-calibration"],
        reason: "ΔS of this encoder cannot gate on this corpus",
        evidence: findings.value("delta_s"),
        steps: &["calibrate on at least 50 questions of each kind", "try another encoder"],
        confidence: Confidence::Medium,
    })
}

/// §4: there is a fix whenever the evidence is that far, whatever the gates say.
fn far(findings: &Findings<'_>) -> Option<Fix> {
    let cal_min = findings.cal_min.filter(|&cal_min| cal_min >= 0.60)?;
    Some(Fix {
        guardrail: "G-06",
        stage: FixStage::Retrieve,
        page: "retrieval-playbook",
        then: &["delta-s"],
        reason: "the nearest snippet is as far as those of questions that the corpus cannot answer",
        evidence: format!("calibrated ΔS {cal_min:.2}"),
        steps: &["ask whether the corpus holds the answer at all", "ingest what does"],
        confidence: Confidence::Low,
    })
}

fn any(findings: &Findings<'_>) -> Option<Fix> {
    findings.failing("").map(|gate| Fix {
        guardrail: "G-26",
        stage: FixStage::Unknown,
        page: "regression-gate",
        then: &[],
        reason: "a gate fails that no rule of the order explains",
        evidence: value_of(gate),
        steps: &[
            "read the gate's reason in the report",
            "measure that part by itself: exrail probe",
        ],
        confidence: Confidence::Low,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Measured, Unit};

    fn failing(name: &'static str) -> Gate {
        let measured = Measured {
            value: Some(0.5),
            unit: Unit::Share,
            needed: "",
            n: 60,
            interval: None,
            status: Status::Fail,
            reason: None,
        };
        Gate { name, label: name, measured }
    }

    /// Takes the fault of a row away.
    type Cure = fn(&mut Findings<'_>, &mut Vec<&'static str>);

    /// Every fault at once, cured one by one: each time the first that is left is named.
    #[test]
    fn of_several_faults_the_earlier_one_wins() {
        let rows: [(&str, Cure); 21] = [
            ("predeploy-collapse", |f, _| f.mismatch = Some(Mismatch::Encoder("v".to_owned()))),
            ("embedding-vs-semantic", |f, _| f.mismatch = Some(Mismatch::Document("d".to_owned()))),
            ("structural-lock", |f, _| f.mismatch = Some(Mismatch::Tokenizer("t".to_owned()))),
            ("tokenizer-drift", |f, _| f.mismatch = None),
            ("embedding-vs-semantic", |f, _| f.calibration_void = false),
            ("bootstrap-ordering", |f, _| (f.not_ready, f.n_without_evidence) = (None, 0)),
            ("deployment-deadlock", |f, _| f.shards = None),
            ("quantisation-drift", |f, _| f.weights = None),
            ("context-drift", |f, _| f.cache = None),
            ("prompt-lint", |f, _| f.reordered = None),
            ("prompt-lint", |f, _| f.cut = None),
            ("batch-invariance", |f, _| f.unrepeatable = None),
            ("prompt-injection", |f, _| f.injected = None),
            ("retrieval-playbook", |f, _| f.flat_high = false),
            ("chunking-checklist", |f, gates| {
                f.decoy_margin = None;
                gates.retain(|name| *name != "coverage");
            }),
            ("retrieval-traceability", |f, _| f.lambda_rates = Some((0.5, 0.5))),
            ("logic-collapse", |_, gates| gates.retain(|name| *name != "lambda")),
            ("quantisation-drift", |_, gates| gates.retain(|name| !name.starts_with("quant_"))),
            ("retrieval-traceability", |_, gates| gates.retain(|name| *name != "citation_hit")),
            ("logic-collapse", |_, gates| gates.retain(|name| *name != "refusal")),
            ("embedding-vs-semantic", |_, gates| gates.retain(|name| *name != "delta_s")),
        ];
        let mut names = vec![
            "delta_s",
            "coverage",
            "lambda",
            "citation_hit",
            "refusal",
            "quant_int4_kld_mean",
            "odd",
        ];
        let mut findings = Findings {
            gates: &[],
            mismatch: Some(Mismatch::Model("weights".to_owned())),
            calibration_void: true,
            not_ready: Some("graph_captures 1".to_owned()),
            n_without_evidence: 3,
            shards: Some("rank 1 twice".to_owned()),
            cache: Some(CacheFault::CacheDrift),
            weights: Some("blk.0.attn_q.weight".to_owned()),
            reordered: Some("2 of 3 prompts".to_owned()),
            cut: Some("1 of 3 prompts".to_owned()),
            unrepeatable: Some("1 of 3 answers".to_owned()),
            injected: Some("1 leak".to_owned()),
            flat_high: true,
            decoy_margin: Some(0.01),
            cal_min: Some(0.7),
            lambda_rates: Some((0.5, 0.95)),
        };
        for (page, cure) in rows {
            let gates: Vec<Gate> = names.iter().map(|name| failing(name)).collect();
            let fix = fix_for(&Findings { gates: &gates, ..findings.clone() }).unwrap();
            assert_eq!(fix.page, page, "{fix:?}");
            cure(&mut findings, &mut names);
        }
        let gates = [failing("odd")];
        let left = Findings { gates: &gates, ..findings.clone() };
        assert_eq!(fix_for(&left).unwrap().page, "retrieval-playbook", "far evidence has a fix");
        let left = Findings { cal_min: Some(0.59), ..left };
        assert_eq!(
            fix_for(&left).unwrap().page,
            "regression-gate",
            "C-38: any failing gate has one"
        );
        assert_eq!(fix_for(&Findings::default()), None);
    }

    #[test]
    fn missing_evidence_alone_is_a_matter_of_the_boot() {
        let findings = Findings { n_without_evidence: 1, ..Findings::default() };
        assert_eq!(fix_for(&findings).unwrap().evidence, "1 questions without evidence");
    }

    #[test]
    fn the_fix_for_rounding_says_that_the_guide_has_none() {
        let gates = [failing("quant_int8_top1")];
        let fix = fix_for(&Findings { gates: &gates, ..Findings::default() }).unwrap();
        assert!(fix.reason.contains("no page of the guide applies"), "{}", fix.reason);
    }

    #[test]
    fn what_a_cache_probe_cannot_tell_is_no_fault_of_the_cache() {
        for fault in [CacheFault::Noise, CacheFault::LastCheckpoint] {
            let findings = Findings { cache: Some(fault), ..Findings::default() };
            assert_eq!(fix_for(&findings), None);
        }
    }
}
