//! A document: its canonical text, the sections its headings make, the blocks chunking keeps whole.
//!
//! Reading files is in `read`, the scanners are in `markdown` and `html`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// One revision of one document. All ranges are byte ranges of [`Document::text`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Stable name of the document in its collection, for example its relative path.
    pub doc_id: String,
    /// Revision: the first 16 hex digits of the sha256 of `text`.
    pub rev: String,
    /// Where a reader finds the original.
    pub source_url: String,
    /// BCP 47 tag as the source declares it, `und` if it declares none.
    pub lang: String,
    /// What the original was.
    pub format: DocumentFormat,
    /// Canonical text: NFC, `\n` line ends, no U+00AD, no byte order mark, no control characters but
    /// tab and line end. For HTML the extracted plain text.
    pub text: String,
    /// In order, disjoint; together they cover `text`.
    pub sections: Vec<Section>,
    /// In order, disjoint; each inside one section.
    pub blocks: Vec<Block>,
}

/// What the original of a document was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DocumentFormat {
    /// `.md`, `.markdown`.
    Markdown,
    /// `.txt`, `.text`.
    PlainText,
    /// `.html`, `.htm`.
    Html,
}

/// A heading and what follows it up to the next heading of any level.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// `doc_id#slug/of/heading/path`; the part before the first heading is `doc_id#top`. Stable
    /// as long as the headings above it are.
    pub section_id: String,
    /// The heading's words; empty for the part before the first heading.
    pub title: String,
    /// Titles from the outermost heading down to this one.
    pub path: Vec<String>,
    /// Fragment that a browser jumps to, `#` included; empty for the top.
    pub anchor: String,
    /// Byte range, heading included.
    pub span: Range<usize>,
}

/// A stretch of text that has a kind. Trimmed of surrounding blank space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// What it is.
    pub kind: BlockKind,
    /// Byte range in the canonical text.
    pub span: Range<usize>,
}

/// What a block is; decides where it may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockKind {
    /// Opens a section; never alone in a chunk if the section has more.
    Heading,
    /// Cut at sentence ends.
    Paragraph,
    /// One list item; cut at sentence ends.
    ListItem,
    /// Kept whole; over the encoder window cut between rows.
    Table,
    /// Kept whole; over the encoder window cut between lines. Formulas too.
    Code,
}
