//! Every failure of a request at the gateway: its status, code and body, in one match.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use exrail_server::{ApiError, TraceError};
use exrail_wire::{ErrorBody, ErrorDetail};
use thiserror::Error;

use crate::{fault::UpstreamFault, settle::Violation, upstream::FencePhase};

/// Why a request was not answered.
#[derive(Debug, Error)]
pub(crate) enum GatewayError {
    /// The request itself.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// No upstream may be asked yet.
    #[error("upstream `{upstream}` is behind its warm-up fence, phase {phase:?}: {reason}")]
    NotReady { upstream: String, phase: FencePhase, reason: String },
    /// It said that it has too much to do, and is not asked meanwhile.
    #[error(
        "upstream `{upstream}` is busy and is not asked meanwhile; ask again after {retry_after_s} s"
    )]
    Resting { upstream: String, retry_after_s: u64 },
    /// Nobody serves it.
    #[error("model `{found}`: expected one of {known:?}")]
    UnknownModel { found: String, known: Vec<String> },
    /// A field that the upstream would ignore.
    #[error("`{field}`: {kind} ignores it; remove it, or start the gateway with --pass-unhonoured")]
    NotHonoured { field: &'static str, kind: &'static str },
    /// The upstream did something else than to answer.
    #[error("upstream `{upstream}`: {fault}")]
    Upstream { upstream: String, fault: UpstreamFault },
    /// No answer conformed.
    #[error("the answer does not conform, and {repairs} further attempts did neither: {violation}")]
    NotConforming { violation: Violation, repairs: usize },
    /// The record could not be written, and the answer is withheld.
    #[error("{0}")]
    Trace(#[from] TraceError),
}

impl GatewayError {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Api(error) => error.status(),
            Self::NotReady { .. } | Self::Trace(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Resting { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::UnknownModel { .. } => StatusCode::NOT_FOUND,
            Self::NotHonoured { .. } => StatusCode::BAD_REQUEST,
            Self::Upstream { fault, .. } => {
                StatusCode::from_u16(fault.status()).unwrap_or(StatusCode::BAD_GATEWAY)
            }
            Self::NotConforming { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }

    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Api(error) => error.code(),
            Self::NotReady { .. } => "not_ready",
            Self::Resting { .. } => "upstream_busy",
            Self::UnknownModel { .. } => "model_not_found",
            Self::NotHonoured { .. } => "unsupported_field",
            Self::Upstream { fault, .. } => fault.code(),
            Self::NotConforming { .. } => "schema_violation",
            Self::Trace(_) => "trace_unavailable",
        }
    }

    fn param(&self) -> Option<String> {
        match self {
            Self::UnknownModel { .. } => Some("model".to_owned()),
            Self::NotHonoured { field, .. } => Some((*field).to_owned()),
            Self::Api(_)
            | Self::NotReady { .. }
            | Self::Resting { .. }
            | Self::Upstream { .. }
            | Self::NotConforming { .. }
            | Self::Trace(_) => None,
        }
    }

    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::NotReady { .. } => Some(2),
            Self::Resting { retry_after_s, .. }
            | Self::Upstream { fault: UpstreamFault::Busy { retry_after_s }, .. } => {
                Some(*retry_after_s)
            }
            Self::Api(_)
            | Self::UnknownModel { .. }
            | Self::NotHonoured { .. }
            | Self::Upstream { .. }
            | Self::NotConforming { .. }
            | Self::Trace(_) => None,
        }
    }

    /// The body alone, for failures inside a stream.
    pub(crate) fn body(&self) -> ErrorBody {
        match self {
            Self::Api(error) => error.body(),
            Self::Upstream { upstream, fault } => fault.body(upstream),
            Self::NotReady { .. }
            | Self::Resting { .. }
            | Self::UnknownModel { .. }
            | Self::NotHonoured { .. }
            | Self::NotConforming { .. }
            | Self::Trace(_) => {
                let kind = match self.status() {
                    StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST => "invalid_request_error",
                    StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
                    _ => "server_error",
                };
                ErrorBody {
                    error: ErrorDetail {
                        message: self.to_string(),
                        kind,
                        param: self.param(),
                        code: self.code(),
                        diff: Vec::new(),
                    },
                }
            }
        }
    }
}

impl IntoResponse for GatewayError {
    fn into_response(self) -> Response {
        if let Self::Api(error) = self {
            return error.into_response();
        }
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
