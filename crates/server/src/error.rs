//! Every failure of a request: its status, code and body, in one match.

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use exrail_engine::{Difference, Memory, SequenceFault, SessionError, SubmitError};
use exrail_grammar::GrammarError;
use exrail_wire::{ErrorBody, ErrorDetail, FieldDifference, FieldError};
use thiserror::Error;

use crate::{
    echo::{Brief, brief},
    trace::TraceError,
};

/// Why a request was not answered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApiError {
    /// No key, or a wrong one.
    #[error("expected `Authorization: Bearer KEY` with a key of this server")]
    Unauthorized,
    /// A request that did not come by a loopback name, on a server without keys.
    #[error(
        "host `{}`: a server without API keys answers to localhost only; start it with --api-key-file to serve others",
        Brief(found)
    )]
    ForeignHost {
        /// The Host header.
        found: String,
    },
    /// A page of another origin wants to change something (L3).
    #[error(
        "origin `{}`: expected none, or the host that the request names; pages of other origins are not served",
        Brief(found)
    )]
    ForeignOrigin {
        /// The Origin header.
        found: String,
    },
    /// The key is not one for this route.
    #[error("expected a key with the role `{needed}`")]
    Forbidden {
        /// The role.
        needed: &'static str,
    },
    /// The body is compressed.
    #[error("content-encoding `{}`: expected an uncompressed body", Brief(found))]
    Encoded {
        /// The header.
        found: String,
    },
    /// The body did not come in time.
    #[error("body: expected all of it within {limit_s} s")]
    BodyLate {
        /// The limit in seconds.
        limit_s: f64,
    },
    /// Not ready yet.
    #[error("not ready: phase `{phase}`; ask again after {retry_after_s} s")]
    NotReady {
        /// Phase of the boot.
        phase: &'static str,
        /// Seconds to wait.
        retry_after_s: u64,
    },
    /// The boot failed.
    #[error("not ready: phase `{phase}` failed: {reason}")]
    BootFailed {
        /// Phase of the boot.
        phase: &'static str,
        /// Why.
        reason: String,
    },
    /// The body is no JSON.
    #[error("body: {}", Brief(problem))]
    BadJson {
        /// The parser's words.
        problem: String,
    },
    /// The body is too large.
    #[error("body: expected at most {limit_bytes} bytes")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// A field has the wrong type or value.
    #[error("`{}`: {}", Brief(field), Brief(problem))]
    BadField {
        /// Name or path of the field.
        field: String,
        /// Expected and found.
        problem: String,
    },
    /// A field that this server does not support.
    #[error("`{}`: {why}; remove it", Brief(field))]
    UnsupportedField {
        /// Name or path of the field.
        field: String,
        /// Why it is refused.
        why: &'static str,
    },
    /// A constraint that cannot be honoured; nothing was generated.
    #[error("`{field}`: {}", grammar_words(error))]
    Constraint {
        /// Path of the field that it came in.
        field: String,
        /// Why, with the place inside.
        error: GrammarError,
    },
    /// A contract that is not the one that the client takes it for.
    #[error(
        "`{field}`: expected the hash of these parameters, {expected}, found `{}`",
        Brief(found)
    )]
    ContractMismatch {
        /// Path of the field.
        field: String,
        /// What the parameters have.
        expected: String,
        /// What the client sent.
        found: String,
    },
    /// An answer that is not what was asked for; it is withheld (G-13).
    #[error("the answer does not conform: {problem}; withheld after {attempts} attempts")]
    NotConforming {
        /// Where, what was expected and found.
        problem: String,
        /// Answers that were generated.
        attempts: usize,
    },
    /// An answer that a hard rule of the request forbids; it is withheld (G-31).
    #[error(
        "`constraints[{rule}]`: expected an answer that keeps this rule, found one that matches its \
         forbid[{pattern}]; withheld. Contradictions in other words are not looked for: nli not_available"
    )]
    Contradiction {
        /// The rule, from 0.
        rule: usize,
        /// The pattern among those of the rule, from 0.
        pattern: usize,
    },
    /// The hard rules of the request are not in the context of its answer; nothing was told (G-31).
    #[error("constraints: {problem}")]
    ConstraintEcho {
        /// Expected and found.
        problem: String,
    },
    /// No such model.
    #[error("model `{}`: expected one of {known}", Brief(found))]
    UnknownModel {
        /// What was asked.
        found: String,
        /// What there is.
        known: String,
    },
    /// Too many requests wait for models already.
    #[error(
        "model `{model}`: expected fewer than {limit} requests waiting for a model to be loaded; ask again after \
         {retry_after_s} s"
    )]
    ModelBusy {
        /// What was asked.
        model: String,
        /// Limit of waiting requests.
        limit: usize,
        /// Seconds in which the model should answer, from what loads have taken.
        retry_after_s: u64,
    },
    /// The model could not be loaded.
    #[error("model `{model}` could not be loaded: {reason}; tried again after {retry_after_s} s")]
    LoadFailed {
        /// What was asked.
        model: String,
        /// Why.
        reason: String,
        /// Seconds until it is tried again.
        retry_after_s: u64,
    },
    /// The deadline passed before the model was loaded.
    #[error("deadline: passed after {waited_s:.1} s of waiting until model `{model}` is loaded")]
    ModelLate {
        /// What was asked.
        model: String,
        /// Seconds that were waited.
        waited_s: f64,
    },
    /// The model had to go before the answer had ended.
    #[error(
        "model `{model}` was unloaded for another one {limit_s} s after its last new request, before this answer \
         had ended; ask again, or start the server with a longer --swap-drain-s"
    )]
    SwappedOut {
        /// What answered.
        model: String,
        /// Seconds that requests get.
        limit_s: u64,
    },
    /// No model can be loaded any more.
    #[error("models: {reason}")]
    ModelStuck {
        /// Why.
        reason: String,
    },
    /// Too few tool calls of the model could be read lately (G-29).
    #[error(
        "tools: expected that at least 98 % of the calls of model `{model}` in the last 5 minutes could be read, \
         found fewer; ask again after {retry_after_s} s, or demand a call with tool_choice"
    )]
    ToolCircuitOpen {
        /// What was asked.
        model: String,
        /// Seconds until it is closed, if no further call fails.
        retry_after_s: u64,
    },
    /// No such collection.
    #[error("collection `{}`: expected one of {known}", Brief(found))]
    UnknownCollection {
        /// What was asked.
        found: String,
        /// What there is.
        known: String,
    },
    /// Something that this server was started without.
    #[error("{what}: not available on this server: {why}")]
    NotAvailable {
        /// What was asked for.
        what: &'static str,
        /// Why, and what to do.
        why: &'static str,
    },
    /// One diagnosis at a time: two would measure each other.
    #[error("diagnostics: expected no other one to run; ask again after {retry_after_s} s")]
    DiagnosisRuns {
        /// Seconds.
        retry_after_s: u64,
    },
    /// A diagnosis came to nothing.
    #[error("diagnostics: {0}")]
    Diagnosis(String),
    /// The chat template refused the messages.
    #[error("messages: the model's chat template refused them: {}", Brief(.0))]
    Template(String),
    /// What the template made of the messages is no prompt to answer (G-12).
    #[error("messages: prompt lint `{rule}`: {}", Brief(problem))]
    PromptLint {
        /// The rule.
        rule: &'static str,
        /// Where, what was expected and what was found.
        problem: String,
    },
    /// The engine refused the request.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine gave the sequence up.
    #[error("generation failed: {0}")]
    Sequence(#[from] SequenceFault),
    /// The engine went away in the middle.
    #[error("generation ended without a result")]
    Lost,
    /// Nobody waits for the answer any more.
    #[error("the client hung up")]
    HungUp,
    /// A collection could not be searched.
    #[error("search: {0}")]
    Search(String),
    /// A grounded answer could not be generated.
    #[error("answer: {0}")]
    Ask(String),
    /// The encoder failed.
    #[error("encoder: {0}")]
    Encode(String),
    /// A session was not saved, found or restored.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The trace could not be written, so nothing may be released (G-14).
    #[error("{0}; the answer is withheld")]
    Trace(#[from] TraceError),
    /// No such route.
    #[error("no such route: {} {}", Brief(method), Brief(path))]
    NoRoute {
        /// Method.
        method: String,
        /// Path.
        path: String,
    },
    /// A handler ended without a result.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        Self::BadField { field: error.field, problem: error.problem }
    }
}

