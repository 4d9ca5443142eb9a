//! `POST /v1/completions`.

use serde::{Deserialize, Serialize};

use crate::{RotationFields, RotationRecord, Stop, StreamOptions, Unknown, Usage};

/// A text completion request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct CompletionRequest {
    /// A name of `/v1/models`.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Upper limit on generated tokens; 16 when absent, as the original API has it.
    pub max_tokens: Option<usize>,
    /// Choices per prompt.
    pub n: Option<usize>,
    /// Strings that end the text.
    pub stop: Option<Stop>,
    /// Send tokens as they come.
    pub stream: Option<bool>,
    /// Options of a stream.
    pub stream_options: Option<StreamOptions>,
    /// Alternatives per token; 0 returns the chosen ones only.
    pub logprobs: Option<usize>,
    /// Put the prompt before the text.
    pub echo: Option<bool>,
    /// Tell the ids of the prompt's and the answer's tokens.
    pub return_token_ids: Option<bool>,
    /// A name of the end user, kept in the trace.
    pub user: Option<String>,
    /// What happens when the answer outgrows its place in the cache.
    pub rotation: Option<RotationFields>,
    /// Sampling fields (see [`crate::SamplingFields::take`]) and everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What to continue. Control-token literals in a text prompt are read as control tokens: the raw
/// route leaves the format to the caller.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Token ids of one prompt.
    Ids(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids of several prompts.
    ManyIds(Vec<Vec<u32>>),
}

/// A whole answer, and one event of a stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletionResponse {
    /// Identifies the request in the traces.
    pub id: String,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answered.
    pub model: String,
    /// Fingerprint of model and engine; null in events that came before the model's hash was known.
    pub system_fingerprint: Option<String>,
    /// Revision and hash of the session that the turn began from; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_id: Option<String>,
    /// One a choice.
    pub choices: Vec<CompletionChoice>,
    /// Tokens spent; absent in most events of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletionChoice {
    /// From 0, over all prompts.
    pub index: usize,
    /// The text.
    pub text: String,
    /// `stop` or `length`; null while streaming.
    pub finish_reason: Option<&'static str>,
    /// The reason itself, where OpenAI's list has no word for it and `finish_reason` has the nearest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail_finish_reason: Option<&'static str>,
    /// When asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Ids of the prompt's tokens, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Ids of the answer's tokens, when asked for; an end-of-sequence token is none of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// What was dropped: all of it in a whole answer, of a stream in an event of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<RotationRecord>,
    /// Tokens that the loop guard took back before it went on; absent when it took none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rolled_back_tokens: Option<usize>,
}

/// Log-probabilities in the form of the text completions API.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    /// Tokens as text.
    pub tokens: Vec<String>,
    /// ln p of each.
    pub token_logprobs: Vec<f32>,
    /// Per token: alternative to ln p.
    pub top_logprobs: Vec<serde_json::Map<String, serde_json::Value>>,
    /// Character offset of each token in the text.
    pub text_offset: Vec<usize>,
}
