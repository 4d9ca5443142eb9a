//! The fields of a record that the checks read, and the checks that need no answer.

use exrail_retrieval::snippet_id;
use exrail_wire::schemas;
use serde::Deserialize;

use super::findings::{Findings, Rule};
use crate::prompt::sha256_hex;

/// Two floats that were computed alike differ by rounding only.
pub(super) const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
pub(super) struct Envelope {
    mem_rev: u64,
    mem_hash: Option<String>,
    pins: Pins,
}

#[derive(Deserialize)]
struct Pins {
    model_fp: String,
    schema_hash: String,
}

#[derive(Deserialize)]
pub(super) struct Query {
    q_id: String,
    text: String,
}

#[derive(Deserialize)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
}

#[derive(Deserialize)]
pub(super) struct Retrieved {
    pub(super) snippet_id: String,
    pub(super) section_id: String,
    pub(super) doc_id: String,
    pub(super) rev: String,
    pub(super) span: Span,
    pub(super) tokens: usize,
    pub(super) text_sha256: String,
    score_norm: f64,
    cosine: f64,
    ds_raw: f64,
    pub(super) ds_cal: Option<f64>,
    k_pos: usize,
    pub(super) selected: bool,
}

#[derive(Deserialize)]
pub(super) struct Retrieve {
    query: Query,
    pub(super) retrieved: Vec<Retrieved>,
}

#[derive(Deserialize)]
pub(super) struct Rotate {
    kept_ranges: Vec<[usize; 2]>,
    dropped_ranges: Vec<[usize; 2]>,
}

#[derive(Deserialize)]
pub(super) struct Answer {
    pub(super) query: Query,
    pub(super) prompt: Option<Prompt>,
    pub(super) constraints: Option<Constraints>,
    pub(super) retrieved: Vec<Retrieved>,
    pub(super) answer_text: String,
    pub(super) answer_sha256: String,
    pub(super) segments: Vec<Segment>,
    pub(super) refusal: bool,
    pub(super) refusal_reason: Option<String>,
    pub(super) withheld_sha256: Option<String>,
    pub(super) steps: Option<Vec<Step>>,
    pub(super) seed: u64,
    pub(super) finish_reason: Option<String>,
    pub(super) metrics: Metrics,
    pub(super) checks: Checks,
    pub(super) guards_fired: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct Segment {
    pub(super) text_span: Span,
    pub(super) section_id: Option<String>,
    pub(super) snippet_ids: Vec<String>,
    pub(super) citation_source: String,
    pub(super) tokens: usize,
}

#[derive(Deserialize)]
pub(super) struct Step {
    pub(super) step: usize,
    pub(super) seed: u64,
    pub(super) claim: Option<String>,
    pub(super) claim_sha256: String,
    pub(super) citations: Vec<String>,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) tokens: Tokens,
}

#[derive(Deserialize)]
pub(super) struct Prompt {
    pub(super) constraints: Vec<String>,
    pub(super) constraints_sha256: String,
    pub(super) citations: Vec<String>,
    pub(super) slots: Vec<SlotPlace>,
}

/// The hard rules of the request, which stand behind those of every prompt.
#[derive(Deserialize)]
pub(super) struct Constraints {
    pub(super) sha256: String,
    pub(super) n_rules: usize,
    pub(super) echo: String,
}

#[derive(Deserialize)]
pub(super) struct SlotPlace {
    pub(super) slot: String,
    pub(super) role: String,
    pub(super) span: Span,
}

#[derive(Deserialize)]
pub(super) struct Metrics {
    pub(super) ds_min: Option<f64>,
    pub(super) ds_mean: Option<f64>,
    pub(super) ds_status: String,
    pub(super) cited_share: Option<f64>,
    pub(super) tokens: Tokens,
}

#[derive(Deserialize)]
pub(super) struct Checks {
    pub(super) citation_recall: Option<f64>,
    pub(super) citation_precision: Option<f64>,
    pub(super) ds_ac: Option<f64>,
    pub(super) ds_ac_status: String,
}

#[derive(Deserialize)]
pub(super) struct Tokens {
    pub(super) r#in: usize,
    pub(super) out: usize,
    pub(super) cached: usize,
}

impl Envelope {
    pub(super) fn check(&self, findings: &mut Findings) {
        let Pins { model_fp, schema_hash } = &self.pins;
        // Before a model is loaded there are no pins.
        let expected =
            if model_fp.is_empty() && schema_hash.is_empty() { "" } else { schemas::SHA256 };
        findings.equal(Rule::SchemaHash, "/pins/schema_hash", expected, schema_hash);
        let together = (self.mem_rev == 0) == self.mem_hash.is_none();
        let expected = "a hash for every revision but 0";
        findings.holds(Rule::Memory, "/mem_hash", together, (expected, &self.mem_rev));
    }
}

impl Query {
    pub(super) fn check(&self, findings: &mut Findings) {
        let expected = &sha256_hex(self.text.as_bytes())[..16];
        findings.equal(Rule::QuestionId, "/query/q_id", expected, &self.q_id);
    }
}

impl Retrieve {
    pub(super) fn check(&self, findings: &mut Findings) {
        self.query.check(findings);
        check_retrieved(&self.retrieved, findings);
    }
}

impl Rotate {
    /// The ranges are those of one text, none empty and none twice. They count from its begin, so after an earlier
    /// rotation they may lie behind `tokens_used`.
    pub(super) fn check(&self, findings: &mut Findings) {
        let mut ranges: Vec<[usize; 2]> =
            self.kept_ranges.iter().chain(&self.dropped_ranges).copied().collect();
        ranges.sort_unstable();
        let is_some = ranges.iter().all(|[start, end]| start < end);
        let apart = ranges.windows(2).all(|pair| pair[0][1] <= pair[1][0]);
        let expected = "ranges of tokens, none empty, none twice";
        let found = format!("{ranges:?}");
        findings.holds(Rule::Spans, "/kept_ranges", is_some && apart, (expected, &found));
    }
}

/// Ids, spans, ranks and distances of what was found.
pub(super) fn check_retrieved(retrieved: &[Retrieved], findings: &mut Findings) {
    let mut last_norm = f64::INFINITY;
    for (at, item) in retrieved.iter().enumerate() {
        let field = |name: &str| format!("/retrieved/{at}/{name}");
        let span = &item.span;
        let found = format!("{} to {}", span.start, span.end);
        let expected = ("a start in front of the end", &found as &dyn std::fmt::Display);
        findings.holds(Rule::Spans, &field("span"), span.start < span.end, expected);
        let id = snippet_id(&item.doc_id, &item.rev, span.start..span.end);
        findings.equal(Rule::SnippetId, &field("snippet_id"), &id, &item.snippet_id);
        findings.equal(Rule::Ranks, &field("k_pos"), &(at + 1), &item.k_pos);
        let is_its_own = !retrieved[..at].iter().any(|other| other.snippet_id == item.snippet_id);
        let once = ("each snippet once", &item.snippet_id as &dyn std::fmt::Display);
        findings.holds(Rule::Ranks, &field("snippet_id"), is_its_own, once);
        let falls = item.score_norm <= last_norm;
        let no_better =
            ("no better score than the one before", &item.score_norm as &dyn std::fmt::Display);
        findings.holds(Rule::Ranks, &field("score_norm"), falls, no_better);
        last_norm = item.score_norm;
        let is_near = (1.0 - item.cosine - item.ds_raw).abs() <= TOLERANCE;
        let complement = ("1 - cosine", &item.ds_raw as &dyn std::fmt::Display);
        findings.holds(Rule::Ranks, &field("ds_raw"), is_near, complement);
    }
}
