//! `/v1/exrail/sessions`: conversations whose keys and values are kept on disk.

use serde::{Deserialize, Serialize};

use crate::{FieldError, Prompt, RequestMessage, Unknown, sampling::field};

/// What a request takes a session for: the revision and the hash, or both in short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BeliefFields {
    /// The revision; 0: there is none.
    pub mem_rev: Option<u64>,
    /// The hash, 64 hexadecimal digits.
    pub mem_hash: Option<String>,
    /// `REV:HASH`, with the first 16 digits of the hash.
    pub context_id: Option<String>,
}

impl BeliefFields {
    /// Takes these fields out of a request's undeclared ones.
    ///
    /// # Errors
    /// The first field of the wrong type.
    pub fn take(unknown: &mut Unknown) -> Result<Self, FieldError> {
        Ok(Self {
            mem_rev: field(unknown, "mem_rev")?,
            mem_hash: field(unknown, "mem_hash")?,
            context_id: field(unknown, "context_id")?,
        })
    }
}

/// The session that a turn begins from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionField {
    /// Its name.
    pub name: String,
    /// See [`BeliefFields`].
    pub mem_rev: Option<u64>,
    /// See [`BeliefFields`].
    pub mem_hash: Option<String>,
    /// See [`BeliefFields`].
    pub context_id: Option<String>,
    /// Whether other turns may begin from it meanwhile; false when absent.
    pub read_only: Option<bool>,
}

impl SessionField {
    /// What the request takes it for.
    #[must_use]
    pub fn belief(&self) -> BeliefFields {
        let (mem_hash, context_id) = (self.mem_hash.clone(), self.context_id.clone());
        BeliefFields { mem_rev: self.mem_rev, mem_hash, context_id }
    }
}

/// Which conversation to save: its messages, or its text or tokens.
///
/// What it is saved over is in [`BeliefFields`], and what shapes its answers in
/// [`StructuredFields`](crate::StructuredFields).
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SessionRequest {
    /// The generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// The messages so far, as `/v1/chat/completions` had them, with its answers.
    pub messages: Option<Vec<RequestMessage>>,
    /// The same of `/v1/completions`: one text, or the token ids of one prompt.
    pub prompt: Option<Prompt>,
    /// Whether its turns are kept from repeating the system messages, as in `/v1/chat/completions`.
    pub leak_guard: Option<bool>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Into which model's cache to restore; the body may be left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct RestoreRequest {
    /// The generator's name; the server's first one when absent.
    pub model: Option<String>,
    /// [`BeliefFields`] and everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What the session is taken for that is to be deleted; the body may be left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct DeleteRequest {
    /// [`BeliefFields`] and everything else.
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
    /// Its revision, from 1.
    pub mem_rev: u64,
    /// The hash of what it holds.
    pub mem_hash: String,
    /// Both in short, as requests may say it.
    pub context_id: String,
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
    /// Its revision; null when it cannot be restored, as this and the following.
    pub mem_rev: Option<u64>,
    /// The hash of what it holds.
    pub mem_hash: Option<String>,
    /// Both in short.
    pub context_id: Option<String>,
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
