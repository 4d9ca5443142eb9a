//! `/v1/exrail/sessions`: conversations whose keys and values are kept on disk.

use serde::{Deserialize, Serialize};

use crate::{Prompt, RequestMessage, Unknown};

/// Which conversation to save: its messages, or its text or tokens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SessionRequest {
    /// The generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// The messages so far, as `/v1/chat/completions` had them, with its answers.
    pub messages: Option<Vec<RequestMessage>>,
    /// The same of `/v1/completions`: one text, or the token ids of one prompt.
    pub prompt: Option<Prompt>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Into which model's cache to restore; the body may be left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct RestoreRequest {
    /// The generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A session that was saved or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionResponse {
    /// Always `exrail.session`.
    pub object: &'static str,
    /// Its name.
    pub name: String,
    /// Tokens whose keys and values are in it: whole pages.
    pub tokens: usize,
    /// Bytes of its file.
    pub bytes: u64,
}

/// The sessions of one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionList {
    /// Always `list`.
    pub object: &'static str,
    /// By name.
    pub data: Vec<SessionCard>,
}

/// A session that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionCard {
    /// Always `exrail.session`.
    pub object: &'static str,
    /// Its name.
    pub name: String,
    /// Bytes of its file.
    pub bytes: u64,
    /// When it was last saved or restored, RFC 3339.
    pub used: String,
}

/// A session that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionDeleted {
    /// Always `exrail.session`.
    pub object: &'static str,
    /// Its name.
    pub name: String,
    /// Always true.
    pub deleted: bool,
}
