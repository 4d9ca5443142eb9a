//! Per token of a vocabulary: the bytes it stands for, its literal, and whether it steers the model.

use std::sync::Arc;

use crate::TokenizerError;
use crate::spellings::{Index, Spellings};

/// More tokens than any published vocabulary; keeps a hostile file from asking for memory.
const MAX_VOCAB_LEN: usize = 1 << 22;

/// Per token: its bytes, its literal and whether it is a control token.
#[derive(Debug)]
pub(crate) struct TokenTable {
    spellings: Arc<Spellings>,
    index: Index,
    /// Bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// (V) where each token ends in `bytes`.
    ends: Vec<u32>,
    /// (V)
    control: Vec<bool>,
}

impl TokenTable {
    /// A table for tokens that are written like this; what they stand for is yet to be told, token
    /// by token.
    pub(crate) fn new(spellings: Arc<Spellings>) -> TokenTable {
        let n_tokens = spellings.len();
        let ids = 0..u32::try_from(n_tokens).expect("the vocabulary size has been checked");
        TokenTable {
            index: Index::new(&spellings, ids),
            spellings,
            bytes: Vec::new(),
            ends: Vec::with_capacity(n_tokens),
            control: Vec::with_capacity(n_tokens),
        }
    }

    /// Tells the bytes of the next token, and whether it is a control token.
    pub(crate) fn push(&mut self, bytes: &[u8], control: bool) {
        self.bytes.extend_from_slice(bytes);
        let end = u32::try_from(self.bytes.len());
        self.ends.push(end.expect("a token stands for hardly more bytes than it is written with"));
        self.control.push(control);
    }

    /// How the tokens are written.
    pub(crate) fn spellings(&self) -> &Arc<Spellings> {
        &self.spellings
    }

    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[start as usize..end as usize])
    }

    /// Id of the first token that is spelled like this.
    pub(crate) fn id(&self, literal: &str) -> Option<u32> {
        self.index.id(&self.spellings, literal)
    }

    /// All spellings with their ids, in no order.
    pub(crate) fn literals(&self) -> impl Iterator<Item = (&str, u32)> {
        self.index.ids().map(|id| (self.spellings.get(id), id))
    }

    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    /// Makes `id` a control token, if it is in the vocabulary.
    pub(crate) fn set_control(&mut self, id: u32) {
        if let Some(control) = self.control.get_mut(id as usize) {
            *control = true;
        }
    }

    /// Number of tokens, V.
    pub(crate) fn len(&self) -> usize {
        self.control.len()
    }
}

/// Refuses a vocabulary without tokens, or with more than any has.
pub(crate) fn check_vocab_len(found: usize) -> Result<(), TokenizerError> {
    if found == 0 || found > MAX_VOCAB_LEN {
        return Err(TokenizerError::VocabularySize { found, limit: MAX_VOCAB_LEN });
    }
    Ok(())
}
