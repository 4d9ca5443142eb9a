//! What a chunk is (G-14) and what its size may be (G-23). Cutting is in `cut`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::hash::{sha256_hex, snippet_id};
use crate::{Document, Encode, EncoderFacts, PREPARATION, RetrievalError, Section};

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

/// Default `min` (G-23).
const DEFAULT_MIN: usize = 40;

/// Default `max` for prose (G-23).
const DEFAULT_MAX: usize = 130;

/// The smallest window that is accepted; NFKC can make 18 tokens of one character (U+FDFA).
const SMALLEST_WINDOW: usize = 32;

impl ChunkOptions {
    /// 40 to 130 tokens in the encoder's window less its passage prefix; lower where the window is.
    #[must_use]
    pub fn for_encoder(encoder: &dyn Encode) -> ChunkOptions {
        let facts = encoder.facts();
        let prefix = encoder.tokenize(&facts.passage_prefix).len();
        let window = facts.max_tokens.saturating_sub(prefix);
        let max = DEFAULT_MAX.min(window);
        ChunkOptions { min: DEFAULT_MIN.min(max), max, window }
    }

    /// Whether the sizes are in order.
    ///
    /// # Errors
    /// [`RetrievalError::BadChunkOption`].
    pub(crate) fn check(&self) -> Result<(), RetrievalError> {
        let bad =
            |field, expected, found| Err(RetrievalError::BadChunkOption { field, expected, found });
        if self.window < SMALLEST_WINDOW {
            return bad("window", "at least 32 tokens", self.window);
        }
        if self.max == 0 || self.max > self.window {
            return bad("max", "1 to window", self.max);
        }
        if self.min > self.max {
            return bad("min", "at most max", self.min);
        }
        Ok(())
    }
}

impl Chunk {
    /// Hex sha256 over the JSON of this chunk with an empty `contract_sha256`: what
    /// `contract_sha256` must be. It lets a reader of a trace check one chunk by itself.
    ///
    /// # Panics
    /// Never: the fields are strings and numbers, which always serialise.
    #[must_use]
    pub fn contract_hash(&self) -> String {
        let unsigned = Chunk { contract_sha256: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&unsigned).expect("strings and numbers always serialise");
        sha256_hex(&json)
    }

    /// Byte range in the canonical text of the document.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.span.start..self.span.end
    }
}

/// Makes the chunks of one document: the fields that all of them share.
pub(crate) struct ChunkWriter<'d> {
    document: &'d Document,
    tokenizer: TokenizerFacts,
    embedding: EmbeddingFacts,
    line_starts: Vec<usize>,
}

impl<'d> ChunkWriter<'d> {
    pub(crate) fn new(document: &'d Document, encoder: &dyn Encode) -> ChunkWriter<'d> {
        let facts: EncoderFacts = encoder.facts();
        let line_starts =
            document.text.match_indices('\n').map(|(at, _)| at + 1).collect::<Vec<_>>();
        ChunkWriter {
            document,
            tokenizer: TokenizerFacts {
                name: facts.name,
                version: PREPARATION.to_owned(),
                hash: facts.tokenizer_fp,
                case: "keep".to_owned(),
                unicode_norm: "NFC".to_owned(),
            },
            embedding: EmbeddingFacts {
                encoder_fp: encoder.fingerprint().to_owned(),
                dim: facts.dim,
                metric: facts.metric,
                normalized: facts.normalized,
                pooling: facts.pooling,
            },
            line_starts,
        }
    }

    pub(crate) fn doc_id(&self) -> &str {
        &self.document.doc_id
    }

    /// The chunk at `span`, which is not empty and lies inside `section`.
    pub(crate) fn write(
        &self,
        section: &Section,
        span: Range<usize>,
        tokens: usize,
        block_type: BlockType,
    ) -> Chunk {
        let document = self.document;
        let text = document.text[span.clone()].to_owned();
        let snippet_id = snippet_id(&document.doc_id, &document.rev, span.clone());
        let mut chunk = Chunk {
            snippet_id,
            doc_id: document.doc_id.clone(),
            section_id: section.section_id.clone(),
            rev: document.rev.clone(),
            source_url: document.source_url.clone(),
            span: ChunkSpan {
                start: span.start,
                end: span.end,
                unit: SpanUnit::Byte,
                line_start: self.line_of(span.start),
                line_end: self.line_of(span.end - 1),
            },
            tokens,
            lang: document.lang.clone(),
            block_type,
            anchor: section.anchor.clone(),
            text_sha256: sha256_hex(text.as_bytes()),
            text,
            contract_sha256: String::new(),
            tokenizer: self.tokenizer.clone(),
            embedding: self.embedding.clone(),
        };
        chunk.contract_sha256 = chunk.contract_hash();
        chunk
    }

    fn line_of(&self, at: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= at) + 1
    }
}
