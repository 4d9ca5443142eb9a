//! What an upstream did instead of answering: every fault has a name, a kind and a status of ours.

use exrail_wire::{ErrorBody, ErrorDetail};
use thiserror::Error;

/// Why there is no answer of an upstream.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UpstreamFault {
    /// No connection, or one that broke before an answer began.
    #[error("no answer: {0}")]
    Unreachable(String),
    /// Nothing came in time.
    #[error("expected {what} within {limit_s} s, found none")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// The limit in seconds.
        limit_s: u64,
    },
    /// The gateway's key is not one of the upstream's.
    #[error("refused the gateway's key (status {status}); see --upstream-key-file")]
    Unauthorized {
        /// 401 or 403.
        status: u16,
    },
    /// It has too much to do.
    #[error("busy; ask again after {retry_after_s} s")]
    Busy {
        /// What it said, or a default.
        retry_after_s: u64,
    },
    /// It does not want the request.
    #[error("refused the request (status {status}): {message}")]
    Refused {
        /// Its status, 4xx.
        status: u16,
        /// Its words, shortened.
        message: String,
        /// Its name for it.
        code: Option<String>,
    },
    /// It has no model, or broke.
    #[error("failed (status {status}): {message}")]
    Failed {
        /// Its status, 5xx or one that means nothing here.
        status: u16,
        /// Its words, shortened.
        message: String,
    },
    /// 200 with nothing in it.
    #[error("status 200 with an empty body")]
    EmptyBody,
    /// 200 with something else than JSON.
    #[error("expected JSON, found `{found}`")]
    NotJson {
        /// Its beginning.
        found: String,
    },
    /// JSON without the parts of an answer.
    #[error("expected {expected} in the reply, found none")]
    NoAnswer {
        /// What is missing.
        expected: &'static str,
    },
    /// Another model answered.
    #[error("expected an answer of `{expected}`, found one of `{found}`")]
    WrongModel {
        /// The one that was asked.
        expected: String,
        /// The one that answered.
        found: String,
    },
    /// The stream ended without its end.
    #[error("the stream was cut: expected a finish reason and its end, found {found}")]
    Cut {
        /// What was there.
        found: String,
    },
    /// The stream lives and gives nothing.
    #[error("the stream stalled: expected an event within {limit_s} s, found comments at most")]
    Stalled {
        /// The limit in seconds.
        limit_s: u64,
    },
    /// Its text is none.
    #[error(
        "garbled text: {share_percent} % of its characters are control or replacement characters"
    )]
    Garbled {
        /// Their share.
        share_percent: u64,
    },
    /// It told of an error inside a stream.
    #[error("told of an error in its stream: {message}")]
    InStream {
        /// Its words, shortened.
        message: String,
    },
}

impl UpstreamFault {
    /// A stable name, in errors, records and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "upstream_unreachable",
            Self::Late { .. } => "upstream_late",
            Self::Unauthorized { .. } => "upstream_unauthorized",
            Self::Busy { .. } => "upstream_busy",
            Self::Refused { code: Some(code), .. } if code == "context_length_exceeded" => {
                "context_length_exceeded"
            }
            Self::Refused { .. } => "upstream_refused",
            Self::Failed { .. } => "upstream_failed",
            Self::EmptyBody => "upstream_empty",
            Self::NotJson { .. } => "upstream_not_json",
            Self::NoAnswer { .. } => "upstream_no_answer",
            Self::WrongModel { .. } => "upstream_wrong_model",
            Self::Cut { .. } => "upstream_cut",
            Self::Stalled { .. } => "upstream_stalled",
            Self::Garbled { .. } => "upstream_garbled",
            Self::InStream { .. } => "upstream_error_event",
        }
    }

    /// The status that our client gets.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Late { .. } | Self::Stalled { .. } => 504,
            Self::Busy { .. } => 429,
            Self::Refused { .. } => 400,
            Self::Unreachable(_)
            | Self::Unauthorized { .. }
            | Self::Failed { .. }
            | Self::EmptyBody
            | Self::NotJson { .. }
            | Self::NoAnswer { .. }
            | Self::WrongModel { .. }
            | Self::Cut { .. }
            | Self::Garbled { .. }
            | Self::InStream { .. } => 502,
        }
    }

    /// Whether the same request may be sent again: nothing was computed that somebody has seen.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Busy { .. } | Self::Failed { .. } | Self::EmptyBody => {
                true
            }
            Self::Late { .. }
            | Self::Unauthorized { .. }
            | Self::Refused { .. }
            | Self::NotJson { .. }
            | Self::NoAnswer { .. }
            | Self::WrongModel { .. }
            | Self::Cut { .. }
            | Self::Stalled { .. }
            | Self::Garbled { .. }
            | Self::InStream { .. } => false,
        }
    }

    /// What it says of the upstream beyond this request.
    #[must_use]
    pub(crate) fn verdict(&self) -> FaultVerdict {
        match self {
            Self::Unreachable(_)
            | Self::Unauthorized { .. }
            | Self::EmptyBody
            | Self::NotJson { .. }
            | Self::WrongModel { .. }
            | Self::Garbled { .. } => FaultVerdict::Closes,
            // A long request may be late by itself.
            Self::Late { .. } | Self::NoAnswer { .. } | Self::Stalled { .. } => {
                FaultVerdict::Suspects
            }
            // One of these may be a request's own; many in a row close the fence as well.
            Self::Failed { .. } | Self::Cut { .. } | Self::InStream { .. } => FaultVerdict::Counts,
            Self::Busy { .. } | Self::Refused { .. } => FaultVerdict::Nothing,
        }
    }

    /// The body that our client gets.
    #[must_use]
    pub fn body(&self, upstream: &str) -> ErrorBody {
        let kind = match self.status() {
            400 => "invalid_request_error",
            429 => "rate_limit_error",
            504 => "timeout_error",
            _ => "server_error",
        };
        ErrorBody {
            error: ErrorDetail {
                message: format!("upstream `{upstream}`: {self}"),
                kind,
                param: None,
                code: self.code(),
                diff: Vec::new(),
            },
        }
    }
}

/// What a fault says of its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultVerdict {
    /// It is not what was proved: the fence closes until it is proved anew.
    Closes,
    /// It may not be: it has to generate once more, and that decides.
    Suspects,
    /// One more of several in a row.
    Counts,
    /// Nothing.
    Nothing,
}

/// The first characters of a foreign text, on one line and without what a terminal obeys.
pub(crate) fn brief(text: &str) -> String {
    const MOST: usize = 200;
    let plain = |char: char| if char.is_control() { ' ' } else { char };
    let mut told: String = text.chars().take(MOST).map(plain).collect();
    if text.chars().nth(MOST).is_some() {
        told.push('…');
    }
    told
}
