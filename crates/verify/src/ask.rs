//! From a question to an answer with citations, or to the exact refusal with its reason.
//!
//! [`begin`] decides before the generator runs, [`conclude`] after it; both are pure, and the
//! server calls them around its own generation. [`ask`] is the same way for synchronous callers.

use std::sync::Arc;

use exrail_metrics::{Band, Calibration, Ds, Fitness, SetDs, UndefinedDs, Unfit, set_ds};
use exrail_retrieval::{Hit, SearchOptions};
use exrail_wire::PromptRecord;
use serde::{Deserialize, Serialize};

use crate::answer::{CitationSource, ParsedAnswer, Segment, UnknownCitation, parse_answer};
use crate::attribution::{attribute, containment};
use crate::calibrate::Signal;
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::leak::LeakGuard;
use crate::prompt::{Live, Nonce, PromptFrame, REFUSAL_TOKEN};
use crate::rules::{Contradiction, RuleSet};
use crate::steps::{
    LOGIC_COLLAPSE, Step, StepCheck, StepFault, StepPolicy, Walked, ask_for, told, walk,
};
use crate::system::{Generate, GenerateError, Generated, GeneratedEnd, Retrieve};

/// How a question is answered.
#[derive(Clone, Debug, PartialEq)]
pub struct AskPolicy {
    /// How many snippets are retrieved, and by which index.
    pub search: SearchOptions,
    /// Least share of a sentence's content words that a snippet must hold to be attributed to it.
    pub min_containment: f64,
    /// The same for a snippet that the model named itself: its label adds evidence of its own.
    pub min_label_containment: f64,
    /// Least share of the sentences that must have a valid citation for the answer to leave.
    pub min_cited_share: f64,
    /// Whether replies are checked for citations.
    pub check: AnswerCheck,
    /// Whether replies are kept from repeating the system message.
    pub leak: LeakCheck,
    /// The hard rules of the request, if it has any (G-31).
    pub rules: Option<Arc<RuleSet>>,
    /// Whether replies are kept from contradicting them.
    pub constraints: ConstraintCheck,
    /// How an answer is made step by step; none: it is one reply (G-20).
    pub steps: Option<StepPolicy>,
}

impl Default for AskPolicy {
    fn default() -> AskPolicy {
        AskPolicy {
            search: SearchOptions::default(),
            // These are our priors, not measured: see the guardrail specification, mark [N].
            min_containment: 0.6,
            min_label_containment: 0.4,
            min_cited_share: 0.5,
            check: AnswerCheck::Enforce,
            leak: LeakCheck::Enforce,
            rules: None,
            constraints: ConstraintCheck::Enforce,
            steps: None,
        }
    }
}

/// Whether the citation guard of G-15 is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerCheck {
    /// An answer without valid citations is refused.
    Enforce,
    /// The guard is off. For mutation tests, which show what it holds back.
    Off,
}

/// Whether the leak guard of G-21 is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeakCheck {
    /// A reply that repeats a stretch of the system message is refused.
    Enforce,
    /// The guard is off. For mutation tests, which show what it holds back.
    Off,
}

/// Whether the constraint lock of G-31 is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConstraintCheck {
    /// An answer that matches what a hard rule forbids is refused.
    Enforce,
    /// The guard is off. For mutation tests, which show what it holds back.
    Off,
}

/// The ΔS gate of live traffic: `ds_qr` on the calibrated scale, where there is one.
#[derive(Clone, Debug, PartialEq)]
pub enum DeltaSGate {
    /// The encoder is fit: ΔS may refuse.
    Calibrated(Calibration),
    /// The encoder does not separate answerable from unanswerable questions here; ΔS is reported
    /// and refuses nothing.
    ReportOnly(Calibration),
    /// There is no valid calibration; ΔS is raw and refuses nothing.
    NotCalibrated,
}

impl DeltaSGate {
    /// The gate that a calibration allows.
    #[must_use]
    pub fn from_calibration(calibration: Option<&Calibration>) -> DeltaSGate {
        match calibration {
            None => DeltaSGate::NotCalibrated,
            Some(calibration) if calibration.is_fit() => {
                DeltaSGate::Calibrated(calibration.clone())
            }
            Some(calibration) => DeltaSGate::ReportOnly(calibration.clone()),
        }
    }

