//! The body of every failure, in the shape that OpenAI's clients read.

use serde::Serialize;
use serde_json::Value;

/// `{"error": {…}}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorBody {
    /// The failure.
    pub error: ErrorDetail,
}

/// One failure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorDetail {
    /// What is wrong, what was expected and found, what to do next.
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `server_error`, …
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The request field at fault.
    pub param: Option<String>,
    /// A stable name of the failure.
    pub code: &'static str,
    /// What a session and a request do not agree on; absent from other failures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub diff: Vec<FieldDifference>,
}

/// One thing that a request and what is stored do not agree on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FieldDifference {
    /// Its name.
    pub field: String,
    /// What the request takes it for; null: for absent.
    pub expected: Value,
    /// What is there; null: nothing.
    pub found: Value,
}
