//! What can go wrong between a model's name and its files.

use std::path::PathBuf;

use thiserror::Error;

/// Why a model could not be resolved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither a path nor a name of the registry.
    #[error(
        "model `{name}`: no such file or folder, and not a name in the registry; known: {known}"
    )]
    UnknownModel {
        /// What the user wrote.
        name: String,
        /// The names of the registry.
        known: String,
    },
    /// A known model of the other kind.
    #[error("model `{name}`: expected a {expected}, the registry says it is a {found}")]
    WrongKind {
        /// The name.
        name: String,
        /// Kind asked for.
        expected: super::Kind,
        /// Kind found.
        found: super::Kind,
    },
    /// The registry file is malformed.
    #[error("registry {}: {reason}", file.display())]
    BadRegistry {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The model is not cached and fetching was forbidden.
    #[error("model `{name}`: not in the cache {}; run `exrail pull {name}`", cache.display())]
    NotCached {
        /// The name.
        name: String,
        /// Cache folder.
        cache: PathBuf,
    },
    /// A file has the wrong length.
    #[error("{}: expected {expected} bytes, found {found}; the file was removed", file.display())]
    WrongSize {
        /// The file.
        file: PathBuf,
        /// Bytes in the registry.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file has the wrong content.
    #[error("{}: expected sha256 {expected}, found {found}; the file was removed", file.display())]
    WrongHash {
        /// The file.
        file: PathBuf,
        /// Hash in the registry.
        expected: String,
        /// Hash found.
        found: String,
    },
    /// Every source failed; each reason in order.
    #[error("model `{name}`: no source could deliver it:\n{}", reasons.join("\n"))]
    AllSourcesFailed {
        /// The name.
        name: String,
        /// One line a source.
        reasons: Vec<String>,
    },
    /// One source failed.
    #[error("{origin}: {reason}")]
    Source {
        /// The source.
        origin: String,
        /// Why it failed.
        reason: String,
    },
    /// No folder for the cache could be derived.
    #[error("no cache folder: set EXRAIL_HOME, XDG_CACHE_HOME or HOME")]
    NoCacheFolder,
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

impl HubError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