    /// Reads the gate for the evidence of a question.
    #[must_use]
    pub fn read(&self, evidence: SetDs) -> GateReading {
        let (raw_min, raw_mean) = match evidence {
            SetDs::NoEvidence => return GateReading::NoEvidence,
            SetDs::Undefined(reason) => return GateReading::Undefined { reason },
            SetDs::Values { min, mean, .. } => (min, mean),
        };
        match self {
            DeltaSGate::Calibrated(calibration) => {
                let (cal_min, cal_mean) = (calibration.map(raw_min), calibration.map(raw_mean));
                GateReading::Calibrated { raw_min, cal_min, cal_mean, band: Band::of(cal_min) }
            }
            DeltaSGate::ReportOnly(calibration) => {
                let reasons = match &calibration.fitness {
                    Fitness::Fit => Vec::new(),
                    Fitness::Unfit(reasons) => reasons.clone(),
                };
                let (cal_min, cal_mean) = (calibration.map(raw_min), calibration.map(raw_mean));
                GateReading::EncoderUnfit { raw_min, cal_min, cal_mean, reasons }
            }
            DeltaSGate::NotCalibrated => GateReading::NotCalibrated { raw_min, raw_mean },
        }
    }
}

/// What the ΔS gate reads for one question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum GateReading {
    /// A calibrated value that gates.
    #[serde(rename = "ok")]
    Calibrated {
        /// Raw ΔS of the nearest snippet.
        raw_min: f64,
        /// The same, calibrated.
        cal_min: f64,
        /// Token-weighted mean over the snippets, calibrated.
        cal_mean: f64,
        /// Band of `cal_min`.
        band: Band,
    },
    /// A calibrated value that only reports.
    EncoderUnfit {
        /// Raw ΔS of the nearest snippet.
        raw_min: f64,
        /// The same, calibrated.
        cal_min: f64,
        /// Token-weighted mean over the snippets, calibrated.
        cal_mean: f64,
        /// Which conditions of fitness do not hold.
        reasons: Vec<Unfit>,
    },
    /// A raw value without a scale.
    NotCalibrated {
        /// Raw ΔS of the nearest snippet.
        raw_min: f64,
        /// Token-weighted mean over the snippets, raw.
        raw_mean: f64,
    },
    /// Nothing was retrieved.
    NoEvidence,
    /// A snippet's ΔS has no value.
    Undefined {
        /// Why.
        reason: UndefinedDs,
    },
}

impl GateReading {
    /// Raw ΔS of the nearest snippet, if there is one.
    #[must_use]
    pub fn raw_min(&self) -> Option<f64> {
        match self {
            GateReading::Calibrated { raw_min, .. }
            | GateReading::EncoderUnfit { raw_min, .. }
            | GateReading::NotCalibrated { raw_min, .. } => Some(*raw_min),
            GateReading::NoEvidence | GateReading::Undefined { .. } => None,
        }
    }

    /// Calibrated ΔS of the nearest snippet, whether or not it may gate.
    #[must_use]
    pub fn cal_min(&self) -> Option<f64> {
        match self {
            GateReading::Calibrated { cal_min, .. } | GateReading::EncoderUnfit { cal_min, .. } => {
                Some(*cal_min)
            }
            GateReading::NotCalibrated { .. }
            | GateReading::NoEvidence
            | GateReading::Undefined { .. } => None,
        }
    }

    /// Why this reading refuses the question, if it does.
    pub(crate) fn refusal(&self) -> Option<RefusalReason> {
        match self {
            GateReading::Calibrated { cal_min, band, .. } => match band {
                Band::Stable | Band::PassEdge | Band::Review => None,
                Band::Fail | Band::Danger => Some(RefusalReason::DeltaS { cal_min: *cal_min }),
            },
            GateReading::EncoderUnfit { .. } | GateReading::NotCalibrated { .. } => None,
            GateReading::NoEvidence => Some(RefusalReason::NoEvidence),
            GateReading::Undefined { reason } => {
                Some(RefusalReason::DeltaSUndefined { reason: *reason })
            }
        }
    }
}

