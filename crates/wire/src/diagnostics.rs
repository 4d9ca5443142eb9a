//! `POST /v1/diagnostics`.

use serde::Deserialize;

use crate::Unknown;

/// A gold set to measure what is served with. The answer is the report of `exrail diagnose`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct DiagnosticsRequest {
    /// A generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// The collection; the server's only one when absent.
    pub collection: Option<String>,
    /// The gold set, JSON lines.
    pub gold: String,
    /// A question of the user's own: its ΔS and what it retrieves.
    pub question: Option<String>,
    /// Ask every question, and write at length.
    pub deep: Option<bool>,
    /// Answerable questions to answer.
    pub answered: Option<usize>,
    /// Unanswerable questions to ask.
    pub unanswerable: Option<usize>,
    /// Questions to probe for λ.
    pub lambda: Option<usize>,
    /// Tokens of the cache probe, at least 2,048.
    pub cache_tokens: Option<usize>,
    /// Seed that chooses the samples.
    pub sample_seed: Option<u64>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}
