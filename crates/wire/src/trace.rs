//! Trace records (guardrails G-14): one envelope, one body per event, JSON lines. Their published JSON Schemas are
//! in [`crate::schemas`].

use serde::Serialize;

use crate::{ConstraintRecord, StructuredRecord};

/// Version of the record layout; a reader refuses another one.
pub const TRACE_SCHEMA_VERSION: &str = "2.0";

/// The pins that an answer depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pins {
    /// sha256 of the model file.
    pub model_fp: String,
    /// Fingerprint of the generator's tokenizer.
    pub tok_fp: String,
    /// Fingerprint of the encoder, when one is loaded.
    pub encoder_fp: Option<String>,
    /// Hash of the index that was searched.
    pub index_hash: Option<String>,
    /// sha256 of the chat template.
    pub template_hash: Option<String>,
    /// [`crate::schemas::SHA256`]: the layout, and what is required of it.
    pub schema_hash: String,
    /// Weight format.
    pub quant: String,
    /// KV cache element type.
    pub kv_dtype: String,
    /// Shards.
    pub tp: usize,
    /// Version of this program.
    pub engine_build: String,
}

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TraceEnvelope {
    /// [`TRACE_SCHEMA_VERSION`].
    pub schema_version: &'static str,
    /// RFC 3339, UTC.
    pub ts: String,
    /// Unique per answer.
    pub trace_id: String,
    /// Unique per request.
    pub request_id: String,
    /// The session that the request goes on from; without one, the `user` of the request.
    pub session_id: Option<String>,
    /// Which key asked (never the key).
    pub agent_id: Option<String>,
    /// Revision of the session that the request goes on from; 0: it goes on from none.
    pub mem_rev: u64,
    /// Hash of what that session holds; null: it goes on from none.
    pub mem_hash: Option<String>,
    /// Why a mismatch between the model's manifest and its surroundings is overlooked; absent when none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced: Option<String>,
    /// What the answer depends on.
    pub pins: Pins,
    /// What happened.
    #[serde(flatten)]
    pub body: TraceBody,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event")]
pub enum TraceBody {
    /// A collection was written.
    #[serde(rename = "ingest.write")]
    Ingest {
        /// The collection.
        collection: String,
        /// Documents in it.
        documents: usize,
        /// Chunks in it.
        chunks: usize,
        /// Its hash.
        index_hash: String,
    },
    /// A collection was searched for an answer; it stands in front of the answer's record, and alone where nobody
    /// waited for the answer any more.
    #[serde(rename = "retrieve.run")]
    Retrieve {
        /// The question.
        query: QueryRecord,
        /// The collection.
        collection: String,
        /// What was found, best first; none is selected where the answer was not decided.
        retrieved: Vec<RetrievedItem>,
    },
    /// Text was generated without a collection.
    #[serde(rename = "infer.run")]
    Infer {
        /// Route of the request.
        route: &'static str,
        /// Seed that was used.
        seed: u64,
        /// `stop`, `length`, `degenerate`, `context_rotation_required`, `schema_incomplete`, `leak`, `cancelled` or the
        /// fault.
        finish_reason: String,
        /// sha256 of the text of the choices, in order.
        answer_sha256: String,
        /// Tokens.
        tokens: TokenCounts,
        /// Times.
        latency_ms: Latency,
        /// What it was held to; absent when to nothing.
        #[serde(skip_serializing_if = "Option::is_none")]
        structured: Option<StructuredRecord>,
        /// The hard rules of the request; absent when it had none.
        #[serde(skip_serializing_if = "Option::is_none")]
        constraints: Option<ConstraintRecord>,
    },
    /// Part of a context was dropped, and the rest computed anew (G-16).
    #[serde(rename = "cache.rotate")]
    Rotate {
        /// Route of the request.
        route: &'static str,
        /// Choice of the request, from 0.
        choice: usize,
        /// How.
        policy: &'static str,
        /// Tokens of the context before.
        tokens_used: usize,
        /// Tokens at which it was due; fewer than were used when an open JSON value put it off.
        limit: usize,
        /// Ranges of prompt and answer that the context is made of from then on.
        kept_ranges: Vec<[usize; 2]>,
        /// Ranges that left it.
        dropped_ranges: Vec<[usize; 2]>,
        /// Divergence from a fresh prefill; null, and `oracle` says why.
        oracle_kl: Option<f64>,
        /// `not_available`: it is measured by `exrail probe cache`, never inline. `not_applicable`: no fresh
        /// prefill gives what the cache holds from here on.
        oracle: &'static str,
    },
    /// A question was answered or refused.
    #[serde(rename = "answer.decide")]
    Answer(Box<AnswerRecord>),
    /// A request was turned away by a guard before generation.
    #[serde(rename = "guard.fire")]
    Guard {
        /// The guard.
        guard: String,
        /// Why.
        detail: String,
    },
    /// A boot phase ended.
    #[serde(rename = "boot.phase")]
    Boot {
        /// The phase.
        phase: String,
        /// Whether it succeeded.
        ok: bool,
        /// Milliseconds it took.
        ms: f64,
        /// What it found.
        detail: String,
    },
    /// A gateway had another server answer, or withheld what that said.
    #[serde(rename = "relay.run")]
    Relay(Box<RelayRecord>),
    /// A generator was loaded in place of another one, or could not be.
    #[serde(rename = "model.load")]
    Load {
        /// Its name in requests.
        model: String,
        /// Whether it answers.
        ok: bool,
        /// Milliseconds from the first request for it, the wait for its place included.
        ms: f64,
        /// Why it does not.
        problem: Option<String>,
    },
    /// A generator gave its memory back.
    #[serde(rename = "model.unload")]
    Unload {
        /// Its name in requests.
        model: String,
        /// False: a step of it hangs, and holds the memory.
        ok: bool,
        /// Milliseconds it took.
        ms: f64,
        /// `swap` or `idle`.
        reason: &'static str,
    },
    /// A probe ran.
    #[serde(rename = "probe.run")]
    Probe {
        /// The report.
        report: serde_json::Value,
    },
}

/// A question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueryRecord {
    /// sha256 of the text, 16 digits.
    pub q_id: String,
    /// The question.
    pub text: String,
    /// Language tag; `und` when not determined.
    pub lang: String,
    /// Tokens by the index tokenizer.
    pub tokens: usize,
}

