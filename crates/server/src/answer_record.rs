//! What is recorded of a question and its answer (G-14).

use std::time::Duration;

use exrail_retrieval::Hit;
use exrail_verify::{
    AskOutcome, CitationSource, GateReading, GeneratedEnd, LOGIC_COLLAPSE, LiveChecks,
    RefusalReason, Segment,
};
use exrail_wire::{
    AnswerChecks, AnswerMetrics, AnswerRecord, Latency, PromptRecord, QueryRecord, RetrievedItem,
    SegmentRecord, TokenCounts,
};
use sha2::{Digest, Sha256};

use crate::{
    generation::hex,
    pipeline::{AskCall, Asked, Grounds},
    rules,
};

/// A question to a collection, whose search and answer are recorded.
#[derive(Clone, Copy)]
pub struct Recorded<'a> {
    /// What it is asked.
    pub grounds: &'a Grounds,
    /// Name of the collection.
    pub collection: &'a str,
    /// The question.
    pub question: &'a str,
    /// How it is asked.
    pub call: &'a AskCall,
}

impl Recorded<'_> {
    /// The question.
    #[must_use]
    pub fn query(&self) -> QueryRecord {
        QueryRecord {
            q_id: sha256(self.question)[..16].into(),
            text: self.question.into(),
            lang: "und".into(),
            tokens: self.grounds.index().encoder().tokenize(self.question).len(),
        }
    }

    /// What was found, of which the first ones entered the prompt.
    #[must_use]
    pub fn retrieved(&self, found: &[Hit], n_selected: usize) -> Vec<RetrievedItem> {
        let item = |(at, hit)| item(hit, self.grounds.calibrated(hit), at < n_selected);
        found.iter().enumerate().map(item).collect()
    }

    /// The answer.
    #[must_use]
    pub fn answer(&self, asked: &Asked) -> AnswerRecord {
        let outcome = &asked.outcome;
        let ds_mean = match &outcome.gate {
            GateReading::Calibrated { cal_mean, .. }
            | GateReading::EncoderUnfit { cal_mean, .. } => Some(*cal_mean),
            GateReading::NotCalibrated { .. }
            | GateReading::NoEvidence
            | GateReading::Undefined { .. } => None,
        };
        let reason = outcome.refusal.as_ref().map(|reason| reason.in_words());
        AnswerRecord {
            query: self.query(),
            collection: self.collection.into(),
            prompt: prompt(asked),
            constraints: self
                .call
                .rules
                .as_ref()
                .map(|rules| rules::record(rules, outcome.prompt.is_some())),
            retrieved: self.retrieved(&asked.found, outcome.evidence.len()),
            answer_sha256: sha256(&outcome.text),
            answer_text: outcome.text.clone(),
            segments: segments(&outcome.segments, &outcome.evidence),
            refusal: outcome.refusal.is_some(),
            withheld_sha256: outcome
                .refusal
                .as_ref()
                .and(outcome.reply.as_ref())
                .map(|reply| sha256(&reply.text)),
            steps: asked.steps(),
            guards_fired: guards_fired(outcome),
            refusal_reason: reason,
            seed: self.call.sampling.seed,
            finish_reason: outcome.reply.as_ref().map(|reply| finish_reason(reply.end).into()),
            metrics: answer_metrics(asked, ds_mean),
            checks: checks(&asked.checks),
            lambda: None,
        }
    }
}

/// The guard that refused, and that of the steps that were taken back.
fn guards_fired(outcome: &AskOutcome) -> Vec<String> {
    let refused = outcome.refusal.as_ref().map(RefusalReason::guard);
    let collapsed = outcome.rollbacks().map(|_| LOGIC_COLLAPSE);
    let collapsed = collapsed.filter(|guard| refused != Some(*guard));
    collapsed.into_iter().chain(refused).map(str::to_owned).collect()
}

/// The prompt with the tokens of its slots.
fn prompt(asked: &Asked) -> Option<PromptRecord> {
    let mut prompt = asked.outcome.prompt.clone()?;
    for (slot, tokens) in prompt.slots.iter_mut().zip(&asked.slots) {
        slot.token_range = *tokens;
    }
    Some(prompt)
}

