//! [`Refusal`]: every answer that is not a 200, in the real server's shapes.

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// Why a request got nothing.
#[derive(Debug)]
pub(super) enum Refusal {
    /// `{"detail": TEXT}`.
    Detail(StatusCode, String),
    /// 405, and the method that the path has.
    Method(&'static str),
    /// 422 with a list of what is wrong.
    Invalid(Vec<Value>),
    /// The prompt is longer than the context.
    TooLong(String),
    /// A bug of the real server's validators.
    Broken,
}

impl Refusal {
    /// 400.
    pub(super) fn bad(text: impl Into<String>) -> Refusal {
        Refusal::Detail(StatusCode::BAD_REQUEST, text.into())
    }

    /// 422 that is not a validator's.
    pub(super) fn unprocessable(text: impl Into<String>) -> Refusal {
        Refusal::Detail(StatusCode::UNPROCESSABLE_ENTITY, text.into())
    }

    /// 503.
    pub(super) fn unavailable(text: impl Into<String>) -> Refusal {
        Refusal::Detail(StatusCode::SERVICE_UNAVAILABLE, text.into())
    }

    /// No model is loaded, or one is loading.
    pub(super) fn no_model() -> Refusal {
        Refusal::unavailable("No models are currently loaded.")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Refusal::Detail(status, text) => {
                (status, Json(json!({"detail": text}))).into_response()
            }
            Refusal::Method(allowed) => (
                StatusCode::METHOD_NOT_ALLOWED,
                [(header::ALLOW, allowed)],
                Json(json!({"detail": "Method Not Allowed"})),
            )
                .into_response(),
            Refusal::Invalid(details) => {
                (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"detail": details}))).into_response()
            }
            Refusal::TooLong(message) => {
                let error = json!({"message": message, "type": "invalid_request_error",
                    "param": null, "code": "context_length_exceeded"});
                (StatusCode::BAD_REQUEST, Json(json!({"error": error}))).into_response()
            }
            Refusal::Broken => {
                (StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error").into_response()
            }
        }
    }
}