/// What the client is told.
struct Told {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    retry_after_s: Option<u64>,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const UNSUPPORTED: StatusCode = StatusCode::UNSUPPORTED_MEDIA_TYPE;
const PERMISSION: &str = "permission_error";

impl ApiError {
    fn told(&self) -> Told {
        let told =
            |status, kind, code| Told { status, kind, code, param: None, retry_after_s: None };
        let param = |code, param: &str| Told {
            param: Some(brief(param)),
            ..told(StatusCode::BAD_REQUEST, INVALID, code)
        };
        let failed = |code| told(StatusCode::INTERNAL_SERVER_ERROR, SERVER, code);
        let unavailable = |code| told(StatusCode::SERVICE_UNAVAILABLE, SERVER, code);
        let later =
            |code, seconds: &u64| Told { retry_after_s: Some(*seconds), ..unavailable(code) };
        match self {
            Self::Unauthorized => {
                told(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key")
            }
            Self::ForeignHost { .. } => told(StatusCode::FORBIDDEN, INVALID, "foreign_host"),
            Self::ForeignOrigin { .. } => told(StatusCode::FORBIDDEN, INVALID, "foreign_origin"),
            Self::Forbidden { .. } => told(StatusCode::FORBIDDEN, PERMISSION, "insufficient_role"),
            Self::Encoded { .. } => told(UNSUPPORTED, INVALID, "body_encoded"),
            Self::BodyLate { .. } => told(StatusCode::REQUEST_TIMEOUT, INVALID, "body_late"),
            Self::ToolCircuitOpen { retry_after_s: s, .. } => later("tool_circuit_open", s),
            Self::ModelBusy { retry_after_s, .. } => later("model_busy", retry_after_s),
            Self::LoadFailed { retry_after_s, .. } => later("model_load_failed", retry_after_s),
            Self::ModelLate { .. } => {
                told(StatusCode::GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded")
            }
            Self::SwappedOut { .. } => unavailable("model_swapped_out"),
            Self::ModelStuck { .. } => unavailable("model_stuck"),
            Self::NotReady { retry_after_s, .. } => later("not_ready", retry_after_s),
            Self::BootFailed { .. } => unavailable("boot_failed"),
            Self::BadJson { .. } => told(StatusCode::BAD_REQUEST, INVALID, "invalid_json"),
            Self::BodyTooLarge { .. } => {
                told(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large")
            }
            Self::BadField { field, .. } => param("invalid_value", field),
            Self::UnsupportedField { field, .. } => param("unsupported_field", field),
            Self::Constraint { field, error } => constraint_told(field, error, told, param),
            Self::ContractMismatch { field, .. } => {
                Told { status: StatusCode::CONFLICT, ..param("contract_mismatch", field) }
            }
            Self::NotConforming { .. } => {
                told(StatusCode::UNPROCESSABLE_ENTITY, SERVER, "schema_violation")
            }
            Self::Contradiction { rule, .. } => Told {
                param: Some(format!("constraints[{rule}]")),
                ..told(StatusCode::UNPROCESSABLE_ENTITY, SERVER, "constraint_contradiction")
            },
            Self::ConstraintEcho { .. } => failed("constraint_echo"),
            Self::UnknownModel { .. } => Told {
                param: Some("model".into()),
                ..told(StatusCode::NOT_FOUND, INVALID, "model_not_found")
            },
            Self::UnknownCollection { .. } => Told {
                param: Some("collection".into()),
                ..told(StatusCode::NOT_FOUND, INVALID, "collection_not_found")
            },
            Self::NotAvailable { .. } => {
                told(StatusCode::NOT_IMPLEMENTED, INVALID, "not_available")
            }
            Self::DiagnosisRuns { retry_after_s } => later("diagnosis_running", retry_after_s),
            Self::Diagnosis(_) => failed("diagnosis_failed"),
            Self::Template(_) => param("template_refused", "messages"),
            Self::PromptLint { .. } => Told {
                status: StatusCode::UNPROCESSABLE_ENTITY,
                ..param("prompt_lint", "messages")
            },
            Self::Submit(error) => submit_told(error, told, param),
            Self::Sequence(fault) => sequence_told(fault, told),
            Self::Lost | Self::Ask(_) => failed("generation_failed"),
            // Nobody reads it; the number is nginx's.
            Self::HungUp => told(client_closed_request(), INVALID, "client_gone"),
            Self::Search(_) => failed("search_failed"),
            Self::Encode(_) => told(StatusCode::BAD_REQUEST, INVALID, "encode_failed"),
            Self::Session(error) => session_told(error, told, param),
            Self::Trace(TraceError::Contract(_)) => failed("trace_contract"),
            Self::Trace(_) => unavailable("trace_unavailable"),
            Self::NoRoute { .. } => told(StatusCode::NOT_FOUND, INVALID, "no_such_route"),
            Self::Internal(_) => failed("internal"),
        }
    }

    /// The status alone, for counters.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.told().status
    }

    /// The stable name alone, for records.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.told().code
    }

    /// The body alone, for failures inside a stream.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let told = self.told();
        ErrorBody {
            error: ErrorDetail {
                message: self.to_string(),
                kind: told.kind,
                param: told.param,
                code: told.code,
                diff: self.diff(),
            },
        }
    }

