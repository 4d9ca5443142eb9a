//! The JSON that crosses the wire: OpenAI-compatible requests and responses, exrail's own, the trace
//! records, and server-sent-event framing. Shapes only; what a field means is decided in `server`.
//!
//! A request type keeps every field it does not know in `unknown`, so that the server can refuse it
//! by name instead of ignoring it.

mod ask;
mod chat;
mod completions;
mod constraints;
mod diagnostics;
mod embeddings;
mod error;
mod extra;
mod models;
mod rotation;
mod sampling;
pub mod schemas;
mod sessions;
pub mod sse;
mod structured;
mod tokenize;
mod trace;

pub use ask::{AskMetrics, AskRequest, AskResponse, Citation, Grounding};
pub use chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatGrounded, ChatLogprobs,
    ChatRequest, ChatResponse, Content, ContentPart, Delta, RequestMessage, StreamOptions,
    TokenLogprob, TopLogprob,
};
pub use completions::{
    CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Prompt,
};
pub use constraints::{ConstraintField, ConstraintRecord};
pub use diagnostics::DiagnosticsRequest;
pub use embeddings::{
    Embedding, EmbeddingInput, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage,
};
pub use error::{ErrorBody, ErrorDetail, FieldDifference};
pub use extra::{
    ExemptName, ExtraFields, LoopGuardField, LoopGuardFields, OnLoopName, PriorityName,
    ToolTaintName,
};
pub use models::{ModelCard, ModelList};
pub use rotation::{RotationFields, RotationRecord};
pub use sampling::{FieldError, SamplingFields, Stop, Usage, UsageDetails};
pub use sessions::{
    BeliefFields, DeleteRequest, RestoreRequest, SessionCard, SessionDeleted, SessionField,
    SessionList, SessionRequest, SessionResponse,
};
pub use structured::{
    CallRecord, CalledFunction, ContractRecord, FunctionDelta, FunctionField, GrammarField,
    GrammarKind, NamedSchema, RequestCall, RequestCallFunction, ResponseFormat, StructuredFields,
    StructuredRecord, ToolCallDelta, ToolCallMessage, ToolChoiceField, ToolField, ToolKind,
};
pub use tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
pub use trace::{
    AnswerChecks, AnswerMetrics, AnswerRecord, Latency, Pins, PromptRecord, QueryRecord,
    RelayLatency, RelayRecord, RetrievedItem, SegmentRecord, SlotRecord, SpanRecord, StepRecord,
    TRACE_SCHEMA_VERSION, TokenCounts, TraceBody, TraceEnvelope,
};

/// Fields of a request that its type does not declare.
pub type Unknown = std::collections::BTreeMap<String, serde_json::Value>;
