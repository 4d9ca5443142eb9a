//! A good record of every event, with every field that its type has.

use exrail_retrieval::snippet_id;
use exrail_wire::{
    AnswerChecks, AnswerMetrics, AnswerRecord, CallRecord, ConstraintRecord, ContractRecord,
    Latency, Pins, PromptRecord, QueryRecord, RelayLatency, RelayRecord, RetrievedItem,
    SegmentRecord, StepRecord, StructuredRecord, TRACE_SCHEMA_VERSION, TokenCounts, TraceBody,
    TraceEnvelope, schemas,
};
use serde_json::{Value, json};

use crate::fakes::hit;
use crate::prompt::{Live, Nonce, PromptFrame, REFUSAL_TOKEN, sha256_hex};
use crate::rules::{HardRule, NLI, RuleSet};
use crate::steps::{LOGIC_COLLAPSE, StepFault, step_seed};

use super::seal;

fn pins() -> Pins {
    Pins {
        model_fp: sha256_hex(b"model"),
        tok_fp: "tok".into(),
        encoder_fp: Some("encoder".into()),
        index_hash: Some(sha256_hex(b"index")),
        template_hash: Some(sha256_hex(b"template")),
        schema_hash: schemas::SHA256.into(),
        quant: "Q4_0".into(),
        kv_dtype: "f16".into(),
        tp: 1,
        engine_build: "exrail-0".into(),
    }
}

pub(crate) fn envelope(trace_id: &str, body: TraceBody) -> TraceEnvelope {
    TraceEnvelope {
        schema_version: TRACE_SCHEMA_VERSION,
        ts: "2026-11-29T12:00:00.25Z".into(),
        trace_id: trace_id.into(),
        request_id: "ask-1".into(),
        session_id: Some("me".into()),
        agent_id: Some("key-1".into()),
        mem_rev: 3,
        mem_hash: Some(sha256_hex(b"memory")),
        forced: Some("by hand".into()),
        pins: pins(),
        body,
    }
}

/// As it is written to a log.
pub(crate) fn line(record: &Value) -> String {
    let mut record = record.clone();
    record.as_object_mut().unwrap().remove("record_sha256");
    seal(&record.to_string())
}

/// As it is read from a log.
pub(crate) fn sealed(envelope: &TraceEnvelope) -> Value {
    serde_json::from_str(&line(&serde_json::to_value(envelope).unwrap())).unwrap()
}

const TEXTS: [&str; 3] =
    ["A page has 256 tokens.", "Pages are evicted in order of use.", "Unused remark."];

fn retrieved(nth: usize, cosine: f64, selected: bool) -> RetrievedItem {
    let (doc_id, rev, start) = ("pages.md", "r1", 100 * nth);
    let span = start..start + TEXTS[nth].len();
    RetrievedItem {
        snippet_id: snippet_id(doc_id, rev, span.clone()),
        section_id: format!("pages.md#{}", nth / 2),
        doc_id: doc_id.into(),
        rev: rev.into(),
        span: span.into(),
        tokens: 5 + nth,
        text_sha256: sha256_hex(TEXTS[nth].as_bytes()),
        score_raw: cosine,
        score_norm: cosine,
        cosine,
        ds_raw: 1.0 - cosine,
        ds_cal: Some(0.1 + (1.0 - cosine) / 2.0),
        probe: "ds_qr",
        source: "hybrid",
        k_pos: nth + 1,
        selected,
    }
}

fn items() -> Vec<RetrievedItem> {
    vec![retrieved(0, 0.9, true), retrieved(1, 0.8, true), retrieved(2, 0.5, false)]
}

fn query() -> QueryRecord {
    let text = "How big is a page?".to_owned();
    QueryRecord {
        q_id: sha256_hex(text.as_bytes())[..16].into(),
        text,
        lang: "und".into(),
        tokens: 5,
    }
}

/// The hard rules of the request.
fn rules() -> RuleSet {
    let forbid = vec!["[0-9]+ coins".to_owned()];
    RuleSet::new(vec![HardRule { text: "Name no price.".to_owned(), forbid }]).unwrap()
}

fn constraints() -> ConstraintRecord {
    let rules = rules();
    ConstraintRecord {
        sha256: rules.sha256().to_owned(),
        n_rules: rules.texts().len(),
        n_patterns: rules.n_patterns(),
        echo: "equal",
        nli: NLI,
    }
}

