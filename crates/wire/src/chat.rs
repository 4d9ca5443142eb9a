//! `POST /v1/chat/completions`.

use serde::{Deserialize, Serialize};

use crate::{
    AnswerChecks, AskMetrics, Citation, Grounding, RequestCall, RotationFields, RotationRecord,
    StepRecord, Stop, ToolCallDelta, ToolCallMessage, Unknown, Usage,
};

/// A chat request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ChatRequest {
    /// A name of `/v1/models`.
    pub model: String,
    /// The conversation, oldest first.
    pub messages: Vec<RequestMessage>,
    /// Upper limit on generated tokens (old name).
    pub max_tokens: Option<usize>,
    /// Upper limit on generated tokens.
    pub max_completion_tokens: Option<usize>,
    /// Choices to generate.
    pub n: Option<usize>,
    /// Strings that end the answer.
    pub stop: Option<Stop>,
    /// Send tokens as they come.
    pub stream: Option<bool>,
    /// Options of a stream.
    pub stream_options: Option<StreamOptions>,
    /// Return log-probabilities.
    pub logprobs: Option<bool>,
    /// Alternatives per token.
    pub top_logprobs: Option<usize>,
    /// A name of the end user, kept in the trace.
    pub user: Option<String>,
    /// Answer from a collection.
    pub exrail: Option<Grounding>,
    /// What happens when the answer outgrows its place in the cache.
    pub rotation: Option<RotationFields>,
    /// Sampling fields (see [`crate::SamplingFields::take`]) and everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// One message of the conversation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RequestMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text; null or absent beside tool calls.
    pub content: Option<Content>,
    /// What an assistant thought before it answered.
    pub reasoning_content: Option<String>,
    /// Calls that an assistant made.
    pub tool_calls: Option<Vec<RequestCall>>,
    /// The call that a `tool` message answers.
    pub tool_call_id: Option<String>,
    /// Who speaks, or the function that a `tool` message comes from.
    pub name: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A message's text, plain or in parts.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Typed parts.
    Parts(Vec<ContentPart>),
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ContentPart {
    /// `text` is the only kind served.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a `text` part.
    pub text: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Options of a stream.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct StreamOptions {
    /// Send a last chunk with the usage.
    pub include_usage: Option<bool>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatResponse {
    /// Identifies the request in the traces.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answered.
    pub model: String,
    /// One a choice.
    pub choices: Vec<ChatChoice>,
    /// Tokens spent.
    pub usage: Usage,
    /// Fingerprint of model and engine; null in events that came before the model's hash was known.
    pub system_fingerprint: Option<String>,
    /// Revision and hash of the session that the turn began from; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_id: Option<String>,
    /// Citations and measures of an answer from a collection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail: Option<ChatGrounded>,
}

/// What a grounded chat answer adds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatGrounded {
    /// Trace of the answer.
    pub trace_id: String,
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
    /// Every step that was drawn, in order; absent when the answer was not made step by step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepRecord>>,
}

/// One choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChoice {
    /// From 0.
    pub index: usize,
    /// The answer.
    pub message: AssistantMessage,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
    /// The reason itself, where OpenAI's list has no word for it and `finish_reason` has the nearest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail_finish_reason: Option<&'static str>,
    /// When asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// What was dropped on the way; absent when nothing was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<RotationRecord>,
    /// Tokens that the loop guard took back before it went on; absent when it took none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rolled_back_tokens: Option<usize>,
}

/// The answer's message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AssistantMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// The text; null when there is none beside tool calls.
    pub content: Option<String>,
    /// Always null: this server refuses in `content`.
    pub refusal: Option<String>,
    /// What the model thought before it answered; absent when it did not, or when its thoughts are not told apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Functions to call, each whole and valid; absent without any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallMessage>,
}

/// Log-probabilities of one choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<TokenLogprob>,
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token as text; bytes that are no whole character become U+FFFD.
    pub token: String,
    /// ln p, before temperature and penalties.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens of the position.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TopLogprob {
    /// The token as text.
    pub token: String,
    /// ln p.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChunk {
    /// The same in all events.
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answers.
    pub model: String,
    /// Fingerprint of model and engine; null in events that came before the model's hash was known.
    pub system_fingerprint: Option<String>,
    /// Empty in the usage event.
    pub choices: Vec<ChatChunkChoice>,
    /// In the last event when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Revision and hash of the session that the turn began from; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_id: Option<String>,
    /// In the last content event of a grounded answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail: Option<ChatGrounded>,
}

/// One choice of an event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChunkChoice {
    /// From 0.
    pub index: usize,
    /// What is new.
    pub delta: Delta,
    /// In the choice's last event.
    pub finish_reason: Option<&'static str>,
    /// The reason itself, where OpenAI's list has no word for it and `finish_reason` has the nearest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exrail_finish_reason: Option<&'static str>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<ChatLogprobs>,
    /// In an event of its own, before the text that does not see what was dropped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<RotationRecord>,
}

/// What is new in an event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Delta {
    /// In the first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// New text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// New thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// A call, told when it is whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}
