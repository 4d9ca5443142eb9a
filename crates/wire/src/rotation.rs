//! Rotation in requests and answers (guardrails G-16).

use serde::{Deserialize, Serialize};

use crate::Unknown;

/// What is to happen when prompt and answer outgrow their place in the cache; absent fields take the
/// server's.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct RotationFields {
    /// `off`, `reprefill`, `sink_window` or `stop`.
    pub policy: Option<String>,
    /// Tokens of prompt and answer at which it happens.
    pub rotate_at: Option<usize>,
    /// Last tokens that are kept.
    pub window: Option<usize>,
    /// First tokens that are kept, of `sink_window` alone.
    pub sink: Option<usize>,
    /// Of a chat: messages that are never dropped, counted from 0. System messages never are.
    pub pin_messages: Option<Vec<usize>>,
    /// Of a text completion: ranges of the prompt's tokens that are never dropped, from and to, the latter
    /// not included.
    pub pin_tokens: Option<Vec<[usize; 2]>>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// One rotation of one choice. Ranges are of the tokens of prompt and answer, from the prompt's first; the
/// latter end is not included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RotationRecord {
    /// How.
    pub policy: &'static str,
    /// Tokens of the answer before it.
    pub at: usize,
    /// What the model does not see any more.
    pub dropped: Vec<[usize; 2]>,
    /// What it goes on with.
    pub kept: Vec<[usize; 2]>,
    /// Tokens of the context before.
    pub tokens_before: usize,
    /// Tokens of the context after.
    pub tokens_after: usize,
}