    /// What a session and a request do not agree on.
    fn diff(&self) -> Vec<FieldDifference> {
        let Self::Session(error) = self else { return Vec::new() };
        let told = |Difference { field, expected, found }: &Difference| FieldDifference {
            field: field.clone(),
            expected: expected.clone(),
            found: found.clone(),
        };
        if let SessionError::Conflict { differences, .. } = error {
            return differences.iter().map(told).collect();
        }
        if let SessionError::Pin { pin, expected, found } = error {
            let (expected, found) = (expected.clone().into(), found.clone().into());
            return vec![FieldDifference { field: pin.clone(), expected, found }];
        }
        Vec::new()
    }

    /// The session that was asked for and is not what it was taken for.
    fn session(&self) -> Option<(String, Option<Memory>)> {
        let Self::Session(
            SessionError::Conflict { name, memory, .. } | SessionError::Busy { name, memory },
        ) = self
        else {
            return None;
        };
        Some((name.clone(), memory.clone()))
    }
}

fn client_closed_request() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

fn session_told(
    error: &SessionError,
    told: impl Fn(StatusCode, &'static str, &'static str) -> Told,
    param: impl Fn(&'static str, &str) -> Told,
) -> Told {
    let conflict = |code| told(StatusCode::CONFLICT, INVALID, code);
    match error {
        SessionError::Name { .. } => param("invalid_value", "name"),
        SessionError::NotFound { .. } => told(StatusCode::NOT_FOUND, INVALID, "session_not_found"),
        SessionError::NoPrefixCache => told(StatusCode::NOT_IMPLEMENTED, INVALID, "not_available"),
        SessionError::Conflict { .. } => conflict("session_conflict"),
        SessionError::Busy { .. } => conflict("session_busy"),
        SessionError::NothingCached { .. } => conflict("session_not_cached"),
        SessionError::Lost => conflict("session_lost"),
        SessionError::Pin { .. } => conflict("session_pin_mismatch"),
        SessionError::Version { .. } => conflict("session_version"),
        SessionError::NotASession
        | SessionError::Length { .. }
        | SessionError::Header { .. }
        | SessionError::Owner { .. }
        | SessionError::Page { .. }
        | SessionError::Digest => conflict("session_damaged"),
        SessionError::TooLarge { .. } => {
            told(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "session_too_large")
        }
        SessionError::NoRoom { .. } => {
            told(StatusCode::SERVICE_UNAVAILABLE, SERVER, "session_no_room")
        }
        SessionError::Unnamed => told(StatusCode::SERVICE_UNAVAILABLE, SERVER, "not_ready"),
        SessionError::Stopped => told(StatusCode::SERVICE_UNAVAILABLE, SERVER, "engine_stopped"),
        // `SessionError` is open: what is left is the machine's.
        SessionError::InUse { .. } | SessionError::Io { .. } | _ => {
            told(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "session_failed")
        }
    }
}

/// What is wrong with a constraint. Its place and the reason hold names that the client made up.
fn grammar_words(error: &GrammarError) -> String {
    match error {
        GrammarError::Unsupported { pointer, reason } => {
            format!("{}: {}", Brief(pointer), Brief(reason))
        }
        GrammarError::Malformed(problem) => GrammarError::Malformed(brief(problem)).to_string(),
        GrammarError::TooLarge { .. } | GrammarError::Vocabulary(_) => error.to_string(),
    }
}

fn constraint_told(
    field: &str,
    error: &GrammarError,
    told: impl Fn(StatusCode, &'static str, &'static str) -> Told,
    param: impl Fn(&'static str, &str) -> Told,
) -> Told {
    // A regular expression and a grammar have no keywords that could be unsupported.
    let is_text = field == "regex" || field.starts_with("grammar");
    match error {
        GrammarError::Unsupported { .. } if is_text => param("invalid_grammar", field),
        GrammarError::Unsupported { .. } => param("unsupported_schema", field),
        GrammarError::Malformed(_) => param("invalid_grammar", field),
        GrammarError::TooLarge { .. } => param("grammar_too_large", field),
        // Not the request's fault: no answer of this model can be constrained, and none goes out as if it were.
        GrammarError::Vocabulary(_) => told(StatusCode::NOT_IMPLEMENTED, INVALID, "not_available"),
    }
}

fn sequence_told(
    fault: &SequenceFault,
    told: impl Fn(StatusCode, &'static str, &'static str) -> Told,
) -> Told {
    let code = match fault {
        SequenceFault::DeadlineExceeded { .. } => {
            return told(StatusCode::GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded");
        }
        SequenceFault::NumericFault { .. } => "numeric_fault",
        SequenceFault::KvIntegrity(_) => "kv_integrity",
        SequenceFault::GrammarFault { .. } => "grammar_fault",
        SequenceFault::StepPanicked { .. } | SequenceFault::Stopped | _ => "generation_failed",
    };
    told(StatusCode::INTERNAL_SERVER_ERROR, SERVER, code)
}

fn submit_told(
    error: &SubmitError,
    told: impl Fn(StatusCode, &'static str, &'static str) -> Told,
    param: impl Fn(&'static str, &str) -> Told,
) -> Told {
    match error {
        SubmitError::PromptTooLong { .. } => param("context_length_exceeded", "prompt"),
        SubmitError::TooManyTokens { .. } => param("context_length_exceeded", "max_tokens"),
        SubmitError::QueueFull { retry_after_s, .. } => Told {
            retry_after_s: Some(*retry_after_s),
            ..told(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full")
        },
        SubmitError::Overloaded { retry_after_s, .. } => Told {
            retry_after_s: Some(*retry_after_s),
            ..told(StatusCode::SERVICE_UNAVAILABLE, SERVER, "overloaded")
        },
        SubmitError::Stopped => told(StatusCode::SERVICE_UNAVAILABLE, SERVER, "engine_stopped"),
        SubmitError::EmptyPrompt => param("empty_prompt", "prompt"),
        SubmitError::UnknownToken { .. } => param("unknown_token", "prompt"),
        SubmitError::BadOption { field, .. } => param("invalid_value", field),
        // Clients name no vocabulary: the server has mixed up two of its models.
        SubmitError::ForeignGrammar { .. } => {
            told(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "foreign_grammar")
        }
        // `SubmitError` is open: a refusal that this server does not know yet is still the
        // client's.
        _ => told(StatusCode::BAD_REQUEST, INVALID, "refused"),
    }
}

/// Rides along with the response of a failure, for the layer that traces it.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// Name and memory of a session that is not what it was taken for.
    pub(crate) session: Option<(String, Option<Memory>)>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let told = self.told();
        let mut response = (told.status, Json(self.body())).into_response();
        let (message, session) = (self.to_string(), self.session());
        response.extensions_mut().insert(Failure { code: told.code, message, session });
        if let Some(seconds) = told.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if told.status == StatusCode::GATEWAY_TIMEOUT {
            // OpenAI's clients would send it again, to a server that was too slow for it.
            let name = HeaderName::from_static("x-should-retry");
            response.headers_mut().insert(name, HeaderValue::from_static("false"));
        }
        if told.status == StatusCode::UNAUTHORIZED {
            let name: HeaderName = header::WWW_AUTHENTICATE;
            response.headers_mut().insert(name, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
