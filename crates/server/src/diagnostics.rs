//! What a server needs to measure itself: somebody who can, and one at a time.

use exrail_wire::DiagnosticsRequest;
use serde_json::Value;

use crate::Services;

/// Measures what is served.
pub trait Diagnostics: Send + Sync {
    /// The report over the services as they are, under the name of its trace; may block for minutes. `is_over` says that
    /// nobody waits for it any more.
    ///
    /// # Errors
    /// See [`DiagnosticsError`].
    fn report(
        &self,
        services: &Services,
        collection: &str,
        asked: &DiagnosticsRequest,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(String, Value), DiagnosticsError>;
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum DiagnosticsError {
    /// What was asked cannot be measured.
    #[error("{field}: {problem}")]
    Refused {
        /// The field of the request.
        field: &'static str,
        /// What was expected and what was found.
        problem: String,
    },
    /// Nobody waits any more.
    #[error("the client hung up")]
    Over,
    /// A part of the system failed.
    #[error("{0}")]
    Failed(String),
}