/// One search result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievedItem {
    /// The snippet.
    pub snippet_id: String,
    /// Its section.
    pub section_id: String,
    /// Its document.
    pub doc_id: String,
    /// Revision of the document.
    pub rev: String,
    /// Where it stands in the document's canonical text.
    pub span: SpanRecord,
    /// Its tokens by the index tokenizer; at least 1.
    pub tokens: usize,
    /// sha256 of its text.
    pub text_sha256: String,
    /// Fused score.
    pub score_raw: f64,
    /// Fused score over the best one's.
    pub score_norm: f64,
    /// Cosine of question and snippet.
    pub cosine: f64,
    /// 1 − cosine.
    pub ds_raw: f64,
    /// On the calibrated scale, when calibrated.
    pub ds_cal: Option<f64>,
    /// The probe: `ds_qr`.
    pub probe: &'static str,
    /// `hybrid`, `lexical` or `vector`.
    pub source: &'static str,
    /// Rank, from 1.
    pub k_pos: usize,
    /// Whether it entered the prompt.
    pub selected: bool,
}

/// A range of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SpanRecord {
    /// First byte.
    pub start: usize,
    /// One past the last byte; greater than `start`.
    pub end: usize,
    /// `byte`, of UTF-8: records of other programs count characters.
    pub unit: &'static str,
}

impl From<std::ops::Range<usize>> for SpanRecord {
    fn from(bytes: std::ops::Range<usize>) -> SpanRecord {
        SpanRecord { start: bytes.start, end: bytes.end, unit: "byte" }
    }
}

/// The prompt over evidence: its slots, its rules and what it allows to cite (G-14, G-31).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PromptRecord {
    /// Hash of the fixed text, the roles and the slot order.
    pub shape_sha256: String,
    /// sha256 of the system slot.
    pub system_sha256: String,
    /// The task.
    pub task: String,
    /// The rules, as they stand in the prompt.
    pub constraints: Vec<String>,
    /// sha256 of the rules in sorted order, each followed by a zero byte.
    pub constraints_sha256: String,
    /// The snippets in the order of their labels.
    pub citations: Vec<String>,
    /// The slots in their order.
    pub slots: Vec<SlotRecord>,
}

/// A slot of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotRecord {
    /// `system`, `task`, `constraints`, `citations`, `question` or `answer`.
    pub slot: &'static str,
    /// `system` or `user`.
    pub role: &'static str,
    /// Where it stands in the content of that message.
    pub span: SpanRecord,
    /// Its tokens in the prompt; null where they were not told apart.
    pub token_range: Option<[usize; 2]>,
}

/// An answer with its evidence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AnswerRecord {
    /// The question.
    pub query: QueryRecord,
    /// The collection.
    pub collection: String,
    /// The prompt frame; null when no prompt was built.
    pub prompt: Option<PromptRecord>,
    /// The hard rules of the request; absent when it had none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constraints: Option<ConstraintRecord>,
    /// What was found, best first.
    pub retrieved: Vec<RetrievedItem>,
    /// The answer as released.
    pub answer_text: String,
    /// Its hash.
    pub answer_sha256: String,
    /// The answer by section.
    pub segments: Vec<SegmentRecord>,
    /// Whether it is the refusal.
    pub refusal: bool,
    /// Why it was refused.
    pub refusal_reason: Option<String>,
    /// What the model wrote, when that was not released.
    pub withheld_sha256: Option<String>,
    /// Every step that was drawn, in order; absent when the answer was not made step by step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepRecord>>,
    /// Seed that was used.
    pub seed: u64,
    /// `stop`, `length`, `degenerate`, `schema_incomplete`, or null when nothing was generated.
    pub finish_reason: Option<String>,
    /// What was measured.
    pub metrics: AnswerMetrics,
    /// What was compared before it left.
    pub checks: AnswerChecks,
    /// λ is probed offline, never inline (G-30).
    pub lambda: Option<serde_json::Value>,
    /// Guards that fired.
    pub guards_fired: Vec<String>,
}