/// Why a question got the refusal token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum RefusalReason {
    /// Nothing was retrieved.
    NoEvidence,
    /// The nearest snippet is too far from the question.
    DeltaS {
        /// Calibrated ΔS; the gate closes at 0.60.
        cal_min: f64,
    },
    /// The signal that decides in place of ΔS finds too little of the question in the snippets.
    WeakEvidence {
        /// The signal.
        signal: Signal,
        /// Its calibrated value; the gate closes at 0.60.
        cal: f64,
    },
    /// The signal that decides has no word of the question to look for, so the gate fails closed.
    NoContentWords,
    /// ΔS has no value, so the gate fails closed.
    DeltaSUndefined {
        /// Why.
        reason: UndefinedDs,
    },
    /// A snippet holds the fence mark of this request.
    FenceBroken {
        /// The snippet.
        snippet_id: String,
    },
    /// The reply repeats the system message.
    Leak,
    /// The model wrote the refusal token itself.
    Model,
    /// The reply has no sentence.
    EmptyReply,
    /// The reply cites what was not retrieved.
    UnknownCitation {
        /// The invented labels.
        labels: Vec<UnknownCitation>,
    },
    /// Too few sentences have a snippet that supports them.
    NoValidCitation {
        /// Share of the sentences that have one.
        cited_share: f64,
    },
    /// The answer matches what a hard rule of the request forbids.
    ConstraintContradiction {
        /// The rule, from 0.
        rule: usize,
        /// The pattern among those of the rule, from 0.
        pattern: usize,
    },
    /// A step of the answer does not stand, as often as it was drawn (G-20).
    LogicCollapse {
        /// Its place, from 1.
        step: usize,
        /// What is wrong with it.
        fault: StepFault,
        /// How often the answer went back before.
        rollbacks: usize,
        /// The content words of the question that no snippet holds.
        missing: Vec<String>,
    },
}

impl RefusalReason {
    /// The guard that refused, for traces and counters.
    #[must_use]
    pub fn guard(&self) -> &'static str {
        match self {
            RefusalReason::NoEvidence => "no_evidence",
            RefusalReason::DeltaS { .. } | RefusalReason::DeltaSUndefined { .. } => "delta_s",
            RefusalReason::WeakEvidence { signal: Signal::Joint, .. } => "joint_evidence",
            RefusalReason::WeakEvidence { .. } | RefusalReason::NoContentWords => {
                "lexical_evidence"
            }
            RefusalReason::FenceBroken { .. } => "fence",
            RefusalReason::Leak => "leak",
            RefusalReason::Model => "model_refusal",
            RefusalReason::EmptyReply => "empty_reply",
            RefusalReason::UnknownCitation { .. } | RefusalReason::NoValidCitation { .. } => {
                "citations"
            }
            RefusalReason::ConstraintContradiction { .. } => "constraint_contradiction",
            RefusalReason::LogicCollapse { .. } => LOGIC_COLLAPSE,
        }
    }

    /// The reason in words, for a person.
    #[must_use]
    pub fn in_words(&self) -> String {
        match self {
            RefusalReason::NoEvidence => "nothing was retrieved for the question".to_owned(),
            RefusalReason::DeltaS { cal_min } => {
                format!("the nearest snippet is too far: ΔS {cal_min:.2}, needed below 0.60")
            }
            RefusalReason::WeakEvidence { signal, cal } => {
                let of = match signal {
                    Signal::Encoder => "ΔS",
                    Signal::Lexical => "the question's words",
                    Signal::Joint => "ΔS and the question's words",
                };
                format!("no snippet holds enough of the question: {of} {cal:.2}, needed below 0.60")
            }
            RefusalReason::NoContentWords => {
                "the question has no word to look for in a snippet".to_owned()
            }
            RefusalReason::DeltaSUndefined { reason } => format!("ΔS is undefined: {reason}"),
            RefusalReason::FenceBroken { snippet_id } => {
                format!("snippet {snippet_id} holds the fence mark of this request")
            }
            RefusalReason::Leak => "the reply repeats the system message".to_owned(),
            RefusalReason::Model => "the model found no answer in the sources".to_owned(),
            RefusalReason::EmptyReply => "the model wrote nothing".to_owned(),
            RefusalReason::UnknownCitation { labels } => {
                let labels: Vec<&str> = labels.iter().map(|l| l.label.as_str()).collect();
                format!("the reply cites sources that it was not given: {}", labels.join(", "))
            }
            RefusalReason::NoValidCitation { cited_share } => format!(
                "only {:.0}% of the reply's sentences are supported by a source",
                100.0 * cited_share
            ),
            RefusalReason::ConstraintContradiction { rule, pattern } => {
                format!("the answer contradicts constraints[{rule}]: it matches forbid[{pattern}]")
            }
            RefusalReason::LogicCollapse { step, fault, rollbacks, missing } => {
                let (wrong, ask_for) = (fault.in_words(), ask_for(*fault, missing));
                format!("step {step}: {wrong}, after {rollbacks} rollbacks; {ask_for}")
            }
        }
    }
}

