//! What can be wrong with a vocabulary, or with a text for it.

use std::ops::Range;

/// What can be wrong with a vocabulary or with a text for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The vocabulary is of a kind this crate does not build.
    #[error(
        "tokenizer model `{found}` is not supported, expected gpt2 (byte-level BPE), llama (sentencepiece BPE), t5 (Unigram) or bert (WordPiece)"
    )]
    UnknownModel {
        /// `tokenizer.ggml.model` of the file.
        found: String,
    },
    /// The name of the word splitter is not known.
    #[error("pre-tokenizer `{found}` is not supported, expected one of {known}")]
    UnknownPreTokenizer {
        /// `tokenizer.ggml.pre` of the file.
        found: String,
        /// All names that are supported.
        known: String,
    },
    /// A pattern that cuts text needs more than an automaton.
    #[error("pattern `{pattern}` for words is not supported: {source}")]
    UnsupportedPattern {
        /// The regular expression.
        pattern: String,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No tokens, or more than any vocabulary has.
    #[error("vocabulary size: expected 1 to {limit} tokens, found {found}")]
    VocabularySize {
        /// Tokens in the file.
        found: usize,
        /// Most tokens accepted.
        limit: usize,
    },
    /// More text than any vocabulary has.
    #[error("vocabulary text: expected up to {limit} bytes of all tokens together, found {found}")]
    VocabularyText {
        /// Bytes in the file.
        found: usize,
        /// Most bytes accepted.
        limit: usize,
    },
    /// The list of kinds does not match the list of tokens.
    #[error("token kinds: expected {expected}, one for each token, found {found}")]
    KindCount {
        /// Tokens in the file.
        expected: usize,
        /// Kinds in the file.
        found: usize,
    },
    /// The list of scores does not match the list of tokens.
    #[error("token scores: expected {expected}, one for each token, found {found}")]
    ScoreCount {
        /// Tokens in the file.
        expected: usize,
        /// Scores in the file.
        found: usize,
    },
    /// A score that cannot be compared.
    #[error("token {id}: expected a finite score, found {found}")]
    BadScore {
        /// Token id.
        id: usize,
        /// Score in the file.
        found: f32,
    },
    /// A token of the kind that stands for a byte, spelled otherwise.
    #[error("token {id}: expected a byte `<0x00>` to `<0xFF>`, found `{found}`")]
    BadByteToken {
        /// Token id.
        id: u32,
        /// Token in the file.
        found: String,
    },
    /// A token so long that text could make the search for it take very long.
    #[error("token {id}: expected at most {limit} bytes, found {found}")]
    TokenTooLong {
        /// Token id.
        id: u32,
        /// Most bytes accepted.
        limit: usize,
        /// Bytes in the file.
        found: usize,
    },
    /// The character map is damaged.
    #[error("precompiled_charsmap: expected a trie and its replacements, found {what}")]
    BadCharsMap {
        /// What is wrong.
        what: &'static str,
    },
    /// A vocabulary without a token that its model needs.
    #[error("the vocabulary has no {role} token `{literal}`")]
    MissingToken {
        /// What the token is for.
        role: &'static str,
        /// How it is spelled.
        literal: &'static str,
    },
    /// Whether text is lower-cased is not stated, and the vocabulary suggests that it is not.
    #[error(
        "token {id} `{token}` has an upper-case letter: expected normalizer.lowercase to say whether text is lower-cased, found no such key"
    )]
    UnknownCase {
        /// Token id.
        id: u32,
        /// The token.
        token: String,
    },
    /// A token kind outside 1 to 6.
    #[error("token {id}: expected a kind from 1 to 6, found {found}")]
    UnknownKind {
        /// Token id.
        id: usize,
        /// Kind in the file.
        found: i32,
    },
    /// A named token is not in the vocabulary.
    #[error("{role} token: expected an id below {vocab_len}, found {found}")]
    IdOutOfRange {
        /// `bos`, `eos` or `eot`.
        role: &'static str,
        /// Id in the file.
        found: u32,
        /// Tokens in the file.
        vocab_len: usize,
    },
    /// `add_bos` without a beginning-of-sequence token.
    #[error("add_bos_token is set, but the file names no bos token")]
    MissingBos,
    /// A merge whose parts or result are not ordinary tokens.
    #[error(
        "merge {rank} `{merge}`: expected `left right`, both and their concatenation ordinary tokens"
    )]
    BadMerge {
        /// Position in the list of merges.
        rank: usize,
        /// The merge as stored.
        merge: String,
    },
    /// A file is not what its name says.
    #[error("{file}: {source}")]
    BadJson {
        /// Its name.
        file: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file names a token that the vocabulary does not have.
    #[error("{role} token `{found}` is not in the vocabulary")]
    NoSuchToken {
        /// `bos` or `eos`.
        role: &'static str,
        /// Its literal.
        found: String,
    },
    /// An added token whose id is not the one that the vocabulary leads to.
    #[error("added token `{content}`: expected id {expected}, found {given:?}")]
    AddedTokenId {
        /// The token.
        content: String,
        /// Id in the list of added tokens.
        expected: u32,
        /// Id in the vocabulary, or the next free one.
        given: Option<u32>,
    },
    /// `tokenizer.json` describes something this crate cannot map to bytes.
    #[error("tokenizer.json: {field} `{found}` is not supported")]
    UnsupportedJson {
        /// Field of the file.
        field: &'static str,
        /// What the field holds.
        found: String,
    },
    /// The text has a byte that the vocabulary has no token for; the reference implementations
    /// drop it in silence.
    #[error("text byte {offset}: the vocabulary has no token for byte 0x{byte:02x}")]
    Unencodable {
        /// Byte offset in the text.
        offset: usize,
        /// The byte.
        byte: u8,
    },
    /// Ordinary text gave a control id; this would be a hole in the separation of the two.
    #[error("text bytes {span:?} gave control token {id}")]
    ControlFromText {
        /// The id.
        id: u32,
        /// Byte range in the text.
        span: Range<usize>,
    },
    /// The `tokenizers` crate refused.
    #[error("{doing}: {source}")]
    Library {
        /// What was being done.
        doing: &'static str,
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