/// A part of an answer that rests on one section.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SegmentRecord {
    /// Where it stands in the answer.
    pub text_span: SpanRecord,
    /// The section; null without support.
    pub section_id: Option<String>,
    /// The snippets.
    pub snippet_ids: Vec<String>,
    /// `model`, `attributed` or `none`.
    pub citation_source: &'static str,
    /// Tokens of the snippets, by the index tokenizer.
    pub tokens: usize,
}

/// A step of an answer that was made step by step (G-20).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepRecord {
    /// Its place in the answer, from 1; the same for one that was drawn in the place of another one.
    pub step: usize,
    /// Seed of its draw.
    pub seed: u64,
    /// What it says, without labels; null: withheld.
    pub claim: Option<String>,
    /// Its hash.
    pub claim_sha256: String,
    /// The snippets that support it.
    pub citations: Vec<String>,
    /// `good`, `rolled_back`, `stalled` (rolled back, because nothing moved) or `cut`.
    pub state: &'static str,
    /// Why it is not good: `unknown_citation`, `uncited`, `contradiction`, `repetition`, `looped`, `nothing_new` or
    /// `cut`.
    pub reason: Option<&'static str>,
    /// Tokens of its draw.
    pub tokens: TokenCounts,
}

/// What was measured for an answer. Null: not measured, see the statuses.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AnswerMetrics {
    /// Calibrated ΔS of the nearest selected snippet.
    pub ds_min: Option<f64>,
    /// Token-weighted mean over the selected snippets.
    pub ds_mean: Option<f64>,
    /// Status of the two.
    pub ds_status: String,
    /// Mean next-token entropy, nats.
    pub h_mean: Option<f64>,
    /// Share of the segments with a snippet, in [0, 1]; null for a refusal.
    pub cited_share: Option<f64>,
    /// Times.
    pub latency_ms: Latency,
    /// Tokens.
    pub tokens: TokenCounts,
}

/// What was compared of an answer before it left. Null: not measured; of a refusal nothing is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AnswerChecks {
    /// Share of the sentences whose cited snippets together hold their words and numbers, in [0, 1].
    pub citation_recall: Option<f64>,
    /// Share of the citations that their sentence needs, in [0, 1]; null without a citation.
    pub citation_precision: Option<f64>,
    /// Share of the words that stand in a cited snippet, three or more in a row, in [0, 1].
    pub span_containment: Option<f64>,
    /// Share of the content words that the snippets of the prompt hold, in [0, 1].
    pub answer_containment: Option<f64>,
    /// Always null: a question of a user has no anchor to be covered (`exrail verify` has).
    pub coverage_cited: Option<f64>,
    /// Calibrated ΔS of the answer and the nearest snippet that it cites.
    pub ds_ac: Option<f64>,
    /// `ok`, `encoder_unfit` (the value reports and must not gate), `not_calibrated`, `undefined` or `failed`.
    pub ds_ac_status: &'static str,
    /// Milliseconds of the comparisons.
    pub ms: f64,
    /// Milliseconds of the vectors for `ds_ac`; null where none was needed.
    pub embedding_ms: Option<f64>,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Search.
    pub retrieve: f64,
    /// Waiting for a place in the batch.
    pub queue: f64,
    /// Reading the prompt.
    pub prefill: f64,
    /// Generating.
    pub decode: f64,
}

/// Tokens by the generator's tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TokenCounts {
    /// Prompt.
    pub r#in: usize,
    /// Generated.
    pub out: usize,
    /// Prompt tokens from the cache.
    pub cached: usize,
}

/// What became of a request that another server answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RelayRecord {
    /// Route of the request.
    pub route: &'static str,
    /// Name of the upstream in the gateway.
    pub upstream: String,
    /// Its kind.
    pub kind: &'static str,
    /// The model that was asked.
    pub model: String,
    /// The seed that was passed on; null: none, and what was drawn cannot be drawn again.
    pub seed: Option<i64>,
    /// How often it was asked.
    pub attempts: usize,
    /// What the answer was held to: `json_schema`, `tools` or null.
    pub held_to: Option<&'static str>,
    /// Answers that did not conform and were asked for again.
    pub repairs: usize,
    /// Of the first choice; null when there is no answer.
    pub finish_reason: Option<String>,
    /// sha256 of the text of the choices, in order; null when there is no answer.
    pub answer_sha256: Option<String>,
    /// Why there is no answer, by its code; null when there is one.
    pub fault: Option<&'static str>,
    /// Tokens of prompt and answer as the upstream counts them; null where it does not tell.
    pub tokens: Option<[u64; 2]>,
    /// Times.
    pub latency_ms: RelayLatency,
}

/// Milliseconds of a request that another server answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RelayLatency {
    /// Held back by the warm-up fence.
    pub held: f64,
    /// At the upstream, from the request to the last byte.
    pub upstream: f64,
    /// In the gateway: everything else.
    pub overhead: f64,
}