/// What a question got.
#[derive(Clone, Debug)]
pub struct AskOutcome {
    /// What the user sees: the answer without labels, or the refusal token.
    pub text: String,
    /// Why it is the refusal token, if it is.
    pub refusal: Option<RefusalReason>,
    /// The sentences of `text` with their snippets; none for a refusal.
    pub segments: Vec<Segment>,
    /// The snippets that entered the prompt, best first.
    pub evidence: Vec<Hit>,
    /// What the ΔS gate read.
    pub gate: GateReading,
    /// The reply as generated; none if the generator did not run.
    pub reply: Option<Generated>,
    /// [`PromptFrame::record`]; none if no prompt was built.
    pub prompt: Option<PromptRecord>,
    /// Every step that was drawn, in order; none of an answer that is one reply.
    pub steps: Vec<Step>,
}

impl AskOutcome {
    /// Ids of the cited snippets in order of first citation.
    #[must_use]
    pub fn cited_ids(&self) -> Vec<&str> {
        let mut ids: Vec<&str> = Vec::new();
        for id in self.segments.iter().flat_map(|segment| &segment.snippet_ids) {
            if !ids.contains(&id.as_str()) {
                ids.push(id);
            }
        }
        ids
    }

    /// Share of the sentences whose snippets the model named itself; none for a refusal.
    #[must_use]
    pub fn model_cited_share(&self) -> Option<f64> {
        let by_model = |s: &Segment| s.citation_source == Some(CitationSource::Model);
        share(self.segments.iter().filter(|segment| by_model(segment)).count(), self.segments.len())
    }

    /// Share of the sentences with a snippet; none for a refusal.
    #[must_use]
    pub fn cited_share(&self) -> Option<f64> {
        let is_cited = |segment: &&Segment| !segment.snippet_ids.is_empty();
        share(self.segments.iter().filter(is_cited).count(), self.segments.len())
    }
}

/// The state of a question before the generator runs.
#[derive(Debug)]
pub enum Begun {
    /// The generator must not run.
    Refused(Box<AskOutcome>),
    /// The generator answers this prompt; pass its reply to [`conclude`].
    Prompt {
        /// The prompt.
        frame: PromptFrame,
        /// What the ΔS gate read.
        gate: GateReading,
    },
}

/// ΔS of a question and its hits, by the cosine that the index computed.
#[must_use]
pub fn evidence_ds(hits: &[Hit]) -> SetDs {
    let chunk_ds = |hit: &Hit| {
        let raw = 1.0 - f64::from(hit.cosine);
        let value = if raw.is_finite() {
            Ds::Value(raw.clamp(0.0, 2.0))
        } else {
            Ds::Undefined(UndefinedDs::NotFinite)
        };
        (value, hit.chunk.tokens)
    };
    set_ds(&hits.iter().map(chunk_ds).collect::<Vec<_>>())
}

/// Decides whether the generator may answer the question over `hits`, and builds its prompt.
#[must_use]
pub fn begin(
    question: &str,
    hits: &[Hit],
    gate: &EvidenceGate,
    (rules, nonce): (Option<&RuleSet>, &Nonce),
) -> Begun {
    let (gate, refusal) = gate.read(question, hits);
    if let Some(reason) = refusal {
        return Begun::Refused(Box::new(refused(reason, hits, gate, None)));
    }
    match PromptFrame::with_rules(question, Live::new(hits), nonce, rules) {
        Ok(frame) => Begun::Prompt { frame, gate },
        Err(broken) => {
            let reason = RefusalReason::FenceBroken { snippet_id: broken.snippet_id };
            Begun::Refused(Box::new(refused(reason, hits, gate, None)))
        }
    }
}

