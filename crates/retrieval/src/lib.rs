//! Documents in, traceable snippets out.
//!
//! The way through this crate is the way of a document: [`read_document`] turns a file into a
//! canonical text with sections and blocks, [`chunk`] cuts it by rule G-23, [`Collection`] stores
//! the chunks with a lexical and a vector index and finds them again. A chunk is a byte range of
//! the canonical text of one document revision and carries the fields of G-14, so that every
//! number and every citation downstream can be traced to bytes.
//!
//! What this crate does not do: run a model. Vectors come through the trait [`Encode`], and a
//! collection refuses an encoder other than the one it was made with (G-24).

mod chunk;
mod collection;
mod contract;
mod cut;
mod disk;
mod document;
mod encode;
mod error;
mod generation;
mod hash;
mod html;
mod lexical;
mod markdown;
mod nesting;
mod outline;
mod prepare;
mod read;
mod remember;
mod report;
mod search;
mod sentence;
pub mod testing;
mod vectors;

pub use chunk::{
    BlockType, Chunk, ChunkOptions, ChunkSpan, EmbeddingFacts, SpanUnit, TokenizerFacts,
};
pub use collection::{Collection, IngestProgress};
pub use contract::{Contract, SCHEMA_VERSION};
pub use cut::{Chunked, chunk};
pub use document::{Block, BlockKind, Document, DocumentFormat, Section};
pub use encode::{Encode, EncodeError, EncoderFacts};
pub use error::{FieldDiff, RetrievalError};
pub use hash::snippet_id;
pub use prepare::{PREPARATION, prepare};
pub use read::{MAX_DOCUMENT_BYTES, read_document, read_folder};
pub use remember::RememberingEncoder;
pub use report::{IngestReport, Spread};
pub use search::{Hit, SearchMode, SearchOptions};
