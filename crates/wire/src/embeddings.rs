//! `POST /v1/embeddings`.

use serde::{Deserialize, Serialize};

use crate::Unknown;

/// An embedding request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct EmbeddingRequest {
    /// The encoder's name in `/v1/models`.
    pub model: String,
    /// What to embed.
    pub input: EmbeddingInput,
    /// `float` or `base64` (little-endian f32).
    pub encoding_format: Option<String>,
    /// Must equal the encoder's width when given.
    pub dimensions: Option<usize>,
    /// A name of the end user.
    pub user: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// One text or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum EmbeddingInput {
    /// One text.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// The vectors, in the order of the input.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EmbeddingResponse {
    /// Always `list`.
    pub object: &'static str,
    /// One a text.
    pub data: Vec<Embedding>,
    /// The encoder.
    pub model: String,
    /// Tokens read.
    pub usage: EmbeddingUsage,
}

/// One vector.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Embedding {
    /// Always `embedding`.
    pub object: &'static str,
    /// Position in the input.
    pub index: usize,
    /// An array of floats, or base64 text.
    pub embedding: serde_json::Value,
}

/// Tokens read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct EmbeddingUsage {
    /// Tokens of all texts.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}
