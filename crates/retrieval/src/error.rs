//! Everything that can be wrong with documents, encoders and collections on disk.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::EncodeError;

/// Why a document, an ingest, an open or a search was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RetrievalError {
    /// The operating system refused a file operation; a full disk ends here.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Only UTF-8 is read; guessing an encoding would make byte spans meaningless.
    #[error("document `{doc_id}`: not UTF-8 from byte {valid_up_to} on")]
    BadUtf8 {
        /// The document.
        doc_id: String,
        /// Offset of the first bad byte.
        valid_up_to: usize,
    },
    /// A document over the size limit.
    #[error("document `{doc_id}`: {found} bytes, expected at most {limit}")]
    TooLarge {
        /// The document.
        doc_id: String,
        /// [`crate::MAX_DOCUMENT_BYTES`].
        limit: u64,
        /// Its size.
        found: u64,
    },
    /// HTML whose tree would be too deep, or too large by repeated formatting, to be built in
    /// reasonable time.
    #[error("document `{doc_id}`: {what} {found}, expected at most {limit}")]
    TooDeep {
        /// The document.
        doc_id: String,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// The first value over it.
        found: usize,
    },
    /// A file name whose ending names no format that is read.
    #[error("{}: expected a name ending in .md, .markdown, .txt, .text, .html or .htm", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// Two documents of one ingest have the same name.
    #[error("document `{doc_id}`: given twice in one ingest")]
    DuplicateDocument {
        /// The name.
        doc_id: String,
    },
    /// Chunk sizes that contradict each other.
    #[error("chunk option `{field}`: expected {expected}, found {found}")]
    BadChunkOption {
        /// Field of [`crate::ChunkOptions`].
        field: &'static str,
        /// The rule.
        expected: &'static str,
        /// The value.
        found: usize,
    },
    /// One character that the tokenizer turns into more tokens than the encoder reads.
    #[error("document `{doc_id}` at byte {start}: {tokens} tokens, expected at most {window}")]
    OverWindow {
        /// The document.
        doc_id: String,
        /// First byte of the chunk.
        start: usize,
        /// Its tokens.
        tokens: usize,
        /// [`crate::ChunkOptions::window`].
        window: usize,
    },
    /// The encoder failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The encoder returned another number of vectors than it got texts.
    #[error("encoder: expected {expected} vectors, found {found}")]
    VectorCount {
        /// Texts given.
        expected: usize,
        /// Vectors returned.
        found: usize,
    },
    /// A vector of the wrong length (G-24).
    #[error("vector of `{name}`: expected {expected} values, found {found}")]
    VectorDim {
        /// Snippet id, or `query`.
        name: String,
        /// The collection's `dim`.
        expected: usize,
        /// Its length.
        found: usize,
    },
    /// A vector that is not of unit norm (G-24); nothing here re-normalises.
    #[error("vector of `{name}`: expected norm 1 within 0.001, found {norm}")]
    VectorNorm {
        /// Snippet id, or `query`.
        name: String,
        /// Its norm.
        norm: f64,
    },
    /// The encoder is not the one the collection was made with (G-07, G-24).
    #[error("encoder contract: {}", DiffList(diff))]
    ContractMismatch {
        /// Every field that differs.
        diff: Vec<FieldDiff>,
    },
    /// The encoder cannot serve any collection.
    #[error("encoder field `{field}`: expected {expected}, found {found}")]
    UnsupportedEncoder {
        /// Field of [`crate::EncoderFacts`].
        field: &'static str,
        /// What is supported.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// The folder already holds a collection.
    #[error("{}: already holds a collection", dir.display())]
    AlreadyExists {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds no collection, or its `CURRENT` file is damaged.
    #[error("{}: expected one line naming a generation, found {found:?}", path.display())]
    BadCurrent {
        /// The `CURRENT` file.
        path: PathBuf,
        /// Its start.
        found: String,
    },
    /// Written by another version of this program.
    #[error("{}: expected schema_version {expected}, found {found}", path.display())]
    UnsupportedSchema {
        /// The manifest.
        path: PathBuf,
        /// What this version reads.
        expected: u32,
        /// What the manifest says.
        found: u64,
    },
    /// A file that is not the one the manifest names: truncated, changed or mixed up.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What the manifest or the format asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A JSON record that does not parse into its schema.
    #[error("{} line {line}: {source}", path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// Line from 1.
        line: usize,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// Another process or value is writing to the collection.
    #[error("{}: another writer holds the lock", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The collection was written since this value opened it; open it again.
    #[error("collection changed on disk: opened generation {opened}, current is {current}")]
    Stale {
        /// What this value has in memory.
        opened: String,
        /// What `CURRENT` names.
        current: String,
    },
    /// The lexical index failed.
    #[error("lexical index: {source}")]
    Lexical {
        /// What tantivy said.
        source: Box<tantivy::TantivyError>,
    },
    /// A question without a word in it.
    #[error("query: expected text, found none after preparation")]
    EmptyQuery,
}

impl From<tantivy::TantivyError> for RetrievalError {
    fn from(source: tantivy::TantivyError) -> RetrievalError {
        RetrievalError::Lexical { source: Box::new(source) }
    }
}

/// One field in which the stored and the live contract differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDiff {
    /// Name of the field.
    pub field: String,
    /// Value in the collection.
    pub stored: String,
    /// Value of the encoder at hand.
    pub live: String,
}

/// Writes a diff as `field: stored A, live B; …`.
struct DiffList<'a>(&'a [FieldDiff]);

impl fmt::Display for DiffList<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, FieldDiff { field, stored, live }) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { "; " };
            write!(formatter, "{separator}{field}: stored {stored}, live {live}")?;
        }
        Ok(())
    }
}