/// Turns a reply into what the user sees. `hits` are those that [`begin`] was given.
#[must_use]
pub fn conclude(
    frame: &PromptFrame,
    hits: &[Hit],
    gate: GateReading,
    reply: Generated,
    policy: &AskPolicy,
) -> AskOutcome {
    let mut parsed = parse_answer(&frame.without_fence(&reply.text), frame.live());
    drop_cut_sentence(&mut parsed, reply.end);
    if policy.check == AnswerCheck::Enforce {
        drop_unsupported_labels(&mut parsed, frame.live(), policy.min_label_containment);
    }
    attribute_uncited(&mut parsed, frame.live(), policy.min_containment);
    let refusal = match policy.check {
        AnswerCheck::Enforce => refusal_of(&parsed, policy),
        AnswerCheck::Off => None,
    };
    let text = match policy.check {
        AnswerCheck::Enforce => parsed.text,
        AnswerCheck::Off => reply.text.clone(),
    };
    let refusal = refusal.or_else(|| contradiction(&text, policy));
    let prompt = Some(frame.record());
    match refusal {
        Some(reason) => {
            let outcome = refused(reason, hits, gate, Some(reply));
            AskOutcome { prompt, ..outcome }
        }
        None => AskOutcome {
            text,
            refusal: None,
            segments: parsed.segments,
            evidence: hits.to_vec(),
            gate,
            reply: Some(reply),
            prompt,
            steps: Vec::new(),
        },
    }
}

/// Turns the steps that stand into what the user sees. Each of them was judged when it was drawn.
fn conclude_steps(
    frame: &PromptFrame,
    hits: &[Hit],
    gate: GateReading,
    walked: Walked,
) -> AskOutcome {
    let Walked { steps, reply, refusal } = walked;
    let prompt = Some(frame.record());
    if let Some(reason) = refusal {
        return AskOutcome { prompt, steps, ..refused(reason, hits, gate, Some(reply)) };
    }
    let (text, segments) = told(&steps);
    let evidence = hits.to_vec();
    AskOutcome { text, refusal, segments, evidence, gate, reply: Some(reply), prompt, steps }
}

/// What of the text that the user would see contradicts a hard rule.
fn contradiction(text: &str, policy: &AskPolicy) -> Option<RefusalReason> {
    let rules = match policy.constraints {
        ConstraintCheck::Enforce => policy.rules.as_ref()?,
        ConstraintCheck::Off => return None,
    };
    let Contradiction { rule, pattern } = rules.contradiction(text)?;
    Some(RefusalReason::ConstraintContradiction { rule, pattern })
}

fn refused(
    reason: RefusalReason,
    hits: &[Hit],
    gate: GateReading,
    reply: Option<Generated>,
) -> AskOutcome {
    AskOutcome {
        text: REFUSAL_TOKEN.to_owned(),
        refusal: Some(reason),
        segments: Vec::new(),
        evidence: hits.to_vec(),
        gate,
        reply,
        prompt: None,
        steps: Vec::new(),
    }
}

/// Whether the token budget cut the last sentence of a text.
pub(crate) fn is_cut(text: &str, end: GeneratedEnd) -> bool {
    match end {
        GeneratedEnd::Length => !text.ends_with(['.', '!', '?']),
        GeneratedEnd::Closed => true,
        GeneratedEnd::Stop | GeneratedEnd::Looped => false,
    }
}

/// A last sentence that the token budget cut says something else than the model meant; it goes,
/// unless it is all there is.
fn drop_cut_sentence(parsed: &mut ParsedAnswer, end: GeneratedEnd) {
    if is_cut(&parsed.text, end) && parsed.segments.len() > 1 {
        parsed.segments.pop();
        if let Some(last) = parsed.segments.last() {
            parsed.text.truncate(last.text_span.end);
        }
    }
}

/// A label is a claim of the model. It stays only on a snippet that holds the sentence's numbers and
/// enough of its words; otherwise the sentence counts as uncited.
pub(crate) fn drop_unsupported_labels(
    parsed: &mut ParsedAnswer,
    live: &Live,
    min_containment: f64,
) {
    for segment in &mut parsed.segments {
        let sentence = &parsed.text[segment.text_span.clone()];
        let holds = |id: &String| {
            let chunk = live.iter().find(|chunk| chunk.snippet_id == *id);
            chunk.is_some_and(|chunk| containment(sentence, &chunk.text) >= min_containment)
        };
        segment.snippet_ids.retain(holds);
        let of = |id: &str| live.iter().find(|chunk| chunk.snippet_id == id);
        let chunk = segment.snippet_ids.first().and_then(|id| of(id));
        // A segment rests on one section, that of its first snippet (G-15).
        let section = chunk.map(|chunk| chunk.section_id.as_str());
        let same = |id: &String| of(id).map(|chunk| chunk.section_id.as_str()) == section;
        segment.snippet_ids.retain(same);
        segment.section_id = chunk.map(|chunk| chunk.section_id.clone());
        segment.citation_source = chunk.map(|_| CitationSource::Model);
    }
}

