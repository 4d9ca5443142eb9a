//! `POST /v1/ask`, and the `exrail` part of a chat request.

use serde::{Deserialize, Serialize};

use crate::{AnswerChecks, StepRecord, Unknown, Usage};

/// Where a chat answer must come from.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Grounding {
    /// The collection to search.
    pub collection: String,
    /// Snippets to put into the prompt.
    pub k: Option<usize>,
    /// Most steps of an answer that is made step by step; absent: it is made whole.
    pub steps: Option<usize>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A question to a collection.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct AskRequest {
    /// The question.
    pub question: String,
    /// A generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// The collection; the server's only one when absent.
    pub collection: Option<String>,
    /// Snippets to put into the prompt.
    pub k: Option<usize>,
    /// Upper limit on generated tokens.
    pub max_tokens: Option<usize>,
    /// Most steps of an answer that is made step by step; absent: it is made whole.
    pub steps: Option<usize>,
    /// Sampling fields (see [`crate::SamplingFields::take`]) and everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// An answer with its evidence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AskResponse {
    /// Finds the record in the trace log.
    pub trace_id: String,
    /// The answer, or the refusal token.
    pub answer: String,
    /// True when the answer is the refusal.
    pub refusal: bool,
    /// Why it was refused.
    pub reason: Option<String>,
    /// The snippets that support the answer.
    pub citations: Vec<Citation>,
    /// What was measured.
    pub metrics: AskMetrics,
    /// What was compared before the answer left.
    pub checks: AnswerChecks,
    /// Tokens spent.
    pub usage: Usage,
    /// `stop`, `length` or `degenerate`, or null when nothing was generated.
    pub finish_reason: Option<&'static str>,
    /// Every step that was drawn, in order; absent when the answer was not made step by step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepRecord>>,
}

/// One supporting snippet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Citation {
    /// Identifier of the snippet.
    pub snippet_id: String,
    /// Its section.
    pub section_id: String,
    /// Its document.
    pub doc_id: String,
    /// Where the document came from.
    pub source_url: String,
    /// First and last line in the document, from 1.
    pub lines: [usize; 2],
    /// Tokens of the snippet, by the index tokenizer.
    pub tokens: usize,
    /// `model` when the model named it, `attributed` when the engine matched the text.
    pub source: &'static str,
    /// The snippet's text.
    pub text: String,
}

/// What was measured for one answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AskMetrics {
    /// Raw ΔS(question, nearest snippet), in [0, 2].
    pub ds_raw_min: Option<f64>,
    /// The same on the calibrated scale, in [0, 1].
    pub ds_min: Option<f64>,
    /// `ok`, `no_evidence`, `undefined`, `encoder_unfit` or `not_calibrated`.
    pub ds_status: String,
    /// Milliseconds: search.
    pub retrieve_ms: f64,
    /// Milliseconds to the first token of the answer, after the search.
    pub first_token_ms: Option<f64>,
    /// Milliseconds of the whole request.
    pub total_ms: f64,
}
