//! What a chunk is (G-14) and what its size may be (G-23). Cutting is in `cut`.

use serde::{Deserialize, Serialize};

/// One retrievable piece of one document revision, with the fields of G-14.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chunk {
    /// The first 16 hex digits of sha256 over `doc_id`, `rev`, start and end.
    pub snippet_id: String,
    /// [`crate::Document::doc_id`].
    pub doc_id: String,
    /// [`crate::Section::section_id`]; a chunk never spans two sections.
    pub section_id: String,
    /// [`crate::Document::rev`].
    pub rev: String,
    /// [`crate::Document::source_url`].
    pub source_url: String,
    /// Where it stands in the canonical text.
    pub span: ChunkSpan,
    /// Content tokens of the prepared text by the encoder's tokenizer, without prefix.
    pub tokens: usize,
    /// [`crate::Document::lang`].
    pub lang: String,
    /// What kind of text it is.
    pub block_type: BlockType,
    /// [`crate::Section::anchor`].
    pub anchor: String,
    /// The canonical text of `span`, byte for byte.
    pub text: String,
    /// Hex sha256 of `text`.
    pub text_sha256: String,
    /// Hex sha256 over all the other fields; see [`Chunk::contract_hash`].
    pub contract_sha256: String,
    /// The tokenizer that counted.
    pub tokenizer: TokenizerFacts,
    /// The vector space it is embedded in.
    pub embedding: EmbeddingFacts,
}

/// A byte range of the canonical text, and its lines for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkSpan {
    /// First byte.
    pub start: usize,
    /// One past the last byte; greater than `start`.
    pub end: usize,
    /// Always bytes; stated because traces of other programs count characters.
    pub unit: SpanUnit,
    /// Line of the first byte, from 1.
    pub line_start: usize,
    /// Line of the last byte, from 1.
    pub line_end: usize,
}

/// The unit of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpanUnit {
    /// Bytes of UTF-8.
    Byte,
}

/// What kind of text a chunk holds; headings do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockType {
    /// Paragraphs.
    Prose,
    /// List items.
    List,
    /// A table.
    Table,
    /// Code or a formula.
    Code,
    /// More than one of these.
    Mixed,
    /// A heading alone.
    Heading,
}

/// The tokenizer part of a chunk's contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerFacts {
    /// The encoder's name.
    pub name: String,
    /// Version of the text preparation that runs before it, [`crate::PREPARATION`].
    pub version: String,
    /// [`crate::EncoderFacts::tokenizer_fp`].
    pub hash: String,
    /// `keep`: preparation does not change case. What the tokenizer does is under `hash`.
    pub case: String,
    /// `NFC`.
    pub unicode_norm: String,
}

/// The embedding part of a chunk's contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingFacts {
    /// [`crate::Encode::fingerprint`].
    pub encoder_fp: String,
    /// Length of a vector.
    pub dim: usize,
    /// `cosine`.
    pub metric: String,
    /// Unit norm.
    pub normalized: bool,
    /// How token vectors become one.
    pub pooling: String,
}

/// Sizes of chunks in tokens (G-23). `min ≤ max ≤ window`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkOptions {
    /// A smaller chunk is joined to its neighbour in the same section where that fits.
    pub min: usize,
    /// No chunk is larger, except one sentence, table or code block that alone is.
    pub max: usize,
    /// No chunk is larger, with no exception: what the encoder reads, prefix included.
    pub window: usize,
}