pub(crate) fn attribute_uncited(parsed: &mut ParsedAnswer, live: &Live, min_containment: f64) {
    for segment in parsed.segments.iter_mut().filter(|segment| segment.snippet_ids.is_empty()) {
        let sentence = &parsed.text[segment.text_span.clone()];
        if let Some(found) = attribute(sentence, live, min_containment) {
            segment.section_id = Some(found.section_id);
            segment.snippet_ids = vec![found.snippet_id];
            segment.citation_source = Some(CitationSource::Attributed);
        }
    }
}

fn refusal_of(parsed: &ParsedAnswer, policy: &AskPolicy) -> Option<RefusalReason> {
    if parsed.refusal {
        return Some(RefusalReason::Model);
    }
    if !parsed.unknown_citations.is_empty() {
        return Some(RefusalReason::UnknownCitation { labels: parsed.unknown_citations.clone() });
    }
    let n_cited = parsed.segments.iter().filter(|segment| !segment.snippet_ids.is_empty()).count();
    match share(n_cited, parsed.segments.len()) {
        None => Some(RefusalReason::EmptyReply),
        Some(cited_share) if n_cited == 0 || cited_share < policy.min_cited_share => {
            Some(RefusalReason::NoValidCitation { cited_share })
        }
        Some(_) => None,
    }
}

/// Retrieves the evidence for a question under a policy.
///
/// # Errors
/// The index failed.
pub fn retrieve(
    system: &dyn Retrieve,
    question: &str,
    policy: &AskPolicy,
) -> Result<Vec<Hit>, VerifyError> {
    Ok(system.search(question, &policy.search)?)
}

/// Answers a question over given evidence. Snippets leave from the lower end of the ranking until
/// the prompt fits; the outcome's evidence is what stayed.
///
/// # Errors
/// The generator failed, or even one snippet does not fit.
pub fn answer_over(
    system: &dyn Generate,
    question: &str,
    hits: &[Hit],
    gate: &EvidenceGate,
    call: (&AskPolicy, &Nonce, u64),
) -> Result<AskOutcome, GenerateError> {
    let (policy, nonce, seed) = call;
    match fit(system, (question, hits), gate, (policy, nonce))? {
        Fitted::Refused(outcome) => Ok(*outcome),
        Fitted::Prompt(prompt) => reply_to(system, &prompt, (policy, seed)),
    }
}

/// One question of several.
#[derive(Clone, Copy)]
pub(crate) struct OneOf<'a> {
    pub(crate) question: &'a str,
    /// What was found for it.
    pub(crate) hits: &'a [Hit],
    pub(crate) nonce: &'a Nonce,
    pub(crate) seed: u64,
}

/// Answers several questions, each over its evidence and with its seed, as [`answer_over`] would one after the other; the
/// generator may compute them together. An answer that is made step by step is made alone.
pub(crate) fn answer_all(
    system: &dyn Generate,
    questions: &[OneOf<'_>],
    gate: &EvidenceGate,
    policy: &AskPolicy,
) -> Vec<Result<AskOutcome, GenerateError>> {
    if policy.steps.is_some() {
        let alone = |of: &OneOf<'_>| {
            answer_over(system, of.question, of.hits, gate, (policy, of.nonce, of.seed))
        };
        return questions.iter().map(alone).collect();
    }
    let fitted: Vec<_> = questions
        .iter()
        .map(|of| fit(system, (of.question, of.hits), gate, (policy, of.nonce)))
        .collect();
    let prompts = fitted.iter().zip(questions).filter_map(|(fitted, of)| match fitted {
        Ok(Fitted::Prompt(prompt)) => Some((&prompt.frame, of.seed)),
        Ok(Fitted::Refused(_)) | Err(_) => None,
    });
    let mut replies = system.generate_all(&prompts.collect::<Vec<_>>()).into_iter();
    let mut next = || replies.next().expect("a generator gives one reply for each prompt");
    fitted
        .into_iter()
        .map(|fitted| match fitted? {
            Fitted::Refused(outcome) => Ok(*outcome),
            Fitted::Prompt(prompt) => {
                let walked = Walked { steps: Vec::new(), reply: next()?, refusal: None };
                decide(system, &prompt, policy, walked)
            }
        })
        .collect()
}

