//! `POST /v1/tokenize` and `/v1/detokenize`.

use serde::{Deserialize, Serialize};

use crate::Unknown;

/// Text to token ids.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct TokenizeRequest {
    /// A generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// The text.
    pub text: String,
    /// Read control-token literals as control tokens; false when absent.
    pub parse_special: Option<bool>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenizeResponse {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Their number.
    pub count: usize,
}

/// Token ids to text.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct DetokenizeRequest {
    /// A generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DetokenizeResponse {
    /// The text; bytes that are no whole character become U+FFFD.
    pub text: String,
}
