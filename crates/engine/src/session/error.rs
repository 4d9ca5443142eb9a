//! Why a session was not saved, found or restored.

use std::path::PathBuf;

use thiserror::Error;

use super::memory::{Difference, Memory};

/// A session that was refused. What was refused on the way in left nothing in the cache that did not pass its
/// own checks, and the next request computes what is missing.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The name could be something else than a file's.
    #[error(
        "session name: expected 1 to {longest} characters out of A-Z a-z 0-9 . _ -, the first none of \
         . -, found `{found}`"
    )]
    Name {
        /// What was given.
        found: String,
        /// Characters at most.
        longest: usize,
    },
    /// There is none of that name.
    #[error("session `{name}`: not found; `GET /v1/exrail/sessions` lists what there is")]
    NotFound {
        /// Its name.
        name: String,
    },
    /// It is not what the request takes it for (G-22).
    #[error(
        "session `{name}`: expected {}; read what it is now with `GET /v1/exrail/sessions`, and ask again from \
         there",
        told(differences)
    )]
    Conflict {
        /// Its name.
        name: String,
        /// What it is; `None`: there is none.
        memory: Option<Memory>,
        /// What differs, at least one.
        differences: Vec<Difference>,
    },
    /// A turn that may write it has not ended (G-22).
    #[error("session `{name}`: a turn of it has not ended; ask again when it has")]
    Busy {
        /// Its name.
        name: String,
        /// What it is; `None`: there is none.
        memory: Option<Memory>,
    },
    /// The folder belongs to another process.
    #[error(
        "session folder {}: in use by another server; stop it or pass another --session-dir",
        path.display()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The engine shares no prefixes.
    #[error(
        "sessions: expected an engine with a prefix cache, found it off; start without --no-prefix-cache"
    )]
    NoPrefixCache,
    /// What is computed has no name yet.
    #[error("sessions: the sha256 of the model is not known yet; ask again")]
    Unnamed,
    /// Nothing of the conversation is in the cache.
    #[error(
        "session: expected a whole page ({page_tokens} tokens) of this conversation in the cache, found none \
         of its {tokens} tokens; ask it once with the same messages, then save it"
    )]
    NothingCached {
        /// Tokens of the conversation.
        tokens: usize,
        /// Tokens of a page.
        page_tokens: usize,
    },
    /// Its pages were given up for others while they were copied.
    #[error("session: its pages were given up for others while they were copied; ask again")]
    Lost,
    /// The file cannot be kept.
    #[error("session: expected at most {cap_bytes} bytes, found {bytes}; raise --session-mib")]
    TooLarge {
        /// Bytes of the file.
        bytes: u64,
        /// Bytes of all files.
        cap_bytes: u64,
    },
    /// The pool has not the pages.
    #[error(
        "session: expected room for {needed} pages in the KV pool, found it for {found}; ask again when fewer \
         answers run, or raise --kv-pages"
    )]
    NoRoom {
        /// Pages of the session.
        needed: usize,
        /// Those that got a place.
        found: usize,
    },
    /// No file of this kind.
    #[error("session file: expected it to begin with `EXRAILKV`, found something else")]
    NotASession,
    /// A file of another version.
    #[error(
        "session file: expected format version {expected}, found {found}; delete the session and save its \
         conversation again"
    )]
    Version {
        /// What this program writes.
        expected: u32,
        /// What the file says.
        found: u32,
    },
    /// Bytes are missing, or too many.
    #[error("session file: expected {expected} bytes, found {found}; it is damaged")]
    Length {
        /// What its header says, or the least that there must be.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// The header says what cannot be.
    #[error("session file: header: {problem}; it is damaged")]
    Header {
        /// What is wrong.
        problem: String,
    },
    /// It was computed under other conditions.
    #[error(
        "session: pin `{pin}`: expected `{expected}`, found `{found}`; ask the conversation anew"
    )]
    Pin {
        /// Name of the pin.
        pin: String,
        /// What this engine has.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// It is somebody else's.
    #[error("session file: expected the session `{name}` of this client, found another one")]
    Owner {
        /// The name that was asked for.
        name: String,
    },
    /// The bytes of a page are not those that were saved.
    #[error(
        "session file: page {page}: expected the checksum that was saved, found another; it is damaged"
    )]
    Page {
        /// Its number, from 0.
        page: usize,
    },
    /// The bytes of the file are not those that were saved.
    #[error("session file: expected the sha256 that was saved, found another; it is damaged")]
    Digest,
    /// The engine no longer runs.
    #[error("the engine stopped")]
    Stopped,
}

fn told(differences: &[Difference]) -> String {
    let one = |Difference { field, expected, found }: &Difference| {
        format!("`{field}` {expected}, found {found}")
    };
    differences.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl SessionError {
    /// For errors of a file.
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> SessionError {
        let path = path.into();
        move |source| SessionError::Io { path, source }
    }
}