/// A question before the generator runs.
pub(crate) enum Fitted<'h> {
    /// The generator must not run.
    Refused(Box<AskOutcome>),
    /// The generator answers this prompt.
    Prompt(Box<Prompt<'h>>),
}

/// A prompt that fits, with the evidence that is in it and what the gate read.
pub(crate) struct Prompt<'h> {
    pub(crate) frame: PromptFrame,
    pub(crate) hits: &'h [Hit],
    gate: GateReading,
}

/// Builds the prompt of a question with as many snippets as fit.
pub(crate) fn fit<'h>(
    system: &dyn Generate,
    (question, mut hits): (&str, &'h [Hit]),
    gate: &EvidenceGate,
    (policy, nonce): (&AskPolicy, &Nonce),
) -> Result<Fitted<'h>, GenerateError> {
    loop {
        let locked = (policy.rules.as_deref(), nonce);
        let (frame, gate) = match begin(question, hits, gate, locked) {
            Begun::Refused(outcome) => return Ok(Fitted::Refused(outcome)),
            Begun::Prompt { frame, gate } => (frame, gate),
        };
        let tokens = system.count_tokens(frame.messages())?;
        let limit = system.prompt_limit();
        if tokens <= limit {
            return Ok(Fitted::Prompt(Box::new(Prompt { frame, hits, gate })));
        }
        if hits.len() == 1 {
            return Err(GenerateError::PromptTooLong { tokens, limit });
        }
        hits = &hits[..hits.len() - 1];
    }
}

/// Generates the answer to a prompt that fits, whole or step by step, and decides about it.
fn reply_to(
    system: &dyn Generate,
    prompt: &Prompt<'_>,
    (policy, seed): (&AskPolicy, u64),
) -> Result<AskOutcome, GenerateError> {
    let frame = &prompt.frame;
    let walked = match policy.steps {
        None => Walked { steps: Vec::new(), reply: system.generate(frame, seed)?, refusal: None },
        Some(options) => walk(system, frame, (policy, options), seed)?,
    };
    decide(system, prompt, policy, walked)
}

/// Turns what was generated into what the user sees.
fn decide(
    system: &dyn Generate,
    prompt: &Prompt<'_>,
    policy: &AskPolicy,
    walked: Walked,
) -> Result<AskOutcome, GenerateError> {
    let Prompt { frame, hits, gate } = prompt;
    let gate = gate.clone();
    let is_screened = policy.leak == LeakCheck::Enforce && walked.refusal.is_none();
    if is_screened && leaks(system, frame, &walked.reply.text)? {
        let refusal = Some(RefusalReason::Leak);
        return Ok(conclude_steps(frame, hits, gate, Walked { refusal, ..walked }));
    }
    Ok(match policy.steps.map(|options| options.check) {
        Some(StepCheck::Enforce) => conclude_steps(frame, hits, gate, walked),
        Some(StepCheck::Off) | None => {
            let outcome = conclude(frame, hits, gate, walked.reply, policy);
            AskOutcome { steps: walked.steps, ..outcome }
        }
    })
}

/// Whether a reply repeats the system message of its prompt (G-21). That text is the same for everybody and no
/// secret, so it has no canary; a reply that recites it answers no question.
fn leaks(system: &dyn Generate, frame: &PromptFrame, reply: &str) -> Result<bool, GenerateError> {
    let mut guard = LeakGuard::new();
    for message in frame.messages().iter().filter(|message| message.role == "system") {
        guard = guard.with_text(&message.content, &system.token_ends(&message.content)?);
    }
    Ok(Arc::new(guard).screen(reply).leak.is_some())
}

/// Retrieves and answers: the way of a request of `/v1/ask`.
///
/// # Errors
/// The index or the generator failed.
pub fn ask(
    generator: &dyn Generate,
    index: &dyn Retrieve,
    question: &str,
    gate: &EvidenceGate,
    call: (&AskPolicy, &Nonce, u64),
) -> Result<AskOutcome, VerifyError> {
    let hits = retrieve(index, question, call.0)?;
    Ok(answer_over(generator, question, &hits, gate, call)?)
}

#[expect(clippy::cast_precision_loss, reason = "sentence counts are far below 2^52")]
fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
