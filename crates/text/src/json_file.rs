//! The parts of `tokenizer.json` and of the files beside it, as they are written.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

use crate::token_table::TokenTable;

/// A `tokenizer.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct File {
    #[serde(default)]
    pub(crate) added_tokens: Vec<Added>,
    #[serde(default)]
    pub(crate) normalizer: Value,
    #[serde(default)]
    pub(crate) pre_tokenizer: Value,
    #[serde(default)]
    pub(crate) post_processor: Value,
    #[serde(default)]
    pub(crate) decoder: Value,
    pub(crate) model: Model,
}

/// An added token.
#[derive(Debug, Deserialize)]
pub(crate) struct Added {
    pub(crate) id: u32,
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) single_word: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    /// Absent means yes unless the token is special, as in the `tokenizers` crate.
    pub(crate) normalized: Option<bool>,
    #[serde(default)]
    pub(crate) special: bool,
}

/// The model: one struct for all types, since a field that a type lacks is simply absent.
#[derive(Debug, Deserialize)]
pub(crate) struct Model {
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) vocab: Vocabulary,
    #[serde(default)]
    pub(crate) merges: Vec<Merge>,
    pub(crate) unk_token: Option<String>,
    pub(crate) unk_id: Option<usize>,
    pub(crate) dropout: Option<f32>,
    pub(crate) continuing_subword_prefix: Option<String>,
    pub(crate) end_of_word_suffix: Option<String>,
    pub(crate) max_input_chars_per_word: Option<usize>,
    #[serde(default)]
    pub(crate) fuse_unk: bool,
    #[serde(default)]
    pub(crate) byte_fallback: bool,
    #[serde(default)]
    pub(crate) ignore_merges: bool,
}

/// Tokens with ids, or in the order of their ids with scores.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Vocabulary {
    Ids(HashMap<String, u32>),
    Scores(Vec<(String, f64)>),
}

/// A merge; files write it in one string or, since 2024, in two.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Merge {
    One(String),
    Two(String, String),
}

impl File {
    /// One more than the largest id; 0 without tokens.
    pub(crate) fn vocab_len(&self) -> usize {
        let model = self.model.vocab.iter().map(|it| it.1);
        let added = self.added_tokens.iter().map(|it| it.id);
        model.chain(added).max().map_or(0, |last| last as usize + 1)
    }

    /// The token for what the vocabulary cannot spell.
    pub(crate) fn unknown(&self, tokens: &TokenTable) -> Option<u32> {
        let by_id = self.model.unk_id.and_then(|id| u32::try_from(id).ok());
        // The crate takes `[UNK]` for a WordPiece model that names none.
        let default = (self.model.kind.as_deref() == Some("WordPiece")).then_some("[UNK]");
        by_id.or_else(|| tokens.id(self.model.unk_token.as_deref().or(default)?))
    }
}

impl Vocabulary {
    pub(crate) fn len(&self) -> usize {
        match self {
            Vocabulary::Ids(ids) => ids.len(),
            Vocabulary::Scores(scores) => scores.len(),
        }
    }

    /// Tokens with their ids, in no order.
    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = (&str, u32)> + '_> {
        match self {
            Vocabulary::Ids(ids) => Box::new(ids.iter().map(|(token, &id)| (token.as_str(), id))),
            Vocabulary::Scores(scores) => {
                Box::new(scores.iter().zip(0..).map(|((token, _), id)| (token.as_str(), id)))
            }
        }
    }
}

impl Merge {
    pub(crate) fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Merge::One(merge) => merge.split_once(' '),
            Merge::Two(left, right) => Some((left, right)),
        }
    }
}

impl fmt::Display for Merge {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Merge::One(merge) => out.write_str(merge),
            Merge::Two(left, right) => write!(out, "{left} {right}"),
        }
    }
}

impl Added {
    /// Whether the token is looked for in normalised text.
    pub(crate) fn is_normalized(&self) -> bool {
        self.normalized.unwrap_or(!self.special)
    }

    pub(crate) fn into_library(self) -> AddedToken {
        let normalized = self.is_normalized();
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(normalized)
    }
}