fn prompt(items: &[RetrievedItem]) -> PromptRecord {
    let hits: Vec<_> = TEXTS[..2].iter().map(|text| hit("pages.md", 0, text, 0.9)).collect();
    let (live, nonce, rules) = (Live::new(&hits), Nonce::derive(&[b"x"]), rules());
    let frame = PromptFrame::with_rules("How big is a page?", live, &nonce, Some(&rules)).unwrap();
    let mut record = frame.record();
    record.citations =
        items.iter().filter(|it| it.selected).map(|it| it.snippet_id.clone()).collect();
    record
}

/// The `nth` step that was drawn, in this place of the answer.
fn step(
    nth: usize,
    place: usize,
    claim: &str,
    citations: &[String],
    fault: Option<StepFault>,
) -> StepRecord {
    StepRecord {
        step: place,
        seed: step_seed(1, nth),
        claim: fault.is_none().then(|| claim.to_owned()),
        claim_sha256: sha256_hex(claim.as_bytes()),
        citations: citations.to_vec(),
        state: fault.map_or("good", StepFault::state),
        reason: fault.map(StepFault::code),
        tokens: TokenCounts { r#in: 20 + nth, out: 4, cached: 16 },
    }
}

/// Those of [`answer`]: the second one was drawn twice.
fn steps(segments: &[SegmentRecord], text: &str) -> Vec<StepRecord> {
    let claim = |at: usize| &text[segments[at].text_span.start..segments[at].text_span.end];
    let cited = |at: usize| &segments[at].snippet_ids[..];
    vec![
        step(0, 1, claim(0), cited(0), None),
        step(1, 2, "Eviction is by size.", &[], Some(StepFault::Uncited)),
        step(2, 2, claim(1), cited(1), None),
    ]
}

pub(crate) fn answer() -> AnswerRecord {
    let retrieved = items();
    let answer_text = "A page has 256 tokens. Eviction is by use.".to_owned();
    let segment = |span: std::ops::Range<usize>, items: &[&RetrievedItem], source| SegmentRecord {
        text_span: span.into(),
        section_id: Some(items[0].section_id.clone()),
        snippet_ids: items.iter().map(|item| item.snippet_id.clone()).collect(),
        citation_source: source,
        tokens: items.iter().map(|item| item.tokens).sum(),
    };
    let segments = vec![
        segment(0..22, &[&retrieved[0]], "model"),
        segment(23..answer_text.len(), &[&retrieved[1], &retrieved[0]], "attributed"),
    ];
    AnswerRecord {
        query: query(),
        collection: "default".into(),
        prompt: Some(prompt(&retrieved)),
        constraints: Some(constraints()),
        answer_sha256: sha256_hex(answer_text.as_bytes()),
        steps: Some(steps(&segments, &answer_text)),
        segments,
        answer_text,
        retrieved,
        refusal: false,
        refusal_reason: None,
        withheld_sha256: None,
        seed: 1,
        finish_reason: Some("stop".into()),
        metrics: AnswerMetrics {
            ds_min: Some(0.1 + (1.0 - 0.9) / 2.0),
            ds_mean: Some(0.2),
            ds_status: "ok".into(),
            h_mean: Some(1.5),
            cited_share: Some(1.0),
            latency_ms: Latency { retrieve: 1.0, queue: 2.0, prefill: 3.0, decode: 4.0 },
            tokens: TokenCounts { r#in: 90, out: 13, cached: 64 },
        },
        checks: AnswerChecks {
            citation_recall: Some(1.0),
            citation_precision: Some(0.75),
            span_containment: Some(0.5),
            answer_containment: Some(0.9),
            coverage_cited: None,
            ds_ac: Some(0.3),
            ds_ac_status: "ok",
            ms: 0.2,
            embedding_ms: Some(5.0),
        },
        lambda: Some(json!({"state": "convergent"})),
        guards_fired: vec![LOGIC_COLLAPSE.into()],
    }
}

/// Those of a refusal.
fn no_checks() -> AnswerChecks {
    AnswerChecks {
        citation_recall: None,
        citation_precision: None,
        span_containment: None,
        answer_containment: None,
        coverage_cited: None,
        ds_ac: None,
        ds_ac_status: "undefined",
        ms: 0.0,
        embedding_ms: None,
    }
}

/// The refusal of an answer whose second step did not stand three times.
pub(crate) fn collapse() -> AnswerRecord {
    let cited = [answer().retrieved[0].snippet_id.clone()];
    let first = step(0, 1, "A page has 256 tokens.", &cited, None);
    let steps = vec![
        StepRecord { claim: None, ..first },
        step(1, 2, "Paris lies in France.", &[], Some(StepFault::Uncited)),
        step(2, 2, "Pages: 256 tokens.", &cited, Some(StepFault::Repetition { of: 1 })),
        step(3, 2, "Rome lies in Italy.", &[], Some(StepFault::Uncited)),
    ];
    let refused = refusal();
    let tokens = TokenCounts { r#in: 90, out: 16, cached: 64 };
    AnswerRecord {
        steps: Some(steps),
        refusal_reason: Some("step 2: no source supports it".into()),
        metrics: AnswerMetrics { tokens, ..refused.metrics.clone() },
        guards_fired: vec![LOGIC_COLLAPSE.into()],
        ..refused
    }
}

/// The model's own refusal.
pub(crate) fn refusal() -> AnswerRecord {
    let answered = answer();
    AnswerRecord {
        answer_sha256: sha256_hex(REFUSAL_TOKEN.as_bytes()),
        answer_text: REFUSAL_TOKEN.into(),
        segments: Vec::new(),
        steps: None,
        refusal: true,
        refusal_reason: Some("the model found no answer in the sources".into()),
        withheld_sha256: Some(sha256_hex(b"not in context")),
        metrics: AnswerMetrics { cited_share: None, ..answered.metrics.clone() },
        checks: no_checks(),
        guards_fired: vec!["model_refusal".into()],
        ..answered
    }
}

/// A record of each event.
pub(crate) fn every_event() -> Vec<TraceEnvelope> {
    let tokens = TokenCounts { r#in: 9, out: 3, cached: 0 };
    let bodies = [
        TraceBody::Ingest {
            collection: "default".into(),
            documents: 2,
            chunks: 9,
            index_hash: sha256_hex(b"index"),
        },
        TraceBody::Retrieve { query: query(), collection: "default".into(), retrieved: items() },
        TraceBody::Infer {
            route: "/v1/completions",
            seed: 7,
            finish_reason: "stop,length".into(),
            answer_sha256: sha256_hex(b"answer"),
            tokens,
            latency_ms: Latency::default(),
            structured: Some(StructuredRecord {
                schema_hash: sha256_hex(b"schema"),
                contracts: vec![ContractRecord {
                    name: "find".into(),
                    contract_hash: sha256_hex(b"parameters"),
                }],
                is_complete: true,
                n_tool_calls: 1,
                tool_calls: vec![CallRecord {
                    name: "find".into(),
                    dedupe_key: sha256_hex(b"call"),
                }],
                n_repairs: 0,
            }),
            constraints: Some(constraints()),
        },
        TraceBody::Rotate {
            route: "/v1/completions",
            choice: 0,
            policy: "reprefill",
            tokens_used: 900,
            limit: 800,
            kept_ranges: vec![[0, 100], [600, 900]],
            dropped_ranges: vec![[100, 600]],
            oracle_kl: Some(0.01),
            oracle: "not_available",
        },
        TraceBody::Answer(Box::new(answer())),
        TraceBody::Guard { guard: "prompt_lint".into(), detail: "two BOS".into() },
        TraceBody::Boot { phase: "weights".into(), ok: true, ms: 3.5, detail: "loaded".into() },
        TraceBody::Load { model: "m".into(), ok: false, ms: 3.5, problem: Some("absent".into()) },
        TraceBody::Unload { model: "m".into(), ok: true, ms: 3.5, reason: "idle" },
        TraceBody::Probe { report: json!({"probe": "cache"}) },
        TraceBody::Relay(Box::new(relayed())),
    ];
    let named = |(at, body)| envelope(&format!("trace-{at}"), body);
    bodies.into_iter().enumerate().map(named).collect()
}

/// An answer of another server.
fn relayed() -> RelayRecord {
    RelayRecord {
        route: "/v1/chat/completions",
        upstream: "tabby".into(),
        kind: "tabbyapi",
        model: "m".into(),
        seed: Some(7),
        attempts: 2,
        held_to: Some("json_schema"),
        repairs: 1,
        finish_reason: Some("stop".into()),
        answer_sha256: Some(sha256_hex(b"{}")),
        fault: Some("schema_violation"),
        tokens: Some([20, 3]),
        latency_ms: RelayLatency { held: 0.5, upstream: 30.0, overhead: 0.25 },
    }
}
