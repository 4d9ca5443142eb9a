//! `GET /v1/models`.

use serde::Serialize;

/// The models that this server answers for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<ModelCard>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelCard {
    /// The name to use in requests.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// Seconds since 1970 at which it was loaded; 0 while it is not.
    pub created: i64,
    /// Always `exrail`.
    pub owned_by: &'static str,
    /// `generator` or `encoder`, fingerprints and limits.
    pub exrail: serde_json::Value,
}