pub(crate) fn finish_reason(end: GeneratedEnd) -> &'static str {
    match end {
        GeneratedEnd::Stop => "stop",
        GeneratedEnd::Length | GeneratedEnd::Closed => "length",
        GeneratedEnd::Looped => "degenerate",
    }
}

pub(crate) fn status(gate: &GateReading) -> &'static str {
    match gate {
        GateReading::Calibrated { .. } => "ok",
        GateReading::EncoderUnfit { .. } => "encoder_unfit",
        GateReading::NotCalibrated { .. } => "not_calibrated",
        GateReading::NoEvidence => "no_evidence",
        GateReading::Undefined { .. } => "undefined",
    }
}

pub(crate) fn source_name(source: Option<CitationSource>) -> &'static str {
    match source {
        Some(CitationSource::Model) => "model",
        Some(CitationSource::Attributed) => "attributed",
        None => "none",
    }
}

fn sha256(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn answer_metrics(asked: &Asked, ds_mean: Option<f64>) -> AnswerMetrics {
    let measured = asked.measured.unwrap_or_default();
    let reply = asked.outcome.reply.as_ref();
    AnswerMetrics {
        ds_min: asked.outcome.gate.cal_min(),
        ds_mean,
        ds_status: status(&asked.outcome.gate).into(),
        h_mean: asked.measured.and_then(|measured| measured.entropy_mean),
        cited_share: asked.outcome.cited_share(),
        latency_ms: Latency {
            retrieve: asked.retrieve_ms,
            queue: measured.queue_ms,
            prefill: measured.prefill_ms,
            decode: measured.decode_ms,
        },
        tokens: TokenCounts {
            r#in: reply.map_or(0, |reply| reply.n_prompt_tokens),
            out: reply.map_or(0, |reply| reply.n_output_tokens),
            cached: measured.cached_tokens,
        },
    }
}

pub(crate) fn checks(checks: &LiveChecks) -> AnswerChecks {
    let ms = |took: Duration| took.as_secs_f64() * 1e3;
    AnswerChecks {
        citation_recall: checks.citation_recall,
        citation_precision: checks.citation_precision,
        span_containment: checks.span_containment,
        answer_containment: checks.answer_containment,
        coverage_cited: None,
        ds_ac: checks.ds_ac.value(),
        ds_ac_status: checks.ds_ac.status(),
        ms: ms(checks.took),
        embedding_ms: checks.embedding_took.map(ms),
    }
}

fn item(hit: &Hit, ds_cal: Option<f64>, selected: bool) -> RetrievedItem {
    let source = match (hit.rank_lexical, hit.rank_vector) {
        (Some(_), Some(_)) => "hybrid",
        (Some(_), None) => "lexical",
        (None, _) => "vector",
    };
    RetrievedItem {
        snippet_id: hit.chunk.snippet_id.clone(),
        section_id: hit.chunk.section_id.clone(),
        doc_id: hit.chunk.doc_id.clone(),
        rev: hit.chunk.rev.clone(),
        span: hit.chunk.range().into(),
        tokens: hit.chunk.tokens,
        text_sha256: hit.chunk.text_sha256.clone(),
        score_raw: f64::from(hit.score_raw),
        score_norm: f64::from(hit.score_norm),
        cosine: f64::from(hit.cosine),
        ds_raw: 1.0 - f64::from(hit.cosine),
        ds_cal,
        probe: "ds_qr",
        source,
        k_pos: hit.k_pos,
        selected,
    }
}

fn segments(segments: &[Segment], evidence: &[Hit]) -> Vec<SegmentRecord> {
    let tokens = |segment: &Segment| {
        let cited = |hit: &&Hit| segment.snippet_ids.contains(&hit.chunk.snippet_id);
        evidence.iter().filter(cited).map(|hit| hit.chunk.tokens).sum()
    };
    segments
        .iter()
        .map(|segment| SegmentRecord {
            text_span: segment.text_span.clone().into(),
            section_id: segment.section_id.clone(),
            snippet_ids: segment.snippet_ids.clone(),
            citation_source: source_name(segment.citation_source),
            tokens: tokens(segment),
        })
        .collect()
}
