//! The body of every failure, in the shape that OpenAI's clients read.

use serde::Serialize;

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
}
